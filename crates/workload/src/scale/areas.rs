//! Many areas in one address space that a domain shows: mapped and unmapped at random, at places of the caller's choice and at places that are found,
//! each over pages of its own, and all over the same page.

use super::meter::Meter;
use super::space::space;
use super::{Axis, BATCH, COUNTS, K4, Study, Unit, small_leaf_tables};
use crate::{Error, timed};
use addr::{Iova, Span};
use backing::{Backing, Frames};
use ioas::{Ioas, Place, Source};
use iommu::Iommu;
use pt::{FormatKind, Perm};
use std::sync::Arc;

/// Between the places of areas at fixed places: none touches another.
const STRIDE: u64 = 4 * K4;

pub(super) fn studies() -> Vec<Study> {
    // An area, its tables, and entries for it in two trees; found places are packed.
    let needs = |count| small_leaf_tables(2 * count * STRIDE) + count * 1024;
    let study = |name, run| Study { name, axis: Axis::Areas, sizes: COUNTS, needs, run };
    vec![study("areas_fixed", fixed), study("areas_auto", auto), study("areas_one_page", one_page), study("areas_copies", copies)]
}

/// Areas that stand.
struct Standing {
    iommu: Arc<Iommu>,
    ioas: Arc<Ioas>,
    memory: Arc<Backing>,
    /// Where each begins, and its length.
    at: Vec<(u64, u64)>,
    random: fastrand::Rng,
}

impl Standing {
    fn new(format: FormatKind, memory_pages: u64) -> Result<Self, Error> {
        let (iommu, ioas) = space(format)?;
        let memory = Backing::simulated(memory_pages * K4, Frames::Scattered { seed: 1 })?;
        Ok(Self { iommu, ioas, memory, at: Vec::new(), random: fastrand::Rng::with_seed(3) })
    }

    /// Which areas go in a batch: their places in the list, by which they are taken out.
    fn choose(&mut self) -> Vec<(u64, u64)> {
        let count = BATCH.min(self.at.len() as u64 / 4).max(1);
        (0..count).map(|_| self.at.swap_remove(self.random.usize(..self.at.len()))).collect()
    }

    fn unmap(&self, gone: &[(u64, u64)]) {
        for (at, len) in gone {
            let done = self.ioas.unmap(span(*at, *len));
            assert!(done.is_ok(), "{done:?}");
        }
    }

    /// Looks areas up by an address in each.
    fn find(&mut self, meter: &mut Meter) {
        meter.sample([("find", Unit::NsPerCall)], || {
            let wanted: Vec<Iova> = (0..BATCH).map(|_| Iova::new(self.at[self.random.usize(..self.at.len())].0 + 9)).collect();
            let took = timed(|| {
                for at in &wanted {
                    assert!(self.ioas.area_at(*at).is_some());
                }
            });
            (BATCH, [took])
        });
    }

    /// Memory of the areas that stand, beside their page tables.
    fn weigh(&self, meter: &mut Meter) {
        let tables = u64::from(self.iommu.arena().tables_in_use()) * (self.iommu.arena().table_bytes() + 8);
        let own = meter.resident().saturating_sub(tables + self.at.capacity() as u64 * 16);
        meter.fact("memory", Unit::BytesPerArea, own as f64 / self.at.len() as f64);
    }

    /// A second domain, and the end of all.
    fn wind_up(&self, meter: &mut Meter) -> Result<(), Error> {
        let count = self.at.len() as u64;
        let second = self.iommu.domain()?;
        let (mut attached, mut gone) = (Ok(()), Ok(0));
        let took = timed(|| attached = self.ioas.attach(&second));
        meter.once("attach_second", Unit::NsPerArea, count, took);
        attached?;
        self.ioas.detach(&second)?;
        let took = timed(|| gone = self.ioas.unmap_all());
        meter.once("unmap_all", Unit::NsPerArea, count, took);
        gone?;
        Ok(())
    }
}

fn span(at: u64, len: u64) -> Span<Iova> {
    Span::of(Iova::new(at), Iova::new(at + (len - 1)))
}

const PAIR: [(&str, Unit); 2] = [("unmap", Unit::NsPerCall), ("map", Unit::NsPerCall)];

/// 4 KiB each, at random multiples of a stride, over random pages.
fn fixed(format: FormatKind, count: u64, meter: &mut Meter) -> Result<(), Error> {
    apart(format, count, 2 * count, meter)
}

/// As [`fixed`], all over one page: any of them is one of many that lie over it.
fn one_page(format: FormatKind, count: u64, meter: &mut Meter) -> Result<(), Error> {
    apart(format, count, 1, meter)
}

fn apart(format: FormatKind, count: u64, memory_pages: u64, meter: &mut Meter) -> Result<(), Error> {
    let mut standing = Standing::new(format, memory_pages)?;
    let mut free: Vec<u64> = (0..2 * count).map(|place| place * STRIDE).collect();
    standing.random.shuffle(&mut free);
    let map = |standing: &Standing, at: u64| {
        let offset = (at / STRIDE) % memory_pages * K4;
        let done = standing.ioas.map_file(&standing.memory, offset, K4, Place::Fixed(Iova::new(at)), Perm::RW);
        assert!(done.is_ok(), "{done:?}");
    };
    let took = timed(|| free[count as usize..].iter().for_each(|at| map(&standing, *at)));
    meter.once("build", Unit::NsPerArea, count, took);
    standing.at = free.drain(count as usize..).map(|at| (at, K4)).collect();
    standing.weigh(meter);
    meter.sample(PAIR, || {
        let gone = standing.choose();
        let fresh: Vec<u64> = gone.iter().map(|_| free.swap_remove(standing.random.usize(..free.len()))).collect();
        let unmap = timed(|| standing.unmap(&gone));
        let map = timed(|| fresh.iter().for_each(|at| map(&standing, *at)));
        free.extend(gone.iter().map(|(at, _)| *at));
        standing.at.extend(fresh.iter().map(|at| (*at, K4)));
        (gone.len() as u64, [unmap, map])
    });
    standing.find(meter);
    standing.wind_up(meter)
}

/// 1 to 16 pages each, at places that are found; holes that areas leave are filled by others of another size.
fn auto(format: FormatKind, count: u64, meter: &mut Meter) -> Result<(), Error> {
    let mut standing = Standing::new(format, 2 * count + 16)?;
    let len = |standing: &mut Standing| (1 + standing.random.u64(..16)) * K4;
    let map = |standing: &mut Standing, lens: &[u64]| {
        for len in lens {
            let offset = standing.random.u64(..2 * count) * K4;
            let done = standing.ioas.map_file(&standing.memory, offset, *len, Place::Auto, Perm::RW);
            assert!(done.is_ok(), "{done:?}");
            standing.at.extend(done.iter().map(|at| (at.get(), *len)));
        }
    };
    let lens: Vec<u64> = (0..count).map(|_| len(&mut standing)).collect();
    let took = timed(|| map(&mut standing, &lens));
    meter.once("build", Unit::NsPerArea, count, took);
    // So that holes of all sizes are everywhere.
    for _ in 0..count / BATCH {
        let gone = standing.choose();
        standing.unmap(&gone);
        let lens: Vec<u64> = gone.iter().map(|_| len(&mut standing)).collect();
        map(&mut standing, &lens);
    }
    standing.weigh(meter);
    meter.sample(PAIR, || {
        let gone = standing.choose();
        let lens: Vec<u64> = gone.iter().map(|_| len(&mut standing)).collect();
        let unmap = timed(|| standing.unmap(&gone));
        (gone.len() as u64, [unmap, timed(|| map(&mut standing, &lens))])
    });
    standing.find(meter);
    standing.wind_up(meter)
}

/// Copies of one area, whose pages are pinned once for all of them.
fn copies(format: FormatKind, count: u64, meter: &mut Meter) -> Result<(), Error> {
    let mut standing = Standing::new(format, 16)?;
    let source = Source::new(&standing.memory, 0, 16 * K4, 0, true, None);
    let from = count * STRIDE * 2;
    standing.ioas.map_source(&source, Place::Fixed(Iova::new(from)), Perm::RW)?;
    let mut free: Vec<u64> = (0..2 * count).map(|place| place * STRIDE).collect();
    standing.random.shuffle(&mut free);
    let copy = |standing: &Standing, at: u64| {
        // One page of it.
        let page = from + (at / STRIDE) % 16 * K4;
        let done = standing.ioas.copy(&standing.ioas, span(page, K4), Place::Fixed(Iova::new(at)), Perm::RW);
        assert!(done.is_ok(), "{done:?}");
    };
    let took = timed(|| free[count as usize..].iter().for_each(|at| copy(&standing, *at)));
    meter.once("build", Unit::NsPerArea, count, took);
    standing.at = free.drain(count as usize..).map(|at| (at, K4)).collect();
    standing.weigh(meter);
    meter.sample([("unmap", Unit::NsPerCall), ("copy", Unit::NsPerCall)], || {
        let gone = standing.choose();
        let fresh: Vec<u64> = gone.iter().map(|_| free.swap_remove(standing.random.usize(..free.len()))).collect();
        let unmap = timed(|| standing.unmap(&gone));
        let map = timed(|| fresh.iter().for_each(|at| copy(&standing, *at)));
        free.extend(gone.iter().map(|(at, _)| *at));
        standing.at.extend(fresh.iter().map(|at| (*at, K4)));
        (gone.len() as u64, [unmap, map])
    });
    standing.wind_up(meter)
}
