//! A plain model of a tree, unit by unit, and random histories in which the tree must stay what the model is.

use super::{Tree, Words, arena, single_slot_sizes};
use addr::{Iova, Lg2, Oa, SizeSet, Span};
use lockstep_pt::{Arena, Config, Entry, Format, Leaf, MapError, Perm};
use proptest::prelude::*;
use proptest::test_runner::{TestError, TestRunner};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Where output addresses of a history begin: aligned to its units.
pub const fn frames(unit_lg2: u8) -> u64 {
    1 << if unit_lg2 > 40 { unit_lg2 } else { 40 }
}

/// What is mapped, unit by unit.
pub struct Model {
    unit_lg2: u8,
    pages: BTreeMap<u64, (u64, Perm, bool)>,
}

impl Model {
    pub fn new(unit_lg2: u8) -> Self {
        Self { unit_lg2, pages: BTreeMap::new() }
    }

    fn units(&self, span: Span<Iova>) -> std::ops::RangeInclusive<u64> {
        span.start().get() >> self.unit_lg2..=span.last().get() >> self.unit_lg2
    }

    /// Whether the map succeeds.
    pub fn map(&mut self, span: Span<Iova>, oa: Oa, perm: Perm) -> bool {
        let units = self.units(span);
        if self.pages.range(units.clone()).next().is_some() {
            return false;
        }
        let first = *units.start();
        self.pages.extend(units.map(|unit| (unit, (oa.get() + ((unit - first) << self.unit_lg2), perm, false))));
        true
    }

    pub fn unmap(&mut self, span: Span<Iova>) {
        let units = self.units(span);
        self.pages.retain(|unit, _| !units.contains(unit));
    }

    /// Whether the write is noted: something is mapped, and its leaf can be dirty.
    pub fn write<F: Format>(&mut self, at: Iova) -> bool {
        let Some(page) = self.pages.get_mut(&(at.get() >> self.unit_lg2)) else { return false };
        let leaf = F::leaf(0, Lg2(F::GRANULE_LG2), Oa::new(0), page.1);
        let noted = F::dirtied(leaf) != leaf;
        assert!(noted || !page.1.allows(Perm::WRITE), "{}: a writable leaf cannot be dirty", F::NAME);
        page.2 |= noted;
        noted
    }

    /// The first written unit of `span` that no dirty span names.
    pub fn missing_from(&self, dirty: &[Span<Iova>], span: Span<Iova>) -> Option<u64> {
        let written = self.pages.range(self.units(span)).filter(|(_, page)| page.2).map(|(unit, _)| unit << self.unit_lg2);
        written.into_iter().find(|at| !dirty.iter().any(|span| span.contains(Iova::new(*at))))
    }

    pub fn clean(&mut self, dirty: &[Span<Iova>]) {
        for span in dirty {
            self.pages.range_mut(self.units(*span)).for_each(|(_, page)| page.2 = false);
        }
    }

    /// Every unit translates as the model says, and the leaves cover the mapped units exactly, with sizes of the configuration.
    pub fn check<F: Format>(&self, tree: &Tree<F>, base: u64, units: u64) -> Result<(), TestCaseError> {
        for unit in 0..units {
            let iova = Iova::new(base + (unit << self.unit_lg2) + ((unit * 0x1111) & ((1 << self.unit_lg2) - 1)));
            let want = self.pages.get(&(iova.get() >> self.unit_lg2));
            let inside = iova.get() & ((1 << self.unit_lg2) - 1);
            let leaf = tree.walk(iova);
            prop_assert_eq!(
                leaf.map(|leaf| (leaf.oa_of(iova).get(), leaf.perm)),
                want.map(|page| (page.0 + inside, page.1)),
                "at {}",
                iova
            );
        }
        let mut covered = 0u64;
        let mut before: Option<Leaf> = None;
        tree.table.leaves(Span::whole(), |leaf| {
            covered += 1u64 << (leaf.size.0 - F::GRANULE_LG2);
            assert!(before.is_none_or(|before| before.span().last() < leaf.iova), "{before:?} and {leaf:?} overlap");
            assert!(tree.sizes.has(leaf.size), "{leaf:?} is of a size that was not offered");
            assert_eq!(tree.table.leaf_at(leaf.span().last()).map(|leaf| leaf.span()), Some(leaf.span()));
            assert_slots(tree, leaf);
            before = Some(leaf);
        });
        prop_assert_eq!(covered, (self.pages.len() as u64) << (self.unit_lg2 - F::GRANULE_LG2));
        let dirty = tree.read_dirty(Span::whole(), false);
        prop_assert_eq!(self.missing_from(&dirty, Span::whole()), None, "a dirty bit was lost");
        Ok(())
    }
}

/// Every slot of a leaf holds what it must, bit for bit, but for its dirty bit: walks alone would not tell.
fn assert_slots<F: Format>(tree: &Tree<F>, leaf: Leaf) {
    let (mut table, top) = tree.table.root();
    let level = F::level_of(leaf.size);
    let entry = |table: Oa, slot: usize| tree.arena.peek(Oa::new(table.get() + 8 * slot as u64)).unwrap();
    for above in (level + 1..=top).rev() {
        let Entry::Table(below) = F::decode(entry(table, F::slot(leaf.iova, above)), above) else { panic!("{leaf:?} is not there") };
        table = below;
    }
    let first = F::leaf(level, leaf.size, leaf.oa, leaf.perm);
    for slot in 0..1 << (leaf.size.0 - F::item_lg2(level)) {
        let (value, wanted) = (entry(table, F::slot(leaf.iova, level) + slot), first + slot as u64 * F::slot_step(level));
        assert_eq!(value & !F::DIRTY, wanted, "{}: slot {slot} of {leaf:?} is {value:#x}", F::NAME);
    }
}

#[derive(Clone, Debug)]
pub enum Op {
    Map { start: u64, len: u64, oa: u64, perm: u8, sizes: u8 },
    Unmap { start: u64, len: u64 },
    Cut { start: u64, len: u64 },
    Merge { start: u64, len: u64 },
    Write { at: u64 },
    ReadDirty { start: u64, len: u64 },
}

pub fn op(units: u64) -> impl Strategy<Value = Op> {
    // Aligned and odd spans alike: half of the numbers are rounded to a large power of two.
    let number = (0..units, 0..10u32).prop_map(|(n, round)| if round < 6 { n } else { n >> (round - 2) << (round - 2) });
    let len = (1..units, 0..12u32).prop_map(|(n, round)| if round < 6 { n % 8 + 1 } else { (n >> (round - 2) << (round - 2)).max(1) });
    prop_oneof![
        4 => (number.clone(), len.clone(), number.clone(), 0..16u8, 0..3u8)
            .prop_map(|(start, len, oa, perm, sizes)| Op::Map { start, len, oa, perm, sizes }),
        2 => (number.clone(), len.clone()).prop_map(|(start, len)| Op::Unmap { start, len }),
        2 => (number.clone(), len.clone()).prop_map(|(start, len)| Op::Cut { start, len }),
        2 => (number.clone(), len.clone()).prop_map(|(start, len)| Op::Merge { start, len }),
        2 => number.clone().prop_map(|at| Op::Write { at }),
        1 => (number, len).prop_map(|(start, len)| Op::ReadDirty { start, len }),
    ]
}

/// Where a history plays: `units` units from `base` on.
#[derive(Clone, Copy, Debug)]
pub struct Stage {
    pub config: Config,
    pub unit_lg2: u8,
    pub units: u64,
    pub base: u64,
}

/// Runs one history.
pub fn history<F: Format>(arena: &Arc<Arena<Words>>, stage: Stage, ops: &[Op]) -> Result<(), TestCaseError> {
    let Stage { config, unit_lg2, units, base } = stage;
    let mut tree = Tree::<F>::with(arena, config);
    let mut model = Model::new(unit_lg2);
    // The smallest size that maps units one by one, so that no unit is thousands of leaves.
    let by_unit = tree.sizes.up_to(Lg2(unit_lg2)).largest().unwrap();
    let span = |start: u64, len: u64| {
        let last = (start + len - 1).min(units - 1);
        Span::of(Iova::new(base + (start << unit_lg2)), Iova::new(base + (last << unit_lg2) + ((1 << unit_lg2) - 1)))
    };
    for op in ops {
        match *op {
            Op::Map { start, len, oa, perm, sizes } => {
                let (span, oa) = (span(start, len), Oa::new((oa << unit_lg2) + frames(unit_lg2)));
                // One map in four asks for any permission, the others for one that gives something and can be said.
                let perm = Perm::of(perm & 1 != 0, perm & 2 != 0);
                let perm = if start % 4 == 0 || F::PERMS.has(perm) && perm != Perm::NONE { perm } else { Perm::RW };
                let sizes = [SizeSet::ALL, SizeSet::only(by_unit), single_slot_sizes::<F>()][usize::from(sizes)];
                let done = tree.map(span, oa, perm, sizes);
                if !F::PERMS.has(perm) {
                    let nearest = F::PERMS.covering(perm).unwrap();
                    prop_assert_eq!(done, Err(MapError::Perm { perm, nearest, format: F::NAME }));
                    continue;
                }
                if sizes.and(tree.sizes).up_to(Lg2(unit_lg2)).smallest().is_none() {
                    continue;
                }
                prop_assert_eq!(done.is_ok(), model.map(span, oa, perm), "map {} to {}: {:?}", span, oa, done);
            }
            Op::Unmap { start, len } => {
                let span = span(start, len);
                tree.cut(span, SizeSet::ALL);
                prop_assert_eq!(tree.unmap(span), None, "a cut span has no crossing leaf");
                model.unmap(span);
            }
            Op::Cut { start, len } => tree.cut(span(start, len), SizeSet::ALL),
            Op::Merge { start, len } => tree.merge(span(start, len)),
            Op::Write { at } => {
                let at = Iova::new(base + (at << unit_lg2) + 5);
                prop_assert_eq!(tree.table.mark_dirty(at), model.write::<F>(at));
            }
            Op::ReadDirty { start, len } => {
                let dirty = tree.read_dirty(span(start, len), true);
                prop_assert_eq!(model.missing_from(&dirty, span(start, len)), None, "a written page is not in {:?}", dirty);
                model.clean(&dirty);
            }
        }
        model.check::<F>(&tree, base, units)?;
    }
    drop(tree);
    prop_assert_eq!(arena.tables_in_use(), 0, "tables leaked");
    Ok(())
}

/// Runs `cases` random histories of up to `most` steps; a failing one is shrunk.
pub fn histories<F: Format>(stage: Stage, cases: u32, most: usize) {
    let config = ProptestConfig { cases, max_shrink_iters: 2000, failure_persistence: None, ..ProptestConfig::default() };
    let mut runner = TestRunner::new(config);
    let shared = arena::<F>(4096);
    let ops = prop::collection::vec(op(stage.units), 1..most);
    match runner
        .run(&ops, |ops| history::<F>(if shared.tables_in_use() == 0 { &shared } else { panic!("a history left tables") }, stage, &ops))
    {
        Ok(()) => {}
        Err(TestError::Fail(why, ops)) => panic!("{} in {stage:?}: {why}\nafter {ops:#?}", F::NAME),
        Err(TestError::Abort(why)) => panic!("{}: {why}", F::NAME),
    }
}
