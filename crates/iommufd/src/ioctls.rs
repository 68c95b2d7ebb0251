//! The table: every ioctl of /dev/iommu. docs/coverage.md is made from it.

use crate::table::Ioctl;
use crate::uapi::{self, io, ours};
use crate::{
    Caller, Context, Refusal, dirty, fault, hw_info, hw_queue, hwpt, invalidate, ioas_ops, noiommu, option, our_ops, vdevice, veventq,
    vfio_compat, viommu,
};
use rustix::io::Errno;

/// Number of the test multiplexer.
#[cfg(feature = "test-ops")]
const NR_TEST: u32 = 0xa0;

/// Everything that is served.
pub static TABLE: &[Ioctl<Context>] = &[
    crate::ioctl!(0x64, "VFIO_GET_API_VERSION", vfio_compat::api_version),
    crate::ioctl!(0x65, "VFIO_CHECK_EXTENSION", vfio_compat::check_extension),
    crate::ioctl!(0x66, "VFIO_SET_IOMMU", vfio_compat::set_iommu),
    crate::ioctl!(0x70, "VFIO_IOMMU_GET_INFO", uapi::vfio::Type1Info, min 16, Argsz, vfio_compat::get_info),
    crate::ioctl!(0x71, "VFIO_IOMMU_MAP_DMA", uapi::vfio::DmaMap, min 32, Argsz, vfio_compat::map_dma),
    crate::ioctl!(0x72, "VFIO_IOMMU_UNMAP_DMA", uapi::vfio::DmaUnmap, min 24, Argsz, vfio_compat::unmap_dma),
    crate::ioctl!(0x80, "IOMMU_DESTROY", uapi::Destroy, min 8, Size, ioas_ops::destroy),
    crate::ioctl!(0x81, "IOMMU_IOAS_ALLOC", uapi::IoasAlloc, min 12, Size, ioas_ops::alloc),
    crate::ioctl!(0x82, "IOMMU_IOAS_ALLOW_IOVAS", uapi::IoasAllowIovas, min 24, Size, ioas_ops::allow_iovas),
    crate::ioctl!(0x83, "IOMMU_IOAS_COPY", uapi::IoasCopy, min 40, Size, ioas_ops::copy),
    crate::ioctl!(0x84, "IOMMU_IOAS_IOVA_RANGES", uapi::IoasIovaRanges, min 32, Size, ioas_ops::iova_ranges),
    crate::ioctl!(0x85, "IOMMU_IOAS_MAP", uapi::IoasMap, min 40, Size, ioas_ops::map),
    crate::ioctl!(0x86, "IOMMU_IOAS_UNMAP", uapi::IoasUnmap, min 24, Size, ioas_ops::unmap),
    crate::ioctl!(0x87, "IOMMU_OPTION", uapi::Option, min 24, Size, option::option),
    crate::ioctl!(0x88, "IOMMU_VFIO_IOAS", uapi::VfioIoas, min 12, Size, vfio_compat::vfio_ioas),
    crate::ioctl!(0x89, "IOMMU_HWPT_ALLOC", uapi::HwptAlloc, min 24, Size, hwpt::alloc),
    crate::ioctl!(0x8a, "IOMMU_GET_HW_INFO", uapi::HwInfo, min 32, Size, hw_info::get),
    crate::ioctl!(0x8b, "IOMMU_HWPT_SET_DIRTY_TRACKING", uapi::HwptSetDirtyTracking, min 16, Size, dirty::set),
    crate::ioctl!(0x8c, "IOMMU_HWPT_GET_DIRTY_BITMAP", uapi::HwptGetDirtyBitmap, min 48, Size, dirty::get),
    crate::ioctl!(0x8d, "IOMMU_HWPT_INVALIDATE", uapi::HwptInvalidate, min 32, Size, invalidate::invalidate),
    crate::ioctl!(0x8e, "IOMMU_FAULT_QUEUE_ALLOC", uapi::FaultAlloc, min 16, Size, fault::alloc),
    crate::ioctl!(0x8f, "IOMMU_IOAS_MAP_FILE", uapi::IoasMapFile, min 40, Size, ioas_ops::map_file),
    crate::ioctl!(0x90, "IOMMU_VIOMMU_ALLOC", uapi::ViommuAlloc, min 24, Size, viommu::alloc),
    crate::ioctl!(0x91, "IOMMU_VDEVICE_ALLOC", uapi::VdeviceAlloc, min 24, Size, vdevice::alloc),
    crate::ioctl!(0x92, "IOMMU_IOAS_CHANGE_PROCESS", uapi::IoasChangeProcess, min 8, Size, ioas_ops::change_process),
    crate::ioctl!(0x93, "IOMMU_VEVENTQ_ALLOC", uapi::VeventqAlloc, min 28, Size, veventq::alloc),
    crate::ioctl!(0x94, "IOMMU_HW_QUEUE_ALLOC", uapi::HwQueueAlloc, min 40, Size, hw_queue::alloc),
    crate::ioctl!(0x95, "IOMMU_IOAS_NOIOMMU_GET_PA", uapi::IoasNoiommuGetPa, min 40, Size, noiommu::get_pa),
    #[cfg(feature = "test-ops")]
    crate::ioctl!(NR_TEST, "IOMMU_TEST_CMD", uapi::test::TestCmd, min 68, Size, crate::selftest::run),
    crate::ioctl!(ours::NR_CUT, "LOCKSTEP_IOAS_CUT", ours::IoasCut, min 24, Size, our_ops::cut),
    crate::ioctl!(ours::NR_CONVERT, "LOCKSTEP_IOAS_CONVERT", ours::IoasConvert, min 56, Size, our_ops::convert),
    crate::ioctl!(ours::NR_AUDIT, "LOCKSTEP_IOAS_AUDIT", ours::IoasAudit, min 56, Size, our_ops::audit),
];

/// Number of an ioctl to its place in the table; 0xff for none.
static INDEX: [u8; 256] = {
    let mut index = [0xff; 256];
    let mut at = 0;
    while at < TABLE.len() {
        index[TABLE[at].nr as usize] = at as u8;
        at += 1;
    }
    index
};

/// The entry of `command`.
pub(crate) fn find(command: u32) -> Option<&'static Ioctl<Context>> {
    let nr = command & 0xff;
    let entry = TABLE.get(usize::from(INDEX[nr as usize]))?;
    (command == io(nr)).then_some(entry)
}

/// Whether it is one that hosts have on request only.
pub(crate) fn is_test(entry: &Ioctl<Context>) -> bool {
    #[cfg(feature = "test-ops")]
    return entry.nr == NR_TEST;
    #[cfg(not(feature = "test-ops"))]
    return {
        let _ = entry;
        false
    };
}

/// Why nothing is served under a number. A structure that cannot be read counts first, where the kernel would read one.
pub(crate) fn unknown(command: u32, arg: u64, caller: &dyn Caller) -> Refusal {
    let nr = command & 0xff;
    let last = if cfg!(feature = "test-ops") { 0xa0 } else { 0x95 };
    if (0x80..=last).contains(&nr)
        && let Err(unreadable) = caller.read(arg, &mut [0; 4])
    {
        return unreadable;
    }
    Refusal::new(Errno::NOTTY, format!("/dev/iommu has no ioctl {command:#x}"))
}
