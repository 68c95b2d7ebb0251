//! One page table alone, without invalidation and grace: all of it in 4 KiB leaves in no order, or in the largest leaves there are.

use super::meter::Meter;
use super::{Axis, BATCH, K4, Study, Unit, small_leaf_tables, some};
use crate::tree::{OA, Tree};
use crate::{Error, timed};
use addr::{Lg2, Page, SizeSet};
use backing::{Backing, Frames};
use pt::FormatKind;
use std::time::Duration;

const SMALL: SizeSet = SizeSet::only(Lg2::K4);
const LEAST: u64 = 1 << 20;

pub(super) fn studies() -> Vec<Study> {
    vec![
        Study { name: "pt_scattered", axis: Axis::Mapped, least: LEAST, needs: small_leaf_tables, run: scattered },
        Study { name: "pt_contiguous", axis: Axis::Mapped, least: LEAST, needs: |_| LEAST, run: contiguous },
    ]
}

/// Tables for 4 KiB leaves over all of it, and some to spare.
fn tables_for(size: u64) -> usize {
    (size / (512 * K4)) as usize * 513 / 512 + 64
}

fn scattered(format: FormatKind, size: u64, meter: &mut Meter) -> Result<(), Error> {
    let frames = Backing::simulated(size, Frames::Scattered { seed: 1 })?;
    let mut tree = Tree::new(format, tables_for(size), false)?;
    let pages = size / K4;
    let oa = |page: u64| frames.oa(Page::new(page)).get();
    let mut took = Duration::ZERO;
    for from in (0..pages).step_by(1 << 16) {
        let oas: Vec<u64> = (from..pages.min(from + (1 << 16))).map(oa).collect();
        took += timed(|| oas.iter().zip(from..).for_each(|(oa, page)| tree.map(page * K4, K4, *oa, SMALL)));
    }
    meter.once("build", Unit::NsPerPage, pages, took);
    meter.fact("tables", Unit::BytesPerGib, tree.table_bytes() as f64 * super::G1 as f64 / size as f64);

    let mut random = fastrand::Rng::with_seed(2);
    meter.sample([("unmap_4k", Unit::NsPerCall), ("map_4k", Unit::NsPerCall)], || {
        let pages = some(&mut random, BATCH, pages);
        let oas: Vec<u64> = pages.iter().map(|page| oa(*page)).collect();
        let unmap = timed(|| pages.iter().for_each(|page| tree.unmap(page * K4, K4)));
        let map = timed(|| pages.iter().zip(&oas).for_each(|(page, oa)| tree.map(page * K4, K4, *oa, SMALL)));
        (pages.len() as u64, [unmap, map])
    });
    meter.sample([("walk", Unit::NsPerCall)], || walk(&tree, &some(&mut random, 4 * BATCH, pages)));
    let took = timed(|| tree.unmap(0, size));
    meter.once("unmap_all", Unit::NsPerPage, pages, took);
    Ok(())
}

fn contiguous(format: FormatKind, size: u64, meter: &mut Meter) -> Result<(), Error> {
    let mut tree = Tree::new(format, 4096, true)?;
    let pages = size / K4;
    meter.sample([("map_all", Unit::NsPerPage), ("unmap_all", Unit::NsPerPage)], || {
        let map = timed(|| tree.map(0, size, OA, SizeSet::ALL));
        (pages, [map, timed(|| tree.unmap(0, size))])
    });
    tree.map(0, size, OA, SizeSet::ALL);
    meter.fact("tables", Unit::BytesPerGib, tree.table_bytes() as f64 * super::G1 as f64 / size as f64);
    let mut random = fastrand::Rng::with_seed(2);
    meter.sample([("walk", Unit::NsPerCall)], || walk(&tree, &some(&mut random, 4 * BATCH, pages)));
    meter.sample([("cut_4k", Unit::NsPerCall), ("merge_4k", Unit::NsPerCall)], || {
        let page = random.u64(..pages);
        // The leaf that is cut, and no more: a merge looks at all of the span that it is given.
        let (at, len) = tree.leaf(page * K4);
        tree.stock(8);
        let cut = timed(|| tree.cut(page * K4));
        let merge = timed(|| tree.merge(at, len));
        (1, [cut, merge])
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
