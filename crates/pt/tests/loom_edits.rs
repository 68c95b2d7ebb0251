//! Writers with writers, and a reader beside them: every pair of edits that may meet (design D-3), on the toy formats. Each scenario can be
//! run with the fault that it is there for, and then some interleaving must show it.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test -p lockstep-pt --test loom_edits --release`; without the flag this file is empty.
#![cfg(loom)]

#[path = "loom_rig/mod.rs"]
mod rig;

use addr::{Iova, Lg2, Page, SizeSet, Span};
use lockstep_pt::{Format, Gather, Stock, Toy, ToyBreaking};
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use rig::{DOMAIN, FRAMES, Findings, GRANULE, ITEM1, OTHER_FRAMES, Rig, finds, holds, reader, span};
use sync::SpanLock;

/// The sizes of all leaves, in order.
fn sizes<F: Format>(rig: &Rig<F>) -> Vec<u8> {
    let mut sizes = Vec::new();
    rig.table.leaves(Span::whole(), |leaf| sizes.push(leaf.size.0));
    sizes
}

/// A map and an unmap in neighbouring slots of one table. The fault: the unmap takes a slot more than its caller holds.
fn map_and_unmap_in_one_table<F: Format>(findings: Findings) {
    let rig = Rig::<F>::new();
    let mut stock = rig.stock(3);
    rig.map(ITEM1, GRANULE, FRAMES, &mut stock);
    rig.map(ITEM1 + 2 * GRANULE, GRANULE, FRAMES + 2 * GRANULE, &mut stock);
    let mut slot = rig.readers.slot();
    let unmaps = {
        let (rig, len) = (rig.clone(), if findings.planted { 2 * GRANULE } else { GRANULE });
        thread::spawn(move || rig.unmap(ITEM1, len))
    };
    let maps = {
        let rig = rig.clone();
        thread::spawn(move || rig.map(ITEM1 + GRANULE, GRANULE, OTHER_FRAMES, &mut stock))
    };
    let reads = reader(&rig, &findings, move |rig, findings| {
        let seen = rig.guarded(&mut slot, ITEM1 + 2 * GRANULE);
        findings.check(seen == Some(FRAMES + 2 * GRANULE), "a neighbour was disturbed");
    });
    unmaps.join().unwrap();
    maps.join().unwrap();
    reads.join().unwrap();
    let seen = [0, 1, 2].map(|granule| rig.oa(ITEM1 + granule * GRANULE));
    findings.check(seen == [None, Some(OTHER_FRAMES), Some(FRAMES + 2 * GRANULE)], format!("{seen:x?}"));
}

#[test]
fn map_beside_unmap() {
    holds(3, map_and_unmap_in_one_table::<Toy>);
}

#[test]
fn an_unmap_of_too_much_is_found() {
    finds(2, map_and_unmap_in_one_table::<Toy>);
}

/// An unmap that retires a table, and a map that hangs one into the next slot of the same parent and may be given the same table by the
/// arena. The fault: the table goes back to the arena without a grace period.
fn retire_beside_a_new_table<F: Format>(findings: Findings) {
    let rig = Rig::<F>::new();
    // Not aligned to a larger leaf, so granule by granule.
    rig.map(ITEM1, ITEM1, FRAMES + GRANULE, &mut rig.stock(3));
    let mut slot = rig.readers.slot();
    let unmaps = {
        let (rig, planted) = (rig.clone(), findings.planted);
        thread::spawn(move || {
            let mut gather = Gather::new();
            rig.table.unmap(span(ITEM1, ITEM1), &mut gather);
            gather.finish(&rig.arena, |_| {
                if !planted {
                    rig.readers.grace(DOMAIN)
                }
            });
        })
    };
    let maps = {
        let rig = rig.clone();
        thread::spawn(move || rig.map(2 * ITEM1, ITEM1, OTHER_FRAMES + GRANULE, &mut Stock::new(&rig.arena)))
    };
    let reads = reader(&rig, &findings, move |rig, findings| {
        let seen = rig.guarded(&mut slot, ITEM1 + GRANULE);
        findings.check(seen.is_none() || seen == Some(FRAMES + 2 * GRANULE), format!("a reader met a reused table: {seen:x?}"));
    });
    unmaps.join().unwrap();
    maps.join().unwrap();
    reads.join().unwrap();
    let seen = [ITEM1 + GRANULE, 2 * ITEM1 + GRANULE].map(|at| rig.oa(at));
    findings.check(seen == [None, Some(OTHER_FRAMES + 2 * GRANULE)], format!("{seen:x?}"));
}

#[test]
fn a_retired_table_beside_a_new_one() {
    holds(3, retire_beside_a_new_table::<Toy>);
}

#[test]
fn a_missing_grace_period_is_found() {
    finds(3, retire_beside_a_new_table::<Toy>);
}

/// The tree grows on top while a leaf below is cut: both must be there afterwards, whichever top the cut began at.
fn growth_and_cut<F: Format>(findings: Findings) {
    let rig = Rig::<F>::new();
    let mut stock = rig.stock(3);
    rig.map(0, 2 * GRANULE, FRAMES, &mut stock);
    let mut slot = rig.readers.slot();
    let grows = {
        let rig = rig.clone();
        thread::spawn(move || rig.map(2 * ITEM1, GRANULE, OTHER_FRAMES, &mut stock))
    };
    let cuts = {
        let rig = rig.clone();
        thread::spawn(move || rig.cut(GRANULE, GRANULE, &mut rig.stock(0)))
    };
    let reads = reader(&rig, &findings, move |rig, findings| {
        for granule in [1, 0] {
            let seen = rig.guarded(&mut slot, granule * GRANULE);
            findings.check(rig.is_true(granule, seen), format!("granule {granule} answers {seen:x?}"));
        }
    });
    grows.join().unwrap();
    reads.join().unwrap();
    findings.check(cuts.join().unwrap() == 1, "nothing was cut");
    findings.check(sizes(&rig) == [11, 11, 11], format!("{:?}", sizes(&rig)));
    let seen = [0, GRANULE, 2 * ITEM1].map(|at| rig.oa(at));
    findings.check(seen == [Some(FRAMES), Some(FRAMES + GRANULE), Some(OTHER_FRAMES)], format!("{seen:x?}"));
}

#[test]
fn the_top_grows_while_a_leaf_is_cut() {
    holds(3, growth_and_cut::<Toy>);
}

#[test]
fn the_top_grows_while_a_leaf_is_broken() {
    holds(3, growth_and_cut::<ToyBreaking>);
}

/// One thread cuts a leaf to have the first granule alone; another holds the last one, has no table to cut with, and sheds. The fault: it takes
/// the whole leaf by a plain unmap, as if it held all of it.
fn cut_and_shed<F: Format>(findings: Findings) {
    let rig = Rig::<F>::new();
    let mut stock = rig.stock(3);
    rig.map(0, ITEM1, FRAMES, &mut stock);
    let sheds = {
        let (rig, planted) = (rig.clone(), findings.planted);
        thread::spawn(move || {
            let mut gather = Gather::new();
            if planted {
                rig.table.unmap(span(0, ITEM1), &mut gather);
            } else {
                rig.table.shed(Iova::new(3 * GRANULE), &mut gather);
            }
            rig.finish(gather);
        })
    };
    let cuts = rig.cut(0, GRANULE, &mut stock);
    // Once cut out, the first granule is this thread's alone.
    findings.check(cuts == 0 || rig.oa(0) == Some(FRAMES), "a leaf went that was cut out before");
    sheds.join().unwrap();
    findings.check(cuts == 0 || rig.oa(0) == Some(FRAMES), "a leaf went that was cut out before");
    findings.check(rig.oa(3 * GRANULE).is_none(), "what was shed is still there");
    findings.check((cuts == 0) == rig.oa(0).is_none(), "the first granule is neither cut out nor shed");
}

#[test]
fn cut_beside_shed() {
    holds(4, cut_and_shed::<Toy>);
    holds(3, cut_and_shed::<ToyBreaking>);
}

#[test]
fn a_leaf_taken_by_who_does_not_hold_it_is_found() {
    finds(3, cut_and_shed::<Toy>);
}

/// The same over a leaf of two slots, which go one by one.
fn cut_and_shed_of_a_pair<F: Format>(findings: Findings) {
    let rig = Rig::<F>::new();
    let mut stock = rig.stock(2);
    rig.map(0, 2 * GRANULE, FRAMES, &mut stock);
    let sheds = {
        let rig = rig.clone();
        thread::spawn(move || {
            let mut gather = Gather::new();
            rig.table.shed(Iova::new(GRANULE), &mut gather);
            rig.finish(gather);
        })
    };
    rig.cut(0, GRANULE, &mut stock);
    sheds.join().unwrap();
    let seen = [rig.oa(0), rig.oa(GRANULE)];
    findings.check(seen[0].is_none() || seen[0] == Some(FRAMES), format!("{seen:x?}"));
    findings.check(seen[1].is_none(), "what was shed is still there");
}

#[test]
fn cut_beside_shed_of_a_pair() {
    holds(4, cut_and_shed_of_a_pair::<Toy>);
    holds(3, cut_and_shed_of_a_pair::<ToyBreaking>);
}

/// A merge and a cut of neighbouring pairs in one table, each under its own span. The fault: the merge is asked for more than is held.
fn merge_and_cut_of_neighbours<F: Format>(findings: Findings) {
    let rig = Rig::<F>::new();
    let mut stock = rig.stock(2);
    for (start, len) in [(0, GRANULE), (GRANULE, GRANULE), (2 * GRANULE, 2 * GRANULE)] {
        rig.map(start, len, FRAMES + start, &mut stock);
    }
    let mut slot = rig.readers.slot();
    let merges = {
        let (rig, held) = (rig.clone(), if findings.planted { ITEM1 } else { 2 * GRANULE });
        thread::spawn(move || {
            let mut gather = Gather::new();
            rig.table.merge(span(0, held), SizeSet::ALL, &mut gather, |_| rig.readers.grace(DOMAIN));
            rig.finish(gather);
        })
    };
    let cuts = {
        let rig = rig.clone();
        thread::spawn(move || {
            rig.cut(3 * GRANULE, GRANULE, &mut stock);
            rig.unmap(3 * GRANULE, GRANULE);
        })
    };
    let reads = reader(&rig, &findings, move |rig, findings| {
        for granule in [1, 2] {
            let seen = rig.guarded(&mut slot, granule * GRANULE);
            findings.check(rig.is_true(granule, seen), format!("granule {granule} answers {seen:x?}"));
        }
    });
    merges.join().unwrap();
    cuts.join().unwrap();
    reads.join().unwrap();
    findings.check(sizes(&rig) == [12, 11], format!("{:?}", sizes(&rig)));
    findings.check(rig.oa(3 * GRANULE).is_none(), "an unmapped granule came back");
}

#[test]
fn merge_beside_cut() {
    holds(3, merge_and_cut_of_neighbours::<Toy>);
}

#[test]
fn a_merge_of_too_much_is_found() {
    finds(2, merge_and_cut_of_neighbours::<Toy>);
}

/// The protocol of D-3: a merge holds the whole span of the leaf that it makes, a revocation the pages that it takes, both in the span lock of
/// the pages. What was revoked stays gone, and no reader is on it when its frame is given back. The fault: the merge holds one page only.
fn merge_and_revoke<F: Format>(findings: Findings) {
    let pages = |first: u64, last: u64| Span::of(Page::new(first), Page::new(last));
    let rig = Rig::<F>::new();
    let lock = Arc::new(SpanLock::<Page>::new());
    let given_back = Arc::new(AtomicU64::new(0));
    let mut stock = rig.stock(4);
    rig.map(0, ITEM1, FRAMES, &mut stock);
    rig.cut(0, GRANULE, &mut stock);
    let mut slot = rig.readers.slot();
    let merges = {
        let (rig, lock, last) = (rig.clone(), lock.clone(), if findings.planted { 0 } else { 3 });
        thread::spawn(move || {
            let held = lock.lock(pages(0, last));
            let mut gather = Gather::new();
            rig.table.merge(span(0, ITEM1), SizeSet::ALL, &mut gather, |_| rig.readers.grace(DOMAIN));
            rig.finish(gather);
            drop(held);
        })
    };
    let revokes = {
        let (rig, given_back, findings) = (rig.clone(), given_back.clone(), findings.clone());
        thread::spawn(move || {
            let held = lock.lock(pages(2, 2));
            rig.cut(2 * GRANULE, GRANULE, &mut stock);
            let mut gather = Gather::new();
            let crossing = rig.table.unmap(span(2 * GRANULE, GRANULE), &mut gather);
            rig.finish(gather);
            findings.check(crossing.is_none(), "a leaf crosses what was cut out");
            given_back.store(1, Ordering::Relaxed);
            drop(held);
        })
    };
    let reads = reader(&rig, &findings, move |rig, findings| {
        let _guard = slot.guard(DOMAIN);
        let seen = rig.oa(2 * GRANULE);
        findings.check(seen.is_none() || seen == Some(FRAMES + 2 * GRANULE), format!("{seen:x?}"));
        findings.check(seen.is_none() || given_back.load(Ordering::Relaxed) == 0, "a reader is on a page that was given back");
    });
    merges.join().unwrap();
    revokes.join().unwrap();
    reads.join().unwrap();
    findings.check(rig.oa(2 * GRANULE).is_none(), "a revoked page came back");
    for granule in [0, 1, 3] {
        findings.check(rig.oa(granule * GRANULE) == Some(FRAMES + granule * GRANULE), "a page went that nobody took");
    }
}

#[test]
fn merge_with_revoke() {
    holds(3, merge_and_revoke::<Toy>);
}

#[test]
fn merge_with_revoke_where_leaves_are_broken() {
    holds(2, merge_and_revoke::<ToyBreaking>);
}

#[test]
fn a_merge_without_the_lock_is_found() {
    finds(2, merge_and_revoke::<Toy>);
}

/// A merge beside the map of a table in the next slot of the parent, and a reader across both.
fn merge_and_map_of_neighbours<F: Format>(findings: Findings) {
    let rig = Rig::<F>::new();
    let mut stock = rig.stock(3);
    rig.map(0, ITEM1, FRAMES, &mut stock);
    rig.cut(0, GRANULE, &mut stock);
    drop(stock);
    let mut slot = rig.readers.slot();
    let merges = {
        let rig = rig.clone();
        thread::spawn(move || {
            let mut gather = Gather::new();
            rig.table.merge(span(0, ITEM1), SizeSet::ALL, &mut gather, |_| rig.readers.grace(DOMAIN));
            rig.finish(gather);
        })
    };
    let maps = {
        let rig = rig.clone();
        thread::spawn(move || rig.map(ITEM1, GRANULE, OTHER_FRAMES, &mut Stock::new(&rig.arena)))
    };
    let reads = reader(&rig, &findings, move |rig, findings| {
        let seen = rig.guarded(&mut slot, GRANULE);
        findings.check(rig.is_true(1, seen), format!("{seen:x?}"));
    });
    merges.join().unwrap();
    maps.join().unwrap();
    reads.join().unwrap();
    findings.check(sizes(&rig) == [Lg2(13).0, 11], format!("{:?}", sizes(&rig)));
    findings.check(rig.oa(ITEM1) == Some(OTHER_FRAMES), "the map is gone");
}

#[test]
fn merge_beside_map() {
    holds(3, merge_and_map_of_neighbours::<Toy>);
}
