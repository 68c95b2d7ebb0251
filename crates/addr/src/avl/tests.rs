//! The tree's own invariants, and its cost counted in visited nodes: time would depend on the machine.

use super::{Avl, NIL, Path};
use crate::{Address, Iova, Span};
use alloc::vec::Vec;
use core::sync::atomic::Ordering::Relaxed;

impl<A: Address, V> Avl<A, V> {
    /// Balance, order and summaries, each computed the slow way.
    fn check(&self) {
        let mut seen = Vec::new();
        self.check_below(self.root, &mut seen);
        assert_eq!(seen.len(), self.len());
        assert!(seen.is_sorted());
    }

    fn check_below(&self, index: u32, seen: &mut Vec<(A, A, u32)>) -> u8 {
        if index == NIL {
            return 0;
        }
        let from = seen.len();
        let node = &self.nodes[index as usize];
        assert!(node.value.is_some());
        let left = self.check_below(node.left, seen);
        seen.push((node.start, node.last, index));
        let right = self.check_below(node.right, seen);
        assert!(left.abs_diff(right) <= 1 && node.height == left.max(right) + 1);
        let lasts = seen[from..].iter().map(|(_, last, _)| *last);
        assert_eq!((node.low, Some(node.high)), (seen[from].0, lasts.max()));
        node.height
    }
}

fn span(start: u64, len: u64) -> Span<Iova> {
    Span::from_len(Iova::new(start), len).unwrap()
}

fn insert(tree: &mut Avl<Iova, u64>, span: Span<Iova>) -> u32 {
    let mut path = Path::new();
    tree.path_for(span, false, &mut path);
    tree.insert(&path, span, span.start().get()).unwrap()
}

fn remove(tree: &mut Avl<Iova, u64>, index: u32) {
    tree.remove(index).unwrap();
}

#[test]
fn shape_and_summaries_after_random_histories() {
    let mut rng = fastrand::Rng::with_seed(7);
    for round in 0..60 {
        let mut tree = Avl::new();
        let mut live = Vec::new();
        let room = [40, 400, 4000][round % 3];
        for _ in 0..600 {
            if rng.u32(..100) < 55 || live.is_empty() {
                live.push(insert(&mut tree, span(rng.u64(..room), rng.u64(1..20))));
            } else {
                let index = live.swap_remove(rng.usize(..live.len()));
                remove(&mut tree, index);
            }
            tree.check();
            assert_eq!(tree.len(), live.len());
        }
    }
}

#[test]
fn a_million_entries_cost_a_logarithm() {
    let mut tree = Avl::new();
    let mut rng = fastrand::Rng::with_seed(3);
    let mut all = Vec::new();
    let cost = |tree: &mut Avl<Iova, u64>, what: &str, run: &mut dyn FnMut(&mut Avl<Iova, u64>)| {
        let before = tree.visits.load(Relaxed);
        run(tree);
        let visits = tree.visits.load(Relaxed) - before;
        let lg2 = u64::from((tree.len() as u64).ilog2()) + 1;
        assert!(visits <= 20 * lg2 + 40, "{what} at {} entries visited {visits} nodes", tree.len());
    };
    for n in 0..1_000_000_u64 {
        // Odd multiples of a stride in a scrambled order: never equal, with gaps of 8.
        let at = (n.wrapping_mul(0x9_e377) % (1 << 20)) * 16;
        cost(&mut tree, "insert", &mut |tree| all.push(insert(tree, span(at, 8))));
    }
    for _ in 0..20_000 {
        let at = rng.u64(..(1 << 24));
        cost(&mut tree, "lookup", &mut |tree| {
            tree.first_over(span(at, 1));
        });
        cost(&mut tree, "query", &mut |tree| assert!(tree.overlapping(span(at, 16)).count() <= 2));
    }
    // Gaps of 8 everywhere: room for 9 is only behind the last, and the search must not look at each of the million gaps.
    cost(&mut tree, "gap", &mut |tree| {
        tree.first_gap(Span::whole(), 4096, &mut |gap| Some(gap.start()));
    });
    for _ in 0..400_000 {
        let index = all.swap_remove(rng.usize(..all.len()));
        cost(&mut tree, "remove", &mut |tree| remove(tree, index));
    }
    assert_ne!(tree.next_index(), NIL);
    tree.check();
}

/// A million entries over one page: taking one out, and asking what they leave uncovered, must not look at the others.
#[test]
fn a_million_equal_entries_cost_a_logarithm() {
    let mut tree = Avl::new();
    let cost = |tree: &mut Avl<Iova, u64>, what: &str, run: &mut dyn FnMut(&mut Avl<Iova, u64>)| {
        let before = tree.visits.load(Relaxed);
        run(tree);
        let visits = tree.visits.load(Relaxed) - before;
        assert!(visits <= 440, "{what} at {} entries visited {visits} nodes", tree.len());
    };
    let mut all: Vec<u32> = (0..1_000_000).map(|n: u64| insert(&mut tree, span(4096 + n / 250_000, 4096))).collect();
    for round in 0..20_000_u64 {
        let one = span(4096 + round % 4, 4096);
        cost(&mut tree, "exact", &mut |tree| assert!(tree.first_exact(one).is_some()));
        cost(&mut tree, "reach", &mut |tree| assert_eq!(tree.reach(one.start()), Some(one.last())));
        let index = all.swap_remove((round * 7919) as usize % all.len());
        cost(&mut tree, "remove", &mut |tree| remove(tree, index));
    }
    assert_eq!(tree.first_exact(span(4096, 4095)), None);
    assert_eq!(tree.reach(Iova::new(4095)), None);
    tree.check();
}
