//! One page table with memory of its own, touched beforehand, and calls into it that are real calls: nothing of them is inlined into a
//! loop that measures, as nothing of a kernel's is.

use crate::Error;
use addr::{Iova, Oa, SizeSet, Span};
use backing::Words;
use iommu::{IoArena, IoTable};
use pt::{Format, FormatKind, Gather, Leaf, MapError, NoTable, Perm, Stock, Table};
use std::sync::Arc;

/// Output addresses begin here: aligned to every leaf size in use.
pub(crate) const OA: u64 = 1 << 40;
const TABLES_AT: Oa = Oa::new(1 << 32);
/// A table, and its link in the arena.
const WORDS_PER_TABLE: usize = 513;

/// A table of a format that was chosen at run time, or when this was compiled.
pub(crate) trait Edit: Sized + 'static {
    fn create(format: FormatKind, arena: Arc<IoArena>) -> Result<Self, NoTable>;
    fn map(&self, iova: Span<Iova>, oa: Oa, sizes: SizeSet, stock: &mut Stock<Words>, gather: &mut Gather) -> Result<(), MapError>;
    fn unmap(&self, iova: Span<Iova>, gather: &mut Gather) -> Option<Leaf>;
    fn walk(&self, iova: Iova) -> Option<Leaf>;
}

macro_rules! edit {
    ($table:ty, $create:expr $(, $format:ident)?) => {
        impl $(<$format: Format>)? Edit for $table {
            fn create(format: FormatKind, arena: Arc<IoArena>) -> Result<Self, NoTable> {
                $create(format, arena)
            }

            #[inline(always)]
            fn map(&self, iova: Span<Iova>, oa: Oa, sizes: SizeSet, stock: &mut Stock<Words>, gather: &mut Gather) -> Result<(), MapError> {
                self.map(iova, oa, Perm::RW, sizes, stock, gather)
            }

            #[inline(always)]
            fn unmap(&self, iova: Span<Iova>, gather: &mut Gather) -> Option<Leaf> {
                self.unmap(iova, gather)
            }

            #[inline(always)]
            fn walk(&self, iova: Iova) -> Option<Leaf> {
                self.walk(iova)
            }
        }
    };
}
edit!(IoTable, Self::new);
edit!(Table<F, Words>, |_, arena| Self::new(arena), F);

pub(crate) struct TreeOf<T> {
    table: T,
    arena: Arc<IoArena>,
    stock: Stock<Words>,
}

pub(crate) type Tree = TreeOf<IoTable>;

impl<T: Edit> TreeOf<T> {
    /// Room for `tables` tables, all of them touched if `warm`.
    pub(crate) fn new(format: FormatKind, tables: usize, warm: bool) -> Result<Self, Error> {
        let words = Words::new(tables * WORDS_PER_TABLE)?;
        if warm {
            words.prefault()?;
        }
        let arena = IoArena::new(words, TABLES_AT, 9);
        Ok(Self { table: T::create(format, Arc::clone(&arena))?, stock: Stock::new(&arena), arena })
    }

    /// Maps `len` bytes, and ends the edit without invalidation and grace.
    ///
    /// # Panics
    /// When something is there already: the work is wrong then.
    #[inline(never)]
    pub(crate) fn map(&mut self, at: u64, len: u64, oa: u64, sizes: SizeSet) {
        let mut gather = Gather::new();
        let done = self.table.map(span(at, len), Oa::new(oa), sizes, &mut self.stock, &mut gather);
        gather.finish(&self.arena, |_| {});
        assert!(done.is_ok(), "map of {len:#x} bytes at {at:#x}: {done:?}");
    }

    /// Unmaps `len` bytes, and ends the edit without invalidation and grace.
    #[inline(never)]
    pub(crate) fn unmap(&mut self, at: u64, len: u64) {
        let mut gather = Gather::new();
        let crossing = self.table.unmap(span(at, len), &mut gather);
        gather.finish(&self.arena, |_| {});
        debug_assert!(crossing.is_none(), "{crossing:?} sticks out of {len:#x} bytes at {at:#x}");
    }

    /// The output address of one input address.
    #[inline(never)]
    pub(crate) fn walk(&self, at: u64) -> u64 {
        let at = Iova::new(at);
        self.table.walk(at).map_or(0, |leaf| leaf.oa_of(at).get())
    }

    /// Takes tables out of the arena, so that an edit finds them.
    pub(crate) fn stock(&mut self, tables: u32) {
        let done = self.stock.reserve(tables);
        assert!(done.is_ok(), "{done:?}");
    }
}

impl Tree {
    /// Cuts the leaf around `at` so that 4 KiB stand alone.
    #[inline(never)]
    pub(crate) fn cut(&mut self, at: u64) {
        let done = self.table.cut(span(at, 4096), SizeSet::ALL, &mut self.stock, |_| {});
        assert!(done.is_ok(), "cut at {at:#x}: {done:?}");
    }

    /// Joins what can be joined.
    #[inline(never)]
    pub(crate) fn merge(&mut self, at: u64, len: u64) {
        let mut gather = Gather::new();
        self.table.merge(span(at, len), SizeSet::ALL, &mut gather, |_| {});
        gather.finish(&self.arena, |_| {});
    }

    /// The leaf that answers for `at`: where it begins, and how long it is.
    pub(crate) fn leaf(&self, at: u64) -> (u64, u64) {
        self.table.leaf_at(Iova::new(at)).map_or((at, 4096), |leaf| (leaf.span().start().get(), leaf.span().len()))
    }

    /// How many leaves the first `len` bytes have.
    pub(crate) fn leaves(&self, len: u64) -> u64 {
        let mut count = 0;
        self.table.leaves(span(0, len), |_| count += 1);
        count
    }

    /// What the tables take, with their links in the arena.
    pub(crate) fn table_bytes(&self) -> u64 {
        u64::from(self.arena.tables_in_use() - self.stock.tables()) * (8 * WORDS_PER_TABLE as u64)
    }
}

/// `len` bytes from `at`, which do not wrap.
#[inline(always)]
pub(crate) fn span(at: u64, len: u64) -> Span<Iova> {
    Span::of(Iova::new(at), Iova::new(at + (len - 1)))
}
