//! Entries of the RMP against the states of their pages, bit by bit; what stage 2 was told; and memory that went away.

use super::Auditor;
use super::places::iova_of;
use crate::Space;
use crate::ownership::Part;
use crate::report::AuditReport;
use addr::{Address, Gpa, Lg2, Oa, PAGE_LG2, Page, Span};
use backing::{Backing, PageState};
use ioas::Area;
use std::sync::Arc;

impl Auditor<'_> {
    /// Every page's own RMP entry, bit by bit, against its state; and stage 2's record.
    pub(super) fn compare_entries(&self, area: &Area, backing: &Arc<Backing>, pages: Span<Page>, report: &mut AuditReport) {
        let leaked = self.rmp.leaked();
        for (run, state) in backing.states(pages) {
            report.pages += run.len();
            for part in Part::all(self.rmp, &self.guests, backing, run, state) {
                self.compare_stage2(area, backing, &part, state, report);
                let owner = part.owner.map(|index| &part.holders[index]);
                for (extent, oa) in backing.extents(part.pages) {
                    for offset in 0..extent.len() {
                        let page = extent.start().plus(offset);
                        let owner =
                            owner.map(|owner| (owner.guest, owner.gpa.start().plus(page.offset_from(part.pages.start()) << PAGE_LG2)));
                        report.entries += 1;
                        self.check_unused(area, backing, page, &leaked, report);
                        let oa = oa.plus(offset << PAGE_LG2);
                        // A leaked page is assigned for ever, and nobody's.
                        if state == PageState::Absent && leaked.binary_search(&oa).is_ok() {
                            continue;
                        }
                        if let Some(what) = self.entry_is_wrong(oa, state, owner)
                            && let Some(iova) = iova_of(area, Span::one(page))
                        {
                            let invariant = if state == PageState::Private { "I-5" } else { "I-6" };
                            report.add(self.difference(invariant, what, iova, None, Some((area, backing))));
                        }
                    }
                }
            }
        }
    }

    /// A page of a pair has no entry on the side where it is not, unless it was leaked there.
    fn check_unused(&self, area: &Area, backing: &Arc<Backing>, page: Page, leaked: &[Oa], report: &mut AuditReport) {
        let Some(oa) = backing.unused_oa(page).filter(|oa| leaked.binary_search(oa).is_err()) else { return };
        report.entries += 1;
        if let Some(what) = self.entry_is_wrong(oa, PageState::Absent, None)
            && let Some(iova) = iova_of(area, Span::one(page))
        {
            report.add(self.difference("I-6", what, iova, None, Some((area, backing))));
        }
    }

    /// The whole entry is what its state makes it; what the guest alone decides is taken from what it told us.
    fn entry_is_wrong(&self, oa: Oa, state: PageState, owner: Option<(&Space, Gpa)>) -> Option<String> {
        const SIZE: u64 = 1 << 1;
        const SUBPAGE_COUNT: u64 = 0x1ff << 3;
        const VALIDATED: u64 = 1 << 62;
        let [q1, q2] = self.rmp.raw(oa);
        let group = self.rmp.raw(oa.align_down(Lg2::M2.0))[0];
        let large = group & (1 | SIZE) == 1 | SIZE;
        let first = oa.is_aligned(Lg2::M2.0);
        let wrong = |why: &str| Some(format!("the RMP entry of {oa} is {q1:#x} {q2:#x}: {why}"));
        // The count of a group's other pages is compared by the recount.
        let own = if first { q1 & !SUBPAGE_COUNT } else { q1 };
        match state {
            PageState::Private => {
                if q1 & 1 == 0 {
                    return wrong("not assigned, and the page is private");
                }
                if large && !first {
                    return (own != 1 || q2 != 0).then(|| wrong("a page inside a 2 MiB entry says more than assigned")).flatten();
                }
                let (guest, gpa) = owner?;
                let span = Span::block(gpa, if large { Lg2::M2.0 } else { PAGE_LG2 });
                let validated = guest.validated_runs(span).iter().any(|(_, yes)| *yes);
                let size = if large { SIZE } else { 0 };
                let right =
                    1 | size | gpa.get() & 0x0007_ffff_ffff_f000 | u64::from(guest.asid()) << 51 | if validated { VALIDATED } else { 0 };
                if own != right {
                    return wrong(&format!("it should be {right:#x}"));
                }
                let perms = guest.perms_word(gpa);
                (q2 != perms).then(|| wrong(&format!("the guest left the permissions at {perms:#x}"))).flatten()
            }
            PageState::Shared => (own != 0 || q2 != 0).then(|| wrong("not all zero, and the page is shared")).flatten(),
            PageState::Absent => (own != 0 || q2 != 0).then(|| wrong("not all zero, and the page is absent and was not leaked")).flatten(),
        }
    }

    fn compare_stage2(&self, area: &Area, backing: &Arc<Backing>, part: &Part<'_>, state: PageState, report: &mut AuditReport) {
        if state == PageState::Absent {
            return;
        }
        for (index, holder) in part.holders.iter().enumerate() {
            if holder.told != (part.owner == Some(index))
                && let Some(iova) = iova_of(area, part.pages)
            {
                let what = format!("stage 2 and the owner of {} differ", holder.gpa);
                report.add(self.difference("I-11", what, iova, None, Some((area, backing))));
            }
        }
    }

    /// Memory that went away behind our back.
    pub(super) fn compare_holes(&self, area: &Area, backing: &Arc<Backing>, pages: Span<Page>, report: &mut AuditReport) {
        if !self.populated {
            return;
        }
        for hole in backing.holes(pages).unwrap_or_default() {
            for (run, state) in backing.states(hole) {
                if state != PageState::Absent
                    && let Some(iova) = iova_of(area, run)
                {
                    let what = format!("the backing has a hole at {run:?}, and the page counts as {state:?}");
                    report.add(self.difference("I-4", what, iova, None, Some((area, backing))));
                }
            }
        }
    }
}
