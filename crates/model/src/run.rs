//! Runs the checker over a scene and says what it saw.

use crate::state::State;
use crate::{Action, Fault, Law, Scene, Transaction};
use serde::Serialize;
use stateright::{Checker, HasDiscoveries, Model};
use std::time::Instant;

/// What an exhaustive search of one scene gave.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Which scene.
    pub scene: Scene,
    /// What was planted.
    pub fault: Option<&'static str>,
    /// States visited, again and again.
    pub states: usize,
    /// Different ones.
    pub unique_states: usize,
    /// Steps of the longest shortest path.
    pub depth: usize,
    /// How long it took.
    pub seconds: f64,
    /// Properties that do not hold, each with the steps that lead there.
    pub broken: Vec<Counterexample>,
}

/// The way to a state in which a property does not hold.
#[derive(Clone, Debug, Serialize)]
pub struct Counterexample {
    /// The property.
    pub law: &'static str,
    /// Whose step follows whose.
    pub steps: Vec<String>,
}

impl Outcome {
    /// Whether `law` is broken.
    pub fn breaks(&self, law: Law) -> bool {
        self.broken.iter().any(|found| found.law == law.name())
    }
}

/// Searches a scene: all of it when nothing is planted, else until the property breaks that the fault names.
pub fn check(scene: Scene, fault: Option<Fault>) -> Outcome {
    let began = Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let checker = Transaction { scene, fault }.checker().threads(threads);
    let until = match fault {
        Some(fault) => HasDiscoveries::AnyOf([fault.breaks().name()].into()),
        None => HasDiscoveries::AnyFailures,
    };
    let checker = checker.finish_when(until).spawn_bfs().join();
    let mut broken: Vec<_> = checker
        .discoveries()
        .into_iter()
        .map(|(law, path)| Counterexample { law, steps: path.into_vec().iter().filter_map(said).collect() })
        .collect();
    broken.sort_by_key(|found| found.steps.len());
    Outcome {
        scene,
        fault: fault.map(Fault::name),
        states: checker.state_count(),
        unique_states: checker.unique_state_count(),
        depth: checker.max_depth(),
        seconds: began.elapsed().as_secs_f64(),
        broken,
    }
}

/// A step in words: who, what, and which stage it was at.
fn said((state, action): &(State, Option<Action>)) -> Option<String> {
    Some(match (*action)? {
        Action::Start(index, op) => format!("host {index} is asked to {op:?}"),
        Action::Host(index) => format!("host {index}: {:?}", state.hosts[index].at),
        Action::Fails(index) => format!("host {index}: {:?} fails", state.hosts[index].at),
        Action::TimeOut(index) => format!("host {index} waits no longer for device caches"),
        Action::Device(index, step) => format!("device {index}, {:?}: {step:?}", state.devices[index].at),
        Action::Pvalidate(pages, accept) => format!("guest: PVALIDATE of pages {pages:#04b}, {accept}"),
        Action::Vcpu(touch) => format!("vcpu: {touch:?}"),
    })
}
