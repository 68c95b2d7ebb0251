//! The list of formats that a program can choose from while it runs, and what it can ask about one by its name.
//!
//! A format is one file that implements [`Format`] and one line in `with_formats`; everything else here and in `any.rs` follows. The toy
//! format is not on the list: its tables have another size than an IOMMU's arena.

mod amdv1;
mod armv8;
mod riscv;
mod toy;
mod vtdss;
mod x86_64;

pub use amdv1::{AmdGranule, AmdV1, AmdV1Coherent, AmdV1K2};
pub use armv8::Armv8S2;
pub use riscv::RiscV;
pub use toy::{Toy, ToyBreaking, ToyOf};
pub use vtdss::VtdSs;
pub use x86_64::X86_64;

use crate::{Config, Entry, Format, Hitless, PermSet};
use addr::{Iova, Lg2, Oa, SizeSet, Span};
use alloc::boxed::Box;
use core::fmt;
use core::str::FromStr;
use thiserror::Error;

/// Hands the list to another macro, in front of whatever else that takes.
macro_rules! with_formats {
    ($callback:ident!($($args:tt)*)) => {
        $callback! {
            [
                /// AMD IOMMU v1 host tables, [`AmdV1`](crate::AmdV1).
                AmdV1: crate::AmdV1,
                /// The test format of mock devices, with pages of 2 KiB, [`AmdV1K2`](crate::AmdV1K2).
                AmdV1K2: crate::AmdV1K2,
                /// VT-d second stage with 3 levels, 39 bits, [`VtdSs`](crate::VtdSs).
                VtdSs3: crate::VtdSs<3>,
                /// VT-d second stage with 4 levels, 48 bits.
                VtdSs4: crate::VtdSs<4>,
                /// VT-d second stage with 5 levels, 57 bits.
                VtdSs5: crate::VtdSs<5>,
                /// x86_64 with 4 levels, 47 bits: AMD's guest tables and VT-d first stage, [`X86_64`](crate::X86_64).
                X86Levels4: crate::X86_64<4>,
                /// x86_64 with 5 levels, 56 bits.
                X86Levels5: crate::X86_64<5>,
                /// RISC-V Sv39, 38 bits, [`RiscV`](crate::RiscV).
                Sv39: crate::RiscV<3>,
                /// RISC-V Sv48, 47 bits.
                Sv48: crate::RiscV<4>,
                /// RISC-V Sv57, 56 bits.
                Sv57: crate::RiscV<5>,
                /// Armv8 stage 2, 48 bits, for hardware that needs break-before-make, [`Armv8S2`](crate::Armv8S2).
                Armv8S2: crate::Armv8S2<4, false>,
                /// Armv8 stage 2, 48 bits, for hardware with BBML 2.
                Armv8S2Bbml2: crate::Armv8S2<4, true>,
                /// Armv8 stage 2, 39 bits, for hardware that needs break-before-make.
                Armv8S2Bits39: crate::Armv8S2<3, false>,
            ]
            $($args)*
        }
    };
}
pub(crate) use with_formats;

macro_rules! define_kind {
    ([$($(#[$doc:meta])* $kind:ident: $format:ty,)+]) => {
        /// A format, chosen while the program runs.
        ///
        /// ```
        /// use lockstep_pt::FormatKind;
        /// let format: FormatKind = "amdv1".parse()?;
        /// assert_eq!(format, FormatKind::AmdV1);
        /// assert!("amdv9".parse::<FormatKind>().unwrap_err().to_string().contains("amdv1-2k"));
        /// # Ok::<_, lockstep_pt::UnknownFormat>(())
        /// ```
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[non_exhaustive]
        pub enum FormatKind {
            $($(#[$doc])* $kind,)+
        }

        impl FormatKind {
            /// Every format there is.
            pub const ALL: &'static [Self] = &[$(Self::$kind,)+];
        }

        // What is wrong with a format on the list does not compile, used or not.
        $(const _: () = crate::format::check::<$format>();)+
    };
}
with_formats!(define_kind!());

/// Evaluates an expression about the format type that a kind stands for.
macro_rules! format_of {
    ([$($(#[$doc:meta])* $kind:ident: $format:ty,)+] $self:ident, $f:ident => $body:expr) => {
        match $self {
            $(FormatKind::$kind => {
                type $f = $format;
                $body
            })+
        }
    };
}

/// Code over a format type, for [`FormatKind::visit`].
pub trait FormatVisitor {
    /// What it answers.
    type Output;

    /// Runs with the type that the kind stands for.
    fn visit<F: Format>(self) -> Self::Output;
}

impl FormatKind {
    /// Runs code that is compiled for each format with that of this kind.
    ///
    /// ```
    /// use lockstep_pt::{Format, FormatKind, FormatVisitor};
    /// struct Configurations;
    /// impl FormatVisitor for Configurations {
    ///     type Output = usize;
    ///     fn visit<F: Format>(self) -> usize {
    ///         F::CONFIGS.len()
    ///     }
    /// }
    /// assert_eq!(FormatKind::Sv39.visit(Configurations), 2);
    /// ```
    pub fn visit<V: FormatVisitor>(self, visitor: V) -> V::Output {
        with_formats!(format_of!(self, F => visitor.visit::<F>()))
    }

    /// Its name on the command line and in reports.
    pub fn name(self) -> &'static str {
        with_formats!(format_of!(self, F => F::NAME))
    }

    /// Every leaf size.
    #[inline]
    pub fn sizes(self) -> SizeSet {
        with_formats!(format_of!(self, F => F::SIZES))
    }

    /// Size of the smallest leaf.
    #[inline]
    pub fn granule(self) -> Lg2 {
        Lg2(with_formats!(format_of!(self, F => F::GRANULE_LG2)))
    }

    /// Entries per table, as a logarithm.
    #[inline]
    pub fn index_lg2(self) -> u8 {
        with_formats!(format_of!(self, F => F::INDEX_LG2))
    }

    /// Level of the top table of a new tree.
    pub fn start_level(self) -> u8 {
        with_formats!(format_of!(self, F => F::START_LEVEL))
    }

    /// Highest level that a tree can grow to.
    #[inline]
    pub fn max_level(self) -> u8 {
        with_formats!(format_of!(self, F => F::MAX_LEVEL))
    }

    /// Width of an output address.
    pub fn output_lg2(self) -> u8 {
        with_formats!(format_of!(self, F => F::OUTPUT_LG2))
    }

    /// The permissions that a leaf can say; mapping others is refused.
    pub fn perms(self) -> PermSet {
        with_formats!(format_of!(self, F => F::PERMS))
    }

    /// The configurations in which hardware can be told to use it.
    pub fn configs(self) -> &'static [Config] {
        with_formats!(format_of!(self, F => F::CONFIGS))
    }

    /// The dirty bit of a leaf; 0 when the format has none.
    pub fn dirty_bit(self) -> u64 {
        with_formats!(format_of!(self, F => F::DIRTY))
    }

    /// Whether a leaf may be cut and merged under a walking device.
    pub fn hitless(self) -> Hitless {
        with_formats!(format_of!(self, F => F::HITLESS))
    }

    /// Everything that it can translate.
    pub fn aperture(self) -> Span<Iova> {
        with_formats!(format_of!(self, F => F::aperture()))
    }

    /// Reads an entry found at `level`; see [`Format::decode`].
    #[inline]
    pub fn decode(self, entry: u64, level: u8) -> Entry {
        with_formats!(format_of!(self, F => F::decode(entry, level)))
    }

    /// Logarithm of what one slot of a table at `level` covers. One level above the highest is allowed.
    #[inline]
    pub fn item_lg2(self, level: u8) -> u8 {
        with_formats!(format_of!(self, F => F::item_lg2(level)))
    }

    /// The level whose tables hold leaves of `size`.
    #[inline]
    pub fn level_of(self, size: Lg2) -> u8 {
        with_formats!(format_of!(self, F => F::level_of(size)))
    }

    /// Which slot of a table at `level` answers for `iova`.
    #[inline]
    pub fn slot(self, iova: Iova, level: u8) -> usize {
        with_formats!(format_of!(self, F => F::slot(iova, level)))
    }

    /// The value of a leaf; see [`Format::leaf`].
    pub fn leaf(self, level: u8, size: Lg2, oa: Oa, perm: crate::Perm) -> u64 {
        with_formats!(format_of!(self, F => F::leaf(level, size, oa, perm)))
    }
}

/// `Address::align_down` without the check for 64 bits, which no leaf reaches.
trait AlignDown {
    fn align_down_to(self, lg2: u8) -> Self;
}

impl AlignDown for Oa {
    #[inline(always)]
    fn align_down_to(self, lg2: u8) -> Self {
        Self::new(self.get() >> lg2 << lg2)
    }
}

impl fmt::Display for FormatKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that no format has.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("no page-table format is called '{name}'; there are {}", Names)]
pub struct UnknownFormat {
    /// What was asked for.
    pub name: Box<str>,
}

struct Names;

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, kind) in FormatKind::ALL.iter().enumerate() {
            write!(f, "{}{kind}", if index == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

impl FromStr for FormatKind {
    type Err = UnknownFormat;

    fn from_str(name: &str) -> Result<Self, UnknownFormat> {
        Self::ALL.iter().copied().find(|kind| kind.name() == name).ok_or_else(|| UnknownFormat { name: name.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_distinct_and_lead_back() {
        for kind in FormatKind::ALL {
            assert_eq!(kind.name().parse(), Ok(*kind));
        }
        assert!("toy".parse::<FormatKind>().is_err());
    }

    #[test]
    fn facts_hang_together() {
        for kind in FormatKind::ALL.iter().copied() {
            assert_eq!(kind.sizes().smallest(), Some(kind.granule()), "{kind}");
            assert_eq!(kind.index_lg2(), 9, "{kind}: an IOMMU's arena has tables of 512 entries");
            for size in (0..64).map(Lg2).filter(|size| kind.sizes().has(*size)) {
                let level = kind.level_of(size);
                assert!(level <= kind.max_level() && kind.item_lg2(level) <= size.0, "{kind}: {size}");
                let oa = Oa::new(1 << (kind.output_lg2() - 1));
                let decoded = kind.decode(kind.leaf(level, size, oa, crate::Perm::RW), level);
                assert_eq!(decoded, Entry::Leaf { size, oa, perm: crate::Perm::RW, dirty: false }, "{kind}: {size}");
            }
        }
    }
}
