//! Structures and numbers of VFIO device files, as C has them in linux/vfio.h.

use iommufd::uapi;
use iommufd::uapi::Show;

/// Base of VFIO's numbers in the family of `;`.
pub const BASE: u32 = 100;
/// `VFIO_DEVICE_GET_INFO`.
pub const GET_INFO: u32 = BASE + 7;
/// `VFIO_DEVICE_GET_REGION_INFO`.
pub const GET_REGION_INFO: u32 = BASE + 8;
/// `VFIO_DEVICE_GET_IRQ_INFO`.
pub const GET_IRQ_INFO: u32 = BASE + 9;
/// `VFIO_DEVICE_SET_IRQS`.
pub const SET_IRQS: u32 = BASE + 10;
/// `VFIO_DEVICE_RESET`.
pub const RESET: u32 = BASE + 11;
/// `VFIO_DEVICE_GET_PCI_HOT_RESET_INFO`.
pub const GET_PCI_HOT_RESET_INFO: u32 = BASE + 12;
/// `VFIO_DEVICE_PCI_HOT_RESET`.
pub const PCI_HOT_RESET: u32 = BASE + 13;
/// `VFIO_DEVICE_FEATURE`.
pub const FEATURE: u32 = BASE + 17;
/// `VFIO_DEVICE_BIND_IOMMUFD`.
pub const BIND_IOMMUFD: u32 = BASE + 18;
/// `VFIO_DEVICE_ATTACH_IOMMUFD_PT`.
pub const ATTACH_IOMMUFD_PT: u32 = BASE + 19;
/// `VFIO_DEVICE_DETACH_IOMMUFD_PT`.
pub const DETACH_IOMMUFD_PT: u32 = BASE + 20;

/// The device can be reset.
pub const DEVICE_RESET: u32 = 1;
/// The regions and interrupts are those of a PCI device.
pub const DEVICE_PCI: u32 = 2;
const DEVICE_FLAGS: Show = Show::Flags(&[(1, "RESET"), (2, "PCI"), (0x80, "CAPS")]);

/// The region can be read.
pub const REGION_READ: u32 = 1;
/// The region can be written.
pub const REGION_WRITE: u32 = 2;
/// The region can be mapped.
pub const REGION_MMAP: u32 = 4;
const REGION_FLAGS: Show = Show::Flags(&[(1, "READ"), (2, "WRITE"), (4, "MMAP"), (8, "CAPS")]);

/// Signalled through eventfds.
pub const IRQ_EVENTFD: u32 = 1;
/// Can be masked.
pub const IRQ_MASKABLE: u32 = 2;
/// Masks itself when it is signalled.
pub const IRQ_AUTOMASKED: u32 = 4;
/// Vectors are set up all at once.
pub const IRQ_NORESIZE: u32 = 8;
const IRQ_FLAGS: Show = Show::Flags(&[(1, "EVENTFD"), (2, "MASKABLE"), (4, "AUTOMASKED"), (8, "NORESIZE")]);

/// No data: the action is for all of them.
pub const SET_DATA_NONE: u32 = 1;
/// A byte for each: whether the action is for it.
pub const SET_DATA_BOOL: u32 = 2;
/// A descriptor for each.
pub const SET_DATA_EVENTFD: u32 = 4;
/// Masks.
pub const SET_MASK: u32 = 8;
/// Unmasks.
pub const SET_UNMASK: u32 = 16;
/// Triggers, or says how to signal.
pub const SET_TRIGGER: u32 = 32;
const SET_FLAGS: Show = Show::Flags(&[
    (1, "DATA_NONE"),
    (2, "DATA_BOOL"),
    (4, "DATA_EVENTFD"),
    (8, "ACTION_MASK"),
    (16, "ACTION_UNMASK"),
    (32, "ACTION_TRIGGER"),
]);
const IRQ_INDEXES: Show = Show::Enum(&[(0, "INTX"), (1, "MSI"), (2, "MSIX"), (3, "ERR"), (4, "REQ")]);
const REGION_INDEXES: Show =
    Show::Enum(&[(0, "BAR0"), (1, "BAR1"), (2, "BAR2"), (3, "BAR3"), (4, "BAR4"), (5, "BAR5"), (6, "ROM"), (7, "CONFIG"), (8, "VGA")]);

/// Which feature, in the flags of [`Feature`].
pub const FEATURE_MASK: u32 = 0xffff;
/// Reads a feature.
pub const FEATURE_GET: u32 = 1 << 16;
/// Sets a feature.
pub const FEATURE_SET: u32 = 1 << 17;
/// Asks whether the other two would work.
pub const FEATURE_PROBE: u32 = 1 << 18;

/// `token_uuid_ptr` counts.
pub const BIND_TOKEN: u32 = 1;
/// `pasid` counts, of attach and detach.
pub const PT_PASID: u32 = 1;

uapi! {
    /// What the device is.
    DeviceInfo = vfio_device_info (24) {
        argsz: u32 = Dec,
        flags: u32 = DEVICE_FLAGS,
        num_regions: u32 = Dec,
        num_irqs: u32 = Dec,
        cap_offset: u32 = Dec,
        pad: u32 = Reserved,
    }
    /// Where a region is in the file, and what can be done with it.
    RegionInfo = vfio_region_info (32) {
        argsz: u32 = Dec,
        flags: u32 = REGION_FLAGS,
        index: u32 = REGION_INDEXES,
        cap_offset: u32 = Dec,
        size: u64 = Hex,
        offset: u64 = Hex,
    }
    /// What can be done with a kind of interrupt.
    IrqInfo = vfio_irq_info (16) {
        argsz: u32 = Dec,
        flags: u32 = IRQ_FLAGS,
        index: u32 = IRQ_INDEXES,
        count: u32 = Dec,
    }
    /// Sets interrupts up, masks or triggers them; data follows.
    IrqSet = vfio_irq_set (20) {
        argsz: u32 = Dec,
        flags: u32 = SET_FLAGS,
        index: u32 = IRQ_INDEXES,
        start: u32 = Dec,
        count: u32 = Dec,
    }
    /// Which devices are reset together.
    HotResetInfo = vfio_pci_hot_reset_info (12) {
        argsz: u32 = Dec,
        flags: u32 = Hex,
        count: u32 = Dec,
    }
    /// Resets devices together.
    HotReset = vfio_pci_hot_reset (12) {
        argsz: u32 = Dec,
        flags: u32 = Hex,
        count: u32 = Dec,
    }
    /// Something that not every device has; data follows.
    Feature = vfio_device_feature (8) {
        argsz: u32 = Dec,
        flags: u32 = Flags(&[(FEATURE_GET as u64, "GET"), (FEATURE_SET as u64, "SET"), (FEATURE_PROBE as u64, "PROBE")]),
    }
    /// Puts the device under an iommufd.
    BindIommufd = vfio_device_bind_iommufd (24) {
        argsz: u32 = Dec,
        flags: u32 = Flags(&[(1, "TOKEN")]),
        iommufd: i32 = Fd,
        out_devid: u32 = Dec,
        token_uuid_ptr: u64 = Hex,
    }
    /// Gives the device, or one of its PASIDs, an address space.
    AttachPt = vfio_device_attach_iommufd_pt (16) {
        argsz: u32 = Dec,
        flags: u32 = Flags(&[(1, "PASID")]),
        pt_id: u32 = Dec,
        pasid: u32 = Dec,
    }
    /// Takes it away.
    DetachPt = vfio_device_detach_iommufd_pt (12) {
        argsz: u32 = Dec,
        flags: u32 = Flags(&[(1, "PASID")]),
        pasid: u32 = Dec,
    }
}
