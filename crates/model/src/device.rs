//! A device's side (D-2): guard, catch up with the log, IOTLB or walk, check against the RMP, access, leave. An ATS device has a cache of its own, asks for
//! translations inside a guard and uses them outside of any.
//!
//! What a device does with its own cache alone is part of the step before or after it: nobody can come in between.
//!
//! No step here looks at what a host thread is doing: that is I-15, and the property by that name says so in every state.

use crate::faults::Fault;
use crate::state::{Broken, Is, Leaf, PAGES, Set, State, each, one};

/// What a device is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Kind {
    /// Its DMA carries T=1 while its interface is in RUN.
    pub trusted: bool,
    /// Has a cache of translations.
    pub ats: bool,
}

/// Translations by page, and the large one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Cache {
    small: [Option<u8>; PAGES],
    large: bool,
}

impl Cache {
    fn fill(&mut self, leaf: Leaf) {
        match leaf.large {
            true => self.large = true,
            false => self.small[usize::from(leaf.at)] = Some(leaf.frame),
        }
    }

    /// The translation that it has of a page.
    pub fn lookup(&self, page: usize) -> Option<Leaf> {
        let small = self.small[page].map(|frame| Leaf { large: false, at: page as u8, frame });
        small.or(self.large.then_some(Leaf::LARGE))
    }

    fn invalidate(&mut self, pages: Set) {
        each(pages).for_each(|page| self.small[page] = None);
        self.large &= pages == 0;
    }

    /// The IOVAs that it translates.
    pub fn covers(&self) -> Set {
        let small = (0..PAGES).filter(|page| self.small[*page].is_some()).map(one).sum();
        if self.large { crate::state::ALL } else { small }
    }
}

/// How far an access has come.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum At {
    /// In no guard.
    Out,
    /// The guard is open.
    Entered,
    /// What was logged is applied.
    Ready,
    /// The size differed: the next walk counts.
    Again {
        /// Where.
        page: u8,
    },
    /// The walk is over; IOTLB not filled, leaf not checked.
    Walked {
        /// Where.
        page: u8,
        /// What it gave.
        leaf: Leaf,
        /// After a size that differed.
        fresh: bool,
    },
    /// Checked: the bytes come next.
    Allowed {
        /// Where.
        page: u8,
        /// By which leaf.
        leaf: Leaf,
    },
    /// A translation is on its way to the device's cache; the guard is left.
    Answering(Leaf),
    /// As `Allowed`, outside of any guard.
    CachedAllowed {
        /// Where.
        page: u8,
        /// By which leaf.
        leaf: Leaf,
    },
}

/// One device, with one context.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Device {
    /// What it is.
    pub kind: Kind,
    /// Its interface is in RUN.
    pub run: bool,
    /// What was promised last about that.
    pub promised: bool,
    /// The context's copy of it.
    pub copied: bool,
    /// The copy is old (its generation differs).
    pub stale: bool,
    /// How far its access is.
    pub at: At,
    /// Its IOTLB.
    pub iotlb: Cache,
    /// Logged since it last caught up. The log's numbers say no more than this.
    pub missed: Set,
    /// Its ATS cache.
    pub atc: Cache,
    /// It is asked to forget these.
    pub asked: Set,
    /// Did not answer in time: nothing of it passes any more.
    pub quarantined: bool,
    /// Pages that changed while its access was under way: either answer is right.
    pub disturbed: Set,
    /// The smash sequence moved since the last walk.
    pub moved: bool,
    /// `late-fill`: what the next guard will cache.
    late: Option<Leaf>,
}

/// What a device may do next.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Move {
    /// Enter a guard, or the next step of an access.
    Go,
    /// Access a page, inside the guard.
    Look(u8),
    /// Leave the guard.
    Leave,
    /// Access a page by its own cache.
    Use(u8),
    /// Answer an invalidation.
    Ack,
}

impl Device {
    /// One that has done nothing yet.
    pub fn new(kind: Kind) -> Self {
        Self {
            kind,
            run: true,
            promised: true,
            copied: true,
            stale: false,
            at: At::Out,
            iotlb: Cache::default(),
            missed: 0,
            atc: Cache::default(),
            asked: 0,
            quarantined: false,
            disturbed: 0,
            moved: false,
            late: None,
        }
    }

    /// Whether a guard is open.
    pub fn is_inside(&self) -> bool {
        !matches!(self.at, At::Out | At::Answering(_) | At::CachedAllowed { .. })
    }

    /// Cut off, with an access by its own cache still under way.
    pub fn is_draining(&self) -> bool {
        self.quarantined && matches!(self.at, At::CachedAllowed { .. })
    }

    pub(crate) fn disturb(&mut self, pages: Set) {
        if self.at != At::Out {
            self.disturbed |= pages;
        }
    }

    pub(crate) fn see_smash(&mut self) {
        // Before the walk that counts it does not matter.
        self.moved |= matches!(self.at, At::Walked { fresh: true, .. });
    }

    /// The translation that an access under way will use.
    pub fn in_flight(&self) -> Option<Leaf> {
        match self.at {
            At::Walked { leaf, .. } | At::Allowed { leaf, .. } | At::CachedAllowed { leaf, .. } | At::Answering(leaf) => Some(leaf),
            At::Out | At::Entered | At::Ready | At::Again { .. } => None,
        }
    }

    /// Pages that it can reach without another look at the IO page table, now or after it has caught up.
    pub fn reaches(&self) -> Set {
        if self.quarantined {
            return if self.is_draining() { self.in_flight().map_or(0, Leaf::covers) } else { 0 };
        }
        let in_flight = self.in_flight().map_or(0, Leaf::covers);
        in_flight | self.iotlb.covers() & !self.missed | self.late.map_or(0, Leaf::covers) | self.atc.covers()
    }

    /// Whether the requester may do DMA at all.
    fn is_who_it_says(&self) -> bool {
        !self.kind.trusted || self.copied
    }
}

/// What it may do in this state.
pub fn moves(state: &State, index: usize, fault: Option<Fault>, out: &mut Vec<Move>) {
    let device = &state.devices[index];
    match device.at {
        At::Out if device.quarantined => {}
        At::Out => {
            out.push(Move::Go);
            out.extend((0..PAGES).filter(|page| device.atc.lookup(*page).is_some()).map(|page| Move::Use(page as u8)));
        }
        At::Ready if fault == Some(Fault::WalkTakesLock) && state.lock.is_some() => {}
        At::Ready => out.extend([Move::Look(0), Move::Look(1), Move::Leave]),
        _ => out.push(Move::Go),
    }
    if device.asked != 0 && (fault == Some(Fault::AtsAckEarly) || !uses(device, device.asked)) {
        out.push(Move::Ack);
    }
}

/// Whether an access of its own by the cache is under way there.
fn uses(device: &Device, pages: Set) -> bool {
    matches!(device.at, At::CachedAllowed { leaf, .. } if leaf.covers() & pages != 0)
}

/// Takes a step that [`moves`] offers.
pub fn step(state: &mut State, index: usize, step: Move, fault: Option<Fault>) {
    let changing = state.changing();
    let device = &mut state.devices[index];
    match (step, device.at) {
        (Move::Ack, _) => {
            if fault != Some(Fault::AtsFalseAnswer) {
                device.atc.invalidate(device.asked);
            }
            let dropped = matches!(device.at, At::Answering(leaf) if leaf.covers() & device.asked != 0);
            if dropped && fault != Some(Fault::AtsKeepsAnswer) {
                device.at = At::Out;
            }
            device.asked = 0;
        }
        (Move::Leave, _) => leave(state, index, fault, At::Out),
        (Move::Look(page), _) => match device.iotlb.lookup(page.into()) {
            Some(leaf) => found(state, index, page, leaf, false, fault),
            None => walk(state, index, page, false),
        },
        (Move::Use(page), _) => {
            device.disturbed = changing;
            let Some(leaf) = device.atc.lookup(page.into()) else { return };
            // What is refused stays in the cache: only an invalidation takes it out.
            if check_translated(state, index, page.into(), leaf, fault) {
                state.devices[index].at = At::CachedAllowed { page, leaf };
            }
        }
        (Move::Go, At::Out) => {
            device.disturbed = changing;
            device.at = At::Entered;
        }
        (Move::Go, At::Entered) => catch_up(state, index, fault),
        (Move::Go, At::Ready) => {}
        (Move::Go, At::Again { page }) => walk(state, index, page, true),
        (Move::Go, At::Walked { page, leaf, fresh }) => {
            match fault {
                Some(Fault::LateFill) => device.late = Some(leaf),
                _ => device.iotlb.fill(leaf),
            }
            found(state, index, page, leaf, fresh, fault);
        }
        (Move::Go, At::Allowed { page, leaf } | At::CachedAllowed { page, leaf }) => answer(state, index, page, Some(leaf)),
        (Move::Go, At::Answering(leaf)) => {
            // Its entries never overlap.
            device.atc.invalidate(leaf.covers());
            device.atc.fill(leaf);
            device.at = At::Out;
        }
    }
    let device = &mut state.devices[index];
    // What is behind is forgotten, so that states which differ in nothing that matters are one.
    if device.at == At::Out {
        device.disturbed = 0;
    }
}

fn walk(state: &mut State, index: usize, page: u8, fresh: bool) {
    match state.io.walk(page.into()) {
        Some(leaf) => state.devices[index].at = At::Walked { page, leaf, fresh },
        None => answer(state, index, page, None),
    }
}

/// A translation, from the IOTLB or a walk, is checked.
fn found(state: &mut State, index: usize, page: u8, leaf: Leaf, fresh: bool, fault: Option<Fault>) {
    let verdict = check(state, index, page.into(), leaf, fault);
    let device = &mut state.devices[index];
    let moved = std::mem::take(&mut device.moved);
    match verdict {
        Verdict::Allowed if device.kind.ats => leave(state, index, fault, At::Answering(leaf)),
        Verdict::Allowed => device.at = At::Allowed { page, leaf },
        Verdict::OtherSize if fault != Some(Fault::NoFreshWalk) && (!fresh || moved) => {
            device.iotlb.invalidate(leaf.covers());
            device.at = At::Again { page };
        }
        Verdict::OtherSize | Verdict::Refused => answer(state, index, page, None),
    }
}

fn catch_up(state: &mut State, index: usize, fault: Option<Fault>) {
    let device = &mut state.devices[index];
    if device.stale && fault != Some(Fault::StaleIdentity) {
        // Out again, with an empty IOTLB and a new copy.
        (device.copied, device.stale, device.missed) = (device.run, false, 0);
        device.iotlb = Cache::default();
        return leave(state, index, fault, At::Out);
    }
    if fault != Some(Fault::CatchUpAfterLookup) {
        device.iotlb.invalidate(device.missed);
        device.missed = 0;
    }
    if let Some(leaf) = device.late.take() {
        device.iotlb.fill(leaf);
    }
    device.at = At::Ready;
}

fn leave(state: &mut State, index: usize, fault: Option<Fault>, to: At) {
    let device = &mut state.devices[index];
    device.at = to;
    if fault == Some(Fault::CatchUpAfterLookup) {
        device.iotlb.invalidate(device.missed);
        device.missed = 0;
    }
    state.hosts.iter_mut().for_each(|host| host.waits &= !(1 << index));
}

enum Verdict {
    Allowed,
    /// Nothing is wrong but the size.
    OtherSize,
    Refused,
}

/// The check of the whole leaf, at one moment.
fn check(state: &State, index: usize, page: usize, leaf: Leaf, fault: Option<Fault>) -> Verdict {
    let (device, rmp) = (&state.devices[index], &state.rmp);
    if fault == Some(Fault::SkipRmpCheck) {
        return Verdict::Allowed;
    }
    if !device.is_who_it_says() {
        return Verdict::Refused;
    }
    let assigned = each(leaf.frames()).filter(|frame| rmp.at(*frame).assigned).map(one).sum::<Set>();
    if assigned == 0 {
        return Verdict::Allowed;
    }
    let entry = rmp.at(leaf.frame_of(page));
    if !device.kind.trusted || assigned != leaf.frames() || usize::from(entry.gpa) != page || !entry.validated {
        return Verdict::Refused;
    }
    if leaf.large == rmp.large || rmp.smashing { Verdict::Allowed } else { Verdict::OtherSize }
}

/// The check of an access by an address that was translated before: of the page that is touched, without a GPA or a size to compare.
fn check_translated(state: &State, index: usize, page: usize, leaf: Leaf, fault: Option<Fault>) -> bool {
    let device = &state.devices[index];
    let entry = state.rmp.at(leaf.frame_of(page));
    let may = !entry.assigned || (device.kind.trusted && entry.validated);
    fault == Some(Fault::SkipRmpCheck) || (device.is_who_it_says() && may)
}

/// The access is answered: with bytes, by a leaf, or with a fault.
fn answer(state: &mut State, index: usize, page: u8, by: Option<Leaf>) {
    let page = usize::from(page);
    let device = &mut state.devices[index];
    device.at = if device.is_inside() { At::Ready } else { At::Out };
    if device.quarantined && by.is_none() {
        return;
    }
    let device = *device;
    let quiet = (device.disturbed | state.kvm.untold) & one(page) == 0;
    let right = (!device.kind.trusted || device.copied)
        && match state.is[page] {
            Is::Shared => true,
            Is::Private => device.kind.trusted && state.rmp.at(page).validated,
            Is::Absent => false,
        };
    let mut seen = (quiet && right != by.is_some()).then_some(Broken::Answer);
    if let Some(leaf) = by {
        let frame = leaf.frame_of(page);
        let entry = state.rmp.at(frame);
        if entry.assigned && (!device.kind.trusted || !device.promised || usize::from(entry.gpa) != page) {
            seen = Some(Broken::Private);
        }
        if state.released & one(frame) != 0 {
            seen = Some(Broken::Released);
        }
    }
    state.broken = state.broken.or(seen);
}
