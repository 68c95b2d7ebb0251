//! The planted fault of merges, and the check of every [`Tree`] finding it. Alone in its process, which the fault is planted in.
#![cfg(not(loom))]

mod common;

use addr::{Iova, Lg2, Oa, SizeSet, Span};
use common::{Tree, arena};
use lockstep_pt::{AmdV1, Perm};
use std::panic::{AssertUnwindSafe, catch_unwind};

#[test]
fn a_merge_that_forgets_the_walkers_is_found() {
    let arena = arena::<AmdV1>(16);
    let mut tree = Tree::<AmdV1>::new(&arena);
    let whole = Span::block(Iova::new(0), 21);
    tree.map(whole, Oa::new(0), Perm::RW, SizeSet::only(Lg2::K4)).unwrap();
    assert!(tree.walk(whole.last()).is_some());
    let plant = sync::fail::plant("pt.merge_forgets_walkers", 0, 1);
    let merged = catch_unwind(AssertUnwindSafe(|| tree.merge(whole)));
    assert_eq!(plant.fired(), 1);
    let said = merged.expect_err("the merge named nothing, and nobody noticed");
    let said = said.downcast_ref::<String>().expect("a message");
    assert!(said.contains("went unnamed"), "{said}");
    assert_eq!(tree.table.walk(whole.last()).map(|leaf| leaf.span()), Some(whole), "the leaf itself is right");
}
