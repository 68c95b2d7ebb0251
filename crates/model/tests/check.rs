//! The properties hold where nothing is planted, and each planted fault breaks the one that it names. The large scenes without a fault are the command's part:
//! `lockstep-model check`.

use lockstep_model::{Fault, Scene, check};

#[test]
fn every_planted_fault_is_found() {
    for &fault in Fault::ALL {
        let outcome = check(fault.scene(), Some(fault));
        assert!(outcome.breaks(fault.breaks()), "{} was not found: {outcome:#?}", fault.name());
    }
}

#[test]
fn nothing_is_found_where_nothing_is_planted() {
    for scene in [Scene::Stage2, Scene::Ats] {
        let outcome = check(scene, None);
        assert!(outcome.broken.is_empty(), "{outcome:#?}");
        assert!(outcome.unique_states > 100_000, "{outcome:?}");
        println!("{}: {} unique states in {:.1} s", scene.name(), outcome.unique_states, outcome.seconds);
    }
}

/// Faults of `lockstep run --break` are planted here under the same names, but for two. A device that never answers is no fault of ours: here it is what any device
/// may do at any time, and the laws hold. And the model has no tables that could be cached: walk caches are explored on the real ones, by loom (crate
/// `iotlb`, `loom_walks`).
#[test]
fn the_commands_faults_are_the_models() {
    const NOT_HERE: [&str; 2] = ["ats-never-answers", "merge-forgets-walk-caches"];
    let breaks = include_str!("../../cli/src/run/breaks.rs");
    let names = breaks.split("Break { name: \"").skip(1).filter_map(|rest| rest.split('"').next());
    let missing: Vec<_> = names.filter(|name| !NOT_HERE.contains(name) && Fault::of(name).is_none()).collect();
    assert!(missing.is_empty(), "not in the model: {missing:?}");
}
