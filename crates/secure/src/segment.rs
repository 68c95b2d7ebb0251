//! One segment: where its entries and summaries lie, and the lock by which writers of one 2 MiB group exclude each other.
//!
//! The storage holds two words per page, then one summary word per 2 MiB, then one per 1 GiB. All of it zero is a segment of
//! hypervisor pages, so storage that is zero until touched costs nothing until it is used.

use crate::entry::{Q1, Q2, RawEntry, RmpSize};
use addr::Oa;
use core::sync::atomic::{AtomicU64, Ordering};

/// In a 2 MiB summary word: a writer is at work in the group.
const LOCK: u64 = 1 << 63;
/// In a 2 MiB summary word: some entry of the group was written once, so that nobody need look at groups without it.
pub(crate) const TOUCHED: u64 = 1 << 62;
/// In a summary word: the number of assigned pages.
pub(crate) const COUNT: u64 = (1 << 32) - 1;
/// How often a writer looks at a lock before it gives up and says so: a millisecond or a few. A lock is held for less than a microsecond; longer
/// only by a writer that lost its CPU, and without an operating system below nobody can sleep until it has it back. Callers that have one
/// give up the CPU and try again.
const SPINS: u32 = 1 << 16;
/// Pages in a group.
pub(crate) const GROUP_PAGES: usize = 512;

/// A published segment. Copies are made freely; it borrows the storage.
#[derive(Clone, Copy)]
pub(crate) struct Segment<'a> {
    pub(crate) words: &'a [AtomicU64],
    pub(crate) smash: &'a AtomicU64,
    /// First byte.
    pub(crate) start: u64,
    /// Bytes less one.
    pub(crate) last_offset: u64,
}

impl<'a> Segment<'a> {
    /// Index of the page of an address that lies inside.
    #[inline]
    pub(crate) fn page(&self, oa: Oa) -> usize {
        ((oa.get() - self.start) >> 12) as usize
    }

    #[inline]
    pub(crate) fn oa(&self, page: usize) -> Oa {
        Oa::new(self.start + ((page as u64) << 12))
    }

    #[inline]
    pub(crate) fn pages(&self) -> usize {
        (self.last_offset >> 12) as usize + 1
    }

    /// Whether `last_offset` more bytes from `oa`, which lies inside, stay inside.
    #[inline]
    pub(crate) fn holds(&self, oa: Oa, last_offset: u64) -> bool {
        last_offset <= self.last_offset - (oa.get() - self.start)
    }

    #[inline]
    pub(crate) fn q1(&self, page: usize) -> Q1 {
        Q1::from_bits(self.words[2 * page].load(Ordering::Acquire))
    }

    #[inline]
    pub(crate) fn q2(&self, page: usize) -> Q2 {
        Q2::from_bits(self.words[2 * page + 1].load(Ordering::Acquire))
    }

    /// Index of the page whose entry speaks for this one, as things are now.
    #[inline]
    pub(crate) fn speaker(&self, page: usize) -> usize {
        let base = page & !(GROUP_PAGES - 1);
        if is_huge(self.q1(base)) { base } else { page }
    }

    /// The entry that speaks for a page, its GPA being the page's own. First word before second, so that what a first word
    /// says is never paired with an older second word.
    #[inline]
    pub(crate) fn effective(&self, page: usize) -> RawEntry {
        let base = page & !(GROUP_PAGES - 1);
        let first = self.q1(base);
        // One load both decides who speaks and is what it says: a second one might find an entry that no longer speaks for this page.
        let (from, q1) = if is_huge(first) { (base, first) } else { (page, self.q1(page)) };
        let gfn = q1.gfn().wrapping_add((page - from) as u64) & GFN_MASK;
        let q1 = if from != page && q1.asid() != 0 { q1.with_gfn(gfn) } else { q1 };
        RawEntry { q1, q2: self.q2(from) }
    }

    #[inline]
    pub(crate) fn summary_2m(&self, page: usize) -> &'a AtomicU64 {
        &self.words[2 * self.pages() + page / GROUP_PAGES]
    }

    #[inline]
    pub(crate) fn summary_1g(&self, page: usize) -> &'a AtomicU64 {
        let block = ((self.start >> 12) as usize + page) / GIB_PAGES - (self.start >> 30) as usize;
        &self.words[2 * self.pages() + self.pages() / GROUP_PAGES + block]
    }

    /// Locks the group of a page; `None` when another writer holds it for too long.
    #[inline]
    pub(crate) fn lock(self, page: usize) -> Option<Group<'a>> {
        let summary = self.summary_2m(page);
        for _ in 0..SPINS {
            let old = summary.load(Ordering::Relaxed);
            if old & LOCK == 0 && summary.compare_exchange_weak(old, old | LOCK | TOUCHED, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                return Some(Group { segment: self, base: page & !(GROUP_PAGES - 1), summary, count: old & COUNT });
            }
            core::hint::spin_loop();
        }
        None
    }
}

const GIB_PAGES: usize = 1 << 18;
const GFN_MASK: u64 = (1 << 39) - 1;
const _: () = assert!(GIB_PAGES * 4096 == 1 << 30);

/// Whether a first entry speaks for its whole group.
#[inline]
pub(crate) fn is_huge(base: Q1) -> bool {
    base.assigned() && matches!(base.size(), RmpSize::M2)
}

/// Words that a segment of this many bytes from `start` needs.
pub(crate) const fn words_for(start: u64, last: u64) -> usize {
    let pages = ((last - start) >> 12) as usize + 1;
    2 * pages + pages.div_ceil(GROUP_PAGES) + ((last >> 30) - (start >> 30)) as usize + 1
}

/// The right to write the entries of one group.
pub(crate) struct Group<'a> {
    segment: Segment<'a>,
    /// Index of its first page.
    pub(crate) base: usize,
    summary: &'a AtomicU64,
    count: u64,
}

impl Group<'_> {
    #[inline]
    pub(crate) fn q1(&self, page: usize) -> Q1 {
        Q1::from_bits(self.segment.words[2 * page].load(Ordering::Relaxed))
    }

    #[inline]
    pub(crate) fn q2(&self, page: usize) -> Q2 {
        Q2::from_bits(self.segment.words[2 * page + 1].load(Ordering::Relaxed))
    }

    #[inline]
    pub(crate) fn set_q1(&self, page: usize, q1: Q1) {
        self.segment.words[2 * page].store(q1.into_bits(), Ordering::Release);
    }

    #[inline]
    pub(crate) fn set_q2(&self, page: usize, q2: Q2) {
        self.segment.words[2 * page + 1].store(q2.into_bits(), Ordering::Release);
    }

    /// The entry that speaks for the page, as [`Segment::effective`].
    pub(crate) fn effective(&self, page: usize) -> RawEntry {
        self.segment.effective(page)
    }

    /// The pages after the first.
    #[inline]
    pub(crate) fn others(&self) -> core::ops::Range<usize> {
        self.base + 1..self.base + GROUP_PAGES
    }

    /// Pages are about to become assigned. Before their entries say so: a reader that finds a count of zero must be right.
    #[inline]
    pub(crate) fn raise(&mut self, pages: u64) {
        self.segment.summary_1g(self.base).fetch_add(pages, Ordering::AcqRel);
        self.count += pages;
        self.summary.store(self.count | LOCK | TOUCHED, Ordering::Release);
    }

    /// Pages are no longer assigned. After their entries said so. A count that is too low already, because somebody wrote to the
    /// table behind our back, stays at zero for the audit to find.
    #[inline]
    pub(crate) fn lower(&mut self, pages: u64) {
        // No more than this group had raised, or the 1 GiB would forget pages of other groups.
        let pages = pages.min(self.count);
        self.count -= pages;
        self.segment.summary_1g(self.base).fetch_sub(pages, Ordering::AcqRel);
    }

    /// One page besides the first became or ceased to be a 4 KiB assigned page.
    #[inline]
    pub(crate) fn count_subpage(&self, up: bool) {
        let base = self.q1(self.base);
        let count = base.subpage_count();
        self.set_q1(self.base, base.with_subpage_count(if up { count.saturating_add(1).min(511) } else { count.saturating_sub(1) }));
    }
}

impl Drop for Group<'_> {
    #[inline]
    fn drop(&mut self) {
        self.summary.store(self.count | TOUCHED, Ordering::Release);
    }
}
