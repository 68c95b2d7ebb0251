//! The simulated space of output addresses, cut into windows, one per backing (D-1).
//!
//! Addresses are handed out upwards and never twice: whoever still holds one that outlived its backing finds nothing, rather than
//! somebody else's memory.

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

/// Takes output addresses for `len_bytes`, rounded up to 2 MiB.
pub(crate) fn allocate(len_bytes: u64) -> Result<Span<Oa>, Error> {
    let mut next = NEXT.lock().unwrap_or_else(PoisonError::into_inner);
    let (span, after) = place(*next, len_bytes).ok_or(Error::NoOutputAddresses { len_bytes })?;
    *next = after;
    Ok(span)
}

/// The first fitting window from `next` on, and where to go on behind it: 2 MiB are left out, so that running over an end hits nothing.
fn place(next: u64, len_bytes: u64) -> Option<(Span<Oa>, u64)> {
    let start = next.checked_next_multiple_of(1 << align_lg2(len_bytes))?;
    let span = Span::from_len(Oa::new(start), len_bytes.checked_next_multiple_of(1 << GRANULE_LG2)?).ok()?;
    (span.last() <= OA_LAST).then(|| (span, span.last().get() + 1 + (1 << GRANULE_LG2)))
}

pub(crate) fn register(window: Span<Oa>, backing: Weak<Backing>) -> Result<(), Error> {
    // A fresh window overlaps nothing.
    WINDOWS.write().unwrap_or_else(PoisonError::into_inner).insert(window, backing).map_err(|_| addr::OutOfMemory.into())
}

pub(crate) fn unregister(window: Span<Oa>) {
    WINDOWS.write().unwrap_or_else(PoisonError::into_inner).remove(window.start());
}

/// All windows of this process.
#[derive(Clone, Copy, Debug)]
pub struct Windows;

impl Windows {
    /// The backing in whose window `oa` lies; `None` in between, and when it is gone.
    pub fn find(oa: Oa) -> Option<Arc<Backing>> {
        WINDOWS.read().unwrap_or_else(PoisonError::into_inner).get(oa)?.1.upgrade()
    }

    /// Every backing that is alive, in the order of their output addresses.
    pub fn all() -> Vec<Arc<Backing>> {
        WINDOWS.read().unwrap_or_else(PoisonError::into_inner).iter().filter_map(|(_, backing)| backing.upgrade()).collect()
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
    fn windows_stay_apart_and_in_52_bits() {
        let (first, next) = place(OA_BASE.get(), 4096).unwrap();
        assert_eq!((first.start(), first.len()), (OA_BASE, 2 << 20));
        assert_eq!(place(next, 4096).unwrap().0.start().get(), first.last().get() + 1 + (2 << 20), "no gap between windows");
        let (second, _) = place(next, 1 << 30).unwrap();
        assert!(second.start().is_aligned(30));
        assert_eq!(place((1 << 52) - (1 << 21), 2 << 20).unwrap().0.last(), OA_LAST);
        assert_eq!(place((1 << 52) - (1 << 21), (2 << 20) + 1), None);
        assert_eq!(place(u64::MAX, 4096), None);
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
