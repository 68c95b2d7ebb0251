//! AMDv1: AMD I/O Virtualization Technology (IOMMU) Specification, 48882, section 2.2.3. Over granules of 2 KiB it is the test format of mock
//! devices, whose address field counts granules.

use super::{NARROW_TABLE, NO_LEAF_HERE, NOT_ALIGNED, Reading, Rules, Said, UNUSED_BIT};

/// Present, accessed, dirty, next level, address, read, write.
const KNOWN: u64 = 1 | 1 << 5 | 1 << 6 | 7 << 9 | 0x000f_ffff_ffff_f000 | 1 << 61 | 1 << 62;

pub(super) fn rules(granule_lg2: u32) -> Rules {
    Rules { granule_lg2, input_lg2: 64, modes: 1..=6, marks: 1 << 5 | 1 << 6, slot_step: |_| 0, read }
}

fn read(rules: &Rules, value: u64, mode: u8, item_lg2: u32) -> Reading {
    if value & 1 == 0 {
        return Reading::nothing(value);
    }
    // Bits 51:12 count granules.
    let number = value >> 12 & 0xff_ffff_ffff;
    let oa = number << rules.granule_lg2;
    let (read, write, dirty) = (value >> 61 & 1 == 1, value >> 62 & 1 == 1, value >> 6 & 1 == 1);
    let unused = (value & !KNOWN != 0, UNUSED_BIT);
    match (value >> 9 & 7) as u8 {
        7 => {
            let size_lg2 = rules.granule_lg2 + 1 + number.trailing_ones();
            if size_lg2 <= item_lg2 || size_lg2 > item_lg2 + 8 || size_lg2 == 39 || mode == 6 {
                return Reading::wrong("a leaf size that this level cannot hold");
            }
            Reading::with(Said::Leaf { size_lg2, oa: oa >> size_lg2 << size_lg2, read, write, dirty }, &[unused])
        }
        0 if mode == 6 || item_lg2 == 39 => Reading::wrong(NO_LEAF_HERE),
        0 => {
            let misaligned = (!oa.is_multiple_of(1 << item_lg2), NOT_ALIGNED);
            Reading::with(Said::Leaf { size_lg2: item_lg2, oa, read, write, dirty }, &[unused, misaligned])
        }
        below if below == mode - 1 => {
            let narrow = (value & (1 << 5 | 1 << 6) != 0 || !read || !write, NARROW_TABLE);
            Reading::with(Said::Table { oa, read, write }, &[unused, narrow])
        }
        _ => Reading::wrong("a pointer that skips levels or points up"),
    }
}
