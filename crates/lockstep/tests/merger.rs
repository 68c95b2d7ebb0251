//! The background pass: it brings large leaves back, is still while it is paused, and neither disturbs conversions nor outlives its handle.

mod common;

use addr::Span;
use backing::Frames;
use common::{Guest, MIB, change};
use lockstep_iommu::{Config, Dma, GuestDma, Merger, Owner, Pace, Policy, RecordedStage2, Trust};
use std::sync::Arc;
use std::time::{Duration, Instant};

const QUICK: Pace = Pace { pages: 4096, rest: Duration::from_micros(100) };

fn guest() -> (Arc<GuestDma>, Dma) {
    let iommu = iommu::Config { table_bytes: 64 * MIB, ..iommu::Config::default() };
    let dma = Arc::new(GuestDma::new(&Config { iommu, ..Config::default() }, Arc::new(RecordedStage2::new())).unwrap());
    dma.add_memory(addr::Gpa::new(0), 32 * MIB, &backing::Backing::memfd(32 * MIB, Frames::Contiguous).unwrap(), 0).unwrap();
    let device = dma.add_device("neighbour", Trust::Untrusted).unwrap();
    let context = Dma::new(&device).unwrap();
    (dma, context)
}

fn leaves(dma: &GuestDma) -> usize {
    let mut count = 0;
    dma.ioas().domains()[0].table().leaves(Span::whole(), |_| count += 1);
    count
}

fn soon(what: &str, mut is_so: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < Duration::from_secs(20), "{what} does not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn there_and_back(dma: &GuestDma, page: u64) {
    for to in [Owner::Private, Owner::Shared] {
        assert_eq!(dma.convert(&[change(page << 12, 0x1000, to)]).unwrap().pages, 1);
    }
}

#[test]
fn it_brings_large_leaves_back() {
    let (dma, _context) = guest();
    assert_eq!(leaves(&dma), 1);
    there_and_back(&dma, 0x123);
    assert!(leaves(&dma) > 1, "a conversion cuts");
    let merger = Merger::start(&dma, QUICK).unwrap();
    soon("the merge", || leaves(&dma) == 1);
    let stats = merger.stats();
    assert!(stats.merges > 0 && stats.steps > 0 && !stats.paused, "{stats:?}");
    soon("the end of a pass", || merger.stats().passes > 0);
}

#[test]
fn it_is_still_while_it_is_paused() {
    let (dma, _context) = guest();
    let merger = Merger::start(&dma, QUICK).unwrap();
    soon("a step", || merger.stats().steps > 3);
    merger.pause();
    let steps = merger.stats().steps;
    there_and_back(&dma, 7);
    let cut = leaves(&dma);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!((merger.stats().steps, leaves(&dma), merger.stats().paused), (steps, cut, true));
    merger.resume();
    soon("the merge", || leaves(&dma) == 1);
    drop(merger);
    there_and_back(&dma, 7);
    std::thread::sleep(Duration::from_millis(20));
    assert!(leaves(&dma) > 1, "nobody merges any more");
}

/// Conversions and merges of the same blocks all the time; the neighbour of what converts never notices, and pausing never hangs.
#[test]
fn it_keeps_out_of_the_way() {
    let (dma, mut context) = guest();
    let merger = Merger::start(&dma, Pace { pages: 1 << 20, rest: Duration::ZERO }).unwrap();
    for round in 0..400 {
        there_and_back(&dma, (round * 37 % 8192) | 1);
        context.write(common::iova((round * 74 % 8192) & !0x1fff), b"neighbour").unwrap();
        if round % 40 == 0 {
            merger.pause();
            merger.resume();
        }
    }
    drop(merger);
    let report = dma.audit();
    assert!(report.is_clean(), "{:?}", report.differences);
}

/// The rig of the other tests, so that this file's own is no different from it.
#[test]
fn what_is_merged_is_what_was_there() {
    let guest = Guest::new(16 * MIB, Frames::Contiguous, Policy::Mirror);
    guest.convert(4 * MIB, 2 * MIB, Owner::Private);
    guest.convert(0x5000, 0x3000, Owner::Private);
    let before = guest.dma.audit().leaves;
    guest.dma.merge(addr::Gpa::new(0), u64::MAX);
    guest.clean();
    assert!(guest.dma.audit().leaves <= before);
}
