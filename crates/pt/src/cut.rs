//! Cut: a large leaf becomes smaller ones that say the same, so that a span has borders of its own. Hitless (design D-4), unless the hardware
//! cannot take it: then the leaf is hidden first, see `hide`.
//!
//! A leaf in one slot is replaced by a pointer to a table that was complete before; a leaf over several slots is rewritten slot by slot.
//! Each store is a compare-exchange against the very value that was read, so cuts of one leaf may race, and a dirty bit that a device sets
//! in between is never lost: the exchange fails and is tried again with the bit.

use crate::arena::{NoTable, Stock, TableId};
use crate::atomic::{AtomicU64, Ordering};
use crate::hide::{Flush, breaks, look};
use crate::table::{group, write_leaves};
use crate::{Entry, Format, Perm, Table};
use addr::{Address, Iova, Lg2, Oa, SizeSet, Span};
use core::ops::Deref;
use sync::pause::pause;

/// What cut pieces must look like.
#[derive(Clone, Copy)]
struct Want {
    span: Span<Iova>,
    sizes: SizeSet,
}

impl Want {
    /// A block may stay one leaf when its size is allowed and no border of the span lies inside it.
    fn keeps(&self, block: Span<Iova>, size: Lg2) -> bool {
        self.sizes.has(size) && (self.span.covers(block) || !self.span.overlaps(block))
    }
}

/// A leaf that is being cut.
#[derive(Clone, Copy)]
struct Source {
    span: Span<Iova>,
    oa: Oa,
    perm: Perm,
    dirty: bool,
}

impl<F: Format, W: Deref<Target = [AtomicU64]>> Table<F, W> {
    /// Cuts until no leaf crosses a border of `span`, and every leaf that meets the span and had to be cut is of a size in `sizes`.
    /// Answers how many leaves were cut.
    ///
    /// The caller holds `span`, not the leaves around it. Where [`Format::HITLESS`] allows it, translations stay as they were at every
    /// moment, nothing needs invalidation and `flush` is not called.
    ///
    /// Elsewhere each leaf that is cut is hidden, `flush` is called with all of its span and comes back when no device uses it any more, and
    /// then the pieces are put in its place. In between DMA to the leaf faults, also to the part that others hold;
    /// [`breaks`](Self::breaks) counts these moments. Whoever holds another part meanwhile sees the leaf as if it stood
    /// ([`leaf_at`](Self::leaf_at)), and may cut it as well.
    ///
    /// # Errors
    /// [`NoTable`]: some leaves may have been cut, every translation is as before. A stock of [`Table::tables_for_cut`] rules it out.
    pub fn cut(&self, span: Span<Iova>, sizes: SizeSet, stock: &mut Stock<W>, mut flush: impl FnMut(Span<Iova>)) -> Result<u32, NoTable> {
        let want = Want { span, sizes: sizes.and(F::SIZES) };
        let (top, level) = self.root();
        let (Some(part), Some(top)) = (span.intersect(Self::whole(level)), self.arena.table_at(top)) else { return Ok(0) };
        let mut cuts = 0;
        let ends = [Some(part.start()), (part.last() != part.start()).then_some(part.last())];
        for end in ends.into_iter().flatten() {
            let before = cuts;
            let done = self.cut_at(top, level, end, want, stock, &mut flush, &mut cuts);
            self.counts.mine().cuts.fetch_add(u64::from(cuts - before), Ordering::Relaxed);
            done?;
        }
        Ok(cuts)
    }

    /// How many tables a cut can take at most.
    pub fn tables_for_cut(&self) -> u32 {
        2 * u32::from(self.root().1)
    }

    /// Brings the leaf that answers for `at` to a size that keeps to `want`.
    #[expect(clippy::too_many_arguments, reason = "a place, a wish, and what it takes")]
    fn cut_at(
        &self,
        mut table: TableId,
        mut level: u8,
        at: Iova,
        want: Want,
        stock: &mut Stock<W>,
        flush: Flush<'_>,
        cuts: &mut u32,
    ) -> Result<(), NoTable> {
        loop {
            let slot = F::slot(at, level);
            let entry = &self.arena.entries(table)[slot];
            let seen = entry.load(Ordering::Acquire);
            match look::<F>(seen, level) {
                Entry::Absent => return Ok(()),
                Entry::Table(below) => {
                    let Some(below) = self.arena.table_at(below).filter(|_| level > 0) else { return Ok(()) };
                    (table, level) = (below, level - 1);
                }
                Entry::Leaf { size, oa, perm, dirty } => {
                    let whole = Span::block(at, size.0);
                    if want.keeps(whole, size) || size.0 == F::GRANULE_LG2 {
                        return Ok(());
                    }
                    let source = Source { span: whole, oa, perm, dirty };
                    if size.0 == F::item_lg2(level) {
                        let below = self.build_below(source, level - 1, want, stock)?;
                        if self.put_table(entry, seen, level, below, whole, flush) {
                            *cuts += 1;
                        } else {
                            self.unbuild(below, level - 1, stock);
                        }
                    } else {
                        if breaks::<F>() {
                            let (first, slots) = group::<F>(slot, level, size);
                            self.hide_slots(&self.arena.entries(table)[first..first + slots], level, size, whole, flush);
                        }
                        self.split_group(table, level, slot, source, want);
                        *cuts += 1;
                    }
                }
            }
        }
    }

    /// Puts a pointer to a complete table in the place of the leaf `seen`, which says the same. `false` when somebody else was first.
    fn put_table(&self, entry: &AtomicU64, seen: u64, level: u8, below: TableId, whole: Span<Iova>, flush: Flush<'_>) -> bool {
        let pointer = F::table(level, self.arena.oa_of(below));
        if breaks::<F>() {
            return self.replace_hidden(entry, seen, whole, flush, |late| {
                if late {
                    self.soil(below, level - 1);
                }
                pointer
            });
        }
        pause();
        // Release: the table is complete before the pointer is seen (I-2).
        entry.compare_exchange(seen, pointer, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Marks every leaf in a private table as dirty.
    fn soil(&self, table: TableId, level: u8) {
        self.children(table, level).for_each(|below| self.soil(below, level - 1));
        for entry in self.arena.entries(table) {
            let value = entry.load(Ordering::Relaxed);
            if let Entry::Leaf { .. } = F::decode(value, level) {
                entry.store(F::dirtied(value), Ordering::Relaxed);
            }
        }
    }

    /// A private table at `level` that says what `source` says, in the largest pieces that keep to `want`.
    fn build_below(&self, source: Source, level: u8, want: Want, stock: &mut Stock<W>) -> Result<TableId, NoTable> {
        let table = stock.take()?;
        let item = F::item_lg2(level);
        let dirty = if source.dirty { F::DIRTY } else { 0 };
        let mut at = source.span.start();
        let mut slot = 0;
        while slot < 1 << F::INDEX_LG2 {
            let entries = self.arena.entries(table);
            let oa = source.oa.plus(at.offset_from(source.span.start()));
            let size = Self::piece(at, level, Lg2(item + F::INDEX_LG2 - 1), want);
            let mut slots = 1usize << (size.0 - item);
            let piece = Span::block(at, size.0);
            // At the granule there is nothing smaller, so a border inside it stays inside.
            if want.keeps(piece, size) || level == 0 {
                slots *= Self::pieces_alike(at, size, ((1 << F::INDEX_LG2) - slot) / slots, level, want);
                write_leaves::<F>(&entries[slot..slot + slots], level, size, F::leaf(level, size, oa, source.perm) | dirty);
            } else {
                let part = Source { span: piece, oa, ..source };
                let below = match self.build_below(part, level - 1, want, stock) {
                    Ok(below) => below,
                    Err(error) => {
                        crate::table::wipe(&entries[slot..]);
                        self.unbuild(table, level, stock);
                        return Err(error);
                    }
                };
                entries[slot].store(F::table(level, self.arena.oa_of(below)), Ordering::Relaxed);
            }
            slot += slots;
            at = Iova::new(at.get().wrapping_add((slots as u64) << item));
        }
        Ok(table)
    }

    /// How many pieces of `size` side by side, from `at` on, are right as they are: one at least, `most` at most.
    fn pieces_alike(at: Iova, size: Lg2, most: usize, level: u8, want: Want) -> usize {
        let in_table = want.sizes.up_to(Lg2(F::item_lg2(level) + F::INDEX_LG2 - 1));
        if in_table.largest().is_some_and(|largest| largest > size) {
            // Where a larger one begins to fit is left to `piece`.
            return 1;
        }
        let to_border = |border: u64| (border > at.get()).then(|| (border - at.get()) >> size.0);
        let borders = [Some(want.span.start().get()), want.span.last().get().checked_add(1)];
        let nearest = borders.into_iter().flatten().filter_map(to_border).min();
        nearest.map_or(most, |pieces| most.min(pieces as usize)).max(1)
    }

    /// The largest leaf at `level`, at most `limit`, that begins at `at` and keeps to `want`; the level's item when none does.
    fn piece(at: Iova, level: u8, limit: Lg2, want: Want) -> Lg2 {
        let item = F::item_lg2(level);
        let aligned = Lg2((at.get().trailing_zeros().min(63) as u8).min(limit.0));
        let mut sizes = want.sizes.up_to(aligned);
        while let Some(size) = sizes.largest().filter(|size| size.0 > item) {
            if want.keeps(Span::block(at, size.0), size) {
                return size;
            }
            sizes = sizes.up_to(Lg2(size.0 - 1));
        }
        Lg2(item)
    }

    /// Rewrites the slots of a multi-slot leaf one by one, each to the largest piece around it that keeps to `want`. The next round of the
    /// caller descends into a single slot when that is still too large.
    fn split_group(&self, table: TableId, level: u8, slot: usize, source: Source, want: Want) {
        let item = F::item_lg2(level);
        let size = Lg2(64 - source.span.last_offset().leading_zeros() as u8);
        let (first, slots) = group::<F>(slot, level, size);
        let entries = &self.arena.entries(table)[first..first + slots];
        // Any slot may carry the leaf's dirty bit, and every piece inherits it.
        let dirty = entries.iter().fold(0, |all, entry| all | entry.load(Ordering::Acquire)) & F::DIRTY;
        for (index, entry) in entries.iter().enumerate() {
            let at = source.span.start().plus((index as u64) << item);
            loop {
                let seen = entry.load(Ordering::Acquire);
                // Another cut may have been here; its pieces are looked at like ours.
                let Entry::Leaf { size, oa, perm, .. } = look::<F>(seen, level) else { break };
                let block = Span::block(at, size.0);
                if size.0 == item || want.keeps(block, size) {
                    break;
                }
                let mut smaller = Lg2(size.0 - 1);
                while smaller.0 > item && !want.keeps(Span::block(at, smaller.0), smaller) {
                    smaller = Lg2(smaller.0 - 1);
                }
                let piece = Span::block(at, smaller.0);
                let first = F::leaf(level, smaller, oa.plus(piece.start().offset_from(block.start())), perm);
                let slot = first + (at.offset_from(piece.start()) >> item) * F::slot_step(level);
                let value = slot | dirty | seen & F::DIRTY;
                pause();
                if entry.compare_exchange(seen, value, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                    break;
                }
            }
        }
    }

    /// Puts a private table and those below it back.
    fn unbuild(&self, table: TableId, level: u8, stock: &mut Stock<W>) {
        for below in self.children(table, level) {
            self.unbuild(below, level - 1, stock);
        }
        stock.put(table);
    }
}
