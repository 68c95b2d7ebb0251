//! What an edit took out and may not be reused yet: spans whose cached translations must go, and tables that a reader may still be in.

use crate::arena::{Arena, List, TableId};
use crate::atomic::{AtomicU64, Ordering};
use addr::{Iova, Span};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ops::Deref;

/// Spans kept without memory of their own; beyond it, and beyond what was reserved, neighbours are widened into one.
const INLINE: usize = 2;

/// Owns what an edit retired, and gives it up only in [`Gather::finish`]: after invalidation and grace (design D-5).
#[must_use = "retired tables and stale translations stay until finish() is called"]
#[derive(Debug)]
pub struct Gather {
    inline: [Span<Iova>; INLINE],
    inline_len: u32,
    retired: List,
    /// What only batches and merges need, so that the common gather stays small.
    extra: Option<Box<Extra>>,
}

#[derive(Debug, Default)]
struct Extra {
    spans: Vec<Span<Iova>>,
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
        Self { inline: [UNUSED; INLINE], inline_len: 0, retired: List::new(), extra: None }
    }

    /// Room for `spans` separate spans, so that a batch is invalidated exactly. Without room spans are widened, which is always safe.
    pub fn reserve(&mut self, spans: usize) {
        if let Some(more) = spans.checked_sub(INLINE).filter(|more| *more > 0) {
            // A failure only costs precision.
            let _ = self.extra.get_or_insert_default().spans.try_reserve(more);
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
        if let Some(near) = self.recent().find(|near| near.overlaps(span) || near.touches(span) || span.touches(**near)) {
            *near = hull(*near, span);
        } else if (self.inline_len as usize) < INLINE {
            self.inline[self.inline_len as usize] = span;
            self.inline_len += 1;
        } else if let Some(extra) = self.extra.as_mut().filter(|extra| extra.spans.len() < extra.spans.capacity()) {
            extra.spans.push(span);
        } else if let Some(nearest) = self.recent().min_by_key(|near| hull(**near, span).last_offset()) {
            *nearest = hull(*nearest, span);
        }
    }

    /// The spans to invalidate.
    pub fn spans(&self) -> impl Iterator<Item = Span<Iova>> {
        self.inline[..self.inline_len as usize].iter().chain(self.extra.iter().flat_map(|extra| &extra.spans)).copied()
    }

    /// Only the most recent spans of a batch can be neighbours of the next one.
    fn recent(&mut self) -> impl Iterator<Item = &mut Span<Iova>> {
        let extra = self.extra.iter_mut().flat_map(|extra| {
            let recent = extra.spans.len().saturating_sub(4);
            &mut extra.spans[recent..]
        });
        self.inline[..self.inline_len as usize].iter_mut().chain(extra)
    }

    pub(crate) fn retire<W: Deref<Target = [AtomicU64]>>(&mut self, arena: &Arena<W>, table: TableId) {
        self.retired.push(arena, table);
    }

    /// Room to remember one merge; without it the merge must not happen, or a dirty bit could be lost (I-14).
    pub(crate) fn reserve_merge(&mut self) -> bool {
        self.extra.get_or_insert_default().merged.try_reserve(1).is_ok()
    }

    pub(crate) fn retire_merged<W: Deref<Target = [AtomicU64]>>(&mut self, arena: &Arena<W>, merged: Merged) {
        self.extra.get_or_insert_default().merged.push(merged);
        self.retire(arena, merged.table);
    }

    /// Ends the edit. `invalidate_and_wait` logs the spans and waits until every reader that could hold an old translation has left; then
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

fn hull(a: Span<Iova>, b: Span<Iova>) -> Span<Iova> {
    Span::of(a.start().min(b.start()), a.last().max(b.last()))
}
