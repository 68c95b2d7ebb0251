//! What no page of an area speaks for: leaves and odd words where no area is, and the RMP's summaries. Nothing holds either, so only what stays counts.

use super::places::read;
use super::{Auditor, LOOKS};
use crate::report::AuditReport;
use addr::{Address, Iova, Oa, PAGE_LG2, Span};
use ioas::{Area, Ioas};
use std::sync::Arc;

impl Auditor<'_> {
    /// Nothing is mapped, and no word is odd, where no area is.
    pub(super) fn audit_strays(&self, ioas: &Ioas, areas: &[Arc<Area>], report: &mut AuditReport) {
        let mut gaps = Vec::new();
        let mut from = Some(Iova::new(0));
        for area in areas {
            if let Some(start) = from.filter(|start| *start < area.span().start()) {
                gaps.push(Span::of(start, Iova::new(area.span().start().get() - 1)));
            }
            from = area.span().last().checked_add(1);
        }
        gaps.extend(from.map(|start| Span::of(start, Iova::new(u64::MAX))));
        for domain in ioas.domains() {
            for gap in &gaps {
                let strays = || {
                    let tree = read(&domain, *gap);
                    let leaves = tree.leaves.into_iter().map(|leaf| (leaf.span, Some(leaf), "a leaf where no area is".to_owned()));
                    let odd = tree
                        .oddities
                        .into_iter()
                        .map(|odd| (odd.span, None, format!("the entry at {} is {:#x}: {}", odd.at, odd.value, odd.why)));
                    leaves.chain(odd).collect::<Vec<_>>()
                };
                // Nothing holds the gaps, and others map there meanwhile; what is there to stay is there at every look, and no area with it.
                let mut found = strays();
                for _ in 1..LOOKS {
                    if found.is_empty() {
                        break;
                    }
                    std::thread::yield_now();
                    let (before, again, after) = (ioas.areas(), strays(), ioas.areas());
                    let is_area = |part: Span<Iova>| before.iter().chain(&after).any(|area| area.span().overlaps(part));
                    found.retain(|stray| again.contains(stray) && !stray.0.intersect(*gap).is_some_and(is_area));
                }
                for (span, leaf, what) in found {
                    report.add(self.difference("I-4", what, span, leaf.as_ref(), None));
                }
            }
        }
    }

    /// The RMP's summaries agree with its entries. Seen without a lock, so only what stays counts.
    pub(super) fn audit_summaries(&self, report: &mut AuditReport) {
        let look = || {
            let mut wrong = Vec::new();
            self.rmp.recount(|error| wrong.push((error.span, error.says, error.counted)));
            wrong
        };
        let mut found = look();
        // A converting thread may lose its processor between the two; each look waits twice as long as the one before.
        for turn in 0..LOOKS + 3 {
            if found.is_empty() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(1 << turn));
            let again = look();
            found.retain(|wrong| again.contains(wrong));
        }
        for (span, says, counted) in found {
            let what = format!("the RMP counts {says} assigned pages in {span}, its entries {counted}");
            let iova = self.iova_of_first(span).unwrap_or(Span::whole());
            report.add(self.difference("D-6", what, iova, None, None));
        }
    }

    /// Where devices see the first page of `span` that a memslot shows: GPAs are IOVAs here.
    fn iova_of_first(&self, span: Span<Oa>) -> Option<Span<Iova>> {
        self.guests.iter().find_map(|guest| {
            guest.slots().iter().find_map(|(_, backing, _)| {
                let page = backing.window().intersect(span).and_then(|part| backing.page_of(part.start()))?;
                let gpa = guest.gpa_of(backing, page)?;
                Some(Span::block(Iova::new(gpa.get()), PAGE_LG2))
            })
        })
    }
}
