//! What must hold in every state: the invariants of the design that the transaction is for, in the design's words.

use crate::device::{self, Device};
use crate::faults::Fault;
use crate::host::{self, Stage};
use crate::state::{ALL, Broken, IoTable, Is, PAGES, Set, State, Vcpu, each, one};

/// A property.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum Law {
    /// No leaf and no cached translation reaches a page that was released.
    I4,
    /// A private leaf is its entries: assigned, of the same GPA, of the same size.
    I5,
    /// A shared leaf reaches unassigned entries only.
    I6,
    /// A page in transition has no live or cached translation.
    I7,
    /// No page has two private GPAs.
    I8,
    /// Pages that nobody changes are mapped as whose they are, and nothing else is.
    I10,
    /// Attribute and RMP differ only where no stage-2 leaf exists.
    I11,
    /// T=1 needs RUN; T=0 never reaches private memory.
    I13,
    /// A reader never waits for a writer.
    I15,
    /// No DMA to a page that was given back.
    Released,
    /// DMA to a page that nothing happens to is answered as whose it is: cut, merge and smash are hitless, the acknowledgement comes last.
    Exact,
    /// Every request comes to its end, and leaves nothing held or frozen.
    Ends,
}

impl Law {
    /// Every one.
    pub const ALL: [Self; 12] = [
        Self::I4,
        Self::I5,
        Self::I6,
        Self::I7,
        Self::I8,
        Self::I10,
        Self::I11,
        Self::I13,
        Self::I15,
        Self::Released,
        Self::Exact,
        Self::Ends,
    ];

    /// For reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::I4 => "I-4 nothing leads to a released page",
            Self::I5 => "I-5 a private leaf is its entries",
            Self::I6 => "I-6 a shared leaf reaches no private page",
            Self::I7 => "I-7 a page in transition has no translation",
            Self::I8 => "I-8 a page has one private GPA",
            Self::I10 => "I-10 the tables say whose a page is",
            Self::I11 => "I-11 a stage-2 leaf says what the RMP says",
            Self::I13 => "I-13 private memory needs T=1 in RUN",
            Self::I15 => "I-15 a reader never waits for a writer",
            Self::Released => "no DMA to a released page",
            Self::Exact => "undisturbed DMA is answered as whose the page is",
            Self::Ends => "every request ends and leaves nothing held",
        }
    }

    /// Whether it holds.
    pub fn holds(self, state: &State, fault: Option<Fault>) -> bool {
        match self {
            Self::I4 => gone(state) & reached(state) == 0,
            Self::I5 => private_leaves_fit(state),
            Self::I6 => each(state.io.mapped()).all(|page| state.is[page] != Is::Shared || !state.rmp.at(frame(state, page)).assigned),
            Self::I7 => state.hosts.iter().fold(0, |set, host| set | host.in_transition()) & reached(state) == 0,
            Self::I8 => !(state.kvm.private & one(0) != 0 && state.kvm.private & one(crate::state::ALIAS) != 0),
            Self::I10 => tables_say_whose(state),
            Self::I11 => {
                let told = |page: &usize| state.kvm.untold & one(*page) == 0;
                each(ALL).filter(told).all(|page| state.kvm.leaves[page].is_none_or(|private| private == state.rmp.at(page).assigned))
            }
            Self::I13 => state.broken != Some(Broken::Private),
            Self::I15 => (0..state.devices.len()).all(|device| can_move(state, device, fault)),
            Self::Released => state.broken != Some(Broken::Released),
            Self::Exact => state.broken != Some(Broken::Answer),
            Self::Ends => ends(state, fault),
        }
    }
}

/// Pages that are the host's again, or that the secure world kept; and absent ones that no punch is at work on.
fn gone(state: &State) -> Set {
    let absent = (0..PAGES).filter(|page| state.is[*page] == Is::Absent).map(one).sum::<Set>();
    state.released | absent & !state.changing()
}

/// Pages that a leaf, a cache, or an access under way leads to.
fn reached(state: &State) -> Set {
    state.devices.iter().fold(state.io.mapped(), |set, device| set | device.reaches())
}

fn frame(state: &State, page: usize) -> usize {
    state.io.walk(page).map_or(page, |leaf| leaf.frame_of(page))
}

fn private_leaves_fit(state: &State) -> bool {
    let large = state.io == IoTable::Large;
    each(state.io.mapped()).filter(|page| state.is[*page] == Is::Private).all(|page| {
        let entry = state.rmp.at(frame(state, page));
        // While a smash is under way sizes may differ: devices look again.
        entry.assigned && usize::from(entry.gpa) == page && (large == state.rmp.large || state.rmp.smashing)
    })
}

fn tables_say_whose(state: &State) -> bool {
    let quiet = |page: &usize| (state.changing() | state.kvm.untold) & one(*page) == 0;
    each(ALL).filter(quiet).all(|page| match (state.is[page], state.io.walk(page)) {
        (Is::Absent, leaf) => leaf.is_none(),
        (_, leaf) => leaf.is_some_and(|leaf| leaf.frame_of(page) == page),
    })
}

fn can_move(state: &State, index: usize, fault: Option<Fault>) -> bool {
    let mut moves = Vec::new();
    device::moves(state, index, fault, &mut moves);
    !moves.is_empty() || state.devices[index].quarantined
}

/// With devices that do no more than finish what they began, and answer, every thread comes to its end.
fn ends(state: &State, fault: Option<Fault>) -> bool {
    let idle = |state: &State| state.hosts.iter().all(|host| host.at == Stage::Idle);
    if idle(state) {
        return state.lock.is_none() && state.kvm.frozen == 0 && !state.rmp.smashing;
    }
    // Only who waits can be held up: from any other stage the next one follows by itself.
    let waits = |index: usize| state.hosts[index].at != Stage::Idle && !host::can_step(state, index, fault);
    if !(0..state.hosts.len()).any(waits) {
        return true;
    }
    let mut state = state.clone();
    let mut moves = Vec::new();
    while !idle(&state) {
        let mut moved = false;
        for index in 0..state.hosts.len() {
            if host::can_step(&state, index, fault) {
                host::step(&mut state, index, false, fault);
                moved = true;
            }
        }
        for index in 0..state.devices.len() {
            moves.clear();
            device::moves(&state, index, fault, &mut moves);
            let Device { at, .. } = state.devices[index];
            let finishing = |step: &&device::Move| match step {
                device::Move::Go => at != device::At::Out,
                device::Move::Leave | device::Move::Ack => true,
                device::Move::Look(_) | device::Move::Use(_) => false,
            };
            if let Some(step) = moves.iter().find(finishing).copied() {
                device::step(&mut state, index, step, fault);
                moved = true;
            }
        }
        if !moved {
            return false;
        }
        if let Vcpu::Faulting { .. } = state.vcpu {
            state.vcpu = Vcpu::Idle;
        }
    }
    true
}
