//! How a difference is told: what each of the three tables says about its first page.

use super::Auditor;
use super::places::{iova_of, pages_of, read};
use crate::raw_walk::RawLeaf;
use crate::report::{Difference, Says};
use crate::{Evidence, Space};
use addr::{Gpa, Iova, PAGE_LG2, Span};
use backing::Backing;
use ioas::{Area, Ioas, Pages};
use std::sync::Arc;

impl<'a> Auditor<'a> {
    /// What each of the three tables says about a span.
    pub(super) fn difference(
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

fn first_leaf(area: &Area, iova: Span<Iova>) -> Option<RawLeaf> {
    area.domains().iter().find_map(|domain| read(domain, iova).leaves.first().copied())
}

fn describe_leaf(leaf: &RawLeaf) -> String {
    let rights = [if leaf.read { "r" } else { "-" }, if leaf.write { "w" } else { "-" }].concat();
    format!("{} to {} {rights}", leaf.span, leaf.oa)
}
