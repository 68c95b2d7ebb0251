//! A host thread's side: the transaction of design D-6, stage by stage, and whatever else edits the same leaves (punch, populate, merge, the split that a
//! PVALIDATE asks for, a change of a device's identity). The stages are those of `convert`'s `stages.rs`:
//!
//! hold and plan, reserve, freeze, detach (smash and cut, clear, log, grace, device caches), switch, commit, attach, thaw, acknowledge.
//!
//! One step is one store that somebody else may see, or one wait. Here is the order of the stages; what each does is in the file of its name.

mod attach;
mod detach;
mod plan;
mod stage2;
mod switch;

use crate::device::Device;
use crate::faults::Fault;
use crate::state::{ALL, Entry, IoTable, Is, PAGES, Set, State, each};
use attach::attach;
use detach::{Flush, clear, cut, detach, flush};
use plan::hold;
use stage2::{discard, freeze, tell, thaw};
use switch::{commit, smash_sequence, switch};

/// What is asked of a host thread.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Op {
    /// The guest wants another owner.
    Convert {
        /// Of these pages.
        pages: Set,
        /// The guest, or the host.
        private: bool,
    },
    /// The host wants shared pages back.
    Punch(Set),
    /// Absent pages come back.
    Populate(Set),
    /// Small leaves are joined.
    Merge,
    /// PVALIDATE named a small page of a large entry.
    Smash,
    /// The first device's interface enters or leaves RUN.
    Trust(bool),
}

/// What is next.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Stage {
    /// Nothing to do.
    Idle,
    /// Wait for the pages, then plan.
    Hold,
    /// Everything that later steps need. May fail.
    Reserve,
    /// Stage 2 lets nobody in.
    Freeze,
    /// The smash sequence becomes odd.
    SmashBegin,
    /// PSMASH, first half: what the entries will say that mean nothing yet.
    SmashFill,
    /// PSMASH, second half: one store to the base entry. May be refused.
    SmashFlip,
    /// The leaf follows.
    SmashCut,
    /// What is converted of it goes.
    SmashClear,
    /// The sequence is even again.
    SmashEnd,
    /// A fault's second store of a cut.
    CutAgain,
    /// Leaves are taken out, large ones cut first.
    Clear,
    /// What was cleared is flushed: the part of that number begins.
    Flush(u8),
    /// ... and is waited for.
    Await(u8),
    /// The secure world's table. May be refused.
    Switch,
    /// The state of the pages.
    Commit,
    /// Stage 2 is told. May be refused.
    Tell,
    /// Leaves that are allowed now.
    Attach,
    /// vCPUs are let in.
    Thaw,
    /// The kernel gets the memory. May be refused.
    Discard,
    /// A merge has looked; now it joins.
    Join,
    /// The pages are given back, the request is acknowledged.
    Finish,
}

/// One host thread.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Host {
    /// At work on this.
    pub op: Option<Op>,
    /// What is next.
    pub at: Stage,
    /// Pages that change until the request is acknowledged.
    pub changing: Set,
    /// Pages to do.
    pub todo: Set,
    /// Of those, what this stage has still to do.
    pub rest: Set,
    /// Pages that have their new owner.
    pub switched: Set,
    /// Pages that the secure world kept.
    pub leaked: Set,
    /// Pages that stage 2 did not take.
    pub untold: Set,
    /// Both pages go through every stage as one piece.
    pub joined: bool,
    /// Something failed: what is done goes on, what is not stays.
    pub failed: bool,
    /// Devices whose guards the grace period waits for.
    pub waits: u8,
    /// Page states before a punch.
    from: [Is; PAGES],
}

impl Host {
    /// Nothing to do.
    pub const IDLE: Self = Self {
        op: None,
        at: Stage::Idle,
        changing: 0,
        todo: 0,
        rest: 0,
        switched: 0,
        leaked: 0,
        untold: 0,
        joined: false,
        failed: false,
        waits: 0,
        from: [Is::Shared; PAGES],
    };

    /// The pages are in nobody's tables: detached, and not yet attached (I-7).
    pub fn in_transition(&self) -> Set {
        match (self.op, self.at) {
            (Some(Op::Convert { .. }), Stage::Switch | Stage::Commit | Stage::Tell) => self.todo,
            (Some(Op::Punch(_)), Stage::Discard) => self.todo,
            _ => 0,
        }
    }

    /// Whether the next step may fail.
    pub fn may_fail(&self, state: &State) -> bool {
        let convert = matches!(self.op, Some(Op::Convert { .. }));
        match self.at {
            Stage::Reserve => convert,
            Stage::SmashFlip | Stage::Discard => true,
            // What only stage 2 did not take has its owner already.
            Stage::Switch => {
                each(self.rest).next().is_some_and(|page| self.from[page] != if self.private() { Is::Private } else { Is::Shared })
            }
            // What stage 2 has already it need not be told.
            Stage::Tell => self.told_next() & if self.private() { !state.kvm.private } else { state.kvm.private } != 0,
            _ => false,
        }
    }

    /// The pages that stage 2 is told of in one go.
    fn told_next(&self) -> Set {
        if self.joined && self.rest == ALL { ALL } else { self.rest & self.rest.wrapping_neg() }
    }

    fn private(&self) -> bool {
        matches!(self.op, Some(Op::Convert { private: true, .. }))
    }
}

/// Gives a thread something to do. Answers whether that makes sense now.
pub fn start(state: &mut State, index: usize, op: Op) -> bool {
    let host = &mut state.hosts[index];
    if host.at != Stage::Idle {
        return false;
    }
    *host = Host { op: Some(op), at: Stage::Hold, ..Host::IDLE };
    true
}

/// Whether the next step does not have to wait.
pub fn can_step(state: &State, index: usize, fault: Option<Fault>) -> bool {
    let host = &state.hosts[index];
    match host.at {
        Stage::Idle => false,
        Stage::Hold => {
            state.lock.is_none()
                || matches!(host.op, Some(Op::Trust(_)))
                || (host.op == Some(Op::Merge) && fault == Some(Fault::MergeWithoutLock))
        }
        Stage::Await(part) => match Flush::order(fault)[usize::from(part)] {
            Flush::Log => true,
            Flush::Grace => host.waits == 0,
            Flush::Ats => {
                let drained = |device: &Device| !device.is_draining() || fault == Some(Fault::AtsQuarantineWithoutDrain);
                state.devices.iter().all(|device| device.asked == 0 && drained(device))
            }
        },
        _ => true,
    }
}

/// Whether the thread waits for devices' answers, and may give up on them.
pub fn can_time_out(state: &State, index: usize, fault: Option<Fault>) -> bool {
    let waits = matches!(state.hosts[index].at, Stage::Await(part) if Flush::order(fault)[usize::from(part)] == Flush::Ats);
    waits && state.devices.iter().any(|device| device.asked != 0)
}

/// Gives up on devices that have not answered: they begin no access any more. One that is under way is still waited for.
pub fn time_out(state: &mut State, fault: Option<Fault>) {
    for device in state.devices.iter_mut().filter(|device| device.asked != 0) {
        device.quarantined = fault != Some(Fault::AtsTimeOutIgnored);
        device.asked = 0;
    }
}

/// Takes the next step, or has it fail. [`can_step`] and [`Host::may_fail`] have been asked.
pub fn step(state: &mut State, index: usize, fails: bool, fault: Option<Fault>) {
    let mut host = state.hosts[index];
    host.at = next(state, index, &mut host, fails, fault);
    if host.at == Stage::Idle {
        host = Host::IDLE;
    }
    state.hosts[index] = host;
}

fn next(state: &mut State, index: usize, host: &mut Host, fails: bool, fault: Option<Fault>) -> Stage {
    match host.at {
        Stage::Idle => Stage::Idle,
        Stage::Hold => hold(state, index, host, fault),
        Stage::Reserve if fails => Stage::Finish,
        Stage::Reserve => Stage::Freeze,
        Stage::Freeze => {
            if fault != Some(Fault::FreezeLate) {
                freeze(state, host.todo);
            }
            host.rest = host.todo;
            // Of a large entry only a part is converted: it leaves the guest, or is told to stage 2 again; its leaf will be small.
            let splits = !host.private() || fault != Some(Fault::RetryKeepsLargeEntry);
            if splits && state.rmp.large && host.todo != ALL { Stage::SmashBegin } else { Stage::Clear }
        }
        Stage::SmashBegin => {
            if fault != Some(Fault::SmashWithoutSequence) {
                smash_sequence(state, true);
            }
            if fault == Some(Fault::SmashFlipsBaseFirst) { Stage::SmashFlip } else { Stage::SmashFill }
        }
        Stage::SmashFill => {
            state.rmp.entries[1] = Entry { gpa: state.rmp.entries[0].gpa + 1, ..state.rmp.entries[0] };
            if fault == Some(Fault::SmashFlipsBaseFirst) { Stage::SmashCut } else { Stage::SmashFlip }
        }
        Stage::SmashFlip if fails => {
            host.failed = true;
            Stage::SmashEnd
        }
        Stage::SmashFlip => {
            state.rmp.large = fault == Some(Fault::ForgetPsmash);
            if fault == Some(Fault::SmashFlipsBaseFirst) { Stage::SmashFill } else { Stage::SmashCut }
        }
        Stage::SmashCut => {
            cut(state);
            if host.rest == 0 { Stage::SmashEnd } else { Stage::SmashClear }
        }
        Stage::SmashClear => {
            each(host.rest).for_each(|page| clear(state, page));
            host.rest = 0;
            Stage::SmashEnd
        }
        Stage::SmashEnd => {
            if fault != Some(Fault::SmashWithoutSequence) {
                smash_sequence(state, false);
            }
            match (host.op, host.failed) {
                (Some(Op::Convert { .. }), false) => Stage::Clear,
                (Some(Op::Convert { .. }), true) => Stage::Thaw,
                _ => Stage::Finish,
            }
        }
        Stage::CutAgain => {
            state.io = IoTable::Small([Some(0), Some(1)]);
            Stage::Clear
        }
        Stage::Clear => detach(state, host, fault),
        Stage::Flush(part) => flush(state, host, part, fault),
        Stage::Await(part) => Stage::Flush(part + 1),
        Stage::Switch => switch(state, host, fails, fault),
        Stage::Commit => commit(state, host, fault),
        Stage::Tell => tell(state, host, fails, fault),
        Stage::Attach => attach(state, host, fault),
        Stage::Thaw => {
            if !(host.failed && fault == Some(Fault::RollbackStaysFrozen)) {
                thaw(state, host.todo, fault);
            }
            Stage::Finish
        }
        Stage::Discard => discard(state, host, fails, fault),
        Stage::Join => {
            state.io = IoTable::Large;
            Stage::Flush(0)
        }
        Stage::Finish => {
            if state.lock == Some(index as u8) && !(host.failed && fault == Some(Fault::RollbackStaysLocked)) {
                state.lock = None;
            }
            Stage::Idle
        }
    }
}
