//! What the three tables of one VM have in common: which memory stands behind each guest physical address, whose it is, and who is told.

use crate::plan::{Held, Piece};
use crate::slots::{Frames, Slot, Slots};
use crate::smash::smash_held;
use crate::{Evidence, Stage2, Step, switch};
use addr::{Address, Gpa, Lg2, Oa, OverlapError, PAGE_LG2, Page, Span, SpanError, SpanMap};
use backing::{Backing, PageState};
use ioas::Pages;
use iommu::SystemRmp;
use secure::{Attributes, Code, Perms, Pvalidate, PvalidateError, RmpSize, RmpadjustError, Validated, Vmpl};
use std::fmt;
use std::sync::{Arc, PoisonError};
use sync::prim::{
    Mutex, MutexGuard, RwLock,
    atomic::{AtomicBool, AtomicU64, Ordering},
};
use thiserror::Error;

/// The second word of an entry after RMPUPDATE: VMPL 0 may do everything, the others nothing.
const FRESH_PERMS: u64 = 0x1f;
/// Pages of one 2 MiB entry.
const GROUP_LG2: u8 = 9;

/// One VM's guest physical space.
pub struct Space {
    pub(crate) rmp: Arc<SystemRmp>,
    pub(crate) stage2: Arc<dyn Stage2>,
    pub(crate) asid: u32,
    slots: RwLock<Slots>,
    /// What the guest has validated, as far as it told us: an audit compares it with the RMP's bits.
    validated: Mutex<SpanMap<Gpa, ()>>,
    /// Permissions that the guest gave to other levels than VMPL 0: the second word of the entry, where that is not as RMPUPDATE left it.
    adjusted: Mutex<SpanMap<Gpa, u64>>,
    keeps_leaves: AtomicBool,
    pub(crate) counters: CountersNow,
    watch: RwLock<Option<Arc<Watch>>>,
}

/// Called with the pages of a conversion after each of its steps.
pub(crate) type Watch = dyn Fn(&Transition<'_>) + Send + Sync;

/// Pages that a conversion holds, at one moment of it.
#[derive(Debug)]
pub struct Transition<'a> {
    step: Step,
    pieces: &'a [Piece],
    held: &'a [Held<'a>],
}

impl<'a> Transition<'a> {
    pub(crate) fn new(step: Step, pieces: &'a [Piece], held: &'a [Held<'a>]) -> Self {
        Self { step, pieces, held }
    }

    /// Which step is over; never `Smash`, which is a part of `Detach`.
    pub fn step(&self) -> Step {
        self.step
    }

    /// Whether the pages are in no device's table at this moment (I-7).
    pub fn is_detached(&self) -> bool {
        matches!(self.step, Step::Detach | Step::Settle | Step::Switch | Step::Commit | Step::Discard)
    }

    /// Whether every table is as it is to stay; all that is left is to let vCPUs in and to answer.
    pub fn is_done(&self) -> bool {
        self.step == Step::Attach
    }

    /// The guest's addresses, and the pages behind them.
    pub fn pages(&self) -> impl Iterator<Item = (Span<Gpa>, &'a Arc<Pages>, Span<Page>)> {
        let held = self.held;
        self.pieces.iter().map(move |piece| (piece.gpa, held[piece.held].pages, piece.pages))
    }
}

/// Why a memslot was refused.
#[derive(Debug, Error)]
pub enum SpaceError {
    /// The span is no span of pages.
    #[error("bad memslot: {0}")]
    Span(#[from] SpanError),
    /// Another memslot is there.
    #[error("memslot {span} meets the one at {met}; remove that first")]
    Overlap {
        /// The new one.
        span: Span<Gpa>,
        /// The one that is there.
        met: Span<Gpa>,
    },
    /// The backing ends before the memslot does.
    #[error("memslot {span} needs pages {pages:?} of a backing that has {has:?}")]
    OutOfFile {
        /// The new one.
        span: Span<Gpa>,
        /// What it would stand for.
        pages: Span<Page>,
        /// What there is.
        has: Span<Page>,
    },
    /// Some of the pages are in another memslot, or were left private at another address by one that was removed.
    #[error(
        "memslot {span} would show pages {pages:?} a second time, or pages that a guest holds at another address; a page has one private address (I-8)"
    )]
    Alias {
        /// The new one.
        span: Span<Gpa>,
        /// What it would stand for.
        pages: Span<Page>,
    },
    /// No memslot begins there.
    #[error("no memslot begins at {0}")]
    NoSlot(Gpa),
    /// No memory for the record.
    #[error("no memory for memslot {0}")]
    OutOfMemory(Span<Gpa>),
}

#[derive(Debug, Default)]
pub(crate) struct CountersNow {
    pub(crate) batches: AtomicU64,
    pub(crate) to_private: AtomicU64,
    pub(crate) to_shared: AtomicU64,
    pub(crate) smashed: AtomicU64,
    pub(crate) leaked: AtomicU64,
    pub(crate) failed: AtomicU64,
}

/// What a space has done so far, in pages unless said otherwise.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Calls that converted something.
    pub batches: u64,
    /// Pages that became the guest's.
    pub to_private: u64,
    /// Pages that became the host's.
    pub to_shared: u64,
    /// 2 MiB entries split.
    pub smashed: u64,
    /// Pages lost because the secure world kept them.
    pub leaked: u64,
    /// Conversions that ended with an error.
    pub failed: u64,
}

impl Space {
    /// An empty space of the guest with `asid`.
    pub fn new(rmp: &Arc<SystemRmp>, stage2: Arc<dyn Stage2>, asid: u32) -> Arc<Self> {
        Arc::new(Self {
            rmp: Arc::clone(rmp),
            stage2,
            asid,
            slots: RwLock::default(),
            validated: Mutex::default(),
            adjusted: Mutex::default(),
            keeps_leaves: AtomicBool::new(false),
            counters: CountersNow::default(),
            watch: RwLock::default(),
        })
    }

    /// Puts `len_bytes` of `backing`, from `offset` on, at `gpa`.
    ///
    /// # Errors
    /// Empty, wrapping, misaligned or overlapping spans, and such as the backing does not have.
    pub fn add_slot(&self, gpa: Gpa, len_bytes: u64, backing: &Arc<Backing>, offset: u64) -> Result<(), SpaceError> {
        let span = Span::aligned(gpa, len_bytes, PAGE_LG2)?;
        let bytes = Span::aligned(Page::new(offset), len_bytes, PAGE_LG2)?;
        let pages: Span<Page> = bytes.index(PAGE_LG2);
        if !backing.pages().covers(pages) {
            return Err(SpaceError::OutOfFile { span, pages, has: backing.pages() });
        }
        sync::fail::step("convert.slot").map_err(|_| SpaceError::OutOfMemory(span))?;
        let slot = Slot { pages: Pages::of(backing), frames: Frames::new(gpa, pages.start()) };
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let Slots { by_gpa, by_page } = &mut *slots;
        let by_page = by_page.entry(backing.id()).or_default();
        if by_page.overlaps(pages) || self.holds_elsewhere(backing, pages, slot.frames) {
            return Err(SpaceError::Alias { span, pages });
        }
        by_page.reserve(1).map_err(|_| SpaceError::OutOfMemory(span))?;
        let frames = slot.frames;
        by_gpa.insert(span, slot).map_err(|error| match error {
            OverlapError::Overlaps { met, .. } => SpaceError::Overlap { span, met },
            OverlapError::OutOfMemory(_) => SpaceError::OutOfMemory(span),
        })?;
        let added = by_page.insert(pages, frames);
        debug_assert!(added.is_ok(), "{added:?}: looked at and reserved");
        Ok(())
    }

    /// Makes sure that `pages` of `backing` are the guest's memory at `span`, which is equally long. What is so already stays; the rest becomes part of
    /// one slot with its neighbours. For those who learn where pages are only when they are converted; [`Space::dismiss`] ends it.
    ///
    /// # Errors
    /// As [`Space::add_slot`]; nothing has changed then.
    pub fn enroll(&self, span: Span<Gpa>, backing: &Arc<Backing>, pages: Span<Page>) -> Result<(), SpaceError> {
        span.check_aligned(PAGE_LG2)?;
        if !backing.pages().covers(pages) || pages.last_offset() != span.last_offset() >> PAGE_LG2 {
            return Err(SpaceError::OutOfFile { span, pages, has: backing.pages() });
        }
        sync::fail::step("convert.slot").map_err(|_| SpaceError::OutOfMemory(span))?;
        let slot = Slot { pages: Pages::of(backing), frames: Frames::new(span.start(), pages.start()) };
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        if let Some((met, _)) = slots.by_gpa.overlapping(span).find(|(_, other)| **other != slot) {
            return Err(SpaceError::Overlap { span, met });
        }
        let Slots { by_gpa, by_page } = &mut *slots;
        let by_page = by_page.entry(backing.id()).or_default();
        if by_page.overlapping(pages).any(|(_, frames)| *frames != slot.frames) {
            return Err(SpaceError::Alias { span, pages });
        }
        let fresh = by_page.runs(pages).filter(|(_, known)| known.is_none());
        if fresh.into_iter().any(|(run, _)| self.holds_elsewhere(backing, run, slot.frames)) {
            return Err(SpaceError::Alias { span, pages });
        }
        by_page.reserve(2).map_err(|_| SpaceError::OutOfMemory(span))?;
        let frames = slot.frames;
        by_gpa.set(span, slot).map_err(|_| SpaceError::OutOfMemory(span))?;
        let added = by_page.set(pages, frames);
        debug_assert!(added.is_ok(), "{added:?}: reserved");
        Ok(())
    }

    /// The guest has no memory at `span` any more. Pages there keep their owner.
    ///
    /// # Errors
    /// `OutOfMemory`; nothing has changed then.
    pub fn dismiss(&self, span: Span<Gpa>) -> Result<(), SpaceError> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let mut known: Vec<(Span<Page>, Slot)> = Vec::new();
        for (found, slot) in slots.by_gpa.overlapping(span) {
            known.try_reserve(1).map_err(|_| SpaceError::OutOfMemory(span))?;
            known.extend(found.intersect(span).map(|part| (slot.frames.pages(part), slot.clone())));
        }
        slots.by_gpa.reserve(2).map_err(|_| SpaceError::OutOfMemory(span))?;
        for (_, slot) in &known {
            let by_page = slots.by_page.entry(slot.pages.backing().id()).or_default();
            by_page.reserve(2 * known.len()).map_err(|_| SpaceError::OutOfMemory(span))?;
        }
        let mut cleared = slots.by_gpa.clear(span);
        for (pages, slot) in &known {
            cleared = cleared.and(slots.forget(slot.pages.backing().id(), *pages));
        }
        debug_assert!(cleared.is_ok(), "{cleared:?}: reserved");
        drop(slots);
        Ok(())
    }

    /// Whether a guest holds some of `pages` private, and not where `frames` says.
    fn holds_elsewhere(&self, backing: &Backing, pages: Span<Page>, frames: Frames) -> bool {
        let elsewhere = |page: Page| {
            let entry = self.rmp.entry(backing.oa(page));
            entry.assigned() && entry.gpa() != frames.gpa(page)
        };
        let mut private = backing.states(pages).filter(|(_, state)| *state == PageState::Private);
        private.any(|(run, _)| run.blocks(0).any(|page| elsewhere(page.start())))
    }

    /// Takes the memslot out that begins at `gpa`. Its pages keep their owner.
    ///
    /// # Errors
    /// `NoSlot`.
    pub fn remove_slot(&self, gpa: Gpa) -> Result<Span<Gpa>, SpaceError> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let (span, slot) = slots.by_gpa.remove(gpa).ok_or(SpaceError::NoSlot(gpa))?;
        // Whole entries go, which takes no memory.
        let gone = slots.forget(slot.pages.backing().id(), slot.frames.pages(span));
        debug_assert!(gone.is_ok(), "{gone:?}");
        drop(slots);
        Ok(span)
    }

    /// The memslots: where, whose pages, and the first of them.
    pub fn slots(&self) -> Vec<(Span<Gpa>, Arc<Backing>, Page)> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let shown = |(span, slot): (Span<Gpa>, &Slot)| (span, Arc::clone(slot.pages.backing()), slot.frames.pages(span).start());
        slots.by_gpa.iter().map(shown).collect()
    }

    /// Shows the memslots that `span` meets, each with the part that it has.
    pub(crate) fn parts(&self, span: Span<Gpa>, mut show: impl FnMut(Span<Gpa>, &Arc<Pages>, Span<Page>)) -> Option<Gpa> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        for (run, slot) in slots.by_gpa.runs(span) {
            let Some(slot) = slot else { return Some(run.start()) };
            show(run, &slot.pages, slot.frames.pages(run));
        }
        None
    }

    /// Where a guest physical address is, and in which page of it.
    pub fn page_at(&self, gpa: Gpa) -> Option<(Arc<Backing>, Page)> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let (_, slot) = slots.by_gpa.get(gpa)?;
        Some((Arc::clone(slot.pages.backing()), slot.frames.pages(Span::one(gpa)).start()))
    }

    /// The guest physical address of a page, when a memslot shows it.
    pub fn gpa_of(&self, backing: &Backing, page: Page) -> Option<Gpa> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.by_page.get(&backing.id())?.get(page).map(|(_, frames)| frames.gpa(page))
    }

    /// Which of `pages` memslots show, ascending, and where each run of them is.
    pub fn gpas_of(&self, backing: &Backing, pages: Span<Page>) -> Vec<(Span<Page>, Span<Gpa>)> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let Some(by_page) = slots.by_page.get(&backing.id()) else { return Vec::new() };
        let part = |(found, frames): (Span<Page>, &Frames)| found.intersect(pages).map(|run| (run, frames.gpas(run)));
        by_page.overlapping(pages).filter_map(part).collect()
    }

    /// The first page of `pages` that was leaked. Stable while the caller holds the pages.
    pub fn first_leaked(&self, backing: &Backing, pages: Span<Page>) -> Option<Oa> {
        if self.rmp.leaked_pages() == 0 {
            return None;
        }
        self.rmp.leaked().into_iter().find(|oa| backing.page_of(*oa).is_some_and(|page| pages.contains(page)))
    }

    /// The guest executes PVALIDATE on one page of 4 KiB or 2 MiB. Where it names 4 KiB of a 2 MiB entry, the nested page fault is
    /// handled as a host does: the entry is split, and the instruction executed again.
    ///
    /// # Errors
    /// The instruction's own, and `None` where no memslot is.
    pub fn pvalidate(&self, gpa: Gpa, size: RmpSize, validate: bool) -> Result<Validated, Option<PvalidateError>> {
        let span = Span::block(gpa, if size == RmpSize::M2 { 21 } else { 12 });
        let (backing, page) = self.page_at(span.start()).ok_or(None)?;
        // The whole group is held, so that no conversion of it runs meanwhile.
        let group = Span::block(page, GROUP_LG2).intersect(backing.pages()).ok_or(None)?;
        let held = backing.lock(group);
        if size == RmpSize::M2 && !backing.oa(page).is_aligned(Lg2::M2.0) {
            // Such a page is mapped by 4 KiB and has small entries, so that is what the instruction would meet.
            return Err(Some(PvalidateError::Fail(Code::FailSizeMismatch)));
        }
        let request = Pvalidate { asid: self.asid, vmpl: Vmpl::V0, gpa: span.start(), oa: backing.oa(page), size, validate };
        let execute = || switch::retry(PvalidateError::Fail(Code::FailInUse), || self.rmp.pvalidate(request));
        let mut done = execute();
        if let Err(PvalidateError::Npf(bits)) = done
            && bits & secure::npf::SIZEM != 0
            && smash_held(&self.rmp, &backing, group).is_ok()
        {
            self.counters.smashed.fetch_add(1, Ordering::Relaxed);
            done = execute();
        }
        let done = done?;
        let mut validated = self.validated();
        // Without memory for the record an audit will say so; the instruction has happened.
        let _ = if validate { validated.set(span, ()) } else { validated.clear(span) };
        drop(validated);
        drop(held);
        Ok(done)
    }

    /// Which runs of `span` the guest has validated.
    pub fn validated_runs(&self, span: Span<Gpa>) -> Vec<(Span<Gpa>, bool)> {
        self.validated().runs(span).map(|(run, yes)| (run, yes.is_some())).collect()
    }

    pub(crate) fn forget_validated(&self, span: Span<Gpa>) {
        // As in `pvalidate`.
        let _ = self.validated().clear(span);
        let _ = self.adjusted().clear(span);
    }

    /// The guest, at `vmpl`, executes RMPADJUST on one page of 4 KiB or 2 MiB: what `target` may do with it. A device acts with the permissions of the
    /// VMPL in its sDTE, and every access asks for them, so nothing has to be invalidated. 2 MiB entries are split as for
    /// [`Space::pvalidate`].
    ///
    /// # Errors
    /// The instruction's own, and `None` where no memslot is.
    pub fn rmpadjust(&self, vmpl: Vmpl, gpa: Gpa, size: RmpSize, target: Vmpl, perms: Perms) -> Result<(), Option<RmpadjustError>> {
        let span = Span::block(gpa, size.lg2());
        let (backing, page) = self.page_at(span.start()).ok_or(None)?;
        let group = Span::block(page, GROUP_LG2).intersect(backing.pages()).ok_or(None)?;
        let _held = backing.lock(group);
        if size == RmpSize::M2 && !backing.oa(page).is_aligned(Lg2::M2.0) {
            return Err(Some(RmpadjustError::Fail(Code::FailSizeMismatch)));
        }
        let set = Attributes { target, perms, vmsa: false };
        let execute = || self.rmp.rmpadjust(self.asid, vmpl, span.start(), backing.oa(page), size, set);
        let adjust = || switch::retry(RmpadjustError::Fail(Code::FailInUse), execute);
        let mut done = adjust();
        if let Err(RmpadjustError::Npf(bits)) = done
            && bits & secure::npf::SIZEM != 0
            && smash_held(&self.rmp, &backing, group).is_ok()
        {
            self.counters.smashed.fetch_add(1, Ordering::Relaxed);
            done = adjust();
        }
        done?;
        let mut adjusted = self.adjusted();
        let known: Vec<(Span<Gpa>, u64)> = adjusted.runs(span).map(|(run, word)| (run, word.copied().unwrap_or(FRESH_PERMS))).collect();
        let shift = 8 * target as u32;
        for (run, word) in known {
            // Without memory for the record an audit will say so; the instruction has happened.
            let _ = adjusted.set(run, word & !(0xff << shift) | u64::from(perms.0) << shift);
        }
        Ok(())
    }

    /// The permissions that the entry of the page at `gpa` should have, as far as the guest told us.
    pub(crate) fn perms_word(&self, gpa: Gpa) -> u64 {
        self.adjusted().get(gpa).map_or(FRESH_PERMS, |(_, word)| *word)
    }

    fn adjusted(&self) -> MutexGuard<'_, SpanMap<Gpa, u64>> {
        self.adjusted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on conversions leave IO page table leaves alone, since private and shared pages have the same
    /// ([`PolicyRule::keeps_leaves`](crate::PolicyRule::keeps_leaves)). Every IOAS that shows this memory must have such a rule. To be
    /// said before the first conversion.
    pub fn keep_leaves(&self) {
        self.keeps_leaves.store(true, Ordering::Relaxed);
    }

    /// Whether conversions leave IO page table leaves alone.
    pub fn keeps_leaves(&self) -> bool {
        self.keeps_leaves.load(Ordering::Relaxed)
    }

    fn validated(&self) -> MutexGuard<'_, SpanMap<Gpa, ()>> {
        self.validated.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `watch` in every conversion that begins from now on, after each step, on its thread and with its pages held. For audits and measurements; it
    /// must not convert or lock pages.
    pub fn on_transition(&self, watch: impl Fn(&Transition<'_>) + Send + Sync + 'static) {
        *self.watch.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(watch));
    }

    pub(crate) fn watch(&self) -> Option<Arc<Watch>> {
        self.watch.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The guest's address space identifier.
    pub fn asid(&self) -> u32 {
        self.asid
    }

    /// The secure world's table.
    pub fn rmp(&self) -> &Arc<SystemRmp> {
        &self.rmp
    }

    /// Stage 2.
    pub fn stage2(&self) -> &Arc<dyn Stage2> {
        &self.stage2
    }

    /// What an audit may claim about stage 2.
    pub fn evidence(&self) -> Evidence {
        self.stage2.evidence()
    }

    /// What was done so far.
    pub fn counters(&self) -> Counters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let now = &self.counters;
        Counters {
            batches: read(&now.batches),
            to_private: read(&now.to_private),
            to_shared: read(&now.to_shared),
            smashed: read(&now.smashed),
            leaked: read(&now.leaked),
            failed: read(&now.failed),
        }
    }
}

impl fmt::Debug for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Space").field("asid", &self.asid).field("slots", &self.slots).finish_non_exhaustive()
    }
}
