//! Shedding: a whole leaf goes although its caller holds only a part of it. The last resort of a revocation that can have no table to
//! cut the leaf with (design D-5): what is lost is a translation, never the promise.

use crate::atomic::AtomicU64;
use crate::atomic::Ordering;
use crate::hide::look;
use crate::table::group;
use crate::{Entry, Format, Gather, Leaf, Table};
use addr::{Address, Iova, Span};
use core::ops::Deref;

impl<F: Format, W: Deref<Target = [AtomicU64]>> Table<F, W> {
    /// Takes out the one leaf that answers for `iova`, all of it; answers what it was. Cannot fail and does not allocate.
    ///
    /// The caller holds `iova`, not the rest of the leaf, so slots go one by one by compare-exchange: a racing cut of the same leaf, or
    /// whatever the holder of another part has put in its place meanwhile, wins its slots. Tables are never touched.
    pub fn shed(&self, iova: Iova, gather: &mut Gather) -> Option<Leaf> {
        loop {
            let (mut table, mut level) = self.root();
            if iova.get() > Self::reach(level) {
                return None;
            }
            let (table, leaf) = loop {
                let seen = self.arena.entry_at(table, F::slot(iova, level))?.load(Ordering::Acquire);
                match look::<F>(seen, level) {
                    Entry::Table(below) if level > 0 => (table, level) = (below, level - 1),
                    Entry::Leaf { size, oa, perm, dirty } => break (table, Leaf { iova: iova.align_down(size.0), oa, size, perm, dirty }),
                    _ => return None,
                }
            };
            let entries = self.arena.entries(self.arena.table_at(table)?);
            let own = F::slot(iova, level);
            let (first, slots) = group::<F>(own, level, leaf.size);
            let mut gone = false;
            for (index, entry) in entries[first..first + slots].iter().enumerate() {
                let mut seen = entry.load(Ordering::Acquire);
                // The dirty bit may be set under us; any other change is somebody else's slot now.
                while matches!(look::<F>(seen, level), Entry::Leaf { size, oa, .. } if size == leaf.size && oa == leaf.oa) {
                    match entry.compare_exchange(seen, 0, Ordering::AcqRel, Ordering::Acquire) {
                        Ok(_) => {
                            gone |= first + index == own;
                            break;
                        }
                        Err(now) => seen = now,
                    }
                }
            }
            gather.add(Span::block(iova, leaf.size.0));
            if gone {
                return Some(leaf);
            }
        }
    }
}
