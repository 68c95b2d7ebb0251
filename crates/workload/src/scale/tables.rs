//! One page table alone, without invalidation and grace: all of it in 4 KiB leaves in no order, or in the largest leaves there are.

use super::meter::Meter;
use super::{Axis, BATCH, G1, K4, LARGE_LEAVES, SMALL_LEAVES, Study, Unit, small_leaf_tables, some};
use crate::tree::{OA, Tree};
use crate::{Error, timed};
use addr::{Lg2, Page, SizeSet};
use backing::{Backing, Frames};
use pt::FormatKind;
use std::collections::VecDeque;
use std::time::Duration;

const SMALL: SizeSet = SizeSet::only(Lg2::K4);

pub(super) fn studies() -> Vec<Study> {
    vec![
        Study { name: "pt_scattered", axis: Axis::Mapped, sizes: SMALL_LEAVES, needs: small_leaf_tables, run: scattered },
        Study { name: "pt_contiguous", axis: Axis::Mapped, sizes: LARGE_LEAVES, needs: |_| 1 << 20, run: contiguous },
    ]
}

/// Tables for 4 KiB leaves over all of it, and some to spare.
fn tables_for(size: u64) -> usize {
    (size / (512 * K4)) as usize * 513 / 512 + 64
}

fn scattered(format: FormatKind, size: u64, meter: &mut Meter) -> Result<(), Error> {
    let frames = Backing::simulated(size, Frames::Scattered { seed: 1 })?;
    let mut tree = Tree::new(format, tables_for(size), true)?;
    let pages = size / K4;
    let oa = |page: u64| frames.oa(Page::new(page)).get();
    let build = |tree: &mut Tree| {
        let mut took = Duration::ZERO;
        for from in (0..pages).step_by(1 << 16) {
            let oas: Vec<u64> = (from..pages.min(from + (1 << 16))).map(oa).collect();
            took += timed(|| oas.iter().zip(from..).for_each(|(oa, page)| tree.map(page * K4, K4, *oa, SMALL)));
        }
        took
    };
    meter.sample([("build", Unit::NsPerPage)], || {
        tree.unmap(0, size);
        (pages, [build(&mut tree)])
    });
    meter.fact("tables", Unit::BytesPerGib, tree.table_bytes() as f64 * G1 as f64 / size as f64);

    let mut random = fastrand::Rng::with_seed(2);
    let mut holes = Holes::new(pages);
    meter.sample([("unmap_4k", Unit::NsPerCall), ("map_4k", Unit::NsPerCall)], || {
        // What is mapped was unmapped some batches ago, so its entries are no warmer than those of any other page.
        let gone = holes.next(&mut random);
        let unmap = timed(|| gone.iter().for_each(|page| tree.unmap(page * K4, K4)));
        let fresh = holes.replace(gone);
        let oas: Vec<u64> = fresh.iter().map(|page| oa(*page)).collect();
        let map = timed(|| fresh.iter().zip(&oas).for_each(|(page, oa)| tree.map(page * K4, K4, *oa, SMALL)));
        (fresh.len() as u64, [unmap, map])
    });
    meter.sample([("walk", Unit::NsPerCall)], || walk(&tree, &some(&mut random, 4 * BATCH, pages)));
    holes.all().for_each(|page| tree.map(page * K4, K4, oa(page), SMALL));
    meter.once("unmap_all", Unit::NsPerGib, 1, timed(|| tree.unmap(0, size)).mul_f64(G1 as f64 / size as f64));
    Ok(())
}

/// Batches of pages that are not mapped for a while. Each batch comes from a residue class of its own, so none is in two.
struct Holes {
    pages: u64,
    classes: u64,
    turn: u64,
    batch: usize,
    open: VecDeque<Vec<u64>>,
}

impl Holes {
    fn new(pages: u64) -> Self {
        let classes = (pages / 256).clamp(2, 64);
        Self { pages, classes, turn: 0, batch: (pages / classes / 4).min(BATCH) as usize, open: VecDeque::new() }
    }

    fn next(&mut self, random: &mut fastrand::Rng) -> Vec<u64> {
        self.turn = (self.turn + 1) % self.classes;
        let mut batch = Vec::new();
        while batch.len() < self.batch {
            batch.extend(some(random, 2 * BATCH, self.pages / self.classes).into_iter().take(self.batch - batch.len()));
            batch.sort_unstable();
            batch.dedup();
        }
        random.shuffle(&mut batch);
        batch.iter().map(|index| index * self.classes + self.turn).collect()
    }

    /// Keeps `gone` open, and answers what is to be closed for it.
    fn replace(&mut self, gone: Vec<u64>) -> Vec<u64> {
        self.open.push_back(gone);
        if self.open.len() as u64 > self.classes / 2 { self.open.pop_front() } else { self.open.pop_back() }.unwrap_or_default()
    }

    fn all(&self) -> impl Iterator<Item = u64> {
        self.open.iter().flatten().copied()
    }
}

fn contiguous(format: FormatKind, size: u64, meter: &mut Meter) -> Result<(), Error> {
    let mut tree = Tree::new(format, 4096, true)?;
    let pages = size / K4;
    tree.map(0, size, OA, SizeSet::ALL);
    let leaves = tree.leaves(size);
    meter.fact("tables", Unit::BytesPerGib, tree.table_bytes() as f64 * G1 as f64 / size as f64);
    let mut random = fastrand::Rng::with_seed(2);
    meter.sample([("walk", Unit::NsPerCall)], || walk(&tree, &some(&mut random, 4 * BATCH, pages)));
    meter.sample([("cut_4k", Unit::NsPerCall), ("merge_4k", Unit::NsPerCall)], || {
        let page = random.u64(..pages);
        // The leaf that is cut, and no more: a merge looks at all of the span that it is given.
        let (at, len) = tree.leaf(page * K4);
        tree.stock(8);
        let cut = timed(|| tree.cut(page * K4));
        (1, [cut, timed(|| tree.merge(at, len))])
    });
    meter.sample([("unmap_all", Unit::NsPerLeaf), ("map_all", Unit::NsPerLeaf)], || {
        let unmap = timed(|| tree.unmap(0, size));
        (leaves, [unmap, timed(|| tree.map(0, size, OA, SizeSet::ALL))])
    });
    Ok(())
}

fn walk(tree: &Tree, pages: &[u64]) -> (u64, [Duration; 1]) {
    let took = timed(|| {
        for page in pages {
            std::hint::black_box(tree.walk(page * K4));
        }
    });
    (pages.len() as u64, [took])
}
