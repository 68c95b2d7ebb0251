//! How many tables a change can take at most, so that they are in stock before anything is changed.

use addr::{Address, Iova, Lg2, Oa, PAGE_BYTES, SizeSet, Span};
use iommu::{Domain, IoTable};
use pt::{Entry, FormatKind, Leaf};

/// An upper bound for mapping the runs of one span, counted run by run.
#[derive(Clone, Copy)]
pub(crate) struct Need {
    format: FormatKind,
    /// The leaf sizes that the domain has.
    sizes: SizeSet,
    /// The level of the top table now.
    top: u8,
    /// What mapping the span can take in the worst case, whatever its runs are.
    most: u32,
    sum: u32,
    grows: bool,
}

impl Need {
    pub(crate) fn new(domain: &Domain, span: Span<Iova>) -> Self {
        let table = domain.table();
        let (format, sizes) = (domain.format(), domain.sizes());
        Self { format, sizes, top: table.root().1, most: table.tables_for_map(span), sum: 0, grows: false }
    }

    /// Adds a contiguous run. What large leaves can fill needs small tables at its ends only.
    pub(crate) fn add(&mut self, iova: Span<Iova>, oa: Oa, sizes: SizeSet) {
        let shared = (iova.start().get() ^ oa.get()).trailing_zeros().min(63) as u8;
        let fits = 63 - iova.len().leading_zeros() as u8;
        let format = self.format;
        let sizes = below_page_too(sizes).and(self.sizes).up_to(Lg2(shared.min(fits)));
        let Some(largest) = sizes.largest() else { return };
        // A larger size only helps when the sizes in between lead up to it.
        let steps = (1..=format.level_of(largest)).take_while(|level| sizes.has(Lg2(format.item_lg2(*level))));
        let bulk = steps.last().unwrap_or(0);
        let reach = format.item_lg2(self.top + 1);
        self.grows |= bulk > self.top || reach < 64 && iova.last().get() >> reach != 0;
        let blocks = |lg2: u8| (iova.last().get() >> lg2) - (iova.start().get() >> lg2) + 1;
        let whole: u64 = (bulk..self.top).map(|level| blocks(format.item_lg2(level + 1))).sum();
        // Below, only blocks that the run covers in part are filled with small leaves.
        let end = Iova::new(iova.last().get().wrapping_add(1));
        let partial = |lg2: u8| (u64::from(!iova.start().is_aligned(lg2)) + u64::from(!end.is_aligned(lg2))).min(blocks(lg2));
        let ends: u64 = (0..bulk).map(|level| partial(format.item_lg2(level + 1))).sum();
        self.sum = self.sum.saturating_add(u32::try_from(whole + ends).unwrap_or(u32::MAX));
    }

    /// Whether more runs cannot add anything.
    pub(crate) fn is_full(&self) -> bool {
        self.sum >= self.most
    }

    pub(crate) fn tables(&self) -> u32 {
        // For each level on top one table, and one beside it for what was there before.
        let growth = if self.grows { 2 * u32::from(self.format.max_level() - self.top) } else { 0 };
        self.sum.saturating_add(growth).min(self.most)
    }
}

/// The leaf sizes that a rule's answer comes to in a domain. Where an area begins or ends inside a page, no rule is asked about the smaller
/// leaves that this takes; a domain whose smallest leaf is a page has none.
pub(crate) fn leaf_sizes(domain: &Domain, rule: SizeSet) -> SizeSet {
    below_page_too(rule).and(domain.sizes())
}

fn below_page_too(sizes: SizeSet) -> SizeSet {
    SizeSet(sizes.0 | (PAGE_BYTES - 1))
}

/// How many tables are missing on the way to a smallest leaf at `at`.
pub(crate) fn missing(table: &IoTable, at: Iova) -> u32 {
    let (mut oa, mut level) = table.root();
    let format = table.format();
    if Span::block(Iova::new(0), format.item_lg2(level + 1)).contains(at) {
        while level > 0 {
            let entry = table.arena().peek(oa.plus(8 * format.slot(at, level) as u64));
            match entry.map(|entry| format.decode(entry, level)) {
                Some(Entry::Table(below)) => (oa, level) = (below, level - 1),
                _ => return level.into(),
            }
        }
        return 0;
    }
    table.tables_for_map(Span::one(at))
}

/// Whether a leaf sticks out of `part` at the low end, at the high end.
pub(crate) fn crossing(table: &IoTable, part: Span<Iova>) -> [Option<Leaf>; 2] {
    let sticks_out = |leaf: &Leaf| !part.covers(leaf.span());
    let low = table.leaf_at(part.start()).filter(sticks_out);
    if low.is_some_and(|leaf| leaf.span().contains(part.last())) {
        return [low, None];
    }
    [low, table.leaf_at(part.last()).filter(sticks_out)]
}
