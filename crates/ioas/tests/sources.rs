//! Pages are pinned while a domain or a pin needs them, once for each source, and paid for once (rules 16 to 18, 36 to 38).

mod common;

use addr::Iova;
use backing::{Backing, Frames, PinError};
use common::client::{Client, Purse, source};
use common::{MIB, PAGE, at, audit, dump, ioas, iommu, iova, leaves, pages};
use lockstep_ioas::{Charge, Error, Ioas, MapAll, Place, Source};
use pt::Perm;
use std::sync::Arc;
use std::sync::atomic::Ordering;

#[test]
fn nothing_is_touched_without_a_domain() {
    let ioas = ioas();
    let (client, purse, source) = source(8, 8);
    *client.bad.lock().unwrap() = Some(5);
    assert_eq!(ioas.map_source(&source, at(0x10_0000), Perm::RW).unwrap().get(), 0x10_0000);
    assert_eq!((client.calls.load(Ordering::Relaxed), purse.charged()), (0, 0));
    let area = ioas.area_at(Iova::new(0x10_0000)).unwrap();
    assert!(area.source().is_some_and(|own| Arc::ptr_eq(own, &source)));
    assert_eq!(ioas.sources().len(), 1);
    let domain = ioas.iommu().domain().unwrap();
    let before = dump(&ioas);
    assert!(matches!(ioas.attach(&domain), Err(Error::Pin(PinError::Fault { page })) if page.get() == 5));
    assert_eq!((dump(&ioas), leaves(&domain).len(), client.pins(), purse.charged()), (before, 0, String::new(), 0));
    assert!(matches!(ioas.map_source(&source, at(0x10_1000), Perm::RW), Err(Error::Occupied { .. })));
    assert_eq!(ioas.unmap(iova(0x10_0000, 8 * PAGE)).unwrap(), 8 * PAGE);
    assert!(ioas.sources().is_empty());
}

#[test]
fn pinned_once_however_many_show_it() {
    let iommu = iommu();
    let (first, second) = (Ioas::new(&iommu, Arc::new(MapAll)), Ioas::new(&iommu, Arc::new(MapAll)));
    let (client, purse, source) = source(8, 8);
    let domains: Vec<_> = (0..3).map(|_| iommu.domain().unwrap()).collect();
    first.attach(&domains[0]).unwrap();
    first.map_source(&source, at(0), Perm::READ).unwrap();
    assert_eq!((client.pins(), purse.charged(), source.pinned()), ("11111111".into(), 8, vec![pages(0, 8)]));
    assert!(client.pinned_for_writing.load(Ordering::Relaxed), "the source is writable, whatever this area is");
    first.attach(&domains[1]).unwrap();
    second.attach(&domains[2]).unwrap();
    second.copy(&first, iova(2 * PAGE, 3 * PAGE), at(MIB), Perm::RW).unwrap();
    first.copy(&first, iova(6 * PAGE, 2 * PAGE), at(2 * MIB), Perm::RW).unwrap();
    assert_eq!((client.pins(), purse.charged()), ("11111111".into(), 8));
    audit(&first);
    audit(&second);
    first.unmap(iova(0, 8 * PAGE)).unwrap();
    assert_eq!((client.pins(), purse.charged(), source.pinned()), ("00111011".into(), 5, vec![pages(2, 3), pages(6, 2)]));
    first.detach(&domains[0]).unwrap();
    assert_eq!(client.pins(), "00111011", "another domain is left");
    first.detach(&domains[1]).unwrap();
    assert_eq!((client.pins(), source.pinned_pages()), ("00111".into(), 3));
    first.attach(&domains[1]).unwrap();
    assert_eq!((client.pins(), purse.charged()), ("00111011".into(), 5));
    drop(second);
    assert_eq!(client.pins(), "00000011", "an address space takes its areas along");
    drop(first);
    assert_eq!((client.pins(), purse.charged(), source.pinned()), (String::new(), 0, vec![]));
}

#[test]
fn two_maps_of_the_same_memory_pay_twice() {
    let ioas = ioas();
    ioas.attach(&ioas.iommu().domain().unwrap()).unwrap();
    let (client, purse) = (Client::new(4), Purse::new(100));
    let backing = client.backing();
    for place in [0, MIB] {
        let source = Source::new(&backing, 0, 4 * PAGE, 0x5000_0000, true, Some(Arc::clone(&purse) as Arc<dyn Charge>));
        ioas.map_source(&source, at(place), Perm::RW).unwrap();
    }
    assert_eq!((client.pins(), purse.charged(), ioas.sources().len()), ("2222".into(), 8, 2));
    ioas.unmap_all().unwrap();
    assert_eq!((client.pins(), purse.charged()), (String::new(), 0));
}

#[test]
fn a_page_that_cannot_be_pinned_undoes_the_call() {
    let ioas = ioas();
    ioas.attach(&ioas.iommu().domain().unwrap()).unwrap();
    ioas.attach(&ioas.iommu().domain().unwrap()).unwrap();
    let (client, purse, source) = source(16, 16);
    let part = Source::new(source.backing(), 4 * PAGE, 2 * PAGE, 0x7000_0000_4000, true, None);
    ioas.map_source(&part, at(8 * MIB), Perm::RW).unwrap();
    for bad in 0..16 {
        *client.bad.lock().unwrap() = Some(bad);
        let before = (dump(&ioas), client.pins());
        assert!(matches!(ioas.map_source(&source, at(0), Perm::RW), Err(Error::Pin(PinError::Fault { .. }))));
        assert_eq!(((dump(&ioas), client.pins()), purse.charged()), (before, 0));
    }
    *client.bad.lock().unwrap() = None;
    ioas.map_source(&source, at(0), Perm::RW).unwrap();
    // The copy begins with pages that are pinned, goes on with some that are not.
    *client.bad.lock().unwrap() = Some(15);
    let other = Ioas::new(ioas.iommu(), Arc::new(MapAll));
    other.copy(&ioas, iova(0, 16 * PAGE), at(0), Perm::READ).unwrap();
    ioas.unmap(iova(0, 16 * PAGE)).unwrap();
    other.copy(&other, iova(PAGE, 4 * PAGE), at(MIB), Perm::READ).unwrap();
    let before = dump(&other);
    assert!(matches!(other.attach(&other.iommu().domain().unwrap()), Err(Error::Pin(_))));
    assert_eq!((dump(&other), client.pins(), purse.charged()), (before, "000011".into(), 0));
}

#[test]
fn over_the_limit_nothing_stays_pinned() {
    let ioas = ioas();
    ioas.attach(&ioas.iommu().domain().unwrap()).unwrap();
    let (client, purse, source) = source(8, 7);
    let before = dump(&ioas);
    assert!(matches!(ioas.map_source(&source, Place::Auto, Perm::RW), Err(Error::Pin(PinError::Limit { pages: 8, limit_pages: 7 }))));
    assert_eq!((dump(&ioas), client.pins(), client.calls.load(Ordering::Relaxed), purse.charged()), (before, String::new(), 1, 0));
    let rich = Purse::new(8);
    assert_eq!(source.replace_charge(Some(Arc::clone(&rich) as Arc<dyn Charge>)).1, 0);
    ioas.map_source(&source, Place::Auto, Perm::RW).unwrap();
    assert_eq!((rich.charged(), purse.charged()), (8, 0));
    let heir = Purse::new(8);
    heir.charge(8).unwrap();
    let (was, pages) = source.replace_charge(Some(Arc::clone(&heir) as Arc<dyn Charge>));
    let was = was.filter(|was| was.as_any().is::<Purse>()).unwrap();
    was.uncharge(pages);
    ioas.unmap_all().unwrap();
    assert_eq!((rich.charged(), heir.charged()), (0, 0));
}

#[test]
fn refusals_in_the_kernels_order() {
    let ioas = ioas();
    ioas.attach(&ioas.iommu().domain().unwrap()).unwrap();
    ioas.reserve(iova(0x100_0000, 0x1000)).unwrap();
    let client = Client::new(8);
    *client.bad.lock().unwrap() = Some(0);
    let backing = client.backing();
    let of = |offset, len, writable| Source::new(&backing, offset, len, 0x7000_0000 + offset, writable, None);
    let map = |source: &Arc<Source>, place, perm| ioas.map_source(source, place, perm).unwrap_err();
    // Each is wrong in every later way, too.
    let worst = of(1, PAGE + 1, false);
    assert!(matches!(map(&worst, at(0x100_0001), Perm::NONE), Error::NoAccess));
    assert!(matches!(map(&of(1, 0, false), at(0x100_0001), Perm::RW), Error::Span(addr::SpanError::Empty { .. })));
    assert!(matches!(map(&worst, at(0x100_0001), Perm::RW), Error::Span(addr::SpanError::Misaligned { len: 0x1001, .. })));
    let bad = of(1, PAGE, false);
    assert!(matches!(map(&bad, at(u64::MAX - 1), Perm::RW), Error::Span(addr::SpanError::Misaligned { .. })));
    assert!(matches!(map(&of(0, 2 * PAGE, false), at(u64::MAX - 0xfff), Perm::RW), Error::Span(addr::SpanError::Wraps { .. })));
    assert!(matches!(map(&bad, at(0x100_0000), Perm::RW), Error::Reserved { .. }));
    assert!(matches!(map(&bad, at(0x200_0000), Perm::RW), Error::ReadOnlyPages { .. }));
    assert!(matches!(map(&bad, at(0x200_0000), Perm::READ), Error::SourceMisaligned { .. }));
    assert!(matches!(map(&of(0, PAGE, false), at(0x200_0000), Perm::READ), Error::Pin(_)));
    assert!(matches!(map(&of(7 * PAGE, 2 * PAGE, true), at(0), Perm::RW), Error::Beyond { .. }));
    assert!(matches!(map(&Source::new(&backing, 0, PAGE, u64::MAX - 1, true, None), at(0), Perm::RW), Error::Span(_)));
    assert!(ioas.areas().is_empty());
}

#[test]
fn automatic_places_follow_the_mapper_of_a_copy() {
    let (first, second) = (ioas(), ioas());
    let (_client, _purse, source) = source(1024, 0);
    first.map_source(&source, at(0), Perm::RW).unwrap();
    // 16 pages into a source that lies at a multiple of 2 MiB: the lowest bit of the user address is what limits the alignment.
    let place = second.copy(&first, iova(16 * PAGE, 2 * MIB), Place::Auto, Perm::RW).unwrap();
    assert_eq!(place.get(), 16 * PAGE);
    let place = second.copy(&first, iova(2 * MIB, 2 * MIB), Place::Auto, Perm::RW).unwrap();
    assert_eq!(place.get(), 4 * MIB);
}

#[test]
fn a_file_cut_short_is_found_when_it_is_pinned() {
    let ioas = ioas();
    let backing = Backing::memfd(MIB, Frames::Contiguous).unwrap();
    let source = Source::new(&backing, 0, MIB, 0, true, None);
    ioas.map_source(&source, at(MIB), Perm::RW).unwrap();
    std::fs::File::from(backing.file().unwrap().try_clone_to_owned().unwrap()).set_len(MIB - 1).unwrap();
    let attached = ioas.attach(&ioas.iommu().domain().unwrap());
    assert!(matches!(attached, Err(Error::Pin(PinError::Outside { size, .. })) if size == MIB - 1), "{attached:?}");
    let mut byte = [0];
    assert!(matches!(ioas.read(Iova::new(2 * MIB - 1), &mut byte), Err(Error::Pin(PinError::Outside { .. }))));
    ioas.read(Iova::new(2 * MIB - PAGE - 1), &mut byte).unwrap();
}

#[test]
fn memory_of_a_device_is_neither_pinned_nor_touched() {
    let ioas = ioas();
    let client = Client::new(512);
    let backing = client.backing();
    let source = Source::device(&backing, 0, 2 * MIB, 0, true);
    let domain = ioas.iommu().domain().unwrap();
    ioas.attach(&domain).unwrap();
    ioas.map_source(&source, at(2 * MIB), Perm::RW).unwrap();
    assert_eq!((leaves(&domain).len(), client.calls.load(Ordering::Relaxed)), (1, 0));
    assert!(matches!(ioas.read(Iova::new(2 * MIB), &mut [0]), Err(Error::DeviceMemory { .. })));
    assert!(matches!(ioas.split(Iova::new(3 * MIB)), Err(Error::DeviceMemory { .. })));
    // Revoked: the area stays, nobody shows it any more.
    backing.close();
    assert!(leaves(&domain).is_empty());
    let late = ioas.iommu().domain().unwrap();
    ioas.attach(&late).unwrap();
    assert!(leaves(&late).is_empty());
    assert_eq!(ioas.unmap(iova(2 * MIB, 2 * MIB)).unwrap(), 2 * MIB);
}

/// Everything at once against one counter for each page: areas by map and copy in two address spaces that come and go with domains.
#[test]
fn any_history_keeps_the_union() {
    let mut random = fastrand::Rng::with_seed(11);
    let iommu = iommu();
    let spaces = [Ioas::new(&iommu, Arc::new(MapAll)), Ioas::new(&iommu, Arc::new(MapAll))];
    let (client, purse, source) = source(32, 32);
    for space in &spaces {
        space.map_source(&source, at(0), Perm::RW).unwrap();
    }
    for _ in 0..1500 {
        let space = &spaces[random.usize(..2)];
        match random.u8(..5) {
            0 => drop(space.attach(&iommu.domain().unwrap())),
            1 => space.domains().first().into_iter().for_each(|domain| space.detach(domain).unwrap()),
            2 => {
                let first = random.u64(..32);
                let from = iova(first * PAGE, random.u64(1..=32 - first) * PAGE);
                drop(space.copy(space, from, at(random.u64(1..6) * MIB), Perm::RW));
            }
            3 => drop(space.unmap(iova(random.u64(1..6) * MIB, MIB))),
            _ => {
                let area = space.areas().swap_remove(random.usize(..space.areas().len()));
                if area.span().start().get() != 0 {
                    let inside = random.u64(..area.span().len() / PAGE) * PAGE;
                    space.split(Iova::new(area.span().start().get() + inside)).unwrap();
                }
            }
        }
        let mut covered = [false; 32];
        for area in spaces.iter().filter(|space| !space.domains().is_empty()).flat_map(|space| space.areas()) {
            let pages = area.page_span();
            covered[pages.start().get() as usize..=pages.last().get() as usize].fill(true);
        }
        let wanted: String = covered.iter().map(|on| if *on { '1' } else { '0' }).collect();
        assert_eq!(client.pins(), wanted.trim_end_matches('0'));
        let count = covered.iter().filter(|on| **on).count() as u64;
        assert_eq!((purse.charged(), source.pinned_pages(), source.pinned().iter().map(|span| span.len()).sum()), (count, count, count));
    }
    spaces.iter().for_each(|space| audit(space));
}
