//! Software goes through the same areas and permissions as devices (rule 42).

mod common;

use addr::{Iova, Page};
use backing::{Backing, Frames, PageState};
use common::{MIB, PAGE, at, ioas, iova, pages, simulated};
use lockstep_ioas::Error;
use pt::Perm;

#[test]
fn bytes_cross_areas_and_frames() {
    let ioas = ioas();
    let low = Backing::memfd(MIB, Frames::Scattered { seed: 8 }).unwrap();
    let high = Backing::memfd(MIB, Frames::Contiguous).unwrap();
    ioas.map_file(&low, 0x123, MIB - 0x123, at(0x10_0123), Perm::RW).unwrap();
    ioas.map_file(&high, 0x777, 0x2000, at(0x20_0000), Perm::RW).unwrap();
    let wrote: Vec<u8> = (0..0x2_0000u32).map(|n| ((n * 7) >> 3) as u8).collect();
    let start = Iova::new(0x20_0000 - 0x1_f000);
    ioas.write(start, &wrote).unwrap();
    let mut read = vec![0; wrote.len()];
    ioas.read(start, &mut read).unwrap();
    assert!(read == wrote);
    let mut byte = [0];
    high.host(high.oa(Page::new(0)), PAGE).unwrap().read(0x777, &mut byte).unwrap();
    assert_eq!(byte[0], wrote[0x1_f000], "the second area begins at its source's place in the page");
    assert!(matches!(ioas.read(start, &mut []), Err(Error::Span(_))));
}

#[test]
fn refusals_come_after_what_was_possible() {
    let ioas = ioas();
    let memory = Backing::memfd(MIB, Frames::Contiguous).unwrap();
    ioas.map_file(&memory, 0, 2 * PAGE, at(0), Perm::RW).unwrap();
    ioas.map_file(&memory, 2 * PAGE, PAGE, at(2 * PAGE), Perm::READ).unwrap();
    ioas.map_file(&memory, 0, PAGE, at(0x10_0000), Perm::WRITE).unwrap();
    let fill = [9; 4 * PAGE as usize];
    assert!(matches!(ioas.write(Iova::new(0), &fill), Err(Error::Denied { area }) if area == iova(2 * PAGE, PAGE)));
    let mut read = [0; 4 * PAGE as usize];
    assert!(matches!(ioas.read(Iova::new(0), &mut read), Err(Error::NotMapped { at }) if at == iova(3 * PAGE, PAGE)));
    assert_eq!((read[0], read[2 * PAGE as usize - 1], read[2 * PAGE as usize]), (9, 9, 0));
    assert!(matches!(ioas.read(Iova::new(0x10_0000), &mut [0]), Err(Error::Denied { .. })));
    let held = memory.lock(pages(1, 1));
    memory.set_state(&held, pages(1, 1), PageState::Private).unwrap();
    drop(held);
    assert!(matches!(ioas.write(Iova::new(0), &fill), Err(Error::NotShared { page, state: PageState::Private }) if page == Page::new(1)));
    memory.punch(pages(1, 1)).unwrap();
    assert!(matches!(ioas.read(Iova::new(PAGE), &mut [0]), Err(Error::NotShared { state: PageState::Absent, .. })));
    ioas.map_file(&simulated(PAGE), 0, PAGE, at(0x20_0000), Perm::RW).unwrap();
    assert!(matches!(ioas.read(Iova::new(0x20_0000), &mut [0]), Err(Error::Fault { page }) if page == Page::new(0)));
}
