//! DMA: one thread's accesses for one device, descriptor by descriptor (D-2).

use crate::context::{Context, Place, Refused};
use crate::far::{self, Buffer, From, Into};
use crate::slice::DmaSlice;
use crate::{Access, Device, Error, Fault, FaultKind, IotlbStats};
use addr::{Address, Iova, Oa, Span};
use backing::{CopyFault, HostAddr};
use pt::Perm;
use std::fmt;
use std::sync::Arc;
use sync::{Slot, fail};

/// What is transferred under one guard at most, so that no writer waits longer than such a copy takes.
pub const CHUNK_BYTES: u64 = 64 << 10;
/// What a descriptor counts for at least: one that copies nothing may still have to walk.
const LEAST_CHARGE_BYTES: u64 = 4 << 10;

/// A translation as it was when it was asked for; it may be gone by now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// Output address of the IOVA.
    pub oa: Oa,
    /// Every IOVA of the leaf.
    pub leaf: Span<Iova>,
    /// What the leaf allows.
    pub perm: Perm,
}

impl Translation {
    #[inline(always)]
    fn of(place: &Place) -> Self {
        Self { oa: place.oa, leaf: place.leaf, perm: place.perm }
    }
}

/// The guard that is open.
#[derive(Debug, Default)]
pub(crate) struct Open {
    /// Bytes that may still be copied under it; 0 when there is none.
    left: u64,
    /// A leaf that was translated and checked under it.
    leaf: Option<Leaf>,
}

/// A whole leaf that may be accessed, and is in host memory, for as long as the guard is open under which this was found.
#[derive(Clone, Copy, Debug)]
struct Leaf {
    start: Iova,
    last_offset: u64,
    host: HostAddr,
    access: Access,
}

impl Leaf {
    /// Where `len` bytes from `iova` on are, if they are inside.
    #[inline(always)]
    fn host(&self, iova: Iova, len: u64) -> Option<HostAddr> {
        let into = iova.get().wrapping_sub(self.start.get());
        (into <= self.last_offset && len - 1 <= self.last_offset - into).then(|| self.host.plus(into))
    }
}

/// How a context fared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DmaStats {
    /// Its IOTLB.
    pub iotlb: IotlbStats,
    /// Page-table walks.
    pub walks: u64,
    /// Those of them that began at a cached table.
    pub short_walks: u64,
    /// Checks that were made again because a size did not match.
    pub rechecks: u64,
    /// Refused calls.
    pub faults: u64,
}

/// A DMA context: for one thread at a time.
///
/// ```
/// use addr::{Iova, Lg2, Span};
/// use backing::{Backing, Frames};
/// use lockstep_iommu_device::{Config, Dma, Iommu, SystemRmp};
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
/// let mut dma = Dma::new(&device)?;
/// dma.write(Iova::new(0x4000_0ffe), b"over a page's end")?;
/// let mut back = [0; 17];
/// dma.read(Iova::new(0x4000_0ffe), &mut back)?;
/// assert_eq!(&back, b"over a page's end");
///
/// let mut gather = Gather::new();
/// domain.table().unmap(span, &mut gather);
/// domain.flush(gather);
/// assert!(dma.read(Iova::new(0x4000_0ffe), &mut back).is_err());
/// # Ok(())
/// # }
/// ```
pub struct Dma {
    slot: Slot,
    context: Context,
}

impl Dma {
    /// A context for `device`. A fallible step, named `iommu.context`.
    ///
    /// # Errors
    /// Only what a test injects.
    pub fn new(device: &Arc<Device>) -> Result<Self, Error> {
        fail::step("iommu.context")?;
        Ok(Self { slot: device.iommu().readers().slot_named(device.name()), context: Context::new(device) })
    }

    /// The device it acts for.
    pub fn device(&self) -> &Arc<Device> {
        self.context.device()
    }

    /// Reads memory, from `iova` on.
    ///
    /// # Errors
    /// [`Fault`]; `done` bytes of `into` have been filled.
    pub fn read(&mut self, iova: Iova, into: &mut [u8]) -> Result<(), Fault> {
        self.transfer(iova, into.len() as u64, Access::Read, Into(into))
    }

    /// Writes memory, from `iova` on.
    ///
    /// # Errors
    /// [`Fault`]; `done` bytes have been written.
    pub fn write(&mut self, iova: Iova, from: &[u8]) -> Result<(), Fault> {
        self.transfer(iova, from.len() as u64, Access::Write, From(from))
    }

    /// A descriptor that shares its guard with nobody.
    #[inline(always)]
    fn transfer(&mut self, iova: Iova, len: u64, access: Access, mut buffer: impl Buffer) -> Result<(), Fault> {
        let mut open = Open::default();
        let done = self.transfer_quickly(iova, len, access, &mut buffer, &mut open);
        let result = if done { Ok(()) } else { self.transfer_in_full(iova, len, access, &mut buffer, &mut open) };
        self.close(&mut open);
        result
    }

    /// What most descriptors are: inside one leaf that is cached, in host memory, with nothing to be noted. False when it is not so, or some
    /// of the memory is not there; then nothing, or some of it, was copied.
    #[inline(always)]
    pub(crate) fn transfer_quickly(&mut self, iova: Iova, len: u64, access: Access, buffer: &mut impl Buffer, open: &mut Open) -> bool {
        if len.wrapping_sub(1) >= CHUNK_BYTES {
            return false;
        }
        let Some(host) = self.host_at_once(iova, len, access, open) else { return false };
        linger();
        let copied = buffer.near(host, 0, len as usize);
        self.charge(open, len);
        copied.is_ok()
    }

    /// Host memory of `len` bytes, translated and checked under a guard that is open when this answers anything. What was found for the descriptor
    /// before, under the same guard, is good for this one: a guard covers no more than one long descriptor would.
    #[inline(always)]
    fn host_at_once(&mut self, iova: Iova, len: u64, access: Access, open: &mut Open) -> Option<HostAddr> {
        if open.left >= len
            && let Some(leaf) = open.leaf.filter(|leaf| leaf.access == access)
            && let Some(host) = leaf.host(iova, len)
        {
            self.context.count_hit();
            return Some(host);
        }
        let hit = self.context.probe(iova, access)?;
        let leaf = Leaf { start: hit.start, last_offset: hit.size.bytes() - 1, host: hit.value.host?, access };
        let host = leaf.host(iova, len)?;
        // With the cache asked before the guard is entered, the answer need not wait for the stores that the entry waits for.
        if !self.open_unchanged(open, len) || !self.context.confirm(&hit, access) {
            return None;
        }
        open.leaf = Some(leaf);
        Some(host)
    }

    #[inline(never)]
    pub(crate) fn transfer_in_full(
        &mut self,
        iova: Iova,
        len: u64,
        access: Access,
        buffer: &mut impl Buffer,
        open: &mut Open,
    ) -> Result<(), Fault> {
        self.check_length(iova, len, access)?;
        self.chunks(len, (iova, access), open, |context, done, limit| {
            let at = iova.plus(done);
            let place = context.resolve(at, access).map_err(|refused| context.fault(at, access, done, refused))?;
            let now = limit.min(place.rest.saturating_add(1));
            let Some(host) = place.host(now) else {
                return far::transfer(&place, now, done, buffer).map_err(|(part, kind)| {
                    let refused = Refused::by(kind, Some(place.oa.plus(part)));
                    context.fault(at.plus(part), access, done + part, refused)
                });
            };
            linger();
            let Err(CopyFault { done: part }) = buffer.near(host, done as usize, now as usize) else { return Ok(now) };
            let (mut part, gone) = (part as u64, first_gone(host, part as u64, now));
            if gone > part && buffer.near(host.plus(part), (done + part) as usize, (gone - part) as usize).is_ok() {
                part = gone;
            }
            let refused = Refused::by(FaultKind::HostMemoryGone, Some(place.oa.plus(gone)));
            Err(context.fault(at.plus(gone), access, done + part, refused))
        })
    }

    /// Copies `len` bytes from one IOVA to another, as a DMA engine does. Where the two overlap, what arrives is unspecified.
    ///
    /// # Errors
    /// [`Fault`], whose access says which side was refused; `done` bytes have been copied.
    pub fn copy(&mut self, src: Iova, dst: Iova, len: u64) -> Result<(), Fault> {
        let mut open = Open::default();
        let result = self.copy_in(src, dst, len, &mut open);
        self.close(&mut open);
        result
    }

    pub(crate) fn copy_in(&mut self, src: Iova, dst: Iova, len: u64, open: &mut Open) -> Result<(), Fault> {
        self.check_length(src, len, Access::Read)?;
        self.check_length(dst, len, Access::Write)?;
        self.chunks(len, (src, Access::Read), open, |context, done, limit| {
            let (from, to) = (src.plus(done), dst.plus(done));
            let source = context.resolve(from, Access::Read).map_err(|refused| context.fault(from, Access::Read, done, refused))?;
            let target = context.resolve(to, Access::Write).map_err(|refused| context.fault(to, Access::Write, done, refused))?;
            let now = limit.min(source.rest.saturating_add(1)).min(target.rest.saturating_add(1));
            let (Some(source_host), Some(target_host)) = (source.host(now), target.host(now)) else {
                return far::copy(&source, &target, now).map_err(|stop| {
                    let (iova, access, place): (Iova, Access, &Place) =
                        if stop.reading { (from, Access::Read, &source) } else { (to, Access::Write, &target) };
                    let refused = Refused::by(stop.kind, Some(place.oa.plus(stop.done)));
                    context.fault(iova.plus(stop.done), access, done + stop.done, refused)
                });
            };
            linger();
            let Err(CopyFault { done: part }) = HostAddr::copy(source_host, target_host, now as usize) else { return Ok(now) };
            let part = part as u64;
            let (no_source, no_target) = (first_gone(source_host, part, now), first_gone(target_host, part, now));
            let gone = no_source.min(no_target);
            let rest = HostAddr::copy(source_host.plus(part), target_host.plus(part), (gone - part) as usize);
            let done = done + if rest.is_ok() { gone } else { part };
            let (iova, access, oa) = if no_source <= no_target { (from, Access::Read, source.oa) } else { (to, Access::Write, target.oa) };
            Err(context.fault(iova.plus(gone), access, done, Refused::by(FaultKind::HostMemoryGone, Some(oa.plus(gone)))))
        })
    }

    /// What `iova` translates to for this access, after the secure world's check.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn translate(&mut self, iova: Iova, access: Access) -> Result<Translation, Fault> {
        if let Some(hit) = self.context.probe(iova, access)
            && self.context.enter_unchanged(&mut self.slot)
        {
            let good = self.context.confirm(&hit, access);
            self.slot.leave();
            if good {
                return Ok(Translation::of(&Place::of(&hit, iova)));
            }
        }
        self.translate_in_full(iova, access)
    }

    #[inline(never)]
    fn translate_in_full(&mut self, iova: Iova, access: Access) -> Result<Translation, Fault> {
        self.enter(iova, access)?;
        let resolved = self.context.resolve(iova, access);
        self.slot.leave();
        match resolved {
            Ok(place) => Ok(Translation::of(&place)),
            Err(refused) => Err(self.context.fault(iova, access, 0, refused)),
        }
    }

    /// Memory to be used in place, for as long as the answer lives. It holds a guard: whoever unmaps it waits for it, and the same
    /// thread gets an error instead ([`crate::Domain::held_by_caller`]). Keep it short; guards that are held too long are reported.
    ///
    /// # Errors
    /// [`Fault`]; a slice of no bytes is a fault of kind `Wraps`.
    pub fn slice(&mut self, iova: Iova, len: u64, access: Access) -> Result<DmaSlice<'_>, Fault> {
        self.check_length(iova, len, access)?;
        if len == 0 {
            return Err(self.context.fault(iova, access, 0, Refused::by(FaultKind::Wraps, None)));
        }
        self.enter(iova, access)?;
        let guard = self.slot.keep();
        DmaSlice::new(guard, &mut self.context, iova, len, access)
    }

    /// Counters since the context was made.
    pub fn stats(&self) -> DmaStats {
        let counters = self.context.counters;
        let short_walks = self.context.walk_hits();
        DmaStats {
            iotlb: self.context.iotlb().stats(),
            walks: counters.walks,
            short_walks,
            rechecks: counters.rechecks,
            faults: counters.faults,
        }
    }

    /// Translations that are cached now.
    pub fn cached(&self) -> usize {
        self.context.iotlb().len()
    }

    /// Runs `step` until it has made `len` bytes of progress, under guards of at most [`CHUNK_BYTES`] each, the first of which may be open
    /// already. `step` gets how much is done and how much it may do, and answers how much it did.
    #[inline]
    fn chunks(
        &mut self,
        len: u64,
        first: (Iova, Access),
        open: &mut Open,
        mut step: impl FnMut(&mut Context, u64, u64) -> Result<u64, Fault>,
    ) -> Result<(), Fault> {
        let mut done = 0;
        while done < len {
            if open.left == 0 {
                self.enter(first.0.plus(done), first.1).map_err(|fault| Fault { done, ..fault })?;
                open.left = CHUNK_BYTES;
            }
            let until = len.min(done.saturating_add(open.left));
            let before = done;
            let mut chunk = Ok(());
            while done < until {
                match step(&mut self.context, done, until - done) {
                    Ok(now) => done += now,
                    Err(fault) => {
                        chunk = Err(fault);
                        break;
                    }
                }
            }
            self.charge(open, done - before);
            chunk?;
        }
        Ok(())
    }

    /// Sees to it that a guard is open under which `len` bytes may be copied, entered with nothing to apply. Otherwise false, and none is.
    #[inline(always)]
    fn open_unchanged(&mut self, open: &mut Open, len: u64) -> bool {
        if open.left >= len {
            return true;
        }
        self.close(open);
        if !self.context.enter_unchanged(&mut self.slot) {
            return false;
        }
        open.left = CHUNK_BYTES;
        true
    }

    /// Notes what was copied under the guard that is open, and leaves it when that is enough.
    #[inline(always)]
    fn charge(&mut self, open: &mut Open, bytes: u64) {
        open.left = open.left.saturating_sub(bytes.max(LEAST_CHARGE_BYTES));
        if open.left == 0 {
            open.leaf = None;
            self.slot.leave();
        }
    }

    /// Leaves the guard if it is open.
    #[inline(always)]
    pub(crate) fn close(&mut self, open: &mut Open) {
        if open.left != 0 {
            *open = Open::default();
            self.slot.leave();
        }
    }

    #[inline(always)]
    fn enter(&mut self, iova: Iova, access: Access) -> Result<(), Fault> {
        self.context.enter(&mut self.slot).map_err(|refused| self.context.fault(iova, access, 0, refused))
    }

    #[inline]
    fn check_length(&mut self, iova: Iova, len: u64, access: Access) -> Result<(), Fault> {
        match iova.checked_add(len.saturating_sub(1)) {
            Some(_) => Ok(()),
            None => Err(self.context.fault(iova, access, 0, Refused::by(FaultKind::Wraps, None))),
        }
    }
}

/// A copy of `len` bytes stopped after `from` of them or somewhat later: the first byte that is not there, `len - 1` when all are back.
#[cold]
fn first_gone(host: HostAddr, from: u64, len: u64) -> u64 {
    let mut at = from;
    while at + 1 < len && host.read(at, &mut [0]).is_ok() {
        // Memory comes and goes by pages.
        let next = host.plus(at).hva().align_down(addr::PAGE_LG2).plus(addr::PAGE_BYTES);
        at += next.offset_from(host.plus(at).hva());
    }
    at.min(len - 1)
}

/// With the grace period left out on purpose, copies are stretched, so that the gap can be seen.
#[inline]
fn linger() {
    if fail::is_planted("iommu.skip_grace") {
        std::thread::sleep(std::time::Duration::from_micros(200));
    }
}

impl fmt::Debug for Dma {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dma").field("device", self.context.device()).field("stats", &self.stats()).finish_non_exhaustive()
    }
}
