//! How threads meet: read guards and their grace periods, locks over spans, lock ranks, fail points.
//!
//! - *guard*: what a reader holds while it uses translations. Entering is one exchange; nothing ever makes it wait (D-2, I-15).
//! - *slot*: one reader's place in the list that a writer looks through.
//! - *grace*: waiting until every guard that was open has been left. What was unlinked before it may be released after it (I-4).
//! - *span lock*: exclusion over a span of indices; disjoint spans do not meet (D-3).
//! - *rank*: a lock's place in the one order in which locks are taken (I-12).
//! - *step*: a place that may fail, counted, so that a test can fail the n-th. *Planted fault*: misbehaviour that a detector must see.
//!
//! - *shard*: a thread's own part of something that threads share.
//!
//! Without feature `std` only [`fail`], [`pause`] and [`shard`] are left; nothing in the first two ever fires, and the last has one part for all.

#![cfg_attr(not(feature = "std"), no_std)]

pub mod fail;
#[cfg(feature = "std")]
mod guards;
pub mod pause;
#[cfg(feature = "std")]
pub mod prim;
#[cfg(feature = "std")]
pub mod rank;
pub mod shard;
#[cfg(feature = "std")]
mod spanlock;
#[cfg(feature = "std")]
mod sys;

#[cfg(feature = "std")]
pub use guards::{Guard, Readers, Slot, Stall};
#[cfg(feature = "std")]
pub use rank::{Rank, RankGuard};
#[cfg(feature = "std")]
pub use spanlock::{NoRoom, SpanGuard, SpanLock};
