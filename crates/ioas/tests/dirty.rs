//! What devices wrote, told once and never lost (rules 55 to 60, I-14).

mod common;

use addr::{Iova, Span};
use backing::{Backing, Frames};
use common::{MIB, PAGE, at, audit, ioas, iova, leaves};
use iommu::Dma;
use lockstep_ioas::{Error, Ioas};
use pt::{Perm, Stock};

fn dirty(ioas: &Ioas, domain: &iommu::Domain, span: Span<Iova>, clear: bool) -> Vec<Span<Iova>> {
    let mut found = Vec::new();
    ioas.read_dirty(domain, span, clear, |span| found.push(span)).unwrap();
    found
}

#[test]
fn bits_by_page() {
    let ioas = ioas();
    let memory = Backing::memfd(MIB, Frames::Scattered { seed: 6 }).unwrap();
    let device = ioas.iommu().device("disk");
    let domain = ioas.attach_device(&device).unwrap();
    ioas.map_file(&memory, 0, MIB, at(MIB), Perm::RW).unwrap();
    let mut dma = Dma::new(&device).unwrap();
    dma.write(Iova::new(MIB + 9 * PAGE), b"before").unwrap();
    ioas.track_dirty(&domain, true).unwrap();
    assert!(dirty(&ioas, &domain, iova(0, 4 * MIB), false).is_empty(), "switching on forgets what was before");
    dma.write(Iova::new(MIB + 3 * PAGE - 2), b"four").unwrap();
    let span = iova(MIB, MIB);
    let mut bitmap = [0; 32];
    ioas.read_dirty_bitmap(&domain, span, PAGE, false, &mut bitmap).unwrap();
    assert_eq!((bitmap[0], bitmap[1..].iter().all(|byte| *byte == 0)), (0b1100, true));
    let before = domain.flush_stats();
    assert_eq!(dirty(&ioas, &domain, span, true), [iova(MIB + 2 * PAGE, PAGE), iova(MIB + 3 * PAGE, PAGE)]);
    let after = domain.flush_stats();
    assert!(after.spans > before.spans && after.graces == before.graces + 1, "what was cleared is invalidated");
    assert!(dirty(&ioas, &domain, span, true).is_empty());
    dma.write(Iova::new(MIB + 3 * PAGE), b"again").unwrap();
    assert_eq!(dirty(&ioas, &domain, span, false), [iova(MIB + 3 * PAGE, PAGE)], "a cached translation must not hide the second write");
    bitmap.fill(0);
    bitmap[31] = 0x80;
    ioas.read_dirty_bitmap(&domain, span, 2 * PAGE, false, &mut bitmap).unwrap();
    assert_eq!((bitmap[0], bitmap[31]), (0b10, 0x80), "bits are set, never cleared");
    assert!(matches!(ioas.read_dirty_bitmap(&domain, span, 0, false, &mut bitmap), Err(Error::Span(_))));
    assert!(matches!(ioas.read_dirty_bitmap(&domain, iova(MIB, PAGE), 2 * PAGE, false, &mut bitmap), Err(Error::Span(_))));
    assert!(matches!(ioas.read_dirty(&domain, iova(MIB, 12), false, |_| {}), Err(Error::Span(_))));
    ioas.detach_device(&device).unwrap();
    assert!(matches!(ioas.read_dirty(&domain, span, false, |_| {}), Err(Error::NotAttached { .. })));
}

#[test]
fn a_leaf_that_sticks_out_loses_nothing() {
    let ioas = Ioas::new(&common::iommu_with(513 * 8 * 16), std::sync::Arc::new(lockstep_ioas::MapAll));
    let memory = Backing::memfd(4 * MIB, Frames::Contiguous).unwrap();
    let device = ioas.iommu().device("disk");
    let domain = ioas.attach_device(&device).unwrap();
    ioas.map_file(&memory, 0, 4 * MIB, at(0), Perm::RW).unwrap();
    assert_eq!(leaves(&domain).len(), 1);
    ioas.track_dirty(&domain, true).unwrap();
    let mut dma = Dma::new(&device).unwrap();
    dma.write(Iova::new(0), b"x").unwrap();
    // Without a table what sticks out stays dirty.
    let arena = ioas.iommu().arena();
    let mut hoard = Stock::new(arena);
    hoard.reserve(arena.capacity() - arena.tables_in_use()).unwrap();
    assert_eq!(dirty(&ioas, &domain, iova(MIB, MIB), true), [iova(MIB, MIB)]);
    let bytes = |spans: Vec<Span<Iova>>| spans.iter().map(|span| span.len()).sum::<u64>();
    assert_eq!(bytes(dirty(&ioas, &domain, iova(0, 4 * MIB), false)), 4 * MIB);
    drop(hoard);
    // With one it is cut: the part that was asked for is clean, the rest is not.
    assert!(!dirty(&ioas, &domain, iova(MIB, MIB), true).is_empty());
    assert!(dirty(&ioas, &domain, iova(MIB, MIB), true).is_empty());
    assert_eq!(bytes(dirty(&ioas, &domain, iova(0, 4 * MIB), true)), 3 * MIB);
    audit(&ioas);
}

#[test]
fn an_emulated_device_notes_its_own_writes() {
    let ioas = ioas();
    let domain = ioas.iommu().domain().unwrap();
    let memory = Backing::memfd(4 * MIB, Frames::Contiguous).unwrap();
    assert!(matches!(ioas.mark_dirty(&domain, Iova::new(0)), Err(Error::NotAttached { .. })));
    ioas.attach(&domain).unwrap();
    ioas.map_file(&memory, 0, 2 * MIB, at(2 * MIB), Perm::READ).unwrap();
    ioas.map_file(&memory, 0x1000, 3 * PAGE, at(8 * MIB), Perm::READ).unwrap();
    assert!(matches!(ioas.mark_dirty(&domain, Iova::new(2 * MIB)), Err(Error::NotTracking { .. })));
    ioas.track_dirty(&domain, true).unwrap();
    assert!(ioas.mark_dirty(&domain, Iova::new(3 * MIB + 5)).unwrap(), "what the leaf allows does not matter");
    assert!(ioas.mark_dirty(&domain, Iova::new(8 * MIB + PAGE)).unwrap());
    assert!(!ioas.mark_dirty(&domain, Iova::new(8 * MIB + 3 * PAGE)).unwrap());
    // The large leaf sets every bit that it covers, and none outside of what was asked for.
    let mut bitmap = [0; 66];
    ioas.read_dirty_bitmap(&domain, iova(3 * MIB, 2 * MIB), PAGE, false, &mut bitmap[..32]).unwrap();
    assert!(bitmap[..32].iter().all(|byte| *byte == 0xff) && bitmap[32] == 0);
    // A size that is no power of two: its bits below the highest are a mask for start and end, the lowest is what one bit stands for.
    assert!(matches!(ioas.read_dirty_bitmap(&domain, iova(8 * MIB + PAGE, 2 * PAGE), 3 * PAGE, false, &mut bitmap), Err(Error::Span(_))));
    bitmap.fill(0);
    ioas.read_dirty_bitmap(&domain, iova(8 * MIB, 4 * PAGE), 3 * PAGE, false, &mut bitmap).unwrap();
    assert_eq!(bitmap[0], 0b10);
}
