//! Paths through the model, taken on the real code alongside.

mod pair;
mod threads;

use lockstep_model::host::Op;
use lockstep_model::state::{ALL, State};
use lockstep_model::{Fault, Scene};
use pair::{Act, Pair, Silence};
use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

/// A planted fault is the whole process's.
static ALONE: Mutex<()> = Mutex::new(());

/// What was done so far, over many paths.
#[derive(Default)]
struct Sum {
    paths: u64,
    actions: u64,
    waits: u64,
    quarantines: u64,
    states: HashSet<State>,
}

impl Sum {
    fn add(&mut self, pair: Pair) {
        self.paths += 1;
        self.actions += pair.actions;
        self.waits += pair.waits;
        self.quarantines += pair.quarantines;
        self.states.extend(pair.finish());
    }

    fn print(&self, name: &str) {
        let Self { paths, actions, waits, quarantines, states } = self;
        println!(
            "{name}: {paths} paths, {actions} actions, {waits} waits for the device, {quarantines} quarantines, {} states",
            states.len()
        );
        assert!(*waits > 0 && *quarantines > 0);
    }
}

fn ops() -> Vec<Op> {
    Scene::Ats.ops(0)
}

/// Takes every path that begins with `path` and has `more` actions beyond it.
fn every(path: &mut Vec<Act>, more: usize, silence: Silence, ops: &[Op], sum: &mut Sum) {
    let mut pair = Pair::new([1, 256, 511][path.len() % 3], silence, None);
    path.iter().for_each(|act| pair.act(*act));
    let next = if more == 0 { Vec::new() } else { pair.possible(ops) };
    sum.add(pair);
    for act in next {
        path.push(act);
        every(path, more - 1, silence, ops, sum);
        path.pop();
    }
}

/// Every path of two actions, and of three by fewer operations once the device is in an access, has something cached, or has and does not answer; with
/// a device that is waited for, and with one that is given up.
#[test]
fn every_short_path() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut sum = Sum::default();
    let some = [Op::Convert { pages: 0b01, private: true }, Op::Convert { pages: ALL, private: true }, Op::Punch(0b01), Op::Merge];
    for silence in [Silence::IsWaitedFor, Silence::EndsInQuarantine] {
        every(&mut Vec::new(), 2, silence, &ops(), &mut sum);
        for start in [vec![Act::Access(0)], vec![Act::Access(0), Act::Go], vec![Act::Access(1), Act::Go, Act::Go, Act::Mute]] {
            every(&mut start.clone(), 3, silence, &some, &mut sum);
        }
    }
    sum.print("every short path");
}

/// A long path, by seed.
fn random(seed: u64, silence: Silence, fault: Option<Fault>) -> Pair {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut pair = Pair::new([1, 256, 511, 37][seed as usize / 4 % 4], silence, fault);
    for _ in 0..60 {
        // Operations are half of it, so that there is something to forget.
        let (ops, others): (Vec<_>, Vec<_>) = pair.possible(&ops()).into_iter().partition(|act| matches!(act, Act::Start(_)));
        let chosen = if others.is_empty() || (!ops.is_empty() && random.bool()) { ops } else { others };
        if let Some(act) = random.choice(chosen) {
            pair.act(act);
        }
    }
    pair
}

#[test]
fn random_paths() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let replays = std::env::var("LOCKSTEP_REPLAYS").ok().and_then(|text| text.parse().ok()).unwrap_or(200);
    let mut sum = Sum::default();
    for seed in 0..replays {
        let silence = if seed % 4 == 0 { Silence::EndsInQuarantine } else { Silence::IsWaitedFor };
        let pair = random(seed, silence, None);
        assert_eq!(pair.stale, 0, "{:#?}", pair.said);
        sum.add(pair);
    }
    sum.print("random paths");
}

/// A device that answers and forgets nothing breaks the same law in both, at the same moments, and reaches the same.
#[test]
fn false_answers() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let _plant = sync::fail::plant("iommu.ats_false_answer", 0, u64::MAX);
    let (mut stale, mut broken) = (0, 0);
    for seed in 0..50 {
        let pair = random(seed, Silence::IsWaitedFor, Some(Fault::AtsFalseAnswer));
        stale += pair.stale;
        broken += u64::from(pair.model.broken.is_some());
        drop(pair.finish());
    }
    println!("false answers: pages in transition were still cached {stale} times, {broken} of 50 paths broke a promise by it");
    assert!(stale > 0 && broken > 0);
}

/// With a fault in the code alone the two drift apart, and the replay says so.
#[test]
fn a_drift_is_seen() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let convert = Act::Start(Op::Convert { pages: 0b01, private: true });
    let cached = [Act::Access(0), Act::Go, Act::Go, convert, Act::Release];
    let busy = [Act::Access(0), Act::Go, convert, Act::Go, Act::Release];
    for (fault, path) in [
        // The host goes on without the answer.
        ("iommu.ats_ignore_answers", busy),
        // The device answers, and keeps what it was to forget.
        ("iommu.ats_false_answer", cached),
        // It does not answer, where the model's does.
        ("iommu.ats_never_answers", cached),
    ] {
        let replay = || {
            let mut pair = Pair::new(256, Silence::IsWaitedFor, None);
            path.into_iter().for_each(|act| pair.act(act));
            drop(pair.finish());
        };
        replay();
        let plant = sync::fail::plant(fault, 0, u64::MAX);
        let drifted = std::panic::catch_unwind(replay);
        drop(plant);
        assert!(drifted.is_err(), "{fault} was not seen");
    }
}
