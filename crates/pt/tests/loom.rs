//! Every interleaving of a walk with each edit, on the toy format: two levels, four entries to a table.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test -p lockstep-pt --test loom --release`; without the flag this file is empty.
#![cfg(loom)]

#[path = "loom_rig/mod.rs"]
mod rig;

use addr::{Iova, Lg2, SizeSet, Span};
use lockstep_pt::{Gather, Stock, Toy};
use loom::thread;
use rig::{DOMAIN, FRAMES, GRANULE, ITEM1, OTHER_FRAMES, beside, explore, span};

type Rig = rig::Rig<Toy>;

/// What the toy format never asks for.
fn no_flush(span: Span<Iova>) {
    panic!("a flush of {span} in the middle of an edit");
}

#[test]
fn walk_and_map() {
    explore(|| {
        let rig = Rig::new();
        let mut stock = rig.stock(3);
        rig.map(GRANULE, GRANULE, FRAMES + GRANULE, &mut stock);
        let reader = rig.clone();
        let read = move || {
            let seen = reader.oa(3 * GRANULE);
            assert!(seen.is_none() || seen == Some(FRAMES + 3 * GRANULE), "{seen:x?}");
            assert_eq!(reader.oa(GRANULE), Some(FRAMES + GRANULE), "a neighbour was disturbed");
        };
        beside(read, || rig.map(2 * GRANULE, 2 * GRANULE, FRAMES + 2 * GRANULE, &mut stock));
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
        let reader = rig.clone();
        let read = move || {
            let seen = reader.guarded(&mut slot, ITEM1 + GRANULE);
            assert!(seen.is_none() || seen == Some(FRAMES + 2 * GRANULE), "a reader met a reused table: {seen:x?}");
        };
        beside(read, || {
            rig.unmap(ITEM1, ITEM1);
            let mut stock = Stock::new(&rig.arena);
            rig.map(2 * ITEM1, ITEM1, OTHER_FRAMES + GRANULE, &mut stock);
        });
    });
}

#[test]
fn walk_and_cut() {
    explore(|| {
        let rig = Rig::new();
        let mut stock = rig.stock(4);
        rig.map(0, ITEM1, FRAMES, &mut stock);
        let reader = rig.clone();
        let read = move || {
            for granule in [0, 1, 3] {
                assert_eq!(reader.oa(granule * GRANULE), Some(FRAMES + granule * GRANULE));
            }
        };
        let ((), cuts) = beside(read, || rig.table.cut(span(GRANULE, GRANULE), SizeSet::ALL, &mut stock, no_flush).unwrap());
        assert_eq!(cuts, 1);
    });
}

#[test]
fn walk_and_cut_of_a_pair() {
    explore(|| {
        let rig = Rig::new();
        let mut stock = rig.stock(3);
        rig.map(0, 2 * GRANULE, FRAMES, &mut stock);
        let reader = rig.clone();
        let read = move || {
            for granule in [0, 1, 0] {
                assert_eq!(reader.oa(granule * GRANULE), Some(FRAMES + granule * GRANULE));
            }
        };
        beside(read, || rig.table.cut(span(GRANULE, GRANULE), SizeSet::ALL, &mut stock, no_flush).unwrap());
    });
}

#[test]
fn walk_and_merge() {
    explore(|| {
        let rig = Rig::new();
        let mut stock = rig.stock(4);
        rig.map(0, ITEM1, FRAMES, &mut stock);
        rig.table.cut(span(GRANULE, GRANULE), SizeSet::ALL, &mut stock, no_flush).unwrap();
        drop(stock);
        let mut slot = rig.readers.slot();
        let reader = rig.clone();
        let read = move || {
            for granule in [1, 3] {
                assert_eq!(reader.guarded(&mut slot, granule * GRANULE), Some(FRAMES + granule * GRANULE));
            }
        };
        let ((), merges) = beside(read, || {
            let mut gather = Gather::new();
            let merges = rig.table.merge(span(0, ITEM1), SizeSet::ALL, &mut gather, no_flush);
            rig.finish(gather);
            // What was retired may be somebody else's now.
            let mut stock = Stock::new(&rig.arena);
            rig.map(2 * ITEM1, GRANULE, OTHER_FRAMES, &mut stock);
            merges
        });
        assert!(merges >= 1);
    });
}

#[test]
fn walk_and_top_growth() {
    explore(|| {
        let rig = Rig::new();
        let mut stock = rig.stock(4);
        rig.map(GRANULE, GRANULE, FRAMES, &mut stock);
        let reader = rig.clone();
        let read = move || {
            assert_eq!(reader.oa(GRANULE), Some(FRAMES));
            let seen = reader.oa(2 * ITEM1);
            assert!(seen.is_none() || seen == Some(FRAMES + GRANULE));
            assert_eq!(reader.oa(GRANULE), Some(FRAMES));
        };
        beside(read, || rig.map(2 * ITEM1, GRANULE, FRAMES + GRANULE, &mut stock));
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
            thread::spawn(move || rig.table.cut(span(0, GRANULE), SizeSet::ALL, &mut first, no_flush).unwrap())
        };
        rig.table.cut(span(3 * GRANULE, GRANULE), SizeSet::ALL, &mut second, no_flush).unwrap();
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
        let reader = rig.clone();
        let mark = move || assert!(reader.table.mark_dirty(Iova::new(GRANULE)));
        beside(mark, || rig.table.cut(span(GRANULE, GRANULE), SizeSet::ALL, &mut stock, no_flush).unwrap());
        assert!(rig.table.walk(Iova::new(GRANULE)).unwrap().dirty, "the dirty bit is gone");
    });
}

#[test]
fn a_dirty_bit_survives_a_merge() {
    explore(|| {
        let rig = Rig::new();
        let mut stock = rig.stock(4);
        rig.map(0, ITEM1, FRAMES, &mut stock);
        rig.table.cut(span(0, GRANULE), SizeSet::ALL, &mut stock, no_flush).unwrap();
        let mut slot = rig.readers.slot();
        let reader = rig.clone();
        let mark = move || {
            let _guard = slot.guard(DOMAIN);
            assert!(reader.table.mark_dirty(Iova::new(GRANULE)));
        };
        beside(mark, || {
            let mut gather = Gather::new();
            rig.table.merge(span(0, ITEM1), SizeSet::ALL, &mut gather, no_flush);
            rig.finish(gather);
        });
        let mut dirty = false;
        rig.table.leaves(Span::whole(), |leaf| dirty |= leaf.dirty && leaf.span().contains(Iova::new(GRANULE)));
        assert!(dirty, "the dirty bit is gone");
    });
}
