//! Armv8 stage 2 with a 4 KiB granule: DDI 0487, chapter D8, figures of stage 2 block, page and table descriptors.

use super::{NARROW_TABLE, NO_LEAF_HERE, NOT_ACCESSED, NOT_ALIGNED, Reading, Rules, Said, UNUSED_BIT};

const ADDRESS: u64 = 0x0000_ffff_ffff_f000;

pub(super) fn rules(levels: u8) -> Rules {
    let input_lg2 = 12 + 9 * u32::from(levels);
    // Bit 7 is the dirty state of what has bit 51; each slot has an address of its own.
    Rules { granule_lg2: 12, input_lg2, modes: levels..=levels, marks: 1 << 7, slot_step: |item| item, read }
}

fn read(_: &Rules, value: u64, mode: u8, item_lg2: u32) -> Reading {
    if value & 1 == 0 {
        return Reading::nothing(value);
    }
    let field = |low: u32, bits: u32| value >> low & ((1 << bits) - 1);
    let oa = value & ADDRESS;
    let table_or_page = field(1, 1) == 1;
    if mode > 1 && table_or_page {
        let narrow = (value & (1 << 6 | 1 << 7 | 1 << 10 | 1 << 51) != 0, NARROW_TABLE);
        return Reading::with(Said::Table { oa, read: true, write: true }, &[narrow, (value & !(0b11 | ADDRESS) != 0, UNUSED_BIT)]);
    }
    if mode == 1 && !table_or_page || mode > 3 {
        return Reading::wrong(NO_LEAF_HERE);
    }
    let contiguous = field(52, 1) == 1;
    if contiguous && mode == 3 {
        return Reading::wrong("sixteen leaves of 1 GiB as one");
    }
    let size_lg2 = if contiguous { item_lg2 + 4 } else { item_lg2 };
    let (managed, writable) = (field(51, 1) == 1, field(7, 1) == 1);
    let findings = [
        (value & !(0x7ff | ADDRESS | 1 << 51 | 1 << 52) != 0, UNUSED_BIT),
        (!oa.is_multiple_of(1 << item_lg2), NOT_ALIGNED),
        (field(10, 1) == 0, NOT_ACCESSED),
        (field(2, 4) != 0b1111 || field(8, 2) != 0b11, "memory that is not write-back and inner-shareable"),
        (writable && !managed, "a leaf whose dirty state nobody manages"),
    ];
    let said = Said::Leaf { size_lg2, oa: oa >> size_lg2 << size_lg2, read: field(6, 1) == 1, write: managed || writable, dirty: writable };
    Reading::with(said, &findings)
}
