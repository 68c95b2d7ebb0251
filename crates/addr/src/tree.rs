//! Spans that may overlap, each with a value: which areas lie over these pages?

use crate::avl::{Avl, OutOfMemory, Path};
use crate::{Address, Span};
use core::fmt;

/// Names one entry of an [`IntervalTree`]; a handle of an entry that is gone finds nothing.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Handle {
    index: u32,
    generation: u32,
}

/// Any spans, overlapping and equal ones too. Every operation costs O(log n), and per answer for queries.
///
/// ```
/// use lockstep_addr::{IntervalTree, Page, Span};
/// let mut areas = IntervalTree::new();
/// let first = areas.insert(Span::of(Page::new(0), Page::new(9)), "a").unwrap();
/// areas.insert(Span::of(Page::new(5), Page::new(20)), "b").unwrap();
/// let over = |at| areas.overlapping(Span::one(Page::new(at))).map(|(_, name)| *name).collect::<Vec<_>>();
/// assert_eq!((over(3), over(7), over(40)), (vec!["a"], vec!["a", "b"], vec![]));
/// assert_eq!(areas.remove(first), Some("a"));
/// ```
#[derive(Clone)]
pub struct IntervalTree<A: Address, V> {
    tree: Avl<A, V>,
}

impl<A: Address, V> Default for IntervalTree<A, V> {
    fn default() -> Self {
        Self::new()
    }
}

impl<A: Address, V: fmt::Debug> fmt::Debug for IntervalTree<A, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl<A: Address, V> IntervalTree<A, V> {
    /// An empty tree; allocates nothing.
    pub const fn new() -> Self {
        Self { tree: Avl::new() }
    }

    /// How many entries.
    pub fn len(&self) -> usize {
        self.tree.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tree.len() == 0
    }

    /// Makes the next `extra` inserts infallible, whatever is removed in between.
    ///
    /// # Errors
    /// No memory; nothing was changed.
    pub fn reserve(&mut self, extra: usize) -> Result<(), OutOfMemory> {
        self.tree.reserve(extra)
    }

    /// Adds an entry.
    ///
    /// # Errors
    /// No memory; nothing was changed. Cannot happen after [`IntervalTree::reserve`].
    pub fn insert(&mut self, span: Span<A>, value: V) -> Result<Handle, OutOfMemory> {
        self.tree.reserve(1)?;
        let mut path = Path::new();
        self.tree.path_for(span, false, &mut path);
        let index = self.tree.insert(&path, span, value)?;
        Ok(Handle { index, generation: self.tree.generation(index) })
    }

    /// Takes an entry out; `None` when it is gone already.
    pub fn remove(&mut self, handle: Handle) -> Option<V> {
        self.get(handle)?;
        self.tree.remove(handle.index).map(|(_, value)| value)
    }

    /// The entry of a handle.
    pub fn get(&self, handle: Handle) -> Option<(Span<A>, &V)> {
        let entry = self.tree.entry(handle.index)?;
        (self.tree.generation(handle.index) == handle.generation).then_some(entry)
    }

    /// Takes out an entry of exactly `span`; of several, any of them.
    pub fn remove_exact(&mut self, span: Span<A>) -> Option<V> {
        let index = self.tree.first_exact(span)?;
        self.tree.remove(index).map(|(_, value)| value)
    }

    /// What of `span` no entry covers, ascending. Costs O(log n) for each step from the end of what is covered to the next gap, or to the entry that leads on
    /// furthest: entries below others do not count.
    pub fn gaps(&self, span: Span<A>) -> impl Iterator<Item = Span<A>> + '_ {
        let mut from = Some(span.start());
        core::iter::from_fn(move || {
            loop {
                let start = from.filter(|start| *start <= span.last())?;
                if let Some(reach) = self.tree.reach(start).filter(|reach| *reach >= start) {
                    from = reach.checked_add(1);
                    continue;
                }
                let next = self.tree.first_from(start).map(|index| self.tree.span(index).start());
                from = next;
                // Nothing begins at `start`, or it would reach.
                let last = next.map_or(span.last(), |next| A::new(next.get() - 1).min(span.last()));
                return Some(Span::of(start, last));
            }
        })
    }

    /// The entries that share an address with `span`, by ascending start.
    pub fn overlapping(&self, span: Span<A>) -> impl Iterator<Item = (Span<A>, &V)> {
        self.tree.overlapping(span).filter_map(|index| self.tree.entry(index))
    }

    /// All entries, by ascending start.
    pub fn iter(&self) -> impl Iterator<Item = (Span<A>, &V)> {
        self.overlapping(Span::whole())
    }
}
