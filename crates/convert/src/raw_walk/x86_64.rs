//! x86_64 long mode: AMD64 Architecture Programmer's Manual volume 2, 24593, section 5.3.

use super::{NARROW_TABLE, NO_LEAF_HERE, NOT_ACCESSED, NOT_ALIGNED, Reading, Rules, Said, UNUSED_BIT};

const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

pub(super) fn rules(levels: u8) -> Rules {
    // The lower half of a sign-extended space.
    let input_lg2 = 11 + 9 * u32::from(levels);
    Rules { granule_lg2: 12, input_lg2, modes: levels..=levels, marks: 1 << 6, slot_step: |_| 0, read }
}

fn read(_: &Rules, value: u64, mode: u8, item_lg2: u32) -> Reading {
    let bit = |bit: u32| value >> bit & 1 == 1;
    if !bit(0) {
        return Reading::nothing(value);
    }
    if !bit(2) {
        return Reading::wrong("an entry that is the supervisor's alone");
    }
    let oa = value & ADDRESS;
    let write = bit(1);
    if mode > 1 && !bit(7) {
        let unused = (value & !(0b10_0111 | 1 << 6 | ADDRESS) != 0, UNUSED_BIT);
        return Reading::with(Said::Table { oa, read: true, write }, &[unused, (!write || !bit(5) || bit(6), NARROW_TABLE)]);
    }
    if mode > 3 {
        return Reading::wrong(NO_LEAF_HERE);
    }
    // At the lowest level bit 7 chooses a memory type, and is not used.
    let known = ADDRESS | 0b110_0111 | if mode == 1 { 0 } else { 1 << 7 };
    let said = Said::Leaf { size_lg2: item_lg2, oa: oa >> item_lg2 << item_lg2, read: true, write, dirty: bit(6) };
    let findings = [(value & !known != 0, UNUSED_BIT), (!oa.is_multiple_of(1 << item_lg2), NOT_ALIGNED), (!bit(5), NOT_ACCESSED)];
    Reading::with(said, &findings)
}
