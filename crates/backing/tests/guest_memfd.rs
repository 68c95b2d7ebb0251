//! Real guest_memfds from /dev/kvm: mappable ones have bytes, others have addresses only. Says so where the host has none.
#![expect(unsafe_code, reason = "kvm-ioctls answers a bare descriptor")]

mod common;

use common::*;
use lockstep_backing::{Backing, Error, Frames, Kind, PageState};
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

#[test]
fn mappable() {
    let Some((_vm, file)) = guest_memfd("mappable", MMAP | INIT_SHARED, M2) else { return };
    assert_eq!(lockstep_backing::file_kind(std::os::fd::AsFd::as_fd(&file)), Some(Kind::GuestMemfd));
    let backing = Backing::from_file(file, 0, M2, Frames::Scattered { seed: 5 }).unwrap();
    assert_eq!((backing.kind(), backing.state(page(0))), (Kind::GuestMemfd, PageState::Shared));
    let at = backing.host(backing.oa(page(3)), K4).unwrap();
    assert_eq!(backing.holes(backing.pages()).unwrap(), [backing.pages()]);
    at.write(100, b"guest").unwrap();
    assert_eq!(backing.holes(backing.pages()).unwrap(), [pages(0, 2), pages(4, 511)], "mincore shows the page cache of a guest_memfd");
    backing.populate(pages(0, 9), PageState::Shared).unwrap();
    assert_eq!((backing.holes(backing.pages()).unwrap(), byte(at, 101)), (vec![pages(10, 511)], b'u'));
    let ear = Ear::of(&backing);
    backing.punch(pages(2, 4)).unwrap();
    assert_eq!(ear.take(), [Heard::Revoke(pages(2, 4), PageState::Absent, Some(0))]);
    assert_eq!(backing.holes(pages(0, 9)).unwrap(), [pages(2, 4)]);
    assert_eq!(byte(at, 101), 0, "the punched page still has its bytes");
}

#[test]
fn a_punch_behind_our_back_is_found() {
    let Some((_vm, file)) = guest_memfd("a_punch_behind_our_back_is_found", MMAP | INIT_SHARED, M2) else { return };
    let backing = Backing::guest_memfd(file, M2, Frames::Contiguous).unwrap();
    backing.populate(backing.pages(), PageState::Shared).unwrap();
    let ear = Ear::of(&backing);
    let mode = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(other_fd(&backing), mode, 7 * K4, 2 * K4).unwrap();
    assert_eq!(backing.recheck(backing.pages()).unwrap().lost, [pages(7, 8)]);
    assert!(matches!(ear.take()[..], [Heard::Revoke(span, PageState::Absent, _)] if span == pages(7, 8)));
}

#[test]
fn mapped_but_private() {
    let Some((_vm, file)) = guest_memfd("mapped_but_private", MMAP, M2) else { return };
    let backing = Backing::guest_memfd(file, M2, Frames::Contiguous.starting(PageState::Private)).unwrap();
    assert_eq!(backing.state(page(0)), PageState::Private);
    assert!(host(&backing).read(0, &mut [0; 64]).is_err(), "private memory was read");
    backing.populate(pages(0, 3), PageState::Private).unwrap();
}

#[test]
fn not_mappable() {
    let Some((_vm, file)) = guest_memfd("not_mappable", 0, M2) else { return };
    let backing = Backing::guest_memfd(file, M2, Frames::Contiguous).unwrap();
    assert_eq!((backing.state(page(0)), backing.linear_hva()), (PageState::Private, None));
    assert!(backing.host(backing.window().start(), 1).is_none());
    assert!(matches!(backing.holes(backing.pages()), Err(Error::Unsupported { .. })));
    backing.punch(pages(0, 1)).unwrap();
    backing.populate(pages(0, 1), PageState::Private).unwrap();
    assert!(backing.recheck(backing.pages()).unwrap().lost.is_empty());
    assert!(matches!(Backing::guest_memfd(other_fd(&backing), 2 * M2, Frames::Contiguous), Err(Error::Outside { .. })));
}
