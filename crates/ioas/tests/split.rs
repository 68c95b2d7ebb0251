//! One area becomes two, and devices on either half notice nothing (rule 70).

mod common;

use addr::{Iova, Lg2, SizeSet};
use backing::{Backing, Frames, PageState};
use common::client::{Client, source};
use common::{GIB, MIB, PAGE, at, audit, dump, ioas, iommu, iova, leaves, simulated};
use iommu::Dma;
use lockstep_ioas::{Error, Ioas, LeafRule, MapAll, Source};
use pt::Perm;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

#[test]
fn halves_share_the_source_and_go_one_by_one() {
    let ioas = ioas();
    ioas.attach(&ioas.iommu().domain().unwrap()).unwrap();
    ioas.attach(&ioas.iommu().domain().unwrap()).unwrap();
    let (client, purse, source) = source(16, 16);
    ioas.map_source(&source, at(MIB), Perm::RW).unwrap();
    ioas.split(Iova::new(MIB + 5 * PAGE)).unwrap();
    let areas = ioas.areas();
    assert_eq!(areas.iter().map(|area| area.span()).collect::<Vec<_>>(), [iova(MIB, 5 * PAGE), iova(MIB + 5 * PAGE, 11 * PAGE)]);
    assert!(areas.iter().all(|area| area.source().is_some_and(|own| Arc::ptr_eq(own, &source)) && area.perm() == Perm::RW));
    assert_eq!((areas[1].offset_bytes(), purse.charged(), client.calls.load(Ordering::Relaxed)), (5 * PAGE, 16, 1));
    audit(&ioas);
    ioas.split(Iova::new(MIB + 5 * PAGE)).unwrap();
    assert_eq!(ioas.areas().len(), 2, "there was a border already");
    ioas.unmap(iova(MIB, 5 * PAGE)).unwrap();
    audit(&ioas);
    assert_eq!((client.pins().trim_start_matches('0').len(), purse.charged()), (11, 11));
    assert!(matches!(ioas.split(Iova::new(MIB)), Err(Error::NotMapped { .. })));
    ioas.unmap_all().unwrap();
    assert_eq!((client.pins(), purse.charged()), (String::new(), 0));
}

#[test]
fn without_a_domain_any_byte_will_do() {
    let ioas = ioas();
    let client = Client::new(4);
    let source = Source::new(&client.backing(), 0x10, 2 * PAGE, 0x10, true, None);
    ioas.map_source(&source, at(0x1000_0001), Perm::RW).unwrap();
    ioas.split(Iova::new(0x1000_0001 + 77)).unwrap();
    assert_eq!(ioas.areas()[1].offset_bytes(), 0x10 + 77);
    ioas.write(Iova::new(0x1000_0001 + 76), b"both").unwrap();
    assert_eq!(client.peek(0x10 + 76, 4), b"both");
    let (accessor, pinned) = (ioas.accessor(false, Arc::new(|_| {})).unwrap(), iova(0x1000_0001 + PAGE - 0x10, PAGE));
    let pin = accessor.pin(pinned, false).unwrap();
    assert!(matches!(ioas.split(Iova::new(0x1000_0001 + PAGE)), Err(Error::Pinned { .. })));
    drop(pin);
    ioas.split(Iova::new(0x1000_0001 + PAGE)).unwrap();
    let aligned = common::ioas();
    aligned.attach(&aligned.iommu().domain().unwrap()).unwrap();
    aligned.map_file(&simulated(MIB), 0, MIB, at(0), Perm::RW).unwrap();
    assert!(matches!(aligned.split(Iova::new(77)), Err(Error::Span(_))));
}

#[test]
fn devices_never_miss_while_large_leaves_are_cut() {
    let ioas = ioas();
    let device = ioas.iommu().device("disk");
    let domain = ioas.attach_device(&device).unwrap();
    let memory = Backing::memfd(GIB, Frames::Contiguous).unwrap();
    let base = 4 * GIB;
    ioas.map_file(&memory, 0, GIB, at(base), Perm::RW).unwrap();
    assert_eq!(leaves(&domain).len(), 1);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|seed| {
                let (device, stop) = (&device, &stop);
                scope.spawn(move || {
                    let mut dma = Dma::new(device).unwrap();
                    let mut random = fastrand::Rng::with_seed(seed);
                    let (mut rounds, mut byte) = (0u64, [0; 64]);
                    while !stop.load(Ordering::Relaxed) || rounds < 1000 {
                        // Near the borders that are being made, mostly.
                        let at = base + random.u64(..GIB / (4 * MIB)) * 4 * MIB + random.u64(..64) * PAGE;
                        dma.read(Iova::new(at), &mut byte).unwrap_or_else(|fault| panic!("{fault:?}"));
                        dma.write(Iova::new(at), &byte).unwrap_or_else(|fault| panic!("{fault:?}"));
                        rounds += 1;
                    }
                    rounds
                })
            })
            .collect();
        let mut random = fastrand::Rng::with_seed(99);
        for _ in 0..400 {
            let at = base + random.u64(..GIB / (4 * MIB)) * 4 * MIB + random.u64(..64) * PAGE;
            ioas.split(Iova::new(at)).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        readers.into_iter().for_each(|reader| assert!(reader.join().unwrap() >= 1000));
    });
    audit(&ioas);
    assert!(ioas.areas().len() > 300);
    // Now unmap works at the borders, and takes nothing else along.
    let cut = ioas.areas()[17].span();
    ioas.unmap(cut).unwrap();
    audit(&ioas);
    assert_eq!(ioas.unmap_all().unwrap(), GIB - cut.len());
    assert!(leaves(&domain).is_empty());
}

/// Leaves of exactly 2 MiB, as where the secure world has such entries.
#[derive(Debug)]
struct Tied;

impl LeafRule for Tied {
    fn leaf(&self, _: &Backing, run: addr::Span<addr::Page>, _: PageState) -> (addr::Span<addr::Page>, Option<SizeSet>) {
        (run, Some(SizeSet::only(Lg2::M2)))
    }
}

#[test]
fn what_the_rule_ties_is_not_cut() {
    let iommu = iommu();
    let ioas = Ioas::new(&iommu, Arc::new(Tied));
    ioas.attach(&iommu.domain().unwrap()).unwrap();
    ioas.map_file(&simulated(4 * MIB), 0, 4 * MIB, at(0), Perm::RW).unwrap();
    let before = dump(&ioas);
    assert!(matches!(ioas.split(Iova::new(MIB)), Err(Error::Uncuttable { .. })));
    assert_eq!(dump(&ioas), before);
    ioas.split(Iova::new(2 * MIB)).unwrap();
    audit(&ioas);
}

/// Software that reads while areas are split under it finds its bytes in one of them.
#[test]
fn software_never_misses_either() {
    const AREAS: u64 = 3000;
    let ioas = Ioas::new(&iommu(), Arc::new(MapAll));
    let memory = Backing::memfd(MIB, Frames::Contiguous).unwrap();
    for area in 0..AREAS {
        ioas.map_file(&memory, 0, MIB, at(area * MIB), Perm::RW).unwrap();
    }
    let now = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = fastrand::Rng::with_seed(4);
            loop {
                // Where the next split is about to be.
                let area = now.load(Ordering::Relaxed);
                if area == AREAS {
                    return;
                }
                ioas.read(Iova::new(area * MIB + random.u64(..MIB)), &mut [0]).unwrap();
            }
        });
        let mut random = fastrand::Rng::with_seed(3);
        for area in 0..AREAS {
            now.store(area, Ordering::Relaxed);
            (0..4).for_each(|_| ioas.split(Iova::new(area * MIB + random.u64(..MIB))).unwrap());
        }
        now.store(AREAS, Ordering::Relaxed);
    });
}
