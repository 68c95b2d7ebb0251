//! The structures of the VFIO type 1 container that /dev/iommu understands as well (include/uapi/linux/vfio.h).

use super::Show;

const DMA_FLAGS: Show = Show::Flags(&[(1, "READ"), (2, "WRITE")]);

/// The container type that maps like the first VFIO did: areas can be cut, leaves are single pages.
pub const TYPE1_IOMMU: u64 = 1;
/// DMA is coherent with processor caches.
pub const DMA_CC_IOMMU: u64 = 4;
/// The container type of today.
pub const TYPE1V2_IOMMU: u64 = 3;
/// No IOMMU at all.
pub const NOIOMMU_IOMMU: u64 = 8;
/// Everything can be unmapped in one call.
pub const UNMAP_ALL: u64 = 9;

/// Info: the page sizes count.
pub const INFO_PGSIZES: u32 = 1;
/// Info: there are capabilities.
pub const INFO_CAPS: u32 = 2;
/// The capability that lists usable IOVAs.
pub const CAP_IOVA_RANGE: u16 = 1;
/// The capability that says how many more mappings there may be.
pub const CAP_DMA_AVAIL: u16 = 3;
/// Devices may read.
pub const DMA_MAP_READ: u32 = 1;
/// Devices may write.
pub const DMA_MAP_WRITE: u32 = 2;
/// Unmap everything.
pub const DMA_UNMAP_ALL: u32 = 2;

crate::uapi! {
    /// Asks what the container can do.
    Type1Info = vfio_iommu_type1_info (24) {
        argsz: u32 = Dec, flags: u32 = Flags(&[(1, "PGSIZES"), (2, "CAPS")]), iova_pgsizes: u64 = Hex, cap_offset: u32 = Dec, pad: u32 = Reserved,
    }
    /// Maps memory of the caller.
    DmaMap = vfio_iommu_type1_dma_map (32) { argsz: u32 = Dec, flags: u32 = DMA_FLAGS, vaddr: u64 = Hex, iova: u64 = Hex, size: u64 = Hex, }
    /// Unmaps.
    DmaUnmap = vfio_iommu_type1_dma_unmap (24) {
        argsz: u32 = Dec, flags: u32 = Flags(&[(1, "GET_DIRTY_BITMAP"), (2, "ALL"), (4, "VADDR")]), iova: u64 = Hex, size: u64 = Hex,
    }
    /// What begins each capability.
    CapHeader = vfio_info_cap_header (8) { id: u16 = Dec, version: u16 = Dec, next: u32 = Dec, }
    /// How many more mappings there may be.
    CapDmaAvail = vfio_iommu_type1_info_dma_avail (12) { id: u16 = Dec, version: u16 = Dec, next: u32 = Dec, avail: u32 = Dec, }
    /// Begins the list of usable IOVAs, each two u64.
    CapIovaRange = vfio_iommu_type1_info_cap_iova_range (16) { id: u16 = Dec, version: u16 = Dec, next: u32 = Dec, nr_iovas: u32 = Dec, reserved: u32 = Reserved, }
}
