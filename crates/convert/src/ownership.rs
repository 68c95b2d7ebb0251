//! Whose pages are, asked of every guest that an audit knows: its memslots, and what stage 2 was told.

use crate::Space;
use addr::{Address, Gpa, PAGE_LG2, Page, Span};
use backing::{Backing, PageState};
use iommu::SystemRmp;

/// Pages of one state about which every guest says one thing.
pub(crate) struct Part<'a> {
    pub(crate) pages: Span<Page>,
    /// The guests that have them as their memory.
    pub(crate) holders: Vec<Holder<'a>>,
    /// Which of those the pages are private to.
    pub(crate) owner: Option<usize>,
}

/// A guest, where it has some pages, and whether it was told that they are private.
pub(crate) struct Holder<'a> {
    pub(crate) guest: &'a Space,
    pub(crate) gpa: Span<Gpa>,
    pub(crate) told: bool,
}

impl<'a> Part<'a> {
    /// Cuts a run of one state where what the guests say about it changes.
    pub(crate) fn all(rmp: &SystemRmp, guests: &[&'a Space], backing: &Backing, run: Span<Page>, state: PageState) -> Vec<Self> {
        let mut said = Vec::new();
        let mut cuts = vec![run.start()];
        for &guest in guests {
            for (pages, gpas) in guest.gpas_of(backing, run) {
                for (gpa, told) in guest.stage2().runs(gpas) {
                    let bytes: Span<Page> = pages.unindex::<Page>(PAGE_LG2).project(gpas, gpa);
                    let pages = bytes.index::<Page>(PAGE_LG2);
                    let after = pages.last().checked_add(1).filter(|after| run.contains(*after));
                    cuts.extend(after.into_iter().chain([pages.start()]));
                    said.push((pages, Holder { guest, gpa, told }));
                }
            }
        }
        cuts.sort_unstable();
        cuts.dedup();
        let ends = cuts.iter().skip(1).map(|next| Page::new(next.get() - 1)).chain([run.last()]);
        let spans = cuts.iter().zip(ends).map(|(start, last)| Span::of(*start, last));
        spans.map(|pages| Self::one(rmp, guests, backing, pages, state, &said)).collect()
    }

    fn one(
        rmp: &SystemRmp,
        guests: &[&'a Space],
        backing: &Backing,
        pages: Span<Page>,
        state: PageState,
        said: &[(Span<Page>, Holder<'a>)],
    ) -> Self {
        let here = said.iter().filter(|(span, _)| span.covers(pages));
        let holders: Vec<_> = here
            .map(|(span, holder)| {
                let gpa = holder.gpa.project(span.unindex(PAGE_LG2), pages.unindex::<Page>(PAGE_LG2));
                Holder { gpa, ..*holder }
            })
            .collect();
        let named = || {
            let asid = rmp.entry(backing.oa(pages.start())).asid();
            holders.iter().position(|holder| holder.guest.asid() == asid)
        };
        let owner = match guests.len() {
            _ if state != PageState::Private => None,
            // Whoever asks for one VM knows that nobody else has its memory.
            1 => (!holders.is_empty()).then_some(0),
            _ => holders.iter().position(|holder| holder.told).or_else(named),
        };
        Self { pages, holders, owner }
    }
}
