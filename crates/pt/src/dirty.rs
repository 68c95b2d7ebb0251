//! Dirty bits: set by whoever writes for a device, read and cleared by whoever migrates the guest.

use crate::atomic::{AtomicU64, Ordering};
use crate::hide::look;
use crate::table::group;
use crate::{Entry, Format, Gather, Leaf, Table};
use addr::{Iova, Span};
use core::ops::Deref;

impl<F: Format, W: Deref<Target = [AtomicU64]>> Table<F, W> {
    /// Marks the leaf that answers for `iova` as written to, by compare-exchange on the exact entry: if it changed meanwhile, the walk is
    /// made again, so the bit lands in what replaced it. The caller is inside a guard. `false` when nothing is mapped there, or when the
    /// leaf is read-only in a format in which such a leaf cannot be dirty ([`Format::dirtied`]).
    ///
    /// A leaf that a cut has hidden meanwhile ([`Hitless::BreakFirst`](crate::Hitless::BreakFirst)) is marked as well: the write was let
    /// through before.
    pub fn mark_dirty(&self, iova: Iova) -> bool {
        if F::DIRTY == 0 {
            return self.walk(iova).is_some();
        }
        'walk: loop {
            let (mut table, mut level) = self.root();
            if iova.get() > Self::reach(level) {
                return false;
            }
            loop {
                let Some(entry) = self.arena.entry_at(table, F::slot(iova, level)) else { return false };
                let seen = entry.load(Ordering::Acquire);
                match look::<F>(seen, level) {
                    Entry::Table(below) if level > 0 => (table, level) = (below, level - 1),
                    Entry::Leaf { dirty, .. } => {
                        let marked = F::dirtied(seen);
                        if dirty || marked == seen {
                            return dirty;
                        }
                        match entry.compare_exchange(seen, marked, Ordering::AcqRel, Ordering::Relaxed) {
                            Ok(_) => return true,
                            Err(_) => continue 'walk,
                        }
                    }
                    _ => return false,
                }
            }
        }
    }

    /// Calls `sink` with the span of every dirty leaf that meets `span`, and clears the bits when `clear` is set. Then the cached
    /// translations of those leaves ride in `gather`: only after [`Gather::finish`] is the next write sure to set the bit again.
    ///
    /// A leaf is dirty as a whole. The caller holds the span.
    pub fn read_dirty(&self, span: Span<Iova>, clear: bool, gather: &mut Gather, mut sink: impl FnMut(Span<Iova>)) {
        self.leaves(span, |leaf| {
            if leaf.dirty {
                sink(leaf.span());
                if clear {
                    self.clean(&leaf);
                    gather.add(leaf.span());
                }
            }
        });
    }

    fn clean(&self, leaf: &Leaf) {
        let (table, top) = self.root();
        let level = F::level_of(leaf.size);
        let mut table = table;
        for above in (level + 1..=top).rev() {
            let Some(entry) = self.arena.entry_at(table, F::slot(leaf.iova, above)) else { return };
            let Entry::Table(below) = F::decode(entry.load(Ordering::Acquire), above) else { return };
            table = below;
        }
        let Some(table) = self.arena.table_at(table) else { return };
        let (first, slots) = group::<F>(F::slot(leaf.iova, level), level, leaf.size);
        for entry in &self.arena.entries(table)[first..first + slots] {
            entry.fetch_and(!F::DIRTY, Ordering::AcqRel);
        }
    }
}
