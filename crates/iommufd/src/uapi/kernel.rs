//! The structures of include/uapi/linux/iommufd.h of Linux 7.3.

use super::Show;

/// Names of the map flags.
pub const MAP_FLAGS: Show = Show::Flags(&[(1, "FIXED_IOVA"), (2, "WRITEABLE"), (4, "READABLE")]);
/// Map exactly at the given IOVA.
pub const MAP_FIXED_IOVA: u32 = 1;
/// Devices may write.
pub const MAP_WRITEABLE: u32 = 2;
/// Devices may read.
pub const MAP_READABLE: u32 = 4;

/// The page table can be a parent of nested ones.
pub const HWPT_NEST_PARENT: u32 = 1;
/// Only devices that mark pages dirty may attach.
pub const HWPT_DIRTY_TRACKING: u32 = 2;
/// `fault_id` counts.
pub const HWPT_FAULT_ID_VALID: u32 = 4;
/// PASIDs may attach.
pub const HWPT_PASID: u32 = 8;
const HWPT_FLAGS: Show = Show::Flags(&[(1, "NEST_PARENT"), (2, "DIRTY_TRACKING"), (4, "FAULT_ID_VALID"), (8, "PASID")]);

/// Option: who is charged for pinned memory.
pub const OPTION_RLIMIT_MODE: u32 = 0;
/// Option: leaves larger than a page.
pub const OPTION_HUGE_PAGES: u32 = 1;
/// Sets an option.
pub const OPTION_SET: u16 = 0;
/// Reads an option.
pub const OPTION_GET: u16 = 1;

/// Reads which IOAS VFIO calls use.
pub const VFIO_IOAS_GET: u16 = 0;
/// Says which IOAS VFIO calls use.
pub const VFIO_IOAS_SET: u16 = 1;
/// VFIO calls use none.
pub const VFIO_IOAS_CLEAR: u16 = 2;

/// The type is given, not asked for.
pub const HW_INFO_INPUT_TYPE: u32 = 1;
/// Capability: dirty tracking.
pub const HW_CAP_DIRTY_TRACKING: u64 = 1;
/// Capability: the device has no ATS.
pub const HW_CAP_ATS_NOT_SUPPORTED: u64 = 8;
const HW_CAPS: Show = Show::Flags(&[(1, "DIRTY_TRACKING"), (2, "PASID_EXEC"), (4, "PASID_PRIV"), (8, "ATS_NOT_SUPPORTED")]);

/// Dirty tracking on.
pub const DIRTY_TRACKING_ENABLE: u32 = 1;
/// Dirty bits stay as they are.
pub const DIRTY_NO_CLEAR: u32 = 1;

/// A fault record carries a PASID.
pub const PGFAULT_PASID_VALID: u32 = 1;
/// The last record of a group.
pub const PGFAULT_LAST_PAGE: u32 = 2;
/// Answer to a fault: try again.
pub const PAGE_RESP_SUCCESS: u32 = 0;
/// Answer to a fault: it stays one.
pub const PAGE_RESP_INVALID: u32 = 1;
/// Events were lost before this header.
pub const VEVENTQ_LOST_EVENTS: u32 = 1;

crate::uapi! {
    /// Destroys an object.
    Destroy = iommu_destroy (8) { size: u32 = Dec, id: u32 = Dec, }
    /// Makes an IOAS.
    IoasAlloc = iommu_ioas_alloc (12) { size: u32 = Dec, flags: u32 = Hex, out_ioas_id: u32 = Dec, }
    /// A closed range of IOVAs.
    IovaRange = iommu_iova_range (16) { start: u64 = Hex, last: u64 = Hex, }
    /// Asks which IOVAs can be used.
    IoasIovaRanges = iommu_ioas_iova_ranges (32) {
        size: u32 = Dec, ioas_id: u32 = Dec, num_iovas: u32 = Dec, __reserved: u32 = Reserved, allowed_iovas: u64 = Hex, out_iova_alignment: u64 = Hex,
    }
    /// Says which IOVAs may be chosen automatically.
    IoasAllowIovas = iommu_ioas_allow_iovas (24) {
        size: u32 = Dec, ioas_id: u32 = Dec, num_iovas: u32 = Dec, __reserved: u32 = Reserved, allowed_iovas: u64 = Hex,
    }
    /// Maps memory of the caller.
    IoasMap = iommu_ioas_map (40) {
        size: u32 = Dec, flags: u32 = MAP_FLAGS, ioas_id: u32 = Dec, __reserved: u32 = Reserved, user_va: u64 = Hex, length: u64 = Hex, iova: u64 = Hex,
    }
    /// Asks for the physical address behind an IOVA without an IOMMU.
    IoasNoiommuGetPa = iommu_ioas_noiommu_get_pa (40) {
        size: u32 = Dec, flags: u32 = Hex, ioas_id: u32 = Dec, __reserved: u32 = Reserved, iova: u64 = Hex, length: u64 = Hex, out_phys: u64 = Hex,
    }
    /// Maps part of a file.
    IoasMapFile = iommu_ioas_map_file (40) {
        size: u32 = Dec, flags: u32 = MAP_FLAGS, ioas_id: u32 = Dec, fd: i32 = Fd, start: u64 = Hex, length: u64 = Hex, iova: u64 = Hex,
    }
    /// Maps the same pages once more.
    IoasCopy = iommu_ioas_copy (40) {
        size: u32 = Dec, flags: u32 = MAP_FLAGS, dst_ioas_id: u32 = Dec, src_ioas_id: u32 = Dec, length: u64 = Hex, dst_iova: u64 = Hex, src_iova: u64 = Hex,
    }
    /// Unmaps whole areas.
    IoasUnmap = iommu_ioas_unmap (24) { size: u32 = Dec, ioas_id: u32 = Dec, iova: u64 = Hex, length: u64 = Hex, }
    /// Reads or sets an option.
    Option = iommu_option (24) {
        size: u32 = Dec, option_id: u32 = Enum(&[(0, "RLIMIT_MODE"), (1, "HUGE_PAGES")]), op: u16 = Enum(&[(0, "SET"), (1, "GET")]), __reserved: u16 = Reserved, object_id: u32 = Dec, val64: u64 = Dec,
    }
    /// The IOAS of VFIO calls.
    VfioIoas = iommu_vfio_ioas (12) {
        size: u32 = Dec, ioas_id: u32 = Dec, op: u16 = Enum(&[(0, "GET"), (1, "SET"), (2, "CLEAR")]), __reserved: u16 = Reserved,
    }
    /// Makes a page table for devices.
    HwptAlloc = iommu_hwpt_alloc (48) {
        size: u32 = Dec, flags: u32 = HWPT_FLAGS, dev_id: u32 = Dec, pt_id: u32 = Dec, out_hwpt_id: u32 = Dec, __reserved: u32 = Reserved,
        data_type: u32 = Hex, data_len: u32 = Dec, data_uptr: u64 = Hex, fault_id: u32 = Dec, __reserved2: u32 = Reserved,
    }
    /// Asks what the IOMMU in front of a device can do.
    HwInfo = iommu_hw_info (40) {
        size: u32 = Dec, flags: u32 = Flags(&[(1, "INPUT_TYPE")]), dev_id: u32 = Dec, data_len: u32 = Dec, data_uptr: u64 = Hex, out_data_type: u32 = Hex,
        out_max_pasid_log2: u8 = Dec, __reserved: [u8; 3] = Reserved, out_capabilities: u64 = HW_CAPS,
    }
    /// Turns dirty tracking on and off.
    HwptSetDirtyTracking = iommu_hwpt_set_dirty_tracking (16) {
        size: u32 = Dec, flags: u32 = Flags(&[(1, "ENABLE")]), hwpt_id: u32 = Dec, __reserved: u32 = Reserved,
    }
    /// Reads which pages were written to.
    HwptGetDirtyBitmap = iommu_hwpt_get_dirty_bitmap (48) {
        size: u32 = Dec, hwpt_id: u32 = Dec, flags: u32 = Flags(&[(1, "NO_CLEAR")]), __reserved: u32 = Reserved, iova: u64 = Hex, length: u64 = Hex, page_size: u64 = Hex, data: u64 = Hex,
    }
    /// Invalidates what devices cached of a nested table.
    HwptInvalidate = iommu_hwpt_invalidate (32) {
        size: u32 = Dec, hwpt_id: u32 = Dec, data_uptr: u64 = Hex, data_type: u32 = Hex, entry_len: u32 = Dec, entry_num: u32 = Dec, __reserved: u32 = Reserved,
    }
    /// A page request, read from a fault queue.
    HwptPgfault = iommu_hwpt_pgfault (40) {
        flags: u32 = Flags(&[(1, "PASID_VALID"), (2, "LAST_PAGE")]), dev_id: u32 = Dec, pasid: u32 = Dec, grpid: u32 = Dec,
        perm: u32 = Flags(&[(1, "READ"), (2, "WRITE"), (4, "EXEC"), (8, "PRIV")]), __reserved: u32 = Reserved, addr: u64 = Hex, length: u32 = Dec, cookie: u32 = Dec,
    }
    /// The answer to one, written to the fault queue.
    HwptPageResponse = iommu_hwpt_page_response (8) { cookie: u32 = Dec, code: u32 = Enum(&[(0, "SUCCESS"), (1, "INVALID")]), }
    /// Makes a fault queue.
    FaultAlloc = iommu_fault_alloc (16) { size: u32 = Dec, flags: u32 = Hex, out_fault_id: u32 = Dec, out_fault_fd: u32 = Fd, }
    /// Makes a virtual IOMMU.
    ViommuAlloc = iommu_viommu_alloc (40) {
        size: u32 = Dec, flags: u32 = Hex, r#type: u32 = Hex, dev_id: u32 = Dec, hwpt_id: u32 = Dec, out_viommu_id: u32 = Dec, data_len: u32 = Dec, __reserved: u32 = Reserved, data_uptr: u64 = Hex,
    }
    /// Gives a device its number in a virtual IOMMU.
    VdeviceAlloc = iommu_vdevice_alloc (24) { size: u32 = Dec, viommu_id: u32 = Dec, dev_id: u32 = Dec, out_vdevice_id: u32 = Dec, virt_id: u64 = Hex, }
    /// Charges the caller for what others mapped.
    IoasChangeProcess = iommu_ioas_change_process (8) { size: u32 = Dec, __reserved: u32 = Reserved, }
    /// What precedes each event of a virtual event queue.
    VeventHeader = iommufd_vevent_header (8) { flags: u32 = Flags(&[(1, "LOST_EVENTS")]), sequence: u32 = Dec, }
    /// Makes a virtual event queue.
    VeventqAlloc = iommu_veventq_alloc (32) {
        size: u32 = Dec, flags: u32 = Hex, viommu_id: u32 = Dec, r#type: u32 = Hex, veventq_depth: u32 = Dec, out_veventq_id: u32 = Dec, out_veventq_fd: u32 = Fd, __reserved: u32 = Reserved,
    }
    /// Makes a hardware queue in guest memory.
    HwQueueAlloc = iommu_hw_queue_alloc (40) {
        size: u32 = Dec, flags: u32 = Hex, viommu_id: u32 = Dec, r#type: u32 = Hex, index: u32 = Dec, out_hw_queue_id: u32 = Dec, nesting_parent_iova: u64 = Hex, length: u64 = Hex,
    }
}
