//! A host thread's side: the transaction of design D-6, stage by stage, and whatever else edits the same leaves (punch, populate, merge, the split that a
//! PVALIDATE asks for, a change of a device's identity). The stages are those of `convert`'s `stages.rs`:
//!
//! hold and plan, reserve, freeze, detach (smash and cut, clear, log, grace, device caches), switch, commit, attach, thaw, acknowledge.
//!
//! One step is one store that somebody else may see, or one wait.

use crate::device::Device;
use crate::faults::Fault;
use crate::state::{ALIAS, ALL, Entry, IoTable, Is, PAGES, Set, State, Vcpu, each, one};

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

    fn flushes(fault: Option<Fault>) -> [Flush; 3] {
        match fault {
            Some(Fault::GraceBeforeLog) => [Flush::Grace, Flush::Log, Flush::Ats],
            Some(Fault::AtsBeforeGrace) => [Flush::Log, Flush::Ats, Flush::Grace],
            _ => [Flush::Log, Flush::Grace, Flush::Ats],
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Flush {
    Log,
    Grace,
    Ats,
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
        Stage::Await(part) => match Host::flushes(fault)[usize::from(part)] {
            Flush::Log => true,
            Flush::Grace => host.waits == 0,
            Flush::Ats => state.devices.iter().all(|device| device.asked == 0),
        },
        _ => true,
    }
}

/// Whether the thread waits for devices' answers, and may give up on them.
pub fn can_time_out(state: &State, index: usize, fault: Option<Fault>) -> bool {
    let waits = matches!(state.hosts[index].at, Stage::Await(part) if Host::flushes(fault)[usize::from(part)] == Flush::Ats);
    waits && !can_step(state, index, fault)
}

/// Gives up on devices that have not answered: they are cut off.
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

/// Now that nobody else can change them: the pages that are not what they are to become.
fn hold(state: &mut State, index: usize, host: &mut Host, fault: Option<Fault>) -> Stage {
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

fn detach(state: &mut State, host: &mut Host, fault: Option<Fault>) -> Stage {
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
fn cut(state: &mut State) {
    state.io = IoTable::Small(state.io.frames());
}

fn clear(state: &mut State, page: usize) {
    if let IoTable::Small(frames) = &mut state.io {
        frames[page] = None;
    }
}

fn flush(state: &mut State, host: &mut Host, part: u8, fault: Option<Fault>) -> Stage {
    let Some(what) = Host::flushes(fault).get(usize::from(part)).copied() else {
        return after_flush(state, host);
    };
    match what {
        Flush::Log => {
            if fault != Some(Fault::SkipInvalidation) {
                state.devices.iter_mut().for_each(|device| device.missed |= host.todo);
            }
            Stage::Flush(part + 1)
        }
        Flush::Grace if fault == Some(Fault::SkipGrace) => Stage::Flush(part + 1),
        Flush::Grace => {
            host.waits = (0..).zip(&state.devices).filter(|(_, device)| device.is_inside()).map(|(at, _)| 1u8 << at).sum();
            if host.waits == 0 { Stage::Flush(part + 1) } else { Stage::Await(part) }
        }
        Flush::Ats => {
            let asks = fault != Some(Fault::SkipAts) && host.todo != 0;
            let asked = state.devices.iter_mut().filter(|device| asks && device.kind.ats && !device.quarantined);
            let mut any = false;
            for device in asked {
                device.asked |= host.todo;
                any = true;
            }
            if any { Stage::Await(part) } else { Stage::Flush(part + 1) }
        }
    }
}

fn after_flush(state: &mut State, host: &mut Host) -> Stage {
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

/// Page by page, or both in one entry. A refusal ends the batch: what is done goes on, what is not stays.
fn switch(state: &mut State, host: &mut Host, fails: bool, fault: Option<Fault>) -> Stage {
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

fn commit(state: &mut State, host: &mut Host, fault: Option<Fault>) -> Stage {
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

fn tell(state: &mut State, host: &mut Host, fails: bool, fault: Option<Fault>) -> Stage {
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

fn to_attach(state: &mut State, host: &mut Host, fault: Option<Fault>) -> Stage {
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

fn attach(state: &mut State, host: &mut Host, fault: Option<Fault>) -> Stage {
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

/// fallocate: KVM zaps, and the memory goes.
fn discard(state: &mut State, host: &mut Host, fails: bool, fault: Option<Fault>) -> Stage {
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

fn freeze(state: &mut State, pages: Set) {
    zap(state, pages);
    state.kvm.frozen |= pages;
}

fn thaw(state: &mut State, pages: Set, fault: Option<Fault>) {
    state.kvm.frozen &= !pages;
    if fault != Some(Fault::ForgetSequence) {
        moves(state, pages);
    }
}

fn zap(state: &mut State, pages: Set) {
    each(pages).for_each(|page| state.kvm.leaves[page] = None);
}

fn moves(state: &mut State, pages: Set) {
    if let Vcpu::Faulting { page, moved, .. } = &mut state.vcpu {
        *moved |= pages & one(usize::from(*page)) != 0;
    }
}

fn smash_sequence(state: &mut State, odd: bool) {
    state.rmp.smashing = odd;
    state.devices.iter_mut().for_each(Device::see_smash);
}
