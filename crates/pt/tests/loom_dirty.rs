//! Dirty bits with everything that may happen to the leaf meanwhile: a device notes its writes inside a guard, somebody who migrates the guest
//! reads and clears, others cut and merge. No write is lost (I-14) and no translation is. Each scenario can be run with the fault that it is
//! there for, and then some interleaving must show it.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test -p lockstep-pt --test loom_dirty --release`; without the flag this file is empty.
#![cfg(loom)]

#[path = "loom_rig/mod.rs"]
mod rig;

use addr::{Iova, Page, SizeSet, Span};
use lockstep_pt::{Format, Gather, Toy, ToyBreaking};
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use rig::{DOMAIN, FRAMES, Findings, GRANULE, ITEM1, Rig, finds, holds, reader, span};
use sync::SpanLock;

/// What a device does under one guard: it finds the leaf, notes the write, writes, and writes once more, now that it knows the leaf to be
/// dirty. Answers whether it found the leaf.
fn write_twice<F: Format>(rig: &Rig<F>, slot: &mut sync::Slot, at: u64, memory: &AtomicU64, findings: &Findings) -> bool {
    let _guard = slot.guard(DOMAIN);
    let seen = rig.oa(at);
    findings.check(rig.is_true(at / GRANULE, seen), format!("{at:#x} answers {seen:x?}"));
    if seen.is_none() {
        return false;
    }
    findings.check(rig.table.mark_dirty(Iova::new(at)), "a write that nobody will know of");
    memory.store(1, Ordering::Relaxed);
    memory.store(2, Ordering::Relaxed);
    true
}

/// Reads and clears, and copies after the flush. The fault: the copy is made without a grace period, so a device may still write under the old
/// mark.
fn dirty_read<F: Format>(findings: Findings, dirty_before: bool) {
    let rig = Rig::<F>::new();
    let mut stock = rig.stock(2);
    rig.map(0, 2 * GRANULE, FRAMES, &mut stock);
    if dirty_before {
        rig.table.mark_dirty(Iova::new(0));
        rig.table.mark_dirty(Iova::new(GRANULE));
    }
    let memory = Arc::new(AtomicU64::new(0));
    let mut slot = rig.readers.slot();
    let reads = {
        let (rig, memory, planted) = (rig.clone(), memory.clone(), findings.planted);
        thread::spawn(move || {
            let (mut gather, mut reported) = (Gather::new(), false);
            rig.table.read_dirty(span(0, 2 * GRANULE), true, &mut gather, |_| reported = true);
            gather.finish(&rig.arena, |_| {
                if !planted {
                    rig.readers.grace(DOMAIN)
                }
            });
            if reported { memory.load(Ordering::Relaxed) } else { 0 }
        })
    };
    let writes = reader(&rig, &findings, move |rig, findings| write_twice(rig, &mut slot, GRANULE, &memory, findings));
    let copied = reads.join().unwrap();
    writes.join().unwrap();
    findings.check(copied == 2 || rig.is_dirty(GRANULE), format!("the copy has {copied}, and the leaf is clean"));
}

#[test]
fn a_dirty_read_loses_no_write() {
    holds(4, |findings| dirty_read::<Toy>(findings, false));
    holds(4, |findings| dirty_read::<Toy>(findings, true));
}

#[test]
fn a_copy_without_a_grace_period_is_found() {
    finds(4, |findings| dirty_read::<Toy>(findings, true));
    finds(4, |findings| dirty_read::<Toy>(findings, false));
}

/// One thread holds the first half of a leaf and reads it with `clear`; the leaf sticks out, and is reported as a whole. Another holds the last
/// granule, which the device writes to, and cuts it off. The fault: only the reader's own half of what was reported is copied.
fn dirty_read_and_cut<F: Format>(findings: Findings, len: u64) {
    let rig = Rig::<F>::new();
    let mut stock = rig.stock(3);
    rig.map(0, len, FRAMES, &mut stock);
    let last = len - GRANULE;
    let memory = AtomicU64::new(0);
    let mut slot = rig.readers.slot();
    let reads = {
        let (rig, planted) = (rig.clone(), findings.planted);
        thread::spawn(move || {
            let (mut gather, mut reported) = (Gather::new(), false);
            let own = span(0, len / 2);
            rig.table.read_dirty(own, true, &mut gather, |dirty| {
                let dirty = if planted { dirty.intersect(own) } else { Some(dirty) };
                reported |= dirty.is_some_and(|dirty| dirty.contains(Iova::new(last)));
            });
            (gather, reported)
        })
    };
    let cuts = {
        let rig = rig.clone();
        thread::spawn(move || rig.cut(last, GRANULE, &mut stock))
    };
    let writes = reader(&rig, &findings, move |rig, findings| write_twice(rig, &mut slot, last, &memory, findings));
    let (gather, reported) = reads.join().unwrap();
    cuts.join().unwrap();
    let wrote = writes.join().unwrap();
    // Here, so that no two threads wait for the device at once: loom would have them wait for each other's turn for ever.
    rig.finish(gather);
    findings.check(!wrote || reported || rig.is_dirty(last), "the write is neither reported nor noted");
    findings.check(rig.oa(last) == Some(FRAMES + last), "the translation is gone");
}

#[test]
fn a_dirty_read_beside_a_cut() {
    holds(3, |findings| dirty_read_and_cut::<Toy>(findings, ITEM1));
    holds(3, |findings| dirty_read_and_cut::<Toy>(findings, 2 * GRANULE));
}

#[test]
fn a_dirty_read_beside_a_cut_that_breaks() {
    holds(3, |findings| dirty_read_and_cut::<ToyBreaking>(findings, ITEM1));
}

#[test]
fn a_dirty_read_beside_a_cut_of_a_pair_that_breaks() {
    holds(3, |findings| dirty_read_and_cut::<ToyBreaking>(findings, 2 * GRANULE));
}

#[test]
fn a_report_cut_short_is_found() {
    finds(2, |findings| dirty_read_and_cut::<Toy>(findings, ITEM1));
}

/// A merge, which may replace the table that the device is just noting its write in, and a dirty read, one after the other in either order as
/// the span lock has it.
fn dirty_read_and_merge<F: Format>(findings: Findings) {
    let all = Span::of(Page::new(0), Page::new(3));
    let rig = Rig::<F>::new();
    let mut stock = rig.stock(3);
    rig.map(0, ITEM1, FRAMES, &mut stock);
    rig.cut(0, GRANULE, &mut stock);
    drop(stock);
    let lock = Arc::new(SpanLock::<Page>::new());
    let memory = Arc::new(AtomicU64::new(0));
    let mut slot = rig.readers.slot();
    let merges = {
        let (rig, lock) = (rig.clone(), lock.clone());
        thread::spawn(move || {
            let held = lock.lock(all);
            let mut gather = Gather::new();
            rig.table.merge(span(0, ITEM1), SizeSet::ALL, &mut gather, |_| rig.readers.grace(DOMAIN));
            rig.finish(gather);
            drop(held);
        })
    };
    let reads = {
        let (rig, memory) = (rig.clone(), memory.clone());
        thread::spawn(move || {
            let held = lock.lock(all);
            let (mut gather, mut reported) = (Gather::new(), false);
            rig.table.read_dirty(span(0, ITEM1), true, &mut gather, |dirty| reported |= dirty.contains(Iova::new(GRANULE)));
            rig.finish(gather);
            let copied = if reported { memory.load(Ordering::Relaxed) } else { 0 };
            drop(held);
            copied
        })
    };
    let writes = reader(&rig, &findings, move |rig, findings| write_twice(rig, &mut slot, GRANULE, &memory, findings));
    merges.join().unwrap();
    let copied = reads.join().unwrap();
    let wrote = writes.join().unwrap();
    findings.check(!wrote || copied == 2 || rig.is_dirty(GRANULE), "the write is neither copied nor noted");
}

#[test]
fn a_dirty_read_and_a_merge() {
    holds(3, dirty_read_and_merge::<Toy>);
}
