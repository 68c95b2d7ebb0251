//! VT-d second-stage page tables. Source: Intel Virtualization Technology for Directed I/O, Architecture Specification, D51397, chapter 9,
//! "Second-Stage Paging Entries", and section 3.7, "Second-Stage Translation".
//!
//! The specification's names from the bottom: page table (SS-PTE) is our level 0, page directory (SS-PDE) 1, page-directory-pointer table
//! (SS-PDPE) 2, SS-PML4E 3, SS-PML5E 4. An address width (AW) of 1, 2, 3 is a tree of 3, 4, 5 levels that translates 39, 48, 57 bits; it is
//! fixed when the domain is made. Leaves of 2 MiB and 1 GiB are entries of levels 1 and 2 with PS.
//!
//! There is no present bit: an entry that gives neither read nor write is not present, so a leaf cannot say "no access"; writing without
//! reading is legal. Execute (bit 2) is unused. Every leaf has SNP set, which asks for an IOMMU with snoop control (ECAP_REG.SC): there no
//! device can be incoherent. Accessed (bit 8) is the hardware's alone; dirty (bit 9) is updated where the PASID entry has SSADE set.
//!
//! The walker is taken for a coherent one (ECAP_REG.C): nothing is flushed out of the CPU's caches for it.
//! Implementations with erratum SPR17 / 772415 do not take writable leaves from beneath read-only ones; where that matters, map read-write.

use super::AlignDown;
use crate::{Config, Entry, Format, Hitless, Perm, PermSet};
use addr::{Lg2, Oa, SizeSet};

/// VT-d second stage with `LEVELS` levels of tables, 3 to 5; see the module's head.
#[derive(Clone, Copy, Debug)]
pub struct VtdSs<const LEVELS: u8>;

const READ: u64 = 1;
const WRITE: u64 = 1 << 1;
const PAGE_SIZE: u64 = 1 << 7;
const DIRTY: u64 = 1 << 9;
const SNOOP: u64 = 1 << 11;
/// Bits 51:12.
const ADDRESS: u64 = (1 << 52) - (1 << 12);

impl<const LEVELS: u8> Format for VtdSs<LEVELS> {
    const NAME: &'static str = match LEVELS {
        3 => "vtd-ss-3",
        4 => "vtd-ss-4",
        5 => "vtd-ss-5",
        _ => panic!("an address width of 39, 48 or 57 bits"),
    };
    const GRANULE_LG2: u8 = 12;
    const INDEX_LG2: u8 = 9;
    const START_LEVEL: u8 = LEVELS - 1;
    const MAX_LEVEL: u8 = LEVELS - 1;
    const INPUT_LG2: u8 = 12 + 9 * LEVELS;
    const OUTPUT_LG2: u8 = 52;
    const SIZES: SizeSet = SizeSet(1 << 12 | 1 << 21 | 1 << 30);
    const PERMS: PermSet = PermSet::SOME;
    const DIRTY: u64 = DIRTY;
    const HITLESS: Hitless = Hitless::Yes(
        "D51397 section 6.2, address translation caches: after a change of page size that keeps the translation, cached entries of both \
         sizes may be used, and no order of invalidation is asked for",
    );
    const CONFIGS: &'static [Config] = &[
        Config { name: "1 GiB leaves", start_level: LEVELS - 1, sizes: SizeSet::ALL },
        Config { name: "2 MiB leaves", start_level: LEVELS - 1, sizes: SizeSet(1 << 12 | 1 << 21) },
        Config { name: "4 KiB leaves", start_level: LEVELS - 1, sizes: SizeSet(1 << 12) },
    ];

    #[inline(always)]
    fn decode(entry: u64, level: u8) -> Entry {
        if entry & (READ | WRITE) == 0 {
            return Entry::Absent;
        }
        let oa = Oa::new(entry & ADDRESS);
        if level != 0 && entry & PAGE_SIZE == 0 {
            return Entry::Table(oa);
        }
        let size = Self::item_lg2(level);
        if level > 2 || oa != oa.align_down_to(size) {
            return Entry::Absent;
        }
        Entry::Leaf { size: Lg2(size), oa, perm: Perm::of(entry & READ != 0, entry & WRITE != 0), dirty: entry & DIRTY != 0 }
    }

    #[inline(always)]
    fn leaf(level: u8, _size: Lg2, oa: Oa, perm: Perm) -> u64 {
        let large = if level == 0 { 0 } else { PAGE_SIZE };
        u64::from(perm.bits()) | large | SNOOP | oa.get()
    }

    #[inline(always)]
    fn table(_level: u8, oa: Oa) -> u64 {
        READ | WRITE | oa.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Typed from the chapter's bit tables: level, size, output address, permissions, value.
    const LEAVES: [(u8, u8, u64, Perm, u64); 6] = [
        (0, 12, 0x1000_0000, Perm::RW, 0x1000_0803),
        (0, 12, 0x1000_0000, Perm::READ, 0x1000_0801),
        (0, 12, 0x000f_ffff_ffff_f000, Perm::WRITE, 0x000f_ffff_ffff_f802),
        (1, 21, 0x4000_0000, Perm::RW, 0x4000_0883),
        (1, 21, 0x1020_0000, Perm::READ, 0x1020_0881),
        (2, 30, 0x80_4000_0000, Perm::RW, 0x80_4000_0883),
    ];

    #[test]
    fn golden_leaves() {
        for (level, size, oa, perm, value) in LEAVES {
            let (size, oa) = (Lg2(size), Oa::new(oa));
            assert_eq!(VtdSs::<4>::leaf(level, size, oa, perm), value, "level {level} {perm:?}");
            assert_eq!(VtdSs::<4>::decode(value, level), Entry::Leaf { size, oa, perm, dirty: false });
            assert_eq!(VtdSs::<4>::decode(value | 1 << 9 | 1 << 8, level), Entry::Leaf { size, oa, perm, dirty: true });
        }
    }

    #[test]
    fn golden_tables() {
        for level in 1..5 {
            assert_eq!(VtdSs::<5>::table(level, Oa::new(0x1234_5000)), 0x1234_5003);
            assert_eq!(VtdSs::<5>::decode(0x1234_5003, level), Entry::Table(Oa::new(0x1234_5000)));
        }
    }

    #[test]
    fn what_hardware_faults_on() {
        assert_eq!(VtdSs::<4>::decode(0x1000_0800, 0), Entry::Absent, "neither read nor write");
        assert_eq!(VtdSs::<4>::decode(0x4000_0883, 3), Entry::Absent, "PS is reserved above level 2");
        assert_eq!(VtdSs::<4>::decode(0x4000_1883, 1), Entry::Absent, "bits 20:12 of a 2 MiB leaf are reserved");
    }

    #[test]
    fn what_it_translates() {
        let last = |span: addr::Span<addr::Iova>| span.last().get();
        assert_eq!(last(VtdSs::<3>::aperture()), (1 << 39) - 1);
        assert_eq!(last(VtdSs::<4>::aperture()), (1 << 48) - 1);
        assert_eq!(last(VtdSs::<5>::aperture()), (1 << 57) - 1);
    }
}
