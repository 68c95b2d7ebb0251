//! Attach: the leaves that are allowed now, in the largest size that says one thing.

use super::{Host, Op, Stage};
use crate::faults::Fault;
use crate::state::{ALL, IoTable, Is, State, each, one};

pub(super) fn to_attach(state: &mut State, host: &mut Host, fault: Option<Fault>) -> Stage {
    host.rest = host.todo & !host.leaked & !host.untold;
    if fault == Some(Fault::MapLeaked) {
        host.rest = host.todo;
    }
    if fault == Some(Fault::RollbackForgetsLeaves) && host.failed {
        host.rest &= host.switched;
    }
    if fault == Some(Fault::AcknowledgeBeforeAttach) {
        host.changing = 0;
    }
    if fault == Some(Fault::UnlockBeforeAttach) {
        state.lock = None;
    }
    let occupied = matches!(fault, Some(Fault::MapBeforeSwitch | Fault::LeaveSharedLeaf));
    if host.rest == 0 || occupied { Stage::Thaw } else { Stage::Attach }
}

pub(super) fn attach(state: &mut State, host: &mut Host, fault: Option<Fault>) -> Stage {
    // Where all of it is one kind of thing, it is one leaf; private leaves are as large as their entries.
    let alike = state.is[0] == state.is[1] && state.is[0] == if state.rmp.large { Is::Private } else { Is::Shared };
    let one_fate = host.switched == 0 || host.switched == ALL;
    if host.rest == ALL && host.joined && one_fate && alike {
        state.io = IoTable::Large;
        host.rest = 0;
    } else if let Some(page) = each(host.rest).next() {
        let frame = page ^ usize::from(fault == Some(Fault::CorruptLeaf));
        let maps = state.is[page] != Is::Absent || fault == Some(Fault::MapLeaked);
        let mut frames = state.io.frames();
        if maps {
            frames[page] = Some(frame as u8);
        }
        if state.io != IoTable::Large {
            state.io = IoTable::Small(frames);
        }
        host.rest &= !one(page);
    }
    match host.op {
        _ if host.rest != 0 => Stage::Attach,
        Some(Op::Convert { .. }) => Stage::Thaw,
        _ => Stage::Finish,
    }
}
