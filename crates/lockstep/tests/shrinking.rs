//! With a fault planted, random histories fail, and what is left of the failing one is the few steps that show the fault. One test, because a planted fault is
//! the whole process's.

mod common;
mod history;

use backing::Frames;
use history::Failure;
use lockstep_iommu::Policy;

/// The fail points of `lockstep run --break` whose faults show without a second thread.
const FAULTS: [&str; 9] = [
    "iommu.skip_invalidate",
    "iommu.late_fill",
    "convert.map_before_switch",
    "convert.leave_leaf",
    "secure.forget_psmash",
    "secure.flip_bit",
    "backing.ignore_punch",
    "pt.corrupt_leaf",
    "iommu.ats_false_answer",
];

/// Something that fills a cache, something that makes it stale, something that uses it.
const MOST: usize = 3;

#[test]
fn failing_histories_become_short() {
    for fault in FAULTS {
        let plant = sync::fail::plant(fault, 0, u64::MAX);
        let failed = history::histories(Policy::Mirror, Frames::Contiguous, 4, 50, 200);
        drop(plant);
        let Failure { why, steps } = failed.err().unwrap_or_else(|| panic!("{fault} was not found"));
        println!("{fault}: {steps:?}\n  {why}");
        assert!((1..=MOST).contains(&steps.len()), "{fault}: {} steps, {why}\n{steps:#?}", steps.len());
    }
}
