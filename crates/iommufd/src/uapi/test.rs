//! The command of the kernel's test multiplexer: 72 bytes, of which the first 16 are common to all operations. What stands behind them is
//! the operation's business; one structure here for each, which begins at byte 16.

use super::Show;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A driver's data for a page table: [`HwptData`].
pub const HWPT_DATA: u32 = 0xdead;
/// The mock hardware's description of itself: [`HwInfoData`].
pub const HW_INFO: u32 = 0xfeed_beef;
/// The word in it that is always the same.
pub const HW_INFO_WORD: u32 = 0xdead_beef;
/// Entries that invalidate slots of a nested page table: [`NestedInvalidate`].
pub const NESTED_INVALIDATE: u32 = 0xdead_beef;
/// The mock virtual IOMMU, and its data: [`ViommuData`].
pub const VIOMMU: u32 = 0xdead_beef;
/// Entries that invalidate slots of devices behind a virtual IOMMU: [`DeviceInvalidate`].
pub const VIOMMU_INVALIDATE: u32 = 0xdead_beef;
/// Events of the mock virtual IOMMU: the virtual number of the device, 4 bytes.
pub const VEVENTQ: u32 = 0xbeef_beef;
/// Queues of the mock virtual IOMMU.
pub const HW_QUEUE: u32 = 0xdead_beef;

/// Every slot, not one.
pub const INVALIDATE_ALL: u32 = 1;
/// Slots of a mock IOTLB, and of a mock device's cache.
pub const SLOTS: usize = 4;
/// What a device's slots hold at first.
pub const CACHE_START: u32 = 0x00ba_ddad;
/// Queues that a mock virtual IOMMU has room for.
pub const HW_QUEUES: u32 = 2;

/// The device cannot track dirty pages.
pub const DEVICE_NO_DIRTY: u32 = 1;
/// The device has PASIDs, 20 bits of them.
pub const DEVICE_PASID: u32 = 4;
/// The access pins pages.
pub const ACCESS_NEEDS_PIN: u32 = 1;
/// Software writes.
pub const ACCESS_WRITE: u32 = 1;
/// A copy takes the way that knows no process.
pub const ACCESS_SLOW: u32 = 4;
/// The address is an area's number and an offset in it, two words.
pub const ACCESS_BY_AREA: u32 = 1 << 16;

const OPS: Show = Show::Enum(&[
    (1, "ADD_RESERVED"),
    (2, "MOCK_DOMAIN"),
    (3, "MD_CHECK_MAP"),
    (4, "MD_CHECK_REFS"),
    (5, "CREATE_ACCESS"),
    (6, "DESTROY_ACCESS_PAGES"),
    (7, "ACCESS_PAGES"),
    (8, "ACCESS_RW"),
    (9, "SET_TEMP_MEMORY_LIMIT"),
    (10, "MOCK_DOMAIN_REPLACE"),
    (11, "ACCESS_REPLACE_IOAS"),
    (12, "MOCK_DOMAIN_FLAGS"),
    (13, "DIRTY"),
    (14, "MD_CHECK_IOTLB"),
    (15, "TRIGGER_IOPF"),
    (16, "DEV_CHECK_CACHE"),
    (17, "TRIGGER_VEVENT"),
    (18, "PASID_ATTACH"),
    (19, "PASID_REPLACE"),
    (20, "PASID_DETACH"),
    (21, "PASID_CHECK_HWPT"),
    (22, "DMABUF_GET"),
    (23, "DMABUF_REVOKE"),
]);

crate::uapi! {
    /// One operation. What the words at 16 and behind mean is the operation's business.
    TestCmd = iommu_test_cmd (72) {
        size: u32 = Dec, op: u32 = OPS, id: u32 = Dec, __reserved: u32 = Reserved,
        arg0: u64 = Reserved, arg1: u64 = Reserved, arg2: u64 = Reserved, arg3: u64 = Reserved, arg4: u64 = Reserved, arg5: u64 = Reserved, arg6: u64 = Reserved,
    }
}

/// Where the operation's own words begin.
const ARGS_AT: usize = 16;

impl TestCmd {
    /// The operation's own words.
    pub fn args<T: FromBytes + KnownLayout + Immutable + Copy + Default>(&self) -> T {
        T::read_from_prefix(&self.as_bytes()[ARGS_AT..]).map_or_else(|_| T::default(), |(args, _)| args)
    }

    /// Puts an answer in their place.
    pub fn set_args<T: IntoBytes + Immutable>(&mut self, args: &T) {
        let _fits = args.write_to_prefix(&mut self.as_mut_bytes()[ARGS_AT..]);
    }
}

macro_rules! args {
    ($($(#[$meta:meta])* $Name:ident ($size:literal) { $($field:ident: $ty:ty,)* })*) => {$(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
        #[repr(C)]
        pub struct $Name { $(#[expect(missing_docs, reason = "the structure says what it is for")] pub $field: $ty,)* }
        const _: () = assert!(size_of::<$Name>() == $size && $size <= 56);
    )*};
}

args! {
    /// Keeps mappings out of a range.
    AddReserved (16) { start: u64, length: u64, }
    /// Makes a mock device and attaches it. `dev_flags` counts in MOCK_DOMAIN_FLAGS alone.
    MockDomain (16) { out_stdev_id: u32, out_hwpt_id: u32, out_idev_id: u32, dev_flags: u32, }
    /// Attaches the device elsewhere; answers the HWPT.
    MockDomainReplace (4) { pt_id: u32, }
    /// Compares what a domain translates to with what the caller has at `uptr`.
    CheckMap (24) { iova: u64, length: u64, uptr: u64, }
    /// Compares the number of pins of each page.
    CheckRefs (24) { length: u64, uptr: u64, refs: u32, pad: u32, }
    /// Makes an access.
    CreateAccess (8) { out_access_fd: u32, flags: u32, }
    /// Drops what one ACCESS_PAGES pinned.
    DestroyAccessPages (4) { access_pages_id: u32, }
    /// Pins pages, and compares them with what the caller has at `uptr` unless that is 0.
    AccessPages (32) { flags: u32, out_access_pages_id: u32, iova: u64, length: u64, uptr: u64, }
    /// Copies between `uptr` and an IOVA.
    AccessRw (32) { iova: u64, length: u64, uptr: u64, flags: u32, pad: u32, }
    /// How much scratch memory there is.
    MemoryLimit (4) { limit: u32, }
    /// Moves an access.
    AccessReplaceIoas (4) { ioas_id: u32, }
    /// Marks pages dirty, one for each bit that is set at `uptr`.
    Dirty (48) { flags: u32, pad: u32, iova: u64, length: u64, page_size: u64, uptr: u64, out_nr_dirty: u64, }
    /// Compares a slot of a nested page table's IOTLB.
    CheckIotlb (8) { slot: u32, iotlb: u32, }
    /// Has a device report a page request.
    TriggerIopf (24) { dev_id: u32, pasid: u32, grpid: u32, perm: u32, addr: u64, }
    /// Compares a slot of a device's cache.
    CheckCache (8) { slot: u32, cache: u32, }
    /// Has a device's virtual IOMMU report an event.
    TriggerVevent (4) { dev_id: u32, }
    /// Attaches a PASID, or replaces what it is attached to; answers the HWPT.
    PasidAttach (8) { pasid: u32, pt_id: u32, }
    /// Detaches a PASID.
    PasidDetach (4) { pasid: u32, }
    /// Compares what a PASID is attached to.
    PasidCheck (8) { pasid: u32, hwpt_id: u32, }
    /// Makes a dma-buf.
    DmabufGet (8) { length: u32, open_flags: u32, }
    /// Takes a dma-buf away from whoever mapped it, or ends that.
    DmabufRevoke (8) { dmabuf_fd: i32, revoked: u32, }

    /// Data for a mock page table. The second word counts for one on an IOAS, the first for a nested one.
    HwptData (8) { iotlb: u32, pagetable_type: u32, }
    /// What mock hardware says of itself.
    HwInfoData (8) { flags: u32, test_reg: u32, }
    /// Invalidates slots of a nested page table.
    NestedInvalidate (8) { flags: u32, iotlb_id: u32, }
    /// Data for a mock virtual IOMMU.
    ViommuData (24) { in_data: u32, out_data: u32, out_mmap_offset: u64, out_mmap_length: u64, }
    /// Invalidates slots of a device behind a virtual IOMMU.
    DeviceInvalidate (12) { flags: u32, vdev_id: u32, cache_id: u32, }
}
