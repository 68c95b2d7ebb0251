//! A tree of tables: its top, and the walk that devices make.

use crate::arena::{Arena, NoTable, Stock, TableId};
use crate::atomic::{AtomicU64, Ordering};
use crate::format::check;
use crate::hide::look;
use crate::wide::fill;
use crate::{Entry, Format, Perm};
use addr::{Address, Iova, Lg2, Oa, Span};
use alloc::sync::Arc;
use core::marker::PhantomData;
use core::num::NonZeroU64;
use core::ops::Deref;
use sync::pause::pause;
use sync::shard::Sharded;

/// One IO page table.
///
/// The address of the top table and its level share one word (I-3), so a reader that meets a growing top sees either tree whole.
#[derive(Debug)]
pub struct Table<F: Format, W: Deref<Target = [AtomicU64]>> {
    pub(crate) arena: Arc<Arena<W>>,
    top: AtomicU64,
    /// For reports; the algorithm does not read them. Apart from the top, which every walk reads.
    pub(crate) counts: Sharded<Counts>,
    format: PhantomData<F>,
}

/// What one thread's share of the edits came to.
#[derive(Debug)]
pub(crate) struct Counts {
    pub(crate) cuts: AtomicU64,
    pub(crate) merges: AtomicU64,
    pub(crate) breaks: AtomicU64,
}

impl Counts {
    fn new() -> Self {
        let [cuts, merges, breaks] = [0; 3].map(AtomicU64::new);
        Self { cuts, merges, breaks }
    }
}

/// A translation, as the walk found it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Leaf {
    /// First IOVA of the leaf.
    pub iova: Iova,
    /// Output address of that first IOVA.
    pub oa: Oa,
    /// Size of the whole leaf.
    pub size: Lg2,
    /// What a device may do through it.
    pub perm: Perm,
    /// Whether the slot that answered has its dirty bit set.
    pub dirty: bool,
}

impl Leaf {
    /// Every IOVA that the leaf translates.
    #[inline]
    pub fn span(&self) -> Span<Iova> {
        Span::block(self.iova, self.size.0)
    }

    /// Every output address that the leaf gives.
    #[inline]
    pub fn oa_span(&self) -> Span<Oa> {
        Span::block(self.oa, self.size.0)
    }

    /// The output address of `iova`, which lies in the leaf.
    #[inline]
    pub fn oa_of(&self, iova: Iova) -> Oa {
        self.oa.plus(iova.offset_from(self.iova))
    }
}

/// A table below the top, and the size of the region that it serves: what a walker keeps so as to begin the next walk in that region there.
/// An entry of a paging-structure cache (VT-d), of a page directory cache (AMD), of a walk cache (Arm).
///
/// One word: address and level as in a top word, and the size of the region above what any format can address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WalkEntry(NonZeroU64);

/// Above [`Format::OUTPUT_LG2`] of every format.
const REGION_SHIFT: u32 = 58;

impl WalkEntry {
    #[inline(always)]
    fn new<F: Format>(table: Oa, level: u8) -> Option<Self> {
        let region = u64::from(F::item_lg2(level + 1));
        NonZeroU64::new(region << REGION_SHIFT | table.get() | u64::from(level)).map(Self)
    }

    /// Size of the region that the table serves; the region is the block of that size around any address whose walk came by.
    #[inline(always)]
    pub fn region(self) -> Lg2 {
        Lg2((self.0.get() >> REGION_SHIFT) as u8)
    }

    /// Where the table is.
    #[inline(always)]
    pub fn table(self) -> Oa {
        Oa::new(self.0.get() << (64 - REGION_SHIFT) >> (64 - REGION_SHIFT) & !LEVEL_BITS)
    }

    /// Its level.
    #[inline(always)]
    pub fn level(self) -> u8 {
        (self.0.get() & LEVEL_BITS) as u8
    }
}

/// The level lives in the low bits of the top word, which a table's alignment leaves free.
const LEVEL_BITS: u64 = 7;

impl<F: Format, W: Deref<Target = [AtomicU64]>> Table<F, W> {
    /// An empty tree with a top table of the format's first level.
    ///
    /// # Errors
    /// When the arena has no table left.
    pub fn new(arena: Arc<Arena<W>>) -> Result<Self, NoTable> {
        Self::with_start(arena, F::START_LEVEL)
    }

    /// An empty tree whose top table is of another level, no higher than the format's highest: one of [`Format::CONFIGS`].
    ///
    /// # Errors
    /// When the arena has no table left.
    pub fn with_start(arena: Arc<Arena<W>>, level: u8) -> Result<Self, NoTable> {
        const { check::<F>() }
        assert!(level <= F::MAX_LEVEL, "{} has no level {level}", F::NAME);
        assert!(arena.table_bytes() == 8 << F::INDEX_LG2, "arena tables of {} bytes do not fit {}", arena.table_bytes(), F::NAME);
        let top = Stock::new(&arena).take()?;
        wipe(arena.entries(top));
        let word = arena.oa_of(top).get() | u64::from(level);
        Ok(Self { arena, top: AtomicU64::new(word), counts: Sharded::new(Counts::new), format: PhantomData })
    }

    /// Where the tables live.
    pub fn arena(&self) -> &Arc<Arena<W>> {
        &self.arena
    }

    /// Address and level of the top table.
    #[inline(always)]
    pub fn root(&self) -> (Oa, u8) {
        let word = self.top.load(Ordering::Acquire);
        (Oa::new(word & !LEVEL_BITS), (word & LEVEL_BITS) as u8)
    }

    /// The leaf that answers for `iova`.
    ///
    /// Takes no lock and never waits. The caller is inside a read guard, so that no table it meets is reused under it (I-1).
    #[inline]
    pub fn walk(&self, iova: Iova) -> Option<Leaf> {
        self.find(iova, F::decode)
    }

    /// As [`walk`](Self::walk), from a table that an earlier walk came by; from the top when there is none. `keep` is told of the table that the leaf
    /// is in, for the next walk, unless that is `from`, or the top, which may grow.
    ///
    /// `from` serves the region in which `iova` lies, and since it was kept nothing of that region was in [`Gather::tables`](crate::Gather::tables) of
    /// an edit whose grace period is over. Then the table is what it was: either it is still part of the tree, and a walk from the top would come by it; or
    /// its edit waits for the caller's guard, and it says what it said when it was taken out, which is what this guard may see anyway (I-1, I-4).
    #[inline(always)]
    pub fn walk_from(&self, from: Option<WalkEntry>, iova: Iova, keep: impl FnOnce(WalkEntry)) -> Option<Leaf> {
        let (table, level) = match from {
            Some(from) => (from.table(), from.level()),
            None => self.root(),
        };
        if from.is_none() && iova.get() > Self::reach(level) {
            return None;
        }
        let (leaf, lowest) = self.find_from((table, level), iova, F::decode)?;
        if lowest.1 < level {
            WalkEntry::new::<F>(lowest.0, lowest.1).map(keep);
        }
        Some(leaf)
    }

    /// The leaf that stands at `iova`, also while somebody else's cut hides it from devices
    /// ([`Hitless::BreakFirst`](crate::Hitless::BreakFirst)): for those who edit.
    #[inline]
    pub fn leaf_at(&self, iova: Iova) -> Option<Leaf> {
        self.find(iova, look::<F>)
    }

    #[inline(always)]
    fn find(&self, iova: Iova, read: impl Fn(u64, u8) -> Entry) -> Option<Leaf> {
        let (top, level) = self.root();
        if iova.get() > Self::reach(level) {
            return None;
        }
        self.find_from((top, level), iova, read).map(|(leaf, _)| leaf)
    }

    /// The leaf for `iova` at or below a table of some level, and the table that it is in, with its level.
    #[inline(always)]
    fn find_from(&self, (mut table, mut level): (Oa, u8), iova: Iova, read: impl Fn(u64, u8) -> Entry) -> Option<(Leaf, (Oa, u8))> {
        loop {
            let entry = self.arena.entry_at(table, F::slot(iova, level))?.load(Ordering::Acquire);
            match read(entry, level) {
                Entry::Table(below) if level > 0 => (table, level) = (below, level - 1),
                Entry::Leaf { size, oa, perm, dirty } => {
                    let leaf = Leaf { iova: Iova::new(iova.get() >> size.0 << size.0), oa, size, perm, dirty };
                    return Some((leaf, (table, level)));
                }
                _ => return None,
            }
        }
    }

    /// Calls `visit` for every leaf that meets `span`, in order, as [`leaf_at`](Self::leaf_at) would find it, but that the dirty bit is that
    /// of any slot. The caller holds the span.
    pub fn leaves(&self, span: Span<Iova>, mut visit: impl FnMut(Leaf)) {
        let (top, level) = self.root();
        if let (Some(top), Some(part)) = (self.arena.table_at(top), span.intersect(Self::whole(level))) {
            self.visit_leaves(top, level, part, &mut visit);
        }
    }

    fn visit_leaves(&self, table: TableId, level: u8, part: Span<Iova>, visit: &mut dyn FnMut(Leaf)) {
        let mut skip_to = 0;
        for piece in part.blocks(F::item_lg2(level)) {
            let slot = F::slot(piece.start(), level);
            if slot < skip_to {
                continue;
            }
            let entries = self.arena.entries(table);
            match look::<F>(entries[slot].load(Ordering::Acquire), level) {
                Entry::Absent => {}
                Entry::Table(below) => {
                    if let Some(below) = self.arena.table_at(below).filter(|_| level > 0) {
                        self.visit_leaves(below, level - 1, piece, visit);
                    }
                }
                Entry::Leaf { size, oa, perm, .. } => {
                    let (first, slots) = group::<F>(slot, level, size);
                    let dirty = entries[first..first + slots].iter().any(|entry| entry.load(Ordering::Relaxed) & F::DIRTY != 0);
                    visit(Leaf { iova: piece.start().align_down(size.0), oa, size, perm, dirty });
                    skip_to = first + slots;
                }
            }
        }
    }

    #[inline(always)]
    pub(crate) fn reach(level: u8) -> u64 {
        F::reach(level).get()
    }

    pub(crate) fn whole(level: u8) -> Span<Iova> {
        Span::of(Iova::new(0), Iova::new(Self::reach(level)))
    }

    /// Everything that the format can translate.
    pub fn aperture() -> Span<Iova> {
        F::aperture()
    }

    /// How many levels lack on top of a tree that is to reach `last` and to have a table at level `least`.
    pub(crate) fn levels_missing(&self, last: Iova, least: u8) -> u32 {
        let (_, level) = self.root();
        (level..F::MAX_LEVEL).take_while(|level| Self::reach(*level) < last.get() || *level < least).count() as u32
    }

    /// Puts tables on top until the tree reaches `last` and has a table at level `least`. Racing growers: the loser keeps its table.
    pub(crate) fn grow(&self, last: Iova, least: u8, stock: &mut Stock<W>) -> Result<(), NoTable> {
        loop {
            let word = self.top.load(Ordering::Acquire);
            let (top, level) = (Oa::new(word & !LEVEL_BITS), (word & LEVEL_BITS) as u8);
            if (Self::reach(level) >= last.get() && level >= least) || level >= F::MAX_LEVEL {
                return Ok(());
            }
            let above = stock.take()?;
            let entries = self.arena.entries(above);
            wipe(&entries[1..]);
            entries[0].store(F::table(level + 1, top), Ordering::Relaxed);
            let taller = self.arena.oa_of(above).get() | u64::from(level + 1);
            pause();
            // Release: whoever sees the new top sees its content (I-2).
            if self.top.compare_exchange(word, taller, Ordering::AcqRel, Ordering::Acquire).is_err() {
                stock.put(above);
            }
        }
    }

    /// Leaves cut since the table was made.
    pub fn cuts(&self) -> u64 {
        self.count(|counts| &counts.cuts)
    }

    /// Leaves merged since the table was made.
    pub fn merges(&self) -> u64 {
        self.count(|counts| &counts.merges)
    }

    /// How often a leaf, or a run of leaves that become one, was hidden from devices and invalidated before it was changed. Stays 0 where
    /// [`Format::HITLESS`] allows changes in place.
    pub fn breaks(&self) -> u64 {
        self.count(|counts| &counts.breaks)
    }

    fn count(&self, of: impl Fn(&Counts) -> &AtomicU64) -> u64 {
        self.counts.all().map(|counts| of(counts).load(Ordering::Relaxed)).sum()
    }

    /// Bytes in this tree's tables. The caller holds the whole table.
    pub fn bytes_in_tables(&self) -> u64 {
        let (top, level) = self.root();
        self.arena.table_at(top).map_or(0, |top| self.count_tables(top, level)) * self.arena.table_bytes()
    }

    fn count_tables(&self, table: TableId, level: u8) -> u64 {
        1 + self.children(table, level).map(|below| self.count_tables(below, level - 1)).sum::<u64>()
    }

    /// The tables that a table at `level` points to.
    pub(crate) fn children(&self, table: TableId, level: u8) -> impl Iterator<Item = TableId> {
        let entries = if level == 0 { &[][..] } else { self.arena.entries(table) };
        entries.iter().filter_map(move |entry| match F::decode(entry.load(Ordering::Acquire), level) {
            Entry::Table(below) => self.arena.table_at(below),
            _ => None,
        })
    }

    fn give_back(&self, table: TableId, level: u8, stock: &mut Stock<W>) {
        for below in self.children(table, level) {
            self.give_back(below, level - 1, stock);
        }
        stock.put(table);
    }
}

impl<F: Format, W: Deref<Target = [AtomicU64]>> Drop for Table<F, W> {
    /// The owner has made sure that no reader is left.
    fn drop(&mut self) {
        let (top, level) = self.root();
        if let Some(top) = self.arena.table_at(top) {
            let mut stock = Stock::new(&self.arena);
            self.give_back(top, level, &mut stock);
        }
    }
}

/// The slots that a leaf of `size` fills around `slot` of a table at `level`: first, and how many.
#[inline(always)]
pub(crate) fn group<F: Format>(slot: usize, level: u8, size: Lg2) -> (usize, usize) {
    let slots = 1usize << (size.0 - F::item_lg2(level));
    (slot & !(slots - 1), slots)
}

/// Writes leaves of `size` side by side into the slots that they fill, the first of which gets `value`, and whose output addresses go up.
#[inline(always)]
pub(crate) fn write_leaves<F: Format>(entries: &[AtomicU64], level: u8, size: Lg2, value: u64) {
    let slots_per_leaf = 1usize << (size.0 - F::item_lg2(level));
    if slots_per_leaf == 1 {
        return fill(entries, value, F::step(size));
    }
    let mut value = value;
    for leaf in entries.chunks(slots_per_leaf) {
        fill(leaf, value, F::slot_step(level));
        value = value.wrapping_add(F::step(size));
    }
}

/// Makes slots empty.
#[inline(always)]
pub(crate) fn wipe(entries: &[AtomicU64]) {
    fill(entries, 0, 0);
}
