//! The in-process caller: what it reads, what it refuses, and what becomes of descriptors.

use backing::{Backing, Frames, UserRegion};
use iommufd::uapi::{self, io};
use iommufd::{Caller, File, Host, HostConfig, Local, Opened, Touch};
use lockstep_iommufd as iommufd;
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

const MAP: u32 = io(0x85);
const RW_FIXED: u32 = 7;

fn memory(pages: u64) -> Arc<Backing> {
    Backing::user(UserRegion::new(pages << 12).unwrap(), Frames::Contiguous).unwrap()
}

#[test]
fn bytes_come_and_go_across_pages_and_not_into_holes() {
    let (local, backing) = (Local::new(), memory(4));
    let at = local.add(&backing).unwrap();
    local.write(at + 4090, b"hello world").unwrap();
    let mut back = [0; 11];
    local.read(at + 4090, &mut back).unwrap();
    assert_eq!(&back, b"hello world");
    local.hide(at + 4096, 4096).unwrap();
    assert_eq!(local.read(at + 4090, &mut back).unwrap_err().errno, Errno::FAULT);
    local.read(at + 8192, &mut back).unwrap();
    assert_eq!(local.read(at + (4 << 12) - 1, &mut back).unwrap_err().errno, Errno::FAULT);
    assert_eq!(local.read(u64::MAX, &mut back).unwrap_err().errno, Errno::FAULT);
    let read_only = 0x7000_0000;
    local.add_at(&memory(1), read_only, Touch::ReadOnly).unwrap();
    local.read(read_only, &mut back).unwrap();
    assert_eq!(local.write(read_only, &back).unwrap_err().errno, Errno::FAULT);
    assert!(local.add_at(&memory(1), read_only, Touch::Always).is_err());
}

#[test]
fn scratch_memory_keeps_what_was_put() {
    let local = Local::new();
    let (one, two) = (local.put(&[1u8, 2, 3]), local.put(&0x1234_5678_9abc_u64));
    assert_eq!((local.get::<[u8; 3]>(one), local.get::<u64>(two)), ([1, 2, 3], 0x1234_5678_9abc));
    local.write(two + 3, &[0xff, 0xee]).unwrap();
    assert_eq!(local.get::<u64>(two), 0x12ee_ff78_9abc);
    // Round and round.
    for round in 0..40u8 {
        let at = local.put(&[round; 60_000][..]);
        assert_eq!(local.get::<[u8; 60_000]>(at), [round; 60_000]);
    }
}

/// A bad address is accepted when nobody needs the pages, and found when somebody does (rule 16).
#[test]
fn bad_addresses_can_be_mapped() {
    let (host, local) = (Host::new(HostConfig::default()).unwrap(), Local::new());
    let context = host.open();
    let mut alloc = uapi::IoasAlloc { size: 12, ..Default::default() };
    local.ioctl(&*context, io(0x81), &mut alloc).unwrap();
    let mut map =
        uapi::IoasMap { size: 40, flags: RW_FIXED, ioas_id: 1, user_va: 0x1000, length: 4096, iova: 0x1000, ..Default::default() };
    local.ioctl(&*context, MAP, &mut map).unwrap();
    assert_eq!(local.ioctl(&*context, MAP, &mut map).unwrap_err().errno, Errno::EXIST);
    let ioas = context.ioas(1).unwrap();
    let domain = host.iommu().domain().unwrap();
    assert!(ioas.ioas().attach(&domain).is_err());
    // There is memory after all.
    local.add_at(&memory(1), 0x1000, Touch::WhileShown).unwrap();
    ioas.ioas().attach(&domain).unwrap();
    ioas.ioas().detach(&domain).unwrap();
    local.hide(0x1000, 4096).unwrap();
    assert!(ioas.ioas().attach(&domain).is_err());
}

#[test]
fn a_structure_in_read_only_memory_cannot_be_answered() {
    let (host, local) = (Host::new(HostConfig::default()).unwrap(), Local::new());
    let (context, backing) = (host.open(), memory(1));
    local.add_at(&backing, 0x10000, Touch::Always).unwrap();
    local.write(0x10000, &[12, 0, 0, 0]).unwrap();
    local.hide(0x10000, 4096).unwrap();
    local.add_at(&backing, 0x10000, Touch::ReadOnly).unwrap();
    assert_eq!(local.call(&*context, io(0x81), 0x10000).unwrap_err().errno, Errno::FAULT);
    assert!(context.ioas(1).is_err(), "the object that nobody was told of is gone");
}

#[derive(Debug, Default)]
struct Counted {
    released: AtomicU32,
    fails: bool,
}

impl File for Counted {
    fn kind(&self) -> &'static str {
        "counted"
    }
    fn ioctl(&self, caller: &dyn Caller, _: u32, _: u64) -> iommufd::Answer<i64> {
        let fd = caller.install(Arc::new(Self::default()))?;
        if self.fails { Err(iommufd::Refusal::of(Errno::IO, "no")) } else { Ok(fd.into()) }
    }
    fn released(&self) {
        self.released.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn a_file_is_released_once_when_its_last_descriptor_goes() {
    let (local, file) = (Local::new(), Arc::new(Counted::default()));
    let fd = local.install(Arc::clone(&file) as _).unwrap();
    let other = local.dup(fd).unwrap();
    assert_eq!((fd, other), (3, 4));
    let child = local.fork();
    local.close(fd).unwrap();
    local.close(other).unwrap();
    assert_eq!(local.close(other).unwrap_err().errno, Errno::BADF);
    assert_eq!(file.released.load(Ordering::Relaxed), 0);
    child.exit();
    assert_eq!(file.released.load(Ordering::Relaxed), 1);
    assert_eq!(child.process().unwrap_err().errno, Errno::SRCH);
}

#[test]
fn a_call_that_fails_installs_nothing() {
    let local = Local::new();
    local.call(&Counted { fails: true, ..Counted::default() }, 0, 0).unwrap_err();
    assert!(local.descriptors().is_empty());
    let fd = local.call(&Counted::default(), 0, 0).unwrap();
    assert_eq!(local.descriptors(), [i32::try_from(fd).unwrap()]);
    assert!(local.opened(3).unwrap().downcast::<Counted>().is_some());
    local.set_most_files(1);
    assert_eq!(local.call(&Counted::default(), 0, 0).unwrap_err().errno, Errno::MFILE);
}

#[test]
fn files_that_are_no_memory_fail_when_they_are_pinned() {
    let local = Local::new();
    let (pipe, _other) = rustix::pipe::pipe().unwrap();
    let fd = local.give(pipe).unwrap();
    assert!(matches!(local.file(fd).unwrap(), Opened::Other));
    let bad = local.file_memory(fd, 0, 4096).unwrap();
    assert!(matches!(bad.backing.pin(bad.backing.pages(), false), Err(backing::PinError::WrongFile { is: "a pipe", .. })));
    let memfd: OwnedFd = rustix::fs::memfd_create("m", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memfd, 8192).unwrap();
    let fd = local.give(memfd).unwrap();
    let one = local.file_memory(fd, 4096, 4096).unwrap();
    let two = local.file_memory(fd, 0, 8192).unwrap();
    assert!(Arc::ptr_eq(&one.backing, &two.backing) && one.offset == 4096);
    let long = local.file_memory(fd, 4096, 8192).unwrap();
    assert!(matches!(long.backing.pin(long.backing.pages(), false), Err(backing::PinError::Outside { .. })));
    assert_eq!(local.file_memory(77, 0, 1).unwrap_err().errno, Errno::BADF);
}
