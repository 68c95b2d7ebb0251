//! What the three tables of one VM have in common: which memory stands behind each guest physical address, whose it is, and who is told.

use crate::{Evidence, Stage2, plan, switch};
use addr::{Address, Gpa, Lg2, Oa, OverlapError, PAGE_LG2, Page, SizeSet, Span, SpanError, SpanMap};
use backing::{Backing, PageState};
use ioas::{Edit, Pages};
use iommu::SystemRmp;
use secure::{Pvalidate, PvalidateError, RmpSize, Validated, Vmpl};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use thiserror::Error;

/// Pages of one 2 MiB entry.
const GROUP_LG2: u8 = 9;

/// One VM's guest physical space.
pub struct Space {
    pub(crate) rmp: Arc<SystemRmp>,
    pub(crate) stage2: Arc<dyn Stage2>,
    pub(crate) asid: u32,
    slots: RwLock<SpanMap<Gpa, Slot>>,
    /// What the guest has validated, as far as it told us: an audit compares it with the RMP's bits.
    validated: Mutex<SpanMap<Gpa, ()>>,
    pub(crate) counters: CountersNow,
    watch: RwLock<Option<Arc<Watch>>>,
}

/// Memory of one memslot.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    pub(crate) pages: Arc<Pages>,
    pub(crate) first: Page,
}

impl Slot {
    pub(crate) fn pages_of(&self, slot: Span<Gpa>, part: Span<Gpa>) -> Span<Page> {
        let first = self.first.get() + (part.start().offset_from(slot.start()) >> PAGE_LG2);
        Span::of(Page::new(first), Page::new(first + (part.last_offset() >> PAGE_LG2)))
    }
}

/// Called with pages in transition: detached everywhere, their owner just changed, nothing mapped yet (I-7).
pub(crate) type Watch = dyn Fn(&Transition<'_>) + Send + Sync;

/// Pages that a conversion holds: in nobody's table at this moment, or, at its end, in all of them.
#[derive(Debug)]
pub struct Transition<'a> {
    /// Everything is done but the acknowledgement.
    pub done: bool,
    /// The guest's addresses, and the pages behind them.
    pub pages: &'a [(Span<Gpa>, Arc<Pages>, Span<Page>)],
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
        let slot = Slot { pages: Pages::of(backing), first: pages.start() };
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let shown =
            slots.iter().any(|(there, other)| Arc::ptr_eq(&other.pages, &slot.pages) && other.pages_of(there, there).overlaps(pages));
        let elsewhere = |page: Page| {
            let gpa = span.start().plus(page.offset_from(pages.start()) << PAGE_LG2);
            self.rmp.entry(backing.oa(page)).gpa() != gpa
        };
        let private = backing.states(pages).filter(|(_, state)| *state == PageState::Private);
        let strays = private.into_iter().any(|(run, _)| run.blocks(0).any(|page| elsewhere(page.start())));
        if shown || strays {
            return Err(SpaceError::Alias { span, pages });
        }
        let added = slots.insert(span, slot);
        added.map_err(|error| match error {
            OverlapError::Overlaps { met, .. } => SpaceError::Overlap { span, met },
            OverlapError::OutOfMemory(_) => SpaceError::OutOfMemory(span),
        })
    }

    /// Takes the memslot out that begins at `gpa`. Its pages keep their owner.
    ///
    /// # Errors
    /// `NoSlot`.
    pub fn remove_slot(&self, gpa: Gpa) -> Result<Span<Gpa>, SpaceError> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        slots.remove(gpa).map(|(span, _)| span).ok_or(SpaceError::NoSlot(gpa))
    }

    /// The memslots: where, whose pages, and the first of them.
    pub fn slots(&self) -> Vec<(Span<Gpa>, Arc<Backing>, Page)> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.iter().map(|(span, slot)| (span, Arc::clone(slot.pages.backing()), slot.first)).collect()
    }

    /// Shows the memslots that `span` meets, each with the part that it has.
    pub(crate) fn parts(&self, span: Span<Gpa>, mut show: impl FnMut(Span<Gpa>, &Arc<Pages>, Span<Page>)) -> Option<Gpa> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        for (run, slot) in slots.runs(span) {
            let Some(slot) = slot else { return Some(run.start()) };
            let (whole, _) = slots.get(run.start())?;
            show(run, &slot.pages, slot.pages_of(whole, run));
        }
        None
    }

    /// Where a guest physical address is, and in which page of it.
    pub fn page_at(&self, gpa: Gpa) -> Option<(Arc<Backing>, Page)> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let (span, slot) = slots.get(gpa)?;
        Some((Arc::clone(slot.pages.backing()), slot.pages_of(span, Span::one(gpa)).start()))
    }

    /// The guest physical address of a page, when a memslot shows it.
    pub fn gpa_of(&self, backing: &Backing, page: Page) -> Option<Gpa> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.iter().find_map(|(span, slot)| {
            let index = page.get().checked_sub(slot.first.get())?;
            let at = span.start().checked_add(index << PAGE_LG2)?;
            (slot.pages.backing().id() == backing.id() && span.contains(at)).then_some(at)
        })
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
            return Err(Some(PvalidateError::Fail(secure::Code::FailSizeMismatch)));
        }
        let request = Pvalidate { asid: self.asid, vmpl: Vmpl::V0, gpa: span.start(), oa: backing.oa(page), size, validate };
        let mut done = self.rmp.pvalidate(request);
        if let Err(PvalidateError::Npf(bits)) = done
            && bits & secure::npf::SIZEM != 0
            && self.smash_held(&backing, group).is_ok()
        {
            done = self.rmp.pvalidate(request);
        }
        let done = done?;
        let mut validated = self.validated();
        // Without memory for the record an audit will say so; the instruction has happened.
        let _ = if validate { validated.set(span, ()) } else { validated.clear(span) };
        drop(validated);
        drop(held);
        Ok(done)
    }

    /// Splits the 2 MiB entry of `group`, which the caller holds, and its leaves, as one event for devices (design D-6).
    pub(crate) fn smash_held(&self, backing: &Arc<Backing>, group: Span<Page>) -> Result<(), String> {
        let pages = Pages::of(backing);
        let mut edit = Edit::new();
        pages.reserve(group, Lg2::K4, &mut edit).map_err(|error| error.to_string())?;
        let oa = backing.oa(group.start());
        self.rmp.smash_begin(oa);
        let smashed = switch::smash(&self.rmp, oa).map_err(|code| code.to_string()).and_then(|()| {
            self.counters.smashed.fetch_add(1, Ordering::Relaxed);
            pages.cut(group, SizeSet::only(Lg2::K4), &mut edit).map_err(|error| error.to_string())
        });
        self.rmp.smash_end(oa);
        smashed
    }

    /// Which runs of `span` the guest has validated.
    pub fn validated_runs(&self, span: Span<Gpa>) -> Vec<(Span<Gpa>, bool)> {
        self.validated().runs(span).map(|(run, yes)| (run, yes.is_some())).collect()
    }

    pub(crate) fn forget_validated(&self, span: Span<Gpa>) {
        // As in `pvalidate`.
        let _ = self.validated().clear(span);
    }

    fn validated(&self) -> MutexGuard<'_, SpanMap<Gpa, ()>> {
        self.validated.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `watch` twice in every conversion, with its pages held: in transition, and done. For audits; it must not convert or lock pages.
    pub fn on_transition(&self, watch: impl Fn(&Transition<'_>) + Send + Sync + 'static) {
        *self.watch.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(watch));
    }

    pub(crate) fn show_transition(&self, done: bool, pieces: &[plan::Piece], held: &[plan::Held<'_>]) {
        let watch = self.watch.read().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(watch) = watch {
            let pages: Vec<_> = pieces.iter().map(|piece| (piece.gpa, Arc::clone(held[piece.held].pages), piece.pages)).collect();
            watch(&Transition { done, pages: &pages });
        }
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
