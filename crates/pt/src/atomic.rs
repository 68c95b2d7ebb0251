//! The atomics of this crate: loom's when its scheduler explores the interleavings, the processor's otherwise.

#[cfg(not(loom))]
pub(crate) use core::sync::atomic::AtomicU32;
#[cfg(not(loom))]
pub use core::sync::atomic::{AtomicU64, Ordering};
#[cfg(loom)]
pub(crate) use loom::sync::atomic::AtomicU32;
#[cfg(loom)]
pub use loom::sync::atomic::{AtomicU64, Ordering};
