//! One newtype per address space, so that an IOVA can never be used where an output address is meant.

use core::fmt;

/// An address, or an index, of one particular space.
pub trait Address: Copy + Ord + fmt::Debug + fmt::Display + 'static {
    /// The space's name in messages: "IOVA", "GPA".
    const SPACE: &'static str;
    /// From a bare number of this space's unit.
    fn new(value: u64) -> Self;
    /// The bare number.
    fn get(self) -> u64;

    /// `self + n`, or `None` past the end of the space.
    fn checked_add(self, n: u64) -> Option<Self> {
        self.get().checked_add(n).map(Self::new)
    }
    /// `self + n`; the caller has made sure that this stays inside the space.
    fn plus(self, n: u64) -> Self {
        debug_assert!(self.get().checked_add(n).is_some(), "{self} + {n:#x} wraps");
        Self::new(self.get().wrapping_add(n))
    }
    /// How far `self` is above `base`; the caller has made sure that it is not below.
    fn offset_from(self, base: Self) -> u64 {
        debug_assert!(self >= base, "{self} is below {base}");
        self.get().wrapping_sub(base.get())
    }
    /// Whether the low `lg2` bits are clear.
    fn is_aligned(self, lg2: u8) -> bool {
        lg2 >= 64 || self.get() & ((1 << lg2) - 1) == 0
    }
    /// With the low `lg2` bits cleared.
    fn align_down(self, lg2: u8) -> Self {
        Self::new(if lg2 >= 64 { 0 } else { self.get() >> lg2 << lg2 })
    }
}

macro_rules! address {
    ($($(#[$doc:meta])* $name:ident = $space:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// From a bare number.
            pub const fn new(value: u64) -> Self {
                Self(value)
            }
            /// The bare number.
            pub const fn get(self) -> u64 {
                self.0
            }
        }

        impl Address for $name {
            const SPACE: &'static str = $space;
            #[inline]
            fn new(value: u64) -> Self {
                Self(value)
            }
            #[inline]
            fn get(self) -> u64 {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($space, " {:#x}"), self.0)
            }
        }
    )*};
}

address! {
    /// IO virtual address, in bytes.
    Iova = "IOVA";
    /// Output address: a system physical address as an IO page table gives it, in bytes.
    Oa = "OA";
    /// Guest physical address, in bytes, without C-bit or shared bit.
    Gpa = "GPA";
    /// Address in a host process, in bytes.
    Hva = "HVA";
    /// Frame of a guest physical address, in 4 KiB units.
    Gfn = "GFN";
    /// Frame of an output address, in 4 KiB units.
    Pfn = "PFN";
    /// Index of a page inside one backing object, in 4 KiB units.
    Page = "page";
}

impl Gfn {
    /// First byte of the frame.
    pub const fn gpa(self) -> Gpa {
        Gpa(self.0 << crate::PAGE_LG2)
    }
}

impl Gpa {
    /// The frame that holds this address.
    pub const fn gfn(self) -> Gfn {
        Gfn(self.0 >> crate::PAGE_LG2)
    }
}

impl Pfn {
    /// First byte of the frame.
    pub const fn oa(self) -> Oa {
        Oa(self.0 << crate::PAGE_LG2)
    }
}

impl Oa {
    /// The frame that holds this address.
    pub const fn pfn(self) -> Pfn {
        Pfn(self.0 >> crate::PAGE_LG2)
    }
}

impl Page {
    /// Offset in bytes of the page's first byte.
    pub const fn bytes(self) -> u64 {
        self.0 << crate::PAGE_LG2
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;

    #[test]
    fn arithmetic_and_names() {
        assert_eq!(Iova::new(0x1000).plus(0x20).get(), 0x1020);
        assert_eq!(Iova::new(u64::MAX).checked_add(1), None);
        assert_eq!(Oa::new(0x12345).align_down(12), Oa::new(0x12000));
        assert!(Gpa::new(0x20_0000).is_aligned(21));
        assert!(!Gpa::new(0x20_1000).is_aligned(21));
        assert!(Gpa::new(0).is_aligned(64));
        assert_eq!(Gpa::new(0x3fff).gfn().gpa(), Gpa::new(0x3000));
        assert_eq!(format!("{:?} {}", Iova::new(16), Gfn::new(2)), "IOVA 0x10 0x2");
    }
}
