//! The whole of device DMA for one confidential guest, as a VMM wants it: memslots, devices, conversions, one object.

use addr::{Address, Gpa, Iova, PAGE_LG2, Page, Span};
use backing::{Backing, HostAddr, PageState, Words};
use convert::{AuditReport, Auditor, Change, ConvertError, Counters, Done, Policy, PolicyRule, Reading, Space, SpaceError, Stage2};
use ioas::{Edit, Ioas, Pages, Place};
use iommu::{Device, Iommu, SystemRmp, Trust};
use pt::Perm;
use secure::SegmentError;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use thiserror::Error;

/// How a [`GuestDma`] is made.
#[derive(Clone, Debug)]
pub struct Config {
    /// What devices may have mapped.
    pub policy: Policy,
    /// The guest's address space identifier, from 1 on.
    pub asid: u32,
    /// Two open questions about the hardware, and how they are answered.
    pub reading: Reading,
    /// The IOMMU's sizes.
    pub iommu: iommu::Config,
}

impl Default for Config {
    fn default() -> Self {
        Self { policy: Policy::Mirror, asid: 1, reading: Reading::default(), iommu: iommu::Config::default() }
    }
}

/// Why a call did nothing.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// The guest's space refused.
    #[error(transparent)]
    Space(#[from] SpaceError),
    /// The IO address space refused.
    #[error(transparent)]
    Ioas(#[from] ioas::Error),
    /// The IOMMU refused.
    #[error(transparent)]
    Iommu(#[from] iommu::Error),
    /// The backing refused.
    #[error(transparent)]
    Backing(#[from] backing::Error),
    /// The RMP does not take the window.
    #[error("the RMP cannot cover {window}: {source}")]
    Segment {
        /// The backing's output addresses.
        window: Span<addr::Oa>,
        /// Why not.
        source: SegmentError,
    },
    /// No address space for the RMP's entries.
    #[error("no memory for the RMP of {window}: {source}")]
    RmpMemory {
        /// The backing's output addresses.
        window: Span<addr::Oa>,
        /// What the host said.
        source: std::io::Error,
    },
    /// The guest has no device interface of that number, or already has one.
    #[error("{} of the guest has the number {id:#x}", if *taken { "another interface" } else { "no interface" })]
    Interface {
        /// As the guest calls it.
        id: u16,
        /// Whether there is one.
        taken: bool,
    },
    /// The guest named memory that it does not have.
    #[error("no memslot is at {0:?}")]
    NoMemory(Gpa),
    /// The page is the guest's.
    #[error("the page at {0:?} is not shared: the guest has to give it up first")]
    Private(Gpa),
    /// The page was leaked.
    #[error("the page at {0:?} was leaked after the secure world kept it; it is never used again")]
    Leaked(Gpa),
    /// The host's copy of guest memory failed half way.
    #[error("guest memory at {0:?} vanished: its file was truncated or punched by somebody else")]
    Vanished(Gpa),
}

/// Guest memory for devices: one IO address space in which IOVA is GPA, one RMP, and whoever owns stage 2.
///
/// Every method may be called from any thread, while devices do DMA and vCPUs run.
#[derive(Debug)]
pub struct GuestDma {
    iommu: Arc<Iommu>,
    ioas: Arc<Ioas>,
    space: Arc<Space>,
    policy: Policy,
    /// How many memslots use a backing's RMP segment.
    covered: Mutex<HashMap<backing::BackingId, (Span<addr::Oa>, usize)>>,
    /// Trusted device interfaces by the number that the guest knows them by.
    pub(crate) interfaces: Mutex<HashMap<u16, Arc<Device>>>,
}

/// Which pages a host access is about.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Of {
    Any,
    Shared,
}

impl GuestDma {
    /// No memory, no devices. `stage2` is told of every conversion: [`crate::KvmStage2`] for a KVM guest,
    /// [`convert::RecordedStage2`] for any other.
    ///
    /// # Errors
    /// No address space for page tables.
    pub fn new(config: &Config, stage2: Arc<dyn Stage2>) -> Result<Self, Error> {
        let rmp = Arc::new(SystemRmp::new());
        let iommu = Iommu::new(&config.iommu, Arc::clone(&rmp))?;
        let rule = PolicyRule::with_reading(config.policy, config.reading, &rmp);
        let space = Space::new(&rmp, stage2, config.asid);
        if rule.keeps_leaves() {
            space.keep_leaves();
        }
        let ioas = Ioas::new(&iommu, rule);
        Ok(Self { iommu, ioas, space, policy: config.policy, covered: Mutex::default(), interfaces: Mutex::default() })
    }

    /// A memslot: `len_bytes` of `backing`, from `offset` on, are the guest's memory at `gpa`, and devices see them there as far as the
    /// policy allows.
    ///
    /// # Errors
    /// Bad or overlapping spans, no memory; nothing has changed then.
    pub fn add_memory(&self, gpa: Gpa, len_bytes: u64, backing: &Arc<Backing>, offset: u64) -> Result<(), Error> {
        self.cover(backing)?;
        let added = self.space.add_slot(gpa, len_bytes, backing, offset);
        let mapped = added.map_err(Error::from).and_then(|()| {
            let at = Place::Fixed(Iova::new(gpa.get()));
            let mapped = self.ioas.map_file(backing, offset, len_bytes, at, Perm::RW);
            if mapped.is_err() {
                self.space.remove_slot(gpa)?;
            }
            Ok(mapped?)
        });
        if mapped.is_err() {
            self.uncover(backing);
        }
        mapped.map(|_| ())
    }

    /// Takes the memslot out that begins at `gpa`. When this returns, no device reaches it.
    ///
    /// # Errors
    /// No memslot begins there.
    pub fn remove_memory(&self, gpa: Gpa) -> Result<(), Error> {
        let (backing, _) = self.space.page_at(gpa).ok_or(Error::NoMemory(gpa))?;
        let span = self.space.remove_slot(gpa)?;
        self.ioas.unmap(span.onto(Iova::new(gpa.get())))?;
        self.uncover(&backing);
        Ok(())
    }

    fn cover(&self, backing: &Arc<Backing>) -> Result<(), Error> {
        let mut covered = self.covered.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, users)) = covered.get_mut(&backing.id()) {
            *users += 1;
            return Ok(());
        }
        let window = backing.window().widen(21);
        let words = sync::fail::step("lockstep.rmp").map_err(|error| std::io::Error::new(std::io::ErrorKind::OutOfMemory, error));
        let words = words.and_then(|()| Words::new(SystemRmp::words_for(window))).map_err(|source| Error::RmpMemory { window, source })?;
        self.rmp().add_segment(window, words).map_err(|source| Error::Segment { window, source })?;
        covered.insert(backing.id(), (window, 1));
        Ok(())
    }

    fn uncover(&self, backing: &Arc<Backing>) {
        let mut covered = self.covered.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((window, users)) = covered.get_mut(&backing.id()) else { return };
        *users -= 1;
        // Pages that are still the guest's keep their entries: nobody else may have them.
        if *users == 0 && self.space.rmp().assigned_in(*window) == 0 && self.space.rmp().remove_segment(*window).is_ok() {
            covered.remove(&backing.id());
        }
    }

    /// A device of the guest. Devices of one trust share an IO page table.
    ///
    /// # Errors
    /// No page table.
    pub fn add_device(&self, name: &str, trust: Trust) -> Result<Arc<Device>, Error> {
        let device = self.iommu.device(name);
        device.set_trust(trust)?;
        self.ioas.attach_device(&device)?;
        Ok(device)
    }

    /// Takes a device off. When this returns, none of its DMA is in flight.
    ///
    /// # Errors
    /// The device is not attached here, or the caller holds a slice of its memory.
    pub fn remove_device(&self, device: &Arc<Device>) -> Result<(), Error> {
        Ok(self.ioas.detach_device(device)?)
    }

    /// Changes owners, in all three tables.
    ///
    /// # Errors
    /// See [`ConvertError`].
    pub fn convert(&self, changes: &[Change]) -> Result<Done, ConvertError> {
        self.space.convert(changes)
    }

    /// Gives pages back to the host: no device and no vCPU has them, their memory is gone. They come back by [`GuestDma::populate`].
    ///
    /// Only shared pages go: the guest gives private ones up first.
    ///
    /// # Errors
    /// No memory there, a private or a leaked page, or the host refused. Memslots before that one are punched, the one that it is in is as it was.
    pub fn punch(&self, span: Span<Gpa>) -> Result<(), Error> {
        self.each_part(span, |gpa, backing, pages| {
            let held = backing.lock(pages);
            let private = backing.states(pages).find(|(_, state)| *state == PageState::Private);
            if let Some((run, _)) = private {
                return Err(Error::Private(gpa.plus(run.start().offset_from(pages.start()) << PAGE_LG2)));
            }
            self.check_leaked(gpa, backing, pages)?;
            Ok(backing.punch_held(&held, pages)?)
        })
    }

    /// Absent pages of the span come back, zeroed and shared.
    ///
    /// # Errors
    /// No memory, or a leaked page, which never comes back.
    pub fn populate(&self, span: Span<Gpa>) -> Result<(), Error> {
        self.each_part(span, |gpa, backing, pages| {
            let held = backing.lock(pages);
            self.check_leaked(gpa, backing, pages)?;
            Ok(backing.populate_held(&held, pages, PageState::Shared)?)
        })
    }

    /// What the secure world has kept is neither used again nor given back.
    fn check_leaked(&self, gpa: Gpa, backing: &Backing, pages: Span<Page>) -> Result<(), Error> {
        match self.space.first_leaked(backing, pages).and_then(|oa| backing.page_of(oa)) {
            Some(page) => Err(Error::Leaked(gpa.plus(page.offset_from(pages.start()) << PAGE_LG2))),
            None => Ok(()),
        }
    }

    /// Joins small leaves into larger ones wherever neighbours are alike, at most `most` pages of it: a background pass that may run at any
    /// time. Answers where the next pass should begin.
    pub fn merge(&self, from: Gpa, most: u64) -> Gpa {
        let mut left = most;
        let mut next = Gpa::new(0);
        for (slot, backing, first) in self.space.slots() {
            let Some(part) = Span::new(from.max(slot.start()), slot.last()).filter(|_| left > 0) else { continue };
            let start = first.get() + ((part.start().get() - slot.start().get()) >> PAGE_LG2);
            let pages = Span::of(Page::new(start), Page::new(start + (part.last_offset() >> PAGE_LG2)));
            // Up to 1 GiB at a time, the largest block that merging makes of common sizes.
            for block in pages.blocks(30 - PAGE_LG2) {
                if left == 0 {
                    break;
                }
                let _held = backing.lock(block);
                let mut edit = Edit::new();
                Pages::of(&backing).merge(block, &mut edit);
                edit.flush();
                left = left.saturating_sub(block.len());
                next = Gpa::new(slot.start().get() + ((block.last().get() + 1 - first.get()) << PAGE_LG2));
            }
        }
        if left > 0 { Gpa::new(0) } else { next }
    }

    /// Proves the three tables equal, or says where they are not.
    pub fn audit(&self) -> AuditReport {
        Auditor::new(&self.space).audit(&self.ioas)
    }

    /// The host reads guest memory.
    ///
    /// # Errors
    /// No memory there.
    pub fn read(&self, gpa: Gpa, into: &mut [u8]) -> Result<(), Error> {
        self.each_chunk(gpa, into.len(), Of::Any, |host, offset, at, len| host.read(offset, &mut into[at..at + len]).is_ok())
    }

    /// The host writes guest memory.
    ///
    /// # Errors
    /// No memory there.
    pub fn write(&self, gpa: Gpa, from: &[u8]) -> Result<(), Error> {
        self.each_chunk(gpa, from.len(), Of::Any, |host, offset, at, len| host.write(offset, &from[at..at + len]).is_ok())
    }

    /// As [`GuestDma::read`], of shared memory alone: what a host can read of a confidential guest.
    pub(crate) fn read_shared(&self, gpa: Gpa, into: &mut [u8]) -> Result<(), Error> {
        self.each_chunk(gpa, into.len(), Of::Shared, |host, offset, at, len| host.read(offset, &mut into[at..at + len]).is_ok())
    }

    /// As [`GuestDma::write`], to shared memory alone. Pages before a private one have been written.
    pub(crate) fn write_shared(&self, gpa: Gpa, from: &[u8]) -> Result<(), Error> {
        self.each_chunk(gpa, from.len(), Of::Shared, |host, offset, at, len| host.write(offset, &from[at..at + len]).is_ok())
    }

    /// Whether the page at `gpa` is there and the host's.
    pub fn is_shared(&self, gpa: Gpa) -> bool {
        self.space.page_at(gpa).is_some_and(|(backing, page)| backing.state(page) == PageState::Shared)
    }

    fn each_part(&self, span: Span<Gpa>, mut act: impl FnMut(Gpa, &Arc<Backing>, Span<Page>) -> Result<(), Error>) -> Result<(), Error> {
        span.check_aligned(PAGE_LG2).map_err(SpaceError::from)?;
        let mut at = Some(span.start());
        while let Some(gpa) = at {
            let slots = self.space.slots();
            let (slot, backing, first) = slots.iter().find(|(slot, ..)| slot.contains(gpa)).ok_or(Error::NoMemory(gpa))?;
            let last = slot.last().min(span.last());
            let page = |gpa: Gpa| Page::new(first.get() + ((gpa.get() - slot.start().get()) >> PAGE_LG2));
            act(gpa, backing, Span::of(page(gpa), page(last)))?;
            at = (last < span.last()).then(|| Gpa::new(last.get() + 1));
        }
        Ok(())
    }

    /// Page by page. Where only shared ones will do each is held, so that it does not turn private under the host's hands.
    fn each_chunk(&self, gpa: Gpa, len: usize, of: Of, mut act: impl FnMut(HostAddr, u64, usize, usize) -> bool) -> Result<(), Error> {
        let Ok(span) = Span::from_len(gpa, len as u64) else { return if len == 0 { Ok(()) } else { Err(Error::NoMemory(gpa)) } };
        for chunk in span.blocks(PAGE_LG2) {
            let (backing, page) = self.space.page_at(chunk.start()).ok_or(Error::NoMemory(chunk.start()))?;
            let _held = (of == Of::Shared).then(|| backing.lock(Span::one(page)));
            let hidden = backing.private_file().is_some() && backing.state(page) == PageState::Private;
            if hidden || of == Of::Shared && backing.state(page) != PageState::Shared {
                return Err(Error::Private(chunk.start()));
            }
            let host = backing.host(backing.oa_as(page, PageState::Shared), addr::PAGE_BYTES).ok_or(Error::NoMemory(chunk.start()))?;
            let at = (chunk.start().get() - gpa.get()) as usize;
            if !act(host, chunk.start().get() % addr::PAGE_BYTES, at, chunk.len() as usize) {
                return Err(Error::Vanished(chunk.start()));
            }
        }
        Ok(())
    }

    /// The policy.
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// The IO address space of all devices.
    pub fn ioas(&self) -> &Arc<Ioas> {
        &self.ioas
    }

    /// The IOMMU behind it.
    pub fn iommu(&self) -> &Arc<Iommu> {
        &self.iommu
    }

    /// What the three tables have in common.
    pub fn space(&self) -> &Arc<Space> {
        &self.space
    }

    /// The RMP.
    pub fn rmp(&self) -> &Arc<SystemRmp> {
        self.space.rmp()
    }

    /// What was done so far.
    pub fn counters(&self) -> Counters {
        self.space.counters()
    }

    /// How often a leaf was hidden from devices while it was cut, in all domains: 0 in page-table formats that change in place.
    pub fn breaks(&self) -> u64 {
        self.ioas.domains().iter().map(|domain| domain.table().breaks()).sum()
    }

    /// Leaves cut and merged in all domains.
    pub fn cuts_and_merges(&self) -> (u64, u64) {
        self.ioas.domains().iter().fold((0, 0), |sum, domain| (sum.0 + domain.table().cuts(), sum.1 + domain.table().merges()))
    }
}
