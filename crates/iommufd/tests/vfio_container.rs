//! The calls of a VFIO container, on /dev/iommu: rules 68 to 70.

mod common;

use addr::{Iova, Span};
use common::{FIXED, MIB, PAGE, Program, RW, VFIO_IOAS, errno, leaves, shown};
use lockstep_iommufd::uapi::vfio::{CapDmaAvail, CapIovaRange, DmaMap, DmaUnmap, Type1Info};
use lockstep_iommufd::uapi::{self, io};
use lockstep_iommufd::{Answer, Caller, Touch};
use rustix::io::Errno;
use zerocopy::IntoBytes;

const TYPE1: u64 = 1;
const TYPE1V2: u64 = 3;
const AT: u64 = 0x4000_0000;

fn number(program: &Program, nr: u32, arg: u64) -> Answer<i64> {
    program.local.call(&*program.context, io(nr), arg)
}

fn set_iommu(program: &Program, kind: u64) -> Answer<i64> {
    number(program, 0x66, kind)
}

/// A program whose VFIO calls go to an IOAS.
fn container() -> (Program, u32) {
    let program = Program::new();
    let id = program.alloc();
    program.call(VFIO_IOAS, uapi::VfioIoas { op: uapi::VFIO_IOAS_SET, ioas_id: id, ..Default::default() }).unwrap();
    (program, id)
}

fn map(program: &Program, flags: u32, vaddr: u64, size: u64, iova: u64) -> Answer {
    program.call(0x71, DmaMap { argsz: 0, flags, vaddr, iova, size }).map(|_| ())
}

fn unmap(program: &Program, flags: u32, iova: u64, size: u64) -> Answer<u64> {
    program.call(0x72, DmaUnmap { argsz: 0, flags, iova, size }).map(|arg| arg.size)
}

#[test]
fn what_there_is() {
    let (program, id) = container();
    assert_eq!(number(&program, 0x64, 12345).unwrap(), 0);
    let has = |extension| number(&program, 0x65, extension).unwrap();
    assert_eq!([1, 3, 4, 9].map(has), [1; 4]);
    // SPAPR, enhanced, NESTING, NOIOMMU, UPDATE_VADDR, and what nobody knows.
    assert_eq!([0, 2, 5, 6, 7, 8, 10, 11, u64::MAX].map(has), [0; 9]);
    for kind in [0, 2, 4, 6, 8, 9, u64::MAX] {
        assert_eq!(errno(set_iommu(&program, kind)), Errno::INVAL);
    }
    program.destroy(id).unwrap();
    assert_eq!([1, 3, 9, 6].map(has), [1, 1, 1, 0], "these need no IOAS");
    assert_eq!(errno(number(&program, 0x65, 4)), Errno::NODEV);
    assert_eq!(errno(set_iommu(&program, 7)), Errno::INVAL, "the kind, then the IOAS");
    assert_eq!(errno(set_iommu(&program, TYPE1V2)), Errno::NODEV);
    assert_eq!(errno(map(&program, 4, 0, PAGE, 0)), Errno::INVAL, "the flags, then the IOAS");
    assert_eq!(errno(map(&program, 1, 0, PAGE, 0)), Errno::NODEV);
    assert_eq!(errno(unmap(&program, 1, 0, PAGE)), Errno::INVAL);
    assert_eq!(errno(unmap(&program, 2, 1, 1)), Errno::NODEV, "the IOAS, then what goes with ALL");
    assert_eq!(errno(number(&program, 0x75, AT)), Errno::NOTTY, "dirty pages are read otherwise");
}

fn info(program: &Program, argsz: u32) -> (Answer<i64>, Vec<u8>) {
    let mut bytes = vec![0xee; 512];
    bytes[..24].copy_from_slice(Type1Info { argsz, flags: 0xffff, iova_pgsizes: 1, cap_offset: 7, pad: 9 }.as_bytes());
    program.local.write(AT, &bytes).unwrap();
    let answer = number(program, 0x70, AT);
    program.local.read(AT, &mut bytes).unwrap();
    (answer, bytes)
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn half(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

#[test]
fn info_for_every_argsz() {
    let (program, id) = container();
    program.memory_at(AT, PAGE, Touch::WhileShown);
    program.ioas(id).ioas().reserve(Span::from_len(Iova::new(0x10000), 0x10000).unwrap()).unwrap();
    let avail = size_of::<CapDmaAvail>().next_multiple_of(8);
    let needed = 24 + avail + size_of::<CapIovaRange>() + 2 * 16;
    for argsz in 0..=needed as u32 + 40 {
        let (answer, bytes) = info(&program, argsz);
        if argsz < 16 {
            assert_eq!((errno(answer), half(&bytes, 0), half(&bytes, 4)), (Errno::INVAL, argsz, 0xffff));
            continue;
        }
        answer.unwrap();
        let size = argsz as usize;
        assert_eq!((half(&bytes, 0) as usize, half(&bytes, 4)), (needed, 3), "what it would take, always");
        assert_eq!(word(&bytes, 8), !0xfff, "every size from a page on");
        assert!(bytes[size.clamp(24, needed)..].iter().all(|byte| *byte == 0xee));
        if size < 24 {
            let given = Type1Info { argsz, flags: 0xffff, iova_pgsizes: 1, cap_offset: 7, pad: 9 };
            assert_eq!(bytes[size..24], given.as_bytes()[size..], "behind the caller's end");
            assert!(bytes[16..size].iter().all(|byte| *byte == 0));
        } else if size < needed {
            assert_eq!((half(&bytes, 16), half(&bytes, 20)), (0, 0), "all of them or none");
            assert!(bytes[24..].iter().all(|byte| *byte == 0xee));
        } else {
            // By hand: id and version, next; the number; id and version, next; how many; the ranges.
            assert_eq!([16, 24, 28, 32].map(|at| half(&bytes, at)), [24, 1 << 16 | 3, 24 + avail as u32, u32::MAX]);
            let at = 24 + avail;
            assert_eq!([at, at + 4, at + 8].map(|at| half(&bytes, at)), [1 << 16 | 1, 0, 2]);
            let ranges: Vec<_> = (0..4).map(|index| word(&bytes, at + 16 + 8 * index)).collect();
            assert_eq!(ranges, [0, 0xffff, 0x20000, u64::MAX]);
        }
    }
    program.local.hide(AT, PAGE).unwrap();
    assert_eq!(errno(number(&program, 0x70, AT)), Errno::FAULT);
}

#[test]
fn page_sizes() {
    let (program, id) = container();
    program.memory_at(AT, PAGE, Touch::WhileShown);
    let sizes = || {
        let (answer, bytes) = info(&program, 24);
        answer.unwrap();
        word(&bytes, 8)
    };
    let ioas = program.ioas(id);
    let mock = program.attach_mock(id);
    let wanted = mock.sizes().0 & !0xfff;
    assert_eq!(sizes(), wanted | PAGE, "half pages are no use through this interface");
    let config = iommu::DomainConfig { sizes: addr::SizeSet(PAGE | (2 * MIB)), ..Default::default() };
    let other = program.attach_with(id, &config).unwrap();
    assert_eq!(sizes(), PAGE | (2 * MIB), "what all of them have");
    ioas.ioas().detach(&mock).unwrap();
    ioas.ioas().detach(&other).unwrap();
    set_iommu(&program, TYPE1).unwrap();
    assert_eq!(sizes(), !0xfff);
}

#[test]
fn map_and_its_errors_in_order() {
    let (program, id) = container();
    let domain = program.attach(id);
    let va = program.memory(8 * PAGE);
    for flags in [4, 8, 7, 1 << 31] {
        assert_eq!(errno(map(&program, flags, va, PAGE, 0x10000)), Errno::INVAL);
    }
    let refused = |flags, vaddr, size, iova| errno(map(&program, flags, vaddr, size, iova));
    map(&program, 1, va, PAGE, 0x10000).unwrap();
    assert_eq!(refused(0, va, PAGE, 0x20000), Errno::INVAL, "neither READ nor WRITE");
    assert_eq!(refused(3, u64::MAX, PAGE, 0x10000), Errno::OVERFLOW);
    assert_eq!(refused(3, va, 0, 0x10000), Errno::INVAL);
    assert_eq!(refused(3, va, PAGE, 0x10001), Errno::INVAL);
    assert_eq!(refused(3, va, PAGE, 0x10000), Errno::EXIST);
    assert_eq!(refused(3, va, PAGE, u64::MAX), Errno::INVAL, "not aligned");
    assert_eq!(refused(3, va, 2 * PAGE, u64::MAX - 0xfff), Errno::OVERFLOW);
    assert_eq!(refused(3, va + 1, PAGE, 0x20000), Errno::INVAL);
    assert_eq!(refused(3, 0x7777_0000, PAGE, 0x20000), Errno::FAULT);
    map(&program, 3, va, 2 * PAGE, 0).unwrap();
    map(&program, 2, va, PAGE, u64::MAX - 0xfff).unwrap();
    let perm = |iova| domain.table().walk(Iova::new(iova)).unwrap().perm;
    assert_eq!([0x10000, 0x1fff, u64::MAX].map(perm), [pt::Perm::READ, pt::Perm::RW, pt::Perm::WRITE]);
    // Nothing goes back, so a structure in read-only memory is fine.
    program.call_read_only(0x71, DmaMap { argsz: 32, flags: 3, vaddr: va, iova: 0x90000, size: PAGE }).unwrap();
    assert!(shown(&domain, 0x90000));
}

#[test]
fn unmap_as_the_second_type_does() {
    let (program, id) = container();
    set_iommu(&program, TYPE1V2).unwrap();
    let domain = program.attach(id);
    let va = program.memory(16 * PAGE);
    for iova in [0x10000, 0x14000, 0x20000] {
        map(&program, 3, va, 4 * PAGE, iova).unwrap();
    }
    for flags in [1, 4, 3, 5, 1 << 31] {
        assert_eq!(errno(unmap(&program, flags, 0x10000, PAGE)), Errno::INVAL);
    }
    for (iova, size) in [(1, 0), (0, 1), (0x10000, 4 * PAGE), (0, u64::MAX)] {
        assert_eq!(errno(unmap(&program, 2, iova, size)), Errno::INVAL, "with ALL there is no range");
    }
    assert_eq!(errno(unmap(&program, 0, 0x10000, 0)), Errno::INVAL);
    assert_eq!(errno(unmap(&program, 0, u64::MAX, 2)), Errno::OVERFLOW);
    assert_eq!(unmap(&program, 0, 0x80000, PAGE).unwrap(), 0, "nothing is there, which is fine");
    assert_eq!(errno(unmap(&program, 0, 0x10000, PAGE)), Errno::NOENT, "a cut");
    assert_eq!(errno(unmap(&program, 0, 0x11000, PAGE)), Errno::NOENT);
    assert_eq!(errno(unmap(&program, 0, 0x10000, 5 * PAGE)), Errno::NOENT);
    assert_eq!(program.areas(id), [(0x14000, 0x17fff), (0x20000, 0x23fff)], "what lay below the cut is gone");
    assert_eq!(unmap(&program, 0, 0x13000, 6 * PAGE).unwrap(), 4 * PAGE);
    assert_eq!(unmap(&program, 2, 0, 0).unwrap(), 4 * PAGE);
    assert_eq!(unmap(&program, 2, 0, 0).unwrap(), 0);
    assert_eq!(leaves(&domain, 0, 1 << 30), [0u64; 0]);
    map(&program, 3, va, PAGE, 0x10000).unwrap();
    assert_eq!(errno(program.call_read_only(0x72, DmaUnmap { argsz: 24, flags: 0, iova: 0x10000, size: PAGE })), Errno::FAULT);
    assert_eq!(program.areas(id), [], "what is gone stays gone");
}

/// The first type cuts what sticks out of the range, and devices go on with the rest.
#[test]
fn unmap_as_the_first_type_does() {
    let (program, id) = container();
    set_iommu(&program, TYPE1).unwrap();
    let domain = program.attach(id);
    let va = program.memory(16 * PAGE);
    map(&program, 3, va, 16 * PAGE, 0x10000).unwrap();
    assert_eq!(unmap(&program, 0, 0x13000, 2 * PAGE).unwrap(), 2 * PAGE);
    assert_eq!(program.areas(id), [(0x10000, 0x12fff), (0x15000, 0x1ffff)]);
    let seen = |iova| shown(&domain, iova);
    assert_eq!([0x12fff, 0x13000, 0x14fff, 0x15000].map(seen), [true, false, false, true]);
    assert_eq!(unmap(&program, 0, 0, 0x11000).unwrap(), PAGE, "from below into the middle");
    assert_eq!(unmap(&program, 0, 0x1e000, 1 << 20).unwrap(), 2 * PAGE);
    assert_eq!(unmap(&program, 0, 0x12000, 6 * PAGE).unwrap(), 4 * PAGE, "over a gap");
    assert_eq!(program.areas(id), [(0x11000, 0x11fff), (0x18000, 0x1dfff)]);
    assert_eq!(unmap(&program, 0, 0x30000, PAGE).unwrap(), 0);
    assert_eq!(errno(unmap(&program, 0, 0x18800, PAGE)), Errno::INVAL, "not where the alignment allows a cut");
    assert_eq!(errno(unmap(&program, 0, 0x18000, 0x801)), Errno::INVAL);
    assert_eq!(program.areas(id), [(0x11000, 0x11fff), (0x18000, 0x1dfff)]);
    // Ends of the address space.
    map(&program, 3, va, 2 * PAGE, 0).unwrap();
    map(&program, 3, va, 2 * PAGE, u64::MAX - 0x1fff).unwrap();
    assert_eq!(unmap(&program, 0, 0, PAGE).unwrap(), PAGE);
    assert_eq!(unmap(&program, 0, u64::MAX - 0xfff, PAGE).unwrap(), PAGE);
    assert_eq!(program.areas(id), [(0x1000, 0x1fff), (0x11000, 0x11fff), (0x18000, 0x1dfff), (u64::MAX - 0x1fff, u64::MAX - 0x1000)]);
    // Both halves show the pages that they showed before.
    let (_, mut dma) = program.device(&domain);
    for (iova, page) in [(0x11000, 1u64), (0x18000, 8), (0x1d000, 13)] {
        dma.write(Iova::new(iova), &[page as u8]).unwrap();
        assert_eq!(program.local.get::<u8>(va + page * PAGE), page as u8);
    }
}

#[test]
fn what_cannot_be_cut() {
    let (program, id) = container();
    set_iommu(&program, TYPE1).unwrap();
    let ioas = std::sync::Arc::clone(program.ioas(id).ioas());
    let va = program.memory(16 * PAGE);
    map(&program, 3, va, 4 * PAGE, 0x10000).unwrap();
    let locks = ioas.lock_areas(Span::one(Iova::new(0x10000))).unwrap();
    assert_eq!(errno(unmap(&program, 0, 0x11000, PAGE)), Errno::BUSY);
    drop(locks);
    let accessor = ioas.accessor(true, std::sync::Arc::new(|_| {})).unwrap();
    let pin = accessor.pin(Span::from_len(Iova::new(0x10000), PAGE).unwrap(), false).unwrap();
    assert_eq!(errno(unmap(&program, 0, 0x11000, PAGE)), Errno::INVAL, "pinned");
    accessor.unpin(pin);
    assert_eq!(unmap(&program, 0, 0x11000, PAGE).unwrap(), PAGE);
    let buffer = lockstep_iommufd::DmaBuf::new(4 * PAGE).unwrap();
    let fd = program.local.install(buffer).unwrap();
    program.map_file(id, FIXED | RW, fd, 0, 4 * PAGE, 0x20000).unwrap();
    assert_eq!(errno(unmap(&program, 0, 0x20000, PAGE)), Errno::OPNOTSUPP, "a device's buffer");
    assert_eq!(unmap(&program, 0, 0x20000, 4 * PAGE).unwrap(), 4 * PAGE);
}

/// Cut with large leaves still there from before: the option changes what comes, not what is.
#[test]
fn the_first_type_needs_small_leaves() {
    let (program, id) = container();
    let domain = program.attach(id);
    let va = program.memory(2 * MIB);
    map(&program, 3, va, 2 * MIB, 2 * MIB).unwrap();
    assert_eq!(errno(set_iommu(&program, TYPE1)), Errno::INVAL, "areas and a page table");
    unmap(&program, 2, 0, 0).unwrap();
    set_iommu(&program, TYPE1).unwrap();
    set_iommu(&program, TYPE1).unwrap();
    map(&program, 3, va, 2 * MIB, 2 * MIB).unwrap();
    assert_eq!(leaves(&domain, 2 * MIB, 2 * MIB).len(), 512);
    set_iommu(&program, TYPE1V2).unwrap();
    assert_eq!(unmap(&program, 0, 2 * MIB + PAGE, PAGE).unwrap(), PAGE, "the second type does not bring them back");
}
