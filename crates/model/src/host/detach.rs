//! Detach: leaves are taken out, large ones cut first, and what was cleared is flushed: log, grace, device caches.

use super::{Host, Op, Stage};
use crate::faults::Fault;
use crate::state::{ALL, IoTable, PAGES, State, each, one};

pub(super) fn detach(state: &mut State, host: &mut Host, fault: Option<Fault>) -> Stage {
    if fault == Some(Fault::LeaveSharedLeaf) && host.rest == host.todo {
        host.rest &= host.rest - 1;
    }
    if state.io == IoTable::Large && host.rest != 0 {
        if host.rest == ALL {
            state.io = IoTable::Small([None; PAGES]);
            host.rest = 0;
        } else if fault == Some(Fault::CutInTwoStores) {
            state.io = IoTable::Small([None; PAGES]);
            return Stage::CutAgain;
        } else {
            cut(state);
        }
    } else if let Some(page) = each(host.rest).next() {
        clear(state, page);
        host.rest &= !one(page);
    }
    match host.op {
        _ if host.rest != 0 => Stage::Clear,
        Some(Op::Punch(_)) if fault == Some(Fault::DiscardBeforeFlush) => Stage::Discard,
        _ => Stage::Flush(0),
    }
}

/// One store: the table that it points to says what the leaf said.
pub(super) fn cut(state: &mut State) {
    state.io = IoTable::Small(state.io.frames());
}

pub(super) fn clear(state: &mut State, page: usize) {
    if let IoTable::Small(frames) = &mut state.io {
        frames[page] = None;
    }
}

/// The parts of a flush.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Flush {
    Log,
    Grace,
    Ats,
}

impl Flush {
    /// In this order.
    pub(super) fn order(fault: Option<Fault>) -> [Self; 3] {
        match fault {
            Some(Fault::GraceBeforeLog) => [Self::Grace, Self::Log, Self::Ats],
            Some(Fault::AtsBeforeGrace) => [Self::Log, Self::Ats, Self::Grace],
            _ => [Self::Log, Self::Grace, Self::Ats],
        }
    }
}

pub(super) fn flush(state: &mut State, host: &mut Host, part: u8, fault: Option<Fault>) -> Stage {
    let Some(what) = Flush::order(fault).get(usize::from(part)).copied() else {
        return after_flush(state, host);
    };
    // Copies of small leaves that were joined stay right. Only their table, which is freed, has to be waited for.
    let cleared = if host.op == Some(Op::Merge) { 0 } else { host.todo };
    match what {
        Flush::Log => {
            if fault != Some(Fault::SkipInvalidation) {
                state.devices.iter_mut().for_each(|device| device.missed |= cleared);
            }
            Stage::Flush(part + 1)
        }
        Flush::Grace if fault == Some(Fault::SkipGrace) => Stage::Flush(part + 1),
        Flush::Grace => {
            host.waits = (0..).zip(&state.devices).filter(|(_, device)| device.is_inside()).map(|(at, _)| 1u8 << at).sum();
            if host.waits == 0 { Stage::Flush(part + 1) } else { Stage::Await(part) }
        }
        Flush::Ats => {
            let asks = fault != Some(Fault::SkipAts) && cleared != 0;
            let asked = state.devices.iter_mut().filter(|device| asks && device.kind.ats && !device.quarantined);
            let mut any = false;
            for device in asked {
                device.asked |= cleared;
                any = true;
            }
            if any { Stage::Await(part) } else { Stage::Flush(part + 1) }
        }
    }
}

pub(super) fn after_flush(state: &mut State, host: &mut Host) -> Stage {
    host.rest = host.todo;
    match host.op {
        Some(Op::Convert { .. }) => Stage::Switch,
        Some(Op::Punch(_)) => Stage::Discard,
        Some(Op::Trust(run)) => {
            state.devices[0].promised = run;
            Stage::Finish
        }
        _ => Stage::Finish,
    }
}
