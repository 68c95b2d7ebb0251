//! Structures of the uAPI, as C has them: same names, same sizes, same offsets (checked here by assertions, and against the C header by
//! tests/header.rs). Each lists its fields, so that a trace, the coverage table and the header check need nothing else.

pub mod kernel;
pub mod ours;
#[cfg(feature = "test-ops")]
pub mod test;
pub mod vfio;

pub use kernel::*;

/// How a field is shown.
#[derive(Clone, Copy, Debug)]
pub enum Show {
    /// An address, a length, a bit pattern.
    Hex,
    /// A count or an id.
    Dec,
    /// A descriptor: may be negative.
    Fd,
    /// Bits with names.
    Flags(&'static [(u64, &'static str)]),
    /// One of some values with names.
    Enum(&'static [(u64, &'static str)]),
    /// Shown only when it is not zero.
    Reserved,
}

/// One field of a structure.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Its name in C.
    pub name: &'static str,
    /// Where it begins.
    pub offset: usize,
    /// Bytes.
    pub size: usize,
    /// How it is shown.
    pub show: Show,
}

impl Field {
    /// Its value in a structure's bytes; what lies behind their end reads as zero.
    pub fn value(&self, bytes: &[u8]) -> u64 {
        let mut value = [0; 8];
        let own = bytes.get(self.offset..).unwrap_or_default();
        let len = own.len().min(self.size).min(8);
        value[..len].copy_from_slice(&own[..len]);
        u64::from_le_bytes(value)
    }
}

/// A structure of the uAPI.
pub trait Struct: zerocopy::FromBytes + zerocopy::IntoBytes + zerocopy::KnownLayout + zerocopy::Immutable + Copy + Default {
    /// Its name in C.
    const C_NAME: &'static str;
    /// Its fields, in order.
    const FIELDS: &'static [Field];
    /// Its size in bytes.
    const SIZE: usize = size_of::<Self>();
}

/// What is known about a structure, for whoever goes through all of them.
#[derive(Clone, Copy, Debug)]
pub struct Structure {
    /// Its name in C.
    pub name: &'static str,
    /// Its size in bytes.
    pub size: usize,
    /// Its fields, in order.
    pub fields: &'static [Field],
}

/// Every structure of this crate: the kernel's, VFIO's, ours, and that of the test operations.
pub fn structures() -> impl Iterator<Item = &'static Structure> {
    #[cfg(feature = "test-ops")]
    let test = test::STRUCTURES;
    #[cfg(not(feature = "test-ops"))]
    let test: &[Structure] = &[];
    STRUCTURES.iter().chain(vfio::STRUCTURES).chain(ours::STRUCTURES).chain(test)
}

/// Declares structures: `Name = c_name (size in bytes) { field: type = how it is shown, }`.
#[macro_export]
macro_rules! uapi {
    ($($(#[$meta:meta])* $Name:ident = $c:ident ($size:literal) { $($(#[$fmeta:meta])* $field:ident: $ty:ty = $show:expr,)* })*) => {$(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::KnownLayout, zerocopy::Immutable)]
        #[repr(C)]
        pub struct $Name { $($(#[$fmeta])* #[expect(missing_docs, reason = "the name is the kernel's, the structure says what it is for")] pub $field: $ty,)* }

        impl $crate::uapi::Struct for $Name {
            const C_NAME: &'static str = stringify!($c);
            const FIELDS: &'static [$crate::uapi::Field] = &[$($crate::uapi::Field {
                name: $crate::uapi::c_field(stringify!($field)),
                offset: core::mem::offset_of!($Name, $field),
                size: core::mem::size_of::<$ty>(),
                show: { #[allow(unused_imports, reason = "most structures use only some of them")] use $crate::uapi::Show::*; $show },
            },)*];
        }
        const _: () = assert!(core::mem::size_of::<$Name>() == $size);
    )*
        /// Every structure that is declared here.
        #[allow(dead_code, unreachable_pub, reason = "not every user lists its structures, or is public")]
        pub const STRUCTURES: &[$crate::uapi::Structure] = &[$($crate::uapi::Structure {
            name: stringify!($c),
            size: core::mem::size_of::<$Name>(),
            fields: <$Name as $crate::uapi::Struct>::FIELDS,
        },)*];
    };
}

/// A field's name in C: without the mark that Rust needs before its own keywords.
#[doc(hidden)]
pub const fn c_field(name: &'static str) -> &'static str {
    match name.as_bytes() {
        [b'r', b'#', ..] => name.split_at(2).1,
        _ => name,
    }
}

/// The number of an ioctl of this family: no direction and no size in it.
pub const fn io(nr: u32) -> u32 {
    (b';' as u32) << 8 | nr
}
