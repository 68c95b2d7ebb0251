//! Random histories against a plain model: a map from granule to output address. Both formats, every edit, the whole tree compared.
#![cfg(not(loom))]

mod common;

use addr::{Iova, Lg2, Oa, SizeSet, Span};
use common::{Model, Tree, arena};
use lockstep_pt::{AmdV1, Format, Perm, Toy};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Op {
    Map { start: u64, len: u64, oa: u64, perm: u8, sizes: u8 },
    Unmap { start: u64, len: u64 },
    Cut { start: u64, len: u64 },
    Merge { start: u64, len: u64 },
    Write { at: u64 },
    ReadDirty { start: u64, len: u64 },
}

fn op(granules: u64) -> impl Strategy<Value = Op> {
    // Aligned and odd spans alike: half of the numbers are rounded to a large power of two.
    let number = (0..granules, 0..10u32).prop_map(|(n, round)| if round < 6 { n } else { n >> (round - 2) << (round - 2) });
    let len = (1..granules, 0..12u32).prop_map(|(n, round)| if round < 6 { n % 8 + 1 } else { (n >> (round - 2) << (round - 2)).max(1) });
    prop_oneof![
        4 => (number.clone(), len.clone(), number.clone(), 1..4u8, 0..3u8)
            .prop_map(|(start, len, oa, perm, sizes)| Op::Map { start, len, oa, perm, sizes }),
        2 => (number.clone(), len.clone()).prop_map(|(start, len)| Op::Unmap { start, len }),
        2 => (number.clone(), len.clone()).prop_map(|(start, len)| Op::Cut { start, len }),
        2 => (number.clone(), len.clone()).prop_map(|(start, len)| Op::Merge { start, len }),
        2 => number.clone().prop_map(|at| Op::Write { at }),
        1 => (number, len).prop_map(|(start, len)| Op::ReadDirty { start, len }),
    ]
}

/// Runs one history; `scale` spreads granules over the address space so that every level takes part.
fn history<F: Format>(ops: &[Op], granules: u64, base: u64) -> Result<(), TestCaseError> {
    let arena = arena::<F>(4096);
    let mut tree = Tree::<F>::new(&arena);
    let mut model = Model::default();
    let granule = F::GRANULE_LG2;
    let span = |start: u64, len: u64| {
        let last = (start + len - 1).min(granules - 1);
        Span::of(Iova::new(base + (start << granule)), Iova::new(base + (last << granule) + ((1 << granule) - 1)))
    };
    for op in ops {
        match *op {
            Op::Map { start, len, oa, perm, sizes } => {
                let (span, oa, perm) = (span(start, len), Oa::new((oa << granule) + (1 << 40)), Perm::of(perm & 1 != 0, perm & 2 != 0));
                let sizes = [SizeSet::ALL, SizeSet::only(Lg2(granule)), common::single_slot_sizes::<F>()][usize::from(sizes)];
                let expected = model.map::<F>(span, oa, perm);
                prop_assert_eq!(tree.map(span, oa, perm, sizes).is_ok(), expected, "map {} to {}", span, oa);
            }
            Op::Unmap { start, len } => {
                let span = span(start, len);
                tree.cut(span, SizeSet::ALL);
                prop_assert_eq!(tree.unmap(span), None, "a cut span has no crossing leaf");
                model.unmap::<F>(span);
            }
            Op::Cut { start, len } => tree.cut(span(start, len), SizeSet::ALL),
            Op::Merge { start, len } => tree.merge(span(start, len)),
            Op::Write { at } => {
                let at = Iova::new(base + (at << granule) + 5);
                prop_assert_eq!(tree.table.mark_dirty(at), model.write::<F>(at));
            }
            Op::ReadDirty { start, len } => {
                let dirty = tree.read_dirty(span(start, len), true);
                prop_assert_eq!(model.missing_from::<F>(&dirty, span(start, len)), None, "a written page is not in {:?}", dirty);
                model.clean::<F>(&dirty);
            }
        }
        model.check::<F>(&tree, base, granules)?;
    }
    drop(tree);
    prop_assert_eq!(arena.tables_in_use(), 0, "tables leaked");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, max_shrink_iters: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn toy(ops in prop::collection::vec(op(16), 1..60)) {
        history::<Toy>(&ops, 16, 0)?;
    }

    #[test]
    fn amdv1_two_levels(ops in prop::collection::vec(op(2048), 1..40)) {
        history::<AmdV1>(&ops, 2048, 0)?;
    }

    #[test]
    fn amdv1_across_a_top_border(ops in prop::collection::vec(op(2048), 1..20)) {
        // 512 GiB is where the first top table ends; the span straddles it.
        history::<AmdV1>(&ops, 2048, (1 << 39) - (1 << 22))?;
    }

    #[test]
    fn amdv1_at_the_end_of_the_space(ops in prop::collection::vec(op(2048), 1..20)) {
        history::<AmdV1>(&ops, 2048, 0u64.wrapping_sub(2048 << 12))?;
    }
}
