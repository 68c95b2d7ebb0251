//! Device buffers as files: mapped, never pinned, taken away (the kernel's rule 23).
#![cfg(feature = "test-ops")]

mod client;

use client::{APERTURE, Client, PAGE, errno};
use lockstep_iommufd::uapi::test::{self, ACCESS_NEEDS_PIN};
use rustix::io::Errno;

fn buffer(client: &Client, length: u32) -> lockstep_iommufd::Answer<i32> {
    client.op_value(22, 0, test::DmabufGet { length, open_flags: 0 }).map(|(fd, _)| fd as i32)
}

fn revoke(client: &Client, dmabuf_fd: i32, revoked: u32) -> lockstep_iommufd::Answer {
    client.op(23, 0, test::DmabufRevoke { dmabuf_fd, revoked }).map(|_| ())
}

/// Whether the domain leads anywhere.
fn is_shown(client: &Client, hwpt: u32, iova: u64) -> bool {
    let context = client.context.hwpt(hwpt).unwrap();
    context.domain().unwrap().table().walk(addr::Iova::new(iova)).is_some()
}

#[test]
fn lengths_are_rounded_up_and_limited() {
    let client = Client::new();
    let ioas = client.ioas();
    assert_eq!(errno(buffer(&client, 0)), Errno::INVAL);
    assert_eq!(errno(buffer(&client, (512 << 12) + 1)), Errno::INVAL);
    assert_eq!(errno(buffer(&client, u32::MAX)), Errno::INVAL);
    let fd = buffer(&client, PAGE as u32 + 1).unwrap();
    client.map_file(ioas, fd, 0, 2 * PAGE, APERTURE).unwrap();
    assert_eq!(errno(client.map_file(ioas, fd, PAGE, 2 * PAGE, 2 * APERTURE)), Errno::INVAL, "behind the end");
    assert_eq!(errno(client.map_file(ioas, fd, u64::MAX - 5, PAGE, 2 * APERTURE)), Errno::OVERFLOW);
    buffer(&client, 512 << 12).unwrap();
}

#[test]
fn domains_show_it_and_software_cannot_reach_it() {
    let client = Client::new();
    let ioas = client.ioas();
    let fd = buffer(&client, 4 * PAGE as u32).unwrap();
    client.map_file(ioas, fd, PAGE, 2 * PAGE, APERTURE).unwrap();
    let mock = client.mock(ioas).unwrap();
    assert!(is_shown(&client, mock.hwpt, APERTURE) && is_shown(&client, mock.hwpt, APERTURE + 2 * PAGE - 1));
    assert!(!is_shown(&client, mock.hwpt, APERTURE + 2 * PAGE));
    let (pinning, plain) = (client.access(ioas, ACCESS_NEEDS_PIN).unwrap(), client.access(ioas, 0).unwrap());
    assert_eq!(errno(client.access_pages(pinning, APERTURE, PAGE, 0, 0)), Errno::INVAL);
    let own = client.memory(1);
    assert_eq!(errno(client.rw(plain, APERTURE, 8, own, 0)), Errno::INVAL);
    assert_eq!(client.unmap(ioas, APERTURE, 2 * PAGE).unwrap(), 2 * PAGE);
    assert!(!is_shown(&client, mock.hwpt, APERTURE));
}

#[test]
fn what_was_revoked_stays_so_and_new_mappings_work() {
    let client = Client::new();
    let ioas = client.ioas();
    let mock = client.mock(ioas).unwrap();
    let fd = buffer(&client, PAGE as u32).unwrap();
    client.map_file(ioas, fd, 0, PAGE, APERTURE).unwrap();
    revoke(&client, fd, 1).unwrap();
    assert!(!is_shown(&client, mock.hwpt, APERTURE));
    assert_eq!(errno(client.map_file(ioas, fd, 0, PAGE, 2 * APERTURE)), Errno::NODEV);
    // A domain that comes later skips it.
    let later = client.hwpt_alloc(mock.device, ioas, 0, None).unwrap();
    assert!(!is_shown(&client, later, APERTURE));
    revoke(&client, fd, 0).unwrap();
    assert!(!is_shown(&client, mock.hwpt, APERTURE) && !is_shown(&client, later, APERTURE));
    client.map_file(ioas, fd, 0, PAGE, 2 * APERTURE).unwrap();
    assert!(is_shown(&client, mock.hwpt, 2 * APERTURE) && is_shown(&client, later, 2 * APERTURE));
    // Any call drops what there is, also one that says what is so already.
    revoke(&client, fd, 0).unwrap();
    assert!(!is_shown(&client, mock.hwpt, 2 * APERTURE));
    assert_eq!(client.unmap(ioas, APERTURE, PAGE).unwrap(), PAGE);
    assert_eq!(client.unmap(ioas, 2 * APERTURE, PAGE).unwrap(), PAGE);
}

#[test]
fn only_dma_bufs_are_revoked() {
    let client = Client::new();
    let ioas = client.ioas();
    let access = client.access(ioas, 0).unwrap();
    assert_eq!(errno(revoke(&client, access.cast_signed(), 1)), Errno::OPNOTSUPP);
    assert_eq!(errno(revoke(&client, -1, 1)), Errno::BADF);
    let file = client.local.give(rustix::fs::memfd_create(c"file", rustix::fs::MemfdFlags::CLOEXEC).unwrap()).unwrap();
    assert_eq!(errno(revoke(&client, file, 1)), Errno::INVAL);
}

/// Rules 36, 39: nobody pays for it, and nobody can take it over.
#[test]
fn it_has_no_payer() {
    let client = Client::new();
    let ioas = client.ioas();
    client.mock(ioas).unwrap();
    let space = lockstep_iommufd::Caller::process(&client.local).unwrap().space;
    let fd = buffer(&client, PAGE as u32).unwrap();
    client.map_file(ioas, fd, 0, PAGE, APERTURE).unwrap();
    assert_eq!(client.host.accounts().of_space(space), (0, 0));
    assert_eq!(errno(client.call(0x92, lockstep_iommufd::uapi::IoasChangeProcess::default())), Errno::INVAL);
}
