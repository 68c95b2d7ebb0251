//! The hypervisor-owned rule: every 4 KiB page of a span must be unassigned. Summaries make it one load for a 2 MiB or 1 GiB leaf; when a
//! summary is not zero the entries decide, because it is raised a moment before they change.

use crate::rmp::Rmp;
use crate::segment::{COUNT, GROUP_PAGES, Segment};
use addr::{Address, Oa, Span};
use core::ops::Deref;
use core::sync::atomic::{AtomicU64, Ordering};

const M2: u64 = 1 << 21;
const G1: u64 = 1 << 30;

impl<W: Deref<Target = [AtomicU64]>> Rmp<W> {
    /// The first assigned page of `span`, or `None` when all of it is hypervisor owned.
    #[inline(always)]
    pub(crate) fn first_assigned(&self, span: Span<Oa>) -> Option<Oa> {
        let (start, last) = (span.start().get(), span.last().get());
        let Some(segment) = self.directory.find(span.start()) else {
            return self.search(span);
        };
        let page = segment.page(span.start());
        if (start ^ last) >> 12 == 0 {
            return segment.q1(page).assigned().then(|| segment.oa(page));
        }
        if segment.holds(span.start(), last - start) {
            let summary = match () {
                () if (start ^ last) >> 21 == 0 => segment.summary_2m(page),
                () if (start ^ last) >> 30 == 0 => segment.summary_1g(page),
                () => return self.search(span),
            };
            if summary.load(Ordering::Acquire) & COUNT == 0 {
                return None;
            }
        }
        self.search(span)
    }

    /// The same for any span, block by block, by the largest summaries that fit.
    #[inline(never)]
    fn search(&self, span: Span<Oa>) -> Option<Oa> {
        let mut at = span.start();
        loop {
            let next = match self.directory.find(at) {
                None => self.directory.skip(at)?,
                Some(segment) => {
                    let last = span.last().min(Oa::new(segment.start + segment.last_offset));
                    match search_segment(&segment, Span::of(at, last)) {
                        Some(found) => return Some(found),
                        None => last.checked_add(1)?,
                    }
                }
            };
            if next > span.last() {
                return None;
            }
            at = next;
        }
    }
}

fn search_segment(segment: &Segment<'_>, span: Span<Oa>) -> Option<Oa> {
    let mut at = span.start().get();
    let last = span.last().get();
    while at <= last {
        let page = segment.page(Oa::new(at));
        // A summary that counts more than the span asks for proves as much when it is zero.
        if segment.summary_1g(page).load(Ordering::Acquire) & COUNT == 0 {
            at = (at | (G1 - 1)).checked_add(1)?;
        } else if segment.summary_2m(page).load(Ordering::Acquire) & COUNT == 0 {
            at = (at | (M2 - 1)).checked_add(1)?;
        } else {
            let end = ((page | (GROUP_PAGES - 1)) + 1).min(segment.page(Oa::new(last)) + 1);
            if let Some(found) = (page..end).find(|&page| segment.q1(page).assigned()) {
                return Some(segment.oa(found));
            }
            at = (at | (M2 - 1)).checked_add(1)?;
        }
    }
    None
}
