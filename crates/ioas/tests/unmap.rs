//! Unmap takes whole areas, from low to high (rules 24 to 27), and promises that no device is on the pages when it returns.

mod common;

use addr::{Iova, Span};
use backing::{Backing, Frames};
use common::{MIB, PAGE, at, audit, ioas, iova, leaves, simulated};
use iommu::{Access, Dma};
use lockstep_ioas::{AreaState, Error, Ioas, Pages};
use pt::Perm;
use std::thread;
use std::time::Duration;

/// Until the area at `start` is being removed, and whoever does it has had time to begin to wait.
fn until_closing(ioas: &Ioas, start: u64) {
    while ioas.area_at(Iova::new(start)).is_some_and(|area| area.state() != AreaState::Closing) {
        thread::yield_now();
    }
    thread::sleep(Duration::from_millis(2));
}

#[test]
fn gaps_are_fine_and_cuts_are_not() {
    let (ioas, memory) = (ioas(), simulated(MIB));
    let domain = ioas.iommu().domain().unwrap();
    ioas.attach(&domain).unwrap();
    assert!(matches!(ioas.unmap(iova(0, MIB)), Err(Error::NotMapped { .. })));
    assert_eq!(ioas.unmap_all().unwrap(), 0);
    for start in [0x1000, 0x4000, 0x8000] {
        ioas.map_file(&memory, 0, 2 * PAGE, at(start), Perm::RW).unwrap();
    }
    assert!(matches!(ioas.unmap(iova(0x2000, PAGE)), Err(Error::CutsArea { .. })), "the upper half of an area");
    assert_eq!(ioas.areas().len(), 3);
    let cut = ioas.unmap(iova(0, 0x9000));
    assert!(matches!(cut, Err(Error::CutsArea { area, .. }) if area == iova(0x8000, 2 * PAGE)));
    assert_eq!(ioas.areas().len(), 1, "the areas below are gone already");
    audit(&ioas);
    ioas.map_file(&memory, 0, PAGE, at(0x1000), Perm::RW).unwrap();
    assert_eq!(ioas.unmap(Span::whole()).unwrap(), 3 * PAGE);
    assert!(leaves(&domain).is_empty());
    assert!(Pages::of(&memory).areas_over(memory.pages()).is_empty());
}

#[test]
fn many_areas_cost_one_flush() {
    let (ioas, memory) = (ioas(), simulated(MIB));
    let domain = ioas.iommu().domain().unwrap();
    ioas.attach(&domain).unwrap();
    for n in 0..200 {
        ioas.map_file(&memory, 0, PAGE, at(n * 2 * PAGE), Perm::RW).unwrap();
    }
    let before = domain.flush_stats().graces;
    assert_eq!(ioas.unmap_all().unwrap(), 200 * PAGE);
    assert_eq!(domain.flush_stats().graces, before + 1);
}

#[test]
fn a_cached_translation_does_not_survive() {
    let ioas = ioas();
    let memory = Backing::memfd(MIB, Frames::Contiguous).unwrap();
    let device = ioas.iommu().device("disk");
    ioas.attach_device(&device).unwrap();
    let start = ioas.map_file(&memory, 0, MIB, at(0x10_0000), Perm::RW).unwrap();
    let mut dma = Dma::new(&device).unwrap();
    dma.write(start, b"seven").unwrap();
    ioas.unmap(iova(0x10_0000, MIB)).unwrap();
    assert!(dma.write(start, b"eight").is_err());
    let mut read = [0; 5];
    ioas.map_file(&memory, 0, MIB, at(0x20_0000), Perm::READ).unwrap();
    ioas.read(Iova::new(0x20_0000), &mut read).unwrap();
    assert_eq!(&read, b"seven");
}

#[test]
fn unmapping_under_ones_own_slice_is_an_error() {
    let ioas = ioas();
    let memory = Backing::memfd(MIB, Frames::Contiguous).unwrap();
    let device = ioas.iommu().device("disk");
    let domain = ioas.attach_device(&device).unwrap();
    let start = ioas.map_file(&memory, 0, MIB, at(0), Perm::RW).unwrap();
    let mut dma = Dma::new(&device).unwrap();
    let slice = dma.slice(start, PAGE, Access::Read).unwrap();
    assert!(matches!(ioas.unmap(iova(0, MIB)), Err(Error::HeldByCaller { .. })));
    assert!(matches!(ioas.unmap_all(), Err(Error::HeldByCaller { .. })));
    assert!(matches!(ioas.detach(&domain), Err(Error::HeldByCaller { .. })));
    drop(slice);
    assert_eq!(ioas.unmap(iova(0, MIB)).unwrap(), MIB);
}

#[test]
fn an_area_on_its_way_out_is_busy_for_others_and_gone_for_software() {
    let ioas = ioas();
    let memory = Backing::memfd(MIB, Frames::Contiguous).unwrap();
    let device = ioas.iommu().device("disk");
    ioas.attach_device(&device).unwrap();
    let kept = ioas.map_file(&memory, 0, PAGE, at(0x1_0000_0000), Perm::RW).unwrap();
    for start in [0x1000, 0x8000] {
        ioas.map_file(&memory, 0, PAGE, at(start), Perm::RW).unwrap();
    }
    let mut dma = Dma::new(&device).unwrap();
    let slice = dma.slice(kept, PAGE, Access::Read).unwrap();
    thread::scope(|scope| {
        let going = scope.spawn(|| ioas.unmap(iova(0x1000, PAGE)));
        until_closing(&ioas, 0x1000);
        let mut byte = [0];
        assert!(matches!(ioas.read(Iova::new(0x1000), &mut byte), Err(Error::NotMapped { .. })));
        assert!(matches!(ioas.copy(&ioas, iova(0x1000, PAGE), at(0x5000), Perm::READ), Err(Error::NotMapped { .. })));
        assert!(matches!(ioas.map_file(&memory, 0, PAGE, at(0x1000), Perm::RW), Err(Error::Occupied { .. })));
        let other = scope.spawn(|| ioas.unmap(iova(0, 0x1_0000)));
        assert!(matches!(other.join().unwrap(), Err(Error::Busy { area }) if area == iova(0x1000, PAGE)));
        drop(slice);
        assert_eq!(going.join().unwrap().unwrap(), PAGE);
    });
    assert_eq!(ioas.unmap(iova(0, 0x1_0000)).unwrap(), PAGE, "what lay above the busy area is still there");
}

#[test]
fn an_unmap_removes_only_what_it_closed() {
    let ioas = ioas();
    let memory = Backing::memfd(MIB, Frames::Contiguous).unwrap();
    let device = ioas.iommu().device("disk");
    ioas.attach_device(&device).unwrap();
    let kept = ioas.map_file(&memory, 0, PAGE, at(0x1_0000_0000), Perm::RW).unwrap();
    let mut dma = Dma::new(&device).unwrap();
    for _ in 0..30 {
        ioas.map_file(&memory, 0, 2 * PAGE, at(0x8000), Perm::RW).unwrap();
        let slice = dma.slice(kept, PAGE, Access::Read).unwrap();
        thread::scope(|scope| {
            // Passes the gap at 0x1000, then waits; the gap is filled and emptied meanwhile.
            let wide = scope.spawn(|| ioas.unmap(iova(0, 0x1_0000)));
            until_closing(&ioas, 0x8000);
            ioas.map_file(&memory, 0, PAGE, at(0x1000), Perm::RW).unwrap();
            let narrow = scope.spawn(|| ioas.unmap(iova(0x1000, PAGE)));
            until_closing(&ioas, 0x1000);
            drop(slice);
            assert_eq!((wide.join().unwrap().unwrap(), narrow.join().unwrap().unwrap()), (2 * PAGE, PAGE));
        });
    }
}

/// Whoever finds an area by its pages clears what is at its IOVA: so as long as it can be found there, nobody else has that IOVA.
#[cfg(debug_assertions)]
#[test]
fn an_area_leaves_its_pages_before_its_iova_is_free() {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    for areas in [1, 3] {
        let ioas = ioas();
        let memory = Backing::memfd(MIB, Frames::Contiguous).unwrap();
        ioas.attach(&ioas.iommu().domain().unwrap()).unwrap();
        let starts: Vec<u64> = (1..=areas).map(|index| index * 0x1_0000).collect();
        for &start in &starts {
            ioas.map_file(&memory, 0, PAGE, at(start), Perm::RW).unwrap();
        }
        let (gone, pages) = (Arc::new(AtomicU64::new(0)), Pages::of(&memory));
        let look = {
            let (ioas, gone) = (Arc::clone(&ioas), Arc::clone(&gone));
            let listed = pages.areas_over(memory.pages());
            assert!(listed.len() == starts.len() && listed.iter().all(|area| pages.lists(area)));
            move || {
                for area in &listed {
                    let is_free = ioas.area_at(area.span().start()).is_none();
                    assert!(!(is_free && pages.lists(area)), "{} is free, and its pages lead there", area.span());
                    gone.fetch_add(u64::from(is_free), Ordering::Relaxed);
                }
            }
        };
        // By somebody else, who holds no lock.
        let watched = sync::pause::at_every_pause(move || thread::scope(|scope| scope.spawn(&look).join().unwrap()));
        assert_eq!(ioas.unmap(iova(0, MIB)).unwrap(), areas * PAGE);
        drop(watched);
        assert!(gone.load(Ordering::Relaxed) > 0, "nobody looked when one was gone");
    }
}
