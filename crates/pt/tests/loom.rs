//! Every interleaving of a walk with each edit, on the toy format: two levels, four entries to a table.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test -p lockstep-pt --test loom --release`; without the flag this file is empty.
#![cfg(loom)]

use addr::{Iova, Lg2, Oa, SizeSet, Span};
use lockstep_pt::{Arena, AtomicU64, Gather, Perm, Stock, Table, Toy};
use loom::sync::Arc as LoomArc;
use loom::thread;
use std::sync::Arc;
use sync::Readers;

type Words = Box<[AtomicU64]>;

const GRANULE: u64 = 1 << 11;
const ITEM1: u64 = 4 * GRANULE;
const FRAMES: u64 = 1 << 40;
const OTHER_FRAMES: u64 = 2 << 40;
const DOMAIN: u32 = 1;

struct Rig {
    table: Table<Toy, Words>,
    arena: Arc<Arena<Words>>,
    readers: Arc<Readers>,
}

impl Rig {
    fn new() -> LoomArc<Self> {
        let words = (0..6 * 5).map(|_| AtomicU64::new(0)).collect::<Words>();
        let arena = Arena::new(words, Oa::new(1 << 20), 2);
        LoomArc::new(Self { table: Table::new(Arc::clone(&arena)).unwrap(), arena, readers: Arc::new(Readers::new()) })
    }

    fn stock(&self, tables: u32) -> Stock<Words> {
        let mut stock = Stock::new(&self.arena);
        stock.reserve(tables).unwrap();
        stock
    }

    fn map(&self, start: u64, len: u64, oa: u64, stock: &mut Stock<Words>) {
        let mut gather = Gather::new();
        self.table.map(span(start, len), Oa::new(oa), Perm::RW, SizeSet::ALL, stock, &mut gather).unwrap();
        self.finish(gather);
    }

    fn unmap(&self, start: u64, len: u64) {
        let mut gather = Gather::new();
        assert!(self.table.unmap(span(start, len), &mut gather).is_none());
        self.finish(gather);
    }

    fn finish(&self, gather: Gather) {
        gather.finish(&self.arena, |_| self.readers.grace(DOMAIN));
    }

    fn oa(&self, iova: u64) -> Option<u64> {
        self.table.walk(Iova::new(iova)).map(|leaf| leaf.oa_of(Iova::new(iova)).get())
    }

    /// What one guarded walk answers.
    fn guarded(&self, slot: &mut sync::Slot, iova: u64) -> Option<u64> {
        let _guard = slot.guard(DOMAIN);
        self.oa(iova)
    }
}

fn span(start: u64, len: u64) -> Span<Iova> {
    Span::from_len(Iova::new(start), len).unwrap()
}

fn explore(test: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(4);
    builder.check(test);
}

#[test]
fn walk_and_map() {
    explore(|| {
        let rig = Rig::new();
        let mut stock = rig.stock(3);
        rig.map(GRANULE, GRANULE, FRAMES + GRANULE, &mut stock);
        let writer = {
            let rig = rig.clone();
            thread::spawn(move || rig.map(2 * GRANULE, 2 * GRANULE, FRAMES + 2 * GRANULE, &mut stock))
        };
        assert_eq!(rig.oa(GRANULE), Some(FRAMES + GRANULE), "a neighbour was disturbed");
        let seen = rig.oa(3 * GRANULE);
        assert!(seen.is_none() || seen == Some(FRAMES + 3 * GRANULE), "{seen:x?}");
        writer.join().unwrap();
    });
}

#[test]
fn walk_and_unmap_of_a_table_that_is_used_again() {
    explore(|| {
        let rig = Rig::new();
        let mut stock = rig.stock(3);
        // A whole level-0 table under a level-1 slot; unmapping its span retires it, and the next map gets it back from the arena.
        rig.map(ITEM1, ITEM1, FRAMES + GRANULE, &mut stock);
        drop(stock);
        let mut slot = rig.readers.slot();
        let writer = {
            let rig = rig.clone();
            thread::spawn(move || {
                rig.unmap(ITEM1, ITEM1);
                let mut stock = Stock::new(&rig.arena);
                rig.map(2 * ITEM1, ITEM1, OTHER_FRAMES + GRANULE, &mut stock);
            })
        };
        let at = ITEM1 + GRANULE;
        let seen = rig.guarded(&mut slot, at);
        assert!(seen.is_none() || seen == Some(FRAMES + 2 * GRANULE), "a reader met a reused table: {seen:x?}");
        writer.join().unwrap();
    });
}

#[test]
fn walk_and_cut() {
    explore(|| {
        let rig = Rig::new();
        let mut stock = rig.stock(4);
        rig.map(0, ITEM1, FRAMES, &mut stock);
        let writer = {
            let rig = rig.clone();
            thread::spawn(move || rig.table.cut(span(GRANULE, GRANULE), SizeSet::ALL, &mut stock).unwrap())
        };
        for granule in [0, 1, 3] {
            assert_eq!(rig.oa(granule * GRANULE), Some(FRAMES + granule * GRANULE));
        }
        assert_eq!(writer.join().unwrap(), 1);
    });
}

#[test]
fn walk_and_cut_of_a_pair() {
    explore(|| {
        let rig = Rig::new();
        let mut stock = rig.stock(3);
        rig.map(0, 2 * GRANULE, FRAMES, &mut stock);
        let writer = {
            let rig = rig.clone();
            thread::spawn(move || rig.table.cut(span(GRANULE, GRANULE), SizeSet::ALL, &mut stock).unwrap())
        };
        for granule in [0, 1, 0] {
            assert_eq!(rig.oa(granule * GRANULE), Some(FRAMES + granule * GRANULE));
        }
        writer.join().unwrap();
    });
}

#[test]
fn walk_and_merge() {
    explore(|| {
        let rig = Rig::new();
        let mut stock = rig.stock(4);
        rig.map(0, ITEM1, FRAMES, &mut stock);
        rig.table.cut(span(GRANULE, GRANULE), SizeSet::ALL, &mut stock).unwrap();
        drop(stock);
        let mut slot = rig.readers.slot();
        let writer = {
            let rig = rig.clone();
            thread::spawn(move || {
                let mut gather = Gather::new();
                let merges = rig.table.merge(span(0, ITEM1), SizeSet::ALL, &mut gather);
                rig.finish(gather);
                // What was retired may be somebody else's now.
                let mut stock = Stock::new(&rig.arena);
                rig.map(2 * ITEM1, GRANULE, OTHER_FRAMES, &mut stock);
                merges
            })
        };
        for granule in [1, 3] {
            assert_eq!(rig.guarded(&mut slot, granule * GRANULE), Some(FRAMES + granule * GRANULE));
        }
        assert!(writer.join().unwrap() >= 1);
    });
}

#[test]
fn walk_and_top_growth() {
    explore(|| {
        let rig = Rig::new();
        let mut stock = rig.stock(4);
        rig.map(GRANULE, GRANULE, FRAMES, &mut stock);
        let writer = {
            let rig = rig.clone();
            thread::spawn(move || rig.map(2 * ITEM1, GRANULE, FRAMES + GRANULE, &mut stock))
        };
        assert_eq!(rig.oa(GRANULE), Some(FRAMES));
        let seen = rig.oa(2 * ITEM1);
        assert!(seen.is_none() || seen == Some(FRAMES + GRANULE));
        assert_eq!(rig.oa(GRANULE), Some(FRAMES));
        writer.join().unwrap();
    });
}

#[test]
fn two_maps_grow_and_install_at_once() {
    explore(|| {
        let rig = Rig::new();
        let mut first = rig.stock(2);
        let mut second = rig.stock(2);
        let writer = {
            let rig = rig.clone();
            thread::spawn(move || rig.map(ITEM1, GRANULE, FRAMES, &mut first))
        };
        rig.map(ITEM1 + GRANULE, GRANULE, OTHER_FRAMES, &mut second);
        writer.join().unwrap();
        assert_eq!((rig.oa(ITEM1), rig.oa(ITEM1 + GRANULE)), (Some(FRAMES), Some(OTHER_FRAMES)));
    });
}

#[test]
fn cut_and_cut() {
    explore(|| {
        let rig = Rig::new();
        let mut first = rig.stock(2);
        let mut second = rig.stock(2);
        rig.map(0, ITEM1, FRAMES, &mut first);
        let writer = {
            let rig = rig.clone();
            thread::spawn(move || rig.table.cut(span(0, GRANULE), SizeSet::ALL, &mut first).unwrap())
        };
        rig.table.cut(span(3 * GRANULE, GRANULE), SizeSet::ALL, &mut second).unwrap();
        writer.join().unwrap();
        let mut sizes = Vec::new();
        rig.table.leaves(Span::whole(), |leaf| sizes.push(leaf.size));
        assert_eq!(sizes, [Lg2(11); 4]);
        for granule in 0..4 {
            assert_eq!(rig.oa(granule * GRANULE), Some(FRAMES + granule * GRANULE));
        }
    });
}

#[test]
fn a_dirty_bit_survives_a_cut() {
    explore(|| {
        let rig = Rig::new();
        let mut stock = rig.stock(4);
        rig.map(0, ITEM1, FRAMES, &mut stock);
        let writer = {
            let rig = rig.clone();
            thread::spawn(move || rig.table.cut(span(GRANULE, GRANULE), SizeSet::ALL, &mut stock).unwrap())
        };
        assert!(rig.table.mark_dirty(Iova::new(GRANULE)));
        writer.join().unwrap();
        assert!(rig.table.walk(Iova::new(GRANULE)).unwrap().dirty, "the dirty bit is gone");
    });
}

#[test]
fn a_dirty_bit_survives_a_merge() {
    explore(|| {
        let rig = Rig::new();
        let mut stock = rig.stock(4);
        rig.map(0, ITEM1, FRAMES, &mut stock);
        rig.table.cut(span(0, GRANULE), SizeSet::ALL, &mut stock).unwrap();
        let mut slot = rig.readers.slot();
        let writer = {
            let rig = rig.clone();
            thread::spawn(move || {
                let mut gather = Gather::new();
                rig.table.merge(span(0, ITEM1), SizeSet::ALL, &mut gather);
                rig.finish(gather);
            })
        };
        {
            let _guard = slot.guard(DOMAIN);
            assert!(rig.table.mark_dirty(Iova::new(GRANULE)));
        }
        writer.join().unwrap();
        let mut dirty = false;
        rig.table.leaves(Span::whole(), |leaf| dirty |= leaf.dirty && leaf.span().contains(Iova::new(GRANULE)));
        assert!(dirty, "the dirty bit is gone");
    });
}
