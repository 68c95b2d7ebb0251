//! Where windows sit in this process: one large stretch of address space, taken once, that is never used for anything else.
//!
//! Because only windows are ever mapped there, an address that outlived its window can fault or meet another window, and nothing
//! else (the argument is at the top of `raw.rs`). Ranges are handed out upwards and come round only when the end is reached, so that a
//! stale address meets nothing for as long as possible.

use crate::raw;
use addr::{Address, Hva, Span, SpanMap};
use std::sync::{Mutex, OnceLock, PoisonError};

/// What is asked for first, and the least that is of use. Address space costs nothing; limits (RLIMIT_AS) may forbid it.
const MOST_BYTES: u64 = 16 << 40;
const LEAST_BYTES: u64 = 1 << 30;
/// Never mapped, behind each window: a copy that runs over the end faults.
const GUARD_BYTES: u64 = 2 << 20;

#[derive(Debug)]
pub(crate) struct Reservation {
    span: Span<Hva>,
    ranges: Mutex<Ranges>,
}

impl Reservation {
    /// The one of this process; `None` when not even the least could be had.
    pub(crate) fn get() -> Option<&'static Self> {
        static ONE: OnceLock<Option<Reservation>> = OnceLock::new();
        ONE.get_or_init(|| {
            let mut len_bytes = MOST_BYTES;
            while len_bytes >= LEAST_BYTES {
                if let Ok(span) = raw::reserve(len_bytes as usize) {
                    return Some(Self { span, ranges: Mutex::new(Ranges::new(span)) });
                }
                len_bytes /= 2;
            }
            None
        })
        .as_ref()
    }

    /// All of it.
    pub(crate) fn span(&self) -> Span<Hva> {
        self.span
    }

    pub(crate) fn take(&self, len_bytes: u64, align_lg2: u8) -> Option<Span<Hva>> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner).take(len_bytes, align_lg2)
    }

    pub(crate) fn put_back(&self, range: Span<Hva>) {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner).taken.remove(range.start());
    }
}

/// Which parts of the reservation are taken.
struct Ranges {
    whole: Span<Hva>,
    taken: SpanMap<Hva, ()>,
    /// Where the last range ended: the search goes on from here.
    next: Hva,
}

impl std::fmt::Debug for Ranges {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ranges taken", self.taken.len())
    }
}

impl Ranges {
    fn new(whole: Span<Hva>) -> Self {
        Self { whole, taken: SpanMap::new(), next: whole.start() }
    }

    /// The range that is answered includes its guard.
    fn take(&mut self, len_bytes: u64, align_lg2: u8) -> Option<Span<Hva>> {
        let len = len_bytes.checked_next_multiple_of(GUARD_BYTES)?.checked_add(GUARD_BYTES)?;
        let fits = |gap: Span<Hva>| {
            let start = gap.start().checked_add((1 << align_lg2) - 1)?.align_down(align_lg2);
            gap.covers(Span::from_len(start, len).ok()?).then_some(start)
        };
        let behind = Span::new(self.next, self.whole.last());
        let start =
            behind.and_then(|behind| self.taken.first_gap(behind, len, fits)).or_else(|| self.taken.first_gap(self.whole, len, fits))?;
        let range = Span::from_len(start, len).ok()?;
        self.taken.insert(range, ()).ok()?;
        self.next = range.last().checked_add(1)?;
        Some(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comes_round_only_at_the_end() {
        let mut ranges = Ranges::new(Span::from_len(Hva::new(0x7000_0020_0000), 1 << 30).unwrap());
        let first = ranges.take(16 << 20, 25).unwrap();
        assert!(first.start().is_aligned(25) && first.len() == (16 << 20) + GUARD_BYTES);
        ranges.taken.remove(first.start());
        let mut seen = 0;
        let mut last = first.start();
        loop {
            let range = ranges.take(16 << 20, 25).unwrap();
            ranges.taken.remove(range.start());
            if range.start() == first.start() {
                break;
            }
            assert!(range.start() > last, "{range} was free, but not the next one");
            (last, seen) = (range.start(), seen + 1);
        }
        assert_eq!(seen, 30, "1 GiB has room for 32 steps of 32 MiB less the misaligned first, and the one we began with");
    }

    #[test]
    fn full_is_none() {
        let mut ranges = Ranges::new(Span::from_len(Hva::new(1 << 40), 64 << 20).unwrap());
        assert_eq!(ranges.take(64 << 20, 21), None, "no room for the guard");
        assert_eq!(ranges.take(u64::MAX, 21), None);
        let all = ranges.take(62 << 20, 21).unwrap();
        assert_eq!(ranges.take(4096, 12), None);
        ranges.taken.remove(all.start());
        assert!(ranges.take(4096, 12).is_some());
    }
}
