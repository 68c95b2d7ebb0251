//! What the pieces cost when nobody is in the way. `cargo run --release -p lockstep-sync --example sync_cost`

use addr::{Page, Span};
use lockstep_sync::{Readers, SpanLock, fail};
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

fn ns_per(name: &str, rounds: u32, mut run: impl FnMut(u32)) {
    let best = (0..7).map(|_| {
        let start = Instant::now();
        (0..rounds).for_each(&mut run);
        start.elapsed().as_secs_f64() * 1e9 / f64::from(rounds)
    });
    println!("{name:<32} {:8.2} ns", best.fold(f64::INFINITY, f64::min));
}

fn main() {
    let readers = Arc::new(Readers::new());
    let mut slot = readers.slot();
    ns_per("guard, enter and leave", 2_000_000, |_| drop(black_box(slot.guard(1))));
    let mut slots: Vec<_> = (0..8).map(|_| readers.slot()).collect();
    slots[0].enter(2);
    ns_per("grace, 9 slots, nobody inside", 1_000_000, |_| readers.grace(1));
    ns_per("step, nothing armed", 5_000_000, |_| {
        let _ = black_box(fail::step("cost.step"));
    });
    let lock = SpanLock::new();
    let span = |at: u32| Span::of(Page::new(u64::from(at)), Page::new(u64::from(at) + 511));
    ns_per("span lock and unlock", 2_000_000, |at| drop(black_box(lock.lock(span(at)))));
    let _held: Vec<_> = (0..8).map(|at| lock.lock(Span::one(Page::new((1 << 40) + at)))).collect();
    ns_per("the same, 8 others held", 2_000_000, |at| drop(black_box(lock.lock(span(at)))));
    let batch: Vec<_> = (0..253).map(|at| Span::one(Page::new(at * 3))).collect();
    ns_per("a batch of 253 spans", 20_000, |_| drop(black_box(lock.lock_many(&batch))));
}
