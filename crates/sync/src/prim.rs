//! The locks and atomics of the crates above: std's, and in a build with `--cfg shuttle` those of shuttle, which tries interleavings of whole conversions. Only what
//! a thread may hold, or must see in order, from one step of a transaction to another comes from here; process-wide tables stay std's, because shuttle's live
//! no longer than one run.

#[cfg(shuttle)]
pub use shuttle::sync::{Mutex, MutexGuard, RwLock, RwLockReadGuard, atomic};
#[cfg(not(shuttle))]
pub use std::sync::{Mutex, MutexGuard, RwLock, RwLockReadGuard, atomic};
