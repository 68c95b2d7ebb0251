//! RISC-V page tables as an IOMMU walks them in its first stage: Sv39, Sv48, Sv57 with Svnapot. Sources: The RISC-V Instruction Set Manual
//! volume II, privileged architecture, 20240411, supervisor-level chapter, sections "Sv39: Page-Based 39-bit Virtual-Memory System" and
//! following, and "Svnapot"; RISC-V IOMMU Architecture Specification 1.0, section 3.3, "Process to translate an IOVA".
//!
//! The manual's level i is our level i. An entry that gives read, write or execute is a leaf, of any level; one that is valid and gives none
//! points to a table. With N set, an entry of level 0 is one of 16 that hold the same value and make a leaf of 64 KiB; the lowest four bits
//! of the page number are then 1000b.
//!
//! Addresses are sign-extended, and of the two halves only the lower one is translated here: 38, 47 or 56 bits.
//!
//! Write without read is reserved, and without either an entry is no readable leaf, so a leaf can say "read" and "read and write" only.
//! Leaves are the user's (U), as requests without supervisor privilege need. Accessed is set beforehand. Dirty is not: it is what a write is
//! known by, so the device context must have SADE set, or the first write to a page faults.

use super::AlignDown;
use crate::{Config, Entry, Format, Hitless, Perm, PermSet};
use addr::{Lg2, Oa, SizeSet};

/// RISC-V with `LEVELS` levels of tables, 3 to 5; see the module's head.
#[derive(Clone, Copy, Debug)]
pub struct RiscV<const LEVELS: u8>;

const VALID: u64 = 1;
const READ: u64 = 1 << 1;
const WRITE: u64 = 1 << 2;
const EXECUTE: u64 = 1 << 3;
const USER: u64 = 1 << 4;
const ACCESSED: u64 = 1 << 6;
const DIRTY: u64 = 1 << 7;
/// Bits 53:10 are address bits 55:12.
const PAGE_NUMBER: u64 = (1 << 54) - (1 << 10);
const PAGE_NUMBER_SHIFT: u8 = 12 - 10;
/// Bits 60:54; hardware faults when one is set.
const RESERVED: u64 = (1 << 61) - (1 << 54);
const NAPOT: u64 = 1 << 63;
const NAPOT_LG2: u8 = 16;
/// The lowest page-number bits of a 64 KiB leaf, and what they hold.
const NAPOT_MASK: u64 = 0b1111 << 10;
const NAPOT_64K: u64 = 0b1000 << 10;

impl<const LEVELS: u8> Format for RiscV<LEVELS> {
    const NAME: &'static str = match LEVELS {
        3 => "sv39",
        4 => "sv48",
        5 => "sv57",
        _ => panic!("three levels, four or five"),
    };
    const GRANULE_LG2: u8 = 12;
    const INDEX_LG2: u8 = 9;
    const START_LEVEL: u8 = LEVELS - 1;
    const MAX_LEVEL: u8 = LEVELS - 1;
    const INPUT_LG2: u8 = 11 + 9 * LEVELS;
    const OUTPUT_LG2: u8 = 56;
    const SIZES: SizeSet = SizeSet((1 << 12 | 1 << NAPOT_LG2 | 1 << 21 | 1 << 30 | 1 << 39 | 1 << 48) & ((1 << (12 + 9 * LEVELS)) - 1));
    const PERMS: PermSet = PermSet::READABLE;
    const DIRTY: u64 = DIRTY;
    const HITLESS: Hitless = Hitless::Yes(
        "privileged architecture, section \"Supervisor Memory-Management Fence Instruction\": where a page becomes a superpage without an \
         invalidation between, which of the two entries is used is unpredictable, and the behavior otherwise well defined",
    );
    const CONFIGS: &'static [Config] = &[
        Config { name: "Svnapot", start_level: LEVELS - 1, sizes: SizeSet::ALL },
        Config { name: "without Svnapot", start_level: LEVELS - 1, sizes: SizeSet(!(1 << NAPOT_LG2)) },
    ];

    #[inline(always)]
    fn decode(entry: u64, level: u8) -> Entry {
        if entry & (VALID | RESERVED) != VALID {
            return Entry::Absent;
        }
        let oa = Oa::new((entry & PAGE_NUMBER) << PAGE_NUMBER_SHIFT);
        if entry & (READ | WRITE | EXECUTE) == 0 {
            return if level == 0 { Entry::Absent } else { Entry::Table(oa) };
        }
        // Write alone is reserved, execute alone lets no device read.
        if entry & (READ | USER) != READ | USER {
            return Entry::Absent;
        }
        let perm = Perm::of(true, entry & WRITE != 0);
        let dirty = entry & DIRTY != 0;
        if entry & NAPOT != 0 {
            let known = level == 0 && entry & NAPOT_MASK == NAPOT_64K;
            let leaf = Entry::Leaf { size: Lg2(NAPOT_LG2), oa: oa.align_down_to(NAPOT_LG2), perm, dirty };
            return if known { leaf } else { Entry::Absent };
        }
        let size = Self::item_lg2(level);
        if oa != oa.align_down_to(size) {
            return Entry::Absent;
        }
        Entry::Leaf { size: Lg2(size), oa, perm, dirty }
    }

    #[inline(always)]
    fn leaf(_level: u8, size: Lg2, oa: Oa, perm: Perm) -> u64 {
        let write = if perm.allows(Perm::WRITE) { WRITE } else { 0 };
        let napot = if size.0 == NAPOT_LG2 { NAPOT | NAPOT_64K } else { 0 };
        VALID | READ | write | USER | ACCESSED | napot | oa.get() >> PAGE_NUMBER_SHIFT
    }

    #[inline(always)]
    fn table(_level: u8, oa: Oa) -> u64 {
        VALID | oa.get() >> PAGE_NUMBER_SHIFT
    }

    #[inline(always)]
    fn step(size: Lg2) -> u64 {
        size.bytes() >> PAGE_NUMBER_SHIFT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Typed from the manual's figure of an Sv39 entry and its table of Svnapot encodings: level, size, output address, permissions, value.
    /// The dirty bit is set, as software without hardware updates would have it.
    const LEAVES: [(u8, u8, u64, Perm, u64); 6] = [
        (0, 12, 0x8000_0000, Perm::RW, 0x0000_0000_2000_00d7),
        (0, 12, 0x00ff_ffff_ffff_f000, Perm::RW, 0x003f_ffff_ffff_fcd7),
        (0, 16, 0x8000_0000, Perm::RW, 0x8000_0000_2000_20d7),
        (0, 16, 0x8001_0000, Perm::READ, 0x8000_0000_2000_60d3),
        (1, 21, 0x4000_0000, Perm::RW, 0x0000_0000_1000_00d7),
        (2, 30, 0x80_4000_0000, Perm::READ, 0x0000_0020_1000_00d3),
    ];

    #[test]
    fn golden_leaves() {
        for (level, size, oa, perm, value) in LEAVES {
            let (size, oa) = (Lg2(size), Oa::new(oa));
            assert_eq!(RiscV::<3>::leaf(level, size, oa, perm) | 1 << 7, value, "level {level} size {size}");
            assert_eq!(RiscV::<3>::decode(value, level), Entry::Leaf { size, oa, perm, dirty: true });
            assert_eq!(RiscV::<3>::decode(value & !(1 << 7), level), Entry::Leaf { size, oa, perm, dirty: false });
        }
    }

    #[test]
    fn golden_tables() {
        for level in 1..5 {
            assert_eq!(RiscV::<5>::table(level, Oa::new(0x1234_5000)), 0x048d_1401);
            assert_eq!(RiscV::<5>::decode(0x048d_1401, level), Entry::Table(Oa::new(0x1234_5000)));
        }
    }

    #[test]
    fn what_hardware_faults_on() {
        assert_eq!(RiscV::<3>::decode(0x2000_00d6, 0), Entry::Absent, "valid bit clear");
        assert_eq!(RiscV::<3>::decode(0x2000_00d5, 0), Entry::Absent, "write without read");
        assert_eq!(RiscV::<3>::decode(0x2000_00d9, 0), Entry::Absent, "execute only");
        assert_eq!(RiscV::<3>::decode(0x2000_00c7, 0), Entry::Absent, "a supervisor's page");
        assert_eq!(RiscV::<3>::decode(0x048d_1401, 0), Entry::Absent, "a pointer at the lowest level");
        assert_eq!(RiscV::<3>::decode(0x0040_0000_2000_00d7, 0), Entry::Absent, "a reserved bit");
        assert_eq!(RiscV::<3>::decode(0x2000_04d7, 1), Entry::Absent, "a misaligned superpage");
        assert_eq!(RiscV::<3>::decode(0x8000_0000_2000_10d7, 0), Entry::Absent, "a reserved Svnapot size");
        assert_eq!(RiscV::<3>::decode(0x8000_0000_1000_20d7, 1), Entry::Absent, "Svnapot above level 0");
    }

    #[test]
    fn what_it_translates() {
        assert_eq!(RiscV::<3>::aperture().last().get(), (1 << 38) - 1);
        assert_eq!(RiscV::<4>::aperture().last().get(), (1 << 47) - 1);
        assert_eq!(RiscV::<5>::aperture().last().get(), (1 << 56) - 1);
        assert_eq!(RiscV::<4>::SIZES, SizeSet(1 << 12 | 1 << 16 | 1 << 21 | 1 << 30 | 1 << 39));
    }
}
