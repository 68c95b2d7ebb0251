//! Pages that leave are gone for every device before the call returns, and neighbours notice nothing (D-8, D-5, D-4).

mod common;

use addr::{Lg2, Span};
use backing::{Backing, Frames, PageState};
use common::{GIB, MIB, PAGE, at, audit, ioas, iommu, iova, leaves, oa_of, pages, simulated, walk};
use iommu::Dma;
use lockstep_ioas::{Ioas, MapAll, Pages, SharedOnly};
use pt::{Perm, Stock};
use std::sync::Arc;

#[test]
fn a_punch_cuts_a_large_leaf_and_nothing_else() {
    let ioas = ioas();
    let memory = simulated(GIB);
    let domain = ioas.iommu().domain().unwrap();
    ioas.attach(&domain).unwrap();
    ioas.map_file(&memory, 0, GIB, at(GIB), Perm::RW).unwrap();
    ioas.copy(&ioas, iova(GIB + MIB, MIB), at(0), Perm::READ).unwrap();
    assert_eq!(leaves(&domain).len(), 2);
    memory.punch(pages(256 + 3, 2)).unwrap();
    audit(&ioas);
    for gone in [GIB + MIB + 3 * PAGE, GIB + MIB + 4 * PAGE, 3 * PAGE, 4 * PAGE] {
        assert_eq!(walk(&domain, gone), None, "{gone:#x}");
    }
    let area = ioas.area_at(addr::Iova::new(GIB)).unwrap();
    assert_eq!(walk(&domain, GIB + MIB + 2 * PAGE), Some((oa_of(&area, 258), Perm::RW)));
    assert_eq!(walk(&domain, GIB + MIB + 5 * PAGE), Some((oa_of(&area, 261), Perm::RW)));
    memory.populate(pages(250, 20), PageState::Shared).unwrap();
    audit(&ioas);
    assert!(walk(&domain, 3 * PAGE).is_some());
    let all = Pages::of(&memory);
    let held = memory.lock(memory.pages());
    let mut edit = lockstep_ioas::Edit::new();
    all.merge(memory.pages(), &mut edit);
    edit.flush();
    drop(held);
    assert_eq!(leaves(&domain).len(), 2, "large leaves are back");
    audit(&ioas);
}

#[test]
fn devices_lose_a_page_even_from_their_cache() {
    let ioas = ioas();
    let memory = Backing::memfd(4 * MIB, Frames::Scattered { seed: 5 }).unwrap();
    let device = ioas.iommu().device("net");
    ioas.attach_device(&device).unwrap();
    let start = ioas.map_file(&memory, 0, 4 * MIB, at(0), Perm::RW).unwrap();
    let mut dma = Dma::new(&device).unwrap();
    dma.write(start, &[7; 3 * PAGE as usize]).unwrap();
    memory.punch(pages(1, 1)).unwrap();
    let mut read = [0; 16];
    dma.read(start, &mut read).unwrap();
    assert_eq!(read, [7; 16]);
    assert!(dma.read(addr::Iova::new(PAGE), &mut read).is_err());
    memory.populate(pages(1, 1), PageState::Shared).unwrap();
    dma.read(addr::Iova::new(PAGE), &mut read).unwrap();
    assert_eq!(read, [0; 16]);
    memory.close();
    assert!(dma.read(start, &mut read).is_err());
    assert!(leaves(&device.domain().unwrap()).is_empty());
    assert_eq!(ioas.unmap_all().unwrap(), 4 * MIB);
}

#[test]
fn without_a_table_for_the_cut_the_leaf_goes() {
    let ioas = Ioas::new(&common::iommu_with(513 * 8 * 16), Arc::new(MapAll));
    let memory = simulated(GIB);
    let domain = ioas.iommu().domain().unwrap();
    ioas.attach(&domain).unwrap();
    ioas.map_file(&memory, 0, GIB, at(GIB), Perm::RW).unwrap();
    ioas.map_file(&memory, 0, 2 * MIB, at(0), Perm::RW).unwrap();
    let arena = ioas.iommu().arena();
    let mut hoard = Stock::new(arena);
    hoard.reserve(arena.capacity() - arena.tables_in_use()).unwrap();
    memory.punch(pages(100_000, 1)).unwrap();
    assert_eq!(walk(&domain, GIB + 100_000 * PAGE), None, "the promise holds");
    assert_eq!(walk(&domain, GIB), None, "at the price of the whole leaf");
    assert!(walk(&domain, 0).is_some(), "and of no other");
    assert_eq!(Pages::of(&memory).leaves_shed(), 1);
    drop(hoard);
    assert_eq!(ioas.unmap(iova(GIB, GIB)).unwrap(), GIB);
    ioas.map_file(&memory, 0, GIB, at(GIB), Perm::RW).unwrap();
    audit(&ioas);
}

#[test]
fn absent_and_private_pages_follow_the_rule() {
    let iommu = iommu();
    let all = Ioas::new(&iommu, Arc::new(MapAll));
    let shared = Ioas::new(&iommu, Arc::new(SharedOnly));
    let memory = Backing::simulated(4 * MIB, Frames::Contiguous.starting(PageState::Absent)).unwrap();
    for ioas in [&all, &shared] {
        ioas.attach(&iommu.domain().unwrap()).unwrap();
        ioas.map_file(&memory, 0, 4 * MIB, at(0), Perm::RW).unwrap();
        assert!(leaves(&ioas.domains()[0]).is_empty());
    }
    memory.populate(pages(0, 512), PageState::Private).unwrap();
    memory.populate(memory.pages(), PageState::Shared).unwrap();
    audit(&all);
    audit(&shared);
    assert!(walk(&all.domains()[0], 0).is_some() && walk(&shared.domains()[0], 0).is_none());
    assert!(walk(&shared.domains()[0], 2 * MIB).is_some());
    assert_eq!(leaves(&all.domains()[0])[0].size, Lg2::M2);
    assert_eq!(Pages::of(&memory).areas_over(Span::whole()).len(), 2);
}
