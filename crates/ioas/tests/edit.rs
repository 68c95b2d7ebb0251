//! What a conversion is made of: reserve, clear, flush, fill, merge, with the pages held throughout.

mod common;

use addr::{Lg2, Page, Span};
use backing::{Backing, Frames, PageState};
use common::{MIB, Mirror, PAGE, at, audit, dump, iommu, leaves, pages, simulated, walk};
use lockstep_ioas::{Edit, Ioas, Pages, SharedOnly};
use pt::{Perm, Stock};
use std::sync::Arc;

/// A conversion as the layer above makes it.
fn convert(memory: &Backing, all: &Pages, span: Span<Page>, to: PageState) {
    let held = memory.lock(span);
    held.reserve(1).unwrap();
    let mut edit = Edit::new();
    all.reserve(span, Lg2::K4, &mut edit).unwrap();
    // From here on nothing may fail, whatever happens to the arena.
    let plan = sync::fail::nth(1);
    all.clear(span, &mut edit);
    edit.flush();
    memory.set_state(&held, span, to).unwrap();
    all.fill(span, &mut edit).unwrap();
    edit.flush();
    assert_eq!(plan.fired(), None, "something was taken that had not been reserved");
}

#[test]
fn nothing_fails_after_the_reserve() {
    let iommu = iommu();
    for frames in [Frames::Contiguous, Frames::Scattered { seed: 4 }] {
        let memory = Backing::simulated(16 * MIB, frames).unwrap();
        let ioas = Ioas::new(&iommu, Arc::new(Mirror));
        let only = Ioas::new(&iommu, Arc::new(SharedOnly));
        ioas.map_file(&memory, 0, 16 * MIB, at(0), Perm::RW).unwrap();
        only.map_file(&memory, 4 * MIB, 8 * MIB, at(0x1_0000_0000), Perm::RW).unwrap();
        only.map_file(&memory, 0x5000, 8 * MIB, at(0x8000), Perm::RW).unwrap();
        for ioas in [&ioas, &only] {
            ioas.attach(&iommu.domain().unwrap()).unwrap();
            ioas.attach(&iommu.domain().unwrap()).unwrap();
        }
        let all = Pages::of(&memory);
        let mut rng = fastrand::Rng::with_seed(11);
        for round in 0..400 {
            let len = [1, 1, 3, 512, 700, 1025][rng.usize(..6)];
            let start = rng.u64(..4096 - len + 1);
            let start = if rng.bool() { start & !511 } else { start };
            convert(&memory, &all, pages(start, len), [PageState::Private, PageState::Shared][round % 2]);
            if round % 16 == 0 {
                audit(&ioas);
                audit(&only);
            }
        }
        audit(&ioas);
        audit(&only);
        assert_eq!(all.leaves_shed(), 0);
    }
}

#[test]
fn an_edit_can_be_put_back() {
    let iommu = iommu();
    let ioas = Ioas::new(&iommu, Arc::new(Mirror));
    let memory = simulated(8 * MIB);
    let domain = iommu.domain().unwrap();
    ioas.attach(&domain).unwrap();
    ioas.map_file(&memory, 0, 8 * MIB, at(0), Perm::RW).unwrap();
    let before = dump(&ioas);
    let all = Pages::of(&memory);
    {
        let _held = memory.lock(memory.pages());
        let mut edit = Edit::new();
        all.reserve(pages(5, 1), Lg2::K4, &mut edit).unwrap();
        all.clear(pages(5, 1), &mut edit);
        assert!(!edit.is_flushed());
        edit.flush();
        assert_eq!(walk(&domain, 5 * PAGE), None);
        all.fill(pages(5, 1), &mut edit).unwrap();
        all.merge(memory.pages(), &mut edit);
    }
    assert_eq!(dump(&ioas), before);
}

#[test]
fn a_batch_costs_one_flush_for_each_domain() {
    let iommu = iommu();
    let ioas = Ioas::new(&iommu, Arc::new(SharedOnly));
    let (low, high) = (simulated(4 * MIB), simulated(4 * MIB));
    let domains: Vec<_> = (0..6).map(|_| iommu.domain().unwrap()).collect();
    domains.iter().for_each(|domain| ioas.attach(domain).unwrap());
    ioas.map_file(&low, 0, 4 * MIB, at(0), Perm::RW).unwrap();
    ioas.map_file(&high, 0, 4 * MIB, at(4 * MIB), Perm::RW).unwrap();
    let graces: Vec<_> = domains.iter().map(|domain| domain.flush_stats().graces).collect();
    let _held = (low.lock(low.pages()), high.lock(high.pages()));
    let mut edit = Edit::new();
    for n in 0..100 {
        for memory in [&low, &high] {
            let all = Pages::of(memory);
            all.reserve(pages(n * 8, 2), Lg2::K4, &mut edit).unwrap();
            all.clear(pages(n * 8, 2), &mut edit);
        }
    }
    edit.flush();
    for (domain, before) in domains.iter().zip(graces) {
        assert_eq!(domain.flush_stats().graces, before + 1);
        assert_eq!(walk(domain, 8 * PAGE), None);
        assert!(walk(domain, 10 * PAGE).is_some());
    }
}

#[test]
fn a_fill_without_tables_leaves_nothing() {
    let iommu = common::iommu_with(513 * 8 * 8);
    let ioas = Ioas::new(&iommu, Arc::new(SharedOnly));
    let memory = Backing::simulated(8 * MIB, Frames::Scattered { seed: 1 }.starting(PageState::Private)).unwrap();
    let domain = iommu.domain().unwrap();
    ioas.attach(&domain).unwrap();
    ioas.map_file(&memory, 0, 8 * MIB, at(0), Perm::RW).unwrap();
    let mut hoard = Stock::new(iommu.arena());
    hoard.reserve(iommu.arena().capacity() - iommu.arena().tables_in_use() - 3).unwrap();
    let held = memory.lock(memory.pages());
    memory.set_state(&held, memory.pages(), PageState::Shared).unwrap();
    let mut edit = Edit::new();
    assert!(Pages::of(&memory).fill(memory.pages(), &mut edit).is_err());
    edit.flush();
    assert!(leaves(&domain).is_empty());
    drop(hoard);
    Pages::of(&memory).fill(memory.pages(), &mut edit).unwrap();
    drop(held);
    audit(&ioas);
}
