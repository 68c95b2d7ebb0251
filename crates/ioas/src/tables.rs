//! How many tables a change can take at most, so that they are in stock before anything is changed.

use addr::{Iova, Oa, SizeSet, Span};
use iommu::IoTable;
use pt::{AmdV1, Format, Leaf};

/// Upper bound for mapping one contiguous run. A run that large leaves can fill needs small tables at its ends only.
pub(crate) fn for_run(table: &IoTable, iova: Span<Iova>, oa: Oa, sizes: SizeSet) -> u32 {
    let shared = (iova.start().get() ^ oa.get()).trailing_zeros().min(63) as u8;
    let sizes = sizes.and(AmdV1::SIZES).up_to(addr::Lg2(shared));
    let Some(largest) = sizes.largest() else { return 0 };
    let (_, top) = table.root();
    // A larger size only helps when the sizes in between lead up to it.
    let steps = (1..=AmdV1::level_of(largest)).take_while(|level| sizes.has(addr::Lg2(AmdV1::item_lg2(*level))));
    let bulk_level = steps.last().unwrap_or(0);
    let reach = |level: u8| AmdV1::item_lg2(level) + AmdV1::INDEX_LG2;
    let all = table.tables_for_map(iova);
    let ends: u32 = (0..bulk_level.min(top)).map(|_| 2).sum();
    let blocks = |level: u8| (iova.last().get() >> reach(level)) - (iova.start().get() >> reach(level)) + 1;
    let bulk: u64 = (bulk_level..top.max(AmdV1::START_LEVEL)).map(blocks).sum();
    // Growing the tree costs levels whatever is mapped: the rest of the general bound for one page.
    let growth = table.tables_for_map(Span::one(iova.last()));
    all.min(u32::try_from(bulk).unwrap_or(u32::MAX).saturating_add(ends).saturating_add(growth))
}

/// Whether a leaf sticks out of `part` at the low end, at the high end.
pub(crate) fn crossing(table: &IoTable, part: Span<Iova>) -> [Option<Leaf>; 2] {
    let sticks_out = |leaf: &Leaf| !part.covers(leaf.span());
    let low = table.walk(part.start()).filter(sticks_out);
    if low.is_some_and(|leaf| leaf.span().contains(part.last())) {
        return [low, None];
    }
    [low, table.walk(part.last()).filter(sticks_out)]
}
