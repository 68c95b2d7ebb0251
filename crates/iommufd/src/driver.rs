//! What stands in front of a device: its IOMMU, as far as devices of different makers differ. The rules that hold for all of them are in
//! `device.rs` and its neighbours; a driver adds what is its own, and may refuse.
//!
//! There is a driver for each device. What devices share (the IOMMU itself) they share behind it: [`Driver::unit`] says so.

use crate::device::DeviceObject;
use crate::fault::PageFault;
use crate::hwpt::Hwpt;
use crate::ioas_ops::unsupported;
use crate::user::{Entries, UserData};
use crate::viommu::{ViommuObject, ViommuSetup};
use crate::{Answer, Host, uapi};
use addr::{Iova, Oa, Span};
use iommu::{Domain, DomainConfig};
use pt::FormatKind;
use std::any::Any;
use std::fmt;
use std::sync::Arc;

/// What GET_HW_INFO shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HwInfo {
    /// Which of the layouts `bytes` has; 0 when the IOMMU has nothing to say.
    pub kind: u32,
    /// All of it; the caller's buffer may be shorter.
    pub bytes: Vec<u8>,
}

/// The IOMMU in front of a device.
///
/// Calls that change something come one at a time for each context.
pub trait Driver: Any + Send + Sync + fmt::Debug {
    /// Which IOMMU it is. Page tables and virtual IOMMUs go with devices behind the same one only.
    fn unit(&self) -> u32;

    /// What it is, for programs that know the hardware. `wanted` is a type that the caller insists on.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for a type that it has not.
    fn hw_info(&self, wanted: Option<u32>) -> Answer<HwInfo>;

    /// What GET_HW_INFO shows as capabilities ([`uapi::HW_CAP_DIRTY_TRACKING`], ..).
    fn capabilities(&self) -> u64;

    /// How many bits a PASID of this device has; 0 when it has none.
    fn pasid_bits(&self) -> u8 {
        0
    }

    /// IOVAs that the device cannot use or uses for something else. Areas keep clear of them as long as it is attached (rule 31).
    fn reserved(&self) -> Vec<Span<Iova>> {
        Vec::new()
    }

    /// A domain for HWPT_ALLOC, or with no flags and no data for a device that attaches to an IOAS. `flags` are known ones, without
    /// [`uapi::HWPT_FAULT_ID_VALID`]; a device that cannot track dirty pages is never asked for it.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for what it cannot; `EINVAL`, `EFAULT` for its data; `ENOMEM`.
    fn paging(&self, flags: u32, data: Option<&UserData<'_>>) -> Answer<Arc<Domain>>;

    /// A page table in the user's memory, on top of `parent`.
    ///
    /// # Errors
    /// `EOPNOTSUPP`; `EINVAL`, `EFAULT` for its data.
    fn nested(&self, parent: &Arc<Hwpt>, flags: u32, data: &UserData<'_>) -> Answer<Arc<dyn Nested>> {
        let _ = (parent, flags, data);
        Err(unsupported("this IOMMU has no page tables of users"))
    }

    /// The device, or one PASID of it, is about to use `table`, in place of what it uses now, if that is anything. Checks that hold for all
    /// devices have been made.
    ///
    /// # Errors
    /// `EINVAL` when the device does not go with the table: with an IOAS, the next one is tried then. Whatever else the driver says.
    fn attach(&self, pasid: Option<u32>, table: &Hwpt) -> Answer {
        let _ = (pasid, table);
        Ok(())
    }

    /// It uses nothing any more. Also called when the last steps of an attach failed.
    fn detach(&self, pasid: Option<u32>) {
        let _ = pasid;
    }

    /// A page request of the device has been answered.
    fn respond(&self, fault: &PageFault, success: bool) {
        let _ = (fault, success);
    }

    /// Whether it has virtual IOMMUs of this type.
    fn has_viommu(&self, kind: u32) -> bool {
        let _ = kind;
        false
    }

    /// A virtual IOMMU of a type that it has.
    ///
    /// # Errors
    /// `EINVAL`, `EFAULT` for its data.
    fn viommu(&self, setup: &mut ViommuSetup<'_>) -> Answer<Arc<dyn Viommu>> {
        let _ = setup;
        Err(unsupported("this IOMMU has no virtual ones"))
    }
}

impl dyn Driver {
    /// The driver as what it is.
    pub fn downcast<T: Driver>(&self) -> Option<&T> {
        (self as &dyn Any).downcast_ref()
    }

    /// Whether devices in front of it can mark pages dirty.
    pub fn tracks_dirty(&self) -> bool {
        self.capabilities() & uapi::HW_CAP_DIRTY_TRACKING != 0
    }
}

/// A page table in the user's memory, which an IOMMU reads on top of its parent's.
pub trait Nested: Any + Send + Sync + fmt::Debug {
    /// Forgets what was cached of it. `done` counts the entries that were carried out; it starts at 0 and counts on errors, too.
    ///
    /// # Errors
    /// `EOPNOTSUPP`; `EINVAL`, `EFAULT`, `E2BIG` for the entries. Without any entry, the type alone is judged.
    fn invalidate(&self, entries: &Entries<'_>, done: &mut u32) -> Answer {
        let _ = (entries, done);
        Err(unsupported("this page table is never cached"))
    }
}

impl dyn Nested {
    /// The table as what it is.
    pub fn downcast<T: Nested>(&self) -> Option<&T> {
        (self as &dyn Any).downcast_ref()
    }
}

/// The queue that HW_QUEUE_ALLOC asks for; its memory is pinned and contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueMemory {
    /// Its type.
    pub kind: u32,
    /// Its number among those of its type.
    pub index: u32,
    /// The first byte.
    pub base: Oa,
    /// Bytes.
    pub len: u64,
}

/// A slice of an IOMMU that belongs to one guest.
pub trait Viommu: Any + Send + Sync + fmt::Debug {
    /// A page table of the guest.
    ///
    /// # Errors
    /// `EOPNOTSUPP`; `EINVAL`, `EFAULT` for its data.
    fn nested(&self, flags: u32, data: &UserData<'_>) -> Answer<Arc<dyn Nested>> {
        let _ = (flags, data);
        Err(unsupported("this virtual IOMMU has no page tables of guests"))
    }

    /// Forgets what was cached; `owner` finds the devices. As [`Nested::invalidate`].
    ///
    /// # Errors
    /// As [`Nested::invalidate`].
    fn invalidate(&self, owner: &ViommuObject, entries: &Entries<'_>, done: &mut u32) -> Answer {
        let _ = (owner, entries, done);
        Err(unsupported("this virtual IOMMU caches nothing"))
    }

    /// A device gets a number in it.
    ///
    /// # Errors
    /// Whatever the driver says.
    fn add_vdevice(&self, device: &DeviceObject, virt_id: u64) -> Answer {
        let _ = (device, virt_id);
        Ok(())
    }

    /// A device loses its number.
    fn remove_vdevice(&self, device: &DeviceObject, virt_id: u64) {
        let _ = (device, virt_id);
    }

    /// Whether it has hardware queues of this type.
    fn has_queues(&self, kind: u32) -> bool {
        let _ = kind;
        false
    }

    /// A hardware queue. `exists` says which others of its type there are. Answers the number of another queue that has to stay as long as this
    /// one.
    ///
    /// # Errors
    /// `EINVAL`, `EEXIST`, `EIO` for the number, and whatever else the driver says.
    fn add_queue(&self, queue: &QueueMemory, exists: &dyn Fn(u32) -> bool) -> Answer<Option<u32>> {
        let _ = (queue, exists);
        Err(unsupported("this virtual IOMMU has no hardware queues"))
    }

    /// A hardware queue is gone.
    fn remove_queue(&self, kind: u32, index: u32) {
        let _ = (kind, index);
    }
}

impl dyn Viommu {
    /// The virtual IOMMU as what it is.
    pub fn downcast<T: Viommu>(&self) -> Option<&T> {
        (self as &dyn Any).downcast_ref()
    }
}

/// The IOMMU of devices that are no mocks: domains of the host's format, dirty tracking; no PASIDs, no page tables of users.
#[derive(Debug)]
pub struct EngineDriver {
    host: Arc<Host>,
}

/// The number of the host's own IOMMU; mock ones have others.
const ENGINE_UNIT: u32 = 0;

/// The type of [`EngineDriver`]'s hw_info: two u64, the extended feature registers (AMD IOMMU specification 48882, MMIO offsets 0030h and 01A0h).
const HW_INFO_AMD: u32 = 4;

/// What the software IOMMU does of what the extended feature register can say.
fn features(config: &DomainConfig) -> u64 {
    const INVALIDATE_ALL: u64 = 1 << 6;
    /// Host page tables of up to 6 levels.
    const HOST_LEVELS_6: u64 = 0b10 << 10;
    /// It asks the secure world's table.
    const SNP: u64 = 1 << 43;
    const HOST_ACCESS: u64 = 1 << 49;
    const HOST_DIRTY: u64 = 1 << 52;
    let dirty = if can_track(config) { HOST_ACCESS | HOST_DIRTY } else { 0 };
    INVALIDATE_ALL | HOST_LEVELS_6 | SNP | dirty
}

fn can_track(config: &DomainConfig) -> bool {
    config.tracks_dirty && config.format.dirty_bit() != 0
}

/// Where interrupts of x86 go, and the HyperTransport addresses that AMD's IOMMU keeps for itself: no memory can be mapped there.
const RESERVED: [(u64, u64); 2] = [(0xfee0_0000, 0xfeef_ffff), (0xfd_0000_0000, 0xff_ffff_ffff)];

impl EngineDriver {
    /// The driver of a device that goes through the host's IOMMU.
    pub fn new(host: &Arc<Host>) -> Arc<Self> {
        Arc::new(Self { host: Arc::clone(host) })
    }

    fn config(&self) -> &DomainConfig {
        &self.host.config().domain
    }
}

impl Driver for EngineDriver {
    fn unit(&self) -> u32 {
        ENGINE_UNIT
    }

    /// AMD's layout when page tables are AMD's, without guest translation, PASIDs or page requests in it: programs that know the type see that
    /// nesting is not there.
    fn hw_info(&self, wanted: Option<u32>) -> Answer<HwInfo> {
        let own = if self.config().format == FormatKind::AmdV1 { HW_INFO_AMD } else { 0 };
        if wanted.is_some_and(|kind| kind != 0 && kind != own) {
            return Err(unsupported("this IOMMU does not describe itself in this way; ask without a type"));
        }
        if own == 0 {
            return Ok(HwInfo { kind: own, bytes: Vec::new() });
        }
        let mut bytes = features(self.config()).to_le_bytes().to_vec();
        bytes.extend_from_slice(&0u64.to_le_bytes());
        Ok(HwInfo { kind: HW_INFO_AMD, bytes })
    }

    fn capabilities(&self) -> u64 {
        let dirty = if can_track(self.config()) { uapi::HW_CAP_DIRTY_TRACKING } else { 0 };
        dirty | uapi::HW_CAP_ATS_NOT_SUPPORTED
    }

    fn reserved(&self) -> Vec<Span<Iova>> {
        RESERVED.iter().map(|(start, last)| Span::of(Iova::new(*start), Iova::new(*last))).collect()
    }

    fn paging(&self, flags: u32, data: Option<&UserData<'_>>) -> Answer<Arc<Domain>> {
        if data.is_some() {
            return Err(unsupported("page tables of this IOMMU take no data"));
        }
        if flags & !uapi::HWPT_DIRTY_TRACKING != 0 {
            return Err(unsupported("this IOMMU has neither nesting nor PASIDs"));
        }
        Ok(self.host.iommu().domain_with(self.config())?)
    }
}
