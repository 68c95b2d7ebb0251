//! The contract between the algorithm and a hardware format: how an entry is read, how leaves and table pointers are written.

use addr::{Iova, Lg2, Oa, SizeSet};
use core::fmt;

/// What a device may do through a leaf.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Perm(u8);

impl Perm {
    /// No access.
    pub const NONE: Self = Self(0);
    /// The device may read.
    pub const READ: Self = Self(1);
    /// The device may write.
    pub const WRITE: Self = Self(2);
    /// Both.
    pub const RW: Self = Self(3);

    /// From the two answers.
    #[inline]
    pub const fn of(read: bool, write: bool) -> Self {
        Self(read as u8 | (write as u8) << 1)
    }

    /// Whether everything in `wanted` is allowed.
    #[inline]
    pub const fn allows(self, wanted: Self) -> bool {
        self.0 & wanted.0 == wanted.0
    }

    /// What both allow.
    #[inline]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Bit 0 read, bit 1 write.
    #[inline]
    pub const fn bits(self) -> u8 {
        self.0
    }
}

impl fmt::Debug for Perm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(["none", "r", "w", "rw"][usize::from(self.0 & 3)])
    }
}

/// An entry, decoded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Entry {
    /// No translation; a device's access faults here.
    Absent,
    /// Points to a table one level down.
    Table(Oa),
    /// Translates.
    Leaf {
        /// Size of the whole leaf, which may fill several slots.
        size: Lg2,
        /// Output address of the leaf's first byte.
        oa: Oa,
        /// What it allows.
        perm: Perm,
        /// Whether this slot's dirty bit is set.
        dirty: bool,
    },
}

/// Whether hardware of this format may walk while a live leaf is replaced by a table, or the reverse.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hitless {
    /// Allowed; the string says where that is written.
    Yes(&'static str),
    /// The entry must be taken out and invalidated first (break-before-make).
    BreakFirst(&'static str),
}

/// A page-table format of some hardware. Functions are pure; nothing here touches memory.
pub trait Format: Copy + Send + Sync + 'static {
    /// Name on the command line and in reports.
    const NAME: &'static str;
    /// Size of the smallest leaf.
    const GRANULE_LG2: u8;
    /// Entries per table.
    const INDEX_LG2: u8;
    /// Level of the top table of a new tree.
    const START_LEVEL: u8;
    /// Highest level that a tree can grow to.
    const MAX_LEVEL: u8;
    /// Width of an input address at the highest level.
    const INPUT_LG2: u8;
    /// Width of an output address.
    const OUTPUT_LG2: u8;
    /// Every leaf size, multi-slot ones included.
    const SIZES: SizeSet;
    /// The dirty bit of a leaf; 0 when the format has none.
    const DIRTY: u64;
    /// Whether a leaf may be cut and merged under a walking device.
    const HITLESS: Hitless;

    /// Reads an entry found at `level`. Reserved or impossible encodings are `Absent`: hardware faults on them.
    fn decode(entry: u64, level: u8) -> Entry;
    /// The value of a leaf at `level`. `oa` is a multiple of `size`, which is one of the level's sizes.
    fn leaf(level: u8, size: Lg2, oa: Oa, perm: Perm) -> u64;
    /// The value of a pointer, at `level`, to the table at `oa`.
    fn table(level: u8, oa: Oa) -> u64;

    /// Logarithm of what one slot of a table at `level` covers.
    #[inline(always)]
    fn item_lg2(level: u8) -> u8 {
        Self::GRANULE_LG2 + Self::INDEX_LG2 * level
    }

    /// The level whose tables hold leaves of `size`.
    #[inline(always)]
    fn level_of(size: Lg2) -> u8 {
        (size.0 - Self::GRANULE_LG2) / Self::INDEX_LG2
    }

    /// Which slot of a table at `level` answers for `iova`.
    #[inline(always)]
    fn slot(iova: Iova, level: u8) -> usize {
        ((iova.get() >> Self::item_lg2(level)) & ((1 << Self::INDEX_LG2) - 1)) as usize
    }
}
