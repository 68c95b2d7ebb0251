//! A tree with its arena and its writer's stock, and the plain model that it is held against.
#![allow(dead_code, reason = "each test file uses its own part of this module")]
#![allow(unreachable_pub, reason = "a module shared by test binaries")]

use addr::{Address, Iova, Lg2, Oa, SizeSet, Span};
use lockstep_pt::{Arena, AtomicU64, Format, Gather, Leaf, MapError, Perm, Stock, Table};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

pub type Words = Box<[AtomicU64]>;

pub fn arena<F: Format>(tables: usize) -> Arc<Arena<Words>> {
    let words = (0..tables * ((1 << F::INDEX_LG2) + 1)).map(|_| AtomicU64::new(0)).collect();
    Arena::new(words, Oa::new(1 << 30), F::INDEX_LG2)
}

/// The sizes that fill one slot.
pub fn single_slot_sizes<F: Format>() -> SizeSet {
    SizeSet((0..=F::MAX_LEVEL).map(|level| 1u64 << F::item_lg2(level)).sum()).and(F::SIZES)
}

pub struct Tree<F: Format> {
    pub table: Rc<Table<F, Words>>,
    pub arena: Arc<Arena<Words>>,
    pub stock: Stock<Words>,
}

impl<F: Format> Tree<F> {
    pub fn new(arena: &Arc<Arena<Words>>) -> Self {
        Self { table: Rc::new(Table::new(Arc::clone(arena)).unwrap()), arena: Arc::clone(arena), stock: Stock::new(arena) }
    }

    pub fn map(&mut self, span: Span<Iova>, oa: Oa, perm: Perm, sizes: SizeSet) -> Result<(), MapError> {
        let mut gather = Gather::new();
        let result = self.table.map(span, oa, perm, sizes, &mut self.stock, &mut gather);
        gather.finish(&self.arena, |_| {});
        result
    }

    pub fn unmap(&self, span: Span<Iova>) -> Option<Leaf> {
        let mut gather = Gather::new();
        let crossing = self.table.unmap(span, &mut gather);
        gather.finish(&self.arena, |_| {});
        crossing
    }

    pub fn cut(&mut self, span: Span<Iova>, sizes: SizeSet) {
        self.table.cut(span, sizes, &mut self.stock).unwrap();
        for border in [Some(span.start()), span.last().checked_add(1)].into_iter().flatten() {
            let leaf = self.table.walk(border);
            assert!(leaf.is_none_or(|leaf| leaf.iova == border || leaf.size.0 == F::GRANULE_LG2), "{leaf:?} crosses {border}");
        }
    }

    pub fn merge(&self, span: Span<Iova>) {
        let mut gather = Gather::new();
        self.table.merge(span, SizeSet::ALL, &mut gather);
        gather.finish(&self.arena, |_| {});
    }

    pub fn read_dirty(&self, span: Span<Iova>, clear: bool) -> Vec<Span<Iova>> {
        let (mut gather, mut found) = (Gather::new(), Vec::new());
        self.table.read_dirty(span, clear, &mut gather, |span| found.push(span));
        gather.finish(&self.arena, |_| {});
        found
    }
}

/// What is mapped, granule by granule.
#[derive(Default)]
pub struct Model {
    pages: BTreeMap<u64, (u64, Perm, bool)>,
}

impl Model {
    fn granules<F: Format>(span: Span<Iova>) -> std::ops::RangeInclusive<u64> {
        span.start().get() >> F::GRANULE_LG2..=span.last().get() >> F::GRANULE_LG2
    }

    pub fn map<F: Format>(&mut self, span: Span<Iova>, oa: Oa, perm: Perm) -> bool {
        let granules = Self::granules::<F>(span);
        if self.pages.range(granules.clone()).next().is_some() {
            return false;
        }
        let first = *granules.start();
        self.pages.extend(granules.map(|granule| (granule, (oa.get() + ((granule - first) << F::GRANULE_LG2), perm, false))));
        true
    }

    pub fn unmap<F: Format>(&mut self, span: Span<Iova>) {
        let granules = Self::granules::<F>(span);
        self.pages.retain(|granule, _| !granules.contains(granule));
    }

    pub fn write<F: Format>(&mut self, at: Iova) -> bool {
        self.pages.get_mut(&(at.get() >> F::GRANULE_LG2)).map(|page| page.2 = true).is_some()
    }

    /// The first written granule of `span` that no dirty span names.
    pub fn missing_from<F: Format>(&self, dirty: &[Span<Iova>], span: Span<Iova>) -> Option<u64> {
        let written = self.pages.range(Self::granules::<F>(span)).filter(|(_, page)| page.2).map(|(granule, _)| granule << F::GRANULE_LG2);
        written.into_iter().find(|at| !dirty.iter().any(|span| span.contains(Iova::new(*at))))
    }

    pub fn clean<F: Format>(&mut self, dirty: &[Span<Iova>]) {
        for span in dirty {
            self.pages.range_mut(Self::granules::<F>(*span)).for_each(|(_, page)| page.2 = false);
        }
    }

    /// Every granule translates as the model says, and the leaves cover the mapped granules exactly.
    pub fn check<F: Format>(&self, tree: &Tree<F>, base: u64, granules: u64) -> Result<(), TestCaseError> {
        for granule in 0..granules {
            let iova = Iova::new(base + (granule << F::GRANULE_LG2));
            let want = self.pages.get(&(iova.get() >> F::GRANULE_LG2));
            let leaf = tree.table.walk(iova);
            prop_assert_eq!(leaf.map(|leaf| (leaf.oa_of(iova).get(), leaf.perm)), want.map(|page| (page.0, page.1)), "at {}", iova);
        }
        let mut covered = 0u64;
        let mut before: Option<Leaf> = None;
        tree.table.leaves(Span::whole(), |leaf| {
            covered += 1u64 << (leaf.size.0 - F::GRANULE_LG2);
            assert!(before.is_none_or(|before| before.span().last() < leaf.iova), "{before:?} and {leaf:?} overlap");
            assert!(Lg2(F::GRANULE_LG2) <= leaf.size);
            before = Some(leaf);
        });
        prop_assert_eq!(covered, self.pages.len() as u64);
        let dirty = tree.read_dirty(Span::whole(), false);
        prop_assert_eq!(self.missing_from::<F>(&dirty, Span::whole()), None, "a dirty bit was lost");
        Ok(())
    }
}
