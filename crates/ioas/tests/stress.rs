//! Many threads on one address space and its pages; afterwards everything agrees, and while it goes on no device sees a wrong byte.

mod common;

use addr::{Iova, Lg2, Page};
use backing::{Backing, Frames, PageState};
use common::{MIB, PAGE, at, audit, iommu, iova, pages};
use iommu::Dma;
use lockstep_ioas::{Edit, Error, Ioas, MapAll, Pages, Place};
use pt::Perm;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const PAGES: u64 = 1024;

/// A page of the memory says which page it is, at its beginning; 0 when it came back after a punch.
fn stamp(memory: &Backing, page: u64) {
    memory.host(memory.oa(Page::new(page)), PAGE).unwrap().store_u64(0, page + 1).unwrap();
}

fn mapper(ioas: &Ioas, other: &Ioas, memory: &Arc<Backing>, thread: u64, stop: &AtomicBool) {
    let mut rng = fastrand::Rng::with_seed(thread);
    let base = (thread + 1) << 32;
    while !stop.load(Ordering::Relaxed) {
        let len = rng.u64(1..600);
        let first = rng.u64(..PAGES - len);
        let place = if rng.bool() { Place::Auto } else { at(base + rng.u64(..4) * 4 * MIB) };
        match ioas.map_file(memory, first * PAGE, len * PAGE, place, Perm::RW) {
            Ok(at) => {
                let span = iova(at.get(), len * PAGE);
                if let Ok(copy) = other.copy(ioas, span, Place::Auto, Perm::READ) {
                    assert_eq!(other.unmap(iova(copy.get(), len * PAGE)).unwrap(), len * PAGE);
                }
                if rng.u32(..4) != 0 {
                    assert_eq!(ioas.unmap(span).unwrap(), len * PAGE);
                }
            }
            Err(Error::Occupied { area, .. }) => match ioas.unmap(area) {
                Ok(_) | Err(Error::NotMapped { .. } | Error::Busy { .. } | Error::CutsArea { .. }) => {}
                Err(error) => panic!("{error}"),
            },
            Err(error) => panic!("{error}"),
        }
    }
}

fn changer(memory: &Arc<Backing>, seed: u64, stop: &AtomicBool) {
    let mut rng = fastrand::Rng::with_seed(seed);
    while !stop.load(Ordering::Relaxed) {
        let len = rng.u64(1..40);
        let span = pages(rng.u64(..PAGES - len), len);
        if rng.u32(..4) == 0 {
            memory.punch(span).unwrap();
            memory.populate(span, PageState::Shared).unwrap();
        } else {
            let held = memory.lock(span);
            let all = Pages::of(memory);
            let mut edit = Edit::new();
            all.reserve(span, Lg2::K4, &mut edit).unwrap();
            all.clear(span, &mut edit);
            edit.flush();
            let to = if rng.bool() { PageState::Private } else { PageState::Shared };
            memory.set_state(&held, span, to).unwrap();
            all.fill(span, &mut edit).unwrap();
            edit.flush();
        }
        if rng.u32(..8) == 0 {
            let wide = Span512::of(span.start().get());
            let held = memory.lock(wide);
            let mut edit = Edit::new();
            Pages::of(memory).merge(wide, &mut edit);
            edit.flush();
            drop(held);
        }
    }
}

struct Span512;
impl Span512 {
    fn of(page: u64) -> addr::Span<Page> {
        pages(page & !511, 512)
    }
}

#[test]
fn everyone_at_once() {
    let iommu = iommu();
    let (ioas, other) = (Ioas::new(&iommu, Arc::new(MapAll)), Ioas::new(&iommu, Arc::new(MapAll)));
    let memory = Backing::memfd(PAGES * PAGE, Frames::Contiguous).unwrap();
    (0..PAGES).for_each(|page| stamp(&memory, page));
    let device = iommu.device("disk");
    ioas.attach_device(&device).unwrap();
    other.attach(&iommu.domain().unwrap()).unwrap();
    // Never unmapped: a device must find the right page here, or none, at every moment.
    let fixed = 1 << 46;
    ioas.map_file(&memory, 0, PAGES * PAGE, at(fixed), Perm::RW).unwrap();
    let stop = AtomicBool::new(false);
    let reads = AtomicU64::new(0);
    thread::scope(|scope| {
        for thread in 0..2 {
            let (ioas, other, memory, stop) = (&ioas, &other, &memory, &stop);
            scope.spawn(move || mapper(ioas, other, memory, thread, stop));
        }
        for seed in 0..2 {
            let (memory, stop) = (&memory, &stop);
            scope.spawn(move || changer(memory, 100 + seed, stop));
        }
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let domain = iommu.domain().unwrap();
                ioas.attach(&domain).unwrap();
                thread::sleep(Duration::from_millis(3));
                ioas.detach(&domain).unwrap();
                assert!(common::leaves(&domain).is_empty());
                thread::sleep(Duration::from_millis(3));
            }
        });
        scope.spawn(|| {
            let mut dma = Dma::new(&device).unwrap();
            let mut rng = fastrand::Rng::with_seed(77);
            while !stop.load(Ordering::Relaxed) {
                let page = rng.u64(..PAGES);
                let mut word = [0; 8];
                if dma.read(Iova::new(fixed + page * PAGE), &mut word).is_ok() {
                    let word = u64::from_le_bytes(word);
                    assert!(word == page + 1 || word == 0, "page {page} shows {word}");
                    reads.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let end = Instant::now() + Duration::from_millis(2500);
        while Instant::now() < end {
            thread::sleep(Duration::from_millis(50));
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(reads.load(Ordering::Relaxed) > 1000);
    audit(&ioas);
    audit(&other);
    assert_eq!(Pages::of(&memory).leaves_shed(), 0);
    ioas.unmap_all().unwrap();
    other.unmap_all().unwrap();
    assert!(Pages::of(&memory).areas_over(memory.pages()).is_empty());
    for domain in ioas.domains().iter().chain(&other.domains()) {
        assert!(common::leaves(domain).is_empty());
    }
    let trees: u64 = ioas.domains().iter().chain(&other.domains()).map(|domain| domain.table().bytes_in_tables() / PAGE).sum();
    assert_eq!(u64::from(iommu.arena().tables_in_use()), trees, "a table is in use and in no tree");
}
