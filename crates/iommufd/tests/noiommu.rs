//! IOMMU_IOAS_NOIOMMU_GET_PA.

mod fakes;

use addr::{Iova, Page};
use backing::{Backing, Frames};
use fakes::Desk;
use ioas::Place;
use lockstep_iommufd::uapi::IoasNoiommuGetPa;
use pt::Perm;
use rustix::io::Errno;

#[test]
fn pieces_of_physical_memory() {
    let desk = Desk::new();
    let device = desk.bind(desk.fake());
    let ioas_id = desk.ioas();
    let ioas = desk.context.ioas(ioas_id).unwrap();
    let memory = Backing::memfd(16 << 12, Frames::Contiguous).unwrap();
    let at = |page: u64| Place::Fixed(Iova::new(0x10_0000 + (page << 12)));
    ioas.ioas().map_file(&memory, 0, 4 << 12, at(0), Perm::RW).unwrap();
    ioas.ioas().map_file(&memory, 4 << 12, 4 << 12, at(4), Perm::RW).unwrap();
    ioas.ioas().map_file(&memory, 12 << 12, 4 << 12, at(8), Perm::RW).unwrap();
    let get = |iova, length| {
        let mut arg = IoasNoiommuGetPa { size: 40, ioas_id, iova, length, ..Default::default() };
        desk.call(0x95, &mut arg).map(|_| (arg.out_phys, arg.length))
    };
    assert_eq!(get(0x10_0000, 1), Err(Errno::NOENT), "without a page table nothing has a place");
    device.attach(None, ioas_id).unwrap();
    let pa = memory.oa(Page::new(0)).get();
    assert_eq!(get(0x10_0000, 1), Ok((pa, 1)));
    assert_eq!(get(0x10_0123, 0x1000), Ok((pa + 0x123, 0x1000)));
    assert_eq!(get(0x10_0123, 1 << 40), Ok((pa + 0x123, (8 << 12) - 0x123)), "two areas in one piece, the third elsewhere");
    assert_eq!(get(0x10_8000, 1 << 40), Ok((pa + (12 << 12), 4 << 12)));
    // Pages here and there: each is a piece of its own, from the byte on that was asked for.
    let scattered = Backing::memfd(16 << 12, Frames::Scattered { seed: 1 }).unwrap();
    ioas.ioas().map_file(&scattered, 0, 16 << 12, at(0x100), Perm::RW).unwrap();
    let oa = |page| scattered.oa(Page::new(page)).get();
    let page = (0..15).find(|page| oa(*page) + 4096 != oa(page + 1)).unwrap();
    assert_eq!(get(0x20_0123 + (page << 12), 1 << 40), Ok((oa(page) + 0x123, 0xedd)));
    assert_eq!(get(0xf_f000, 1 << 40), Err(Errno::NOENT), "the beginning must be mapped");
}

#[test]
fn mistakes_are_found_in_order() {
    let desk = Desk::new();
    let mut arg = IoasNoiommuGetPa { size: 40, ioas_id: 99, iova: u64::MAX, length: 2, ..Default::default() };
    arg.length = 1;
    assert_eq!(desk.call(0x95, &mut arg), Err(Errno::NOENT));
    arg.length = 2;
    assert_eq!(desk.call(0x95, &mut arg), Err(Errno::OVERFLOW));
    arg.length = 0;
    assert_eq!(desk.call(0x95, &mut arg), Err(Errno::INVAL));
    arg.__reserved = 1;
    assert_eq!(desk.call(0x95, &mut arg), Err(Errno::OPNOTSUPP));
    (arg.__reserved, arg.flags) = (0, 1);
    assert_eq!(desk.call(0x95, &mut arg), Err(Errno::OPNOTSUPP));
    desk.local.set_process(|process| process.sys_rawio = false);
    assert_eq!(desk.call(0x95, &mut arg), Err(Errno::PERM));
}
