//! AMD IOMMU v1 host page tables. Source: AMD I/O Virtualization Technology (IOMMU) Specification, 48882, section 2.2.3, tables 14 and 15.
//!
//! The specification's mode (1..=6) counts tables from the bottom: mode m is our level m - 1. An entry's Next Level field is the mode of
//! the table that it points to, which is our level of the entry itself. Next Level 0 is a leaf of the level's default size, Next Level 7 a
//! leaf whose size is encoded in the address: a run of k ones from bit 12 and then a zero make 2^(13+k) bytes, and every slot that the
//! leaf covers holds the same value. 512 GiB leaves are left out: hardware mishandles them.

use crate::{Entry, Format, Hitless, Perm};
use addr::{Lg2, Oa, SizeSet};

/// The AMDv1 format; see the module's head.
#[derive(Clone, Copy, Debug)]
pub struct AmdV1;

const PRESENT: u64 = 1;
const DIRTY: u64 = 1 << 6;
const NEXT_LEVEL_SHIFT: u32 = 9;
const NEXT_LEVEL: u64 = 7 << NEXT_LEVEL_SHIFT;
const SIZED_LEAF: u64 = 7;
const ADDRESS: u64 = (1 << 52) - (1 << 12);
const READ: u64 = 1 << 61;
const WRITE: u64 = 1 << 62;
/// Smallest and largest size that Next Level 7 can say.
const SIZED_MIN_LG2: u8 = 13;
const LARGEST_LG2: u8 = 51;
const BROKEN_512G: u64 = 1 << 39;

const fn perm_bits(perm: Perm) -> u64 {
    (if perm.allows(Perm::READ) { READ } else { 0 }) | (if perm.allows(Perm::WRITE) { WRITE } else { 0 })
}

impl Format for AmdV1 {
    const NAME: &'static str = "amdv1";
    const GRANULE_LG2: u8 = 12;
    const INDEX_LG2: u8 = 9;
    const START_LEVEL: u8 = 2;
    const MAX_LEVEL: u8 = 5;
    const INPUT_LG2: u8 = 64;
    const OUTPUT_LG2: u8 = 52;
    const SIZES: SizeSet = SizeSet((((1 << (LARGEST_LG2 + 1)) - 1) & !((1 << 12) - 1)) & !BROKEN_512G);
    const DIRTY: u64 = DIRTY;
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
            return if next == u64::from(level) { Entry::Table(Oa::new(entry & ADDRESS)) } else { Entry::Absent };
        }
        let perm = Perm::of(entry & READ != 0, entry & WRITE != 0);
        let dirty = entry & DIRTY != 0;
        let item = Self::item_lg2(level);
        if next == SIZED_LEAF {
            let size = SIZED_MIN_LG2 + ((entry & ADDRESS) >> 12).trailing_ones() as u8;
            if size < item || size >= item + Self::INDEX_LG2 || size > LARGEST_LG2 {
                return Entry::Absent;
            }
            let oa = Oa::new(entry & ADDRESS).align_down_to(size);
            return Entry::Leaf { size: Lg2(size), oa, perm, dirty };
        }
        if level > 4 {
            return Entry::Absent;
        }
        Entry::Leaf { size: Lg2(item), oa: Oa::new(entry & ADDRESS).align_down_to(item), perm, dirty }
    }

    #[inline(always)]
    fn leaf(level: u8, size: Lg2, oa: Oa, perm: Perm) -> u64 {
        let base = PRESENT | perm_bits(perm) | oa.get();
        if size.0 == Self::item_lg2(level) {
            return base;
        }
        let encoded_size = (1u64 << (size.0 - 1)) - (1 << 12);
        base | encoded_size | SIZED_LEAF << NEXT_LEVEL_SHIFT
    }

    #[inline(always)]
    fn table(level: u8, oa: Oa) -> u64 {
        PRESENT | perm_bits(Perm::RW) | oa.get() | u64::from(level) << NEXT_LEVEL_SHIFT
    }
}

/// `Address::align_down` without the check for 64 bits, which no leaf reaches.
trait AlignDown {
    fn align_down_to(self, lg2: u8) -> Self;
}

impl AlignDown for Oa {
    #[inline(always)]
    fn align_down_to(self, lg2: u8) -> Self {
        Oa::new(self.get() >> lg2 << lg2)
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

    #[test]
    fn golden_tables() {
        let oa = Oa::new(0x1234_5000);
        assert_eq!(AmdV1::table(1, oa), 0x6000_0000_1234_5201);
        assert_eq!(AmdV1::table(2, oa), 0x6000_0000_1234_5401);
        assert_eq!(AmdV1::decode(0x6000_0000_1234_5401, 2), Entry::Table(oa));
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
