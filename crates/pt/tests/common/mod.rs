//! A tree with its arena and its writer's stock; what it is held against is in `model`.
#![allow(dead_code, reason = "each test file uses its own part of this module")]
#![allow(unreachable_pub, reason = "a module shared by test binaries")]

pub mod model;

use addr::{Address, Iova, Oa, SizeSet, Span};
use lockstep_pt::{Arena, AtomicU64, Config, Entry, Format, Gather, Leaf, MapError, Perm, Stock, Table, WalkEntry};
use std::cell::RefCell;
use std::collections::BTreeMap;
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
    /// What a walker without limits keeps, by region.
    walker: RefCell<BTreeMap<Span<Iova>, WalkEntry>>,
}

impl<F: Format> Tree<F> {
    pub fn new(arena: &Arc<Arena<Words>>) -> Self {
        Self::with(arena, Config { name: "plain", start_level: F::START_LEVEL, sizes: SizeSet::ALL })
    }

    pub fn with(arena: &Arc<Arena<Words>>, config: Config) -> Self {
        let table = Rc::new(Table::with_start(Arc::clone(arena), config.start_level).unwrap());
        Self { table, arena: Arc::clone(arena), stock: Stock::new(arena), sizes: config.sizes.and(F::SIZES), walker: RefCell::default() }
    }

    /// Every table of the tree, with the region that it serves: read from the bytes, as hardware reads them. The top is one, since a tree that
    /// grows may replace what was its top by a leaf.
    pub fn tables(&self) -> BTreeMap<Oa, Span<Iova>> {
        let (top, level) = self.table.root();
        let mut found = BTreeMap::from([(top, Span::of(Iova::new(0), F::reach(level)))]);
        self.tables_below(top, level, Iova::new(0), &mut found);
        found
    }

    fn tables_below(&self, table: Oa, level: u8, start: Iova, found: &mut BTreeMap<Oa, Span<Iova>>) {
        for slot in (0..1u64 << F::INDEX_LG2).take_while(|_| level > 0) {
            let entry = self.arena.peek(table.plus(slot * 8)).unwrap();
            if let Entry::Table(below) = F::decode(entry, level) {
                let region = Span::block(start.plus(slot << F::item_lg2(level)), F::item_lg2(level));
                assert!(found.insert(below, region).is_none(), "{}: two ways to the table at {below}", F::NAME);
                self.tables_below(below, level - 1, region.start(), found);
            }
        }
    }

    /// A walk from the top, and one from every table that a walker still keeps: all find the same. The tables that they came by are kept from now on.
    pub fn walk(&self, iova: Iova) -> Option<Leaf> {
        let leaf = self.table.walk(iova);
        let mut walker = self.walker.borrow_mut();
        let kept = walker.iter().filter(|(region, _)| region.contains(iova)).map(|(_, entry)| Some(*entry));
        let mut found = Vec::new();
        for from in kept.chain([None]) {
            let walked = self.table.walk_from(from, iova, |entry| found.push(entry));
            assert_eq!(walked, leaf, "{}: {iova} from {from:x?}", F::NAME);
        }
        walker.extend(found.into_iter().map(|entry| (Span::block(iova, entry.region().0), entry)));
        leaf
    }

    /// Ends an edit of `span`: whatever table it took out has its region named, and no region lies elsewhere. Answers how many tables went.
    pub fn finish(&self, gather: Gather, before: &BTreeMap<Oa, Span<Iova>>, span: Span<Iova>) -> usize {
        let after = self.tables();
        let regions: Vec<_> = gather.tables().collect();
        gather.finish(&self.arena, |_| {});
        let gone = before.iter().filter(|(at, _)| !after.contains_key(at)).map(|(_, region)| *region);
        for region in gone.clone() {
            assert!(regions.iter().any(|named| named.covers(region)), "{}: the table of {region} went unnamed: {regions:?}", F::NAME);
        }
        for named in &regions {
            assert!(span.covers(*named), "{}: {named} is named in an edit of {span}", F::NAME);
            assert!(gone.clone().any(|region| named.covers(region)), "{}: no table of {named} went", F::NAME);
        }
        let gone = gone.count();
        self.walker.borrow_mut().retain(|region, _| !regions.iter().any(|named| named.overlaps(*region)));
        gone
    }

    pub fn map(&mut self, span: Span<Iova>, oa: Oa, perm: Perm, sizes: SizeSet) -> Result<(), MapError> {
        let (before, mut gather) = (self.tables(), Gather::new());
        let result = self.table.map(span, oa, perm, sizes.and(self.sizes), &mut self.stock, &mut gather);
        self.finish(gather, &before, span);
        result
    }

    pub fn unmap(&self, span: Span<Iova>) -> Option<Leaf> {
        let (before, mut gather) = (self.tables(), Gather::new());
        let crossing = self.table.unmap(span, &mut gather);
        self.finish(gather, &before, span);
        crossing
    }

    pub fn cut(&mut self, span: Span<Iova>, sizes: SizeSet) {
        let before = self.tables();
        self.table.cut(span, sizes.and(self.sizes), &mut self.stock, flushed::<F>).unwrap();
        let after = self.tables();
        assert!(before.iter().all(|table| after.get(table.0) == Some(table.1)), "{}: a cut took a table out", F::NAME);
        for border in [Some(span.start()), span.last().checked_add(1)].into_iter().flatten() {
            let leaf = self.table.walk(border);
            assert!(leaf.is_none_or(|leaf| leaf.iova == border || leaf.size.0 == F::GRANULE_LG2), "{leaf:?} crosses {border}");
        }
    }

    pub fn merge(&self, span: Span<Iova>) {
        let (before, mut gather) = (self.tables(), Gather::new());
        self.table.merge(span, self.sizes, &mut gather, flushed::<F>);
        self.finish(gather, &before, span);
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
