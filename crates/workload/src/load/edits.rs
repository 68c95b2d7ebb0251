//! Edits of a page table by two threads, each with tables in stock and a gather of its own: without invalidation and grace, as the rows of
//! `pt` are. Spans are far enough apart that no table of leaves is shared; the tables above it are, or nothing is.

use super::pair::{Pair, Task};
use crate::tree::{OA, span};
use crate::{Error, Work};
use addr::{Lg2, Oa, SizeSet};
use backing::Words;
use iommu::{IoArena, IoTable};
use pt::{FormatKind, Gather, Perm, Stock};
use std::hint::black_box;
use std::sync::Arc;

const TABLES: usize = 256;
/// A table, and its link in the arena.
const WORDS_PER_TABLE: usize = 513;
const TABLES_AT: Oa = Oa::new(1 << 32);
/// Within the 38 bits of the narrowest format.
const AT: u64 = 1 << 36;
/// Operations of a batch before they are undone.
const BATCH: u64 = 64;

/// What one operation is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Edits {
    /// A map and an unmap of 4 KiB.
    K4,
    /// Of 2 MiB.
    M2,
    /// 4 KiB cut out of a leaf of 2 MiB, and all joined again.
    CutMerge,
}

impl Edits {
    pub(super) fn len(self) -> u64 {
        if self == Self::K4 { 4 << 10 } else { 2 << 20 }
    }

    /// How far apart two threads' spans lie.
    pub(super) fn stride(self) -> u64 {
        self.len() * 512
    }
}

struct Tree {
    table: IoTable,
    arena: Arc<IoArena>,
}

impl Tree {
    fn new(format: FormatKind) -> Result<Arc<Self>, Error> {
        let words = Words::new(TABLES * WORDS_PER_TABLE)?;
        words.prefault()?;
        let arena = IoArena::new(words, TABLES_AT, 9);
        Ok(Arc::new(Self { table: IoTable::new(format, Arc::clone(&arena))?, arena }))
    }
}

/// One thread of a tree.
struct Hand {
    tree: Arc<Tree>,
    stock: Stock<Words>,
    edits: Edits,
    at: u64,
}

impl Hand {
    fn new(tree: &Arc<Tree>, edits: Edits, thread: u64) -> Result<Self, Error> {
        let stock = Stock::new(&tree.arena);
        let mut hand = Self { tree: Arc::clone(tree), stock, edits, at: AT + thread * edits.stride() };
        if edits == Edits::CutMerge {
            (0..BATCH).for_each(|index| hand.map(index));
        } else {
            // The tables on the way stay.
            hand.map(BATCH);
        }
        Ok(hand)
    }

    fn task(mut self) -> Task {
        Box::new(move |times| {
            let mut left = times;
            while left > 0 {
                let now = left.min(BATCH);
                left -= now;
                if self.edits == Edits::CutMerge {
                    (0..now).for_each(|index| self.cut(index));
                    (0..now).for_each(|index| self.merge(index));
                } else {
                    (0..now).for_each(|index| self.map(index));
                    (0..now).for_each(|index| self.unmap(index));
                }
            }
        })
    }

    #[inline(never)]
    fn map(&mut self, index: u64) {
        let (mut gather, offset) = (Gather::new(), index * self.edits.len());
        let sizes = if self.edits == Edits::K4 { SizeSet::only(Lg2::K4) } else { SizeSet::ALL };
        let at = black_box(self.at + offset);
        let done = self.tree.table.map(span(at, self.edits.len()), Oa::new(OA + offset), Perm::RW, sizes, &mut self.stock, &mut gather);
        gather.finish(&self.tree.arena, |_| {});
        assert!(done.is_ok(), "{done:?}");
    }

    #[inline(never)]
    fn unmap(&mut self, index: u64) {
        let mut gather = Gather::new();
        let at = black_box(self.at + index * self.edits.len());
        let _none_crosses = self.tree.table.unmap(span(at, self.edits.len()), &mut gather);
        gather.finish(&self.tree.arena, |_| {});
    }

    #[inline(never)]
    fn cut(&mut self, index: u64) {
        let at = black_box(self.at + index * self.edits.len() + 0x5_5000);
        let done = self.tree.table.cut(span(at, 4 << 10), SizeSet::ALL, &mut self.stock, |_| {});
        assert!(done.is_ok(), "{done:?}");
    }

    #[inline(never)]
    fn merge(&mut self, index: u64) {
        let mut gather = Gather::new();
        let at = black_box(self.at + index * self.edits.len());
        self.tree.table.merge(span(at, self.edits.len()), SizeSet::ALL, &mut gather, |_| {});
        gather.finish(&self.tree.arena, |_| {});
    }
}

/// Both threads in one tree.
pub(super) fn one_tree(format: FormatKind, edits: Edits) -> Result<Box<dyn Work>, Error> {
    let tree = Tree::new(format)?;
    Pair::work([Hand::new(&tree, edits, 0)?.task(), Hand::new(&tree, edits, 1)?.task()], false)
}

/// Each in a tree of its own, with memory of its own.
pub(super) fn apart(format: FormatKind, edits: Edits) -> Result<Box<dyn Work>, Error> {
    Pair::work([Hand::new(&Tree::new(format)?, edits, 0)?.task(), Hand::new(&Tree::new(format)?, edits, 0)?.task()], true)
}
