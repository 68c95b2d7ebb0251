//! The audit: three tables, held against each other.
//!
//! IO page tables are read back by [`read_tree`](crate::read_tree), which shares no code with their writer; the RMP by its raw words; stage 2
//! cannot be read by anyone outside KVM, so what was recorded there is used, and every answer says so (design D-11). An audit holds the pages it looks at, 16 MiB
//! at a time, so it may run while devices, vCPUs and conversions do.

use crate::ownership::Part;
use crate::raw_walk::{RawLeaf, RawOddity, RawTree, read_tree};
use crate::report::{AuditReport, Difference, Says};
use crate::{Evidence, Space, Transition};
use addr::{Address, Gpa, Iova, Lg2, Oa, PAGE_LG2, Page, SizeSet, Span};
use backing::{Backing, PageState};
use ioas::{Area, AreaState, Ioas, Pages};
use iommu::{Domain, SystemRmp};
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

/// A leaf run that a rule asks for.
struct Expected {
    iova: Span<Iova>,
    oa: Oa,
    sizes: SizeSet,
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
                for domain in area.domains() {
                    domain.each_cached_by_devices(part, |device, cached, oa| {
                        let what = format!("device {device} has a page in transition cached, at {oa}");
                        report.add(self.difference("I-7", what, cached, None, Some((&area, pages.backing()))));
                    });
                    for leaf in read(&domain, part).leaves {
                        report.leaves += 1;
                        let what = "a page in transition is mapped".into();
                        report.add(self.difference(
                            "I-7",
                            what,
                            leaf.span.intersect(part).unwrap_or(leaf.span),
                            Some(&leaf),
                            Some((&area, pages.backing())),
                        ));
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

    /// The leaves say what the rule asks for, nothing more and nothing less.
    fn compare_leaves(
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
    fn compare_devices(&self, area: &Area, domain: &Domain, part: Span<Iova>, leaves: &[RawLeaf], report: &mut AuditReport) {
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

    /// Every page's own RMP entry, bit by bit, against its state; and stage 2's record.
    fn compare_entries(&self, area: &Area, backing: &Arc<Backing>, pages: Span<Page>, report: &mut AuditReport) {
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
    fn compare_holes(&self, area: &Area, backing: &Arc<Backing>, pages: Span<Page>, report: &mut AuditReport) {
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

    /// Nothing is mapped, and no word is odd, where no area is.
    fn audit_strays(&self, ioas: &Ioas, areas: &[Arc<Area>], report: &mut AuditReport) {
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
    fn audit_summaries(&self, report: &mut AuditReport) {
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

    /// What each of the three tables says about a span.
    fn difference(
        &self,
        invariant: &'static str,
        what: String,
        iova: Span<Iova>,
        leaf: Option<&RawLeaf>,
        of: Option<(&Area, &Arc<Backing>)>,
    ) -> Difference {
        let page = of.and_then(|(area, backing)| Some((backing, pages_of(area, iova)?.start())));
        let io_page_table = leaf.map_or_else(
            || of.and_then(|(area, _)| Some(describe_leaf(&first_leaf(area, iova)?))).unwrap_or_else(|| "no leaf".into()),
            describe_leaf,
        );
        let secure = page.map_or_else(
            || "not asked".into(),
            |(backing, page)| {
                let oa = backing.oa(page);
                format!("{oa} is {:?}, entry {:x?}", self.rmp.state(oa), self.rmp.raw(oa))
            },
        );
        let holders = page.into_iter().flat_map(|(backing, page)| {
            let at = |guest: &&'a Space| Some((*guest, guest.gpa_of(backing, page)?));
            self.guests.iter().filter_map(at).collect::<Vec<_>>()
        });
        let says: Vec<_> = holders
            .map(|(guest, gpa)| {
                let state = if guest.stage2().is_private(gpa) { "private" } else { "shared" };
                if self.guests.len() == 1 { format!("{gpa:?} is {state}") } else { format!("{gpa:?} of ASID {} is {state}", guest.asid()) }
            })
            .collect();
        let stage2 = if says.is_empty() { "no memslot".into() } else { says.join(", ") };
        Difference {
            invariant,
            what,
            iova,
            io_page_table: Says { evidence: Evidence::ReadBack, what: io_page_table },
            secure: Says { evidence: Evidence::ReadBack, what: secure },
            stage2: Says { evidence: self.guests.first().map_or(Evidence::Recorded, |guest| guest.evidence()), what: stage2 },
        }
    }

    /// What each of the three tables says about one page of the guest: for reports of others who found something wrong there.
    pub fn describe(&self, ioas: &Ioas, gpa: Gpa, invariant: &'static str, what: &str) -> Difference {
        let found = self.guests.iter().find_map(|guest| guest.page_at(gpa)).and_then(|(backing, page)| {
            let area = Pages::of(&backing)
                .areas_over(Span::one(page))
                .into_iter()
                .find(|area| ioas.areas().iter().any(|own| Arc::ptr_eq(own, area)))?;
            Some((area, backing, page))
        });
        let span = found
            .as_ref()
            .and_then(|(area, _, page)| iova_of(area, Span::one(*page)))
            .unwrap_or(Span::block(Iova::new(gpa.get()), PAGE_LG2));
        self.difference(invariant, what.into(), span, None, found.as_ref().map(|(area, backing, _)| (&**area, backing)))
    }
}

/// Whether a run begins where another ends, in IOVA and output address alike.
fn continues(last: &Expected, iova: Span<Iova>, oa: Oa) -> bool {
    last.iova.touches(iova) && last.oa.checked_add(last.iova.len()) == Some(oa)
}

fn first_leaf(area: &Area, iova: Span<Iova>) -> Option<RawLeaf> {
    area.domains().iter().find_map(|domain| read(domain, iova).leaves.first().copied())
}

fn describe_leaf(leaf: &RawLeaf) -> String {
    let rights = [if leaf.read { "r" } else { "-" }, if leaf.write { "w" } else { "-" }].concat();
    format!("{} to {} {rights}", leaf.span, leaf.oa)
}

fn read(domain: &Domain, within: Span<Iova>) -> RawTree {
    let (root, level) = domain.table().root();
    let arena = domain.table().arena();
    let mut tree = read_tree(domain.format(), &|at| arena.peek(at), root, level + 1, within);
    // A pointer may lead to a table that looks right and is free.
    for &(at, span) in tree.places.iter().filter(|(at, _)| !arena.is_taken(*at)) {
        tree.oddities.push(RawOddity {
            span: span.intersect(within).unwrap_or(span),
            at,
            value: 0,
            why: "a table that is in use and free",
        });
    }
    tree
}

/// A rule speaks of whole pages; where an area begins or ends inside one, smaller leaves are no breach of it.
fn below_page_too(sizes: SizeSet) -> SizeSet {
    SizeSet(sizes.0 | (addr::PAGE_BYTES - 1))
}

/// Where an area shows pages. The first and the last may be shown in part.
fn iova_of(area: &Area, pages: Span<Page>) -> Option<Span<Iova>> {
    let bytes: Span<Page> = pages.unindex(PAGE_LG2);
    let own = Span::of(Page::new(area.offset_bytes()), Page::new(area.offset_bytes() + area.span().last_offset()));
    Some(area.span().project(own, bytes.intersect(own)?))
}

/// Which pages an area shows there.
fn pages_of(area: &Area, iova: Span<Iova>) -> Option<Span<Page>> {
    let part = iova.intersect(area.span())?;
    let offset = area.offset_bytes() + part.start().offset_from(area.span().start());
    Some(Span::of(Page::new(offset), Page::new(offset + part.last_offset())).index(PAGE_LG2))
}
