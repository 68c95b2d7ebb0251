//! What an edit took out and may not be reused yet: spans whose cached translations must go, and tables that a reader may still be in.

use crate::arena::{Arena, List, TableId};
use crate::atomic::{AtomicU64, Ordering};
use addr::{Iova, Span};
use alloc::vec::Vec;
use core::ops::Deref;

/// Spans kept without memory of their own; beyond it, and beyond what was reserved, neighbours are widened into one.
const INLINE: usize = 4;

/// Owns what an edit retired, and gives it up only in [`Gather::finish`]: after invalidation and grace (design D-5).
#[must_use = "retired tables and stale translations stay until finish() is called"]
#[derive(Debug)]
pub struct Gather {
    inline: [Option<Span<Iova>>; INLINE],
    more: Vec<Span<Iova>>,
    retired: List,
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
        Self { inline: [None; INLINE], more: Vec::new(), retired: List::new(), merged: Vec::new() }
    }

    /// Room for `spans` separate spans, so that a batch is invalidated exactly. Without room spans are widened, which is always safe.
    pub fn reserve(&mut self, spans: usize) {
        // A failure only costs precision.
        let _ = self.more.try_reserve(spans.saturating_sub(INLINE));
    }

    /// Whether there is nothing to invalidate and nothing to free.
    pub fn is_empty(&self) -> bool {
        self.inline[0].is_none() && self.retired.is_empty()
    }

    /// Adds a span to invalidate.
    pub fn add(&mut self, span: Span<Iova>) {
        if let Some(near) = self.spans_mut().find(|near| near.overlaps(span) || near.touches(span) || span.touches(**near)) {
            *near = hull(*near, span);
        } else if let Some(empty) = self.inline.iter_mut().find(|slot| slot.is_none()) {
            *empty = Some(span);
        } else if self.more.len() < self.more.capacity() {
            self.more.push(span);
        } else if let Some(nearest) = self.spans_mut().min_by_key(|near| hull(**near, span).last_offset()) {
            *nearest = hull(*nearest, span);
        }
    }

    /// The spans to invalidate.
    pub fn spans(&self) -> impl Iterator<Item = Span<Iova>> {
        self.inline.iter().flatten().chain(&self.more).copied()
    }

    fn spans_mut(&mut self) -> impl Iterator<Item = &mut Span<Iova>> {
        // Only the most recent spans of a batch can be neighbours of the next one.
        let recent = self.more.len().saturating_sub(INLINE);
        self.inline.iter_mut().flatten().chain(&mut self.more[recent..])
    }

    pub(crate) fn retire<W: Deref<Target = [AtomicU64]>>(&mut self, arena: &Arena<W>, table: TableId) {
        self.retired.push(arena, table);
    }

    /// Room to remember one merge; without it the merge must not happen, or a dirty bit could be lost (I-14).
    pub(crate) fn reserve_merge(&mut self) -> bool {
        self.merged.try_reserve(1).is_ok()
    }

    pub(crate) fn retire_merged<W: Deref<Target = [AtomicU64]>>(&mut self, arena: &Arena<W>, merged: Merged) {
        self.merged.push(merged);
        self.retire(arena, merged.table);
    }

    /// Ends the edit. `invalidate_and_wait` logs the spans and waits until every reader that could hold an old translation has left; then
    /// the tables go back to the arena. It is called even when there are no spans, as long as a table waits for its readers.
    pub fn finish<W: Deref<Target = [AtomicU64]>>(mut self, arena: &Arena<W>, invalidate_and_wait: impl FnOnce(&Self)) {
        if self.is_empty() {
            return;
        }
        invalidate_and_wait(&self);
        for merged in core::mem::take(&mut self.merged) {
            let late = arena.entries(merged.table).iter().any(|entry| entry.load(Ordering::Relaxed) & merged.dirty_bit != 0);
            let leaf = &arena.entries(merged.parent)[merged.slot as usize];
            if late {
                leaf.fetch_or(merged.dirty_bit, Ordering::Relaxed);
            }
        }
        arena.splice(&mut self.retired);
        self.inline = [None; INLINE];
        self.more.clear();
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
