//! Devices: who they are to the secure world, and which domain translates for them.
//!
//! A DMA context keeps a copy of both and compares one number, the generation, each time it enters a guard. So a change costs contexts nothing
//! until it happens, and after a grace period nobody works with the old state.

use crate::{Domain, Error, Fault, FaultKind, Iommu, KindCounters};
use addr::Gpa;
use secure::{Requester, Vmpl};
use std::fmt;
use std::sync::{Arc, PoisonError};
use sync::fail;
use sync::prim::{
    Mutex, MutexGuard,
    atomic::{AtomicU64, Ordering},
};

/// Where a trusted device interface stands (PCIe TDISP).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tdisp {
    /// Not set up; the host may change it.
    Unlocked,
    /// Its configuration is fixed, the guest has not accepted it yet.
    Locked,
    /// Accepted: the only state in which its DMA may be trusted.
    Run,
    /// Something touched the configuration; nothing goes until it is unlocked.
    Error,
}

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
    trust: Trust,
    gpa_offset: u64,
}

/// The copy, and when it was made.
pub(crate) struct Identity {
    pub(crate) generation: u64,
    pub(crate) domain: Option<Arc<Domain>>,
    pub(crate) requester: Result<Requester, FaultKind>,
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
}

impl Device {
    pub(crate) fn new(id: u32, name: &str, iommu: Arc<Iommu>) -> Self {
        let state = State { domain: None, trust: Trust::Untrusted, gpa_offset: 0 };
        Self {
            id,
            name: name.into(),
            iommu,
            generation: AtomicU64::new(0),
            state: Mutex::new(state),
            changing: Mutex::new(()),
            faults: KindCounters::default(),
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

    /// Changes what the device is to the secure world. When this returns, no DMA under the old identity is in flight.
    ///
    /// # Errors
    /// [`Error::HeldByCaller`].
    pub fn set_trust(&self, trust: Trust) -> Result<(), Error> {
        self.change(|state| state.trust = trust)
    }

    /// Private memory sits at `GPA = IOVA + offset` (modulo 2^64) for this device. 0, the start, is what SEV-TIO guests have.
    ///
    /// # Errors
    /// [`Error::HeldByCaller`].
    pub fn set_gpa_offset(&self, offset: u64) -> Result<(), Error> {
        self.change(|state| state.gpa_offset = offset)
    }

    fn change(&self, edit: impl FnOnce(&mut State)) -> Result<(), Error> {
        fail::step("iommu.attach")?;
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.state().domain.clone();
        if let Some(old) = old.as_ref().filter(|old| old.held_by_caller()) {
            return Err(Error::HeldByCaller { domain: old.id() });
        }
        edit(&mut self.state());
        // Whoever enters a guard from the grace period on sees this, and copies the new state.
        self.generation.fetch_add(1, Ordering::AcqRel);
        if let Some(old) = old {
            self.iommu.readers().grace(old.id());
        }
        Ok(())
    }

    #[inline]
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    pub(crate) fn identity(&self) -> Identity {
        // Read before the state: if that changes in between, the copy counts as old and is made again.
        let generation = self.generation();
        let State { domain, trust, gpa_offset } = self.state().clone();
        Identity { generation, domain, requester: trust.requester(), gpa_offset }
    }

    pub(crate) fn record(&self, fault: Fault) {
        self.faults.count(fault.reason);
        self.iommu.faults().record(fault);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let domain = self.domain().map(|domain| domain.id());
        f.debug_struct("Device").field("id", &self.id).field("name", &self.name).field("domain", &domain).finish_non_exhaustive()
    }
}
