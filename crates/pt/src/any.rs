//! A table whose format is chosen while the program runs. Each call is one branch on the format, which is the same every time, and then
//! the code that was compiled for it.
//!
//! Walk, map and unmap are compiled into their caller for the default format, and are a call away for the others: compiled in for all, they
//! would take more of the caller's registers and code cache, which costs each call more than the choice itself.

use crate::formats::with_formats;
use crate::{Arena, AtomicU64, FormatKind, Gather, Leaf, MapError, NoTable, Perm, Stock, Table, WalkEntry};
use addr::{Iova, Oa, SizeSet, Span};
use alloc::sync::Arc;
use core::ops::Deref;

macro_rules! define_table {
    ([$($(#[$doc:meta])* $kind:ident: $format:ty,)+]) => {
        /// One IO page table in any of the formats; each call is what it is in [`Table`].
        #[derive(Debug)]
        #[non_exhaustive]
        pub enum AnyTable<W: Deref<Target = [AtomicU64]>> {
            $($(#[$doc])* $kind(Table<$format, W>),)+
        }

        impl<W: Deref<Target = [AtomicU64]>> AnyTable<W> {
            /// An empty tree with a top table of the format's first level.
            ///
            /// # Errors
            /// When the arena has no table left.
            pub fn new(format: FormatKind, arena: Arc<Arena<W>>) -> Result<Self, NoTable> {
                match format {
                    $(FormatKind::$kind => Ok(Self::$kind(Table::new(arena)?)),)+
                }
            }

            /// Its format.
            #[inline]
            pub fn format(&self) -> FormatKind {
                match self {
                    $(Self::$kind(_) => FormatKind::$kind,)+
                }
            }
        }
    };
}
with_formats!(define_table!());

/// Evaluates an expression about the table, whatever its format is.
macro_rules! table_of {
    ([$($(#[$doc:meta])* $kind:ident: $format:ty,)+] $self:ident, $table:ident => $body:expr) => {
        match $self {
            $(Self::$kind($table) => $body,)+
        }
    };
}

impl<W: Deref<Target = [AtomicU64]>> AnyTable<W> {
    /// [`Table::arena`].
    #[inline]
    pub fn arena(&self) -> &Arc<Arena<W>> {
        with_formats!(table_of!(self, table => table.arena()))
    }

    /// [`Table::root`].
    #[inline]
    pub fn root(&self) -> (Oa, u8) {
        with_formats!(table_of!(self, table => table.root()))
    }

    /// [`Table::walk`].
    #[inline]
    pub fn walk(&self, iova: Iova) -> Option<Leaf> {
        if let Self::AmdV1(table) = self { table.walk(iova) } else { self.walk_other(iova) }
    }

    #[inline(never)]
    fn walk_other(&self, iova: Iova) -> Option<Leaf> {
        with_formats!(table_of!(self, table => table.walk(iova)))
    }

    /// [`Table::walk_from`].
    #[inline(always)]
    pub fn walk_from(&self, from: Option<WalkEntry>, iova: Iova, keep: impl FnOnce(WalkEntry)) -> Option<Leaf> {
        if let Self::AmdV1(table) = self { table.walk_from(from, iova, keep) } else { self.walk_other_from(from, iova, keep) }
    }

    #[inline(never)]
    fn walk_other_from(&self, from: Option<WalkEntry>, iova: Iova, keep: impl FnOnce(WalkEntry)) -> Option<Leaf> {
        with_formats!(table_of!(self, table => table.walk_from(from, iova, keep)))
    }

    /// [`Table::leaf_at`].
    pub fn leaf_at(&self, iova: Iova) -> Option<Leaf> {
        with_formats!(table_of!(self, table => table.leaf_at(iova)))
    }

    /// [`Table::leaves`].
    pub fn leaves(&self, span: Span<Iova>, visit: impl FnMut(Leaf)) {
        with_formats!(table_of!(self, table => table.leaves(span, visit)));
    }

    /// [`Table::map`].
    ///
    /// # Errors
    /// See [`MapError`].
    #[inline]
    pub fn map(
        &self,
        iova: Span<Iova>,
        oa: Oa,
        perm: Perm,
        sizes: SizeSet,
        stock: &mut Stock<W>,
        gather: &mut Gather,
    ) -> Result<(), MapError> {
        if let Self::AmdV1(table) = self {
            table.map(iova, oa, perm, sizes, stock, gather)
        } else {
            self.map_other(iova, oa, perm, sizes, stock, gather)
        }
    }

    #[inline(never)]
    fn map_other(
        &self,
        iova: Span<Iova>,
        oa: Oa,
        perm: Perm,
        sizes: SizeSet,
        stock: &mut Stock<W>,
        gather: &mut Gather,
    ) -> Result<(), MapError> {
        with_formats!(table_of!(self, table => table.map(iova, oa, perm, sizes, stock, gather)))
    }

    /// [`Table::tables_for_map`].
    pub fn tables_for_map(&self, iova: Span<Iova>) -> u32 {
        with_formats!(table_of!(self, table => table.tables_for_map(iova)))
    }

    /// [`Table::unmap`].
    #[inline]
    pub fn unmap(&self, span: Span<Iova>, gather: &mut Gather) -> Option<Leaf> {
        if let Self::AmdV1(table) = self { table.unmap(span, gather) } else { self.unmap_other(span, gather) }
    }

    #[inline(never)]
    fn unmap_other(&self, span: Span<Iova>, gather: &mut Gather) -> Option<Leaf> {
        with_formats!(table_of!(self, table => table.unmap(span, gather)))
    }

    /// [`Table::cut`].
    ///
    /// # Errors
    /// [`NoTable`].
    pub fn cut(&self, span: Span<Iova>, sizes: SizeSet, stock: &mut Stock<W>, flush: impl FnMut(Span<Iova>)) -> Result<u32, NoTable> {
        with_formats!(table_of!(self, table => table.cut(span, sizes, stock, flush)))
    }

    /// [`Table::tables_for_cut`].
    pub fn tables_for_cut(&self) -> u32 {
        with_formats!(table_of!(self, table => table.tables_for_cut()))
    }

    /// [`Table::merge`].
    pub fn merge(&self, span: Span<Iova>, sizes: SizeSet, gather: &mut Gather, flush: impl FnMut(Span<Iova>)) -> u32 {
        with_formats!(table_of!(self, table => table.merge(span, sizes, gather, flush)))
    }

    /// [`Table::shed`].
    pub fn shed(&self, iova: Iova, gather: &mut Gather) -> Option<Leaf> {
        with_formats!(table_of!(self, table => table.shed(iova, gather)))
    }

    /// [`Table::mark_dirty`].
    pub fn mark_dirty(&self, iova: Iova) -> bool {
        with_formats!(table_of!(self, table => table.mark_dirty(iova)))
    }

    /// [`Table::read_dirty`].
    pub fn read_dirty(&self, span: Span<Iova>, clear: bool, gather: &mut Gather, sink: impl FnMut(Span<Iova>)) {
        with_formats!(table_of!(self, table => table.read_dirty(span, clear, gather, sink)));
    }

    /// Everything that the format can translate.
    pub fn aperture(&self) -> Span<Iova> {
        self.format().aperture()
    }

    /// [`Table::cuts`].
    pub fn cuts(&self) -> u64 {
        with_formats!(table_of!(self, table => table.cuts()))
    }

    /// [`Table::merges`].
    pub fn merges(&self) -> u64 {
        with_formats!(table_of!(self, table => table.merges()))
    }

    /// [`Table::breaks`].
    pub fn breaks(&self) -> u64 {
        with_formats!(table_of!(self, table => table.breaks()))
    }

    /// [`Table::bytes_in_tables`].
    pub fn bytes_in_tables(&self) -> u64 {
        with_formats!(table_of!(self, table => table.bytes_in_tables()))
    }
}
