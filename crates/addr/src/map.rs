//! Spans that never overlap, each with a value: what is mapped here, what state has this page, where is room?

use crate::avl::{Avl, NIL, OutOfMemory, Path};
use crate::{Address, Span};
use core::fmt;
use thiserror::Error;

/// Why a span could not be added; nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum OverlapError<A: Address> {
    /// The map has something there already.
    #[error("{span} meets {met}; take that out first, or choose another place")]
    Overlaps {
        /// What was to be added.
        span: Span<A>,
        /// The entry it met; any of them, when it met several.
        met: Span<A>,
    },
    /// No memory for another entry.
    #[error(transparent)]
    OutOfMemory(#[from] OutOfMemory),
}

/// Spans that never overlap. Every operation costs O(log n), and per answer for queries.
///
/// ```
/// use lockstep_addr::{Page, Span, SpanMap};
/// let pages = |start, last| Span::of(Page::new(start), Page::new(last));
/// let mut states = SpanMap::new();
/// states.set(pages(0, 99), 's').unwrap();
/// states.set(pages(10, 19), 'p').unwrap();
/// assert_eq!(states.get(Page::new(12)), Some((pages(10, 19), &'p')));
/// assert_eq!(states.len(), 3);
/// states.set(pages(10, 19), 's').unwrap();
/// assert_eq!(states.get(Page::new(12)), Some((pages(0, 99), &'s')));
/// ```
#[derive(Clone)]
pub struct SpanMap<A: Address, V> {
    tree: Avl<A, V>,
}

impl<A: Address, V> Default for SpanMap<A, V> {
    fn default() -> Self {
        Self::new()
    }
}

impl<A: Address, V: fmt::Debug> fmt::Debug for SpanMap<A, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl<A: Address, V> SpanMap<A, V> {
    /// An empty map; allocates nothing.
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

    /// Makes the next `extra` inserts infallible, whatever is removed in between. One `set` or `clear` counts as two.
    ///
    /// # Errors
    /// No memory; nothing was changed.
    pub fn reserve(&mut self, extra: usize) -> Result<(), OutOfMemory> {
        self.tree.reserve(extra)
    }

    /// Adds an entry where nothing is yet. Neighbours are not joined.
    ///
    /// # Errors
    /// `Overlaps`, or no memory; nothing was changed.
    pub fn insert(&mut self, span: Span<A>, value: V) -> Result<(), OverlapError<A>> {
        self.tree.reserve(1)?;
        // Both neighbours of the place lie on the way to it, so the way shows every overlap.
        let mut path = Path::new();
        if let Some(met) = self.tree.path_for(span, true, &mut path) {
            return Err(OverlapError::Overlaps { span, met: self.tree.span(met) });
        }
        self.tree.insert(&path, span, value)?;
        Ok(())
    }

    /// The entry that holds `at`.
    #[inline]
    pub fn get(&self, at: A) -> Option<(Span<A>, &V)> {
        self.tree.entry(self.tree.first_over(Span::one(at))?)
    }

    /// The entry that holds `at`.
    pub fn get_mut(&mut self, at: A) -> Option<(Span<A>, &mut V)> {
        self.tree.entry_mut(self.tree.first_over(Span::one(at))?)
    }

    /// Takes out the entry that begins at `start`.
    pub fn remove(&mut self, start: A) -> Option<(Span<A>, V)> {
        let index = self.tree.first_over(Span::one(start))?;
        if self.tree.span(index).start() != start {
            return None;
        }
        self.tree.remove(index)
    }

    /// The entries that share an address with `span`, ascending.
    pub fn overlapping(&self, span: Span<A>) -> impl Iterator<Item = (Span<A>, &V)> {
        self.tree.overlapping(span).filter_map(|index| self.tree.entry(index))
    }

    /// Shows each entry that shares an address with `span` to `change`, ascending. (An iterator of mutable references through an index
    /// tree would need unsafe code.)
    pub fn overlapping_mut(&mut self, span: Span<A>, mut change: impl FnMut(Span<A>, &mut V)) {
        let mut next = self.tree.first_over(span);
        while let Some(index) = next {
            let Some((found, value)) = self.tree.entry_mut(index) else { return };
            change(found, value);
            next = Self::after(found, span).and_then(|rest| self.tree.first_over(rest));
        }
    }

    /// Whether anything shares an address with `span`.
    pub fn overlaps(&self, span: Span<A>) -> bool {
        self.tree.first_over(span).is_some()
    }

    /// All entries, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (Span<A>, &V)> {
        self.overlapping(Span::whole())
    }

    /// The first entry whose start is `at` or above.
    pub fn first_at_or_after(&self, at: A) -> Option<(Span<A>, &V)> {
        self.tree.entry(self.tree.first_from(at)?)
    }

    /// The last entry whose start is below `at`. It may hold `at`.
    pub fn last_before(&self, at: A) -> Option<(Span<A>, &V)> {
        self.tree.entry(self.tree.last_below(at)?)
    }

    /// Shows the free gaps inside `within` of at least `min_len` to `fits`, ascending, until it answers; that is the answer.
    /// A gap is clipped to `within`. Stretches without a gap of that length are passed over whole.
    pub fn first_gap(&self, within: Span<A>, min_len: u64, mut fits: impl FnMut(Span<A>) -> Option<A>) -> Option<A> {
        self.tree.first_gap(within, min_len.max(1), &mut fits)
    }

    /// `span` in pieces, gaps included, ascending; every piece is clipped to `span`.
    pub fn runs(&self, span: Span<A>) -> impl Iterator<Item = (Span<A>, Option<&V>)> {
        let mut entries = self.overlapping(span).peekable();
        let mut rest = Some(span);
        core::iter::from_fn(move || {
            let todo = rest?;
            let (piece, value) = match entries.peek() {
                None => (todo, None),
                Some((found, _)) if todo.start() < found.start() => (Span::of(todo.start(), A::new(found.start().get() - 1)), None),
                Some((found, value)) => {
                    let run = (Span::of(todo.start(), found.last().min(todo.last())), Some(*value));
                    entries.next();
                    run
                }
            };
            rest = Self::after(piece, todo);
            Some((piece, value))
        })
    }

    /// What of `whole` lies behind `piece`.
    #[inline]
    fn after(piece: Span<A>, whole: Span<A>) -> Option<Span<A>> {
        Span::new(piece.last().checked_add(1)?, whole.last())
    }

    /// Adds an entry where the caller has made sure that nothing is.
    fn add(&mut self, span: Span<A>, value: V) -> Result<(), OutOfMemory> {
        let mut path = Path::new();
        self.tree.path_for(span, false, &mut path);
        self.tree.insert(&path, span, value).map(|_| ())
    }
}

impl<A: Address, V: Clone> SpanMap<A, V> {
    /// Makes `span` free: entries inside go, those that stick out are trimmed, one that sticks out on both sides becomes two.
    ///
    /// # Errors
    /// No memory for that second one; nothing was changed. Cannot happen after `reserve(2)`.
    pub fn clear(&mut self, span: Span<A>) -> Result<(), OutOfMemory> {
        self.tree.reserve(1)?;
        self.clear_except(span, NIL)
    }

    fn clear_except(&mut self, span: Span<A>, keep: u32) -> Result<(), OutOfMemory> {
        let mut rest = Some(span);
        while let Some(todo) = rest {
            let Some(index) = self.tree.first_over(todo) else { return Ok(()) };
            let found = self.tree.span(index);
            rest = Self::after(found, todo);
            if index == keep {
                continue;
            }
            match found.without(span) {
                [None, None] => {
                    self.tree.remove(index);
                }
                [Some(left), None] | [None, Some(left)] => self.tree.resize(index, left),
                [Some(before), Some(after)] => {
                    let Some(value) = self.tree.entry(index).map(|(_, value)| value.clone()) else { return Ok(()) };
                    self.tree.resize(index, before);
                    self.add(after, value)?;
                }
            }
        }
        Ok(())
    }
}

impl<A: Address, V: Clone + PartialEq> SpanMap<A, V> {
    /// Makes all of `span` say `value`, over whatever was there, and joins it with equal neighbours.
    ///
    /// # Errors
    /// No memory; nothing was changed. Cannot happen after `reserve(2)`.
    pub fn set(&mut self, span: Span<A>, value: V) -> Result<(), OutOfMemory> {
        self.tree.reserve(2)?;
        let equal = |at: A| {
            let index = self.tree.first_over(Span::one(at))?;
            let (found, there) = self.tree.entry(index)?;
            (*there == value).then_some((index, found))
        };
        let left = equal(A::new(span.start().get().saturating_sub(1)));
        let right = equal(A::new(span.last().get().saturating_add(1)));
        if left.iter().chain(&right).any(|(_, found)| found.covers(span)) {
            return Ok(());
        }
        let mut whole = span;
        for (_, found) in left.iter().chain(&right) {
            whole = Span::of(whole.start().min(found.start()), whole.last().max(found.last()));
        }
        match left.or(right) {
            Some((keep, _)) => {
                self.clear_except(whole, keep)?;
                self.tree.resize(keep, whole);
            }
            None => {
                self.clear_except(whole, NIL)?;
                self.add(whole, value)?;
            }
        }
        Ok(())
    }
}
