//! The audit: three tables, held against each other.
//!
//! IO page tables are read back by [`read_tree`](crate::read_tree), which shares no code with their writer; the RMP by its raw words; stage 2
//! cannot be read by anyone outside KVM, so what was recorded there is used, and every answer says so (design D-11). An audit holds the pages it looks at, 16 MiB
//! at a time, so it may run while devices, vCPUs and conversions do.

mod difference;
mod entries;
mod leaves;
mod places;
mod strays;

use crate::report::AuditReport;
use crate::{Space, Transition};
use addr::{Page, Span};
use backing::Backing;
use ioas::{Area, AreaState, Ioas, Pages};
use iommu::SystemRmp;
use leaves::{Expected, continues};
use places::{iova_of, read};
use std::sync::Arc;

/// Pages looked at under one lock: 16 MiB.
const CHUNK_LG2: u8 = 12;
/// How often something seen without a lock must be seen before it counts.
const LOOKS: u32 = 5;

/// Audits the tables of one VM, or of several that share an RMP.
#[derive(Debug)]
pub struct Auditor<'a> {
    rmp: &'a SystemRmp,
    guests: Vec<&'a Space>,
    populated: bool,
}

impl<'a> Auditor<'a> {
    /// For the tables of `space`.
    pub fn new(space: &'a Space) -> Self {
        Self { rmp: space.rmp(), guests: vec![space], populated: false }
    }

    /// For what several guests have over one RMP: each page is held against what its own guest was told. A private page that is no memory of theirs is
    /// another's; of that only its being assigned is known.
    pub fn of_guests(rmp: &'a SystemRmp, guests: impl IntoIterator<Item = &'a Space>) -> Self {
        Self { rmp, guests: guests.into_iter().collect(), populated: false }
    }

    /// All memory was populated at the start, so that a hole in it is a loss; otherwise memory that was never touched is one.
    #[must_use]
    pub fn populated(mut self) -> Self {
        self.populated = true;
        self
    }

    /// Looks at the whole of one IOAS: every word of every table in every domain, the RMP entry of every page in its areas, and stage 2.
    pub fn audit(&self, ioas: &Ioas) -> AuditReport {
        let mut report = AuditReport::default();
        let mut areas = ioas.areas();
        areas.sort_by_key(|area| area.span());
        for area in &areas {
            for pages in area.page_span().blocks(CHUNK_LG2) {
                self.audit_pages(area, pages, &mut report);
            }
        }
        self.audit_strays(ioas, &areas, &mut report);
        self.audit_summaries(&mut report);
        report
    }

    /// Looks at some pages of one backing, in every IOAS that maps them, and at nothing else: for an audit after each step.
    pub fn audit_part(&self, backing: &Arc<Backing>, pages: Span<Page>) -> AuditReport {
        let mut report = AuditReport::default();
        for area in Pages::of(backing).areas_over(pages) {
            for chunk in pages.blocks(CHUNK_LG2) {
                if let Some(chunk) = chunk.intersect(area.page_span()) {
                    self.audit_pages(&area, chunk, &mut report);
                }
            }
        }
        report
    }

    /// The check for [`Space::on_transition`]: pages in transition have no leaf in any domain (I-7), and when the conversion is done all three
    /// tables agree about them.
    pub fn check_transition(&self, transition: &Transition<'_>) -> AuditReport {
        let mut report = AuditReport::default();
        if transition.is_done() {
            for (_, pages, span) in transition.pages() {
                for area in pages.areas_over(span) {
                    if let Some(part) = span.intersect(area.page_span()) {
                        self.look_at(&area, part, &mut report);
                    }
                }
            }
            return report;
        }
        if self.guests.iter().any(|guest| guest.keeps_leaves()) {
            // Pages in transition stay mapped; that no access judged by the old owner is under way is the flush's doing, and not to be seen here.
            return report;
        }
        for (_, pages, span) in transition.pages().filter(|_| transition.is_detached()) {
            for area in pages.areas_over(span) {
                let Some(part) = iova_of(&area, span) else { continue };
                let mut found = Vec::new();
                for domain in area.domains() {
                    domain.each_cached_by_devices(part, |device, cached, oa| {
                        found.push((format!("device {device} has a page in transition cached, at {oa}"), cached, None));
                    });
                    for leaf in read(&domain, part).leaves {
                        let seen = leaf.span.intersect(part).unwrap_or(leaf.span);
                        found.push(("a page in transition is mapped".into(), seen, Some(leaf)));
                    }
                }
                // An area that was closed before the pages were held leaves them without asking, and its IOVAs are another's then: what was found was at
                // these IOVAs only if they were still its own.
                if !found.is_empty() && pages.lists(&area) {
                    for (what, seen, leaf) in found {
                        report.leaves += u64::from(leaf.is_some());
                        report.add(self.difference("I-7", what, seen, leaf.as_ref(), Some((&area, pages.backing()))));
                    }
                }
            }
        }
        report
    }

    fn audit_pages(&self, area: &Area, pages: Span<Page>, report: &mut AuditReport) {
        let _held = area.backing().lock(pages);
        self.look_at(area, pages, report);
    }

    /// Some pages of an area, which somebody holds.
    fn look_at(&self, area: &Area, pages: Span<Page>, report: &mut AuditReport) {
        let backing = Arc::clone(area.backing());
        let Some(part) = iova_of(area, pages) else { return };
        // One in the making has no leaves yet; one that goes may have none any more.
        if area.state() != AreaState::Live {
            return;
        }
        let mut expected = Vec::new();
        // Where borders are in the RMP only, leaves may lie across the runs of owners.
        let joins = self.rmp.checks_pages();
        area.expected(pages, |iova, oa, sizes| match expected.last_mut() {
            Some(last) if joins && continues(last, iova, oa) => {
                (last.iova, last.sizes) = (Span::of(last.iova.start(), iova.last()), last.sizes.and(sizes));
            }
            _ => expected.push(Expected { iova, oa, sizes }),
        });
        for domain in area.domains() {
            let mut tree = read(&domain, part);
            // A leaf that sticks out of the pages we hold may be cut from its other end meanwhile, slot by slot. What is wrong there to stay is
            // there at every look.
            for look in 0..LOOKS {
                if tree.oddities.iter().all(|odd| part.covers(odd.span)) {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(1 << look));
                let before = std::mem::replace(&mut tree, read(&domain, part)).oddities;
                tree.oddities.retain(|odd| part.covers(odd.span) || before.contains(odd));
            }
            report.tables += tree.tables;
            for odd in &tree.oddities {
                let what = format!("the entry at {} is {:#x}: {}", odd.at, odd.value, odd.why);
                report.add(self.difference("I-10", what, odd.span, None, Some((area, &backing))));
            }
            self.compare_leaves(area, &domain, part, &expected, &tree.leaves, report);
            self.compare_devices(area, &domain, part, &tree.leaves, report);
        }
        self.compare_entries(area, &backing, pages, report);
        self.compare_holes(area, &backing, pages, report);
    }
}
