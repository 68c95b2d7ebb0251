//! Page tables alone, as the kernel's own benchmark takes them: without invalidation and without grace, in memory that was touched before, in
//! a live table. The rows named `flush` add both, to show what a reader costs a writer.

use crate::tree::{OA, Tree, span};
use crate::{Error, Row, Unit, Work, batches, choices, in_format, timed};
use addr::{Iova, Lg2, Oa, SizeSet};
use iommu::{Config, Domain, Iommu, SystemRmp};
use pt::{FormatKind, Gather, Perm, Stock};
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

const K4: u64 = 4 << 10;
const M1: u64 = 1 << 20;
const M2: u64 = 2 << 20;
const G1: u64 = 1 << 30;
const PAGES: u64 = G1 / K4;
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

/// Its rows.
pub fn rows() -> Vec<Row> {
    let one = Unit::Call;
    let pages = Unit::Page(PAGES);
    vec![
        row!("map_4k", one, |format| Calls { len: K4, sizes: SMALL, batch: 256 }.map(format)),
        row!("unmap_4k", one, |format| Calls { len: K4, sizes: SMALL, batch: 256 }.unmap(format)),
        row!("map_256x4k", one, |format| Calls { len: M1, sizes: SMALL, batch: 16 }.map(format)),
        row!("unmap_256x4k", one, |format| Calls { len: M1, sizes: SMALL, batch: 16 }.unmap(format)),
        row!("map_256x4k_sized", one, |format| Calls { len: M1, sizes: SizeSet::ALL, batch: 16 }.map(format)),
        row!("unmap_256x4k_sized", one, |format| Calls { len: M1, sizes: SizeSet::ALL, batch: 16 }.unmap(format)),
        row!("map_2m", one, |format| Calls { len: M2, sizes: SizeSet::ALL, batch: 256 }.map(format)),
        row!("unmap_2m", one, |format| Calls { len: M2, sizes: SizeSet::ALL, batch: 256 }.unmap(format)),
        row!("map_1g", one, |format| Calls { len: G1, sizes: SizeSet::ALL, batch: 128 }.map(format)),
        row!("unmap_1g", one, |format| Calls { len: G1, sizes: SizeSet::ALL, batch: 128 }.unmap(format)),
        row!("map_1g_as_4k", pages, |format| map_1g_as_4k(format, Tables::Allocated)),
        row!("map_1g_as_4k_present", pages, |format| map_1g_as_4k(format, Tables::Present)),
        row!("map_1g_as_4k_fresh", pages, |format| map_1g_as_4k_fresh(format)),
        row!("unmap_1g_as_4k", pages, |format| unmap_1g_as_4k(format,)),
        row!("walk_hot_4k", one, |format| walk(format, SMALL, &(0..512).map(|page| page * K4 + page).collect::<Vec<_>>())),
        row!("walk_random_4k", one, |format| walk(format, SMALL, &random_pages())),
        row!("walk_1g_leaf", one, |format| walk(format, SizeSet::ALL, &random_pages())),
        row!("cut_4k_in_1g", one, |format| cut_4k_in_1g(format)),
        row!("merge_1g", one, |format| merge_1g(format)),
        row!("unmap_4k_flush_idle", one, |format| Flushing::work(format, false)),
        row!("unmap_4k_flush_busy_reader", one, |format| Flushing::work(format, true)),
    ]
}

/// Calls of one length, side by side, into tables that are there.
#[derive(Clone, Copy)]
struct Calls {
    len: u64,
    sizes: SizeSet,
    batch: u64,
}

impl Calls {
    fn map(self, format: FormatKind) -> Result<Box<dyn Work>, Error> {
        let mut tree = Tree::new(format, TABLES, true)?;
        Ok(Box::new(move |times| {
            batches(&mut tree, times, self.batch, |_, _| {}, |tree, now| self.map_all(tree, now), |tree, now| self.unmap_all(tree, now))
        }))
    }

    fn unmap(self, format: FormatKind) -> Result<Box<dyn Work>, Error> {
        let mut tree = Tree::new(format, TABLES, true)?;
        Ok(Box::new(move |times| {
            batches(&mut tree, times, self.batch, |tree, now| self.map_all(tree, now), |tree, now| self.unmap_all(tree, now), |_, _| {})
        }))
    }

    fn map_all(self, tree: &mut Tree, count: u64) {
        for at in (0..count).map(|index| index * self.len) {
            tree.map(black_box(AT + at), self.len, OA + at, self.sizes);
        }
    }

    fn unmap_all(self, tree: &mut Tree, count: u64) {
        for at in (0..count).map(|index| index * self.len) {
            tree.unmap(black_box(AT + at), self.len);
        }
    }
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

fn random_pages() -> Vec<u64> {
    choices(4096, PAGES).into_iter().map(|page| page * K4).collect()
}

/// Walks of `offsets` in turn, in 1 GiB that is mapped with `sizes`, pages in no order where they are small.
fn walk(format: FormatKind, sizes: SizeSet, offsets: &[u64]) -> Result<Box<dyn Work>, Error> {
    let mut tree = Tree::new(format, TABLES, true)?;
    if sizes == SMALL {
        (0..PAGES).for_each(|page| tree.map(AT + page * K4, K4, OA + (page * 7919) % PAGES * K4, SMALL));
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

/// Unmap of 4 KiB as a domain does it: entry, invalidation log, grace.
struct Flushing {
    domain: Arc<Domain>,
    stock: Stock<backing::Words>,
    reader: Option<Reader>,
}

/// A device that translates all the time, on another thread. It stops when this is dropped.
struct Reader {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Flushing {
    fn work(format: FormatKind, busy: bool) -> Result<Box<dyn Work>, Error> {
        let iommu = Iommu::new(&Config { table_bytes: 16 << 20, domain: in_format(format), ..Config::default() }, SystemRmp::new().into())?;
        let domain = iommu.domain()?;
        let device = iommu.device("reader");
        device.attach(&domain)?;
        let mut dma = iommu::Dma::new(&device)?;
        let mut work = Self { stock: Stock::new(iommu.arena()), domain, reader: None };
        work.map(511);
        let seen = Iova::new(AT + 511 * K4);
        dma.translate(seen, iommu::Access::Read)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let read = move || {
            // Idle: it is registered, and outside.
            while busy && !stopped.load(Ordering::Relaxed) {
                black_box(dma.translate(seen, iommu::Access::Read).is_ok());
            }
            while !stopped.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        work.reader = Some(Reader { stop, thread: Some(std::thread::Builder::new().name("reader".into()).spawn(read)?) });
        Ok(Box::new(work))
    }

    fn map(&mut self, page: u64) {
        let mut gather = Gather::new();
        let oa = Oa::new(OA + page * K4);
        let done = self.domain.table().map(span(AT + page * K4, K4), oa, Perm::RW, SMALL, &mut self.stock, &mut gather);
        assert!(done.is_ok(), "{done:?}");
        self.domain.flush(gather);
    }

    fn unmap(&mut self, page: u64) {
        let mut gather = Gather::new();
        let _none_crosses = self.domain.table().unmap(span(AT + page * K4, K4), &mut gather);
        self.domain.flush(gather);
    }
}

impl Work for Flushing {
    fn run(&mut self, times: u64) -> Duration {
        let map = |work: &mut Self, now| (0..now).for_each(|page| work.map(page));
        batches(self, times, 256, map, |work, now| (0..now).for_each(|page| work.unmap(black_box(page))), |_, _| {})
    }

    fn note(&self) -> Option<String> {
        let stats = self.domain.flush_stats();
        self.reader.is_some().then(|| format!("{} grace periods", stats.graces))
    }
}
