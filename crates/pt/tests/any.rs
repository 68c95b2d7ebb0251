//! A table whose format is chosen at run time says what the table of that very format says, edit by edit.
#![cfg(not(loom))]

mod common;

use addr::{Iova, Oa, SizeSet, Span};
use common::{Tree, Words, arena};
use lockstep_pt::{AmdV1, AnyTable, Format, FormatKind, FormatVisitor, Gather, Leaf, Perm, Stock};
use std::sync::Arc;

const BASE: u64 = 1 << 40;

/// Both kinds of table over one random history; every answer is compared.
fn same_as<F: Format>(kind: FormatKind) {
    let (own, other) = (arena::<F>(1 << 12), arena::<F>(1 << 12));
    let mut tree = Tree::<F>::new(&own);
    let any = AnyTable::<Words>::new(kind, Arc::clone(&other)).unwrap();
    let mut stock = Stock::new(&other);
    assert_eq!((any.format(), any.aperture()), (kind, F::aperture()));
    let mut random = fastrand::Rng::with_seed(7);
    for _ in 0..500 {
        let at = random.u64(..4096) << F::GRANULE_LG2;
        let span = Span::from_len(Iova::new(at), (1 << random.u32(..12)) << F::GRANULE_LG2).unwrap();
        let mut gather = Gather::new();
        match random.u32(..5) {
            0 | 1 => {
                let oa = Oa::new(BASE + at);
                let done = any.map(span, oa, Perm::RW, SizeSet::ALL, &mut stock, &mut gather);
                assert_eq!(done, tree.map(span, oa, Perm::RW, SizeSet::ALL));
            }
            2 => {
                any.cut(span, SizeSet::ALL, &mut stock, common::flushed::<F>).unwrap();
                tree.cut(span, SizeSet::ALL);
                assert_eq!(any.unmap(span, &mut gather), tree.unmap(span));
            }
            3 => {
                any.merge(span, SizeSet::ALL, &mut gather, common::flushed::<F>);
                tree.merge(span);
            }
            _ => {
                let written = Iova::new(at + 9);
                assert_eq!(any.mark_dirty(written), tree.table.mark_dirty(written));
                let mut dirty = Vec::new();
                any.read_dirty(span, true, &mut gather, |found| dirty.push(found));
                assert_eq!(dirty, tree.read_dirty(span, true));
            }
        }
        gather.finish(&other, |_| {});
        let (mut found, mut own) = (Vec::<Leaf>::new(), Vec::<Leaf>::new());
        any.leaves(Span::whole(), |leaf| found.push(leaf));
        tree.table.leaves(Span::whole(), |leaf| own.push(leaf));
        assert_eq!(found, own);
        assert_eq!(any.walk(span.last()), tree.table.walk(span.last()));
        assert_eq!(any.leaf_at(span.last()), tree.table.leaf_at(span.last()));
    }
    assert_eq!((any.cuts(), any.merges(), any.breaks()), (tree.table.cuts(), tree.table.merges(), tree.table.breaks()));
    assert_eq!(any.breaks() == 0, kind.hitless().is_allowed());
    assert_eq!(any.bytes_in_tables(), tree.table.bytes_in_tables());
    drop((any, stock));
    assert_eq!(other.tables_in_use(), 0, "tables leaked");
}

struct SameAs(FormatKind);

impl FormatVisitor for SameAs {
    type Output = ();

    fn visit<F: Format>(self) {
        same_as::<F>(self.0);
    }
}

#[test]
fn every_format_answers_as_its_own_table() {
    for kind in FormatKind::ALL {
        kind.visit(SameAs(*kind));
    }
}

/// What one format writes, another cannot read: the choice is not only a name.
#[test]
fn formats_differ() {
    let arena = arena::<AmdV1>(64);
    let (mut stock, mut gather) = (Stock::new(&arena), Gather::new());
    let half = Span::from_len(Iova::new(0x800), 0x800).unwrap();
    let coarse = AnyTable::new(FormatKind::AmdV1, Arc::clone(&arena)).unwrap();
    let fine = AnyTable::new(FormatKind::AmdV1K2, Arc::clone(&arena)).unwrap();
    assert!(coarse.map(half, Oa::new(BASE + 0x800), Perm::RW, SizeSet::ALL, &mut stock, &mut gather).is_err());
    fine.map(half, Oa::new(BASE + 0x800), Perm::RW, SizeSet::ALL, &mut stock, &mut gather).unwrap();
    let leaf = fine.walk(Iova::new(0x9ab)).unwrap();
    assert_eq!((leaf.span(), leaf.oa_of(Iova::new(0x9ab))), (half, Oa::new(BASE + 0x9ab)));
    assert_eq!(fine.walk(Iova::new(0x7ff)), None);
    gather.finish(&arena, |_| {});
}
