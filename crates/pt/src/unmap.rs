//! Unmap: leaves go, and with them every table whose whole span goes. Cannot fail and does not allocate (I-9).

use crate::arena::TableId;
use crate::atomic::{AtomicU64, Ordering};
use crate::hide::look;
use crate::table::{group, wipe};
use crate::{Entry, Format, Gather, Leaf, Table};
use addr::{Address, Iova, Span};
use core::ops::Deref;
use sync::pause::pause;

impl<F: Format, W: Deref<Target = [AtomicU64]>> Table<F, W> {
    /// Takes out every leaf that lies in `span`, and the tables that only served it. The caller holds the whole span, and calls
    /// [`Gather::finish`] before it lets anyone reuse the pages.
    ///
    /// A leaf that sticks out of the span is left alone; the first such leaf is the answer. [`Table::cut`] the span first to have none.
    pub fn unmap(&self, span: Span<Iova>, gather: &mut Gather) -> Option<Leaf> {
        if let Some(entry) = self.only_leaf(span) {
            gather.add(span);
            pause();
            entry.store(0, Ordering::Relaxed);
            return None;
        }
        self.unmap_all(span, gather)
    }

    /// The slot of the leaf that is all of `span`, when one leaf in one slot is.
    #[inline(always)]
    fn only_leaf(&self, span: Span<Iova>) -> Option<&AtomicU64> {
        let (mut table, mut level) = self.root();
        let (start, last) = (span.start().get(), span.last().get());
        if last > Self::reach(level) {
            return None;
        }
        loop {
            let item = F::item_lg2(level);
            let entry = self.arena.entry_at(table, F::slot(span.start(), level))?;
            match look::<F>(entry.load(Ordering::Acquire), level) {
                Entry::Table(below) if level > 0 => (table, level) = (below, level - 1),
                Entry::Leaf { size, .. } if size.0 == item && start ^ last == size.bytes() - 1 && start >> item << item == start => {
                    return Some(entry);
                }
                _ => return None,
            }
        }
    }

    /// The general way. Apart, so that a call that takes out one leaf saves no registers for it.
    #[inline(never)]
    fn unmap_all(&self, span: Span<Iova>, gather: &mut Gather) -> Option<Leaf> {
        let (mut table, mut level) = self.root();
        let part = span.intersect(Self::whole(level))?;
        gather.add(part);
        // Straight down while all of the span lies below one slot.
        while level > 0 {
            let below = Span::block(part.start(), F::item_lg2(level));
            if !below.covers(part) || part.covers(below) {
                break;
            }
            let entry = self.arena.entry_at(table, F::slot(part.start(), level))?.load(Ordering::Acquire);
            let Entry::Table(below) = F::decode(entry, level) else { break };
            (table, level) = (below, level - 1);
        }
        let mut crossing = None;
        self.clear(self.arena.table_at(table)?, level, part, span, gather, &mut crossing);
        crossing
    }

    fn clear(&self, table: TableId, level: u8, part: Span<Iova>, span: Span<Iova>, gather: &mut Gather, crossing: &mut Option<Leaf>) {
        let entries = self.arena.entries(table);
        let (low, high) = (F::slot(part.start(), level), F::slot(part.last(), level));
        let start = part.start().align_down(F::item_lg2(level));
        if level == 0 && self.ends_within(entries, low, start, span) && self.ends_within(entries, high, part.last(), span) {
            wipe(&entries[low..=high]);
            return;
        }
        let mut slot = low;
        while slot <= high {
            let entry = entries[slot].load(Ordering::Acquire);
            let iova = Iova::new(start.get() + (((slot - low) as u64) << F::item_lg2(level)));
            match look::<F>(entry, level) {
                Entry::Absent => slot += 1,
                Entry::Table(below) => {
                    let child = Span::block(iova, F::item_lg2(level));
                    match self.arena.table_at(below) {
                        Some(below) if span.covers(child) => {
                            pause();
                            entries[slot].store(0, Ordering::Relaxed);
                            self.retire_tree(below, level - 1, child, gather);
                        }
                        Some(below) => {
                            if let Some(part) = part.intersect(child) {
                                self.clear(below, level - 1, part, span, gather, crossing);
                            }
                        }
                        None => entries[slot].store(0, Ordering::Relaxed),
                    }
                    slot += 1;
                }
                Entry::Leaf { size, oa, perm, dirty } => {
                    let whole = Span::block(iova, size.0);
                    let (first, slots) = group::<F>(slot, level, size);
                    if span.covers(whole) {
                        wipe(&entries[first..first + slots]);
                    } else {
                        *crossing = crossing.or(Some(Leaf { iova: whole.start(), oa, size, perm, dirty }));
                    }
                    slot = first + slots;
                }
            }
        }
    }

    /// Whether the leaf in `slot`, which answers for `iova`, stays inside `span`. Between two such slots nothing can stick out.
    fn ends_within(&self, entries: &[AtomicU64], slot: usize, iova: Iova, span: Span<Iova>) -> bool {
        match look::<F>(entries[slot].load(Ordering::Acquire), 0) {
            Entry::Leaf { size, .. } => span.covers(Span::block(iova, size.0)),
            _ => true,
        }
    }

    /// Retires the table that served `region`, and every table below it.
    pub(crate) fn retire_tree(&self, table: TableId, level: u8, region: Span<Iova>, gather: &mut Gather) {
        gather.add_region(region);
        self.retire_all(table, level, gather);
    }

    /// Level-0 tables hold leaves alone, so they are not even looked at.
    fn retire_all(&self, table: TableId, level: u8, gather: &mut Gather) {
        for below in self.children(table, level) {
            self.retire_all(below, level - 1, gather);
        }
        gather.retire(&self.arena, table);
    }
}
