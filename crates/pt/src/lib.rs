//! IO page tables in the formats that hardware reads: one algorithm over a [`Format`] trait, readers that never wait, and edits that keep
//! every untouched translation in place.
//!
//! Words used here:
//!
//! - *table*: an array of entries, a power of two of them, in an [`Arena`]. *Level* 0 is the table of the smallest leaves.
//! - *entry*: 8 bytes of a table. It is absent, a *leaf* (an output address and a size) or points to a table one level down.
//! - *slot*: the place of an entry. A leaf larger than its level's item fills several slots: with one value (AMDv1 next-level 7, Svnapot),
//!   or each with an output address of its own (Arm's contiguous bit).
//! - *cut*: replace a large leaf by smaller ones that say the same. *Merge*: the reverse. Both are hitless: each slot changes by one store
//!   between two values that translate alike. Hardware that cannot take that ([`Hitless::BreakFirst`]) has the leaf *hidden* first: out of
//!   its sight, and still there for whoever edits.
//! - *retire*: take a table out of the tree. It is given back to the arena by [`Gather::finish`], after invalidation and grace.
//! - *region*: the IOVAs that a table serves: those that one slot of the table above covers. Walkers cache tables by it ([`Gather::tables`]).
//!
//! Who may do what (design D-3): the caller of `map`, `unmap` and `merge` holds the whole span that it passes. `cut` needs only the span
//! whose borders it makes; cuts of one leaf from several threads may race. `walk` takes no lock; its caller is inside a read guard.

#![no_std]

extern crate alloc;

mod any;
mod arena;
mod atomic;
mod cut;
mod dirty;
mod format;
mod formats;
mod gather;
mod hide;
mod map;
mod merge;
mod shed;
mod table;
mod unmap;
mod wide;

pub use any::AnyTable;
pub use arena::{Arena, NoTable, Stock};
pub use atomic::{AtomicU64, Ordering};
pub use format::{Config, Entry, Format, Hitless, Perm, PermSet};
pub use formats::{
    AmdGranule, AmdV1, AmdV1Coherent, AmdV1K2, Armv8S2, FormatKind, FormatVisitor, RiscV, Toy, ToyBreaking, ToyOf, UnknownFormat, VtdSs,
    X86_64,
};
pub use gather::Gather;
pub use map::MapError;
pub use table::{Leaf, Table, WalkEntry};
