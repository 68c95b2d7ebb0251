//! Page tables alone, as the kernel's own benchmark takes them: without invalidation and without grace, in memory that was touched before, in
//! a live table. The rows named `flush` add both, to show what a reader costs a writer.

mod flush;
mod plain;

use crate::tree::{Edit, OA, Tree, TreeOf};
use crate::{Error, Row, Unit, Work, batches, choices, timed};
use addr::{Lg2, SizeSet};
use backing::Words;
use flush::{Flushing, Reader};
use pt::{Format, FormatKind, FormatVisitor, Table};
use std::hint::black_box;

const K4: u64 = 4 << 10;
const K64: u64 = 64 << 10;
const M1: u64 = 1 << 20;
const M2: u64 = 2 << 20;
const G1: u64 = 1 << 30;
const PAGES: u64 = G1 / K4;
/// Pages of a list, and how many lists lie side by side.
const LIST: u64 = 256;
const LISTS: u64 = 16;
/// Tables for 1 GiB in 4 KiB leaves, and some to spare.
const TABLES: usize = 1100;
const SMALL: SizeSet = SizeSet::only(Lg2::K4);
/// Where rows map; 64 GiB aligned, and within the 38 bits of the narrowest format.
const AT: u64 = 1 << 36;

macro_rules! row {
    ($name:literal, $unit:expr, $make:expr) => {
        Row { name: $name, format: "amdv1", unit: $unit, kind: FormatKind::AmdV1, make: $make }
    };
}

/// Its rows: those of the kernel's figures ([`Row::kernel`]) first.
pub fn rows() -> Vec<Row> {
    let one = Unit::Call;
    let pages = Unit::Page(PAGES);
    let list = Unit::Page(LIST);
    let mut rows = vec![
        row!("map_4k", one, |format| PAGE.map(format)),
        row!("unmap_4k", one, |format| PAGE.unmap(format)),
        row!("map_16x4k", one, |format| Calls { len: K64, sizes: SMALL, batch: 64 }.map(format)),
        row!("map_256x4k", one, |format| MIB.map(format)),
        row!("unmap_256x4k", one, |format| MIB.unmap(format)),
        row!("map_256x4k_sized", one, |format| Calls { sizes: SizeSet::ALL, ..MIB }.map(format)),
        row!("unmap_256x4k_sized", one, |format| Calls { sizes: SizeSet::ALL, ..MIB }.unmap(format)),
        row!("map_list_256", list, map_list),
        row!("unmap_list_256", list, unmap_list),
        row!("map_2m", one, |format| LARGE.map(format)),
        row!("unmap_2m", one, |format| LARGE.unmap(format)),
        row!("map_1g", one, |format| HUGE.map(format)),
        row!("unmap_1g", one, |format| HUGE.unmap(format)),
        row!("walk_hot_4k", one, |format| walk::<Any>(format, SMALL, &hot_pages())),
        row!("walk_random_4k", one, |format| walk::<Any>(format, SMALL, &random_pages())),
        row!("walk_1g_leaf", one, |format| walk::<Any>(format, SizeSet::ALL, &random_pages())),
        row!("map_1g_as_4k", pages, |format| map_1g_as_4k(format, Tables::Allocated)),
        row!("map_1g_as_4k_present", pages, |format| map_1g_as_4k(format, Tables::Present)),
        row!("map_1g_as_4k_fresh", pages, map_1g_as_4k_fresh),
        row!("unmap_1g_as_4k", pages, unmap_1g_as_4k),
        row!("map_1g_scattered", pages, map_1g_scattered),
        row!("map_4k_typed", one, |format| format.visit(Typed(format, Call::Map))),
        row!("unmap_4k_typed", one, |format| format.visit(Typed(format, Call::Unmap))),
        row!("walk_hot_4k_typed", one, |format| format.visit(Typed(format, Call::Walk))),
        row!("cut_4k_in_1g", one, cut_4k_in_1g),
        row!("merge_1g", one, merge_1g),
        row!("map_4k_flush_idle", one, |format| Flushing::map(format, PAGE, Reader::Idle)),
        row!("map_4k_flush_busy", one, |format| Flushing::map(format, PAGE, Reader::Busy)),
        row!("unmap_4k_flush_none", one, |format| Flushing::unmap(format, PAGE, Reader::None)),
        row!("unmap_4k_flush_idle", one, |format| Flushing::unmap(format, PAGE, Reader::Idle)),
        row!("unmap_4k_flush_busy", one, |format| Flushing::unmap(format, PAGE, Reader::Busy)),
        row!("unmap_256x4k_flush_idle", one, |format| Flushing::unmap(format, MIB, Reader::Idle)),
        row!("unmap_256x4k_flush_busy", one, |format| Flushing::unmap(format, MIB, Reader::Busy)),
        row!("unmap_2m_flush_idle", one, |format| Flushing::unmap(format, LARGE, Reader::Idle)),
        row!("unmap_2m_flush_busy", one, |format| Flushing::unmap(format, LARGE, Reader::Busy)),
        row!("unmap_1g_flush_idle", one, |format| Flushing::unmap(format, HUGE, Reader::Idle)),
        row!("unmap_1g_flush_busy", one, |format| Flushing::unmap(format, HUGE, Reader::Busy)),
    ];
    rows.extend(plain::rows());
    rows
}

/// What a program uses, whose format is chosen while it runs.
type Any = iommu::IoTable;

const PAGE: Calls = Calls { len: K4, sizes: SMALL, batch: 256 };
const MIB: Calls = Calls { len: M1, sizes: SMALL, batch: 16 };
const LARGE: Calls = Calls { len: M2, sizes: SizeSet::ALL, batch: 256 };
const HUGE: Calls = Calls { len: G1, sizes: SizeSet::ALL, batch: 128 };

/// Calls of one length, side by side, into tables that are there.
#[derive(Clone, Copy)]
struct Calls {
    len: u64,
    sizes: SizeSet,
    batch: u64,
}

impl Calls {
    fn map(self, format: FormatKind) -> Result<Box<dyn Work>, Error> {
        self.map_in::<Any>(format)
    }

    fn unmap(self, format: FormatKind) -> Result<Box<dyn Work>, Error> {
        self.unmap_in::<Any>(format)
    }

    fn map_in<T: Edit>(self, format: FormatKind) -> Result<Box<dyn Work>, Error> {
        let mut tree = TreeOf::<T>::new(format, TABLES, true)?;
        Ok(Box::new(move |times| {
            batches(&mut tree, times, self.batch, |_, _| {}, |tree, now| self.map_all(tree, now), |tree, now| self.unmap_all(tree, now))
        }))
    }

    fn unmap_in<T: Edit>(self, format: FormatKind) -> Result<Box<dyn Work>, Error> {
        let mut tree = TreeOf::<T>::new(format, TABLES, true)?;
        Ok(Box::new(move |times| {
            batches(&mut tree, times, self.batch, |tree, now| self.map_all(tree, now), |tree, now| self.unmap_all(tree, now), |_, _| {})
        }))
    }

    fn map_all<T: Edit>(self, tree: &mut TreeOf<T>, count: u64) {
        for at in (0..count).map(|index| index * self.len) {
            tree.map(black_box(AT + at), self.len, OA + at, self.sizes);
        }
    }

    fn unmap_all<T: Edit>(self, tree: &mut TreeOf<T>, count: u64) {
        for at in (0..count).map(|index| index * self.len) {
            tree.unmap(black_box(AT + at), self.len);
        }
    }
}

/// The same calls where the format is known when the code is compiled: what is left of the choice at run time.
struct Typed(FormatKind, Call);

enum Call {
    Map,
    Unmap,
    Walk,
}

impl FormatVisitor for Typed {
    type Output = Result<Box<dyn Work>, Error>;

    fn visit<F: Format>(self) -> Self::Output {
        let Self(format, call) = self;
        match call {
            Call::Map => PAGE.map_in::<Table<F, Words>>(format),
            Call::Unmap => PAGE.unmap_in::<Table<F, Words>>(format),
            Call::Walk => walk::<Table<F, Words>>(format, SMALL, &hot_pages()),
        }
    }
}

/// Where page `index` of a scattered GiB lies.
fn scattered(index: u64) -> u64 {
    OA + index * 7919 % PAGES * K4
}

fn map_scattered(tree: &mut Tree, first: u64, count: u64) {
    for page in first..first + count {
        tree.map(black_box(AT + page * K4), K4, scattered(page), SMALL);
    }
}

/// A list of pages in no order, as a driver gets it: one call a page.
fn map_list(format: FormatKind) -> Result<Box<dyn Work>, Error> {
    let mut tree = Tree::new(format, TABLES, true)?;
    Ok(Box::new(move |times| {
        let undo = |tree: &mut Tree, lists| tree.unmap(AT, lists * LIST * K4);
        batches(&mut tree, times, LISTS, |_, _| {}, |tree, lists| map_scattered(tree, 0, lists * LIST), undo)
    }))
}

/// Such a list taken out by one call.
fn unmap_list(format: FormatKind) -> Result<Box<dyn Work>, Error> {
    let mut tree = Tree::new(format, TABLES, true)?;
    Ok(Box::new(move |times| {
        let unmap = |tree: &mut Tree, lists| (0..lists).for_each(|list| tree.unmap(black_box(AT + list * LIST * K4), LIST * K4));
        batches(&mut tree, times, LISTS, |tree, lists| map_scattered(tree, 0, lists * LIST), unmap, |_, _| {})
    }))
}

fn map_1g_scattered(format: FormatKind) -> Result<Box<dyn Work>, Error> {
    let mut tree = Tree::new(format, TABLES, true)?;
    Ok(Box::new(move |times| {
        batches(&mut tree, times, 1, |_, _| {}, |tree, _| map_scattered(tree, 0, PAGES), |tree, _| tree.unmap(AT, G1))
    }))
}

/// What a map of 1 GiB finds.
#[derive(Clone, Copy, PartialEq)]
enum Tables {
    /// No tables: they come out of the arena, whose memory was touched.
    Allocated,
    /// All tables, empty.
    Present,
}

fn map_1g_as_4k(format: FormatKind, tables: Tables) -> Result<Box<dyn Work>, Error> {
    let mut tree = Tree::new(format, TABLES, true)?;
    Ok(Box::new(move |times| {
        let undo = |tree: &mut Tree, _| match tables {
            Tables::Allocated => tree.unmap(AT, G1),
            // By halves of a table, so that no table goes.
            Tables::Present => (0..G1 / M1).for_each(|half| tree.unmap(AT + half * M1, M1)),
        };
        batches(&mut tree, times, 1, |_, _| {}, |tree, _| tree.map(black_box(AT), G1, OA, SMALL), undo)
    }))
}

fn map_1g_as_4k_fresh(format: FormatKind) -> Result<Box<dyn Work>, Error> {
    let mut tree = None;
    Ok(Box::new(move |times| {
        // Without memory there is no tree, and the map that expects one says so.
        let make = |tree: &mut Option<Tree>, _| *tree = Tree::new(format, TABLES, false).ok();
        let map = |tree: &mut Option<Tree>, _| tree.as_mut().expect("address space for a tree").map(black_box(AT), G1, OA, SMALL);
        batches(&mut tree, times, 1, make, map, |tree, _| *tree = None)
    }))
}

fn unmap_1g_as_4k(format: FormatKind) -> Result<Box<dyn Work>, Error> {
    let mut tree = Tree::new(format, TABLES, true)?;
    Ok(Box::new(move |times| {
        let map = |tree: &mut Tree, _| tree.map(AT, G1, OA, SMALL);
        batches(&mut tree, times, 1, map, |tree, _| tree.unmap(black_box(AT), G1), |_, _| {})
    }))
}

fn hot_pages() -> Vec<u64> {
    (0..512).map(|page| page * K4 + page).collect()
}

fn random_pages() -> Vec<u64> {
    choices(4096, PAGES).into_iter().map(|page| page * K4).collect()
}

/// Walks of `offsets` in turn, in 1 GiB that is mapped with `sizes`, pages in no order where they are small.
fn walk<T: Edit>(format: FormatKind, sizes: SizeSet, offsets: &[u64]) -> Result<Box<dyn Work>, Error> {
    let mut tree = TreeOf::<T>::new(format, TABLES, true)?;
    if sizes == SMALL {
        (0..PAGES).for_each(|page| tree.map(AT + page * K4, K4, scattered(page), SMALL));
    } else {
        tree.map(AT, G1, OA, sizes);
    }
    let at: Vec<u64> = offsets.iter().map(|offset| AT + offset).collect();
    Ok(Box::new(move |times: u64| {
        timed(|| {
            let mut at = at.iter().cycle();
            for _ in 0..times {
                let at = at.next().copied().unwrap_or(AT);
                black_box(tree.walk(at));
            }
        })
    }))
}

const CUT_AT: u64 = AT + 0x1234_5000;

fn cut_4k_in_1g(format: FormatKind) -> Result<Box<dyn Work>, Error> {
    let mut tree = Tree::new(format, TABLES, true)?;
    tree.map(AT, G1, OA, SizeSet::ALL);
    Ok(Box::new(move |times| {
        batches(&mut tree, times, 1, |tree, _| tree.stock(4), |tree, _| tree.cut(black_box(CUT_AT)), |tree, _| tree.merge(AT, G1))
    }))
}

fn merge_1g(format: FormatKind) -> Result<Box<dyn Work>, Error> {
    let mut tree = Tree::new(format, TABLES, true)?;
    tree.map(AT, G1, OA, SizeSet::ALL);
    Ok(Box::new(move |times| batches(&mut tree, times, 1, |tree, _| tree.cut(CUT_AT), |tree, _| tree.merge(black_box(AT), G1), |_, _| {})))
}
