//! Real guest_memfds of a VM, in IOAS_MAP_FILE and in conversions. Says so where the machine has none.
#![expect(unsafe_code, reason = "kvm-ioctls answers a bare descriptor")]

mod common;
mod guest;

use addr::Iova;
use backing::{Kind, PageState};
use common::{FIXED, MIB, Program, RW, errno, leaves};
use guest::{PRIVATE, SHARED, count};
use lockstep_iommufd::File;
use rustix::io::Errno;
use std::os::fd::{FromRawFd, OwnedFd};

const MMAP: u64 = 1;
const INIT_SHARED: u64 = 2;
/// KVM_X86_SW_PROTECTED_VM: kernels from 6.8 on make guest_memfds for these only, later ones for any VM.
const SW_PROTECTED: u64 = 1;

/// The VM, which must live as long as the file is used, and the file.
fn guest_memfd(test: &str, flags: u64, len: u64) -> Option<(kvm_ioctls::VmFd, OwnedFd)> {
    let create = || -> Result<_, String> {
        let kvm = kvm_ioctls::Kvm::new().map_err(|error| format!("/dev/kvm: {error}"))?;
        let protected = if flags == 0 { kvm.create_vm_with_type(SW_PROTECTED).ok() } else { None };
        let vm = protected.map_or_else(|| kvm.create_vm(), Ok).map_err(|error| format!("KVM_CREATE_VM: {error}"))?;
        let request = kvm_bindings::kvm_create_guest_memfd { size: len, flags, reserved: [0; 6] };
        let file = vm.create_guest_memfd(request).map_err(|error| format!("KVM_CREATE_GUEST_MEMFD with flags {flags}: {error}"))?;
        // SAFETY: a new descriptor that nobody else has.
        Ok((vm, unsafe { OwnedFd::from_raw_fd(file) }))
    };
    create().map_err(|why| println!("{test}: skipped, {why}")).ok()
}

/// Mapped by `{fd, offset}`, converted there and back, given back at the end.
fn there_and_back(test: &str, flags: u64) {
    let Some((_vm, fd)) = guest_memfd(test, flags, 8 * MIB) else { return };
    let program = Program::new();
    let id = program.alloc();
    let domain = program.attach(id);
    let fd = program.local.give(fd).unwrap();
    assert_eq!(errno(program.map_file(id, FIXED | RW, fd, 4 * MIB, 8 * MIB, 0)), Errno::INVAL, "the file ends before");
    program.map_file(id, FIXED | RW, fd, 0, 8 * MIB, 16 * MIB).unwrap();
    let backing = program.backing(id, 16 * MIB);
    assert_eq!((backing.kind(), count(&backing, PageState::Shared)), (Kind::GuestMemfd, 2048), "the host's until somebody converts it");
    assert_eq!(leaves(&domain, 16 * MIB, 8 * MIB), [8 * MIB]);
    program.clean(id);
    program.convert(id, PRIVATE, 17 * MIB, 4 * MIB);
    assert_eq!((program.assigned(&backing), count(&backing, PageState::Private)), (1024, 1024));
    program.clean(id);
    let (_, mut dma) = program.device(&domain);
    dma.read(Iova::new(17 * MIB), &mut [0; 8]).unwrap_err();
    program.convert(id, SHARED, 18 * MIB, MIB);
    program.clean(id);
    File::released(&*program.context);
    assert_eq!((program.assigned(&backing), count(&backing, PageState::Shared)), (0, 2048));
}

#[test]
fn mappable() {
    there_and_back("mappable", MMAP | INIT_SHARED);
}

#[test]
fn not_mappable() {
    there_and_back("not_mappable", 0);
}

/// DMA to the pages of a mappable one is seen by who maps it.
#[test]
fn a_device_writes_to_it() {
    let Some((_vm, fd)) = guest_memfd("a_device_writes_to_it", MMAP | INIT_SHARED, 2 * MIB) else { return };
    let program = Program::new();
    let id = program.alloc();
    let domain = program.attach(id);
    let fd = program.local.give(fd).unwrap();
    program.map_file(id, FIXED | RW, fd, MIB, MIB, 0).unwrap();
    let (_, mut dma) = program.device(&domain);
    dma.write(Iova::new(0x1234), b"by the device").unwrap();
    let at = program.local.add(&program.backing(id, 0)).unwrap();
    assert_eq!(&program.local.get::<[u8; 13]>(at + MIB + 0x1234), b"by the device");
}
