//! The lockstep transaction (design D-6) as a model that is small enough to be checked in every interleaving, down to the last.
//!
//! Read [`host`] first: it is D-6, one match arm a stage. [`device`] is D-2, what devices do meanwhile. [`state`] has the three tables. [`properties`] is
//! what must hold in every state, by the design's numbers; [`faults`] are mistakes that are planted one at a time, to see the properties
//! find each; [`scenes`] says who plays. The test `replay` takes the model's actions to the real code and compares the tables after each, and at the two
//! moments inside of a conversion that the code shows; `replay_ats` does so with a device that has a cache of its own, and compares that cache and who waits
//! for whom. Model and code cannot drift apart unnoticed.
//!
//! What is left out: more than two pages, the words of page tables (`pt`'s loom tests have those), memory ordering (`sync`'s), page
//! contents, dirty bits.

pub mod device;
pub mod faults;
pub mod guest;
pub mod host;
pub mod properties;
pub mod scenes;
pub mod state;

mod run;

pub use faults::Fault;
pub use properties::Law;
pub use run::{Outcome, check};
pub use scenes::Scene;

use device::Move;
use guest::Touch;
use host::Op;
use state::{ALL, Set, State};
use stateright::{Model, Property};

/// One step of somebody.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Action {
    /// A host thread is asked for something.
    Start(usize, Op),
    /// It takes its next step.
    Host(usize),
    /// Its next step fails.
    Fails(usize),
    /// It gives up on devices that do not answer.
    TimeOut(usize),
    /// A device takes a step.
    Device(usize, Move),
    /// The guest executes PVALIDATE.
    Pvalidate(Set, bool),
    /// A vCPU takes a step of a fault.
    Vcpu(Touch),
}

/// A scene, and at most one planted fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Transaction {
    /// Who plays.
    pub scene: Scene,
    /// What is wrong.
    pub fault: Option<Fault>,
}

impl Transaction {
    /// Takes an action that is possible; answers whether it was, and changed something.
    pub fn apply(&self, state: &mut State, action: Action) -> bool {
        match action {
            Action::Start(index, op) => host::start(state, index, op),
            Action::Host(index) => {
                host::can_step(state, index, self.fault) && {
                    host::step(state, index, false, self.fault);
                    true
                }
            }
            Action::Fails(index) => {
                host::can_step(state, index, self.fault) && state.hosts[index].may_fail(state) && {
                    host::step(state, index, true, self.fault);
                    true
                }
            }
            Action::TimeOut(index) => {
                host::can_time_out(state, index, self.fault) && {
                    host::time_out(state, self.fault);
                    true
                }
            }
            Action::Device(index, step) => {
                device::step(state, index, step, self.fault);
                true
            }
            Action::Pvalidate(pages, accept) => guest::pvalidate(state, pages, accept),
            Action::Vcpu(touch) => {
                guest::can_touch(state, touch) && {
                    guest::touch(state, touch, self.fault);
                    true
                }
            }
        }
    }
}

impl Model for Transaction {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![self.scene.start()]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for (index, host) in state.hosts.iter().enumerate() {
            if host.at == host::Stage::Idle {
                actions.extend(self.scene.ops(index).into_iter().map(|op| Action::Start(index, op)));
            } else if host::can_step(state, index, self.fault) {
                actions.push(Action::Host(index));
                actions.extend((host.may_fail(state) && self.scene.has_failures()).then_some(Action::Fails(index)));
            } else if host::can_time_out(state, index, self.fault) {
                actions.push(Action::TimeOut(index));
            }
        }
        let mut moves = Vec::new();
        for index in 0..state.devices.len() {
            moves.clear();
            device::moves(state, index, self.fault, &mut moves);
            let here = |page: u8| self.scene.pages(index) & state::one(page.into()) != 0;
            let wanted = moves.iter().filter(|step| !matches!(step, Move::Look(page) if !here(*page)));
            actions.extend(wanted.map(|step| Action::Device(index, *step)));
        }
        if state.rmp.at(0).assigned || state.rmp.at(1).assigned {
            actions.extend([0b01, 0b10, ALL].into_iter().flat_map(|pages| [true, false].map(|accept| Action::Pvalidate(pages, accept))));
        }
        if self.scene.has_vcpu() {
            actions.extend([Touch::Fault(0), Touch::Fault(1), Touch::Install].map(Action::Vcpu));
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        self.apply(&mut state, action).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        macro_rules! laws {
            ($($law:ident)*) => {
                vec![$(Property::always(Law::$law.name(), |model: &Self, state| Law::$law.holds(state, model.fault))),*]
            };
        }
        laws!(I4 I5 I6 I7 I8 I10 I11 I13 I15 Released Exact Ends)
    }
}
