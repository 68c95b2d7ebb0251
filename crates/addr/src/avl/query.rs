//! Looking things up: lookups follow one path, queries skip every subtree that cannot answer.

use super::{Avl, NIL, Path};
use crate::{Address, Span};

impl<A: Address, V> Avl<A, V> {
    /// Every entry that shares an address with `query`, by ascending start.
    #[inline]
    pub(crate) fn overlapping(&self, query: Span<A>) -> Overlapping<'_, A, V> {
        let mut found = Overlapping { tree: self, stack: Path::new(), query };
        found.dive(self.root);
        found
    }

    /// The first entry that shares an address with `query`; needs entries that do not overlap each other.
    #[inline]
    pub(crate) fn first_over(&self, query: Span<A>) -> Option<u32> {
        let (mut at, mut best) = (self.root, None);
        while at != NIL {
            let node = self.node(at);
            if node.last < query.start() {
                at = node.right;
            } else {
                if node.start <= query.last() {
                    best = Some(at);
                    if node.start <= query.start() {
                        break;
                    }
                }
                at = node.left;
            }
        }
        best
    }

    /// The first entry whose start is `at` or above.
    pub(crate) fn first_from(&self, from: A) -> Option<u32> {
        let (mut at, mut best) = (self.root, None);
        while at != NIL {
            let node = self.node(at);
            if node.start >= from {
                best = Some(at);
                at = node.left;
            } else {
                at = node.right;
            }
        }
        best
    }

    /// The last entry whose start is below `before`.
    pub(crate) fn last_below(&self, before: A) -> Option<u32> {
        let (mut at, mut best) = (self.root, None);
        while at != NIL {
            let node = self.node(at);
            if node.start < before {
                best = Some(at);
                at = node.right;
            } else {
                at = node.left;
            }
        }
        best
    }

    /// The first of the entries of exactly `span`.
    pub(crate) fn first_exact(&self, span: Span<A>) -> Option<u32> {
        let (mut at, mut best) = (self.root, None);
        while at != NIL {
            let node = self.node(at);
            let key = (node.start, node.last);
            if key < (span.start(), span.last()) {
                at = node.right;
            } else {
                if key == (span.start(), span.last()) {
                    best = Some(at);
                }
                at = node.left;
            }
        }
        best
    }

    /// The highest last of the entries whose start is `from` or below.
    pub(crate) fn reach(&self, from: A) -> Option<A> {
        let (mut at, mut best) = (self.root, None);
        while at != NIL {
            let node = self.node(at);
            if node.start > from {
                at = node.left;
                continue;
            }
            let left = (node.left != NIL).then(|| self.node(node.left).high);
            best = best.max(left).max(Some(node.last));
            at = node.right;
        }
        best
    }

    /// Shows `fits` the free gaps inside `within` of at least `min_len`, ascending, until it answers.
    pub(crate) fn first_gap(&self, within: Span<A>, min_len: u64, fits: &mut dyn FnMut(Span<A>) -> Option<A>) -> Option<A> {
        self.gaps_below(self.root, Some(Span::whole().start()), Some(Span::whole().last()), within, min_len, fits)
    }

    /// The gaps of the subtree `index`, which stands between the free addresses `from` and `to`; `None` there means that the space ends.
    fn gaps_below(
        &self,
        index: u32,
        from: Option<A>,
        to: Option<A>,
        within: Span<A>,
        min_len: u64,
        fits: &mut dyn FnMut(Span<A>) -> Option<A>,
    ) -> Option<A> {
        let room = Span::new(from?, to?)?.intersect(within)?;
        if room.len() < min_len {
            return None;
        }
        if index == NIL {
            return fits(room);
        }
        let node = self.node(index);
        let outside = node.low.get().saturating_sub(room.start().get()).max(room.last().get().saturating_sub(node.high.get()));
        if node.gap.max(outside) < min_len {
            return None;
        }
        let below = node.start.get().checked_sub(1).map(A::new);
        self.gaps_below(node.left, from, below, within, min_len, fits)
            .or_else(|| self.gaps_below(node.right, node.last.checked_add(1), to, within, min_len, fits))
    }
}

pub(crate) struct Overlapping<'a, A, V> {
    tree: &'a Avl<A, V>,
    stack: Path,
    query: Span<A>,
}

impl<A: Address, V> Overlapping<'_, A, V> {
    /// Down to the left, as long as something in the subtree reaches the query.
    #[inline]
    fn dive(&mut self, mut at: u32) {
        while at != NIL {
            let node = self.tree.node(at);
            if node.high < self.query.start() {
                break;
            }
            self.stack.push(at);
            at = node.left;
        }
    }
}

impl<A: Address, V> Iterator for Overlapping<'_, A, V> {
    type Item = u32;

    #[inline]
    fn next(&mut self) -> Option<u32> {
        while let Some(at) = self.stack.pop() {
            let node = self.tree.node(at);
            if node.start > self.query.last() {
                self.stack.len = 0;
                return None;
            }
            self.dive(node.right);
            if node.last >= self.query.start() {
                return Some(at);
            }
        }
        None
    }
}
