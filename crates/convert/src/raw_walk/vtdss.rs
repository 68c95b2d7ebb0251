//! VT-d second stage: D51397, chapter 9, tables of second-stage paging entries.

use super::{NARROW_TABLE, NO_LEAF_HERE, NOT_ALIGNED, Reading, Rules, Said, UNUSED_BIT};

const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Read, write, accessed, dirty, snoop; and page size in a large leaf.
const LEAF: u64 = 0b11 | 1 << 8 | 1 << 9 | 1 << 11 | ADDRESS;

pub(super) fn rules(levels: u8) -> Rules {
    let input_lg2 = 12 + 9 * u32::from(levels);
    Rules { granule_lg2: 12, input_lg2, modes: levels..=levels, marks: 1 << 8 | 1 << 9, slot_step: |_| 0, read }
}

fn read(_: &Rules, value: u64, mode: u8, item_lg2: u32) -> Reading {
    let (read, write) = (value & 1 == 1, value >> 1 & 1 == 1);
    if !read && !write {
        return Reading::nothing(value);
    }
    let oa = value & ADDRESS;
    let large = value >> 7 & 1 == 1;
    if mode > 1 && !large {
        // Accessed is hardware's to set, in pointers too.
        let unused = (value & !(0b11 | 1 << 8 | ADDRESS) != 0, UNUSED_BIT);
        return Reading::with(Said::Table { oa, read, write }, &[unused, (!read || !write, NARROW_TABLE)]);
    }
    if mode > 3 {
        return Reading::wrong(NO_LEAF_HERE);
    }
    let known = if mode == 1 { LEAF } else { LEAF | 1 << 7 };
    let said = Said::Leaf { size_lg2: item_lg2, oa: oa >> item_lg2 << item_lg2, read, write, dirty: value >> 9 & 1 == 1 };
    let findings = [
        (value & !known != 0, UNUSED_BIT),
        (!oa.is_multiple_of(1 << item_lg2), NOT_ALIGNED),
        (value >> 11 & 1 == 0, "a leaf that lets a device be incoherent"),
    ];
    Reading::with(said, &findings)
}
