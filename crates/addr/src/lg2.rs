//! Powers of two by their logarithm, and sets of them.

use core::fmt;

/// A power of two, kept as its logarithm. `Lg2(12)` is 4 KiB.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lg2(pub u8);

impl Lg2 {
    /// 4 KiB.
    pub const K4: Self = Self(12);
    /// 2 MiB.
    pub const M2: Self = Self(21);
    /// 1 GiB.
    pub const G1: Self = Self(30);

    /// The power itself; 2^64 and above do not exist here.
    #[inline]
    pub const fn bytes(self) -> u64 {
        1 << self.0
    }
}

impl fmt::Display for Lg2 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        write!(f, "{} {}", 1u64 << (self.0 % 10), UNITS[usize::from(self.0 / 10).min(6)])
    }
}

impl fmt::Debug for Lg2 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A set of page sizes: bit `n` stands for `1 << n` bytes, as in the kernel's `pgsize_bitmap`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SizeSet(pub u64);

impl SizeSet {
    /// Every size.
    pub const ALL: Self = Self(u64::MAX);

    /// Only this one.
    #[inline]
    pub const fn only(size: Lg2) -> Self {
        Self(1 << size.0)
    }

    /// Both sizes and whatever else `other` has.
    #[inline]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Every size of this set that is at most `limit`.
    #[inline]
    pub const fn up_to(self, limit: Lg2) -> Self {
        Self(self.0 & (u64::MAX >> 63u32.saturating_sub(limit.0 as u32)))
    }

    /// Whether the set has this size.
    #[inline]
    pub const fn has(self, size: Lg2) -> bool {
        self.0 >> size.0 & 1 == 1
    }

    /// The largest size in the set.
    #[inline]
    pub const fn largest(self) -> Option<Lg2> {
        match self.0 {
            0 => None,
            bits => Some(Lg2(63 - bits.leading_zeros() as u8)),
        }
    }

    /// The smallest size in the set.
    #[inline]
    pub const fn smallest(self) -> Option<Lg2> {
        match self.0 {
            0 => None,
            bits => Some(Lg2(bits.trailing_zeros() as u8)),
        }
    }
}

const _: () = assert!(Lg2::M2.bytes() == 2 << 20 && Lg2::G1.bytes() == 1 << 30);
const _: () = assert!(matches!(SizeSet(0b1101).up_to(Lg2(2)).largest(), Some(Lg2(2))));
const _: () = assert!(SizeSet::ALL.up_to(Lg2(63)).0 == u64::MAX);
