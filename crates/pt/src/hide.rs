//! Break-before-make, for hardware that may not walk while a leaf's size changes ([`Hitless::BreakFirst`](crate::Hitless::BreakFirst)).
//!
//! A leaf that is about to change is *hidden*: its valid bit goes and everything else stays, so a device faults and an editor still reads
//! what stood there. Then the caller's flush: every cached translation is gone, and every walk that met the leaf has ended. Then the new
//! entry takes the place of the hidden one by compare-exchange.
//!
//! The caller of a cut holds only a part of the leaf, so between the two steps the holder of another part may come along. It must neither
//! take the hidden leaf for absent, or its own unmap would be undone by the step that follows, nor wait. So every edit reads entries through
//! [`look`], to which a hidden leaf is a leaf: who wants to unmap a part of it cuts it first, hides it once more, flushes for itself, and
//! whoever exchanges first wins. A write that a device was let through before the leaf was hidden marks the hidden leaf dirty, and the mark
//! moves on into what replaces it.

use crate::atomic::{AtomicU64, Ordering};
use crate::{Entry, Format, Table};
use addr::{Iova, Lg2, Span};
use core::ops::Deref;
use sync::pause::pause;

/// Invalidates a span, and comes back when no device uses an old translation of it any more.
pub(crate) type Flush<'a> = &'a mut dyn FnMut(Span<Iova>);

/// Whether leaves of the format are hidden before they are changed. Known when the code is compiled: where they are not, nothing of this
/// file is in it.
#[inline(always)]
pub(crate) const fn breaks<F: Format>() -> bool {
    !F::HITLESS.is_allowed()
}

/// Reads an entry for an edit: as [`Format::decode`], but that a hidden leaf is a leaf.
#[inline(always)]
pub(crate) fn look<F: Format>(entry: u64, level: u8) -> Entry {
    match F::decode(entry, level) {
        Entry::Absent if breaks::<F>() && entry != 0 => match F::decode(entry | F::VALID, level) {
            Entry::Table(_) => Entry::Absent,
            leaf => leaf,
        },
        seen => seen,
    }
}

impl<F: Format, W: Deref<Target = [AtomicU64]>> Table<F, W> {
    /// Hides the leaf `seen`, unless it is hidden already, flushes, and puts in its place what `make` answers, which learns whether a dirty
    /// bit has come since. `false` when somebody else changed the entry: then nothing of this call is in it.
    pub(crate) fn replace_hidden(
        &self,
        entry: &AtomicU64,
        seen: u64,
        whole: Span<Iova>,
        flush: Flush<'_>,
        make: impl Fn(bool) -> u64,
    ) -> bool {
        let hidden = seen & !F::VALID;
        if seen != hidden {
            pause();
            if entry.compare_exchange(seen, hidden, Ordering::AcqRel, Ordering::Acquire).is_err() {
                return false;
            }
        }
        self.flush_broken(whole, flush);
        loop {
            let now = entry.load(Ordering::Acquire);
            if (now ^ hidden) & !F::DIRTY != 0 {
                return false;
            }
            let value = make(now & !hidden & F::DIRTY != 0);
            pause();
            // Release: a table is complete before the pointer is seen (I-2).
            if entry.compare_exchange(now, value, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                return true;
            }
        }
    }

    /// Hides every leaf of at least `least` in these slots, which make up `whole`, and flushes. Of a leaf that is being cut, pieces that
    /// somebody else has put there already are smaller, and stay.
    pub(crate) fn hide_slots(&self, entries: &[AtomicU64], level: u8, least: Lg2, whole: Span<Iova>, flush: Flush<'_>) {
        for entry in entries {
            let mut seen = entry.load(Ordering::Acquire);
            while matches!(F::decode(seen, level), Entry::Leaf { size, .. } if size >= least) {
                pause();
                match entry.compare_exchange(seen, seen & !F::VALID, Ordering::AcqRel, Ordering::Acquire) {
                    Ok(_) => break,
                    Err(now) => seen = now,
                }
            }
        }
        self.flush_broken(whole, flush);
    }

    fn flush_broken(&self, whole: Span<Iova>, flush: Flush<'_>) {
        self.counts.mine().breaks.fetch_add(1, Ordering::Relaxed);
        flush(whole);
    }
}
