//! IOMMU_IOAS_MAP_FILE: rules 22 and 36 to 38. Device buffers are in dmabuf.rs.

mod common;

use addr::Iova;
use common::{FIXED, MAP_FILE, MIB, PAGE, Program, READ, RW, errno, memfd, nobody, pinned, shown};
use iommu::DomainConfig;
use lockstep_iommufd::uapi;
use rustix::io::Errno;

#[test]
fn the_order_of_errors() {
    let program = Program::new();
    let id = program.alloc();
    program.attach(id);
    let fd = program.file(8 * PAGE);
    program.map_file(id, FIXED | RW, fd, 0, PAGE, 0x9000).unwrap();
    let mut arg =
        uapi::IoasMapFile { flags: 8, ioas_id: 99, fd: -1, start: u64::MAX, length: u64::MAX, iova: u64::MAX, ..Default::default() };
    let refused = |arg| errno(program.call(MAP_FILE, arg));
    assert_eq!(refused(arg), Errno::OPNOTSUPP, "an unknown flag");
    arg.flags = FIXED;
    assert_eq!(refused(arg), Errno::OVERFLOW, "the IOVA");
    arg.iova = 0x9001;
    assert_eq!(refused(arg), Errno::OVERFLOW, "the length");
    arg.length = 0;
    assert_eq!(refused(arg), Errno::INVAL, "neither reading nor writing");
    arg.flags = FIXED | RW;
    assert_eq!(refused(arg), Errno::NOENT, "the IOAS");
    arg.ioas_id = id;
    assert_eq!(refused(arg), Errno::INVAL, "no length");
    arg.length = 1 << 63;
    assert_eq!(refused(arg), Errno::OVERFLOW, "the range wraps");
    arg.start = 0x801;
    assert_eq!(refused(arg), Errno::BADF, "the descriptor");
    arg.fd = fd;
    arg.length = u64::MAX - PAGE + 1;
    arg.start = 0;
    assert_eq!(refused(arg), Errno::INVAL, "longer than any file");
    arg.start = 0x801;
    arg.length = 0x1801;
    assert_eq!(refused(arg), Errno::INVAL, "a length that is not aligned");
    arg.length = 0x2000;
    assert_eq!(refused(arg), Errno::INVAL, "an IOVA that is not aligned");
    arg.iova = 0x9000;
    assert_eq!(refused(arg), Errno::EXIST, "taken");
    arg.iova = 0xa000;
    assert_eq!(refused(arg), Errno::INVAL, "the start is not aligned");
    arg.start = 7 * PAGE;
    assert_eq!(refused(arg), Errno::INVAL, "the file ends before");
    arg.start = 6 * PAGE;
    program.call(MAP_FILE, arg).unwrap();
    assert_eq!(program.areas(id), [(0x9000, 0x9fff), (0xa000, 0xbfff)]);
}

#[test]
fn descriptors_that_are_none() {
    let program = Program::new();
    let id = program.alloc();
    for fd in [-1, i32::MIN, 2, 1000, i32::MAX] {
        assert_eq!(errno(program.map_file(id, RW, fd, 0, PAGE, 0)), Errno::BADF, "{fd}");
    }
    let fd = program.file(PAGE);
    program.local.close(fd).unwrap();
    assert_eq!(errno(program.map_file(id, RW, fd, 0, PAGE, 0)), Errno::BADF);
    // The iommufd itself is a file, and has no pages; the kernel leaks a whole context over this.
    let own = lockstep_iommufd::Caller::install(&program.local, std::sync::Arc::clone(&program.context) as _).unwrap();
    assert_eq!(errno(program.map_file(id, RW, own, 0, PAGE, 0)), Errno::INVAL);
}

/// The kind of the file and its size are looked at when somebody needs the pages, and not before.
#[test]
fn files_that_are_no_memory() {
    let program = Program::new();
    let (pipe, _other_end) = rustix::pipe::pipe().unwrap();
    let (short, plain) = (program.file(PAGE), std::fs::File::open("/proc/self/exe").unwrap());
    for fd in [short, program.local.give(pipe).unwrap(), program.local.give(plain.into()).unwrap()] {
        let id = program.alloc();
        program.map_file(id, FIXED | RW, fd, PAGE, PAGE, 0x10000).unwrap();
        let refused = program.attach_with(id, &DomainConfig::default()).unwrap_err();
        assert_eq!(lockstep_iommufd::Refusal::from(refused).errno, Errno::INVAL, "found when pinned");
        program.unmap(id, 0x10000, PAGE).unwrap();
        program.attach(id);
        assert_eq!(errno(program.map_file(id, FIXED | RW, fd, PAGE, PAGE, 0x10000)), Errno::INVAL);
        assert_eq!(program.areas(id), []);
    }
    // A file that grows in time is fine.
    let (id, fd) = (program.alloc(), memfd(0));
    let number = program.local.give(fd.try_clone().unwrap()).unwrap();
    program.map_file(id, FIXED | RW, number, 0, PAGE, 0x10000).unwrap();
    rustix::fs::ftruncate(&fd, PAGE).unwrap();
}

#[test]
fn a_device_sees_the_file() {
    let program = Program::new();
    let (id, fd) = (program.alloc(), memfd(4 * MIB));
    rustix::io::pwrite(&fd, b"in the file", 2 * MIB + 100).unwrap();
    let number = program.local.give(fd.try_clone().unwrap()).unwrap();
    let domain = program.attach(id);
    let iova = program.map_file(id, RW, number, 2 * MIB, 2 * MIB, 0).unwrap();
    assert_eq!(iova, 2 * MIB, "aligned as its offset is");
    assert_eq!(common::leaves(&domain, iova, 2 * MIB), [2 * MIB], "one leaf");
    let read_only = program.map_file(id, FIXED | READ, number, 2 * MIB, PAGE, 1 << 40).unwrap();
    let (_, mut dma) = program.device(&domain);
    let mut seen = [0; 11];
    dma.read(Iova::new(iova + 100), &mut seen).unwrap();
    assert_eq!(&seen, b"in the file");
    dma.write(Iova::new(read_only), &seen).unwrap_err();
    dma.write(Iova::new(iova), b"from the device").unwrap();
    let mut seen = [0; 15];
    rustix::io::pread(&fd, &mut seen, 2 * MIB).unwrap();
    assert_eq!(&seen, b"from the device");
    // The descriptor may go; the pages are held.
    program.local.close(number).unwrap();
    dma.read(Iova::new(iova), &mut seen).unwrap();
    assert_eq!(&seen, b"from the device");
}

#[test]
fn automatic_places_follow_the_offset() {
    let program = Program::new();
    let (id, fd) = (program.alloc(), program.file(8 * MIB));
    let auto = |start, length| program.map_file(id, RW, fd, start, length, 0).unwrap();
    assert_eq!(auto(0, PAGE), PAGE, "offset 0 bounds nothing");
    assert_eq!(auto(0, 4 * MIB), 2 * MIB);
    assert_eq!(auto(0x3000, 4 * PAGE), 2 * PAGE);
    assert_eq!(auto(0x3010, 16), 6 * PAGE + 0x10);
}

#[test]
fn limits_and_who_pays() {
    let program = Program::with_rights(nobody(9, 4 * PAGE));
    let (id, fd) = (program.alloc(), program.file(64 * PAGE));
    program.attach(id);
    let accounts = program.host.accounts();
    program.map_file(id, FIXED | RW, fd, 0, 3 * PAGE, 0x10000).unwrap();
    assert_eq!(errno(program.map_file(id, FIXED | RW, fd, 0, 2 * PAGE, 0x20000)), Errno::NOMEM);
    program.map_file(id, FIXED | RW, fd, 0, PAGE, 0x20000).unwrap();
    assert_eq!((accounts.of_user(9), pinned(program.ioas(id).ioas())), (4, 4), "two maps of one page are two pins");
    program.unmap(id, 0, u64::MAX).unwrap();
    assert_eq!(accounts.of_user(9), 0);
}

#[test]
fn read_only_structure() {
    let program = Program::new();
    let (id, fd) = (program.alloc(), program.file(PAGE));
    let domain = program.attach(id);
    let arg = uapi::IoasMapFile { flags: RW, ioas_id: id, fd, length: PAGE, ..Default::default() };
    assert_eq!(errno(program.call_read_only(MAP_FILE, arg)), Errno::FAULT);
    assert!(program.areas(id).is_empty() && !shown(&domain, PAGE));
}

#[test]
fn every_failing_step() {
    let program = Program::with_rights(nobody(7, 1 << 30));
    let (id, fd) = (program.alloc(), program.file(4 * MIB));
    let domain = program.attach(id);
    for step in 1.. {
        assert!(step < 500, "it never succeeds");
        let nth = sync::fail::nth(step);
        let answer = program.map_file(id, FIXED | RW, fd, PAGE, 3 * MIB, 33 * MIB + PAGE);
        let fired = nth.fired();
        drop(nth);
        let Some(name) = fired else {
            assert_eq!(answer.unwrap(), 33 * MIB + PAGE);
            break;
        };
        assert!(answer.is_err(), "{name}");
        assert_eq!((program.areas(id), program.host.accounts().of_user(7)), (vec![], 0), "{name}");
        assert_eq!(common::leaves(&domain, 0, 1 << 30), [0u64; 0], "{name}");
    }
}
