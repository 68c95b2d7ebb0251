//! Where mappings may go, as programs of the kernel's iommufd see it (rules 13 to 15 and 29 to 34).

mod common;

use addr::{Iova, Span, SpanError};
use backing::{Backing, Frames, UserRegion};
use common::{MIB, PAGE, at, audit, ioas, iova, leaves, simulated};
use lockstep_ioas::{Error, Place};
use pt::Perm;

#[test]
fn refusals_in_order() {
    let (ioas, memory) = (ioas(), simulated(MIB));
    let map = |offset, len, place| ioas.map_file(&memory, offset, len, place, Perm::RW);
    assert!(matches!(ioas.map_file(&memory, 0, 0, at(0), Perm::NONE), Err(Error::NoAccess)), "access comes before length");
    assert!(matches!(map(u64::MAX, 2, at(0)), Err(Error::Span(SpanError::Wraps { .. }))));
    assert!(matches!(map(0, 0, at(0)), Err(Error::Span(SpanError::Empty { .. }))));
    assert!(matches!(map(0, MIB + 1, at(0)), Err(Error::Beyond { .. })));
    assert!(matches!(map(MIB, 1, at(0)), Err(Error::Beyond { .. })));
    assert!(matches!(map(0, 2, at(u64::MAX)), Err(Error::Span(SpanError::Wraps { .. }))));
    ioas.reserve(iova(0x1_0000, 0x1000)).unwrap();
    map(0, 0x100, at(0x1_1000)).unwrap();
    assert!(matches!(map(0, 0x2000, at(0x1_0000)), Err(Error::Reserved { .. })), "reserved comes before taken");
    assert!(matches!(map(0, 0x2000, at(0x1_1080)), Err(Error::Occupied { area, .. }) if area == iova(0x1_1000, 0x100)));
    map(0, 1, at(u64::MAX)).unwrap();
    ioas.allow(&[iova(0x100_0000, 0x1000)]).unwrap();
    assert_eq!(map(0, 0x10, at(0x5)).unwrap(), Iova::new(5), "the allowed list does not restrict fixed places");
}

#[test]
fn a_domain_needs_whole_pages() {
    let (ioas, memory) = (ioas(), simulated(MIB));
    assert_eq!(ioas.alignment(), 1);
    let odd = ioas.map_file(&memory, 0x800, 0x10, Place::Auto, Perm::RW).unwrap();
    assert_eq!(odd, Iova::new(0x1800), "the source's place in its page is kept");
    let domain = ioas.iommu().domain().unwrap();
    assert!(matches!(ioas.attach(&domain), Err(Error::InUse { .. })));
    assert_eq!((ioas.alignment(), ioas.domains().len()), (1, 0));
    ioas.unmap(iova(0x1800, 0x10)).unwrap();
    ioas.attach(&domain).unwrap();
    assert_eq!(ioas.alignment(), PAGE);
    let map = |offset, len, place| ioas.map_file(&memory, offset, len, place, Perm::RW);
    assert!(matches!(map(0, 0x10, at(0)), Err(Error::Span(SpanError::Misaligned { .. }))));
    assert!(matches!(map(0, 0x1000, at(0x10)), Err(Error::Span(SpanError::Misaligned { .. }))));
    assert!(matches!(map(0x800, 0x1000, at(0)), Err(Error::SourceMisaligned { .. })));
    assert!(matches!(map(0x800, 0x1000, Place::Auto), Err(Error::SourceMisaligned { .. })));
    ioas.detach(&domain).unwrap();
    assert_eq!(ioas.alignment(), 1);
}

#[test]
fn automatic_places_are_low_and_suit_the_source() {
    let (ioas, memory) = (ioas(), simulated(16 * MIB));
    let auto = |offset, len| ioas.map_file(&memory, offset, len, Place::Auto, Perm::READ).unwrap().get();
    assert_eq!(auto(0, PAGE), PAGE, "IOVA 0 is never chosen");
    assert_eq!(auto(0, 4 * MIB), 2 * MIB, "aligned to a huge page at most");
    assert_eq!(auto(0x5000, 8 * PAGE), 2 * PAGE, "aligned no more than the source is");
    assert_eq!(auto(0x8000, 8 * PAGE), 0x1_0000);
    ioas.unmap(iova(2 * PAGE, 8 * PAGE)).unwrap();
    assert_eq!(auto(0, 2 * PAGE), 2 * PAGE, "the lowest gap is used first");
    assert!(matches!(ioas.map_file(&memory, 0, u64::MAX / 2, Place::Auto, Perm::READ), Err(Error::Beyond { .. })));
    let region = UserRegion::new(MIB).unwrap();
    let hva = region.hva();
    let user = Backing::user(region, Frames::Contiguous).unwrap();
    assert_eq!(ioas.map_user(&user, hva, PAGE, at(0x9000_0000), Perm::RW).unwrap(), Iova::new(0x9000_0000));
    assert_eq!(ioas.area_at(Iova::new(0x9000_0000)).unwrap().offset_bytes(), 0);
    assert!(matches!(ioas.map_user(&memory, hva, PAGE, Place::Auto, Perm::RW), Err(Error::NoSuchHva { .. })));
}

#[test]
fn allowed_and_reserved_ranges() {
    let (ioas, memory) = (ioas(), simulated(MIB));
    assert_eq!(ioas.ranges(), [Span::whole()]);
    let window = ioas.reserve(iova(0xfee0_0000, MIB)).unwrap();
    ioas.map_file(&memory, 0, MIB, at(0x100_0000), Perm::RW).unwrap();
    assert_eq!(ioas.ranges(), [iova(0, 0xfee0_0000), Span::of(Iova::new(0xfef0_0000), Iova::new(u64::MAX))], "areas do not matter");
    assert!(matches!(ioas.reserve(iova(0x100_0fff, 1)), Err(Error::InUse { .. })));
    assert!(matches!(ioas.allow(&[iova(0x20_0000, 1)]), Err(Error::Span(_))), "start must lie below last");
    assert!(matches!(ioas.allow(&[iova(0x20_0000, MIB), iova(0x2f_f000, MIB)]), Err(Error::AllowedOverlap { .. })));
    ioas.allow(&[iova(0x40_0000, MIB), iova(0x20_0000, 2 * PAGE)]).unwrap();
    assert!(matches!(ioas.allow(&[iova(0xfee0_1000, PAGE)]), Err(Error::InUse { .. })));
    assert!(matches!(ioas.reserve(iova(0x4f_f000, MIB)), Err(Error::InUse { .. })), "the old list still counts");
    let auto = |len| ioas.map_file(&memory, 0, len, Place::Auto, Perm::RW).map(Iova::get);
    assert_eq!(auto(PAGE).unwrap(), 0x20_0000);
    assert_eq!(auto(2 * PAGE).unwrap(), 0x40_0000);
    assert!(matches!(auto(MIB), Err(Error::NoRoom { .. })));
    ioas.allow(&[]).unwrap();
    assert_eq!(auto(PAGE).unwrap(), PAGE);
    ioas.release(window);
    ioas.map_file(&memory, 0, MIB, at(0xfee0_0000), Perm::RW).unwrap();
}

#[test]
fn large_leaves_are_an_option() {
    let (ioas, memory) = (ioas(), simulated(4 * MIB));
    let domain = ioas.iommu().domain().unwrap();
    ioas.map_file(&memory, 0, 0x10, at(0), Perm::RW).unwrap();
    assert!(matches!(ioas.set_large_leaves(false), Err(Error::InUse { .. })), "an area does not keep to pages");
    ioas.unmap_all().unwrap();
    ioas.set_large_leaves(false).unwrap();
    assert_eq!((ioas.large_leaves(), ioas.alignment()), (false, PAGE));
    ioas.attach(&domain).unwrap();
    ioas.map_file(&memory, 0, 4 * MIB, at(0), Perm::RW).unwrap();
    assert!(leaves(&domain).iter().all(|leaf| leaf.size.bytes() == PAGE) && leaves(&domain).len() == 1024);
    audit(&ioas);
    ioas.set_large_leaves(false).unwrap();
    ioas.set_large_leaves(true).unwrap();
    assert!(matches!(ioas.set_large_leaves(false), Err(Error::LargeLeavesInUse { areas: 1 })));
    ioas.map_file(&memory, 0, 4 * MIB, at(4 * MIB), Perm::RW).unwrap();
    assert_eq!(leaves(&domain).len(), 1025);
}
