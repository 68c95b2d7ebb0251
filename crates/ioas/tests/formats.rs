//! The same address space over page tables of every format: what it promises does not depend on the format, but for what a format cannot say
//! and for the moment in which a leaf is hidden where the hardware needs break-before-make.

mod common;

use addr::{Iova, Span};
use backing::{Backing, Frames, PageState};
use common::{MIB, PAGE, at, audit, iova, leaves, pages};
use iommu::{Config, Dma, DomainConfig, Iommu};
use lockstep_ioas::{Edit, Error, Ioas, MapAll, Pages};
use pt::{FormatKind, MapError, Perm};
use std::sync::Arc;

/// Sizes of the formats that have pages smaller than the host's are tested in `granule`.
fn formats() -> impl Iterator<Item = FormatKind> {
    FormatKind::ALL.iter().copied()
}

fn ioas(format: FormatKind) -> Arc<Ioas> {
    let domain = DomainConfig { format, ..DomainConfig::default() };
    let config = Config { table_bytes: 64 * MIB, domain, ..Config::default() };
    Ioas::new(&Iommu::new(&config, Arc::new(secure::Rmp::new())).unwrap(), Arc::new(MapAll))
}

#[test]
fn a_punch_takes_one_page_from_a_large_leaf() {
    for format in formats() {
        let ioas = ioas(format);
        let device = ioas.iommu().device("net");
        let domain = ioas.attach_device(&device).unwrap();
        assert_eq!(domain.format(), format);
        let memory = Backing::memfd(4 * MIB, Frames::Contiguous).unwrap();
        ioas.map_file(&memory, 0, 4 * MIB, at(4 * MIB), Perm::RW).unwrap();
        let large = leaves(&domain).len();
        assert!(large <= 2, "{format}: {large} leaves");
        let mut dma = Dma::new(&device).unwrap();
        let first = Iova::new(4 * MIB);
        dma.write(first, &[7; 3 * PAGE as usize]).unwrap();
        memory.punch(pages(1, 1)).unwrap();
        audit(&ioas);
        let mut read = [0; 16];
        assert!(dma.read(Iova::new(4 * MIB + PAGE), &mut read).is_err(), "{format}");
        for neighbour in [0, 2] {
            dma.read(Iova::new(4 * MIB + neighbour * PAGE), &mut read).unwrap();
            assert_eq!(read, [7; 16], "{format}: page {neighbour}");
        }
        let (cuts, breaks) = (domain.table().cuts(), domain.table().breaks());
        assert!(cuts > 0 && breaks == if format.hitless().is_allowed() { 0 } else { cuts }, "{format}: {cuts} cuts, {breaks} breaks");
        memory.populate(pages(1, 1), PageState::Shared).unwrap();
        audit(&ioas);
        let held = memory.lock(memory.pages());
        let mut edit = Edit::new();
        Pages::of(&memory).merge(memory.pages(), &mut edit);
        edit.flush();
        drop(held);
        audit(&ioas);
        assert_eq!(leaves(&domain).len() == large, format.hitless().is_allowed(), "{format}: joined where that hides nothing");
        ioas.unmap_all().unwrap();
        assert!(leaves(&domain).is_empty(), "{format}");
    }
}

#[test]
fn writes_are_noted_by_page() {
    for format in formats() {
        let ioas = ioas(format);
        let device = ioas.iommu().device("disk");
        let domain = ioas.attach_device(&device).unwrap();
        let memory = Backing::memfd(MIB, Frames::Scattered { seed: 6 }).unwrap();
        ioas.map_file(&memory, 0, MIB, at(MIB), Perm::RW).unwrap();
        ioas.track_dirty(&domain, true).unwrap();
        let mut dma = Dma::new(&device).unwrap();
        dma.write(Iova::new(MIB + 3 * PAGE - 2), b"four").unwrap();
        let dirty = |clear| {
            let mut found = Vec::new();
            ioas.read_dirty(&domain, iova(MIB, MIB), clear, |span: Span<Iova>| found.push(span)).unwrap();
            found
        };
        assert_eq!(dirty(true).iter().map(|span| span.len()).sum::<u64>(), 2 * PAGE, "{format}");
        assert_eq!(dirty(false), [], "{format}");
        dma.write(Iova::new(MIB + 3 * PAGE), b"again").unwrap();
        assert_eq!(dirty(false).iter().map(|span| span.len()).sum::<u64>(), PAGE, "{format}");
    }
}

#[test]
fn what_a_format_cannot_say_is_refused() {
    for format in formats() {
        let ioas = ioas(format);
        let memory = Backing::memfd(MIB, Frames::Contiguous).unwrap();
        let domain = ioas.iommu().domain().unwrap();
        // Without a domain nothing has to be said yet.
        ioas.map_file(&memory, 0, PAGE, at(0), Perm::WRITE).unwrap();
        let attached = ioas.attach(&domain);
        if format.perms().has(Perm::WRITE) {
            attached.unwrap();
            audit(&ioas);
            continue;
        }
        assert!(matches!(attached, Err(Error::Leaf(MapError::Perm { nearest: Perm::RW, .. }))), "{format}: {attached:?}");
        assert!(leaves(&domain).is_empty() && ioas.domains().is_empty(), "{format}");
        ioas.unmap_all().unwrap();
        ioas.attach(&domain).unwrap();
        let mapped = ioas.map_file(&memory, 0, PAGE, at(0), Perm::WRITE);
        assert!(matches!(mapped, Err(Error::Leaf(MapError::Perm { .. }))), "{format}: {mapped:?}");
        assert!(leaves(&domain).is_empty() && ioas.areas().is_empty(), "{format}");
    }
}

/// Two threads hold different pages of one leaf and take them out and back at random; neither brings back what the other took.
#[test]
fn neighbours_in_one_leaf_punch_at_once() {
    for format in [FormatKind::Armv8S2, FormatKind::Armv8S2Bits39, FormatKind::Sv39, FormatKind::VtdSs4] {
        let ioas = ioas(format);
        let domain = ioas.iommu().domain().unwrap();
        ioas.attach(&domain).unwrap();
        let memory = Backing::simulated(64 * MIB, Frames::Contiguous).unwrap();
        let round = |seed: u64| {
            let mut random = fastrand::Rng::with_seed(seed);
            for _ in 0..150 {
                // Both have pages in every leaf: one the even ones, the other the odd ones.
                let page = random.u64(..64 * MIB / PAGE / 2) * 2 + seed;
                memory.punch(pages(page, 1)).unwrap();
                let gone = domain.table().walk(Iova::new(page * PAGE));
                assert_eq!(gone, None, "{format}: page {page} is still there");
                std::thread::yield_now();
                assert_eq!(domain.table().walk(Iova::new(page * PAGE)), None, "{format}: page {page} came back");
                memory.populate(pages(page, 1), PageState::Shared).unwrap();
            }
        };
        for _ in 0..4 {
            ioas.map_file(&memory, 0, 64 * MIB, at(0), Perm::RW).unwrap();
            std::thread::scope(|scope| {
                scope.spawn(|| round(0));
                scope.spawn(|| round(1));
            });
            audit(&ioas);
            ioas.unmap_all().unwrap();
        }
    }
}
