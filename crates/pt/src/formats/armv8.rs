//! Armv8 stage 2 page tables with a 4 KiB granule, as an SMMUv3 walks them. Sources: Arm Architecture Reference Manual for A-profile, DDI 0487,
//! chapter D8, "The AArch64 Virtual Memory System Architecture": "VMSAv8-64 translation table format descriptors", "The Contiguous bit",
//! "Hardware management of the dirty state"; Arm System Memory Management Unit Architecture Specification version 3, IHI 0070, section
//! 3.21.1, "Translation tables and TLB invalidation completion behavior".
//!
//! Arm counts levels from the top: its level 3 is our level 0, 2 is 1, 1 is 2, 0 is 3. Four levels translate 48 bits of intermediate physical
//! address, three translate 39. Widths between, whose first tables are several in a row, are not here. A leaf is a page descriptor of level 0 or a
//! block descriptor of level 1 or 2. Sixteen neighbours with the contiguous bit make a leaf of 64 KiB or 32 MiB; each slot has an output
//! address of its own. At level 2 (16 GiB) the bit is neither written nor looked at, which is right for a hint.
//!
//! Memory is normal, write-back, inner-shareable; the access flag is set beforehand. Dirty state has no bit of its own: a leaf that may be
//! written has DBM set, and S2AP\[1\], which allows writing, is set by the hardware with the first write. So S2AP\[1\] is the dirty bit, in
//! leaves that have DBM; the stream table entry must have S2HA and S2HD set, or the first write faults. A leaf that is read-only never has it.
//!
//! Without FEAT_BBM level 2 (SMMU_IDR3.BBML) a leaf's size may only change by break-before-make: [`Hitless::BreakFirst`]. A leaf that is
//! hidden for it has bit 0 clear, and the hardware ignores the rest.

use super::AlignDown;
use crate::{Config, Entry, Format, Hitless, Perm, PermSet};
use addr::{Lg2, Oa, SizeSet};

/// Armv8 stage 2 with `LEVELS` levels of tables, 3 or 4, walked by hardware with or without BBML 2; see the module's head.
#[derive(Clone, Copy, Debug)]
pub struct Armv8S2<const LEVELS: u8, const BBML2: bool>;

const VALID: u64 = 1;
/// Of a page or a table; a block has it clear.
const PAGE_OR_TABLE: u64 = 1 << 1;
const WRITE_BACK: u64 = 0b1111 << 2;
const S2AP_READ: u64 = 1 << 6;
const S2AP_WRITE: u64 = 1 << 7;
const INNER_SHAREABLE: u64 = 0b11 << 8;
const ACCESSED: u64 = 1 << 10;
const DBM: u64 = 1 << 51;
const CONTIGUOUS: u64 = 1 << 52;
const CONTIGUOUS_LG2: u8 = 4;
/// Bits 47:12.
const ADDRESS: u64 = (1 << 48) - (1 << 12);

impl<const LEVELS: u8, const BBML2: bool> Format for Armv8S2<LEVELS, BBML2> {
    const NAME: &'static str = match (LEVELS, BBML2) {
        (4, false) => "armv8-s2",
        (4, true) => "armv8-s2-bbml2",
        (3, false) => "armv8-s2-39",
        (3, true) => "armv8-s2-39-bbml2",
        _ => panic!("three levels or four"),
    };
    const GRANULE_LG2: u8 = 12;
    const INDEX_LG2: u8 = 9;
    const START_LEVEL: u8 = LEVELS - 1;
    const MAX_LEVEL: u8 = LEVELS - 1;
    const INPUT_LG2: u8 = 12 + 9 * LEVELS;
    const OUTPUT_LG2: u8 = 48;
    const SIZES: SizeSet = SizeSet(1 << 12 | 1 << 16 | 1 << 21 | 1 << 25 | 1 << 30);
    const PERMS: PermSet = PermSet::ALL;
    const DIRTY: u64 = S2AP_WRITE;
    const HITLESS: Hitless = if BBML2 {
        Hitless::Yes(
            "IHI 0070 section 3.21.1 and SMMU_IDR3.BBML 2: a change of block size or of the contiguous bit that keeps the translation needs no \
             break-before-make",
        )
    } else {
        Hitless::BreakFirst(
            "DDI 0487 chapter D8, \"Using break-before-make when updating translation table entries\", and IHI 0070 section 3.21.1: a change of \
             block size or of the contiguous bit takes an invalid entry and its invalidation in between",
        )
    };
    const VALID: u64 = VALID;
    const CONFIGS: &'static [Config] = &[
        Config { name: "contiguous hint", start_level: LEVELS - 1, sizes: SizeSet::ALL },
        Config { name: "without the contiguous hint", start_level: LEVELS - 1, sizes: SizeSet(1 << 12 | 1 << 21 | 1 << 30) },
    ];

    #[inline(always)]
    fn decode(entry: u64, level: u8) -> Entry {
        if entry & VALID == 0 {
            return Entry::Absent;
        }
        let oa = Oa::new(entry & ADDRESS);
        let page_or_table = entry & PAGE_OR_TABLE != 0;
        if level != 0 && page_or_table {
            return Entry::Table(oa);
        }
        let item = Self::item_lg2(level);
        if page_or_table != (level == 0) || level > 2 || entry & ACCESSED == 0 || oa != oa.align_down_to(item) {
            return Entry::Absent;
        }
        let size = if level < 2 && entry & CONTIGUOUS != 0 { item + CONTIGUOUS_LG2 } else { item };
        let perm = Perm::of(entry & S2AP_READ != 0, entry & (S2AP_WRITE | DBM) != 0);
        Entry::Leaf { size: Lg2(size), oa: oa.align_down_to(size), perm, dirty: entry & S2AP_WRITE != 0 }
    }

    #[inline(always)]
    fn leaf(level: u8, size: Lg2, oa: Oa, perm: Perm) -> u64 {
        let kind = if level == 0 { VALID | PAGE_OR_TABLE } else { VALID };
        let read = if perm.allows(Perm::READ) { S2AP_READ } else { 0 };
        let write = if perm.allows(Perm::WRITE) { DBM } else { 0 };
        let contiguous = if size.0 == Self::item_lg2(level) { 0 } else { CONTIGUOUS };
        kind | WRITE_BACK | read | INNER_SHAREABLE | ACCESSED | write | contiguous | oa.get()
    }

    #[inline(always)]
    fn table(_level: u8, oa: Oa) -> u64 {
        VALID | PAGE_OR_TABLE | oa.get()
    }

    /// Only where DBM says what the bit means: set in a read-only leaf it would let devices write.
    #[inline(always)]
    fn dirtied(leaf: u64) -> u64 {
        if leaf & DBM != 0 { leaf | S2AP_WRITE } else { leaf }
    }

    #[inline(always)]
    fn slot_step(level: u8) -> u64 {
        1 << Self::item_lg2(level)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type S2 = Armv8S2<4, false>;

    /// Typed from the manual's descriptor figures: level, size, output address, permissions, value. S2AP\[1\] is set where writing is allowed,
    /// DBM is not: what software writes for hardware that does not manage dirty state.
    const PLAIN: [(u8, u8, u64, Perm, u64); 6] = [
        (0, 12, 0x1000_0000, Perm::RW, 0x0000_0000_1000_07ff),
        (0, 12, 0x0000_ffff_ffff_f000, Perm::READ, 0x0000_ffff_ffff_f77f),
        (0, 16, 0x1000_0000, Perm::RW, 0x0010_0000_1000_07ff),
        (1, 21, 0x4000_0000, Perm::RW, 0x0000_0000_4000_07fd),
        (1, 25, 0x4000_0000, Perm::WRITE, 0x0010_0000_4000_07bd),
        (2, 30, 0x4000_0000, Perm::RW, 0x0000_0000_4000_07fd),
    ];

    #[test]
    fn golden_leaves() {
        for (level, size, oa, perm, plain) in PLAIN {
            let (size, oa) = (Lg2(size), Oa::new(oa));
            let value = S2::leaf(level, size, oa, perm);
            let writes = perm.allows(Perm::WRITE);
            let clean = if writes { plain & !(1 << 7) | 1 << 51 } else { plain };
            assert_eq!(value, clean, "level {level} size {size}");
            assert_eq!(S2::decode(value, level), Entry::Leaf { size, oa, perm, dirty: false });
            assert_eq!(S2::decode(S2::dirtied(value), level), Entry::Leaf { size, oa, perm, dirty: writes });
            assert_eq!(S2::decode(plain, level), Entry::Leaf { size, oa, perm, dirty: writes }, "not known to be clean");
        }
    }

    #[test]
    fn slots_of_a_contiguous_leaf_have_their_own_addresses() {
        let first = S2::leaf(0, Lg2(16), Oa::new(0x1000_0000), Perm::READ);
        let fifth = first + 4 * S2::slot_step(0);
        assert_eq!(fifth, 0x0010_0000_1000_477f);
        assert_eq!(S2::decode(fifth, 0), S2::decode(first, 0));
        let second = S2::leaf(1, Lg2(25), Oa::new(0x4000_0000), Perm::READ) + S2::slot_step(1);
        assert_eq!(second, 0x0010_0000_4020_077d);
        let oa = Oa::new(0x4000_0000);
        assert_eq!(S2::decode(second, 1), Entry::Leaf { size: Lg2(25), oa, perm: Perm::READ, dirty: false });
    }

    #[test]
    fn golden_tables() {
        for level in 1..4 {
            assert_eq!(S2::table(level, Oa::new(0x1234_5000)), 0x1234_5003);
            assert_eq!(S2::decode(0x1234_5003, level), Entry::Table(Oa::new(0x1234_5000)));
        }
    }

    #[test]
    fn what_hardware_faults_on() {
        assert_eq!(S2::decode(0x1000_07fe, 0), Entry::Absent, "valid bit clear: also what a hidden leaf looks like");
        assert_eq!(S2::decode(0x1000_07fd, 0), Entry::Absent, "a block at the lowest level");
        assert_eq!(S2::decode(0x4000_07fd, 3), Entry::Absent, "a block of 512 GiB");
        assert_eq!(S2::decode(0x4000_17fd, 1), Entry::Absent, "bits 20:17 and 15:12 of a 2 MiB block are reserved");
        assert_eq!(S2::decode(0x1000_03ff, 0), Entry::Absent, "access flag clear");
    }

    #[test]
    fn what_it_translates() {
        assert_eq!(S2::aperture().last().get(), (1 << 48) - 1);
        assert_eq!(Armv8S2::<3, true>::aperture().last().get(), (1 << 39) - 1);
    }
}
