//! From an output address to its segment without a lock: one byte pair per GiB names the segment, or a finer table where several
//! segments share that GiB.
//!
//! A segment's storage is never given back while the table lives, so a reader can always follow what it found. Storage whose segment
//! was removed serves the next segment that fits in it.

use crate::segment::{COUNT, GROUP_PAGES, Segment, TOUCHED, words_for};
use addr::{Address, Oa, Span, SpanError};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ops::Deref;
use core::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use spin::{Mutex, Once};
use thiserror::Error;

/// How many segments a table can have.
pub const MAX_SEGMENTS: usize = 2048;
/// How many GiBs may be shared by several segments.
const MAX_SHARED: usize = 2048;
/// GiBs that the directory spans: 64 TiB.
const GIBS: usize = 1 << 16;
/// In a directory item: the rest is the number of a finer table, not of a slot.
const FINER: u16 = 1 << 15;
/// The start of a slot that is not in use: no address lies at or above it.
const IDLE: u64 = u64::MAX;

const _: () = assert!(MAX_SEGMENTS < FINER as usize);
const _: () = assert!(MAX_SHARED <= FINER as usize);

/// Why a segment was not added or removed. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum SegmentError {
    /// Not made of whole 2 MiB blocks.
    #[error("a segment consists of whole 2 MiB blocks: {0}")]
    Misaligned(#[from] SpanError),
    /// The storage is too small for entries and summaries.
    #[error("{span} needs {need} words of storage, got {got}")]
    TooFewWords {
        /// The segment.
        span: Span<Oa>,
        /// What [`Rmp::words_for`](crate::Rmp::words_for) answers.
        need: usize,
        /// What was given.
        got: usize,
    },
    /// Part of it is covered already.
    #[error("{span} overlaps the segment {with}")]
    Overlaps {
        /// What was to be added.
        span: Span<Oa>,
        /// The segment that is there.
        with: Span<Oa>,
    },
    /// Too far from the first segment.
    #[error("{span} lies outside the 64 TiB that this table can cover")]
    OutOfRange {
        /// What was to be added.
        span: Span<Oa>,
    },
    /// All slots are taken.
    #[error("no room for {span}: remove a segment first")]
    Full {
        /// What was to be added.
        span: Span<Oa>,
    },
    /// No memory for the directory.
    #[error("out of memory")]
    OutOfMemory,
    /// There is no such segment.
    #[error("{span} is not a segment")]
    NotFound {
        /// What was to be removed.
        span: Span<Oa>,
    },
    /// A segment goes only when every page is the hypervisor's.
    #[error("{pages} pages of {span} are assigned: make them shared first")]
    StillAssigned {
        /// The segment.
        span: Span<Oa>,
        /// Assigned pages.
        pages: u64,
    },
    /// A leaked page keeps its entry for ever.
    #[error("{span} has leaked pages, the first at {at}")]
    Leaked {
        /// The segment.
        span: Span<Oa>,
        /// A leaked page.
        at: Oa,
    },
}

struct Slot<W> {
    words: Once<W>,
    start: AtomicU64,
    last_offset: AtomicU64,
    smash: AtomicU64,
}

impl<W: Deref<Target = [AtomicU64]>> Slot<W> {
    #[inline(always)]
    fn view(&self) -> Option<Segment<'_>> {
        Some(Segment {
            words: self.words.get()?,
            smash: &self.smash,
            start: self.start.load(Ordering::Relaxed),
            last_offset: self.last_offset.load(Ordering::Relaxed),
        })
    }
}

/// What only those who add and remove segments look at.
#[derive(Default)]
struct Registry {
    /// Sorted by start, with the slot.
    segments: Vec<(Span<Oa>, u16)>,
    /// Slots that have storage and no segment.
    idle: Vec<u16>,
    /// Slots that were ever used.
    used: u16,
    idle_finer: Vec<u16>,
    used_finer: u16,
}

type Finer = Box<[AtomicU16]>;

pub(crate) struct Directory<W> {
    /// First GiB of the directory; fixed by the first segment.
    origin: AtomicU64,
    /// Per GiB: 0, or slot + 1, or `FINER` with the number of a table per 2 MiB of the same.
    gibs: Box<[AtomicU16; GIBS]>,
    finer: Box<[Once<Finer>]>,
    slots: Box<[Slot<W>; MAX_SEGMENTS]>,
    registry: Mutex<Registry>,
}

impl<W: Deref<Target = [AtomicU64]>> Directory<W> {
    pub(crate) fn new() -> Self {
        let slot = || Slot { words: Once::new(), start: IDLE.into(), last_offset: 0.into(), smash: 0.into() };
        Self {
            origin: AtomicU64::new(0),
            gibs: boxed(|| AtomicU16::new(0)),
            finer: (0..MAX_SHARED).map(|_| Once::new()).collect(),
            slots: boxed(slot),
            registry: Mutex::new(Registry::default()),
        }
    }

    /// The segment that covers `oa`.
    #[inline(always)]
    pub(crate) fn find(&self, oa: Oa) -> Option<Segment<'_>> {
        let gib = (oa.get() >> 30).wrapping_sub(self.origin.load(Ordering::Relaxed));
        let mut item = self.gibs.get(usize::try_from(gib).ok()?)?.load(Ordering::Acquire);
        if item & FINER != 0 {
            let table = self.finer.get(usize::from(item & !FINER))?.get()?;
            item = table.get(block_2m(oa))?.load(Ordering::Acquire);
        }
        let segment = self.slots.get(usize::from(item).wrapping_sub(1))?.view()?;
        (oa.get().wrapping_sub(segment.start) <= segment.last_offset).then_some(segment)
    }

    /// The first address after `oa` that could lie in another segment when `oa` lies in none; `None` when there is no more.
    pub(crate) fn skip(&self, oa: Oa) -> Option<Oa> {
        let origin = self.origin.load(Ordering::Relaxed);
        let gib = oa.get() >> 30;
        if gib < origin {
            return Some(Oa::new(origin << 30));
        }
        let item = self.gibs.get(usize::try_from(gib - origin).ok()?)?.load(Ordering::Acquire);
        let lg2 = if item == 0 { 30 } else { 21 };
        Span::block(oa, lg2).last().checked_add(1)
    }

    /// Every segment with its span, in no particular relation to who adds and removes meanwhile.
    pub(crate) fn each(&self, mut visit: impl FnMut(Span<Oa>, Segment<'_>)) {
        let registry = self.registry.lock();
        for &(span, slot) in &registry.segments {
            if let Some(segment) = self.slots.get(usize::from(slot)).and_then(Slot::view) {
                visit(span, segment);
            }
        }
    }

    pub(crate) fn add(&self, span: Span<Oa>, words: W) -> Result<(), SegmentError> {
        span.check_aligned(21)?;
        let need = words_for(span.start().get(), span.last().get());
        if words.len() < need {
            return Err(SegmentError::TooFewWords { span, need, got: words.len() });
        }
        let mut guard = self.registry.lock();
        let registry = &mut *guard;
        let place = registry.segments.partition_point(|&(other, _)| other.start() < span.start());
        let around = registry.segments[place.saturating_sub(1)..].iter().take(2);
        if let Some(&(with, _)) = around.clone().find(|&&(other, _)| other.overlaps(span)) {
            return Err(SegmentError::Overlaps { span, with });
        }
        let out_of_memory = |_| SegmentError::OutOfMemory;
        registry.segments.try_reserve(1).map_err(out_of_memory)?;
        // So that removing it later need not allocate.
        registry.idle.try_reserve(registry.segments.len() + 1).map_err(out_of_memory)?;
        registry.idle_finer.try_reserve(usize::from(registry.used_finer) + 2).map_err(out_of_memory)?;

        let first_gib = span.start().get() >> 30;
        let last_gib = span.last().get() >> 30;
        if registry.used == 0 {
            self.origin.store(first_gib.saturating_sub(GIBS as u64 / 2), Ordering::Relaxed);
        }
        let origin = self.origin.load(Ordering::Relaxed);
        if first_gib < origin || last_gib - origin >= GIBS as u64 {
            return Err(SegmentError::OutOfRange { span });
        }
        // Only the GiBs at the two ends can have other segments in them.
        for gib in [first_gib, last_gib] {
            self.refine(registry, (gib - origin) as usize, span)?;
        }
        let slot = self.slot(registry, need, words).ok_or(SegmentError::Full { span })?;
        let at = &self.slots[usize::from(slot)];
        at.start.store(span.start().get(), Ordering::Relaxed);
        at.last_offset.store(span.last_offset(), Ordering::Relaxed);
        registry.segments.insert(place, (span, slot));
        self.publish(span, origin, slot + 1);
        Ok(())
    }

    pub(crate) fn remove(&self, span: Span<Oa>, leaked: &[Oa]) -> Result<(), SegmentError> {
        let mut guard = self.registry.lock();
        let registry = &mut *guard;
        let place = registry.segments.iter().position(|&(other, _)| other == span).ok_or(SegmentError::NotFound { span })?;
        let slot = registry.segments[place].1;
        let at = &self.slots[usize::from(slot)];
        if let Some(&at) = leaked.iter().find(|&&at| span.contains(at)) {
            return Err(SegmentError::Leaked { span, at });
        }
        let segment = at.view().ok_or(SegmentError::NotFound { span })?;
        let pages = assigned(&segment);
        if pages != 0 {
            return Err(SegmentError::StillAssigned { span, pages });
        }
        let origin = self.origin.load(Ordering::Relaxed);
        self.publish(span, origin, 0);
        for gib in [span.start().get() >> 30, span.last().get() >> 30] {
            self.unrefine(registry, (gib - origin) as usize);
        }
        clear(&segment);
        at.last_offset.store(0, Ordering::Relaxed);
        at.start.store(IDLE, Ordering::Relaxed);
        registry.segments.remove(place);
        registry.idle.push(slot);
        Ok(())
    }

    /// A slot with at least `need` words, the smallest idle one before a new one.
    fn slot(&self, registry: &mut Registry, need: usize, words: W) -> Option<u16> {
        let len = |slot: u16| self.slots[usize::from(slot)].words.get().map_or(0, |words| words.len());
        let fits = registry.idle.iter().enumerate().filter(|&(_, &slot)| len(slot) >= need);
        if let Some((place, _)) = fits.min_by_key(|&(_, &slot)| len(slot)) {
            return Some(registry.idle.swap_remove(place));
        }
        let slot = registry.used;
        self.slots.get(usize::from(slot))?.words.call_once(|| words);
        registry.used += 1;
        Some(slot)
    }

    /// Makes a GiB in which another segment lies ready for more than one.
    fn refine(&self, registry: &mut Registry, gib: usize, span: Span<Oa>) -> Result<(), SegmentError> {
        let item = self.gibs[gib].load(Ordering::Relaxed);
        if item == 0 || item & FINER != 0 {
            return Ok(());
        }
        let table = match registry.idle_finer.pop() {
            Some(table) => table,
            None => {
                let table = registry.used_finer;
                let place = self.finer.get(usize::from(table)).ok_or(SegmentError::Full { span })?;
                let mut items = Vec::new();
                items.try_reserve_exact(GROUP_PAGES).map_err(|_| SegmentError::OutOfMemory)?;
                items.extend((0..GROUP_PAGES).map(|_| AtomicU16::new(0)));
                place.call_once(|| items.into_boxed_slice());
                registry.used_finer += 1;
                table
            }
        };
        let whole = Span::block(Oa::new((gib as u64 + self.origin.load(Ordering::Relaxed)) << 30), 30);
        let there = registry.segments.iter().find(|&&(_, slot)| slot + 1 == item).and_then(|&(other, _)| other.intersect(whole));
        if let Some(there) = there {
            for place in &self.finer_items(table)[block_2m(there.start())..=block_2m(there.last())] {
                place.store(item, Ordering::Relaxed);
            }
        }
        self.gibs[gib].store(FINER | table, Ordering::Release);
        Ok(())
    }

    /// Gives the finer table of a GiB back when nothing lies there any more.
    fn unrefine(&self, registry: &mut Registry, gib: usize) {
        let item = self.gibs[gib].load(Ordering::Relaxed);
        if item & FINER == 0 {
            return;
        }
        if self.finer_items(item & !FINER).iter().all(|item| item.load(Ordering::Relaxed) == 0) {
            self.gibs[gib].store(0, Ordering::Release);
            registry.idle_finer.push(item & !FINER);
        }
    }

    fn finer_items(&self, table: u16) -> &[AtomicU16] {
        self.finer.get(usize::from(table)).and_then(Once::get).map_or(&[], |items| items)
    }

    /// Writes `item` wherever the directory speaks of `span`.
    fn publish(&self, span: Span<Oa>, origin: u64, item: u16) {
        for piece in span.blocks(30) {
            let gib = &self.gibs[((piece.start().get() >> 30) - origin) as usize];
            let old = gib.load(Ordering::Relaxed);
            if old & FINER == 0 {
                gib.store(item, Ordering::Release);
                continue;
            }
            for place in &self.finer_items(old & !FINER)[block_2m(piece.start())..=block_2m(piece.last())] {
                place.store(item, Ordering::Release);
            }
        }
    }
}

/// An array made on the heap; its length being part of its type saves the readers a load.
fn boxed<T, const N: usize>(item: impl FnMut() -> T) -> Box<[T; N]> {
    match core::iter::repeat_with(item).take(N).collect::<Box<[T]>>().try_into() {
        Ok(array) => array,
        Err(_) => unreachable!("exactly N items were taken"),
    }
}

/// Index of a 2 MiB block in its GiB.
#[inline]
fn block_2m(oa: Oa) -> usize {
    (oa.get() >> 21) as usize % GROUP_PAGES
}

/// Assigned pages, by the entries of all groups that were ever written.
pub(crate) fn assigned(segment: &Segment<'_>) -> u64 {
    touched(segment).flatten().filter(|&page| segment.q1(page).assigned()).count() as u64
}

/// The page indices of each group that was ever written.
fn touched<'a>(segment: &'a Segment<'_>) -> impl Iterator<Item = core::ops::Range<usize>> + 'a {
    let groups = (0..segment.pages()).step_by(GROUP_PAGES).map(|base| base..base + GROUP_PAGES);
    groups.filter(|pages| segment.summary_2m(pages.start).load(Ordering::Acquire) & (TOUCHED | COUNT) != 0)
}

/// Back to all zero, for the next user of the storage.
fn clear(segment: &Segment<'_>) {
    for pages in touched(segment) {
        for word in &segment.words[2 * pages.start..2 * pages.end] {
            word.store(0, Ordering::Relaxed);
        }
        segment.summary_1g(pages.start).store(0, Ordering::Relaxed);
    }
    for base in (0..segment.pages()).step_by(GROUP_PAGES) {
        if segment.summary_2m(base).load(Ordering::Relaxed) != 0 {
            segment.summary_2m(base).store(0, Ordering::Relaxed);
        }
    }
}
