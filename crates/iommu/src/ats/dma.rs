//! DMA of a device that translates ahead of time: it asks for a translation once, keeps it, and from then on names output addresses.
//!
//! The IOMMU does not walk for such an access. It looks whether the device may do that at all, and at the secure world's entry of each
//! page that is touched; that the translation still holds is what the invalidation protocol is for.

use super::Port;
use super::cache::Cache;
use crate::device::Identity;
use crate::dma::CHUNK_BYTES;
use crate::far::{self, Buffer};
use crate::{Access, Device, Dma, Error, Fault, FaultKind};
use addr::{Address, Iova, Oa, Span};
use backing::Windows;
use pt::Perm;
use secure::Refusal;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use sync::pause::pause;
use sync::{Slot, fail};

/// A translation cache in a device, and the DMA that goes through it: for one thread at a time. A device can have several.
///
/// ```
/// use addr::{Iova, Span};
/// use backing::{Backing, Frames};
/// use lockstep_iommu_device::{AtsDma, Config, Iommu, SystemRmp};
/// use pt::{Gather, Perm, Stock};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let iommu = Iommu::new(&Config::default(), SystemRmp::new().into())?;
/// let (domain, device) = (iommu.domain()?, iommu.device("nic"));
/// device.attach(&domain)?;
/// let memory = Backing::memfd(2 << 20, Frames::Contiguous)?;
/// let span = Span::from_len(Iova::new(0x4000_0000), 2 << 20)?;
/// let (mut stock, mut gather) = (Stock::new(iommu.arena()), Gather::new());
/// domain.table().map(span, memory.window().start(), Perm::RW, addr::SizeSet::ALL, &mut stock, &mut gather)?;
/// domain.flush(gather);
///
/// let mut dma = AtsDma::new(&device)?;
/// dma.write(Iova::new(0x4000_0000), b"once translated")?;
/// dma.write(Iova::new(0x4000_8000), b"and used again")?;
/// assert_eq!((dma.cached(), dma.requests()), (1, 1));
///
/// let mut gather = Gather::new();
/// domain.table().unmap(span, &mut gather);
/// // Sends an invalidation and waits for the device's answer.
/// domain.flush(gather);
/// assert_eq!((dma.cached(), device.ats().sent), (0, 1));
/// assert!(dma.write(Iova::new(0x4000_0000), b"gone").is_err());
/// # Ok(())
/// # }
/// ```
pub struct AtsDma {
    port: Arc<Port>,
    device: Arc<Device>,
    /// Translation requests are ordinary ones to the IOMMU.
    translator: Dma,
    slot: Slot,
    identity: Identity,
    requests: u64,
}

impl AtsDma {
    /// A cache of `device`, empty. A fallible step, named `iommu.context`.
    ///
    /// # Errors
    /// Only what a test injects.
    pub fn new(device: &Arc<Device>) -> Result<Self, Error> {
        let translator = Dma::new(device)?;
        let port = Port::new(device);
        let slot = device.iommu().readers().slot_named(device.name());
        device.add_port(&port);
        Ok(Self { port, device: Arc::clone(device), translator, slot, identity: device.identity(), requests: 0 })
    }

    /// The device it acts for.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Reads memory, from `iova` on.
    ///
    /// # Errors
    /// [`Fault`]; at least `done` bytes of `into` have been filled.
    pub fn read(&mut self, iova: Iova, into: &mut [u8]) -> Result<(), Fault> {
        self.transfer(iova, into.len() as u64, Access::Read, far::Into(into))
    }

    /// Writes memory, from `iova` on.
    ///
    /// # Errors
    /// [`Fault`]; at least `done` bytes have been written.
    pub fn write(&mut self, iova: Iova, from: &[u8]) -> Result<(), Fault> {
        self.transfer(iova, from.len() as u64, Access::Write, far::From(from))
    }

    /// Translations that are cached now.
    pub fn cached(&self) -> usize {
        self.port.cache().len()
    }

    /// Translations that were asked for so far.
    pub fn requests(&self) -> u64 {
        self.requests
    }

    /// From now on the device does not answer invalidations, or does so again: a broken device, for tests of what then happens.
    pub fn set_mute(&self, mute: bool) {
        self.port.mute.store(mute, Ordering::Relaxed);
    }

    fn transfer(&mut self, iova: Iova, len: u64, access: Access, mut buffer: impl Buffer) -> Result<(), Fault> {
        if iova.checked_add(len.saturating_sub(1)).is_none() {
            return Err(self.refuse(iova, access, 0, FaultKind::Wraps, None, None));
        }
        let mut done = 0;
        while done < len {
            let moved = self.transaction(iova, done, len, access, &mut buffer);
            // What was asked meanwhile, and could not be answered then.
            self.port.serve();
            done += moved?;
        }
        Ok(())
    }

    /// One transaction: look up or ask, then access. Whoever sends an invalidation meanwhile gets no answer before its end, so this is the
    /// draining that an answer promises.
    fn transaction(&mut self, iova: Iova, done: u64, len: u64, access: Access, buffer: &mut impl Buffer) -> Result<u64, Fault> {
        let port = Arc::clone(&self.port);
        let mut cache = port.cache();
        port.catch_up(&mut cache);
        let at = iova.plus(done);
        let (oa, rest) = match cache.lookup(at, access == Access::Write) {
            Some(found) => found,
            None => self.ask(&mut cache, at, access).map_err(|fault| Fault { done, ..fault })?,
        };
        let now = (len - done).min(CHUNK_BYTES).min(rest.saturating_add(1));
        linger();
        self.enter();
        let accessed = self.access(oa, now, access, done, buffer);
        self.slot.leave();
        accessed.map_err(|(part, kind, refusal)| self.refuse(at.plus(part), access, done + part, kind, Some(oa.plus(part)), refusal))?;
        Ok(now)
    }

    /// A translation request. The answer is valid when it is given; what is invalidated from then on is in the queue, and the cache is
    /// ours until the transaction is over.
    fn ask(&mut self, cache: &mut Cache, at: Iova, access: Access) -> Result<(Oa, u64), Fault> {
        self.requests += 1;
        let translation = self.translator.translate(at, access)?;
        // The answer is on its way.
        pause();
        let (leaf, into) = (translation.leaf, at.offset_from(translation.leaf.start()));
        cache.fill(leaf, Oa::new(translation.oa.get() - into), access == Access::Write);
        Ok((translation.oa, leaf.last().offset_from(at)))
    }

    /// A guard under which the identity is the device's present one.
    fn enter(&mut self) {
        loop {
            self.slot.enter(self.port.guard);
            if self.identity.generation == self.device.generation() {
                return;
            }
            self.slot.leave();
            self.identity = self.device.identity();
        }
    }

    /// A translated request, under a guard.
    fn access(
        &self,
        oa: Oa,
        len: u64,
        access: Access,
        done: u64,
        buffer: &mut impl Buffer,
    ) -> Result<(), (u64, FaultKind, Option<Refusal>)> {
        if self.identity.domain.is_none() {
            return Err((0, FaultKind::NotAttached, None));
        }
        let who = self.identity.requester.map_err(|kind| (0, kind, None))?;
        let wanted = if access == Access::Read { Perm::READ } else { Perm::WRITE };
        if !self.identity.rights.allows(wanted) {
            return Err((0, FaultKind::NoRight, None));
        }
        let span = Span::from_len(oa, len).map_err(|_| (0, FaultKind::Wraps, None))?;
        let checked = self.device.iommu().rmp().check_translated(who, span, access.into());
        checked.map_err(|refusal| (refusal.at.get().saturating_sub(oa.get()), FaultKind::SecureTranslated, Some(refusal)))?;
        // Allowed: the bytes come next.
        pause();
        let backing = Windows::find(oa).ok_or((0, FaultKind::NoHostMemory, None))?;
        let copied = match (backing.host(oa, len), backing.owner(), backing.offset_of(oa, len)) {
            (Some(host), ..) => buffer.near(host, done as usize, len as usize),
            (None, Some(owner), Some(offset)) => buffer.far(&**owner, offset, done as usize, len as usize),
            _ => return Err((0, FaultKind::NoHostMemory, None)),
        };
        copied.map_err(|fault| ((fault.done as u64).min(len - 1), FaultKind::HostMemoryGone, None))
    }

    fn refuse(&self, iova: Iova, access: Access, done: u64, reason: FaultKind, oa: Option<Oa>, refusal: Option<Refusal>) -> Fault {
        let domain = self.identity.domain.as_ref().map(|domain| domain.id());
        let fault = Fault { device: self.device.id(), domain, iova, access, table: reason.refused_by(), reason, oa, done, refusal };
        self.device.record(fault);
        fault
    }
}

/// With answers ignored on purpose, what lies between a lookup and its access is stretched, so that the gap can be seen.
fn linger() {
    if fail::is_planted("iommu.ats_ignore_answers") {
        std::thread::sleep(Duration::from_micros(200));
    }
}

impl Drop for AtsDma {
    fn drop(&mut self) {
        // First of all, so that nobody who has the device in hand waits for a cache that is gone.
        self.port.close();
        self.device.remove_port(&self.port);
    }
}

impl fmt::Debug for AtsDma {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AtsDma").field("device", &self.device).field("cached", &self.cached()).finish_non_exhaustive()
    }
}
