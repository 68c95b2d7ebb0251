//! Translations that a DMA context keeps, and how it learns which of them to forget (D-2).
//!
//! - *IOTLB*: one context's cached translations. Nobody else looks at it.
//! - *walk cache*: one context's cached tables, for the walk after a miss ([`Walks`]). Nobody else looks at it either.
//! - *log*: the spans that were cleared in a domain's table. A writer appends to it, every context reads it for itself.
//! - *view*: both caches with how far the log has been applied to them, and the one way into a guard: nothing is used that was logged before.
//!
//! The writer's order is clear, log, grace, release. With it no translation, cached or not, reaches a page that was released (I-4). What is
//! here is all that the promise rests on besides the guards, and builds under loom, whose tests try every interleaving of it.

mod cache;
mod log;
mod sys;
mod view;
mod walks;

pub use cache::{Hit, Iotlb, IotlbStats};
pub use log::{Log, Missed};
pub use view::{Identity, Logged, Source, View};
pub use walks::Walks;
