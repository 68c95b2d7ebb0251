//! Typed addresses, closed spans and the trees that hold them.
//!
//! The words every other crate uses:
//!
//! - [`Iova`]: what a device puts on the bus.
//! - [`Gpa`], [`Gfn`]: what a guest calls its memory, in bytes and in 4 KiB frames.
//! - [`Oa`], [`Pfn`]: what an IO page table gives: a system physical address, and its 4 KiB frame.
//! - [`Hva`]: where a host process sees memory.
//! - [`Page`]: an index of 4 KiB pages inside one backing object.
//! - [`Span`]: a closed range `{start, last}`; the last address belongs to it, so the whole 64-bit space has a span.
//! - [`Lg2`]: a power of two by its logarithm; every name that ends in `_lg2` is one.
//! - [`SpanMap`]: spans that never overlap, each with a value. [`IntervalTree`]: spans that may.

#![no_std]

extern crate alloc;

mod addr;
mod avl;
mod lg2;
mod map;
mod span;
mod tree;

pub use addr::{Address, Gfn, Gpa, Hva, Iova, Oa, Page, Pfn};
pub use avl::OutOfMemory;
pub use lg2::{Lg2, SizeSet};
pub use map::{OverlapError, SpanMap};
pub use span::{Span, SpanError};
pub use tree::{Handle, IntervalTree};

/// Base-two logarithm of the smallest page: 4 KiB.
pub const PAGE_LG2: u8 = 12;
/// Bytes in the smallest page.
pub const PAGE_BYTES: u64 = 1 << PAGE_LG2;
