//! Cached tables of one DMA context: where a walk begins after a miss. Private to the context, like its IOTLB.
//!
//! Hardware calls it a paging-structure cache (VT-d), page directory cache (AMD) or walk cache (Arm). An entry says which table serves a region,
//! so a walk in that region reads what is below and nothing above. It is small: one entry stands for as many leaves as a table has.
//!
//! An entry is right as long as its table is in the tree. Whoever takes a table out logs its region ([`pt::Gather::tables`]), and gives the
//! table away only after a grace period, so the entry is gone before the table is something else.

use addr::{Iova, Lg2, Span};
use pt::WalkEntry;

/// A cached table under its region: the region's first IOVA, and in the low bits, which that leaves free, its size. 0: empty.
#[derive(Clone, Copy)]
struct Entry {
    tag: u64,
    table: Option<WalkEntry>,
}

/// The smallest region of any format leaves these bits to the size.
const LG2: u64 = 0x3f;
const EMPTY: Entry = Entry { tag: 0, table: None };

/// Tables by the regions that they serve.
pub struct Walks {
    /// Each region has one place.
    entries: Box<[Entry]>,
    /// Sizes of regions that were put in since everything was dropped.
    sizes: u64,
    hits: u64,
}

impl Walks {
    /// Room for at least `entries` tables, 16 bytes each, rounded up to a power of two; none when 0.
    pub fn new(entries: usize) -> Self {
        let entries = if entries == 0 { 0 } else { entries.clamp(2, 1 << 20).next_power_of_two() };
        Self { entries: vec![EMPTY; entries].into_boxed_slice(), sizes: 0, hits: 0 }
    }

    /// Whether there is room for anything.
    #[inline]
    pub fn is_on(&self) -> bool {
        !self.entries.is_empty()
    }

    /// The lowest table that is known to serve `iova`.
    #[inline(always)]
    pub fn lookup(&mut self, iova: Iova) -> Option<WalkEntry> {
        let mut sizes = self.sizes;
        while sizes != 0 {
            let lg2 = sizes.trailing_zeros() as u8;
            sizes &= sizes - 1;
            let entry = &self.entries[self.place(iova, lg2)];
            if entry.tag == tag(iova, lg2) {
                self.hits += 1;
                return entry.table;
            }
        }
        None
    }

    /// Puts in the table that a walk of `iova` came by.
    #[inline]
    pub fn fill(&mut self, iova: Iova, table: WalkEntry) {
        let Lg2(lg2) = table.region();
        if self.is_on() && lg2 < 64 {
            self.sizes |= 1 << lg2;
            self.entries[self.place(iova, lg2)] = Entry { tag: tag(iova, lg2), table: Some(table) };
        }
    }

    /// Drops every table that serves any part of `region`.
    pub fn invalidate(&mut self, region: Span<Iova>) {
        for entry in &mut self.entries {
            let lg2 = (entry.tag & LG2) as u8;
            if lg2 != 0 && region.overlaps(Span::block(Iova::new(entry.tag & !LG2), lg2)) {
                *entry = EMPTY;
            }
        }
    }

    /// Drops everything.
    pub fn flush(&mut self) {
        if self.sizes != 0 {
            self.entries.fill(EMPTY);
            self.sizes = 0;
        }
    }

    /// Lookups that found a table.
    pub fn hits(&self) -> u64 {
        self.hits
    }

    /// Neighbouring regions never meet: that is what most devices work in, and nothing is quicker to find.
    #[inline(always)]
    fn place(&self, iova: Iova, lg2: u8) -> usize {
        (iova.get() >> lg2) as usize & (self.entries.len() - 1)
    }
}

#[inline(always)]
fn tag(iova: Iova, lg2: u8) -> u64 {
    iova.get() >> lg2 << lg2 | u64::from(lg2)
}

impl std::fmt::Debug for Walks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Walks").field("entries", &self.entries.len()).field("hits", &self.hits).finish_non_exhaustive()
    }
}
