//! Devices: who they are to the secure world, and which domain translates for them.
//!
//! A DMA context keeps a copy of both and compares one number, the generation, each time it enters a guard. So a change costs contexts nothing
//! until it happens, and after a grace period nobody works with the old state.

use crate::ats::{Counters, Port};
use crate::tdisp::Interface;
use crate::{Access, AtsStats, Domain, Error, Fault, FaultKind, Iommu, KindCounters, Tdisp};
use addr::{Gpa, Iova, Span};
use iotlb::Source;
use pt::Perm;
use secure::{Requester, Vmpl};
use std::fmt;
use std::sync::{Arc, PoisonError};
use sync::fail;
use sync::prim::{
    Mutex, MutexGuard,
    atomic::{AtomicU64, Ordering},
};

/// What a device is to the secure world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// All its DMA is T=0: shared memory only.
    Untrusted,
    /// Its DMA is T=1, with the identity that its secure device table entry (sDTE) gives it.
    Trusted {
        /// The guest it belongs to.
        asid: u32,
        /// The privilege level whose permissions count.
        vmpl: Vmpl,
        /// Where the interface stands.
        tdisp: Tdisp,
        /// Whether the sDTE is valid.
        sdte_valid: bool,
        /// Addresses from here on mean shared memory; without a limit the page's owner decides.
        vtom: Option<Gpa>,
    },
}

impl Trust {
    /// The identity of an access, or why there is none (I-13).
    fn requester(self) -> Result<Requester, FaultKind> {
        match self {
            Self::Untrusted => Ok(Requester::Untrusted),
            Self::Trusted { asid, vmpl, tdisp: Tdisp::Run, sdte_valid: true, vtom } => Ok(Requester::Trusted { asid, vmpl, vtom }),
            Self::Trusted { .. } => Err(FaultKind::NotRunning),
        }
    }
}

/// What a context copies.
#[derive(Clone)]
struct State {
    domain: Option<Arc<Domain>>,
    interface: Interface,
    trust: Trust,
    /// What the sDTE leaves of the page table's permissions.
    rights: Perm,
    gpa_offset: u64,
    quarantined: bool,
}

/// The copy, and when it was made.
pub(crate) struct Identity {
    pub(crate) generation: u64,
    pub(crate) domain: Option<Arc<Domain>>,
    pub(crate) requester: Result<Requester, FaultKind>,
    pub(crate) rights: Perm,
    pub(crate) gpa_offset: u64,
}

/// A device.
pub struct Device {
    id: u32,
    name: Box<str>,
    iommu: Arc<Iommu>,
    generation: AtomicU64,
    /// Held for a copy or a swap of a few words, never while anyone waits: contexts take it.
    state: Mutex<State>,
    /// Held by who changes the state, until nobody works with the old one.
    changing: Mutex<()>,
    faults: KindCounters,
    /// Its translation caches. The lock is held for a look or an edit; grace periods under it wait for accesses alone.
    ports: Mutex<Vec<Arc<Port>>>,
    ats: Arc<Counters>,
    unanswered: Mutex<Option<Span<Iova>>>,
}

impl Device {
    pub(crate) fn new(id: u32, name: &str, iommu: Arc<Iommu>) -> Self {
        let state = State {
            domain: None,
            interface: Interface::default(),
            trust: Trust::Untrusted,
            rights: Perm::RW,
            gpa_offset: 0,
            quarantined: false,
        };
        Self {
            id,
            name: name.into(),
            iommu,
            generation: AtomicU64::new(0),
            state: Mutex::new(state),
            changing: Mutex::new(()),
            faults: KindCounters::default(),
            ports: Mutex::default(),
            ats: Arc::default(),
            unanswered: Mutex::default(),
        }
    }

    /// Its number, unique in the IOMMU.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The IOMMU it goes through.
    pub fn iommu(&self) -> &Arc<Iommu> {
        &self.iommu
    }

    /// The domain that translates for it.
    pub fn domain(&self) -> Option<Arc<Domain>> {
        self.state().domain.clone()
    }

    /// What it is to the secure world.
    pub fn trust(&self) -> Trust {
        self.state().trust
    }

    /// Its refused accesses, by kind.
    pub fn faults(&self) -> &KindCounters {
        &self.faults
    }

    /// Lets `domain` translate from now on, in place of the one before if there was one. When this returns, no DMA through the old one is
    /// in flight. Two fallible steps, both named `iommu.attach`.
    ///
    /// # Errors
    /// [`Error::ForeignDomain`], [`Error::HeldByCaller`].
    pub fn attach(&self, domain: &Arc<Domain>) -> Result<(), Error> {
        fail::step("iommu.attach")?;
        if !domain.belongs_to(self.iommu.readers()) {
            return Err(Error::ForeignDomain { domain: domain.id(), device: self.name.clone() });
        }
        self.change(|state| state.domain = Some(Arc::clone(domain)))
    }

    /// Nothing translates any more: every access faults. When this returns, no DMA is in flight.
    ///
    /// # Errors
    /// [`Error::HeldByCaller`].
    pub fn detach(&self) -> Result<(), Error> {
        self.change(|state| state.domain = None)
    }

    /// Says directly what the device is to the secure world, without the protocol that leads there ([`Device::bind`] and on), until the next
    /// request of that. When this returns, no DMA under the old identity is in flight.
    ///
    /// # Errors
    /// [`Error::HeldByCaller`].
    pub fn set_trust(&self, trust: Trust) -> Result<(), Error> {
        self.change(|state| (state.trust, state.rights) = (trust, Perm::RW))
    }

    /// Private memory sits at `GPA = IOVA + offset` (modulo 2^64) for this device. 0, the start, is what SEV-TIO guests have.
    ///
    /// # Errors
    /// [`Error::HeldByCaller`].
    pub fn set_gpa_offset(&self, offset: u64) -> Result<(), Error> {
        self.change(|state| state.gpa_offset = offset)
    }

    /// A function-level reset: ends a quarantine, and empties the device's translation caches. An interface
    /// that was locked or ran is in ERROR afterwards. When this returns, no DMA from before is in flight.
    ///
    /// # Errors
    /// [`Error::HeldByCaller`].
    pub fn reset(&self) -> Result<(), Error> {
        self.change_with(true, |state| {
            state.quarantined = false;
            if state.interface.disturb() {
                (state.trust, state.rights) = (state.interface.trust(), state.interface.rights());
            }
            Ok(())
        })
    }

    /// Whether the device has no access until it is reset, because it did not answer an invalidation.
    pub fn is_quarantined(&self) -> bool {
        self.state().quarantined
    }

    /// What its translation caches had to forget so far.
    pub fn ats(&self) -> AtsStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let Counters { sent, answers, timeouts, quarantines } = &*self.ats;
        let caches = self.ports().len() as u64;
        AtsStats { caches, sent: read(sent), answers: read(answers), timeouts: read(timeouts), quarantines: read(quarantines) }
    }

    /// A step of the interface's protocol.
    pub(crate) fn request(&self, edit: impl Fn(&mut Interface) -> Result<(), Error>) -> Result<(), Error> {
        self.change_with(false, |state| {
            edit(&mut state.interface)?;
            (state.trust, state.rights) = (state.interface.trust(), state.interface.rights());
            Ok(())
        })
    }

    pub(crate) fn interface(&self) -> Interface {
        self.state().interface
    }

    fn change(&self, edit: impl Fn(&mut State)) -> Result<(), Error> {
        self.change_with(false, |state| {
            edit(state);
            Ok(())
        })
    }

    /// `edit` is tried on a copy first, so that nothing happens when it fails.
    fn change_with(&self, reset: bool, edit: impl Fn(&mut State) -> Result<(), Error>) -> Result<(), Error> {
        fail::step("iommu.attach")?;
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.state().domain.clone();
        if let Some(old) = old.as_ref().filter(|old| old.held_by_caller()) {
            return Err(Error::HeldByCaller { domain: old.id() });
        }
        let ports = self.ports();
        let moves_to = {
            let mut next = self.state().clone();
            edit(&mut next)?;
            next.domain.filter(|new| !old.as_ref().is_some_and(|old| Arc::ptr_eq(old, new)))
        };
        if let Some(new) = &moves_to {
            ports.iter().for_each(|port| new.join(port));
        }
        if reset {
            // Nothing is translated from here until the new state holds, so the caches are still empty then.
            self.block();
            self.iommu.readers().grace(old.as_ref().map_or(0, |old| old.id()));
            ports.iter().for_each(|port| port.reset());
        }
        edit(&mut self.state())?;
        // Whoever enters a guard from the grace period on sees this, and copies the new state.
        self.generation.fetch_add(1, Ordering::AcqRel);
        if let Some(old) = &old {
            self.iommu.readers().grace(old.id());
        }
        for port in &ports {
            self.iommu.readers().grace(port.guard());
        }
        // Translations of the old domain, or for the old identity, may still lie in the device.
        if !reset {
            ports.iter().for_each(|port| port.send_all());
            for port in ports.iter().filter(|port| !port.wait()) {
                self.quarantine(old.as_ref().map_or(0, |old| old.id()), port);
            }
        }
        let domain = self.state().domain.clone();
        if let Some(old) = old.filter(|old| !domain.as_ref().is_some_and(|new| Arc::ptr_eq(old, new))) {
            ports.iter().for_each(|port| old.leave(port));
        }
        Ok(())
    }

    /// Takes all access from a device that did not answer. When this returns none is in flight, neither through `domain` nor by an address
    /// that was translated before. Does not allocate and cannot fail (I-9).
    pub(crate) fn quarantine(&self, domain: u32, port: &Port) {
        let span = port.outstanding();
        if !self.is_quarantined() {
            // Before anyone can see that it is.
            *self.unanswered.lock().unwrap_or_else(PoisonError::into_inner) = Some(span);
        }
        let known = self.block();
        // Also when somebody else has done it just now: their grace period may not be over.
        self.iommu.readers().grace(domain);
        for port in self.ports.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            self.iommu.readers().grace(port.guard());
        }
        if !known {
            self.ats.quarantines.fetch_add(1, Ordering::Relaxed);
            let reason = FaultKind::NotAnswered;
            self.record(Fault {
                device: self.id,
                domain: Some(domain),
                iova: span.start(),
                access: Access::Read,
                table: reason.refused_by(),
                reason,
                oa: None,
                done: 0,
                refusal: None,
            });
        }
    }

    /// No access is begun any more. Answers whether that was so already.
    fn block(&self) -> bool {
        let known = std::mem::replace(&mut self.state().quarantined, true);
        self.generation.fetch_add(1, Ordering::AcqRel);
        known
    }

    /// Everything that it had been asked to forget when it was quarantined the last time, in one span.
    pub fn unanswered(&self) -> Option<Span<Iova>> {
        *self.unanswered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A translation cache of the device. It is empty.
    pub(crate) fn add_port(&self, port: &Arc<Port>) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        self.ports.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(port));
        if let Some(domain) = self.domain() {
            domain.join(port);
        }
    }

    /// The cache is gone.
    pub(crate) fn remove_port(&self, port: &Arc<Port>) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        self.ports.lock().unwrap_or_else(PoisonError::into_inner).retain(|own| !Arc::ptr_eq(own, port));
        if let Some(domain) = self.domain() {
            domain.leave(port);
        }
    }

    pub(crate) fn ats_counters(&self) -> &Arc<Counters> {
        &self.ats
    }

    fn ports(&self) -> Vec<Arc<Port>> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    #[inline]
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    pub(crate) fn identity(&self) -> Identity {
        // Read before the state: if that changes in between, the copy counts as old and is made again.
        let generation = self.generation();
        let State { domain, trust, rights, gpa_offset, quarantined, .. } = self.state().clone();
        let requester = if quarantined { Err(FaultKind::Quarantined) } else { trust.requester() };
        Identity { generation, domain, requester, rights, gpa_offset }
    }

    pub(crate) fn record(&self, fault: Fault) {
        self.faults.count(fault.reason);
        self.iommu.faults().record(fault);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a context's view follows.
pub(crate) struct Followed(pub(crate) Arc<Device>);

impl Source for Followed {
    type Identity = Identity;

    #[inline]
    fn generation(&self) -> u64 {
        self.0.generation()
    }

    fn identity(&self) -> Identity {
        self.0.identity()
    }
}

impl iotlb::Identity for Identity {
    type Domain = Domain;

    #[inline]
    fn generation(&self) -> u64 {
        self.generation
    }

    #[inline]
    fn domain(&self) -> Option<&Arc<Domain>> {
        self.domain.as_ref()
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let domain = self.domain().map(|domain| domain.id());
        f.debug_struct("Device").field("id", &self.id).field("name", &self.name).field("domain", &domain).finish_non_exhaustive()
    }
}
