//! Random streams of calls from seeds: what the fuzz target does, on stable Rust and for a few seconds. `STREAM_SECONDS` runs them for longer, `STREAM_SEED`
//! runs one again and prints its calls; with `STREAM_SUMMARY`, what was called is counted.
#![cfg(feature = "test-ops")]

mod stream;

use lockstep_iommufd::watch::Options;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

fn bytes(seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let len = random.usize(100..6000);
    (0..len).map(|_| random.u8(..)).collect()
}

/// Planted faults are the whole process's.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn streams_leave_nothing_behind() {
    let _alone = alone();
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    if let Some(seed) = number("STREAM_SEED") {
        stream::run(&bytes(seed), Some(Options { trace: true, ..Options::default() }.watcher()));
        return;
    }
    let watcher = std::env::var_os("STREAM_SUMMARY").map(|_| Options { summary: true, ..Options::default() }.watcher());
    let (started, lasts) = (Instant::now(), Duration::from_secs(number("STREAM_SECONDS").unwrap_or(3)));
    let (mut seed, mut steps) = (0, 0);
    while started.elapsed() < lasts {
        seed += 1;
        let observer = watcher.clone().map(|watcher| watcher as _);
        let run = std::panic::AssertUnwindSafe(|| stream::run(&bytes(seed), observer));
        steps += std::panic::catch_unwind(run).unwrap_or_else(|_| panic!("repeat with STREAM_SEED={seed}"));
    }
    watcher.iter().for_each(|watcher| watcher.finish());
    eprintln!("{seed} streams, {steps} steps");
}

/// The check at the end of a stream finds a page table that somebody has damaged.
#[test]
fn a_corrupt_leaf_is_found() {
    let _alone = alone();
    let plant = sync::fail::plant("pt.corrupt_leaf", 0, u64::MAX);
    let found = (1..100).any(|seed| std::panic::catch_unwind(|| stream::run(&bytes(seed), None)).is_err());
    assert!(plant.fired() > 0 && found);
}

/// The shortest stream: nothing at all.
#[test]
fn an_empty_stream_is_one() {
    let _alone = alone();
    assert_eq!(stream::run(&[], None), 0);
}
