//! Holding pages: whoever maps, unmaps or converts them keeps everyone else off until the leaves say the new thing (D-3).

use crate::{Backing, Error, PageState};
use addr::{Page, Span};
use std::cell::Cell;
use sync::rank::{self, Rank, RankGuard};

/// Pages of one backing that the caller holds; dropping it gives them back.
///
/// Hold pages of several backings in the order of their ids (I-12, asserted in debug builds), and ask for everything of one backing at
/// once ([`Backing::lock_many`]).
#[must_use]
#[derive(Debug)]
pub struct SpanGuard<'a> {
    backing: &'a Backing,
    held: sync::SpanGuard<'a, Page>,
    /// Entries that the page states keep for us.
    pledge: Cell<usize>,
    _rank: RankGuard,
}

impl SpanGuard<'_> {
    /// Whose pages.
    pub fn backing(&self) -> &Backing {
        self.backing
    }

    /// Whether all of `span` is held by this guard.
    pub fn covers(&self, span: Span<Page>) -> bool {
        self.held.covers(span)
    }

    /// Makes sure that the next `changes` calls of [`Backing::set_state`] with this guard cannot fail (I-9).
    ///
    /// # Errors
    /// No memory.
    pub fn reserve(&self, changes: usize) -> Result<(), Error> {
        sync::fail::step("backing.states")?;
        let mut pledge = self.pledge.get();
        self.backing.states.pledge(changes, &mut pledge)?;
        self.pledge.set(pledge);
        Ok(())
    }

    /// Room that is left, in a unit of its own.
    pub(crate) fn reserved(&self) -> usize {
        self.pledge.get()
    }

    /// Gives back what room is left above `mark`, an earlier answer of [`SpanGuard::reserved`].
    pub(crate) fn unreserve(&self, mark: usize) {
        let left = self.pledge.get();
        self.pledge.set(left.min(mark));
        self.backing.states.release(left.saturating_sub(mark));
    }
}

impl Drop for SpanGuard<'_> {
    fn drop(&mut self) {
        self.backing.states.release(self.pledge.get());
    }
}

impl Backing {
    /// Waits until nobody holds any of these pages, and holds them.
    ///
    /// # Panics
    /// In debug builds, when the calling thread holds pages of this backing already, or of one with a higher id.
    #[inline]
    pub fn lock(&self, span: Span<Page>) -> SpanGuard<'_> {
        self.lock_many(&[span])
    }

    /// As [`Backing::lock`] for several spans, ascending and apart.
    #[inline]
    pub fn lock_many(&self, spans: &[Span<Page>]) -> SpanGuard<'_> {
        let rank = rank::enter_ordered(Rank::PagesSpan, self.id().get());
        SpanGuard { backing: self, held: self.lock.lock_many(spans), pledge: Cell::new(0), _rank: rank }
    }

    /// Makes all pages of `span` be in `state`. Tells nobody: that is the caller's part.
    ///
    /// # Errors
    /// `NotHeld`, and `OutOfMemory` unless [`SpanGuard::reserve`] made room.
    pub fn set_state(&self, held: &SpanGuard<'_>, span: Span<Page>, state: PageState) -> Result<(), Error> {
        self.check_held(held, span)?;
        let mut pledge = held.pledge.get();
        if pledge == 0 {
            sync::fail::step("backing.state")?;
        }
        let set = self.states.set(span, state, Some(&mut pledge));
        held.pledge.set(pledge);
        set?;
        self.known_moved(span, state);
        Ok(())
    }

    /// # Errors
    /// `NoSuchPages`, and `NotHeld` when the guard is another backing's or does not hold all of `span`.
    pub(crate) fn check_held(&self, held: &SpanGuard<'_>, span: Span<Page>) -> Result<(), Error> {
        self.check(span)?;
        if held.held.is_of(&self.lock) && held.covers(span) { Ok(()) } else { Err(Error::NotHeld { span }) }
    }
}
