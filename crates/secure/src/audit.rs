//! Looking at the table from outside: entries as they lie there, counts taken from entries and not from summaries, the comparison of
//! the two, pages that were leaked, and a way to damage an entry so that a test can see the damage found.

use crate::entry::{Q1, RawEntry, RmpSize};
use crate::rmp::Rmp;
use crate::segment::{COUNT, GROUP_PAGES, Segment, TOUCHED, is_huge};
use crate::state::PageState;
use addr::{Address, Oa, Span};
use alloc::vec::Vec;
use core::ops::Deref;
use core::sync::atomic::{AtomicU64, Ordering};

/// A summary that does not agree with the entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SummaryError {
    /// The 2 MiB or 1 GiB whose summary is wrong, or the one page whose subpage count is.
    pub span: Span<Oa>,
    /// What it says.
    pub says: u64,
    /// What the entries say.
    pub counted: u64,
}

impl<W: Deref<Target = [AtomicU64]>> Rmp<W> {
    /// The entry that speaks for a page: for a page in a 2 MiB entry that entry, with the page's own GPA. All zero when not covered.
    pub fn entry(&self, oa: Oa) -> RawEntry {
        self.directory.find(oa).map_or(RawEntry::default(), |segment| segment.effective(segment.page(oa)))
    }

    /// The state of a page.
    pub fn state(&self, oa: Oa) -> PageState {
        let Some(segment) = self.directory.find(oa) else { return PageState::Default };
        PageState::of(segment.effective(segment.page(oa)))
    }

    /// The size of the entry that speaks for a page.
    pub fn size_at(&self, oa: Oa) -> RmpSize {
        self.entry(oa).size()
    }

    /// The two words of the page's own entry. All zero when not covered.
    pub fn raw(&self, oa: Oa) -> [u64; 2] {
        let Some(segment) = self.directory.find(oa) else { return [0; 2] };
        let page = segment.page(oa);
        [segment.q1(page).into_bits(), segment.q2(page).into_bits()]
    }

    /// Overwrites the page's own entry and nothing else: no check, no summary, no lock. For tests that damage the table to see
    /// whether the damage is found. Answers whether the address is covered.
    pub fn poke(&self, oa: Oa, words: [u64; 2]) -> bool {
        let Some(segment) = self.directory.find(oa) else { return false };
        let page = segment.page(oa);
        segment.summary_2m(page).fetch_or(TOUCHED, Ordering::AcqRel);
        segment.words[2 * page + 1].store(words[1], Ordering::Release);
        segment.words[2 * page].store(words[0], Ordering::Release);
        true
    }

    /// How many pages of `span` are assigned, by their own entries. Groups that nobody ever wrote are not looked at.
    pub fn assigned_in(&self, span: Span<Oa>) -> u64 {
        let mut pages = 0;
        self.directory.each(|whole, segment| {
            let Some(part) = whole.intersect(span) else { return };
            for piece in part.blocks(21) {
                if is_touched(&segment, piece.start()) {
                    let range = segment.page(piece.start())..=segment.page(piece.last());
                    pages += range.filter(|&page| segment.q1(page).assigned()).count() as u64;
                }
            }
        });
        pages
    }

    /// How many pages are assigned, by the summaries of 1 GiB.
    pub fn assigned_pages(&self) -> u64 {
        let mut pages = 0;
        self.directory.each(|span, segment| {
            let summary = |piece: Span<Oa>| segment.summary_1g(segment.page(piece.start())).load(Ordering::Acquire) & COUNT;
            pages += span.blocks(30).map(summary).sum::<u64>();
        });
        pages
    }

    /// The summary of the 2 MiB around `oa`.
    pub fn summary_2m(&self, oa: Oa) -> u64 {
        let Some(segment) = self.directory.find(oa) else { return 0 };
        segment.summary_2m(segment.page(oa)).load(Ordering::Acquire) & COUNT
    }

    /// The summary of that part of the 1 GiB around `oa` that lies in the same segment.
    pub fn summary_1g(&self, oa: Oa) -> u64 {
        let Some(segment) = self.directory.find(oa) else { return 0 };
        segment.summary_1g(segment.page(oa)).load(Ordering::Acquire) & COUNT
    }

    /// Compares every summary and every subpage count with the entries and tells each that is wrong. Exact when no instruction runs.
    /// `wrong` must not add, remove or list segments.
    pub fn recount(&self, mut wrong: impl FnMut(SummaryError)) {
        self.directory.each(|whole, segment| {
            for gib in whole.blocks(30) {
                let mut in_gib = 0;
                for block in gib.blocks(21).filter(|block| is_touched(&segment, block.start())) {
                    in_gib += recount_group(&segment, block, &mut wrong);
                }
                let says = segment.summary_1g(segment.page(gib.start())).load(Ordering::Acquire) & COUNT;
                if says != in_gib {
                    wrong(SummaryError { span: gib, says, counted: in_gib });
                }
            }
        });
    }

    /// Bytes of table that the covered pages need: 16 a page as in hardware, and the summaries.
    pub fn bytes(&self) -> u64 {
        let mut words = 0;
        self.directory.each(|span, _| words += Self::words_for(span) as u64);
        words * 8
    }

    /// The page could not be made shared again: it is never to be used by anyone, so it is only counted and listed.
    pub fn leak(&self, oa: Oa) {
        let page = oa.align_down(addr::PAGE_LG2);
        let mut leaked = self.leaked.lock();
        let Err(place) = leaked.binary_search(&page) else { return };
        self.leaked_pages.fetch_add(1, Ordering::Relaxed);
        // Counting must not fail for want of memory; then the list is shorter than the count.
        if leaked.try_reserve(1).is_ok() {
            leaked.insert(place, page);
        }
    }

    /// How many pages were leaked.
    pub fn leaked_pages(&self) -> u64 {
        self.leaked_pages.load(Ordering::Relaxed)
    }

    /// The leaked pages, ascending.
    pub fn leaked(&self) -> Vec<Oa> {
        self.leaked.lock().clone()
    }
}

fn is_touched(segment: &Segment<'_>, oa: Oa) -> bool {
    segment.summary_2m(segment.page(oa)).load(Ordering::Acquire) & (TOUCHED | COUNT) != 0
}

/// Checks one group and answers how many of its pages are assigned.
fn recount_group(segment: &Segment<'_>, block: Span<Oa>, wrong: &mut impl FnMut(SummaryError)) -> u64 {
    let base = segment.page(block.start());
    let assigned = |page: usize| u64::from(segment.q1(page).assigned());
    let others: u64 = (base + 1..base + GROUP_PAGES).map(assigned).sum();
    let counted = others + assigned(base);
    let says = segment.summary_2m(base).load(Ordering::Acquire) & COUNT;
    if says != counted {
        wrong(SummaryError { span: block, says, counted });
    }
    let first: Q1 = segment.q1(base);
    let subpages = if is_huge(first) { 0 } else { others };
    if u64::from(first.subpage_count()) != subpages {
        let span = Span::block(block.start(), addr::PAGE_LG2);
        wrong(SummaryError { span, says: first.subpage_count().into(), counted: subpages });
    }
    counted
}
