//! KVM's stage 2: frozen, told of the new owner, thawed; and memory given back, which KVM hears of first.

use super::attach::to_attach;
use super::{Host, Stage};
use crate::faults::Fault;
use crate::state::{ALIAS, Entry, Is, Set, State, Vcpu, each, one};

pub(super) fn freeze(state: &mut State, pages: Set) {
    zap(state, pages);
    state.kvm.frozen |= pages;
}

pub(super) fn tell(state: &mut State, host: &mut Host, fails: bool, fault: Option<Fault>) -> Stage {
    let pages = host.told_next();
    if fails {
        // The owner has changed all the same; devices get nothing of what stage 2 does not have, and the error says so.
        let has = if host.private() { state.kvm.private } else { !state.kvm.private };
        let refused = pages & !has;
        host.failed = true;
        host.switched &= !refused;
        host.untold |= refused;
        state.kvm.untold |= refused;
        state.kvm.untold &= !(pages & has);
        if refused != pages && state.rmp.large {
            // The rest will have a small leaf.
            state.rmp.entries[1] = Entry { gpa: 1, ..state.rmp.entries[0] };
            state.rmp.large = false;
        }
    } else {
        let alias = if fault == Some(Fault::AliasSlot) && host.from[0] == Is::Private { one(ALIAS) } else { 0 };
        let told = if alias != 0 { alias } else { pages };
        state.kvm.private = if host.private() { state.kvm.private | told } else { state.kvm.private & !told };
        state.kvm.untold &= !pages;
    }
    host.rest &= !pages;
    if host.rest == 0 { to_attach(state, host, fault) } else { Stage::Tell }
}

pub(super) fn thaw(state: &mut State, pages: Set, fault: Option<Fault>) {
    state.kvm.frozen &= !pages;
    if fault != Some(Fault::ForgetSequence) {
        moves(state, pages);
    }
}

/// fallocate: KVM zaps, and the memory goes.
pub(super) fn discard(state: &mut State, host: &mut Host, fails: bool, fault: Option<Fault>) -> Stage {
    if fails {
        host.failed = true;
        if fault == Some(Fault::IgnorePunch) {
            return Stage::Finish;
        }
        state.is = host.from;
        host.rest = each(host.todo).filter(|page| host.from[*page] != Is::Absent).map(one).sum();
        return if host.rest == 0 { Stage::Finish } else { Stage::Attach };
    }
    zap(state, host.todo);
    moves(state, host.todo);
    state.released |= host.todo;
    Stage::Finish
}

fn zap(state: &mut State, pages: Set) {
    each(pages).for_each(|page| state.kvm.leaves[page] = None);
}

fn moves(state: &mut State, pages: Set) {
    if let Vcpu::Faulting { page, moved, .. } = &mut state.vcpu {
        *moved |= pages & one(usize::from(*page)) != 0;
    }
}
