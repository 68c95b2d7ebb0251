//! Random histories against a plain model: a map from granule to output address. Every edit, the whole tree compared after each. Here at
//! length, on the default format and the small ones; `conformance` has all of them.
#![cfg(not(loom))]

mod common;

use common::model::{Stage, histories};
use lockstep_pt::{AmdV1, AmdV1K2, Config, Format, Toy, ToyBreaking};

fn stage<F: Format>(units: u64, base: u64) -> Stage {
    let config = Config { name: "plain", start_level: F::START_LEVEL, sizes: F::SIZES };
    Stage { config, unit_lg2: F::GRANULE_LG2, units, base }
}

#[test]
fn toy() {
    histories::<Toy>(stage::<Toy>(16, 0), 400, 60);
}

#[test]
fn toy_that_breaks_before_it_makes() {
    histories::<ToyBreaking>(stage::<ToyBreaking>(16, 0), 400, 60);
}

#[test]
fn amdv1_two_levels() {
    histories::<AmdV1>(stage::<AmdV1>(2048, 0), 400, 40);
}

#[test]
fn amdv1_across_a_top_border() {
    // 512 GiB is where the first top table ends; the span straddles it.
    histories::<AmdV1>(stage::<AmdV1>(2048, (1 << 39) - (1 << 22)), 400, 20);
}

#[test]
fn amdv1_at_the_end_of_the_space() {
    histories::<AmdV1>(stage::<AmdV1>(2048, 0u64.wrapping_sub(2048 << 12)), 400, 20);
}

#[test]
fn amdv1_2k_two_levels() {
    histories::<AmdV1K2>(stage::<AmdV1K2>(2048, 0), 400, 40);
}
