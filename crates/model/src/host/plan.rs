//! Hold and plan: with the pages held, what is to be done, and at which stage it begins.

use super::detach::after_flush;
use super::{Host, Op, Stage};
use crate::faults::Fault;
use crate::state::{ALL, IoTable, Is, PAGES, Set, State, each, one};

/// Now that nobody else can change them: the pages that are not what they are to become.
pub(super) fn hold(state: &mut State, index: usize, host: &mut Host, fault: Option<Fault>) -> Stage {
    let Some(op) = host.op else { return Stage::Idle };
    if let Op::Trust(run) = op {
        let device = &mut state.devices[0];
        (device.run, device.stale) = (run, true);
        // That it may is true at once; that it may not is promised at the end.
        device.promised |= run;
        device.disturb(ALL);
        return if fault == Some(Fault::TrustWithoutGrace) { after_flush(state, host) } else { Stage::Flush(0) };
    }
    let alone = op == Op::Merge && fault == Some(Fault::MergeWithoutLock);
    if !alone {
        state.lock = Some(index as u8);
    }
    host.from = state.is;
    let is = |page: usize, what: Is| state.is[page] == what;
    let first = match op {
        Op::Convert { pages, private } => {
            let wanted = if private { Is::Private } else { Is::Shared };
            let told = |page: usize| (state.kvm.private & one(page) != 0) == private;
            let aliased = |page: usize| fault == Some(Fault::AliasSlot) && page == 0 && private;
            // Also what stage 2 did not take the last time is done again.
            host.todo = each(pages).filter(|page| !is(*page, wanted) || !told(*page) || aliased(*page)).map(one).sum();
            if host.todo == 0 || host.todo & state.rmp.leaked != 0 { Stage::Finish } else { Stage::Reserve }
        }
        Op::Punch(pages) => {
            let refused = each(pages).any(|page| is(page, Is::Private)) || pages & state.rmp.leaked != 0;
            host.todo = if refused { 0 } else { pages };
            match (refused, fault) {
                (true, _) => Stage::Finish,
                (false, Some(Fault::IgnorePunch)) => Stage::Discard,
                (false, _) => {
                    each(pages).for_each(|page| state.is[page] = Is::Absent);
                    Stage::Clear
                }
            }
        }
        Op::Populate(pages) => {
            let absent = each(pages).filter(|page| is(*page, Is::Absent)).map(one).sum::<Set>();
            host.todo = if pages & state.rmp.leaked == 0 { absent } else { 0 };
            each(host.todo).for_each(|page| state.is[page] = Is::Shared);
            state.released &= !host.todo;
            if host.todo == 0 { Stage::Finish } else { Stage::Attach }
        }
        Op::Merge => {
            let alike = state.io == IoTable::Small([Some(0), Some(1)]) && state.is == [Is::Shared; PAGES];
            host.todo = if alike { ALL } else { 0 };
            if alike { Stage::Join } else { Stage::Finish }
        }
        Op::Smash if state.rmp.large && is(0, Is::Private) => Stage::SmashBegin,
        Op::Smash | Op::Trust(_) => Stage::Finish,
    };
    host.rest = host.todo;
    host.joined = host.todo == ALL && host.from[0] == host.from[1];
    if !matches!(op, Op::Merge | Op::Smash) {
        host.changing = host.todo;
        let todo = host.todo;
        state.disturb(todo);
    }
    first
}
