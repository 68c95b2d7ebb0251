//! A tree with its arena and its writer's stock; what it is held against is in `model`.
#![allow(dead_code, reason = "each test file uses its own part of this module")]
#![allow(unreachable_pub, reason = "a module shared by test binaries")]

pub mod model;

use addr::{Address, Iova, Oa, SizeSet, Span};
use lockstep_pt::{Arena, AtomicU64, Config, Format, Gather, Leaf, MapError, Perm, Stock, Table};
use std::rc::Rc;
use std::sync::Arc;

pub type Words = Box<[AtomicU64]>;

pub fn arena<F: Format>(tables: usize) -> Arc<Arena<Words>> {
    let words = (0..tables * ((1 << F::INDEX_LG2) + 1)).map(|_| AtomicU64::new(0)).collect();
    Arena::new(words, Oa::new(1 << 30), F::INDEX_LG2)
}

/// The sizes that fill one slot.
pub fn single_slot_sizes<F: Format>() -> SizeSet {
    SizeSet((0..=F::MAX_LEVEL).map(|level| 1u64 << F::item_lg2(level)).sum()).and(F::SIZES)
}

pub struct Tree<F: Format> {
    pub table: Rc<Table<F, Words>>,
    pub arena: Arc<Arena<Words>>,
    pub stock: Stock<Words>,
    /// No leaf is of another size.
    pub sizes: SizeSet,
}

impl<F: Format> Tree<F> {
    pub fn new(arena: &Arc<Arena<Words>>) -> Self {
        Self::with(arena, Config { name: "plain", start_level: F::START_LEVEL, sizes: SizeSet::ALL })
    }

    pub fn with(arena: &Arc<Arena<Words>>, config: Config) -> Self {
        let table = Rc::new(Table::with_start(Arc::clone(arena), config.start_level).unwrap());
        Self { table, arena: Arc::clone(arena), stock: Stock::new(arena), sizes: config.sizes.and(F::SIZES) }
    }

    pub fn map(&mut self, span: Span<Iova>, oa: Oa, perm: Perm, sizes: SizeSet) -> Result<(), MapError> {
        let mut gather = Gather::new();
        let result = self.table.map(span, oa, perm, sizes.and(self.sizes), &mut self.stock, &mut gather);
        gather.finish(&self.arena, |_| {});
        result
    }

    pub fn unmap(&self, span: Span<Iova>) -> Option<Leaf> {
        let mut gather = Gather::new();
        let crossing = self.table.unmap(span, &mut gather);
        gather.finish(&self.arena, |_| {});
        crossing
    }

    pub fn cut(&mut self, span: Span<Iova>, sizes: SizeSet) {
        self.table.cut(span, sizes.and(self.sizes), &mut self.stock, flushed::<F>).unwrap();
        for border in [Some(span.start()), span.last().checked_add(1)].into_iter().flatten() {
            let leaf = self.table.walk(border);
            assert!(leaf.is_none_or(|leaf| leaf.iova == border || leaf.size.0 == F::GRANULE_LG2), "{leaf:?} crosses {border}");
        }
    }

    pub fn merge(&self, span: Span<Iova>) {
        let mut gather = Gather::new();
        self.table.merge(span, self.sizes, &mut gather, flushed::<F>);
        gather.finish(&self.arena, |_| {});
    }

    pub fn read_dirty(&self, span: Span<Iova>, clear: bool) -> Vec<Span<Iova>> {
        let (mut gather, mut found) = (Gather::new(), Vec::new());
        self.table.read_dirty(span, clear, &mut gather, |span| found.push(span));
        gather.finish(&self.arena, |_| {});
        found
    }
}

/// The flush of a test that has no readers. No format that changes in place asks for it.
pub fn flushed<F: Format>(span: Span<Iova>) {
    assert!(!F::HITLESS.is_allowed(), "{}: a flush of {span} in the middle of an edit", F::NAME);
}
