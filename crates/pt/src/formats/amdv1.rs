//! AMD IOMMU v1 host page tables. Source: AMD I/O Virtualization Technology (IOMMU) Specification, 48882, section 2.2.3, tables 14 and 15.
//!
//! The specification's mode (1..=6) counts tables from the bottom: mode m is our level m - 1. An entry's Next Level field is the mode of
//! the table that it points to, which is our level of the entry itself. Next Level 0 is a leaf of the level's default size, Next Level 7 a
//! leaf whose size is encoded in the address: a run of k ones from bit 12 and then a zero make 2^(13+k) bytes, and every slot that the
//! leaf covers holds the same value. 512 GiB leaves are left out: hardware mishandles them. A pointer to a table more than one level down
//! is legal there and never written here; a walk takes it for absent.
//!
//! A device table entry begins at any mode; [`Format::CONFIGS`] has all six. Bit 60 (FC) forces coherent accesses and is written by the
//! coherent variant only: devices here are coherent anyhow. The accessed bit (5) and U (59) are neither written nor read.
//!
//! The same encoding over a 2 KiB granule is a format for tests, which no hardware walks: the address field counts granules, so it holds
//! an address shifted left by one, bit 11 included; a table still has 512 entries, so a level reaches half as far.

use super::AlignDown;
use crate::{Config, Entry, Format, Hitless, Perm, PermSet};
use addr::{Lg2, Oa, SizeSet};

/// AMDv1 over granules of `1 << GRANULE_LG2` bytes; see the module's head.
#[derive(Clone, Copy, Debug)]
pub struct AmdGranule<const GRANULE_LG2: u8, const FORCE_COHERENT: bool = false>;

/// AMDv1 as the specification has it: 4 KiB, and every power of two above but 512 GiB.
pub type AmdV1 = AmdGranule<12>;

/// The same with FC in every leaf: for devices that may ask for accesses without coherence, and are not to have them.
pub type AmdV1Coherent = AmdGranule<12, true>;

/// A test format, of mock devices: AMDv1 with pages of 2 KiB and every power of two above but 512 GiB. Its page sizes never coincide with
/// the host's, and half a host page can be mapped, so it catches code that mixes the two up.
pub type AmdV1K2 = AmdGranule<11>;

const PRESENT: u64 = 1;
const DIRTY: u64 = 1 << 6;
const NEXT_LEVEL_SHIFT: u32 = 9;
const NEXT_LEVEL: u64 = 7 << NEXT_LEVEL_SHIFT;
const SIZED_LEAF: u64 = 7;
/// Bits 51:12: an output address in units of the granule.
const ADDRESS: u64 = (1 << 52) - (1 << 12);
const ADDRESS_SHIFT: u8 = 12;
const COHERENT: u64 = 1 << 60;
const READ: u64 = 1 << 61;
const WRITE: u64 = 1 << 62;
const BROKEN_512G: u64 = 1 << 39;

const fn perm_bits(perm: Perm) -> u64 {
    (if perm.allows(Perm::READ) { READ } else { 0 }) | (if perm.allows(Perm::WRITE) { WRITE } else { 0 })
}

impl<const GRANULE_LG2: u8, const FORCE_COHERENT: bool> AmdGranule<GRANULE_LG2, FORCE_COHERENT> {
    /// How far addresses are shifted to stand in the address field; 0 in the real format.
    const SHIFT: u8 = ADDRESS_SHIFT - GRANULE_LG2;
    /// Smallest and largest size that Next Level 7 can say.
    const SIZED_MIN_LG2: u8 = GRANULE_LG2 + 1;
    const LARGEST_LG2: u8 = Self::OUTPUT_LG2 - 1;

    #[inline(always)]
    fn address(entry: u64) -> u64 {
        (entry & ADDRESS) >> Self::SHIFT
    }
}

/// Every mode, that of a new tree first; and the one that drivers offer where hardware mishandles sized leaves.
const fn modes(granule_lg2: u8) -> [Config; 7] {
    let default_sizes = SizeSet((1 | 1 << 9 | 1 << 18 | 1 << 27 | 1 << 36) << granule_lg2);
    [
        Config { name: "mode 3", start_level: 2, sizes: SizeSet::ALL },
        Config { name: "mode 3, default sizes", start_level: 2, sizes: default_sizes },
        Config { name: "mode 1", start_level: 0, sizes: SizeSet::ALL },
        Config { name: "mode 2", start_level: 1, sizes: SizeSet::ALL },
        Config { name: "mode 4", start_level: 3, sizes: SizeSet::ALL },
        Config { name: "mode 5", start_level: 4, sizes: SizeSet::ALL },
        Config { name: "mode 6", start_level: 5, sizes: SizeSet::ALL },
    ]
}

impl<const GRANULE_LG2: u8, const FORCE_COHERENT: bool> Format for AmdGranule<GRANULE_LG2, FORCE_COHERENT> {
    const NAME: &'static str = match (GRANULE_LG2, FORCE_COHERENT) {
        (12, false) => "amdv1",
        (12, true) => "amdv1-coherent",
        _ => "amdv1-2k",
    };
    const GRANULE_LG2: u8 = GRANULE_LG2;
    const INDEX_LG2: u8 = 9;
    const START_LEVEL: u8 = 2;
    const MAX_LEVEL: u8 = 5;
    const INPUT_LG2: u8 = 64;
    const OUTPUT_LG2: u8 = 52 - Self::SHIFT;
    const SIZES: SizeSet = SizeSet((((1 << (Self::LARGEST_LG2 + 1)) - 1) & !((1 << GRANULE_LG2) - 1)) & !BROKEN_512G);
    const PERMS: PermSet = PermSet::ALL;
    const DIRTY: u64 = DIRTY;
    const CONFIGS: &'static [Config] = &modes(GRANULE_LG2);
    const HITLESS: Hitless = Hitless::Yes(
        "48882 section 2.2.3: an entry is read by one 8-byte access, and both values translate alike; no break-before-make is asked for",
    );

    #[inline(always)]
    fn decode(entry: u64, level: u8) -> Entry {
        if entry & PRESENT == 0 {
            return Entry::Absent;
        }
        let next = (entry & NEXT_LEVEL) >> NEXT_LEVEL_SHIFT;
        if level != 0 && next != 0 && next != SIZED_LEAF {
            // A table one level down; skipping levels is legal in the specification and never written here.
            return if next == u64::from(level) { Entry::Table(Oa::new(Self::address(entry))) } else { Entry::Absent };
        }
        let perm = Perm::of(entry & READ != 0, entry & WRITE != 0);
        let dirty = entry & DIRTY != 0;
        let item = Self::item_lg2(level);
        if next == SIZED_LEAF {
            let size = Self::SIZED_MIN_LG2 + ((entry & ADDRESS) >> ADDRESS_SHIFT).trailing_ones() as u8;
            if size < item || size >= item + Self::INDEX_LG2 || size > Self::LARGEST_LG2 {
                return Entry::Absent;
            }
            let oa = Oa::new(Self::address(entry)).align_down_to(size);
            return Entry::Leaf { size: Lg2(size), oa, perm, dirty };
        }
        if level > 4 {
            return Entry::Absent;
        }
        Entry::Leaf { size: Lg2(item), oa: Oa::new(Self::address(entry)).align_down_to(item), perm, dirty }
    }

    #[inline(always)]
    fn leaf(level: u8, size: Lg2, oa: Oa, perm: Perm) -> u64 {
        let coherent = if FORCE_COHERENT { COHERENT } else { 0 };
        let base = PRESENT | coherent | perm_bits(perm) | oa.get() << Self::SHIFT;
        if size.0 == Self::item_lg2(level) {
            return base;
        }
        let encoded_size = (1u64 << (size.0 - 1 + Self::SHIFT)) - (1 << ADDRESS_SHIFT);
        base | encoded_size | SIZED_LEAF << NEXT_LEVEL_SHIFT
    }

    #[inline(always)]
    fn table(level: u8, oa: Oa) -> u64 {
        PRESENT | perm_bits(Perm::RW) | oa.get() << Self::SHIFT | u64::from(level) << NEXT_LEVEL_SHIFT
    }

    #[inline(always)]
    fn step(size: Lg2) -> u64 {
        size.bytes() << Self::SHIFT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const M1: u8 = 20;
    const M4: u8 = 22;
    const M512: u8 = 29;
    const G2: u8 = 31;

    /// Typed from the specification's encoding: level, size, output address, value.
    const LEAVES: [(u8, u8, u64, u64); 11] = [
        (0, 12, 0x1000_0000, 0x6000_0000_1000_0001),
        (0, 13, 0x1000_0000, 0x6000_0000_1000_0e01),
        (0, 14, 0x1000_0000, 0x6000_0000_1000_1e01),
        (0, 15, 0x1000_0000, 0x6000_0000_1000_3e01),
        (0, 16, 0x1000_0000, 0x6000_0000_1000_7e01),
        (0, M1, 0x1000_0000, 0x6000_0000_1007_fe01),
        (1, 21, 0x1000_0000, 0x6000_0000_1000_0001),
        (1, M4, 0x1000_0000, 0x6000_0000_101f_fe01),
        (1, M512, 0x4000_0000, 0x6000_0000_4fff_fe01),
        (2, 30, 0x4000_0000, 0x6000_0000_4000_0001),
        (2, G2, 0x8000_0000, 0x6000_0000_bfff_fe01),
    ];

    #[test]
    fn golden_leaves() {
        for (level, size, oa, value) in LEAVES {
            let (size, oa) = (Lg2(size), Oa::new(oa));
            assert_eq!(AmdV1::leaf(level, size, oa, Perm::RW), value, "level {level} size {size}");
            assert_eq!(AmdV1::level_of(size), level);
            assert_eq!(AmdV1::decode(value, level), Entry::Leaf { size, oa, perm: Perm::RW, dirty: false });
            assert_eq!(AmdV1::decode(value | 1 << 6, level), Entry::Leaf { size, oa, perm: Perm::RW, dirty: true });
        }
    }

    /// The same for the test format: an output address stands one bit higher, and half a page can be told from the other.
    const LEAVES_2K: [(u8, u8, u64, u64); 9] = [
        (0, 11, 0x1000_0000, 0x6000_0000_2000_0001),
        (0, 11, 0x1000_0800, 0x6000_0000_2000_1001),
        (0, 12, 0x1000_0000, 0x6000_0000_2000_0e01),
        (0, 12, 0x1000_1000, 0x6000_0000_2000_2e01),
        (0, 13, 0x1000_0000, 0x6000_0000_2000_1e01),
        (0, 19, 0x1000_0000, 0x6000_0000_2007_fe01),
        (1, M1, 0x1000_0000, 0x6000_0000_2000_0001),
        (1, 21, 0x1000_0000, 0x6000_0000_201f_fe01),
        (2, 30, 0x4000_0000, 0x6000_0000_bfff_fe01),
    ];

    #[test]
    fn golden_leaves_of_half_pages() {
        for (level, size, oa, value) in LEAVES_2K {
            let (size, oa) = (Lg2(size), Oa::new(oa));
            assert_eq!(AmdV1K2::leaf(level, size, oa, Perm::RW), value, "level {level} size {size}");
            assert_eq!(AmdV1K2::level_of(size), level);
            assert_eq!(AmdV1K2::decode(value, level), Entry::Leaf { size, oa, perm: Perm::RW, dirty: false });
        }
        let table = Oa::new(0x1234_5000);
        assert_eq!(AmdV1K2::table(1, table), 0x6000_0000_2468_a201);
        assert_eq!(AmdV1K2::decode(0x6000_0000_2468_a201, 1), Entry::Table(table));
        for lg2 in 0..64 {
            assert_eq!(AmdV1K2::SIZES.has(Lg2(lg2)), (11..=50).contains(&lg2) && lg2 != 39, "2^{lg2}");
        }
    }

    #[test]
    fn golden_tables() {
        let oa = Oa::new(0x1234_5000);
        assert_eq!(AmdV1::table(1, oa), 0x6000_0000_1234_5201);
        assert_eq!(AmdV1::table(2, oa), 0x6000_0000_1234_5401);
        assert_eq!(AmdV1::decode(0x6000_0000_1234_5401, 2), Entry::Table(oa));
    }

    #[test]
    fn golden_coherent_leaves() {
        let oa = Oa::new(0x1000_0000);
        assert_eq!(AmdV1Coherent::leaf(0, Lg2::K4, oa, Perm::RW), 0x7000_0000_1000_0001);
        assert_eq!(AmdV1Coherent::leaf(0, Lg2(16), oa, Perm::READ), 0x3000_0000_1000_7e01);
        assert_eq!(AmdV1Coherent::table(1, oa), AmdV1::table(1, oa), "FC is a leaf's");
        let leaf = Entry::Leaf { size: Lg2::K4, oa, perm: Perm::RW, dirty: false };
        assert_eq!(AmdV1::decode(0x7000_0000_1000_0001, 0), leaf, "a plain walk takes it as it is");
    }

    #[test]
    fn what_hardware_faults_on() {
        assert_eq!(AmdV1::decode(0x6000_0000_1000_0000, 0), Entry::Absent, "present bit clear");
        assert_eq!(AmdV1::decode(0x6000_0000_1000_0001, 5), Entry::Absent, "level 5 holds no leaf");
        assert_eq!(AmdV1::decode(0x6000_0000_1007_fe01, 1), Entry::Absent, "1 MiB does not fit level 1");
        assert_eq!(AmdV1::decode(0x6000_0000_1234_5401, 1), Entry::Absent, "next level above the entry's own");
    }

    #[test]
    fn permissions_and_sizes() {
        assert_eq!(AmdV1::leaf(0, Lg2::K4, Oa::new(0x1000), Perm::READ) >> 61, 1);
        assert_eq!(AmdV1::leaf(0, Lg2::K4, Oa::new(0x1000), Perm::WRITE) >> 61, 2);
        for lg2 in 0..64 {
            assert_eq!(AmdV1::SIZES.has(Lg2(lg2)), (12..=51).contains(&lg2) && lg2 != 39, "2^{lg2}");
        }
    }
}
