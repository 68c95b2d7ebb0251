//! The table as a whole: its segments, what is in use, and the sequence by which a split is one event for DMA.

use crate::code::Code;
use crate::directory::{Directory, SegmentError};
use crate::entry::RmpRead;
use crate::segment::{COUNT, Group, Segment, words_for};
use addr::{Address, Oa, Span};
use alloc::vec::Vec;
use core::ops::Deref;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use spin::Mutex;

/// The RMP. `W` is the storage of a segment: words that are zero to begin with.
///
/// Readers (every check, [`Rmp::entry`] and its like) take no lock and never wait. Instructions exclude each other per 2 MiB group.
/// Adding and removing segments takes one lock that nothing else waits for.
pub struct Rmp<W> {
    pub(crate) directory: Directory<W>,
    pub(crate) strict: AtomicBool,
    by_page: AtomicBool,
    /// How many pages are in `in_use`, so that most instructions need not look.
    in_use_pages: AtomicUsize,
    in_use: Mutex<Vec<Oa>>,
    pub(crate) leaked_pages: AtomicU64,
    pub(crate) leaked: Mutex<Vec<Oa>>,
}

impl<W> core::fmt::Debug for Rmp<W> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Rmp").field("leaked_pages", &self.leaked_pages).finish_non_exhaustive()
    }
}

impl<W: Deref<Target = [AtomicU64]>> Default for Rmp<W> {
    fn default() -> Self {
        Self::new()
    }
}

impl<W: Deref<Target = [AtomicU64]>> Rmp<W> {
    /// A table that covers nothing: every address is hypervisor owned.
    pub fn new() -> Self {
        Self {
            directory: Directory::new(),
            strict: AtomicBool::new(false),
            by_page: AtomicBool::new(false),
            in_use_pages: AtomicUsize::new(0),
            in_use: Mutex::new(Vec::new()),
            leaked_pages: AtomicU64::new(0),
            leaked: Mutex::new(Vec::new()),
        }
    }

    /// How many words of storage a segment needs: two a page, one per 2 MiB, one per 1 GiB.
    pub fn words_for(span: Span<Oa>) -> usize {
        words_for(span.start().get(), span.last().get())
    }

    /// Covers `span`, whole 2 MiB blocks, with entries kept in `words`, which must be all zero and at least [`Rmp::words_for`] long.
    /// Every page is hypervisor owned then. The storage stays with the table until that is dropped; it may serve later segments.
    ///
    /// # Errors
    /// [`SegmentError`]; nothing has changed then.
    pub fn add_segment(&self, span: Span<Oa>, words: W) -> Result<(), SegmentError> {
        self.directory.add(span, words)
    }

    /// No longer covers `span`, which must be one whole segment without an assigned or leaked page.
    ///
    /// Nobody may use its addresses any more: no leaf leads there and the grace period is over (I-4). Readers of other addresses
    /// need not care.
    ///
    /// # Errors
    /// [`SegmentError`]; nothing has changed then.
    pub fn remove_segment(&self, span: Span<Oa>) -> Result<(), SegmentError> {
        self.directory.remove(span, &self.leaked.lock())
    }

    /// Whether a segment covers `oa`.
    pub fn covers(&self, oa: Oa) -> bool {
        self.directory.find(oa).is_some()
    }

    /// The spans of all segments, ascending.
    pub fn segments(&self) -> Vec<Span<Oa>> {
        let mut spans = Vec::new();
        self.directory.each(|span, _| spans.push(span));
        spans
    }

    /// Reject, in device checks, every leaf above 2 MiB. What real hardware does with them is in dispute (linux-arch, February 2025, on mapping from a
    /// guest_memfd: a leaf of 1 GiB over entries of 2 MiB does not work; or it does, since for the CPU it counts as 2 MiB); off by default.
    pub fn set_strict(&self, strict: bool) {
        self.strict.store(strict, Ordering::Relaxed);
    }

    /// Judge device accesses page by page, whatever leaf they came through: an access counts for the 4 KiB pages that it touches, and the sizes of leaf and entry
    /// are not compared. The second reading of the same thread: when a page changes its owner only the RMP must change, not the IO page
    /// table. By default the whole leaf is judged, so that leaves must end wherever the owner changes.
    ///
    /// Whoever translates has to ask about one page at a time then ([`Rmp::checks_pages`]). To be set before the first access.
    pub fn set_by_page(&self, by_page: bool) {
        self.by_page.store(by_page, Ordering::Relaxed);
    }

    /// Whether accesses are judged page by page.
    #[inline]
    pub fn checks_pages(&self) -> bool {
        self.by_page.load(Ordering::Relaxed)
    }

    /// The segment's smash sequence: odd while a split of an entry and of its IO leaf is under way in it. An address that no
    /// segment covers always answers 0.
    ///
    /// A [`Refusal`](crate::Refusal) with `size_mismatch` is a fault only when a fresh walk under an even sequence that did not change
    /// from before the walk to after the check finds it again (D-6). Under an odd sequence [`Rmp::check_device`] lets a mere
    /// mismatch of sizes pass.
    #[inline]
    pub fn smash_seq(&self, oa: Oa) -> u64 {
        self.directory.find(oa).map_or(0, |segment| smash_seq(&segment))
    }

    /// A split begins in the segment of `oa`. Several may be under way; each needs its [`Rmp::smash_end`].
    pub fn smash_begin(&self, oa: Oa) {
        if let Some(segment) = self.directory.find(oa) {
            segment.smash.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// The split is complete: entry and leaf have one size again.
    pub fn smash_end(&self, oa: Oa) {
        if let Some(segment) = self.directory.find(oa) {
            segment.smash.fetch_add(SMASHED - 1, Ordering::AcqRel);
        }
    }

    /// RMPREAD.
    ///
    /// # Errors
    /// `FailInput` when the table does not cover the address.
    pub fn rmpread(&self, oa: Oa) -> Result<RmpRead, Code> {
        let segment = self.directory.find(oa).ok_or(Code::FailInput)?;
        let page = segment.page(oa);
        let q1 = segment.q1(page);
        Ok(RmpRead {
            gpa: addr::Gpa::new(q1.gfn() << addr::PAGE_LG2),
            assigned: q1.assigned(),
            pagesize: q1.size(),
            hpage_region_status: segment.summary_2m(page).load(Ordering::Acquire) & COUNT != 0,
            immutable: q1.immutable(),
            asid: u32::from(q1.asid()),
        })
    }

    /// Marks a page as an in-use VMCB, VMSA or AVIC backing page, or not: instructions then answer FAIL_INUSE.
    pub fn set_in_use(&self, page: Oa, in_use: bool) {
        let page = page.align_down(addr::PAGE_LG2);
        let mut pages = self.in_use.lock();
        match (pages.binary_search(&page), in_use) {
            (Err(place), true) => pages.insert(place, page),
            (Ok(place), false) => {
                pages.remove(place);
            }
            _ => {}
        }
        self.in_use_pages.store(pages.len(), Ordering::Release);
    }

    /// Whether any page of the block of `1 << lg2` bytes at `oa` is in use.
    #[inline]
    pub(crate) fn any_in_use(&self, oa: Oa, lg2: u8) -> bool {
        self.in_use_pages.load(Ordering::Acquire) != 0 && self.look_in_use(Span::block(oa, lg2))
    }

    #[cold]
    fn look_in_use(&self, span: Span<Oa>) -> bool {
        let pages = self.in_use.lock();
        let place = pages.partition_point(|&page| page < span.start());
        pages.get(place).is_some_and(|&page| page <= span.last())
    }

    /// The segment of `oa`, its page index there and the right to write its group; `busy` when another instruction works on it for too long.
    #[inline]
    pub(crate) fn lock(&self, oa: Oa, uncovered: Code, busy: Code) -> Result<(Segment<'_>, usize, Group<'_>), Code> {
        let segment = self.directory.find(oa).ok_or(uncovered)?;
        let page = segment.page(oa);
        let group = segment.lock(page).ok_or(busy)?;
        Ok((segment, page, group))
    }
}

/// Splits under way are counted in the low 16 bits, finished ones above.
const SMASHED: u64 = 1 << 16;

#[inline]
pub(crate) fn smash_seq(segment: &Segment<'_>) -> u64 {
    let word = segment.smash.load(Ordering::Acquire);
    ((word / SMASHED) << 1) | u64::from(!word.is_multiple_of(SMASHED))
}
