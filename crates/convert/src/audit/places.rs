//! Where an area shows which pages, and the tables that translate there, read back.

use crate::raw_walk::{RawOddity, RawTree, read_tree};
use addr::{Address, Iova, PAGE_LG2, Page, Span};
use ioas::Area;
use iommu::Domain;

pub(super) fn read(domain: &Domain, within: Span<Iova>) -> RawTree {
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

/// Where an area shows pages. The first and the last may be shown in part.
pub(super) fn iova_of(area: &Area, pages: Span<Page>) -> Option<Span<Iova>> {
    let bytes: Span<Page> = pages.unindex(PAGE_LG2);
    let own = Span::of(Page::new(area.offset_bytes()), Page::new(area.offset_bytes() + area.span().last_offset()));
    Some(area.span().project(own, bytes.intersect(own)?))
}

/// Which pages an area shows there.
pub(super) fn pages_of(area: &Area, iova: Span<Iova>) -> Option<Span<Page>> {
    let part = iova.intersect(area.span())?;
    let offset = area.offset_bytes() + part.start().offset_from(area.span().start());
    Some(Span::of(Page::new(offset), Page::new(offset + part.last_offset())).index(PAGE_LG2))
}
