//! What each page is, as extents: a terabyte in one state costs nothing but that state.
//!
//! Reads on the map path are one load while the whole backing is in one state, and a tree lookup otherwise. An iterator over runs
//! locks for each step and holds nothing in between, so its user may change states on the way.

use addr::{Address, OutOfMemory, Page, Span, SpanMap};
use std::sync::PoisonError;
use sync::prim::{
    RwLock,
    atomic::{AtomicU8, Ordering},
};

/// Who may use a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum PageState {
    /// The host and untrusted devices.
    Shared = 0,
    /// Its guest, and devices that guest trusts.
    Private = 1,
    /// Nobody: no page is there. A device that goes there faults and does not bring it back.
    Absent = 2,
}

/// In `uniform`: pages differ.
const MIXED: u8 = u8::MAX;
/// What one change may need, in entries.
const PER_CHANGE: usize = 2;

#[derive(Debug)]
pub(crate) struct States {
    pages: Span<Page>,
    /// The state of all pages, or [`MIXED`].
    uniform: AtomicU8,
    table: RwLock<Table>,
}

struct Table {
    /// Empty while all pages have been in one state from the start, or since all were put in one.
    map: SpanMap<Page, PageState>,
    /// Entries promised to guards (I-9).
    pledged: usize,
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map().entries(self.map.iter()).finish()
    }
}

impl States {
    pub(crate) fn new(pages: Span<Page>, initial: PageState) -> Self {
        Self { pages, uniform: AtomicU8::new(initial as u8), table: RwLock::new(Table { map: SpanMap::new(), pledged: 0 }) }
    }

    fn uniform(&self) -> Option<PageState> {
        match self.uniform.load(Ordering::Acquire) {
            0 => Some(PageState::Shared),
            1 => Some(PageState::Private),
            2 => Some(PageState::Absent),
            _ => None,
        }
    }

    /// Room for `entries`, and for the one that says what all pages are now.
    fn reserve(&self, table: &mut Table, entries: usize) -> Result<(), OutOfMemory> {
        table.map.reserve(entries + PER_CHANGE)?;
        match self.uniform().filter(|_| table.map.is_empty()) {
            Some(state) => table.map.set(self.pages, state),
            None => Ok(()),
        }
    }

    /// The run that `within` begins in, clipped to it.
    #[inline]
    pub(crate) fn run(&self, within: Span<Page>) -> (Span<Page>, PageState) {
        if let Some(state) = self.uniform() {
            return (within, state);
        }
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        match table.map.get(within.start()) {
            Some((found, &state)) => (Span::of(within.start(), found.last().min(within.last())), state),
            // Not of this backing.
            None => (within, PageState::Absent),
        }
    }

    /// Takes two entries from `pledge` if it has them, and from the allocator otherwise.
    pub(crate) fn set(&self, span: Span<Page>, state: PageState, pledge: Option<&mut usize>) -> Result<(), OutOfMemory> {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        match pledge {
            Some(pledge) if *pledge >= PER_CHANGE => {
                *pledge -= PER_CHANGE;
                table.pledged -= PER_CHANGE;
            }
            _ => {
                let room = table.pledged + PER_CHANGE;
                self.reserve(&mut table, room)?;
            }
        }
        table.map.set(span, state)?;
        let uniform = if table.map.len() == 1 { state as u8 } else { MIXED };
        self.uniform.store(uniform, Ordering::Release);
        Ok(())
    }

    /// As `set` for all pages; cannot fail. The caller holds all pages, so nobody else has a pledge.
    pub(crate) fn set_all(&self, state: PageState) {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        if table.pledged == 0 {
            table.map = SpanMap::new();
        } else {
            // A guard of the caller's own: its room stays, and two entries are in every pledge.
            let set = table.map.set(self.pages, state);
            debug_assert!(set.is_ok(), "a change of everything found no room");
        }
        self.uniform.store(state as u8, Ordering::Release);
    }

    /// Adds room for `changes` to a pledge.
    pub(crate) fn pledge(&self, changes: usize, pledge: &mut usize) -> Result<(), OutOfMemory> {
        let more = changes.checked_mul(PER_CHANGE).ok_or(OutOfMemory)?;
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let room = table.pledged.checked_add(more).ok_or(OutOfMemory)?;
        self.reserve(&mut table, room)?;
        table.pledged = room;
        *pledge += more;
        Ok(())
    }

    /// Takes a pledge back.
    pub(crate) fn release(&self, pledge: usize) {
        if pledge != 0 {
            self.table.write().unwrap_or_else(PoisonError::into_inner).pledged -= pledge;
        }
    }

    /// How many extents.
    pub(crate) fn extents(&self) -> usize {
        self.table.read().unwrap_or_else(PoisonError::into_inner).map.len().max(1)
    }
}

/// The runs of equal state in a span, ascending; together they are the span. Stays true only for pages that the caller holds.
#[derive(Debug)]
pub struct Runs<'a> {
    states: &'a States,
    rest: Option<Span<Page>>,
}

impl<'a> Runs<'a> {
    pub(crate) fn new(states: &'a States, span: Span<Page>) -> Self {
        Self { states, rest: Some(span) }
    }
}

impl Iterator for Runs<'_> {
    type Item = (Span<Page>, PageState);

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let rest = self.rest?;
        let run = self.states.run(rest);
        self.rest = run.0.last().checked_add(1).and_then(|next| Span::new(next, rest.last()));
        Some(run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(start: u64, last: u64) -> Span<Page> {
        Span::of(Page::new(start), Page::new(last))
    }

    #[test]
    fn runs_clip_and_join() {
        let states = States::new(span(0, 99), PageState::Shared);
        let runs = |over| Runs::new(&states, over).collect::<Vec<_>>();
        assert_eq!(runs(span(3, 9)), [(span(3, 9), PageState::Shared)]);
        states.set(span(5, 6), PageState::Private, None).unwrap();
        assert_eq!(runs(span(3, 9)), [(span(3, 4), PageState::Shared), (span(5, 6), PageState::Private), (span(7, 9), PageState::Shared)]);
        states.set(span(5, 6), PageState::Shared, None).unwrap();
        assert_eq!((runs(span(0, 99)), states.extents()), (vec![(span(0, 99), PageState::Shared)], 1));
        states.set_all(PageState::Absent);
        assert_eq!(runs(span(98, 99)), [(span(98, 99), PageState::Absent)]);
    }

    #[test]
    fn pledges_add_up() {
        let states = States::new(span(0, 9999), PageState::Shared);
        let (mut first, mut second) = (0, 0);
        states.pledge(3, &mut first).unwrap();
        states.pledge(4, &mut second).unwrap();
        assert_eq!(states.table.read().unwrap().pledged, PER_CHANGE * 7);
        states.set(span(5, 5), PageState::Private, Some(&mut first)).unwrap();
        states.set(span(7, 7), PageState::Private, None).unwrap();
        assert_eq!((first, states.table.read().unwrap().pledged), (PER_CHANGE * 2, PER_CHANGE * 6));
        states.release(first);
        states.release(second);
        assert_eq!(states.table.read().unwrap().pledged, 0);
    }
}
