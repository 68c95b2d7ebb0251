//! Unmap takes whole areas, from low to high (rules 24 to 27), and promises that no device is on the pages when it returns.

mod common;

use addr::{Iova, Span};
use backing::{Backing, Frames};
use common::{MIB, PAGE, at, audit, ioas, iova, leaves, simulated};
use iommu::{Access, Dma};
use lockstep_ioas::{Error, Pages};
use pt::Perm;

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
