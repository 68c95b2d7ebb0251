//! Copy shows the same pages elsewhere (rules 18, 20 and 21).

mod common;

use addr::Iova;
use common::{MIB, PAGE, at, audit, dump, ioas, iova, simulated, walk};
use lockstep_ioas::{Error, Ioas, MapAll, Place};
use pt::Perm;
use std::sync::Arc;

#[test]
fn one_area_for_each_source_area() {
    let src = ioas();
    let dst = Ioas::new(src.iommu(), Arc::new(MapAll));
    let (low, high) = (simulated(MIB), simulated(MIB));
    let domain = dst.iommu().domain().unwrap();
    dst.attach(&domain).unwrap();
    src.map_file(&low, 0x1000, 4 * PAGE, at(0x1_0000), Perm::RW).unwrap();
    src.map_file(&high, 0x8000, 4 * PAGE, at(0x1_4000), Perm::RW).unwrap();
    let to = dst.copy(&src, iova(0x1_2000, 4 * PAGE), at(0x5_0000), Perm::READ).unwrap();
    assert_eq!((to, dst.areas().len()), (Iova::new(0x5_0000), 2));
    assert_eq!(walk(&domain, 0x5_1000), Some((low.oa(addr::Page::new(4)), Perm::READ)));
    assert_eq!(walk(&domain, 0x5_2000), Some((high.oa(addr::Page::new(8)), Perm::READ)));
    audit(&dst);
    let auto = dst.copy(&src, iova(0x1_0000, 8 * PAGE), Place::Auto, Perm::RW).unwrap();
    assert_eq!(auto, Iova::new(0x1000), "the source offset 0x1000 allows page alignment");
    drop(src);
    audit(&dst);
    assert_eq!(walk(&domain, 0x5_1000), Some((low.oa(addr::Page::new(4)), Perm::READ)), "copies do not depend on the source");
}

#[test]
fn refusals_change_nothing() {
    let ioas = ioas();
    let memory = simulated(MIB);
    let domain = ioas.iommu().domain().unwrap();
    ioas.attach(&domain).unwrap();
    ioas.map_file(&memory, 0, 2 * PAGE, at(0x1000), Perm::READ).unwrap();
    ioas.map_file(&memory, 0, 2 * PAGE, at(0x4000), Perm::RW).unwrap();
    let before = dump(&ioas);
    let copy = |span, place, perm| ioas.copy(&ioas, span, place, perm);
    assert!(matches!(copy(iova(0x1000, 5 * PAGE), at(0x10_0000), Perm::READ), Err(Error::NotMapped { at }) if at == iova(0x3000, PAGE)));
    assert!(matches!(copy(iova(0x1000, PAGE), at(0x10_0000), Perm::RW), Err(Error::ReadOnlyPages { .. })));
    assert!(matches!(copy(iova(0x1000, PAGE), at(0x4000), Perm::READ), Err(Error::Occupied { .. })));
    assert!(matches!(copy(iova(0x1800, PAGE), at(0x10_0000), Perm::READ), Err(Error::SourceMisaligned { .. })));
    assert!(matches!(copy(iova(0x1000, PAGE), at(0x10_0000), Perm::NONE), Err(Error::NoAccess)));
    assert_eq!(dump(&ioas), before);
    copy(iova(0x4000, PAGE), at(0x10_0000), Perm::READ).unwrap();
    copy(iova(0x10_0000, PAGE), at(0x20_0000), Perm::RW).unwrap();
    let written = walk(&domain, 0x20_0000);
    assert_eq!(written, Some((memory.oa(addr::Page::new(0)), Perm::RW)), "a read-only copy of writable pages can be copied for writing");
}
