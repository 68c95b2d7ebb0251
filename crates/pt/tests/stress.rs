//! Real formats, real threads: readers check every translation against the truth while a writer cuts and merges under them.
#![cfg(not(loom))]

mod common;

use addr::{Address, Iova, Lg2, Oa, SizeSet, Span};
use common::arena;
use lockstep_pt::{AmdV1, Format, FormatKind, FormatVisitor, Gather, Perm, Stock, Table};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use sync::Readers;

const GIB: u64 = 1 << 30;
const MAPPED: u64 = 2 * GIB;
const BASE: Oa = Oa::new(1 << 40);
const DOMAIN: u32 = 1;

/// Cuts and merges change nothing that a reader can see: each of the mapped pages answers the one truth at every moment. A scratch region
/// is mapped and unmapped meanwhile, so that retired tables are used again with other content. In a format that needs break-before-make a
/// reader may also find nothing for a moment.
fn translations_across_cuts_and_merges<F: Format>(translations: u64, edits: u64) {
    let arena = arena::<F>(1 << 13);
    let table = Table::<F, _>::new(Arc::clone(&arena)).unwrap();
    let readers = Arc::new(Readers::new());
    let whole = Span::from_len(Iova::new(0), MAPPED).unwrap();
    let mut stock = Stock::new(&arena);
    let map = |span: Span<Iova>, oa: Oa, sizes: SizeSet, stock: &mut Stock<_>| {
        let mut gather = Gather::new();
        table.map(span, oa, Perm::RW, sizes, stock, &mut gather).unwrap();
        gather.finish(&arena, |_| readers.grace(DOMAIN));
    };
    map(whole, BASE, SizeSet::ALL, &mut stock);
    let flush = || {
        assert!(!F::HITLESS.is_allowed(), "{}: a flush in the middle of an edit", F::NAME);
        readers.grace(DOMAIN);
    };

    let stop = AtomicBool::new(false);
    let checked = AtomicU64::new(0);
    let wrong = AtomicU64::new(0);
    let (mut cuts, mut merges) = (0u64, 0u64);
    std::thread::scope(|scope| {
        for seed in 0..2 {
            let (table, readers, stop, checked, wrong) = (&table, &readers, &stop, &checked, &wrong);
            scope.spawn(move || {
                let mut slot = readers.slot();
                let mut random = fastrand::Rng::with_seed(seed);
                while !stop.load(Ordering::Relaxed) {
                    let _guard = slot.guard(DOMAIN);
                    for _ in 0..64 {
                        let iova = Iova::new(random.u64(..MAPPED));
                        let right = match table.walk(iova) {
                            Some(leaf) => leaf.oa_of(iova) == BASE.plus(iova.get()),
                            None => !F::HITLESS.is_allowed(),
                        };
                        wrong.fetch_add(u64::from(!right), Ordering::Relaxed);
                    }
                    checked.fetch_add(64, Ordering::Relaxed);
                }
            });
        }
        let mut random = fastrand::Rng::with_seed(99);
        let scratch = Span::from_len(Iova::new(64 * GIB), 2 << 20).unwrap();
        while cuts < edits || merges < edits || checked.load(Ordering::Relaxed) < translations {
            for _ in 0..16 {
                let page = Span::block(Iova::new(random.u64(..MAPPED)), F::GRANULE_LG2 + [0, 1, 4, 9][random.usize(..4)]);
                cuts += u64::from(table.cut(page, SizeSet::ALL, &mut stock, |_| flush()).unwrap());
            }
            map(scratch, Oa::new(7 << 40), SizeSet::only(Lg2(F::GRANULE_LG2)), &mut stock);
            let mut gather = Gather::new();
            assert_eq!(table.unmap(scratch, &mut gather), None);
            merges += u64::from(table.merge(whole, SizeSet::ALL, &mut gather, |_| flush()));
            gather.finish(&arena, |_| readers.grace(DOMAIN));
        }
        stop.store(true, Ordering::Relaxed);
    });
    println!(
        "{}: {} translations across {cuts} cuts and {merges} merges, {} wrong",
        F::NAME,
        checked.into_inner(),
        wrong.load(Ordering::Relaxed)
    );
    assert_eq!(wrong.into_inner(), 0);
}

#[test]
fn a_million_translations_across_ten_thousand_cuts_and_merges() {
    translations_across_cuts_and_merges::<AmdV1>(1_000_000, 10_000);
}

#[test]
fn translations_in_every_other_format() {
    struct Visitor;
    impl FormatVisitor for Visitor {
        type Output = ();
        fn visit<F: Format>(self) {
            translations_across_cuts_and_merges::<F>(50_000, 100);
        }
    }
    for kind in FormatKind::ALL.iter().filter(|kind| **kind != FormatKind::AmdV1) {
        kind.visit(Visitor);
    }
}
