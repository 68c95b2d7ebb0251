//! A context's view of its domain: the one way into a guard, so that what was logged before the guard is forgotten before anything is
//! used in it.
//!
//! Every guard asks two numbers after it was entered: has the device another domain, has the domain logged anything. A writer that changed
//! either and whose grace period is over finds its number seen; one whose grace period is not over waits for this guard (I-4). Where the
//! numbers are as they were, all that was looked up before the guard is as good as if it had been looked up inside: the cache is
//! private, and it is the entry into the guard that decides what of it still holds.

use crate::{Iotlb, Log, Missed, Walks};
use std::sync::Arc;
use sync::Slot;

/// A domain, as far as contexts have to keep up with it.
pub trait Logged {
    /// What guards of it are called.
    fn id(&self) -> u32;
    /// What was cleared in it.
    fn log(&self) -> &Log;
}

/// Something that has a domain now and may have another later: a device.
pub trait Source {
    /// What contexts copy of it.
    type Identity: Identity;
    /// Changes, before a grace period of the old domain, whenever the copies are out of date.
    fn generation(&self) -> u64;
    /// A copy, with a generation that is not younger than it.
    fn identity(&self) -> Self::Identity;
}

/// A copy of what a [`Source`] is.
pub trait Identity {
    /// What translates for it.
    type Domain: Logged;
    /// When it was made.
    fn generation(&self) -> u64;
    /// The domain, while it has one.
    fn domain(&self) -> Option<&Arc<Self::Domain>>;
}

/// Translations and tables of a source's domain, and how far its log has been applied to them.
pub struct View<S: Source, V> {
    source: S,
    identity: S::Identity,
    iotlb: Iotlb<V>,
    seen: u64,
    walks: Walks,
}

impl<S: Source, V: Copy + Default> View<S, V> {
    /// Nothing cached yet, with room for `entries` translations and `tables` tables.
    pub fn new(source: S, entries: usize, tables: usize) -> Self {
        let (iotlb, walks) = (Iotlb::new(entries), Walks::new(tables));
        let mut view = Self { identity: source.identity(), source, iotlb, seen: 0, walks };
        view.restart();
        view
    }

    /// Whose view it is.
    #[inline]
    pub fn source(&self) -> &S {
        &self.source
    }

    /// The copy that it works with.
    #[inline]
    pub fn identity(&self) -> &S::Identity {
        &self.identity
    }

    /// The cache. What is looked up inside a guard that [`View::enter`] opened, or before one that [`View::enter_unchanged`] opened, may be used
    /// until that guard is left; what is filled comes from a walk inside it.
    #[inline]
    pub fn iotlb(&self) -> &Iotlb<V> {
        &self.iotlb
    }

    /// As [`View::iotlb`].
    #[inline]
    pub fn iotlb_mut(&mut self) -> &mut Iotlb<V> {
        &mut self.iotlb
    }

    /// The walk cache. As with the IOTLB, what is looked up in it serves the guard that is open, and what is filled comes from a walk inside it.
    #[inline]
    pub fn walks(&self) -> &Walks {
        &self.walks
    }

    /// As [`View::walks`].
    #[inline]
    pub fn walks_mut(&mut self) -> &mut Walks {
        &mut self.walks
    }

    /// Opens a guard of the domain, with everything forgotten that was logged before. False, and no guard, when there is no domain.
    #[inline]
    pub fn enter(&mut self, slot: &mut Slot) -> bool {
        // What there is to forget is forgotten before the guard is open, so that nobody waits for that; inside, only what has come since.
        self.catch_up();
        loop {
            if let Some(domain) = self.identity.domain() {
                slot.enter(domain.id());
                if self.is_current() {
                    self.catch_up();
                    return true;
                }
                slot.leave();
            } else if self.is_current() {
                return false;
            }
            self.renew();
        }
    }

    /// Opens a guard if nothing changed since the last one; false, and no guard, otherwise. Whatever was looked up before holds in it.
    #[inline(always)]
    pub fn enter_unchanged(&mut self, slot: &mut Slot) -> bool {
        let Some(domain) = self.identity.domain() else { return false };
        slot.enter(domain.id());
        if self.is_current() && domain.log().head() == self.seen {
            return true;
        }
        slot.leave();
        false
    }

    #[inline(always)]
    fn is_current(&self) -> bool {
        self.identity.generation() == self.source.generation()
    }

    /// Copies the source's state again and forgets every translation.
    #[cold]
    fn renew(&mut self) {
        self.identity = self.source.identity();
        self.restart();
    }

    fn restart(&mut self) {
        self.iotlb.flush();
        self.walks.flush();
        // Taken before the guard is entered: what is logged in between is applied to an empty cache.
        self.seen = self.identity.domain().map_or(0, |domain| domain.log().head());
    }

    /// Forgets what was logged. With a guard open, what is logged from now on waits for it.
    #[inline]
    fn catch_up(&mut self) {
        let Some(domain) = self.identity.domain() else { return };
        let head = domain.log().head();
        if head != self.seen {
            self.forget(head);
        }
    }

    #[cold]
    #[inline(never)]
    fn forget(&mut self, head: u64) {
        let Some(domain) = self.identity.domain() else { return };
        let (iotlb, walks) = (&mut self.iotlb, &mut self.walks);
        domain.log().catch_up(self.seen, head, |missed| match missed {
            Missed::Span(span) => iotlb.invalidate(span),
            Missed::Tables(region) => walks.invalidate(region),
            Missed::Everything => {
                iotlb.flush();
                walks.flush();
            }
        });
        self.seen = head;
    }
}

impl<S: Source, V> std::fmt::Debug for View<S, V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("View").field("iotlb", &self.iotlb).field("walks", &self.walks).field("seen", &self.seen).finish_non_exhaustive()
    }
}
