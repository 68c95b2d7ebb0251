//! IOMMU_GET_HW_INFO.

mod fakes;

use fakes::{Desk, KIND};
use lockstep_iommufd::EngineDriver;
use lockstep_iommufd::uapi::{HW_CAP_ATS_NOT_SUPPORTED, HW_CAP_DIRTY_TRACKING, HW_INFO_INPUT_TYPE, HwInfo};
use rustix::io::Errno;

fn info(dev_id: u32, data_len: u32, data_uptr: u64) -> HwInfo {
    HwInfo { size: 40, dev_id, data_len, data_uptr, ..Default::default() }
}

#[test]
fn mistakes_are_found_in_order() {
    let desk = Desk::new();
    let device = desk.bind(desk.fake());
    let mut arg = info(device.id(), 8, 0);
    assert_eq!(desk.call(0x8a, &mut arg), Err(Errno::FAULT));
    (arg.flags, arg.out_data_type) = (HW_INFO_INPUT_TYPE, 77);
    assert_eq!(desk.call(0x8a, &mut arg), Err(Errno::OPNOTSUPP));
    arg.dev_id = 99;
    assert_eq!(desk.call(0x8a, &mut arg), Err(Errno::NOENT));
    arg.__reserved[2] = 1;
    assert_eq!(desk.call(0x8a, &mut arg), Err(Errno::OPNOTSUPP));
    arg.__reserved[2] = 0;
    arg.flags = 2;
    assert_eq!(desk.call(0x8a, &mut arg), Err(Errno::OPNOTSUPP));
}

/// A short buffer gets the beginning, a long one zeros behind; the true length is told either way.
#[test]
fn buffers_of_any_length() {
    let desk = Desk::new();
    let device = desk.bind(desk.fake());
    for room in [0u32, 1, 7, 8, 9, 4096, 10_000] {
        let at = desk.local.put(&[0xffu8; 12_000][..]);
        let mut arg = info(device.id(), room, at);
        arg.out_data_type = 77;
        assert_eq!(desk.call(0x8a, &mut arg), Ok(0));
        assert_eq!((arg.data_len, arg.out_data_type, arg.out_max_pasid_log2), (8, KIND, 20), "the type is not looked at without its flag");
        let bytes = desk.local.get::<[u8; 12_000]>(at);
        let expected = |n: usize| {
            if n >= room as usize {
                0xff
            } else if n < 8 {
                n as u8 + 1
            } else {
                0
            }
        };
        assert!(bytes.iter().enumerate().all(|(n, byte)| *byte == expected(n)), "{room}");
    }
    // Without a buffer nothing is written.
    assert_eq!(desk.call(0x8a, &mut info(device.id(), 0, 0)), Ok(0));
}

/// The engine's IOMMU says what the software one really does, so that programs see no nesting.
#[test]
fn the_engine_is_behind_an_amd_iommu() {
    let desk = Desk::new();
    let device = desk.bind(std::sync::Arc::into_inner(EngineDriver::new(&desk.host)).unwrap());
    let at = desk.local.put(&[0u64; 2]);
    let mut arg = info(device.id(), 16, at);
    assert_eq!(desk.call(0x8a, &mut arg), Ok(0));
    assert_eq!((arg.out_data_type, arg.data_len, arg.out_max_pasid_log2), (4, 16, 0));
    assert_eq!(arg.out_capabilities, HW_CAP_DIRTY_TRACKING | HW_CAP_ATS_NOT_SUPPORTED);
    let [features, more] = desk.local.get::<[u64; 2]>(at);
    // Bits 49 and 52 host access and dirty, 43 SNP, 11:10 levels, 6 invalidate all; 4 guest translation is not there.
    assert_eq!((features, more), (1 << 52 | 1 << 49 | 1 << 43 | 2 << 10 | 1 << 6, 0));
    let ioas = desk.ioas();
    assert_eq!(desk.hwpt(&device, ioas, 1), Err(Errno::OPNOTSUPP));
    assert_eq!(desk.nested(&device, ioas), Err(Errno::OPNOTSUPP));
    (arg.flags, arg.out_data_type) = (HW_INFO_INPUT_TYPE, 2);
    assert_eq!(desk.call(0x8a, &mut arg), Err(Errno::OPNOTSUPP));
}
