//! Switch and commit: the secure world's table, then the state of the pages. The split of a large entry is announced to devices.

use super::attach::to_attach;
use super::stage2::{freeze, thaw};
use super::{Host, Stage};
use crate::device::Device;
use crate::faults::Fault;
use crate::state::{ALIAS, ALL, Entry, IoTable, Is, State, each, one};

/// Page by page, or both in one entry. A refusal ends the batch: what is done goes on, what is not stays.
pub(super) fn switch(state: &mut State, host: &mut Host, fails: bool, fault: Option<Fault>) -> Stage {
    if fault == Some(Fault::MapBeforeSwitch) && host.rest == host.todo {
        each(host.todo).for_each(|page| state.is[page] = if host.private() { Is::Private } else { Is::Shared });
        if let IoTable::Small(frames) = &mut state.io {
            each(host.todo).for_each(|page| frames[page] = Some(page as u8));
        }
    }
    let private = host.private();
    let Some(first) = each(host.rest).next() else {
        return Stage::Commit;
    };
    let assigned = |page: usize| state.rmp.at(page).assigned;
    let large = host.joined && host.rest == ALL && if private { !assigned(0) && !assigned(1) } else { state.rmp.large };
    let pages = if large { ALL } else { one(first) };
    // What only stage 2 did not take has its owner already.
    let owned =
        each(pages).all(|page| host.from[page] == if private { Is::Private } else { Is::Shared }) && fault != Some(Fault::AliasSlot);
    let refused = fails || (!large && state.rmp.large);
    if !owned && refused {
        host.failed = true;
        host.joined &= large;
        if !private && host.from[first] == Is::Private {
            host.leaked = pages;
            state.rmp.leaked |= pages;
        }
        host.rest = 0;
        return Stage::Commit;
    }
    if !owned {
        let flip = u8::from(fault == Some(Fault::FlipRmpBit));
        for page in each(pages) {
            let gpa = if fault == Some(Fault::AliasSlot) && host.from[page] == Is::Private { ALIAS as u8 } else { page as u8 ^ flip };
            state.rmp.entries[page] = if private { Entry { assigned: true, validated: false, gpa } } else { Entry::default() };
        }
        if large {
            // While the first entry is large the second means nothing.
            state.rmp.entries[1] = Entry::default();
            state.rmp.large = private;
        }
    }
    host.switched |= pages;
    host.rest &= !pages;
    if host.rest == 0 { Stage::Commit } else { Stage::Switch }
}

pub(super) fn commit(state: &mut State, host: &mut Host, fault: Option<Fault>) -> Stage {
    each(host.switched).for_each(|page| state.is[page] = if host.private() { Is::Private } else { Is::Shared });
    // Nobody's any more: a leaked page is never mapped again.
    each(host.leaked).for_each(|page| state.is[page] = Is::Absent);
    state.released &= !host.switched;
    if fault == Some(Fault::FreezeLate) {
        freeze(state, host.todo);
    }
    if fault == Some(Fault::ThawBeforeCommit) {
        thaw(state, host.todo, fault);
    }
    host.rest = host.switched;
    if host.rest == 0 { to_attach(state, host, fault) } else { Stage::Tell }
}

pub(super) fn smash_sequence(state: &mut State, odd: bool) {
    state.rmp.smashing = odd;
    state.devices.iter_mut().for_each(Device::see_smash);
}
