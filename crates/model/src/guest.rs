//! The guest's side: what it executes by itself (PVALIDATE), and its vCPU's faults in stage 2.

use crate::faults::Fault;
use crate::state::{Is, Set, State, Vcpu, each, one};

/// PVALIDATE of a page, or of both where the entry is large. As hardware it does not wait for the host. Answers whether it changes something.
pub fn pvalidate(state: &mut State, pages: Set, accept: bool) -> bool {
    let large = pages == crate::state::ALL;
    let fits = state.rmp.large == large && !state.rmp.smashing;
    let accepts = |page: usize| {
        let entry = state.rmp.at(page);
        entry.assigned && usize::from(entry.gpa) == page && entry.validated != accept
    };
    if !fits || !each(pages).all(accepts) {
        return false;
    }
    each(pages).take(if large { 1 } else { 2 }).for_each(|page| state.rmp.entries[page].validated = accept);
    state.disturb(pages);
    true
}

/// What a vCPU may do next.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Touch {
    /// Faults on a page: reads the sequence, then the attribute.
    Fault(u8),
    /// Installs what it read, unless an invalidation is going on or was.
    Install,
}

/// Whether the step is possible.
pub fn can_touch(state: &State, touch: Touch) -> bool {
    match (touch, state.vcpu) {
        (Touch::Fault(page), Vcpu::Idle) => {
            state.kvm.leaves[usize::from(page)].is_none()
                && state.is[usize::from(page)] != Is::Absent
                && state.released & one(page.into()) == 0
        }
        (Touch::Install, Vcpu::Faulting { .. }) => true,
        _ => false,
    }
}

/// Takes it.
pub fn touch(state: &mut State, touch: Touch, fault: Option<Fault>) {
    match (touch, state.vcpu) {
        (Touch::Fault(page), _) => {
            let private = state.kvm.private & one(page.into()) != 0;
            state.vcpu = Vcpu::Faulting { page, private, moved: false };
        }
        (Touch::Install, Vcpu::Faulting { page, private, moved }) => {
            let frozen = state.kvm.frozen & one(page.into()) != 0 && fault != Some(Fault::FaultIgnoresFreeze);
            if !frozen && !moved {
                state.kvm.leaves[usize::from(page)] = Some(private);
            }
            state.vcpu = Vcpu::Idle;
        }
        _ => {}
    }
}
