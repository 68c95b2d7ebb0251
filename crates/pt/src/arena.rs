//! Memory in which tables live: one slice of words, a table at every multiple of its size, and a free list that needs no memory of its own.
//!
//! The list's links stand beside the tables, never in them: a reader inside a guard may still look at a retired table. There is a list for
//! each of a few threads ([`sync::shard`]), so that threads that work on disjoint spans do not meet here: each takes fresh tables some at a
//! time, gets back what it gave, and looks into the others' lists when there is nothing else.

use crate::atomic::{AtomicU32, AtomicU64, Ordering};
use addr::{Address, Oa};
use alloc::sync::Arc;
use core::fmt;
use core::ops::Deref;
use sync::shard::{SHARDS, Sharded};
use thiserror::Error;

/// No table is left in the arena, or the caller's fail plan said so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("no page-table memory left: all {capacity} tables of the arena are in use; make the arena larger")]
pub struct NoTable {
    /// Tables that the arena holds.
    pub capacity: u32,
}

/// A table by its index in the arena.
pub(crate) type TableId = u32;
const NONE: TableId = TableId::MAX;
/// Link of a table that is in no list: someone took it to install it.
const TAKEN: u64 = u64::MAX;

/// Fresh tables that a thread takes at a time: as many as have their links on two cache lines.
const FRESH: u32 = if SHARDS == 1 { 1 } else { 16 };

/// The tables of any number of trees, in one slice of zeroed words. `W` owns the words: an anonymous mapping, or a box in tests.
pub struct Arena<W> {
    words: W,
    base: Oa,
    words_lg2: u8,
    capacity: u32,
    shelves: Sharded<Shelf>,
    /// Tables below this have been handed out before.
    fresh: AtomicU32,
}

/// One thread's part of the free tables.
#[derive(Debug)]
struct Shelf {
    /// Head of a list, and a tag against ABA in the upper half.
    free: AtomicU64,
    /// Tables taken here, less those given back here. A table may be given back to another shelf, so only the sum says something.
    used: AtomicU32,
}

impl<W: Deref<Target = [AtomicU64]>> Arena<W> {
    /// An arena of tables of `1 << words_lg2` entries, over `words`, all zero. Table addresses count up from `base`, a simulated system
    /// physical address, aligned to a table.
    pub fn new(words: W, base: Oa, words_lg2: u8) -> Arc<Self> {
        assert!(base.is_aligned(words_lg2 + 3), "arena base {base} is not aligned to a table");
        let capacity = words.len() / ((1 << words_lg2) + 1);
        Arc::new(Self {
            words,
            base,
            words_lg2,
            capacity: capacity.min(NONE as usize - 1) as u32,
            shelves: Sharded::new(|| Shelf { free: AtomicU64::new(u64::from(NONE)), used: AtomicU32::new(0) }),
            fresh: AtomicU32::new(0),
        })
    }

    /// Tables handed out and not given back, those in a [`Stock`] included.
    pub fn tables_in_use(&self) -> u32 {
        self.shelves.all().fold(0, |sum, shelf| sum.wrapping_add(shelf.used.load(Ordering::Relaxed)))
    }

    /// Tables that fit.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Size of one table.
    pub fn table_bytes(&self) -> u64 {
        8 << self.words_lg2
    }

    /// One word of table memory by its simulated physical address, as any outsider can read it; `None` outside the arena.
    pub fn peek(&self, at: Oa) -> Option<u64> {
        self.locate(at).map(|word| word.load(Ordering::Acquire))
    }

    /// Overwrites one word of table memory behind the algorithm's back: for planted faults and for tests of those who look for them.
    pub fn poke(&self, at: Oa, value: u64) -> bool {
        self.locate(at).map(|word| word.store(value, Ordering::Release)).is_some()
    }

    /// Whether the table at `at` was taken to be installed and neither retired nor put back since: only such may be pointed to.
    /// For audits; of a table that is on its way the answer may be late.
    pub fn is_taken(&self, at: Oa) -> bool {
        at.is_aligned(self.words_lg2 + 3)
            && at >= self.base
            && self.table_at(at).is_some_and(|table| self.link(table).load(Ordering::Relaxed) == TAKEN)
    }

    fn locate(&self, at: Oa) -> Option<&AtomicU64> {
        let offset = at.get().checked_sub(self.base.get())?;
        let inside = offset % 8 == 0 && offset >> (self.words_lg2 + 3) < u64::from(self.capacity);
        inside.then(|| self.words.get((offset / 8) as usize)).flatten()
    }

    /// The table that begins at `oa`, unless the pointer was corrupted.
    #[inline(always)]
    pub(crate) fn table_at(&self, oa: Oa) -> Option<TableId> {
        let index = oa.get().wrapping_sub(self.base.get()) >> (self.words_lg2 + 3);
        (index < u64::from(self.capacity)).then_some(index as TableId)
    }

    #[inline(always)]
    pub(crate) fn oa_of(&self, table: TableId) -> Oa {
        Oa::new(self.base.get() + (u64::from(table) << (self.words_lg2 + 3)))
    }

    /// The entries of a table.
    #[inline(always)]
    pub(crate) fn entries(&self, table: TableId) -> &[AtomicU64] {
        let first = (table as usize) << self.words_lg2;
        &self.words[first..first + (1 << self.words_lg2)]
    }

    /// Entry `slot` of the table at `oa`; one check covers a corrupted pointer.
    #[inline(always)]
    pub(crate) fn entry_at(&self, table: Oa, slot: usize) -> Option<&AtomicU64> {
        let index = (table.get().wrapping_sub(self.base.get()) >> 3) as usize;
        self.words.get(index.wrapping_add(slot))
    }

    fn link(&self, table: TableId) -> &AtomicU64 {
        &self.words[((self.capacity as usize) << self.words_lg2) + table as usize]
    }

    fn pop(&self) -> Result<TableId, NoTable> {
        let own = self.shelves.mine();
        let table = match self.pop_from(own) {
            Some(table) => table,
            None => self.pop_elsewhere(own).ok_or(NoTable { capacity: self.capacity })?,
        };
        own.used.fetch_add(1, Ordering::Relaxed);
        Ok(table)
    }

    fn pop_from(&self, shelf: &Shelf) -> Option<TableId> {
        let mut head = shelf.free.load(Ordering::Acquire);
        while head as TableId != NONE {
            let next = self.link(head as TableId).load(Ordering::Relaxed);
            let tagged = ((head >> 32).wrapping_add(1) << 32) | (next & u64::from(TableId::MAX));
            match shelf.free.compare_exchange_weak(head, tagged, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Some(head as TableId),
                Err(now) => head = now,
            }
        }
        None
    }

    /// A table that nobody has had, with some more for the shelf, or one of another shelf.
    #[cold]
    fn pop_elsewhere(&self, own: &Shelf) -> Option<TableId> {
        let mut first = self.fresh.load(Ordering::Relaxed);
        while first < self.capacity {
            let left = self.capacity - first;
            // Towards the end one by one, so that none is on its way to a shelf when another thread asks for the last.
            let taken = if left > 2 * SHARDS as u32 * FRESH { FRESH - first % FRESH } else { 1 };
            match self.fresh.compare_exchange_weak(first, first + taken, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => {
                    let mut more = List::new();
                    (first + 1..first + taken).rev().for_each(|table| more.push(self, table));
                    self.shelve(own, &mut more);
                    return Some(first);
                }
                Err(now) => first = now,
            }
        }
        self.shelves.all().find_map(|shelf| self.pop_from(shelf))
    }

    /// Gives a whole list back.
    pub(crate) fn splice(&self, list: &mut List) {
        let own = self.shelves.mine();
        let count = self.shelve(own, list);
        own.used.fetch_sub(count, Ordering::Relaxed);
    }

    /// Empties a list into a shelf; answers how many tables were in it.
    fn shelve(&self, shelf: &Shelf, list: &mut List) -> u32 {
        let Some((first, last, count)) = list.take_all() else { return 0 };
        let mut head = shelf.free.load(Ordering::Relaxed);
        loop {
            self.link(last).store(head & u64::from(TableId::MAX), Ordering::Relaxed);
            let tagged = ((head >> 32).wrapping_add(1) << 32) | u64::from(first);
            match shelf.free.compare_exchange_weak(head, tagged, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return count,
                Err(now) => head = now,
            }
        }
    }
}

impl<W> fmt::Debug for Arena<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arena").field("base", &self.base).field("capacity", &self.capacity).finish_non_exhaustive()
    }
}

/// Tables strung together through the arena's links.
#[derive(Debug)]
pub(crate) struct List {
    first: TableId,
    last: TableId,
    count: u32,
}

impl List {
    pub(crate) const fn new() -> Self {
        Self { first: NONE, last: NONE, count: 0 }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub(crate) fn push<W: Deref<Target = [AtomicU64]>>(&mut self, arena: &Arena<W>, table: TableId) {
        arena.link(table).store(u64::from(self.first), Ordering::Relaxed);
        if self.count == 0 {
            self.last = table;
        }
        self.first = table;
        self.count += 1;
    }

    fn pop<W: Deref<Target = [AtomicU64]>>(&mut self, arena: &Arena<W>) -> Option<TableId> {
        let table = (self.count != 0).then_some(self.first)?;
        self.first = arena.link(table).load(Ordering::Relaxed) as TableId;
        self.count -= 1;
        Some(table)
    }

    fn take_all(&mut self) -> Option<(TableId, TableId, u32)> {
        let all = (self.count != 0).then_some((self.first, self.last, self.count));
        *self = Self::new();
        all
    }
}

/// Tables taken from the arena before they are needed, so that what follows cannot fail for want of one. What is left over goes back when
/// the stock is dropped.
#[derive(Debug)]
pub struct Stock<W: Deref<Target = [AtomicU64]>> {
    arena: Arc<Arena<W>>,
    list: List,
}

impl<W: Deref<Target = [AtomicU64]>> Stock<W> {
    /// An empty stock.
    pub fn new(arena: &Arc<Arena<W>>) -> Self {
        Self { arena: Arc::clone(arena), list: List::new() }
    }

    /// Makes sure that at least `tables` are in the stock. A fallible step of the fail plans, named `pt.table`.
    ///
    /// # Errors
    /// When the arena is exhausted; what was taken so far stays in the stock.
    pub fn reserve(&mut self, tables: u32) -> Result<(), NoTable> {
        while self.list.count < tables {
            if sync::fail::step("pt.table").is_err() {
                return Err(NoTable { capacity: self.arena.capacity });
            }
            let table = self.arena.pop()?;
            self.list.push(&self.arena, table);
        }
        Ok(())
    }

    /// Tables in the stock.
    pub fn tables(&self) -> u32 {
        self.list.count
    }

    pub(crate) fn take(&mut self) -> Result<TableId, NoTable> {
        if self.list.is_empty() {
            self.reserve(1)?;
        }
        let table = self.list.pop(&self.arena).ok_or(NoTable { capacity: self.arena.capacity })?;
        self.arena.link(table).store(TAKEN, Ordering::Relaxed);
        Ok(table)
    }

    pub(crate) fn put(&mut self, table: TableId) {
        self.list.push(&self.arena, table);
    }
}

impl<W: Deref<Target = [AtomicU64]>> Drop for Stock<W> {
    fn drop(&mut self) {
        if !self.list.is_empty() {
            self.arena.splice(&mut self.list);
        }
    }
}
