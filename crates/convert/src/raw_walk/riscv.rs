//! RISC-V Sv39, Sv48, Sv57 with Svnapot: privileged architecture 20240411, the sections of those names.

use super::{NARROW_TABLE, NOT_ACCESSED, NOT_ALIGNED, Reading, Rules, Said, UNUSED_BIT};

/// Bits 60:54, and the two of page-based memory types.
const UNUSED: u64 = 0x7fc0_0000_0000_0000;

pub(super) fn rules(levels: u8) -> Rules {
    // The lower half of a sign-extended space.
    let input_lg2 = 11 + 9 * u32::from(levels);
    Rules { granule_lg2: 12, input_lg2, modes: levels..=levels, marks: 1 << 7, slot_step: |_| 0, read }
}

fn read(_: &Rules, value: u64, mode: u8, item_lg2: u32) -> Reading {
    let bit = |bit: u32| value >> bit & 1 == 1;
    if !bit(0) {
        return Reading::nothing(value);
    }
    let ppn = value >> 10 & 0xfff_ffff_ffff;
    // Global, and what is left to software.
    let unused = (value & UNUSED != 0 || bit(5) || bit(8) || bit(9), UNUSED_BIT);
    let (r, w, x) = (bit(1), bit(2), bit(3));
    if !r && !w && !x {
        if mode == 1 {
            return Reading::wrong("a pointer at the lowest level");
        }
        let narrow = (bit(4) || bit(6) || bit(7) || bit(63), NARROW_TABLE);
        return Reading::with(Said::Table { oa: ppn << 12, read: true, write: true }, &[unused, narrow]);
    }
    if !r {
        return Reading::wrong("a leaf that cannot be read, which is reserved or useless");
    }
    let napot = bit(63);
    if napot && (mode != 1 || ppn & 0xf != 0x8) {
        return Reading::wrong("a contiguous size that does not exist");
    }
    let (size_lg2, oa) = if napot { (16, ppn >> 4 << 16) } else { (item_lg2, ppn << 12 >> item_lg2 << item_lg2) };
    let findings = [
        unused,
        (x, "a leaf that may be executed"),
        (!bit(4), "an entry that is the supervisor's alone"),
        (!bit(6), NOT_ACCESSED),
        (!(ppn << 12).is_multiple_of(1 << item_lg2), NOT_ALIGNED),
    ];
    Reading::with(Said::Leaf { size_lg2, oa, read: true, write: w, dirty: bit(7) }, &findings)
}
