//! Map: a contiguous stretch of output addresses becomes leaves of the largest sizes that fit.
//!
//! Two passes. The survey looks at every place where a leaf will go and counts the tables that are missing; when it has passed, and the
//! tables are in stock, nothing can fail, so a map never has to be undone. A call that stays in one existing table does both at once.

use crate::arena::{NoTable, Stock, TableId};
use crate::atomic::{AtomicU64, Ordering};
use crate::hide::{breaks, look};
use crate::table::{wipe, write_leaves};
use crate::wide::is_empty;
use crate::{Entry, Format, Gather, Perm, PermSet, Table};
use addr::{Address, Iova, Lg2, Oa, SizeSet, Span};
use core::ops::Deref;
use sync::pause::pause;
use thiserror::Error;

/// Why nothing was mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum MapError {
    /// A translation is already there.
    #[error("{at} is mapped already; unmap it first")]
    Occupied {
        /// The leaf that was met.
        at: Span<Iova>,
    },
    /// IOVA, output address or length is not a multiple of the smallest allowed leaf.
    #[error("{iova} to output address {oa} is not aligned to a page size in {sizes:x?}")]
    Misaligned {
        /// What was to be mapped.
        iova: Span<Iova>,
        /// And to where.
        oa: Oa,
        /// The sizes that were allowed.
        sizes: SizeSet,
    },
    /// The format has no such input or output address.
    #[error("{iova} to output address {oa} is outside what {format} can translate")]
    OutOfRange {
        /// What was to be mapped.
        iova: Span<Iova>,
        /// And to where.
        oa: Oa,
        /// The format's name.
        format: &'static str,
    },
    /// The format cannot say this permission. Its [`PermSet`] has those that it can.
    #[error("{format} has no leaf with permission '{perm:?}'; the nearest that allows as much is '{nearest:?}'")]
    Perm {
        /// What was asked for.
        perm: Perm,
        /// The least that allows it and can be said.
        nearest: Perm,
        /// The format's name.
        format: &'static str,
    },
    /// See [`NoTable`].
    #[error(transparent)]
    NoTable(#[from] NoTable),
}

/// Leaves of one size in one table: what one pass of the inner loop writes.
#[derive(Clone, Copy)]
struct Run {
    at: Iova,
    oa: Oa,
    size: Lg2,
    level: u8,
    leaves: u32,
}

impl Run {
    fn slots<F: Format>(&self) -> (usize, usize) {
        (F::slot(self.at, self.level), (self.leaves as usize) << (self.size.0 - F::item_lg2(self.level)))
    }
}

/// A map call on its way: what is left, and the largest size that IOVA and output address can share.
struct Job {
    at: Iova,
    oa: Oa,
    left: u64,
    sizes: SizeSet,
}

impl Job {
    fn next<F: Format>(&mut self) -> Option<Run> {
        if self.left == 0 {
            return None;
        }
        let fit = |at: u64, left: u64| Lg2((at.trailing_zeros().min(63) as u8).min(63 - left.leading_zeros() as u8));
        let size = self.sizes.up_to(fit(self.at.get(), self.left)).largest()?;
        let level = F::level_of(size);
        let item = F::item_lg2(level);
        // Up to the end of the table, or to where a larger size begins to fit.
        let in_table = ((1 << F::INDEX_LG2) - F::slot(self.at, level) as u64) >> (size.0 - item);
        let mut leaves = (self.left >> size.0).min(in_table);
        let larger = SizeSet(self.sizes.0 & !(u64::MAX >> (63 - size.0)));
        if let Some(larger) = larger.smallest() {
            let boundary = self.at.get().wrapping_neg() & (larger.bytes() - 1);
            if boundary != 0 && boundary < self.left && self.left - boundary >= larger.bytes() {
                leaves = leaves.min(boundary >> size.0);
            }
        }
        let run = Run { at: self.at, oa: self.oa, size, level, leaves: leaves as u32 };
        let bytes = leaves << size.0;
        self.left -= bytes;
        if self.left != 0 {
            (self.at, self.oa) = (self.at.plus(bytes), self.oa.plus(bytes));
        }
        Some(run)
    }
}

/// How far down the tree an address leads.
struct Found {
    table: TableId,
    level: u8,
}

impl<F: Format, W: Deref<Target = [AtomicU64]>> Table<F, W> {
    /// Maps `iova` to the output addresses from `oa` on, with the largest leaves of `sizes` that fit. On an error nothing has changed.
    ///
    /// The caller holds the whole span. Where larger leaves replace empty tables, those tables ride in `gather`.
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
        if F::PERMS != PermSet::ALL && !F::PERMS.has(perm) {
            return Err(Self::unsayable(perm));
        }
        let sizes = sizes.and(F::SIZES);
        if let Some(only) = Self::one_leaf(iova, oa, sizes)
            && let Some(entry) = self.free_slot(only)
        {
            pause();
            // Release, as everywhere: see `write_run`.
            entry.store(F::leaf(only.level, only.size, only.oa, perm) ^ corrupt::<F>(), Ordering::Release);
            return Ok(());
        }
        self.map_runs(Self::job(iova, oa, sizes)?, iova, perm, stock, gather)
    }

    #[cold]
    fn unsayable(perm: Perm) -> MapError {
        MapError::Perm { perm, nearest: F::PERMS.covering(perm).unwrap_or(Perm::RW), format: F::NAME }
    }

    /// The whole call as one leaf that fills one slot, when it is that.
    #[inline(always)]
    fn one_leaf(iova: Span<Iova>, oa: Oa, sizes: SizeSet) -> Option<Run> {
        let mask = iova.last_offset();
        let size = Lg2(mask.trailing_ones() as u8);
        let fits = size.0 < 64 && mask >> size.0 == 0 && sizes.has(size) && (iova.start().get() | oa.get()) & mask == 0;
        if !fits || oa.get() >> F::OUTPUT_LG2 != 0 {
            return None;
        }
        let level = F::level_of(size);
        (size.0 == F::item_lg2(level)).then(|| Run { at: iova.start(), oa, size, level, leaves: 1 })
    }

    /// The general way. Apart, so that a call that maps one leaf saves no registers for it.
    #[inline(never)]
    fn map_runs(&self, mut plan: Job, iova: Span<Iova>, perm: Perm, stock: &mut Stock<W>, gather: &mut Gather) -> Result<(), MapError> {
        let mut job = Job { ..plan };
        // The sizes lead from the smallest up, so there is always a first run.
        if let Some(only) = job.next::<F>().filter(|_| job.left == 0)
            && let Some(entries) = self.free_slots(only)
        {
            write_run::<F>(entries, only, perm, corrupt::<F>());
            return Ok(());
        }
        if breaks::<F>() {
            plan.sizes = self.sizes_beside_tables(&plan, iova)?;
        }
        stock.reserve(self.survey(iova, Job { ..plan })?)?;
        self.grow(iova.last(), 0, stock)?;
        let (mut job, mut corrupt) = (plan, corrupt::<F>());
        while let Some(run) = job.next::<F>() {
            self.install_run(run, perm, corrupt, stock, gather)?;
            corrupt = 0;
        }
        Ok(())
    }

    /// The sizes of leaves that replace no table. A table without leaves may stay from before, and where hardware needs break-before-make a
    /// leaf cannot take its place at once: smaller leaves in the table do.
    fn sizes_beside_tables(&self, plan: &Job, iova: Span<Iova>) -> Result<SizeSet, MapError> {
        let mut sizes = plan.sizes;
        'again: loop {
            let mut job = Job { sizes, ..*plan };
            while let Some(run) = job.next::<F>() {
                let Ok(Some(found)) = self.descend(run.at, run.level) else { continue };
                let (first, slots) = run.slots::<F>();
                let is_table = |entry: &AtomicU64| matches!(F::decode(entry.load(Ordering::Acquire), run.level), Entry::Table(_));
                if found.level == run.level && self.arena.entries(found.table)[first..first + slots].iter().any(is_table) {
                    sizes = sizes.up_to(Lg2(F::item_lg2(run.level) - 1));
                    let smallest = sizes.smallest().ok_or(MapError::Occupied { at: Span::block(run.at, run.size.0) })?;
                    debug_assert!(iova.is_aligned(smallest.0));
                    continue 'again;
                }
            }
            return Ok(sizes);
        }
    }

    /// An upper bound of the tables that mapping `iova` takes, for a caller that must not fail later.
    pub fn tables_for_map(&self, iova: Span<Iova>) -> u32 {
        let below = |level: u8| {
            (iova.last().get() >> (F::item_lg2(level) + F::INDEX_LG2)) - (iova.start().get() >> (F::item_lg2(level) + F::INDEX_LG2)) + 1
        };
        let levels = self.root().1.max(F::START_LEVEL);
        (0..levels).map(|level| below(level).min(u64::from(u32::MAX / 8)) as u32).sum::<u32>()
            + 2 * self.levels_missing(iova.last(), F::MAX_LEVEL)
    }

    fn job(iova: Span<Iova>, oa: Oa, sizes: SizeSet) -> Result<Job, MapError> {
        let in_range = iova.last().get() <= Self::reach(F::MAX_LEVEL)
            && oa.checked_add(iova.last_offset()).is_some_and(|last| last.get() >> F::OUTPUT_LG2 == 0);
        if !in_range {
            return Err(MapError::OutOfRange { iova, oa, format: F::NAME });
        }
        let left = iova.last_offset().wrapping_add(1);
        let shared = (iova.start().get() ^ oa.get()).trailing_zeros().min(63) as u8;
        let smallest = sizes.smallest().filter(|size| shared >= size.0 && iova.is_aligned(size.0) && left != 0);
        smallest.ok_or(MapError::Misaligned { iova, oa, sizes })?;
        Ok(Job { at: iova.start(), oa, left, sizes: sizes.up_to(Lg2(shared)) })
    }

    /// The slots where `run` goes, when their table stands and all of them are empty. Anything else is for the long way.
    fn free_slots(&self, run: Run) -> Option<&[AtomicU64]> {
        let table = self.table_for(run)?;
        let (first, slots) = run.slots::<F>();
        let entries = &self.arena.entries(self.arena.table_at(table)?)[first..first + slots];
        is_empty(entries).then_some(entries)
    }

    /// The same for a run that is one slot.
    #[inline(always)]
    fn free_slot(&self, run: Run) -> Option<&AtomicU64> {
        let entry = self.arena.entry_at(self.table_for(run)?, F::slot(run.at, run.level))?;
        (entry.load(Ordering::Relaxed) == 0).then_some(entry)
    }

    /// The table that a run goes to, when it stands.
    #[inline(always)]
    fn table_for(&self, run: Run) -> Option<Oa> {
        let (mut table, mut level) = self.root();
        if run.at.get() > Self::reach(level) || level < run.level {
            return None;
        }
        while level > run.level {
            let entry = self.arena.entry_at(table, F::slot(run.at, level))?.load(Ordering::Acquire);
            let Entry::Table(below) = F::decode(entry, level) else { return None };
            (table, level) = (below, level - 1);
        }
        Some(table)
    }

    /// The lowest table on the way to `at`, no lower than `level`. `None` when the tree does not reach that far; an error when a leaf or a
    /// corrupted pointer is in the way.
    #[inline]
    fn descend(&self, at: Iova, to: u8) -> Result<Option<Found>, MapError> {
        let (top, mut level) = self.root();
        if at.get() > Self::reach(level) || level < to {
            return Ok(None);
        }
        let occupied = |level| MapError::Occupied { at: Span::block(at, F::item_lg2(level)) };
        let mut table = self.arena.table_at(top).ok_or(occupied(level))?;
        while level > to {
            let entry = self.arena.entries(table)[F::slot(at, level)].load(Ordering::Acquire);
            match look::<F>(entry, level) {
                Entry::Absent => break,
                Entry::Table(below) => {
                    table = self.arena.table_at(below).ok_or(occupied(level))?;
                    level -= 1;
                }
                Entry::Leaf { size, .. } => return Err(MapError::Occupied { at: Span::block(at, size.0) }),
            }
        }
        Ok(Some(Found { table, level }))
    }

    /// Looks at every place where a leaf will go; answers how many tables are missing.
    fn survey(&self, iova: Span<Iova>, mut job: Job) -> Result<u32, MapError> {
        let mut missing = 0;
        let mut highest = 0;
        let mut before: Option<Iova> = None;
        while let Some(run) = job.next::<F>() {
            highest = run.level.max(highest);
            let top = self.root().1.max(run.level);
            match self.descend(run.at, run.level)? {
                Some(found) if found.level == run.level => self.check_free(found.table, run)?,
                found => {
                    if found.is_none() {
                        // The tree is lower than the leaf will be; all of it may end up below that leaf.
                        let bytes = u64::from(run.leaves - 1) << run.size.0 | (run.size.bytes() - 1);
                        self.check_no_leaf(Span::of(run.at, run.at.plus(bytes)))?;
                    }
                    // A table counts once, for the first run in it.
                    let from = found.map_or(top, |found| found.level);
                    let counted = |level: u8| {
                        let covers = F::item_lg2(level) + F::INDEX_LG2;
                        before.is_some_and(|before| covers >= 64 || before.get() >> covers == run.at.get() >> covers)
                    };
                    missing += (run.level..from).filter(|level| !counted(*level)).count() as u32;
                }
            }
            before = Some(run.at);
        }
        // New levels on top, and under them the way down to what the old top does not reach.
        Ok(missing + 2 * self.levels_missing(iova.last(), highest))
    }

    /// Every slot of the run is absent, or holds a table without a single leaf.
    #[inline]
    fn check_free(&self, table: TableId, run: Run) -> Result<(), MapError> {
        let (first, slots) = run.slots::<F>();
        let entries = &self.arena.entries(table)[first..first + slots];
        if is_empty(entries) {
            return Ok(());
        }
        for (index, entry) in entries.iter().enumerate() {
            let at = Iova::new(run.at.get() + ((index as u64) << F::item_lg2(run.level)));
            match look::<F>(entry.load(Ordering::Acquire), run.level) {
                Entry::Absent => {}
                Entry::Leaf { size, .. } => return Err(MapError::Occupied { at: Span::block(at, size.0) }),
                Entry::Table(_) => self.check_no_leaf(Span::block(at, F::item_lg2(run.level)))?,
            }
        }
        Ok(())
    }

    fn check_no_leaf(&self, span: Span<Iova>) -> Result<(), MapError> {
        let mut met = None;
        self.leaves(span, |leaf| met = met.or(Some(leaf.span())));
        met.map_or(Ok(()), |at| Err(MapError::Occupied { at }))
    }

    fn install_run(&self, run: Run, perm: Perm, corrupt: u64, stock: &mut Stock<W>, gather: &mut Gather) -> Result<(), MapError> {
        loop {
            let Some(found) = self.descend(run.at, run.level)? else {
                self.grow(run.at, run.level, stock)?;
                continue;
            };
            if found.level == run.level {
                self.retire_empty(found.table, run, gather);
                let (first, slots) = run.slots::<F>();
                write_run::<F>(&self.arena.entries(found.table)[first..first + slots], run, perm, corrupt);
                return Ok(());
            }
            if self.hang_chain(&found, run, perm, corrupt, stock)? {
                return Ok(());
            }
        }
    }

    /// Builds the missing tables from the leaf's up, complete, and publishes them by one store (I-2). `false` when somebody else was first.
    fn hang_chain(&self, found: &Found, run: Run, perm: Perm, corrupt: u64, stock: &mut Stock<W>) -> Result<bool, MapError> {
        let mut below = stock.take()?;
        let (first, slots) = run.slots::<F>();
        let entries = self.arena.entries(below);
        wipe(&entries[..first]);
        write_run::<F>(&entries[first..first + slots], run, perm, corrupt);
        wipe(&entries[first + slots..]);
        for level in run.level + 1..found.level {
            let above = stock.take()?;
            let entries = self.arena.entries(above);
            wipe(entries);
            entries[F::slot(run.at, level)].store(F::table(level, self.arena.oa_of(below)), Ordering::Relaxed);
            below = above;
        }
        let entry = &self.arena.entries(found.table)[F::slot(run.at, found.level)];
        let pointer = F::table(found.level, self.arena.oa_of(below));
        pause();
        let seen = entry.load(Ordering::Relaxed);
        let absent = look::<F>(seen, found.level) == Entry::Absent;
        if absent && entry.compare_exchange(seen, pointer, Ordering::Release, Ordering::Relaxed).is_ok() {
            return Ok(true);
        }
        // The loser takes its chain apart again.
        for level in (run.level + 1..found.level).rev() {
            let next = self.children(below, level).next();
            stock.put(below);
            let Some(next) = next else { return Ok(false) };
            below = next;
        }
        stock.put(below);
        Ok(false)
    }

    /// Takes empty tables out of the slots where leaves are about to go.
    fn retire_empty(&self, table: TableId, run: Run, gather: &mut Gather) {
        if run.level == 0 {
            return;
        }
        let (first, slots) = run.slots::<F>();
        for (index, entry) in self.arena.entries(table)[first..first + slots].iter().enumerate() {
            if let Entry::Table(below) = F::decode(entry.load(Ordering::Acquire), run.level) {
                pause();
                entry.store(0, Ordering::Relaxed);
                if let Some(below) = self.arena.table_at(below) {
                    let item = F::item_lg2(run.level);
                    self.retire_tree(below, run.level - 1, Span::block(run.at.plus((index as u64) << item), item), gather);
                }
            }
        }
    }
}

/// What a planted fault changes in the first leaf of a map; nothing otherwise.
#[inline(always)]
fn corrupt<F: Format>() -> u64 {
    if sync::fail::planted("pt.corrupt_leaf") { F::step(Lg2(F::GRANULE_LG2)) } else { 0 }
}

/// Writes a run's leaves. Release: a device that sees a leaf sees what was done to its page before.
#[inline(always)]
fn write_run<F: Format>(entries: &[AtomicU64], run: Run, perm: Perm, corrupt: u64) {
    let leaf = F::leaf(run.level, run.size, run.oa, perm);
    write_leaves::<F>(entries, run.level, run.size, leaf);
    if corrupt != 0 {
        let slots = 1 << (run.size.0 - F::item_lg2(run.level));
        write_leaves::<F>(&entries[..slots], run.level, run.size, leaf ^ corrupt);
    }
}
