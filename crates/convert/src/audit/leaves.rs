//! Leaves, and what devices have cached of them, against what the owners of the pages ask for.

use super::Auditor;
use super::places::pages_of;
use crate::raw_walk::RawLeaf;
use crate::report::AuditReport;
use addr::{Address, Iova, Lg2, Oa, SizeSet, Span};
use backing::PageState;
use ioas::Area;
use iommu::Domain;

/// A leaf run that a rule asks for.
pub(super) struct Expected {
    pub(super) iova: Span<Iova>,
    pub(super) oa: Oa,
    pub(super) sizes: SizeSet,
}

impl Auditor<'_> {
    /// The leaves say what the rule asks for, nothing more and nothing less.
    pub(super) fn compare_leaves(
        &self,
        area: &Area,
        domain: &Domain,
        part: Span<Iova>,
        expected: &[Expected],
        leaves: &[RawLeaf],
        report: &mut AuditReport,
    ) {
        let backing = area.backing();
        let mut add = |invariant, what: &str, span, leaf: Option<&RawLeaf>| {
            report.add(self.difference(invariant, what.into(), span, leaf, Some((area, backing))));
        };
        let mut wanted = expected.iter().peekable();
        // First IOVA of the wanted run at hand that no leaf has covered yet.
        let mut covered_to: Option<Iova> = None;
        for leaf in leaves {
            let Some(seen) = leaf.span.intersect(part) else { continue };
            // Runs that end before this leaf were not mapped, or not to their end.
            while let Some(run) = wanted.next_if(|run| run.iova.last() < seen.start()) {
                let from = covered_to.take().unwrap_or(run.iova.start());
                if let Some(missing) = Span::new(from, run.iova.last()).filter(|_| from <= run.iova.last()) {
                    add("I-10", "a page that should be mapped is not", missing, None);
                }
            }
            let Some(run) = wanted.peek().filter(|run| run.iova.covers(seen)) else {
                add(self.owner_rule(area, seen), "a page that must not be mapped is", seen, Some(leaf));
                continue;
            };
            let from = covered_to.unwrap_or(run.iova.start());
            if from < seen.start() {
                add("I-10", "a page that should be mapped is not", Span::of(from, Iova::new(seen.start().get() - 1)), None);
            }
            let given = leaf.oa.plus(seen.start().offset_from(leaf.span.start()));
            let right = run.oa.plus(seen.start().offset_from(run.iova.start()));
            if given != right {
                add("I-5", &format!("the leaf leads to {given}, the page is at {right}"), seen, Some(leaf));
            }
            if (leaf.read, leaf.write) != (area.perm().allows(pt::Perm::READ), area.perm().allows(pt::Perm::WRITE)) {
                add("I-10", "the leaf's permissions are not the area's", seen, Some(leaf));
            }
            let size = Lg2(64 - leaf.span.last_offset().leading_zeros() as u8);
            // Asked of the entry itself, not of the rule that chose the leaf.
            let private = pages_of(area, seen).is_some_and(|pages| backing.state(pages.start()) == PageState::Private);
            let entry = Lg2(self.rmp.size_at(given).lg2());
            if private && entry != size && !self.rmp.checks_pages() {
                add("I-5", &format!("a leaf of {size} over an RMP entry of {entry}"), seen, Some(leaf));
            } else if !below_page_too(run.sizes).and(domain.sizes()).has(size) {
                let what = format!("a leaf of {size} where the rule allows {:#x} and the domain {:#x}", run.sizes.0, domain.sizes().0);
                add("I-5", &what, seen, Some(leaf));
            }
            covered_to = seen.last().checked_add(1);
            if seen.last() == run.iova.last() {
                wanted.next();
                covered_to = None;
            }
        }
        for run in wanted {
            let from = covered_to.take().unwrap_or(run.iova.start());
            if let Some(missing) = Span::new(from, run.iova.last()) {
                add("I-10", "a page that should be mapped is not", missing, None);
            }
        }
        report.leaves += leaves.len() as u64;
    }

    /// What devices have cached is what the leaves say. Whoever changes these pages holds them until the devices have answered.
    pub(super) fn compare_devices(&self, area: &Area, domain: &Domain, part: Span<Iova>, leaves: &[RawLeaf], report: &mut AuditReport) {
        domain.each_cached_by_devices(part, |device, cached, oa| {
            // Leaf by leaf to the end of what is cached, without a gap and without another address.
            let mut next = Some(cached.start());
            for leaf in &leaves[leaves.partition_point(|leaf| leaf.span.last() < cached.start())..] {
                let Some(at) = next.filter(|at| *at <= cached.last() && leaf.span.contains(*at)) else { break };
                if leaf.oa.plus(at.offset_from(leaf.span.start())) != oa.plus(at.offset_from(cached.start())) {
                    break;
                }
                next = leaf.span.last().checked_add(1);
            }
            if next.is_some_and(|at| at <= cached.last()) {
                let what = format!("device {device} has a stale translation cached, to {oa}");
                report.add(self.difference("I-4", what, cached, None, Some((area, area.backing()))));
            }
        });
    }

    /// Which promise a leaf breaks that should not be there.
    fn owner_rule(&self, area: &Area, span: Span<Iova>) -> &'static str {
        match pages_of(area, span).map(|pages| area.backing().state(pages.start())) {
            Some(PageState::Private) => "I-5",
            Some(PageState::Absent) => "I-4",
            _ => "I-6",
        }
    }
}

/// Whether a run begins where another ends, in IOVA and output address alike.
pub(super) fn continues(last: &Expected, iova: Span<Iova>, oa: Oa) -> bool {
    last.iova.touches(iova) && last.oa.checked_add(last.iova.len()) == Some(oa)
}

/// A rule speaks of whole pages; where an area begins or ends inside one, smaller leaves are no breach of it.
fn below_page_too(sizes: SizeSet) -> SizeSet {
    SizeSet(sizes.0 | (addr::PAGE_BYTES - 1))
}
