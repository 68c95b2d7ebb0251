//! The simulated space of output addresses, cut into windows, one per backing (D-1).
//!
//! Addresses are handed out upwards, and from the bottom again when the top is reached: whoever still holds one that outlived its backing finds
//! nothing for a petabyte of others, rather than somebody else's memory. Foreign backings, which come and go with every map call, have slots instead (`slots.rs`).

use crate::slots::{self, Slot};
use crate::{Backing, Error};
use addr::{Oa, Span, SpanMap};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

/// The first output address of the first window. Below it there is room for whatever simulated machines put there.
pub const OA_BASE: Oa = Oa::new(1 << 40);
/// The last output address: 52 bits, as in AMD's and Intel's tables.
pub const OA_LAST: Oa = Oa::new((1 << 52) - 1);

/// 2 MiB: windows begin and end on it, so that segments of an RMP and large leaves fit.
const GRANULE_LG2: u8 = 21;
/// 1 GiB: windows of this size and more begin on it, so that leaves of 1 GiB come out naturally.
const LARGE_LG2: u8 = 30;

/// The next address to hand out.
static NEXT: Mutex<u64> = Mutex::new(OA_BASE.get());
static WINDOWS: RwLock<SpanMap<Oa, Weak<Backing>>> = RwLock::new(SpanMap::new());

/// `lg2` of the alignment of a window, in output addresses and in the host: its size rounded up to a power of two, from 2 MiB to 1 GiB.
pub(crate) fn align_lg2(len_bytes: u64) -> u8 {
    (u64::BITS - (len_bytes - 1).leading_zeros()).clamp(GRANULE_LG2.into(), LARGE_LG2.into()) as u8
}

/// A backing's output addresses, until it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) window: Span<Oa>,
    slot: Option<Slot>,
}

impl Place {
    /// Takes output addresses for `len_bytes`, rounded up to 2 MiB at least; with `brief` such as can be used again.
    pub(crate) fn take(len_bytes: u64, brief: bool) -> Result<Self, Error> {
        match if brief { Slot::take(len_bytes)? } else { None } {
            Some(slot) => Ok(Self { window: slot.window(), slot: Some(slot) }),
            None => Ok(Self { window: allocate(len_bytes)?, slot: None }),
        }
    }

    /// From now on [`Windows::find`] finds it there.
    pub(crate) fn register(&self, backing: Weak<Backing>) -> Result<(), Error> {
        match &self.slot {
            Some(slot) => slot.register(backing),
            // A fresh window overlaps nothing.
            // Its place is on the list already.
            None => {
                let mut windows = WINDOWS.write().unwrap_or_else(PoisonError::into_inner);
                windows.get_mut(self.window.start()).into_iter().for_each(|(_, own)| *own = Weak::clone(&backing));
            }
        }
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.slot.is_none() {
            WINDOWS.write().unwrap_or_else(PoisonError::into_inner).remove(self.window.start());
        }
    }
}

/// Takes output addresses for `len_bytes`, rounded up to 2 MiB. They are on the list of windows from now on, without a backing.
fn allocate(len_bytes: u64) -> Result<Span<Oa>, Error> {
    let mut next = NEXT.lock().unwrap_or_else(PoisonError::into_inner);
    let mut windows = WINDOWS.write().unwrap_or_else(PoisonError::into_inner);
    let found = first_free(&windows, *next, len_bytes).or_else(|| first_free(&windows, OA_BASE.get(), len_bytes));
    let span = found.ok_or(Error::NoOutputAddresses { len_bytes })?;
    windows.insert(span, Weak::new()).map_err(|_| addr::OutOfMemory)?;
    *next = after(span);
    Ok(span)
}

/// The first window from `next` on that keeps its distance from those that there are.
fn first_free(windows: &SpanMap<Oa, Weak<Backing>>, next: u64, len_bytes: u64) -> Option<Span<Oa>> {
    let within = Span::new(Oa::new(next), Oa::new(slots::BASE.get() - 1))?;
    let mut free = None;
    windows.first_gap(within, len_bytes, |gap| {
        let from = if gap.start() == within.start() { gap.start().get() } else { gap.start().get() + DISTANCE };
        let fits =
            |span: &Span<Oa>| if gap.last() == within.last() { span.last() <= gap.last() } else { after(*span) - 1 <= gap.last().get() };
        free = place(from, len_bytes).filter(fits);
        free.map(Span::start)
    })?;
    free
}

/// Left out between two windows, so that running over an end hits nothing.
const DISTANCE: u64 = 1 << GRANULE_LG2;

/// Where the next window may begin.
fn after(span: Span<Oa>) -> u64 {
    span.last().get() + 1 + DISTANCE
}

/// The first well aligned span from `next` on, below the slots.
fn place(next: u64, len_bytes: u64) -> Option<Span<Oa>> {
    let start = next.checked_next_multiple_of(1 << align_lg2(len_bytes))?;
    let span = Span::from_len(Oa::new(start), len_bytes.checked_next_multiple_of(1 << GRANULE_LG2)?).ok()?;
    (span.last() < slots::BASE).then_some(span)
}

/// All windows of this process.
#[derive(Clone, Copy, Debug)]
pub struct Windows;

impl Windows {
    /// The backing in whose window `oa` lies; `None` in between, and when it is gone.
    pub fn find(oa: Oa) -> Option<Arc<Backing>> {
        if oa >= slots::BASE {
            return slots::find(oa)?.upgrade();
        }
        WINDOWS.read().unwrap_or_else(PoisonError::into_inner).get(oa)?.1.upgrade()
    }

    /// Every backing that is alive, in the order of their output addresses.
    pub fn all() -> Vec<Arc<Backing>> {
        let mut all: Vec<_> =
            WINDOWS.read().unwrap_or_else(PoisonError::into_inner).iter().filter_map(|(_, backing)| backing.upgrade()).collect();
        all.extend(slots::all().filter_map(|backing| backing.upgrade()));
        all
    }
}

const _: () = assert!(OA_BASE.get().is_multiple_of(1 << LARGE_LG2) && addr::PAGE_LG2 < GRANULE_LG2);

#[cfg(test)]
mod tests {
    use super::*;
    use addr::Address;

    #[test]
    fn alignment_follows_size() {
        let lg2s: Vec<u8> = [4096, 2 << 20, (2 << 20) + 4096, 3 << 20, 512 << 20, 1 << 30, 1 << 40].into_iter().map(align_lg2).collect();
        assert_eq!(lg2s, [21, 21, 22, 22, 29, 30, 30]);
    }

    #[test]
    fn windows_stay_apart_and_below_the_slots() {
        let mut windows = SpanMap::new();
        let mut add = |next, len| {
            let span = first_free(&windows, next, len)?;
            windows.insert(span, Weak::new()).unwrap();
            Some((span.start(), span.len()))
        };
        let base = OA_BASE.get();
        assert_eq!(add(base, 4096), Some((OA_BASE, 2 << 20)));
        assert_eq!(add(base, 4096), Some((OA_BASE.plus(4 << 20), 2 << 20)), "no gap between windows");
        assert_eq!(add(base, 1 << 30), Some((OA_BASE.plus(1 << 30), 1 << 30)));
        assert_eq!(add(base, (2 << 20) + 1), Some((OA_BASE.plus(8 << 20), 4 << 20)), "what is free below is used");
        let top = slots::BASE.get() - (2 << 20);
        assert_eq!(add(top, (2 << 20) + 1), None);
        assert_eq!(add(top, 2 << 20), Some((Oa::new(top), 2 << 20)));
        assert_eq!(add(top - (2 << 20), 2 << 20), None, "too near to the next");
        assert_eq!(add(top - (4 << 20), 2 << 20), Some((Oa::new(top - (4 << 20)), 2 << 20)));
        assert_eq!(add(u64::MAX, 4096), None);
        assert_eq!(place(base, u64::MAX), None);
    }

    #[test]
    fn addresses_of_the_dead_are_used_again_in_the_end() {
        // Together far more than there are.
        for round in 0..64 {
            let backing = Backing::simulated(1 << 48, crate::Frames::Contiguous).unwrap_or_else(|error| panic!("round {round}: {error}"));
            assert!(Windows::find(backing.window().start()).is_some_and(|found| Arc::ptr_eq(&found, &backing)));
        }
    }

    #[test]
    fn the_dead_are_struck_off() {
        let backing = Backing::simulated(4096, crate::Frames::Contiguous).unwrap();
        let oa = backing.window().start();
        let listed = || WINDOWS.read().unwrap().get(oa).is_some();
        assert!(listed());
        drop(backing);
        assert!(!listed());
    }
}
