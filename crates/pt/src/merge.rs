//! Merge: where neighbouring leaves say one thing, they become one larger leaf. Hitless, the reverse of a cut, and like it by way of hidden
//! leaves where the hardware cannot take that (`hide`).
//!
//! Inside a table, slots are rewritten one by one to the larger size; each keeps its own dirty bit, since a bit in any slot speaks for the
//! whole leaf. A table that says one thing from end to end is replaced by one leaf in its parent and retired; until the grace period ends
//! a device may still set a dirty bit in it, which [`Gather::finish`] carries over (I-14). Every cached translation stays right; what walkers
//! keep of the way to the table does not ([`Gather::tables`]).

use crate::arena::TableId;
use crate::atomic::{AtomicU64, Ordering};
use crate::gather::Merged;
use crate::hide::{Flush, breaks};
use crate::{Entry, Format, Gather, Perm, Table};
use addr::{Address, Iova, Lg2, Oa, SizeSet, Span};
use core::ops::Deref;
use sync::pause::pause;

impl<F: Format, W: Deref<Target = [AtomicU64]>> Table<F, W> {
    /// Joins leaves that lie wholly in `span` into the largest of `sizes`; answers how many larger leaves came out.
    ///
    /// The caller holds the whole span, and keeps it until it has called [`Gather::finish`]. Where no memory is left to remember a
    /// retired table, that table stays as it is.
    ///
    /// `flush` is what it is in [`Table::cut`]: called only where [`Format::HITLESS`] asks for break-before-make, once for every leaf that
    /// comes out. DMA to what becomes that leaf faults meanwhile, which few merges are worth. It may have been a table before, so unlike that
    /// of a cut this flush is for walkers' caches as well ([`Gather::tables`]).
    pub fn merge(&self, span: Span<Iova>, sizes: SizeSet, gather: &mut Gather, mut flush: impl FnMut(Span<Iova>)) -> u32 {
        let (top, level) = self.root();
        let mut merges = 0;
        if let (Some(part), Some(top)) = (span.intersect(Self::whole(level)), self.arena.table_at(top)) {
            self.merge_table(top, level, part, span, sizes.and(F::SIZES), gather, &mut flush, &mut merges);
            self.join_slots(top, level, part, sizes.and(F::SIZES), &mut flush, &mut merges);
            self.counts.mine().merges.fetch_add(u64::from(merges), Ordering::Relaxed);
        }
        merges
    }

    /// Merges what is below a table. Its own slots are joined by the caller, who may rather put one leaf in the place of all of it.
    #[expect(clippy::too_many_arguments, reason = "the state of one recursion; a struct would only rename it")]
    fn merge_table(
        &self,
        table: TableId,
        level: u8,
        part: Span<Iova>,
        span: Span<Iova>,
        sizes: SizeSet,
        gather: &mut Gather,
        flush: Flush<'_>,
        merges: &mut u32,
    ) {
        if level > 0 {
            for piece in part.blocks(F::item_lg2(level)) {
                let slot = F::slot(piece.start(), level);
                let entry = &self.arena.entries(table)[slot];
                let seen = entry.load(Ordering::Acquire);
                let Entry::Table(below) = F::decode(seen, level) else { continue };
                let Some(below) = self.arena.table_at(below) else { continue };
                self.merge_table(below, level - 1, piece, span, sizes, gather, flush, merges);
                let item = Lg2(F::item_lg2(level));
                let whole = Span::block(piece.start(), item.0);
                let one_thing = (span.covers(whole) && sizes.has(item)).then(|| self.says_one_thing(below, level - 1, item)).flatten();
                let Some((oa, perm, dirty)) = one_thing.filter(|_| gather.reserve_merge()) else {
                    self.join_slots(below, level - 1, piece, sizes, flush, merges);
                    continue;
                };
                let leaf = F::leaf(level, item, oa, perm) | if dirty { F::DIRTY } else { 0 };
                if self.put_leaf(entry, seen, leaf, below, whole, flush) {
                    let merged = Merged { table: below, parent: table, slot: slot as u32, dirty_bit: F::DIRTY };
                    gather.retire_merged(&self.arena, merged, whole);
                    *merges += 1;
                }
            }
        }
    }

    /// Puts one leaf in the place of the pointer `seen` to the table `below`, which says the same.
    fn put_leaf(&self, entry: &AtomicU64, seen: u64, leaf: u64, below: TableId, whole: Span<Iova>, flush: Flush<'_>) -> bool {
        if breaks::<F>() {
            let hidden = leaf & !F::VALID;
            pause();
            if entry.compare_exchange(seen, hidden, Ordering::AcqRel, Ordering::Acquire).is_err() {
                return false;
            }
            // Once flushed, nobody is in the table any more, and its dirty bits are what they will be.
            let stands = self.replace_hidden(entry, hidden, whole, flush, |late| {
                let soiled = late || self.arena.entries(below).iter().any(|entry| entry.load(Ordering::Acquire) & F::DIRTY != 0);
                if soiled { F::dirtied(leaf) } else { leaf }
            });
            debug_assert!(stands, "somebody else changed {whole}, all of which the caller holds");
            // Either way the table is out of the tree.
            return true;
        }
        pause();
        entry.compare_exchange(seen, leaf, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// What a table says, when it says one thing from its first slot to its last.
    fn says_one_thing(&self, table: TableId, level: u8, whole: Lg2) -> Option<(Oa, Perm, bool)> {
        let entries = self.arena.entries(table);
        let item = F::item_lg2(level);
        let Entry::Leaf { oa: start, perm, .. } = F::decode(entries[0].load(Ordering::Acquire), level) else { return None };
        if !start.is_aligned(whole.0) {
            return None;
        }
        let mut any_dirty = false;
        // What most tables hold: one clean leaf a slot, each the one before it and a step.
        let (mut usual, step) = (F::leaf(level, Lg2(item), start, perm), F::step(Lg2(item)));
        for (slot, entry) in entries.iter().enumerate() {
            let seen = entry.load(Ordering::Acquire);
            let is_usual = seen == usual;
            usual = usual.wrapping_add(step);
            if is_usual {
                continue;
            }
            let Entry::Leaf { size, oa, perm: own, dirty } = F::decode(seen, level) else { return None };
            let inside = (slot as u64) << item & (size.bytes() - 1);
            if own != perm || oa.get().wrapping_add(inside).wrapping_sub(start.get()) != (slot as u64) << item {
                return None;
            }
            any_dirty |= dirty;
        }
        Some((start, perm, any_dirty))
    }

    /// Joins leaves inside one table into multi-slot leaves, largest first.
    fn join_slots(&self, table: TableId, level: u8, part: Span<Iova>, sizes: SizeSet, flush: Flush<'_>, merges: &mut u32) {
        let item = F::item_lg2(level);
        let in_table = SizeSet(sizes.0 & !(u64::MAX >> (63 - item))).up_to(Lg2(item + F::INDEX_LG2 - 1));
        if in_table.largest().is_none() {
            return;
        }
        let Some(mut at) = round_up(part.start(), item) else { return };
        while part.contains(at) {
            let left = (part.last().get() - at.get()).saturating_add(1);
            let fit = Lg2((at.get().trailing_zeros().min(63) as u8).min(63 - left.leading_zeros() as u8).max(item));
            let mut step = Lg2(item);
            let mut candidates = in_table.up_to(fit);
            while let Some(size) = candidates.largest() {
                if self.join(table, level, at, size, flush, merges) {
                    step = size;
                    break;
                }
                candidates = candidates.up_to(Lg2(size.0 - 1));
            }
            match at.checked_add(step.bytes()) {
                Some(next) => at = next,
                None => return,
            }
        }
    }

    /// Makes one leaf of `size` at `at`, if the slots agree. `true` when it stands, also when it stood before.
    fn join(&self, table: TableId, level: u8, at: Iova, size: Lg2, flush: Flush<'_>, merges: &mut u32) -> bool {
        let item = F::item_lg2(level);
        let first = F::slot(at, level);
        let entries = &self.arena.entries(table)[first..first + (1 << (size.0 - item))];
        let Entry::Leaf { size: now, oa: start, perm, .. } = F::decode(entries[0].load(Ordering::Acquire), level) else { return false };
        if now >= size {
            return true;
        }
        if !start.is_aligned(size.0) {
            return false;
        }
        let agrees = |(index, entry): (usize, &AtomicU64)| match F::decode(entry.load(Ordering::Acquire), level) {
            Entry::Leaf { size: own, oa, perm: rights, .. } => {
                let offset = (index as u64) << item;
                rights == perm && oa.get().wrapping_add(offset & (own.bytes() - 1)) == start.get() + offset
            }
            _ => false,
        };
        if !entries.iter().enumerate().all(agrees) {
            return false;
        }
        if breaks::<F>() {
            self.hide_slots(entries, level, Lg2(item), Span::block(at, size.0), flush);
        }
        let value = F::leaf(level, size, start, perm);
        for (index, entry) in entries.iter().enumerate() {
            let value = value + index as u64 * F::slot_step(level);
            pause();
            let mut seen = entry.load(Ordering::Acquire);
            while let Err(now) = entry.compare_exchange(seen, value | seen & F::DIRTY, Ordering::AcqRel, Ordering::Acquire) {
                seen = now;
            }
        }
        *merges += 1;
        true
    }
}

fn round_up(at: Iova, lg2: u8) -> Option<Iova> {
    at.checked_add((1 << lg2) - 1).map(|up| up.align_down(lg2))
}
