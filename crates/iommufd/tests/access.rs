//! Software that uses an address space as a device does: pins, copies, moves (the kernel's rules 28 and 40 to 45).
#![cfg(feature = "test-ops")]

mod client;

use client::{APERTURE, Client, FIXED_RW, PAGE, errno};
use lockstep_iommufd::uapi::test::{self, ACCESS_BY_AREA, ACCESS_NEEDS_PIN, ACCESS_WRITE};
use lockstep_iommufd::{Caller, Touch};
use rustix::io::Errno;

const READABLE_FIXED: u32 = 5;

#[test]
fn pins_are_counted_once_for_each_map_call() {
    let client = Client::new();
    let (ioas, va) = (client.ioas(), client.memory(8));
    client.map(ioas, va, 8 * PAGE, APERTURE).unwrap();
    client.check_refs(va, 8 * PAGE, 0).unwrap();
    let access = client.access(ioas, ACCESS_NEEDS_PIN).unwrap();
    let first = client.access_pages(access, APERTURE + PAGE, 4 * PAGE, va + PAGE, ACCESS_WRITE).unwrap();
    let same = client.access_pages(access, APERTURE + PAGE, 4 * PAGE, va + PAGE, ACCESS_WRITE).unwrap();
    let part = client.access_pages(access, APERTURE + 2 * PAGE, PAGE, va + 2 * PAGE, 0).unwrap();
    assert_eq!([first, same, part], [0, 1, 2], "items are counted from 0");
    client.check_refs(va + PAGE, 4 * PAGE, 1).unwrap();
    client.check_refs(va, PAGE, 0).unwrap();
    assert_eq!(errno(client.check_refs(va, 2 * PAGE, 0)), Errno::IO);
    // A second map call of the same memory pins for itself.
    client.map(ioas, va, 8 * PAGE, 2 * APERTURE).unwrap();
    let other = client.access_pages(access, 2 * APERTURE, 8 * PAGE, va, 0).unwrap();
    client.check_refs(va + PAGE, 4 * PAGE, 2).unwrap();
    client.check_refs(va, PAGE, 1).unwrap();
    for item in [first, other] {
        client.drop_pages(access, item).unwrap();
    }
    client.check_refs(va + PAGE, 4 * PAGE, 1).unwrap();
    client.drop_pages(access, same).unwrap();
    client.check_refs(va + PAGE, PAGE, 0).unwrap();
    client.check_refs(va + 2 * PAGE, PAGE, 1).unwrap();
    assert_eq!(errno(client.drop_pages(access, first)), Errno::NOENT, "an item is dropped once");
    client.drop_pages(access, part).unwrap();
    client.check_refs(va, 8 * PAGE, 0).unwrap();
}

#[test]
fn what_pin_refuses_and_in_which_order() {
    let client = Client::new();
    let (ioas, va) = (client.ioas(), client.memory(8));
    client.map_with(READABLE_FIXED, ioas, va, 4 * PAGE, APERTURE).unwrap();
    client.map(ioas, va + 4 * PAGE, 2 * PAGE, APERTURE + 4 * PAGE).unwrap();
    let access = client.access(ioas, ACCESS_NEEDS_PIN).unwrap();
    let pin = |iova, length, flags| client.access_pages(access, iova, length, 0, flags);
    assert_eq!(errno(pin(APERTURE, 0, 0)), Errno::INVAL);
    assert_eq!(errno(pin(u64::MAX - 5, PAGE, 0)), Errno::OVERFLOW);
    assert_eq!(errno(pin(APERTURE, 16 << 20 | 1, 0)), Errno::NOMEM);
    assert_eq!(errno(pin(APERTURE, PAGE, 2)), Errno::OPNOTSUPP);
    assert_eq!(errno(pin(APERTURE + 5 * PAGE, 2 * PAGE, 0)), Errno::NOENT, "a gap");
    assert_eq!(errno(pin(APERTURE, PAGE, ACCESS_WRITE)), Errno::PERM);
    assert_eq!(errno(pin(APERTURE + 3 * PAGE, 2 * PAGE, ACCESS_WRITE)), Errno::PERM, "permission counts for every area");
    client.check_refs(va, 8 * PAGE, 0).unwrap();
    pin(APERTURE + 3 * PAGE, 2 * PAGE, 0).unwrap();
    assert_eq!(errno(client.access_pages(access, APERTURE, 2 * PAGE, va + PAGE, 0)), Errno::BADE, "other pages than the caller's");
    assert_eq!(errno(client.access_pages(access, APERTURE, PAGE, 0u64.wrapping_sub(PAGE), 0)), Errno::OVERFLOW);
    assert_eq!(errno(client.access_pages(access, APERTURE, PAGE, 0x10_0000, 0)), Errno::FAULT);
    client.check_refs(va, 3 * PAGE, 0).unwrap();
    client.check_refs(va + 3 * PAGE, 2 * PAGE, 1).unwrap();
    let plain = client.access(ioas, 0).unwrap();
    assert_eq!(errno(client.access_pages(plain, APERTURE, PAGE, 0, 0)), Errno::OPNOTSUPP);
    assert_eq!(errno(client.access_pages(9999, APERTURE, PAGE, 0, 0)), Errno::BADFD);
    assert_eq!(errno(client.access(ioas, 2)), Errno::OPNOTSUPP);
    assert_eq!(errno(client.access(4711, 0)), Errno::NOENT);
}

/// Rules 32, 33.
#[test]
fn an_access_that_pins_wants_whole_pages() {
    let client = Client::new();
    let (ioas, va) = (client.ioas(), client.memory(2));
    client.map(ioas, va + 1, 100, 7).unwrap();
    client.access(ioas, 0).unwrap();
    assert_eq!(errno(client.access(ioas, ACCESS_NEEDS_PIN)), Errno::ADDRINUSE);
    client.unmap(ioas, 7, 100).unwrap();
    let access = client.access(ioas, ACCESS_NEEDS_PIN).unwrap();
    assert_eq!(errno(client.map(ioas, va + 1, 100, 7)), Errno::INVAL);
    client.local.close(access.cast_signed()).unwrap();
    client.map(ioas, va + 1, 100, 7).unwrap();
}

/// Rule 28: pins are dropped when somebody unmaps.
#[test]
fn unmap_takes_pins_away() {
    let client = Client::new();
    let (ioas, va) = (client.ioas(), client.memory(8));
    client.map(ioas, va, 4 * PAGE, APERTURE).unwrap();
    client.map(ioas, va + 4 * PAGE, 4 * PAGE, APERTURE + 4 * PAGE).unwrap();
    let access = client.access(ioas, ACCESS_NEEDS_PIN).unwrap();
    let across = client.access_pages(access, APERTURE + 3 * PAGE, 2 * PAGE, va + 3 * PAGE, 0).unwrap();
    let beside = client.access_pages(access, APERTURE + 6 * PAGE, PAGE, va + 6 * PAGE, 0).unwrap();
    assert_eq!(client.unmap(ioas, APERTURE, 4 * PAGE).unwrap(), 4 * PAGE);
    client.check_refs(va, 6 * PAGE, 0).unwrap();
    client.check_refs(va + 6 * PAGE, PAGE, 1).unwrap();
    assert_eq!(errno(client.drop_pages(access, across)), Errno::NOENT);
    client.drop_pages(access, beside).unwrap();
}

#[test]
fn copies_go_where_areas_allow() {
    let client = Client::new();
    let (ioas, va, own) = (client.ioas(), client.memory(4), client.memory(4));
    client.map_with(READABLE_FIXED, ioas, va, PAGE, APERTURE + 1).unwrap();
    client.map(ioas, va + PAGE, PAGE, APERTURE + 1 + PAGE).unwrap();
    let access = client.access(ioas, 0).unwrap();
    client.local.write(va, b"read").unwrap();
    client.rw(access, APERTURE + 1, 4, own, 0).unwrap();
    assert_eq!(&client.local.get::<[u8; 4]>(own), b"read");
    client.local.write(own, b"across the border").unwrap();
    assert_eq!(errno(client.rw(access, APERTURE + PAGE - 3, 17, own, ACCESS_WRITE)), Errno::PERM);
    client.rw(access, APERTURE + 1 + PAGE, 17, own, ACCESS_WRITE).unwrap();
    assert_eq!(&client.local.get::<[u8; 17]>(va + PAGE), b"across the border");
    // What comes before a gap is copied.
    client.local.write(own, b"up to the gap").unwrap();
    assert_eq!(errno(client.rw(access, APERTURE + 1 + 2 * PAGE - 5, 13, own, ACCESS_WRITE)), Errno::NOENT);
    assert_eq!(&client.local.get::<[u8; 5]>(va + 2 * PAGE - 5), b"up to");
    assert_eq!(errno(client.rw(access, APERTURE + 1, 0, own, 0)), Errno::INVAL);
    assert_eq!(errno(client.rw(access, u64::MAX, 2, own, 0)), Errno::OVERFLOW);
    assert_eq!(errno(client.rw(access, APERTURE + 1, 16 << 20 | 1, own, 0)), Errno::NOMEM);
    assert_eq!(errno(client.rw(access, APERTURE + 1, 4, 0x10_0000, 0)), Errno::FAULT);
    assert_eq!(errno(client.rw(access, APERTURE + 1 + PAGE, 4, 0x10_0000, ACCESS_WRITE)), Errno::FAULT);
}

/// The address may be an area's number, and an offset in it.
#[test]
fn areas_can_be_named_by_number() {
    let client = Client::new();
    let (ioas, va) = (client.ioas(), client.memory(4));
    client.map(ioas, va, PAGE, APERTURE).unwrap();
    client.map(ioas, va + PAGE, 2 * PAGE, 3 * APERTURE).unwrap();
    let access = client.access(ioas, ACCESS_NEEDS_PIN).unwrap();
    client.access_pages(access, 1 | PAGE << 32, PAGE, va + 2 * PAGE, ACCESS_BY_AREA).unwrap();
    client.check_refs(va + 2 * PAGE, PAGE, 1).unwrap();
    assert_eq!(errno(client.access_pages(access, 2, PAGE, 0, ACCESS_BY_AREA)), Errno::NOENT);
}

/// Rule 45.
#[test]
fn an_access_that_moves_loses_its_pins() {
    let client = Client::new();
    let (first, second, va) = (client.ioas(), client.ioas(), client.memory(2));
    client.map(first, va, PAGE, APERTURE).unwrap();
    client.map(second, va + PAGE, PAGE, APERTURE).unwrap();
    let access = client.access(first, ACCESS_NEEDS_PIN).unwrap();
    client.access_pages(access, APERTURE, PAGE, va, 0).unwrap();
    assert_eq!(errno(client.destroy(first)), Errno::BUSY);
    client.op(11, access, test::AccessReplaceIoas { ioas_id: second }).unwrap();
    client.check_refs(va, 2 * PAGE, 0).unwrap();
    client.access_pages(access, APERTURE, PAGE, va + PAGE, 0).unwrap();
    client.destroy(first).unwrap();
    assert_eq!(errno(client.destroy(second)), Errno::BUSY);
    assert_eq!(errno(client.op(11, access, test::AccessReplaceIoas { ioas_id: first })), Errno::NOENT);
    client.local.close(access.cast_signed()).unwrap();
    client.check_refs(va, 2 * PAGE, 0).unwrap();
    client.destroy(second).unwrap();
}

/// Rules 5, 11: the descriptor keeps everything that it needs, and nobody else can end it.
#[test]
fn an_access_lives_as_long_as_its_descriptor() {
    let client = Client::new();
    let (ioas, va) = (client.ioas(), client.memory(1));
    client.map(ioas, va, PAGE, APERTURE).unwrap();
    let access = client.access(ioas, ACCESS_NEEDS_PIN).unwrap();
    let id = ioas + 1;
    assert_eq!(errno(client.destroy(id)), Errno::BUSY);
    client.access_pages(access, APERTURE, PAGE, va, 0).unwrap();
    let other = client.again();
    lockstep_iommufd::File::released(&*client.context);
    // The fork shares the descriptor and the memory.
    other.check_refs(va, PAGE, 1).unwrap();
    other.rw(access, APERTURE, 4, va, 0).unwrap();
    client.local.close(access.cast_signed()).unwrap();
    other.check_refs(va, PAGE, 1).unwrap();
    other.local.close(access.cast_signed()).unwrap();
    other.check_refs(va, PAGE, 0).unwrap();
    assert_eq!(errno(other.rw(access, APERTURE, 4, va, 0)), Errno::BADFD);
}

/// Rules 16, 44: memory is looked at when it is pinned, and is gone with its process.
#[test]
fn memory_that_went_away_cannot_be_pinned() {
    let client = Client::new();
    let (ioas, at) = (client.ioas(), 0x7000_0000);
    let memory = backing::Backing::memfd(2 * PAGE, backing::Frames::Contiguous).unwrap();
    client.local.add_at(&memory, at, Touch::WhileShown).unwrap();
    client.map(ioas, at, PAGE, APERTURE).unwrap();
    client.map(ioas, at + PAGE, PAGE, APERTURE + PAGE).unwrap();
    let access = client.access(ioas, ACCESS_NEEDS_PIN).unwrap();
    client.access_pages(access, APERTURE, PAGE, 0, 0).unwrap();
    client.local.hide(at, 2 * PAGE).unwrap();
    assert_eq!(errno(client.access_pages(access, APERTURE + PAGE, PAGE, 0, 0)), Errno::FAULT);
    client.access_pages(access, APERTURE, PAGE, 0, 0).unwrap();
    assert_eq!(client.map_with(FIXED_RW, ioas, at, PAGE, 4 * APERTURE).unwrap(), 4 * APERTURE, "nobody looks before it is needed");
}
