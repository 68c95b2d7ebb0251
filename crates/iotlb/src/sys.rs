//! The few primitives that a loom run replaces by its own, so that the code under test is the code that ships. Otherwise they are what the crates around
//! use.

#[cfg(loom)]
pub(crate) use loom::sync::{
    Mutex,
    atomic::{AtomicU64, Ordering, fence},
};
#[cfg(not(loom))]
pub(crate) use sync::prim::{
    Mutex,
    atomic::{AtomicU64, Ordering, fence},
};
