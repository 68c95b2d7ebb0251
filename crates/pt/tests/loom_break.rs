//! The same toy, for hardware that needs break-before-make: a leaf that changes is hidden, and nothing else than that moment is seen.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test -p lockstep-pt --test loom_break --release`; without the flag this file is empty.
#![cfg(loom)]

#[path = "loom_rig/mod.rs"]
mod rig;

use addr::{Iova, SizeSet, Span};
use lockstep_pt::{Gather, ToyBreaking};
use loom::thread;
use rig::{DOMAIN, FRAMES, GRANULE, ITEM1, beside, explore, span};

type Rig = rig::Rig<ToyBreaking>;

/// Every granule from `from` to 3 translates as it was mapped, and nothing is left hidden.
fn stands(rig: &Rig, from: u64) {
    for granule in from..4 {
        assert_eq!(rig.oa(granule * GRANULE), Some(FRAMES + granule * GRANULE), "granule {granule}");
    }
}

/// A device writes, if it finds the leaf; answers whether it did.
fn writes(rig: &Rig, slot: &mut sync::Slot) -> bool {
    let _guard = slot.guard(DOMAIN);
    let wrote = rig.oa(GRANULE).is_some();
    assert!(!wrote || rig.table.mark_dirty(Iova::new(GRANULE)), "a write that nobody will know of");
    wrote
}

#[test]
fn a_walk_beside_a_cut_finds_the_truth_or_nothing() {
    explore(|| {
        let rig = Rig::new();
        let mut stock = rig.stock(3);
        rig.map(0, ITEM1, FRAMES, &mut stock);
        let mut slot = rig.readers.slot();
        let reader = rig.clone();
        let read = move || {
            for granule in [1, 3] {
                let seen = reader.guarded(&mut slot, granule * GRANULE);
                assert!(seen.is_none() || seen == Some(FRAMES + granule * GRANULE), "{seen:x?}");
            }
        };
        assert_eq!(beside(read, || rig.cut(GRANULE, GRANULE, &mut stock)).1, 1);
        stands(&rig, 0);
    });
}

/// A device that was let through before the leaf was hidden notes its write, wherever the leaf is by then.
#[test]
fn a_dirty_bit_survives_a_cut() {
    explore(|| {
        let rig = Rig::new();
        let mut stock = rig.stock(3);
        rig.map(0, ITEM1, FRAMES, &mut stock);
        let mut slot = rig.readers.slot();
        let device = rig.clone();
        let write = move || writes(&device, &mut slot);
        let (wrote, _) = beside(write, || rig.cut(GRANULE, GRANULE, &mut stock));
        assert!(!wrote || rig.table.walk(Iova::new(GRANULE)).unwrap().dirty, "the dirty bit is gone");
    });
}

#[test]
fn a_dirty_bit_survives_a_merge() {
    explore(|| {
        let rig = Rig::new();
        let mut stock = rig.stock(3);
        rig.map(0, ITEM1, FRAMES, &mut stock);
        rig.cut(0, GRANULE, &mut stock);
        let mut slot = rig.readers.slot();
        let device = rig.clone();
        let write = move || writes(&device, &mut slot);
        let (wrote, ()) = beside(write, || {
            let mut gather = Gather::new();
            rig.table.merge(span(0, ITEM1), SizeSet::ALL, &mut gather, |_| rig.readers.grace(DOMAIN));
            rig.finish(gather);
        });
        let mut dirty = false;
        rig.table.leaves(Span::whole(), |leaf| dirty |= leaf.dirty && leaf.span().contains(Iova::new(GRANULE)));
        assert!(!wrote || dirty, "the dirty bit is gone");
        stands(&rig, 0);
    });
}

/// Both hold a part of one leaf. What one of them unmaps must not come back when the other goes on.
#[test]
fn cut_and_cut_that_unmaps() {
    explore(|| {
        let rig = Rig::new();
        let mut first = rig.stock(2);
        let mut second = rig.stock(2);
        rig.map(0, ITEM1, FRAMES, &mut first);
        let writer = {
            let rig = rig.clone();
            thread::spawn(move || rig.cut(3 * GRANULE, GRANULE, &mut first))
        };
        rig.cut(0, GRANULE, &mut second);
        rig.unmap(0, GRANULE);
        writer.join().unwrap();
        assert_eq!(rig.oa(0), None, "an unmapped part came back");
        stands(&rig, 1);
    });
}

#[test]
fn two_cuts_of_a_pair() {
    explore(|| {
        let rig = Rig::new();
        let mut first = rig.stock(1);
        let mut second = rig.stock(1);
        rig.map(0, ITEM1, FRAMES, &mut first);
        rig.cut(2 * GRANULE, 2 * GRANULE, &mut second);
        let writer = {
            let rig = rig.clone();
            thread::spawn(move || rig.cut(3 * GRANULE, GRANULE, &mut first))
        };
        rig.cut(2 * GRANULE, GRANULE, &mut second);
        rig.unmap(2 * GRANULE, GRANULE);
        writer.join().unwrap();
        assert_eq!(rig.oa(2 * GRANULE), None, "an unmapped part came back");
        stands(&rig, 3);
    });
}
