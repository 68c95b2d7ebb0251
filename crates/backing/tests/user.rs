//! The process's own memory as a backing: new, adopted, punched, and gone.
#![expect(unsafe_code, reason = "adopting memory is a promise about it")]

mod common;

use common::*;
use lockstep_backing::{Backing, Error, Frames, HostAddr, Kind, PageState, UserRegion};
use rustix::mm::{MapFlags, ProtFlags};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// One test unmaps what is still adopted, and nothing else may be mapped there before it lets go: the others wait.
static ADOPTING: Mutex<()> = Mutex::new(());

fn adopting() -> MutexGuard<'static, ()> {
    ADOPTING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Memory that no Rust reference knows.
fn mapping(len: usize, flags: MapFlags) -> *mut u8 {
    // SAFETY: a new mapping.
    unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags) }.unwrap().cast()
}

#[test]
fn new_memory() {
    let _one = adopting();
    let region = UserRegion::new(4 << 20).unwrap();
    let (start, len) = (region.hva(), region.len_bytes());
    let backing = Backing::user(region, Frames::Scattered { seed: 3 }).unwrap();
    assert_eq!((backing.kind(), backing.linear_hva(), backing.len_bytes()), (Kind::User, Some(start), len));
    let at = backing.host(backing.oa(page(700)), K4).unwrap();
    assert_eq!(at.hva().get(), start.get() + 700 * K4);
    at.write(0, &[9; 4096]).unwrap();
    assert_eq!(backing.holes(pages(699, 701)).unwrap(), [pages(699, 699), pages(701, 701)]);
    let ear = Ear::of(&backing);
    backing.punch(pages(700, 700)).unwrap();
    assert_eq!(ear.take(), [Heard::Revoke(pages(700, 700), PageState::Absent, Some(9))]);
    assert_eq!(backing.holes(pages(700, 700)).unwrap(), [pages(700, 700)]);
    backing.populate(pages(690, 710), PageState::Shared).unwrap();
    assert_eq!((backing.holes(pages(690, 710)).unwrap(), byte(at, 0)), (vec![], 0));
    assert!(matches!(UserRegion::new(100), Err(Error::Length { len_bytes: 100, .. })));
}

#[test]
fn adopted_memory_is_used_in_place() {
    let _one = adopting();
    for flags in [MapFlags::PRIVATE, MapFlags::SHARED] {
        // Twice as long as what is adopted: what lies behind is there, and must not be reached.
        let start = mapping(2 * M2 as usize, flags);
        // SAFETY: only raw accesses below touch it.
        let backing = Backing::user(unsafe { UserRegion::adopt(start, M2) }.unwrap(), Frames::Contiguous).unwrap();
        let at = host(&backing);
        at.write(K4, b"device").unwrap();
        // SAFETY: our own mapping.
        assert_eq!(unsafe { start.add(4096).read_volatile() }, b'd');
        at.store_u64(8, 77).unwrap();
        assert_eq!(at.load_u64(8), Ok(77));
        assert!(at.read(M2, &mut [0]).is_err() && at.read(M2 - 1, &mut [0, 0]).is_err() && at.read(M2 - 1, &mut [0]).is_ok());
        let other = Backing::memfd(M2, Frames::Contiguous).unwrap();
        HostAddr::copy(at, host(&other), 2 * K4 as usize).unwrap();
        assert_eq!(byte(host(&other), K4 + 1), b'e');
        backing.punch(pages(1, 1)).unwrap();
        // SAFETY: our own mapping.
        assert_eq!(unsafe { start.add(4096).read_volatile() }, 0, "{flags:?}");
        assert!(matches!(backing.holes(pages(0, 1)), Err(Error::Unsupported { .. })));
        assert!(!backing.recheck(backing.pages()).unwrap().holes_seen);
        // Unmapped by its owner: accesses fail.
        // SAFETY: our own mapping, not used again.
        unsafe { rustix::mm::munmap(start.cast(), M2 as usize) }.unwrap();
        assert!(at.read(0, &mut [0; 4096]).is_err());
    }
}

#[test]
fn an_address_of_adopted_memory_dies_with_the_region() {
    let _one = adopting();
    let start = mapping(M2 as usize, MapFlags::PRIVATE);
    // SAFETY: only raw accesses touch it.
    let adopt = || unsafe { UserRegion::adopt(start, M2) };
    let backing = Backing::user(adopt().unwrap(), Frames::Contiguous).unwrap();
    let at = host(&backing);
    assert!(matches!(adopt(), Err(Error::RegionTaken { .. })));
    // SAFETY: as above.
    assert!(matches!(unsafe { UserRegion::adopt(start.wrapping_add(4096), M2) }, Err(Error::RegionTaken { .. })));
    drop(backing);
    assert!(at.write(0, &[1]).is_err(), "memory of somebody else was written through a stale address");
    // SAFETY: our own mapping.
    assert_eq!(unsafe { start.read_volatile() }, 0);
    drop(adopt().unwrap());
}

#[test]
fn what_cannot_be_adopted() {
    let _one = adopting();
    let backing = Backing::memfd(M2, Frames::Contiguous).unwrap();
    let window = backing.linear_hva().unwrap().get() as usize;
    for (start, len) in [(0x1000_0001, K4), (0x1000_0000, 0), (0x1000_0000, 5), (usize::MAX & !4095, 2 * K4)] {
        // SAFETY: refused before anything is done with it.
        let region = unsafe { UserRegion::adopt(std::ptr::without_provenance_mut(start), len) };
        assert!(matches!(region, Err(Error::Length { .. } | Error::Span(_))), "{start:#x} {len:#x}: {region:?}");
    }
    // SAFETY: as above.
    let region = unsafe { UserRegion::adopt(std::ptr::without_provenance_mut(window), K4) };
    assert!(matches!(region, Err(Error::RegionTaken { .. })));
}
