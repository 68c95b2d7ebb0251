//! Random histories of one guest against a plain model: per page whose it is, what VMPL 1 may do with it and what it says. Batches of conversions, PVALIDATE,
//! RMPADJUST, punched pages, merge passes, a memslot that comes, goes and moves, devices that come and go, leave RUN or fall silent, a second address
//! space over the same memory, and calls that fail. After every step the audit is clean; every DMA is allowed or refused as the model says, and reads what
//! the model says.
//!
//! A history that fails is made as short as it gets, and printed. `LOCKSTEP_HISTORIES=n` asks for n more histories of each kind, `LOCKSTEP_SEED=n` for others
//! than the usual ones; the same numbers give the same histories.

mod common;
mod history;

use backing::Frames;
use lockstep_iommu::Policy;

const CASES: u32 = 60;
const MOST: usize = 1000;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

/// Everything that a history can have happens in some, but for what policy or frames forbid.
fn histories(policy: Policy, frames: Frames, never: &[&str]) {
    let (more, seed) = (number("LOCKSTEP_HISTORIES").unwrap_or(0), number("LOCKSTEP_SEED").unwrap_or(1));
    let cases = CASES.saturating_add(u32::try_from(more).unwrap_or(u32::MAX));
    match history::histories(policy, frames, seed, cases, MOST) {
        Ok(seen) => {
            println!("{policy}, {frames:?}, seed {seed}, {cases} histories: {seen:?}");
            assert_eq!(seen.lacks(), never);
        }
        Err(failure) => {
            panic!("{policy}, {frames:?}, seed {seed}: {}\n{} steps: {:#?}", failure.why, failure.steps.len(), failure.steps)
        }
    }
}

#[test]
fn mirror() {
    histories(Policy::Mirror, Frames::Contiguous, &[]);
}

#[test]
fn shared_only() {
    histories(Policy::SharedOnly, Frames::Contiguous, &["private"]);
}

#[test]
fn scattered() {
    histories(Policy::Mirror, Frames::Scattered { seed: 5 }, &["merged"]);
}

#[test]
fn scattered_shared_only() {
    histories(Policy::SharedOnly, Frames::Scattered { seed: 6 }, &["private", "merged"]);
}
