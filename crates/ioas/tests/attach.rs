//! Domains come and go by extent, whole or not at all.

mod common;

use addr::{Iova, Page};
use backing::{Backing, Frames, PageState};
use common::{Counting, GIB, MIB, PAGE, at, audit, dump, ioas, iommu, iommu_with, iova, leaves, pages, simulated, walk};
use lockstep_ioas::{Error, Ioas, MapAll};
use pt::Perm;
use std::sync::Arc;
use std::sync::atomic::Ordering;

#[test]
fn cost_grows_with_extents() {
    let rule = Arc::new(Counting::default());
    let ioas = Ioas::new(&iommu(), rule.clone());
    let memory = simulated(64 * GIB);
    ioas.map_file(&memory, 0, 64 * GIB, at(64 * GIB), Perm::RW).unwrap();
    rule.take();
    let domain = ioas.iommu().domain().unwrap();
    let tables = ioas.iommu().arena().tables_in_use();
    ioas.attach(&domain).unwrap();
    assert_eq!(rule.take(), 1, "one run, one question");
    assert!(leaves(&domain).len() <= 64, "1 GiB leaves at least");
    assert_eq!(ioas.iommu().arena().tables_in_use(), tables);
    audit(&ioas);
    // Eight private stretches make seventeen runs.
    let held = memory.lock(memory.pages());
    for n in 0..8 {
        memory.set_state(&held, pages(n * 1_000_000 + 7, 5), PageState::Private).unwrap();
    }
    drop(held);
    let second = ioas.iommu().domain().unwrap();
    rule.take();
    ioas.attach(&second).unwrap();
    assert_eq!(rule.0.load(Ordering::Relaxed), 17);
}

#[test]
fn all_domains_say_the_same() {
    let ioas = ioas();
    let scattered = Backing::simulated(4 * MIB, Frames::Scattered { seed: 3 }).unwrap();
    let row = simulated(4 * MIB);
    let domains: Vec<_> = (0..6).map(|_| ioas.iommu().domain().unwrap()).collect();
    ioas.map_file(&scattered, 0, 4 * MIB, at(0), Perm::RW).unwrap();
    for domain in &domains {
        ioas.attach(domain).unwrap();
    }
    assert!(matches!(ioas.attach(&domains[3]), Err(Error::Attached { .. })));
    ioas.map_file(&row, 0, 4 * MIB, at(8 * MIB), Perm::READ).unwrap();
    audit(&ioas);
    assert_eq!(leaves(&domains[5]), leaves(&domains[0]));
    scattered.punch(pages(3, 4)).unwrap();
    row.punch(pages(0, 1)).unwrap();
    audit(&ioas);
    assert!(domains.iter().all(|domain| walk(domain, 3 * PAGE).is_none() && walk(domain, 8 * MIB).is_none()));
    let tables = ioas.iommu().arena().tables_in_use();
    ioas.detach(&domains[2]).unwrap();
    assert!(leaves(&domains[2]).is_empty());
    assert_eq!(domains[2].table().bytes_in_tables(), PAGE, "only the top is left");
    assert!(ioas.iommu().arena().tables_in_use() < tables);
    assert!(matches!(ioas.detach(&domains[2]), Err(Error::NotAttached { .. })));
    audit(&ioas);
    assert_eq!(ioas.unmap_all().unwrap(), 8 * MIB);
    assert!(domains.iter().all(|domain| leaves(domain).is_empty()));
}

#[test]
fn without_tables_nothing_is_attached() {
    // The top table, and ten more: not enough for 64 scattered MiB.
    let ioas = Ioas::new(&iommu_with(513 * 8 * 12), Arc::new(MapAll));
    let small = simulated(MIB);
    let large = Backing::simulated(64 * MIB, Frames::Scattered { seed: 9 }).unwrap();
    ioas.map_file(&small, 0, MIB, at(0), Perm::RW).unwrap();
    ioas.map_file(&large, 0, 64 * MIB, at(64 * MIB), Perm::RW).unwrap();
    let domain = ioas.iommu().domain().unwrap();
    let before = dump(&ioas);
    assert!(matches!(ioas.attach(&domain), Err(Error::Leaf(_))));
    assert_eq!(dump(&ioas), before);
    assert!(leaves(&domain).is_empty());
    ioas.unmap(iova(64 * MIB, 64 * MIB)).unwrap();
    ioas.attach(&domain).unwrap();
    let before = dump(&ioas);
    assert!(ioas.map_file(&large, 0, 64 * MIB, at(64 * MIB), Perm::RW).is_err());
    assert_eq!(dump(&ioas), before);
    audit(&ioas);
}

#[test]
fn devices_share_a_domain_that_goes_with_the_last() {
    let ioas = ioas();
    let memory = simulated(MIB);
    ioas.map_file(&memory, 0, MIB, at(MIB), Perm::RW).unwrap();
    let (disk, net) = (ioas.iommu().device("disk"), ioas.iommu().device("net"));
    let first = ioas.attach_device(&disk).unwrap();
    let second = ioas.attach_device(&net).unwrap();
    assert!(Arc::ptr_eq(&first, &second));
    assert!(matches!(ioas.attach_device(&net), Err(Error::Attached { what: "device", .. })));
    let other = Ioas::new(ioas.iommu(), Arc::new(MapAll));
    assert!(matches!(other.detach_device(&net), Err(Error::NotAttached { .. })));
    ioas.detach_device(&disk).unwrap();
    assert!(disk.domain().is_none() && ioas.domains().len() == 1);
    audit(&ioas);
    ioas.detach_device(&net).unwrap();
    assert!(ioas.domains().is_empty() && leaves(&first).is_empty());
    let again = ioas.attach_device(&net).unwrap();
    assert_ne!(again.id(), first.id());
    drop(ioas);
    assert!(net.domain().is_none() && leaves(&again).is_empty());
    assert_eq!(walk(&again, Iova::new(MIB).get()), None);
    assert_eq!(memory.state(Page::new(0)), PageState::Shared);
}

#[test]
fn a_domain_that_refuses_late_is_undone_in_all() {
    let ioas = ioas();
    let memory = simulated(4 * MIB);
    let domains = [(); 2].map(|()| ioas.iommu().domain().unwrap());
    domains.iter().for_each(|domain| ioas.attach(domain).unwrap());
    // Somebody else's leaf, which no address space knows of.
    let stray = iova(9 * MIB, PAGE);
    let mut stock = pt::Stock::new(ioas.iommu().arena());
    let mut gather = pt::Gather::new();
    domains[1].table().map(stray, memory.oa(Page::new(0)), Perm::READ, addr::SizeSet::ALL, &mut stock, &mut gather).unwrap();
    let before = leaves(&domains[1]);
    assert!(matches!(ioas.map_file(&memory, 0, 4 * MIB, at(8 * MIB), Perm::RW), Err(Error::Leaf(_))));
    assert!(leaves(&domains[0]).is_empty(), "the first domain had it all for a moment");
    assert_eq!((leaves(&domains[1]), ioas.areas().len()), (before, 0));
    ioas.map_file(&memory, 0, MIB, at(8 * MIB), Perm::RW).unwrap();
}
