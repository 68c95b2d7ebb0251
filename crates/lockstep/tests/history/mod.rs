//! Random histories of one guest against a plain model, and a runner that makes failing ones short.
#![allow(dead_code, reason = "each test file uses its own part of this module")]
#![allow(unreachable_pub, reason = "a module shared by test binaries")]

mod dma;
mod seen;
mod step;
mod world;

use backing::Frames;
use lockstep_iommu::Policy;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};
use seen::Seen;
use std::cell::RefCell;
use std::panic::catch_unwind;
use step::{Step, groups};
use world::World;

const SHRINK_MILLIS: u32 = 120_000;

/// The shortest history that fails, and why.
#[derive(Debug)]
pub struct Failure {
    pub why: String,
    pub steps: Vec<Step>,
}

/// Takes `cases` random histories of at most `most` steps, the same for the same arguments.
pub fn histories(policy: Policy, frames: Frames, seed: u64, cases: u32, most: usize) -> Result<Seen, Failure> {
    // An audit that finds something looks again and again, so shrinking is bounded by time.
    let config = Config { cases, max_shrink_iters: 20_000, max_shrink_time: SHRINK_MILLIS, failure_persistence: None, ..Config::default() };
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    // Each kind has its own.
    (bytes[8], bytes[9]) = (u8::from(policy == Policy::Mirror), u8::from(frames == Frames::Contiguous));
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let seen = RefCell::new(Seen::default());
    let done = runner.run(&groups(most), |(count, groups)| {
        let part = history(policy, frames, groups.iter().flatten().take(count))?;
        seen.borrow_mut().add(&part);
        Ok(())
    });
    match done {
        Ok(()) => Ok(seen.into_inner()),
        Err(TestError::Fail(why, (count, groups))) => {
            let mut steps: Vec<_> = groups.into_iter().flatten().take(count).collect();
            let why = shorten(policy, frames, &mut steps).unwrap_or(why.to_string());
            Err(Failure { why, steps })
        }
        Err(TestError::Abort(why)) => Err(Failure { why: why.to_string(), steps: Vec::new() }),
    }
}

/// A step that the others needed may be of no use once they are simple: leaves out one after the other, as long as the history fails. Answers why it does.
fn shorten(policy: Policy, frames: Frames, steps: &mut Vec<Step>) -> Option<String> {
    let mut why = None;
    let mut index = 0;
    while index < steps.len() {
        let mut fewer = steps.clone();
        fewer.remove(index);
        let fails = match catch_unwind(|| history(policy, frames, fewer.iter())) {
            Ok(Ok(_)) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some("it panics".into()),
        };
        if fails.is_some() {
            (*steps, why, index) = (fewer, fails, 0);
        } else {
            index += 1;
        }
    }
    why
}

/// One history. After every step the tables agree and no device has more than it should.
fn history<'a>(policy: Policy, frames: Frames, steps: impl Iterator<Item = &'a Step>) -> Result<Seen, TestCaseError> {
    let mut world = World::new(policy, frames);
    for (index, step) in steps.enumerate() {
        let done = world.step(step).and_then(|()| world.check());
        done.map_err(|error| TestCaseError::fail(format!("step {index}, {step:?}: {error}")))?;
    }
    Ok(world.seen)
}
