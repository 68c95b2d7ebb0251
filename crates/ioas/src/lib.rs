//! IO address spaces: which IOVA stands for which page, and the leaves that say so in every attached domain.
//!
//! - *IOAS*: one IO address space ([`Ioas`]). Any number of domains show it to devices.
//! - *area*: a span of IOVA that stands for a stretch of one backing, with one permission ([`Area`]). It says who is where.
//! - *leaf*: what a domain's page table says. Leaves follow the areas, and the state of each page as the IOAS's rule reads it ([`LeafRule`]):
//!   a page may belong to an area and have no leaf.
//! - *pages*: for one backing, every area of every IOAS that lies over it ([`Pages`]). Revocation and conversion come from here.
//! - *source*: the pages that one map call brought in, with every copy of it: pinned while somebody uses them, and paid for once ([`Source`]).
//! - *accessor*: software that uses an IOAS as a device does, and can keep pages in place ([`Accessor`], [`Pin`]).
//! - *seat*: a domain's place in an IOAS.
//! - *edit*: the tables a change may need and what it has to flush, per domain ([`Edit`]).
//!
//! Locks are taken in this order (I-12), asserted in debug builds: an IOAS's domains (read by map, unmap, copy and access; written by attach,
//! detach and options), its area tree, a source, the span lock of the pages. Below them only short leaf locks: the list of areas over a backing, an
//! area's list of seats. Whoever comes from the pages' side takes the span lock alone.

mod access;
mod accessor;
mod area;
mod attach;
mod copy;
mod dirty;
mod edit;
mod error;
mod few;
mod holds;
mod ioas;
mod listing;
mod map;
mod options;
mod pages;
mod placement;
mod rule;
mod source;
mod split;
mod tables;
mod unmap;

pub use accessor::{Accessor, AreaLocks, Pin, Unmapped};
pub use area::{Area, AreaState};
pub use edit::Edit;
pub use error::Error;
pub use ioas::Ioas;
pub use pages::Pages;
pub use placement::{Place, Reservation};
pub use rule::{LeafRule, MapAll, SharedOnly};
pub use source::{Charge, Source};
