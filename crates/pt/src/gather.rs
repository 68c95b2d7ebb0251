//! What an edit took out and may not be reused yet: spans whose cached translations must go, tables that a reader may still be in, and the
//! regions that those tables served.

use crate::arena::{Arena, List, TableId};
use crate::atomic::{AtomicU64, Ordering};
use addr::{Iova, Span};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ops::Deref;

/// Spans kept without memory of their own; beyond it, and beyond what was reserved, neighbours are widened into one.
const INLINE: usize = 2;

/// Owns what an edit retired, and gives it up only in [`Gather::finish`]: after invalidation and grace (design D-5).
///
/// Hardware caches two things, so there are two lists of what to invalidate. [`Gather::spans`] has the *leaves* that went or changed: what an IOTLB
/// holds of them must go, and what caches in devices (ATS) hold. [`Gather::tables`] has the regions of *tables* that went: walkers keep the way
/// to a table, too, under the region that it serves, and begin the next walk there. One that kept it would read the table after it has become
/// something else. A merge retires a table and changes no translation: it has regions and no spans. Devices keep leaves only, so the
/// regions are nothing to them.
///
/// | hardware | what it keeps of tables | so regions take | and spans that no region meets, at most |
/// |---|---|---|---|
/// | VT-d | paging-structure caches | page-selective IOTLB invalidation, IH = 0 | IH = 1 |
/// | AMD | page directory cache | INVALIDATE_IOMMU_PAGES, PDE = 1 | PDE = 0 |
/// | Arm SMMUv3 | walk cache | TLBI of all levels, Leaf = 0 | Leaf = 1 |
/// | RISC-V | non-leaf entries | IOTINVAL, NL = 1; without an address where capabilities.NL is 0 | NL = 0 |
#[must_use = "retired tables and stale translations stay until finish() is called"]
#[derive(Debug)]
pub struct Gather {
    /// Spans from the front, and in the last place the first region, if there is one: nothing larger is moved about for the few edits that have both.
    inline: [Span<Iova>; INLINE],
    inline_len: u16,
    has_region: bool,
    retired: List,
    /// What only batches and merges need, so that the common gather stays small.
    extra: Option<Box<Extra>>,
}

#[derive(Debug, Default)]
struct Extra {
    spans: Vec<Span<Iova>>,
    regions: Vec<Span<Iova>>,
    merged: Vec<Merged>,
}

/// A table that a merge replaced by one leaf. A reader may set a dirty bit in it until the grace period ends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Merged {
    pub(crate) table: TableId,
    pub(crate) parent: TableId,
    pub(crate) slot: u32,
    pub(crate) dirty_bit: u64,
}

impl Gather {
    /// Nothing gathered, nothing allocated.
    pub const fn new() -> Self {
        const UNUSED: Span<Iova> = Span::zero();
        Self { inline: [UNUSED; INLINE], inline_len: 0, has_region: false, retired: List::new(), extra: None }
    }

    /// Room for `spans` separate spans and as many regions, so that a batch is invalidated exactly. Without room they are widened, which is
    /// always safe.
    pub fn reserve(&mut self, spans: usize) {
        if spans > INLINE {
            // One of either may have a place of its own.
            let more = spans - 1;
            let extra = self.extra.get_or_insert_default();
            // A failure only costs precision.
            let _ = extra.spans.try_reserve(more).and_then(|()| extra.regions.try_reserve(more));
        }
    }

    /// Whether there is nothing to invalidate and nothing to free.
    pub fn is_empty(&self) -> bool {
        self.inline_len == 0 && self.retired.is_empty()
    }

    /// Adds a span to invalidate.
    #[inline]
    pub fn add(&mut self, span: Span<Iova>) {
        if self.inline_len == 0 {
            (self.inline[0], self.inline_len) = (span, 1);
        } else {
            self.add_to_others(span);
        }
    }

    #[cold]
    fn add_to_others(&mut self, span: Span<Iova>) {
        let (len, has_room) = (self.inline_len as usize, (self.inline_len as usize) < INLINE - usize::from(self.has_region));
        let more = self.extra.as_mut().map(|extra| &mut extra.spans);
        if let Some(apart) = put(&mut self.inline[..len], more, span, has_room) {
            self.inline[len] = apart;
            self.inline_len += 1;
        }
    }

    /// The spans to invalidate.
    pub fn spans(&self) -> impl Iterator<Item = Span<Iova>> {
        self.inline[..self.inline_len as usize].iter().chain(self.extra.iter().flat_map(|extra| &extra.spans)).copied()
    }

    /// The regions whose tables went: what a walker keeps of the way to a table that serves any part of one must go. Before the tables are
    /// used for something else, as for [`Gather::spans`] before the pages are.
    pub fn tables(&self) -> impl Iterator<Item = Span<Iova>> {
        let first = self.has_region.then_some(&self.inline[INLINE - 1]);
        first.into_iter().chain(self.extra.iter().flat_map(|extra| &extra.regions)).copied()
    }

    /// Whether [`Gather::tables`] has any.
    #[inline]
    pub fn retires_tables(&self) -> bool {
        self.has_region
    }

    /// Adds a region that a retired table served, or a tree of them.
    #[cold]
    pub(crate) fn add_region(&mut self, region: Span<Iova>) {
        if self.has_region {
            let more = self.extra.as_mut().map(|extra| &mut extra.regions);
            put(&mut self.inline[INLINE - 1..], more, region, false);
            return;
        }
        if self.inline_len as usize == INLINE {
            let more = self.extra.as_mut().map(|extra| &mut extra.spans);
            let second = self.inline[INLINE - 1];
            put(&mut self.inline[..INLINE - 1], more, second, false);
            self.inline_len -= 1;
        }
        (self.inline[INLINE - 1], self.has_region) = (region, true);
    }

    pub(crate) fn retire<W: Deref<Target = [AtomicU64]>>(&mut self, arena: &Arena<W>, table: TableId) {
        self.retired.push(arena, table);
    }

    /// Room to remember one merge; without it the merge must not happen, or a dirty bit could be lost (I-14).
    pub(crate) fn reserve_merge(&mut self) -> bool {
        let extra = self.extra.get_or_insert_default();
        // Regions may be widened, so that failure only costs precision.
        let _ = extra.regions.try_reserve(1);
        extra.merged.try_reserve(1).is_ok()
    }

    pub(crate) fn retire_merged<W: Deref<Target = [AtomicU64]>>(&mut self, arena: &Arena<W>, merged: Merged, region: Span<Iova>) {
        if !sync::fail::planted("pt.merge_forgets_walkers") {
            self.add_region(region);
        }
        self.extra.get_or_insert_default().merged.push(merged);
        self.retire(arena, merged.table);
    }

    /// Ends the edit. `invalidate_and_wait` logs the spans and the regions and waits until every reader that could hold an old translation has left; then
    /// the tables go back to the arena. It is called even when there are no spans, as long as a table waits for its readers.
    #[inline]
    pub fn finish<W: Deref<Target = [AtomicU64]>>(mut self, arena: &Arena<W>, invalidate_and_wait: impl FnOnce(&Self)) {
        if self.is_empty() {
            return;
        }
        invalidate_and_wait(&self);
        if !self.retired.is_empty() {
            self.free(arena);
        }
        self.inline_len = 0;
    }

    #[cold]
    fn free<W: Deref<Target = [AtomicU64]>>(&mut self, arena: &Arena<W>) {
        for merged in self.extra.take().map(|extra| extra.merged).unwrap_or_default() {
            let late = arena.entries(merged.table).iter().any(|entry| entry.load(Ordering::Relaxed) & merged.dirty_bit != 0);
            let leaf = &arena.entries(merged.parent)[merged.slot as usize];
            if late {
                leaf.fetch_or(merged.dirty_bit, Ordering::Relaxed);
            }
        }
        arena.splice(&mut self.retired);
    }
}

impl Default for Gather {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Gather {
    fn drop(&mut self) {
        debug_assert!(self.is_empty(), "a Gather was dropped with {self:?}: its tables would leak and stale translations live on");
    }
}

/// Puts a span where it belongs among those that are known: into a neighbour, behind the others, or into the nearest when there is no more room. It is the
/// answer when the caller has to place it, who has room for it apart.
fn put(inline: &mut [Span<Iova>], mut more: Option<&mut Vec<Span<Iova>>>, span: Span<Iova>, has_room: bool) -> Option<Span<Iova>> {
    if let Some(near) = recent(inline, &mut more).find(|near| near.overlaps(span) || near.touches(span) || span.touches(**near)) {
        *near = hull(*near, span);
    } else if has_room {
        return Some(span);
    } else if let Some(more) = more.as_mut().filter(|more| more.len() < more.capacity()) {
        more.push(span);
    } else if let Some(nearest) = recent(inline, &mut more).min_by_key(|near| hull(**near, span).last_offset()) {
        *nearest = hull(*nearest, span);
    }
    None
}

/// Only the most recent spans of a batch can be neighbours of the next one.
fn recent<'a>(inline: &'a mut [Span<Iova>], more: &'a mut Option<&mut Vec<Span<Iova>>>) -> impl Iterator<Item = &'a mut Span<Iova>> {
    let more = more.iter_mut().flat_map(|more| {
        let recent = more.len().saturating_sub(4);
        &mut more[recent..]
    });
    inline.iter_mut().chain(more)
}

fn hull(a: Span<Iova>, b: Span<Iova>) -> Span<Iova> {
    Span::of(a.start().min(b.start()), a.last().max(b.last()))
}
