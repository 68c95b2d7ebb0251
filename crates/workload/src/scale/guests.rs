//! Guests: page state changes and translations against the guest's size, and against how many of its pages are private one by one. The link keeps the
//! attributes itself, so this is the cost of the transaction without KVM.

use super::meter::Meter;
use super::{Axis, BATCH, COUNTS, G1, K4, LARGE_LEAVES, Study, Unit, small_leaf_tables, some};
use crate::{Error, in_format, timed};
use addr::{Gpa, Iova, Span};
use backing::{Backing, Frames};
use iommu::Access;
use lockstep::{Change, Config, Dma, GuestDma, Owner, RecordedStage2, Trust};
use pt::FormatKind;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

/// Entries of one page state change request (GHCB).
const REQUEST: u64 = 253;
/// Guest whose private pages are counted.
const COUNTED: u64 = 16 << 30;
/// Pages that requests are for, all over a guest. Their entries in the tables have been touched before, as firmware has touched all of the RMP.
const POOL: u64 = 1 << 14;
/// Places that a device uses again and again.
const HOT: u64 = 64;

pub(super) fn studies() -> Vec<Study> {
    let mapped = |name, sizes, needs, run| Study { name, axis: Axis::Mapped, sizes, needs, run };
    // Half of the RMP's pages hold the entries of 2 MiB.
    let private = |size: u64| size / 512 + (256 << 20);
    let counted = |count: u64| count * 1024 + COUNTED / 256 + small_leaf_tables(COUNTED);
    vec![
        mapped("guest_scattered", (16 << 20, 16), small_leaf_tables, scattered),
        mapped("guest_contiguous", LARGE_LEAVES, |_| 1 << 30, contiguous),
        mapped("guest_private", (16 << 20, 16), private, all_private),
        Study { name: "private_pages", axis: Axis::Private, sizes: COUNTS, needs: counted, run: private_pages },
    ]
}

/// A guest, all of it shared, and one device.
struct Machine {
    guest: GuestDma,
    dma: Dma,
    pages: u64,
    random: fastrand::Rng,
}

impl Machine {
    fn new(format: FormatKind, size: u64, frames: Frames) -> Result<Self, Error> {
        let iommu = iommu::Config { domain: in_format(format), ..iommu::Config::default() };
        let guest = GuestDma::new(&Config { iommu, ..Config::default() }, Arc::new(RecordedStage2::new()))?;
        guest.add_memory(Gpa::new(0), size, &Backing::simulated(size, frames)?, 0)?;
        let dma = Dma::new(&guest.add_device("bench", Trust::Untrusted)?)?;
        Ok(Self { guest, dma, pages: size / K4, random: fastrand::Rng::with_seed(4) })
    }

    fn table_bytes(&self) -> u64 {
        let arena = self.guest.iommu().arena();
        u64::from(arena.tables_in_use()) * (arena.table_bytes() + 8)
    }

    fn tables(&self, meter: &mut Meter) {
        meter.fact("tables", Unit::BytesPerGib, self.table_bytes() as f64 * G1 as f64 / (self.pages * K4) as f64);
    }

    fn convert(&self, changes: &[Change]) -> Duration {
        let mut done = None;
        let took = timed(|| done = Some(self.guest.convert(black_box(changes))));
        assert!(matches!(&done, Some(Ok(done)) if done.pages == changes.len() as u64), "{done:?}");
        took
    }

    /// Pages that requests are for, in batches; each has been to `first` and back once.
    fn pool(&mut self, first: Owner) -> Vec<Vec<u64>> {
        let pool = some(&mut self.random, POOL, self.pages);
        let batches: Vec<Vec<u64>> = pool.chunks(REQUEST as usize).map(<[u64]>::to_vec).collect();
        for pages in &batches {
            self.convert(&changes(pages, first));
            self.convert(&changes(pages, other(first)));
        }
        batches
    }

    /// Whole descriptors that only translate: random places, which rarely hit the IOTLB once a guest is large, and a few that always do.
    fn translate(&mut self, meter: &mut Meter) {
        let mut translate = |places: &[u64]| {
            let took = timed(|| {
                for page in places {
                    black_box(self.dma.translate(Iova::new(page * K4 + 8), Access::Read).map(|found| found.oa)).ok();
                }
            });
            (places.len() as u64, [took])
        };
        let mut random = self.random.fork();
        meter.sample([("translate_random", Unit::NsPerCall)], || translate(&some(&mut random, 4 * BATCH, self.pages)));
        let hot = some(&mut random, HOT, self.pages);
        translate(&hot);
        let hot: Vec<u64> = hot.iter().cycle().take(4 * BATCH as usize).copied().collect();
        meter.sample([("translate_hot", Unit::NsPerCall)], || translate(&hot));
    }

    /// Requests as large as a guest can make, for pages all over it, there and back.
    fn requests(&mut self, names: [(&str, Unit); 2], first: Owner, meter: &mut Meter) {
        let pool = self.pool(first);
        let mut next = pool.iter().cycle();
        meter.sample(names, || {
            let pages = next.next().map_or(&[][..], |pages| pages);
            let there = self.convert(&changes(pages, first));
            (pages.len() as u64, [there, self.convert(&changes(pages, other(first)))])
        });
    }
}

fn other(owner: Owner) -> Owner {
    if owner == Owner::Private { Owner::Shared } else { Owner::Private }
}

fn changes(pages: &[u64], to: Owner) -> Vec<Change> {
    let page = |page: &u64| Span::of(Gpa::new(page * K4), Gpa::new(page * K4 + (K4 - 1)));
    pages.iter().map(|at| Change { span: page(at), to }).collect()
}

const REQUESTS: [(&str, Unit); 2] = [("request_to_private", Unit::NsPerPage), ("request_to_shared", Unit::NsPerPage)];

/// Every page in a frame of its own: 4 KiB leaves from the start.
fn scattered(format: FormatKind, size: u64, meter: &mut Meter) -> Result<(), Error> {
    let mut machine = Machine::new(format, size, Frames::Scattered { seed: 1 })?;
    machine.tables(meter);
    machine.translate(meter);
    machine.requests(REQUESTS, Owner::Private, meter);
    Ok(())
}

/// The largest leaves that there are: a conversion cuts them, a merge puts them together again.
fn contiguous(format: FormatKind, size: u64, meter: &mut Meter) -> Result<(), Error> {
    let mut machine = Machine::new(format, size, Frames::Contiguous)?;
    machine.tables(meter);
    machine.translate(meter);
    let names = [("one_to_private", Unit::NsPerCall), ("one_to_shared", Unit::NsPerCall), ("merge_1g", Unit::NsPerCall)];
    meter.sample(names, || {
        let page = [machine.random.u64(..machine.pages)];
        let there = machine.convert(&changes(&page, Owner::Private));
        let back = machine.convert(&changes(&page, Owner::Shared));
        let from = Gpa::new(page[0] * K4 / G1 * G1);
        let merge = timed(|| {
            machine.guest.merge(from, G1 / K4);
        });
        (1, [there, back, merge])
    });
    machine.requests(REQUESTS, Owner::Private, meter);
    Ok(())
}

/// All of it private, in entries and leaves of 2 MiB, which requests split.
fn all_private(format: FormatKind, size: u64, meter: &mut Meter) -> Result<(), Error> {
    let mut machine = Machine::new(format, size, Frames::Contiguous)?;
    let all = Change { span: Span::of(Gpa::new(0), Gpa::new(size - 1)), to: Owner::Private };
    let mut done = None;
    let took = timed(|| done = Some(machine.guest.convert(&[all])));
    done.transpose()?;
    meter.once("all_to_private", Unit::NsPerPage, machine.pages, took);
    machine.tables(meter);
    let rmp = meter.resident().saturating_sub(machine.table_bytes());
    meter.fact("rmp_resident", Unit::BytesPerGib, rmp as f64 * G1 as f64 / size as f64);
    let [private, shared] = REQUESTS;
    machine.requests([shared, private], Owner::Shared, meter);
    Ok(())
}

/// Pages that are private one by one: each is a run of its own in every record. All page tables and the whole RMP have been touched before.
fn private_pages(format: FormatKind, count: u64, meter: &mut Meter) -> Result<(), Error> {
    let mut machine = Machine::new(format, COUNTED, Frames::Contiguous)?;
    // 16 bytes a page: one page of the RMP is about 1 MiB.
    let touched: Vec<u64> = (0..machine.pages).step_by(256).collect();
    for pages in touched.chunks(REQUEST as usize) {
        machine.convert(&changes(pages, Owner::Private));
        machine.convert(&changes(pages, Owner::Shared));
    }
    let before = meter.resident();
    // Each page of a grid is private; requests take pages of the rest, as far apart whatever the grid is.
    let stride = machine.pages / count;
    let mut private: Vec<u64> = (0..count).map(|index| index * stride).collect();
    machine.random.shuffle(&mut private);
    let mut took = Duration::ZERO;
    for pages in private.chunks(REQUEST as usize) {
        took += machine.convert(&changes(pages, Owner::Private));
    }
    meter.once("build", Unit::NsPerPage, count, took);
    let records = (meter.resident() - before).saturating_sub(8 * count);
    meter.fact("memory", Unit::BytesPerPage, records as f64 / count as f64);
    meter.sample(REQUESTS, || {
        let mut pages = some(&mut machine.random, REQUEST, machine.pages);
        pages.retain(|page| page % stride != 0 || page / stride >= count);
        let there = machine.convert(&changes(&pages, Owner::Private));
        let back = machine.convert(&changes(&pages, Owner::Shared));
        (pages.len() as u64, [there, back])
    });
    Ok(())
}
