//! x86_64 page tables as IOMMUs walk them: AMD's guest ("v2") tables and VT-d first stage. Sources: AMD64 Architecture Programmer's Manual
//! volume 2, 24593, section 5.3, "Long-Mode Page Translation"; 48882, section 2.2.6, "Guest CR3 table"; D51397, chapter 9, "First-Stage
//! Paging Entries".
//!
//! The manuals' names from the bottom: page table is our level 0, page directory 1, page-directory-pointer table 2, PML4 3, PML5 4. Leaves
//! are entries of level 0, and those of levels 1 and 2 that have PS.
//!
//! Addresses are canonical, and of the two halves only the lower one is translated here: 47 or 56 bits. Sign extension would cut the address
//! space in two, which no user of IO addresses asks for, and AMD without a PASID extends with zeroes and has these widths.
//!
//! What is present can be read, so a leaf can say neither "write only" nor "no access". Leaves and tables are the user's (U): requests of
//! devices are, and one that only a supervisor may use translates nothing for them. Accessed (bit 5) is set beforehand, which saves the
//! hardware a write. Dirty (bit 6) is not: it is what a write is known by. Execution is not refused (XD).

use super::AlignDown;
use crate::{Config, Entry, Format, Hitless, Perm, PermSet};
use addr::{Lg2, Oa, SizeSet};

/// x86_64 with `LEVELS` levels of tables, 4 or 5; see the module's head.
#[derive(Clone, Copy, Debug)]
pub struct X86_64<const LEVELS: u8>;

const PRESENT: u64 = 1;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const PAGE_SIZE: u64 = 1 << 7;
/// Bits 51:12.
const ADDRESS: u64 = (1 << 52) - (1 << 12);

impl<const LEVELS: u8> Format for X86_64<LEVELS> {
    const NAME: &'static str = match LEVELS {
        4 => "x86_64-4",
        5 => "x86_64-5",
        _ => panic!("four levels or five"),
    };
    const GRANULE_LG2: u8 = 12;
    const INDEX_LG2: u8 = 9;
    const START_LEVEL: u8 = LEVELS - 1;
    const MAX_LEVEL: u8 = LEVELS - 1;
    const INPUT_LG2: u8 = 11 + 9 * LEVELS;
    const OUTPUT_LG2: u8 = 52;
    const SIZES: SizeSet = SizeSet(1 << 12 | 1 << 21 | 1 << 30);
    const PERMS: PermSet = PermSet::READABLE;
    const DIRTY: u64 = DIRTY;
    const HITLESS: Hitless = Hitless::Yes(
        "D51397 section 6.2 and Intel's SDM volume 3A, \"Details of TLB Use\": after a change of page size that keeps the translation, cached \
         entries of both sizes may be used; 48882 asks for no break-before-make either",
    );
    const CONFIGS: &'static [Config] = &[
        Config { name: "1 GiB leaves", start_level: LEVELS - 1, sizes: SizeSet::ALL },
        Config { name: "2 MiB leaves", start_level: LEVELS - 1, sizes: SizeSet(1 << 12 | 1 << 21) },
        Config { name: "4 KiB leaves", start_level: LEVELS - 1, sizes: SizeSet(1 << 12) },
    ];

    #[inline(always)]
    fn decode(entry: u64, level: u8) -> Entry {
        if entry & (PRESENT | USER) != PRESENT | USER {
            return Entry::Absent;
        }
        let oa = Oa::new(entry & ADDRESS);
        // Bit 7 of a level-0 entry is PAT.
        if level != 0 && entry & PAGE_SIZE == 0 {
            return Entry::Table(oa);
        }
        let size = Self::item_lg2(level);
        if level > 2 || oa != oa.align_down_to(size) {
            return Entry::Absent;
        }
        Entry::Leaf { size: Lg2(size), oa, perm: Perm::of(true, entry & WRITE != 0), dirty: entry & DIRTY != 0 }
    }

    #[inline(always)]
    fn leaf(level: u8, _size: Lg2, oa: Oa, perm: Perm) -> u64 {
        let write = if perm.allows(Perm::WRITE) { WRITE } else { 0 };
        let large = if level == 0 { 0 } else { PAGE_SIZE };
        PRESENT | write | USER | ACCESSED | large | oa.get()
    }

    #[inline(always)]
    fn table(_level: u8, oa: Oa) -> u64 {
        PRESENT | WRITE | USER | ACCESSED | oa.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Typed from the manual's figures: level, size, output address, permissions, value.
    const LEAVES: [(u8, u8, u64, Perm, u64); 5] = [
        (0, 12, 0x1000_0000, Perm::RW, 0x1000_0027),
        (0, 12, 0x000f_ffff_ffff_f000, Perm::READ, 0x000f_ffff_ffff_f025),
        (1, 21, 0x4000_0000, Perm::RW, 0x4000_00a7),
        (1, 21, 0x1020_0000, Perm::READ, 0x1020_00a5),
        (2, 30, 0x80_4000_0000, Perm::RW, 0x80_4000_00a7),
    ];

    #[test]
    fn golden_leaves() {
        for (level, size, oa, perm, value) in LEAVES {
            let (size, oa) = (Lg2(size), Oa::new(oa));
            assert_eq!(X86_64::<4>::leaf(level, size, oa, perm), value, "level {level} {perm:?}");
            assert_eq!(X86_64::<4>::decode(value, level), Entry::Leaf { size, oa, perm, dirty: false });
            assert_eq!(X86_64::<4>::decode(value | 1 << 6, level), Entry::Leaf { size, oa, perm, dirty: true });
        }
    }

    #[test]
    fn golden_tables() {
        for level in 1..5 {
            assert_eq!(X86_64::<5>::table(level, Oa::new(0x1234_5000)), 0x1234_5027);
            assert_eq!(X86_64::<5>::decode(0x1234_5027, level), Entry::Table(Oa::new(0x1234_5000)));
        }
    }

    #[test]
    fn what_hardware_faults_on() {
        assert_eq!(X86_64::<4>::decode(0x1000_0026, 0), Entry::Absent, "present bit clear");
        assert_eq!(X86_64::<4>::decode(0x1000_0023, 0), Entry::Absent, "a supervisor's page");
        assert_eq!(X86_64::<4>::decode(0x4000_00a7, 3), Entry::Absent, "PS is reserved above level 2");
        assert_eq!(X86_64::<4>::decode(0x4000_20a7, 1), Entry::Absent, "bits 20:13 of a 2 MiB leaf are reserved");
    }

    #[test]
    fn what_it_translates() {
        assert_eq!(X86_64::<4>::aperture().last().get(), (1 << 47) - 1);
        assert_eq!(X86_64::<5>::aperture().last().get(), (1 << 56) - 1);
    }
}
