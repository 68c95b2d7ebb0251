//! I-15: with a writer stopped before any one of its stores, every reader finishes, and answers as before or as after. In a format that needs
//! break-before-make it may find nothing instead, while a leaf is cut or merged.
//!
//! Debug builds only: the pauses are not compiled into a release build.
#![cfg(all(debug_assertions, not(loom)))]

mod common;

use addr::{Iova, Oa, SizeSet, Span};
use common::{Tree, arena};
use lockstep_pt::{AmdV1, Format, FormatKind, FormatVisitor, Gather, Perm, Toy, ToyBreaking};
use std::cell::Cell;
use std::rc::Rc;

/// What each granule may answer while an edit is under way: before, after.
type Answers = Vec<(Iova, [Option<u64>; 2])>;

fn answers<F: Format>(tree: &Tree<F>, at: &[u64]) -> Vec<Option<u64>> {
    at.iter().map(|at| tree.table.walk(Iova::new(*at)).map(|leaf| leaf.oa_of(Iova::new(*at)).get())).collect()
}

/// Runs `edit` twice from the same start: once to learn the answers after it, once with readers at every pause. Answers how many pauses
/// there were.
fn stopped_everywhere<F: Format>(start: impl Fn(&mut Tree<F>), edit: impl Fn(&mut Tree<F>), at: &[u64]) -> u32 {
    let prepared = || {
        let arena = arena::<F>(2048);
        let mut tree = Tree::<F>::new(&arena);
        start(&mut tree);
        tree
    };
    let mut tree = prepared();
    let before = answers(&tree, at);
    edit(&mut tree);
    let after = answers(&tree, at);
    let allowed: Answers =
        at.iter().zip(before.iter().zip(&after)).map(|(at, (before, after))| (Iova::new(*at), [*before, *after])).collect();

    let mut tree = prepared();
    let stops = Rc::new(Cell::new(0));
    let reader = {
        let stops = Rc::clone(&stops);
        let table = Rc::clone(&tree.table);
        move || {
            stops.set(stops.get() + 1);
            for (at, allowed) in &allowed {
                let seen = table.walk(*at).map(|leaf| leaf.oa_of(*at).get());
                let hidden = seen.is_none() && !F::HITLESS.is_allowed();
                assert!(hidden || allowed.contains(&seen), "{at} answers {seen:x?} at stop {}, allowed {allowed:x?}", stops.get());
            }
        }
    };
    let guard = sync::pause::at_every_pause(reader);
    edit(&mut tree);
    drop(guard);
    stops.get()
}

const PAGE: u64 = 4096;
const BASE: u64 = 1 << 40;

fn span(start: u64, len: u64) -> Span<Iova> {
    Span::from_len(Iova::new(start), len).unwrap()
}

/// Every edit over 1024 granules, which are two tables of the lowest level.
fn every_edit<F: Format>() {
    let granule = 1u64 << F::GRANULE_LG2;
    let at: Vec<u64> = (0..1024).map(|index| index * granule + 8).collect();
    let whole = span(0, 1024 * granule);
    let all = |tree: &mut Tree<F>| tree.map(whole, Oa::new(BASE), Perm::RW, SizeSet::ALL).unwrap();
    let nothing = |_: &mut Tree<F>| {};
    let cut = |tree: &mut Tree<F>| tree.cut(span(5 * granule, granule), SizeSet::ALL);
    let merge = |tree: &mut Tree<F>| tree.merge(whole);
    let unmap = |tree: &mut Tree<F>| {
        tree.unmap(whole);
    };
    let after_cut = |tree: &mut Tree<F>| {
        all(tree);
        cut(tree);
    };
    // In the last place of the aperture: where a tree can grow, it has to.
    let far = |tree: &mut Tree<F>| {
        let last = Span::block(F::aperture().last(), F::GRANULE_LG2);
        tree.map(last, Oa::new(BASE), Perm::RW, SizeSet::ALL).unwrap();
    };
    let stops = [
        ("map", stopped_everywhere(nothing, all, &at)),
        ("unmap", stopped_everywhere(all, unmap, &at)),
        ("cut", stopped_everywhere(all, cut, &at)),
        ("merge", stopped_everywhere(after_cut, merge, &at)),
        ("top growth", stopped_everywhere(all, far, &at)),
    ];
    for (edit, stops) in stops {
        println!("{}: {edit}: readers finished at {stops} stops", F::NAME);
        assert!(stops >= 1, "{edit} never paused");
    }
}

#[test]
fn every_edit_in_every_format() {
    struct Visitor;
    impl FormatVisitor for Visitor {
        type Output = ();
        fn visit<F: Format>(self) {
            every_edit::<F>();
        }
    }
    for kind in FormatKind::ALL {
        kind.visit(Visitor);
    }
}

fn toy_edits<F: Format>() {
    let at: Vec<u64> = (0..16).map(|granule| granule << 11).collect();
    let all = |tree: &mut Tree<F>| tree.map(span(0, 1 << 15), Oa::new(BASE), Perm::RW, SizeSet::ALL).unwrap();
    let cut = |tree: &mut Tree<F>| tree.cut(span(3 << 11, 1 << 11), SizeSet::ALL);
    let stops = stopped_everywhere(|_| {}, all, &at) + stopped_everywhere(all, cut, &at);
    assert!(stops > 8, "{stops}");
}

#[test]
fn toy_every_edit() {
    toy_edits::<Toy>();
    toy_edits::<ToyBreaking>();
}

#[test]
fn gather_is_the_only_way_to_free() {
    let arena = arena::<AmdV1>(64);
    let mut tree = Tree::<AmdV1>::new(&arena);
    tree.map(span(0, PAGE), Oa::new(BASE), Perm::RW, SizeSet::ALL).unwrap();
    let used = arena.tables_in_use();
    let mut gather = Gather::new();
    tree.table.unmap(span(0, 1 << 39), &mut gather);
    assert_eq!(arena.tables_in_use(), used, "tables went back before their readers were gone");
    gather.finish(&arena, |gather| assert_eq!(gather.spans().count(), 1));
    assert!(arena.tables_in_use() < used);
}
