//! Which leaves a page may have: the policy of an IOAS (D-7), asked for every run of pages of one state.

use addr::{Page, SizeSet, Span};
use backing::{Backing, PageState};
use std::fmt::Debug;

/// Says what may be mapped. Asked while the pages' span lock is held, also on paths that must not fail, so it must not take locks
/// of ranks above [`sync::Rank::Segment`], allocate, or panic.
pub trait LeafRule: Send + Sync + Debug {
    /// For `run`, pages that are all in `state`: how many from its start on get the same answer, and what that is: the leaf sizes that
    /// may be used, or `None` when no leaf may exist.
    ///
    /// A set should have 4 KiB in it, unless the pages are sure to lie in whole larger blocks of IOVA and output address alike.
    fn leaf(&self, backing: &Backing, run: Span<Page>, state: PageState) -> (Span<Page>, Option<SizeSet>);
}

/// Shared and private pages alike, in leaves of any size. Nothing protects private memory from the device but what checks behind the
/// table: the policy *keep*.
#[derive(Clone, Copy, Debug, Default)]
pub struct MapAll;

impl LeafRule for MapAll {
    fn leaf(&self, _: &Backing, run: Span<Page>, state: PageState) -> (Span<Page>, Option<SizeSet>) {
        (run, (state != PageState::Absent).then_some(SizeSet::ALL))
    }
}

/// Shared pages only: devices that the guest does not trust.
#[derive(Clone, Copy, Debug, Default)]
pub struct SharedOnly;

impl LeafRule for SharedOnly {
    fn leaf(&self, _: &Backing, run: Span<Page>, state: PageState) -> (Span<Page>, Option<SizeSet>) {
        (run, (state == PageState::Shared).then_some(SizeSet::ALL))
    }
}
