//! The one balanced tree below [`crate::IntervalTree`] and [`crate::SpanMap`].
//!
//! Nodes live in a vector and name each other by index, so there is no unsafe code, one allocation for all of them, and a way to make room
//! ahead of time: after `reserve(n)` the next `n` inserts cannot fail (I-9). Freed nodes form a list through `left`.
//! Order is by start, then by last, then by index, so that equal spans have a fixed order and every node can be found again from its key.
//! It is an AVL tree: at 2^32 nodes no path is longer than 46. Each node also knows, of the subtree below it, the lowest start, the
//! highest last and the widest gap between neighbours; the last is only meaningful when spans do not overlap.

mod query;
#[cfg(test)]
mod tests;

use crate::{Address, Span};
use alloc::vec::Vec;
use thiserror::Error;

/// No memory for another entry; nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("no memory for another span; nothing was changed, free some and try again")]
pub struct OutOfMemory;

/// No node.
pub(crate) const NIL: u32 = u32::MAX;
/// The height of an AVL tree of 2^32 nodes is below 1.4405 * 32 + 1.
const MAX_HEIGHT: usize = 48;

pub(crate) struct Node<A, V> {
    start: A,
    last: A,
    low: A,
    high: A,
    gap: u64,
    left: u32,
    right: u32,
    generation: u32,
    height: u8,
    /// `None` marks a free node.
    value: Option<V>,
}

/// From the root down; `len` nodes of it count.
pub(crate) struct Path {
    nodes: [u32; MAX_HEIGHT],
    len: usize,
}

impl Path {
    #[inline]
    pub(crate) const fn new() -> Self {
        Self { nodes: [NIL; MAX_HEIGHT], len: 0 }
    }
    #[inline]
    fn push(&mut self, node: u32) {
        self.nodes[self.len] = node;
        self.len += 1;
    }
    #[inline]
    fn pop(&mut self) -> Option<u32> {
        self.len = self.len.checked_sub(1)?;
        Some(self.nodes[self.len])
    }
}

pub(crate) struct Avl<A, V> {
    nodes: Vec<Node<A, V>>,
    root: u32,
    free: u32,
    len: u32,
    #[cfg(test)]
    visits: core::sync::atomic::AtomicU64,
}

fn gap_between<A: Address>(last: A, start: A) -> u64 {
    start.get().saturating_sub(last.get()).saturating_sub(1)
}

impl<A: Address, V> Avl<A, V> {
    pub(crate) const fn new() -> Self {
        Self {
            nodes: Vec::new(),
            root: NIL,
            free: NIL,
            len: 0,
            #[cfg(test)]
            visits: core::sync::atomic::AtomicU64::new(0),
        }
    }

    #[inline]
    fn node(&self, index: u32) -> &Node<A, V> {
        #[cfg(test)]
        self.visits.fetch_add(1, core::sync::atomic::Ordering::Relaxed);
        &self.nodes[index as usize]
    }

    #[inline]
    fn node_mut(&mut self, index: u32) -> &mut Node<A, V> {
        #[cfg(test)]
        self.visits.fetch_add(1, core::sync::atomic::Ordering::Relaxed);
        &mut self.nodes[index as usize]
    }

    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.len as usize
    }

    #[inline]
    pub(crate) fn span(&self, index: u32) -> Span<A> {
        let node = self.node(index);
        Span::of(node.start, node.last)
    }

    pub(crate) fn generation(&self, index: u32) -> u32 {
        self.node(index).generation
    }

    #[inline]
    pub(crate) fn entry(&self, index: u32) -> Option<(Span<A>, &V)> {
        let node = self.nodes.get(index as usize)?;
        Some((Span::of(node.start, node.last), node.value.as_ref()?))
    }

    #[inline]
    pub(crate) fn entry_mut(&mut self, index: u32) -> Option<(Span<A>, &mut V)> {
        let node = self.nodes.get_mut(index as usize)?;
        Some((Span::of(node.start, node.last), node.value.as_mut()?))
    }

    /// Makes the next `extra` inserts infallible.
    #[inline]
    pub(crate) fn reserve(&mut self, extra: usize) -> Result<(), OutOfMemory> {
        let free = self.nodes.len() - self.len();
        let Some(more) = extra.checked_sub(free).filter(|more| *more > 0) else { return Ok(()) };
        if more > (NIL as usize) - self.nodes.len() {
            return Err(OutOfMemory);
        }
        self.nodes.try_reserve(more).map_err(|_| OutOfMemory)
    }

    /// The index that the next insert will take.
    #[inline]
    pub(crate) fn next_index(&self) -> u32 {
        if self.free == NIL { self.nodes.len() as u32 } else { self.free }
    }

    /// Follows the way to where the next insert of `span` belongs. With `apart` it ends early at an entry that `span` meets, and answers it.
    #[inline]
    pub(crate) fn path_for(&self, span: Span<A>, apart: bool, path: &mut Path) -> Option<u32> {
        let (mut at, index) = (self.root, self.next_index());
        while at != NIL {
            let node = self.node(at);
            if apart && node.start <= span.last() && span.start() <= node.last {
                return Some(at);
            }
            path.push(at);
            at = if (span.start(), span.last(), index) < node.key(at) { node.left } else { node.right };
        }
        None
    }

    /// Follows the way to the node `index`, which exists.
    #[inline]
    pub(crate) fn path_to(&self, index: u32, path: &mut Path) {
        let (mut at, key) = (self.root, self.node(index).key(index));
        while at != NIL {
            path.push(at);
            if at == index {
                break;
            }
            let node = self.node(at);
            at = if key < node.key(at) { node.left } else { node.right };
        }
    }

    /// Adds an entry at the end of `path`, which comes from [`Avl::path_for`].
    #[inline]
    pub(crate) fn insert(&mut self, path: &Path, span: Span<A>, value: V) -> Result<u32, OutOfMemory> {
        self.reserve(1)?;
        let index = self.next_index();
        let mut node = Node {
            start: span.start(),
            last: span.last(),
            low: span.start(),
            high: span.last(),
            gap: 0,
            left: NIL,
            right: NIL,
            generation: 0,
            height: 1,
            value: Some(value),
        };
        if self.free == NIL {
            self.nodes.push(node);
        } else {
            let old = &mut self.nodes[index as usize];
            self.free = old.left;
            node.generation = old.generation;
            *old = node;
        }
        self.len += 1;
        match path.len.checked_sub(1) {
            None => self.root = index,
            Some(depth) => {
                let above = self.node_mut(path.nodes[depth]);
                if (span.start(), span.last(), index) < above.key(path.nodes[depth]) {
                    above.left = index;
                } else {
                    above.right = index;
                }
            }
        }
        self.retrace(path, usize::MAX);
        Ok(index)
    }

    /// Takes the node `index`, which exists, out.
    #[inline]
    pub(crate) fn remove(&mut self, index: u32) -> Option<(Span<A>, V)> {
        let mut path = Path::new();
        self.path_to(index, &mut path);
        let depth = path.len.checked_sub(1)?;
        let (left, right) = (self.node(index).left, self.node(index).right);
        let mut heir_depth = usize::MAX;
        if left == NIL || right == NIL {
            let child = if left == NIL { right } else { left };
            self.relink(&path, depth, index, child);
            path.len = depth;
        } else {
            // The successor takes the node's place, by links and not by content: indices are names that others hold.
            let mut next = right;
            while self.node(next).left != NIL {
                path.push(next);
                next = self.node(next).left;
            }
            let orphan = self.node(next).right;
            if next != right {
                self.node_mut(path.nodes[path.len - 1]).left = orphan;
                self.node_mut(next).right = right;
            }
            // With the summary that those above know of this place, so that `retrace` sees whether it changes.
            let (low, high, gap, height) = self.node(index).summary();
            let heir = self.node_mut(next);
            heir.left = left;
            (heir.low, heir.high, heir.gap, heir.height) = (low, high, gap, height);
            self.relink(&path, depth, index, next);
            path.nodes[depth] = next;
            heir_depth = depth;
        }
        self.retrace(&path, heir_depth);
        let free = self.free;
        let node = self.node_mut(index);
        let span = Span::of(node.start, node.last);
        let value = node.value.take();
        node.generation = node.generation.wrapping_add(1);
        node.left = free;
        self.free = index;
        self.len -= 1;
        value.map(|value| (span, value))
    }

    /// Changes where the node `index` begins and ends. The caller makes sure that its place among its neighbours stays.
    #[inline]
    pub(crate) fn resize(&mut self, index: u32, span: Span<A>) {
        let mut path = Path::new();
        self.path_to(index, &mut path);
        let node = self.node_mut(index);
        (node.start, node.last) = (span.start(), span.last());
        self.retrace(&path, usize::MAX);
    }

    /// Makes the link above `path[depth]`, which leads to `old`, lead to `new`.
    #[inline]
    fn relink(&mut self, path: &Path, depth: usize, old: u32, new: u32) {
        match depth.checked_sub(1) {
            None => self.root = new,
            Some(above) => {
                let above = self.node_mut(path.nodes[above]);
                if above.left == old {
                    above.left = new;
                } else {
                    above.right = new;
                }
            }
        }
    }

    /// Brings balance and summaries up to date, upwards along `path`, and stops where nothing changes any more, though never deeper
    /// than `heir_depth`: what stands there has new children.
    #[inline]
    fn retrace(&mut self, path: &Path, heir_depth: usize) {
        for depth in (0..path.len).rev() {
            let index = path.nodes[depth];
            let was = self.node(index).summary();
            let lean = self.pull(index);
            let top = if lean.abs() > 1 { self.rotate(index, lean) } else { index };
            if top != index {
                self.relink(path, depth, index, top);
            }
            if depth <= heir_depth && self.node(top).summary() == was {
                return;
            }
        }
    }

    /// Computes a node's summary from its children; answers height on the left minus height on the right.
    #[inline]
    fn pull(&mut self, index: u32) -> i32 {
        let node = self.node(index);
        let (left, right, start, last) = (node.left, node.right, node.start, node.last);
        let (mut low, mut high, mut gap, mut heights) = (start, last, 0, (0, 0));
        if left != NIL {
            let child = self.node(left);
            low = child.low;
            high = high.max(child.high);
            gap = child.gap.max(gap_between(child.high, start));
            heights.0 = child.height;
        }
        if right != NIL {
            let child = self.node(right);
            gap = gap.max(child.gap).max(gap_between(last, child.low));
            high = high.max(child.high);
            heights.1 = child.height;
        }
        let node = self.node_mut(index);
        (node.low, node.high, node.gap, node.height) = (low, high, gap, heights.0.max(heights.1) + 1);
        i32::from(heights.0) - i32::from(heights.1)
    }

    fn height(&self, index: u32) -> u8 {
        if index == NIL { 0 } else { self.node(index).height }
    }

    /// Rebalances the subtree of `index`, which leans by two; answers its new top.
    #[cold]
    fn rotate(&mut self, index: u32, lean: i32) -> u32 {
        if lean > 0 {
            let left = self.node(index).left;
            if self.height(self.node(left).left) < self.height(self.node(left).right) {
                let top = self.rotate_left(left);
                self.node_mut(index).left = top;
            }
            self.rotate_right(index)
        } else {
            let right = self.node(index).right;
            if self.height(self.node(right).right) < self.height(self.node(right).left) {
                let top = self.rotate_right(right);
                self.node_mut(index).right = top;
            }
            self.rotate_left(index)
        }
    }

    fn rotate_right(&mut self, index: u32) -> u32 {
        let top = self.node(index).left;
        self.node_mut(index).left = self.node(top).right;
        self.node_mut(top).right = index;
        self.pull(index);
        self.pull(top);
        top
    }

    fn rotate_left(&mut self, index: u32) -> u32 {
        let top = self.node(index).right;
        self.node_mut(index).right = self.node(top).left;
        self.node_mut(top).left = index;
        self.pull(index);
        self.pull(top);
        top
    }
}

impl<A: Address, V> Node<A, V> {
    /// What nodes are ordered by; `index` is its own.
    #[inline]
    fn key(&self, index: u32) -> (A, A, u32) {
        (self.start, self.last, index)
    }

    #[inline]
    fn summary(&self) -> (A, A, u64, u8) {
        (self.low, self.high, self.gap, self.height)
    }
}

impl<A: Address, V> Default for Avl<A, V> {
    fn default() -> Self {
        Self::new()
    }
}

impl<A: Address, V: Clone> Clone for Avl<A, V> {
    fn clone(&self) -> Self {
        let node = |n: &Node<A, V>| Node { value: n.value.clone(), ..*n };
        Self {
            nodes: self.nodes.iter().map(node).collect(),
            root: self.root,
            free: self.free,
            len: self.len,
            #[cfg(test)]
            visits: core::sync::atomic::AtomicU64::new(0),
        }
    }
}
