//! Interrupts: where they go, in which order SET_IRQS checks, and that a finished command raises them.

mod common;

use common::*;
use lockstep_vfio::registers::{event, reg};
use lockstep_vfio::uapi::*;
use rustix::io::Errno;

const INTX: u32 = 0;
const MSI: u32 = 1;
const MSIX: u32 = 2;
const ERR: u32 = 3;
const REQ: u32 = 4;

fn copy(client: &Client, device: i32) {
    assert_eq!(client.command(device, IOVA, IOVA + 0x1000, 8, cmd::COPY), status::IDLE);
}

fn fail(client: &Client, device: i32) {
    assert_eq!(client.command(device, 0, 0, 8, cmd::COPY), status::FAULTED);
}

#[test]
fn a_finished_command_raises_its_vector() {
    for kind in [MSI, MSIX] {
        let client = Client::new(1);
        let (device, ..) = client.ready(0);
        let [first, third] = [client.eventfd(), client.eventfd()];
        client.signal(device, kind, 0, &[first, -1, third]).unwrap();
        copy(&client, device);
        assert_eq!((client.count(first), client.count(third)), (1, 0));
        client.set_register(device, reg::IRQ_VECTORS, 0x0002);
        copy(&client, device);
        assert_eq!((client.count(first), client.count(third)), (0, 1));
        client.set_register(device, reg::IRQ_VECTORS, 0x0200);
        fail(&client, device);
        assert_eq!((client.count(first), client.count(third)), (0, 1));
        // Vectors without a descriptor, and vectors that there are not.
        for vectors in [0x0101, 0xffff] {
            client.set_register(device, reg::IRQ_VECTORS, vectors);
            copy(&client, device);
        }
        assert_eq!((client.count(first), client.count(third)), (0, 0));
        assert_eq!(client.register(device, reg::RAISED), 5);
        client.set_register(device, reg::IRQ_VECTORS, 0);
        client.set_register(device, reg::IRQ_ENABLE, event::FAULT);
        copy(&client, device);
        assert_eq!(client.count(first), 0);
        assert_eq!(client.register(device, reg::IRQ_STATUS), event::DONE | event::FAULT);
    }
}

#[test]
fn a_client_tries_its_vectors() {
    for kind in [MSI, MSIX] {
        let client = Client::new(1);
        let (device, ..) = client.ready(0);
        let fds: Vec<i32> = (0..8).map(|_| client.eventfd()).collect();
        let trigger = SET_TRIGGER | SET_DATA_NONE;
        assert_eq!(client.irqs(device, kind, trigger, 0, 1, &[]), Err(Errno::INVAL));
        client.signal(device, kind, 0, &fds).unwrap();
        for (vector, fd) in (0..).zip(&fds) {
            client.irqs(device, kind, trigger, vector, 1, &[]).unwrap();
            assert_eq!(client.count(*fd), 1);
        }
        client.irqs(device, kind, SET_TRIGGER | SET_DATA_BOOL, 2, 3, &[1, 0, 1]).unwrap();
        assert_eq!(fds.iter().map(|fd| client.count(*fd)).collect::<Vec<_>>(), [0, 0, 1, 0, 1, 0, 0, 0]);
        // Off and on again.
        client.irqs(device, kind, trigger, 0, 0, &[]).unwrap();
        copy(&client, device);
        assert_eq!(client.count(fds[0]), 0);
        client.signal(device, kind, 0, &fds[..2]).unwrap();
    }
}

#[test]
fn one_kind_at_a_time() {
    let client = Client::new(1);
    let (device, ..) = client.ready(0);
    let fd = client.eventfd();
    let off = |kind| client.irqs(device, kind, SET_TRIGGER | SET_DATA_NONE, 0, 0, &[]);
    client.signal(device, MSI, 0, &[fd]).unwrap();
    assert_eq!(client.signal(device, MSIX, 0, &[fd]), Err(Errno::INVAL));
    assert_eq!(client.signal(device, INTX, 0, &[fd]), Err(Errno::INVAL));
    assert_eq!(off(MSIX), Err(Errno::INVAL));
    // MSI is set up all at once, MSI-X grows.
    assert_eq!(client.signal(device, MSI, 1, &[fd]), Err(Errno::INVAL));
    off(MSI).unwrap();
    client.signal(device, MSIX, 0, &[fd]).unwrap();
    client.signal(device, MSIX, 5, &[fd]).unwrap();
    // Configuration space shows which.
    assert_eq!(client.pread(device, CONFIG + 0x73, 1), Ok(vec![0x80]));
    off(MSIX).unwrap();
    assert_eq!(client.pread(device, CONFIG + 0x73, 1), Ok(vec![0]));
    client.signal(device, MSI, 0, &[fd]).unwrap();
    assert_eq!(client.pread(device, CONFIG + 0x52, 1), Ok(vec![0x87]));
}

#[test]
fn intx_is_a_level() {
    let client = Client::new(1);
    let (device, ..) = client.ready(0);
    let fd = client.eventfd();
    let unmask = || client.irqs(device, INTX, SET_UNMASK | SET_DATA_NONE, 0, 1, &[]).unwrap();
    assert_eq!(client.irqs(device, INTX, SET_UNMASK | SET_DATA_NONE, 0, 1, &[]), Err(Errno::INVAL));
    client.signal(device, INTX, 0, &[fd]).unwrap();
    copy(&client, device);
    assert_eq!(client.count(fd), 1);
    assert_eq!(client.pread(device, CONFIG + 6, 1).unwrap()[0] & 8, 8);
    // Masked by being signalled; still asserted when it is unmasked.
    copy(&client, device);
    assert_eq!(client.count(fd), 0);
    unmask();
    assert_eq!(client.count(fd), 1);
    // Served, then unmasked.
    client.set_register(device, reg::IRQ_STATUS, event::DONE);
    assert_eq!(client.pread(device, CONFIG + 6, 1).unwrap()[0] & 8, 0);
    unmask();
    assert_eq!(client.count(fd), 0);
    copy(&client, device);
    assert_eq!(client.count(fd), 1);
    client.set_register(device, reg::IRQ_STATUS, event::DONE);
    unmask();
    // Switched off in the command register.
    client.pwrite(device, CONFIG + 4, &0x0406u16.to_le_bytes()).unwrap();
    copy(&client, device);
    unmask();
    assert_eq!(client.count(fd), 0);
    client.make_master(device);
    assert_eq!(client.count(fd), 1);
    // Masked by the client.
    client.set_register(device, reg::IRQ_STATUS, event::DONE);
    unmask();
    client.irqs(device, INTX, SET_MASK | SET_DATA_BOOL, 0, 1, &[1]).unwrap();
    copy(&client, device);
    assert_eq!(client.count(fd), 0);
    client.irqs(device, INTX, SET_UNMASK | SET_DATA_BOOL, 0, 1, &[0]).unwrap();
    assert_eq!(client.count(fd), 0);
    unmask();
    assert_eq!(client.count(fd), 1);
    assert_eq!(client.irqs(device, INTX, SET_UNMASK | SET_DATA_EVENTFD, 0, 1, &fd.to_ne_bytes()), Err(Errno::NOTTY));
}

#[test]
fn error_and_request() {
    let client = Client::new(1);
    let (device, ..) = client.ready(0);
    let [err, req] = [client.eventfd(), client.eventfd()];
    client.signal(device, ERR, 0, &[err]).unwrap();
    client.signal(device, REQ, 0, &[req]).unwrap();
    fail(&client, device);
    assert_eq!(client.count(err), 0);
    client.set_register(device, reg::IRQ_ENABLE, event::ERROR);
    fail(&client, device);
    copy(&client, device);
    assert_eq!((client.count(err), client.count(req)), (1, 0));
    client.irqs(device, REQ, SET_TRIGGER | SET_DATA_NONE, 0, 1, &[]).unwrap();
    client.irqs(device, ERR, SET_TRIGGER | SET_DATA_BOOL, 0, 1, &[1]).unwrap();
    assert_eq!((client.count(err), client.count(req)), (1, 1));
    client.irqs(device, ERR, SET_TRIGGER | SET_DATA_NONE, 0, 0, &[]).unwrap();
    fail(&client, device);
    assert_eq!(client.count(err), 0);
}

#[test]
fn wrong_requests() {
    let client = Client::new(1);
    let (device, ..) = client.ready(0);
    let set = |index, flags, start, count, data: &[u8]| client.irqs(device, index, flags, start, count, data).unwrap_err();
    let none = SET_TRIGGER | SET_DATA_NONE;
    assert_eq!(set(5, none, 0, 1, &[]), Errno::INVAL);
    assert_eq!(set(MSI, none | 64, 0, 1, &[]), Errno::INVAL);
    assert_eq!(set(MSI, none, 8, 0, &[]), Errno::INVAL);
    assert_eq!(set(MSI, none, 0, 9, &[]), Errno::INVAL);
    assert_eq!(set(MSI, none, u32::MAX, 1, &[]), Errno::INVAL);
    assert_eq!(set(MSI, none, 1, u32::MAX, &[]), Errno::INVAL);
    assert_eq!(set(MSI, SET_TRIGGER, 0, 1, &[]), Errno::INVAL);
    assert_eq!(set(MSI, none | SET_DATA_BOOL, 0, 1, &[0; 4]), Errno::INVAL);
    assert_eq!(set(MSI, SET_TRIGGER | SET_DATA_EVENTFD, 0, 2, &[0; 7]), Errno::INVAL);
    assert_eq!(set(MSI, SET_TRIGGER | SET_DATA_EVENTFD, 0, 0, &[]), Errno::INVAL);
    assert_eq!(set(MSI, SET_DATA_NONE, 0, 1, &[]), Errno::NOTTY);
    assert_eq!(set(MSI, none | SET_MASK, 0, 1, &[]), Errno::NOTTY);
    assert_eq!(set(MSI, SET_MASK | SET_DATA_NONE, 0, 1, &[]), Errno::NOTTY);
    assert_eq!(set(ERR, SET_UNMASK | SET_DATA_NONE, 0, 1, &[]), Errno::NOTTY);
    // A descriptor that is none, and one that is no eventfd: everything stays off.
    let (good, null) = (client.eventfd(), client.native(std::fs::File::open("/dev/null").unwrap().into()));
    assert_eq!(client.signal(device, MSI, 0, &[good, 999]), Err(Errno::BADF));
    assert_eq!(client.signal(device, MSI, 0, &[good, null]), Err(Errno::INVAL));
    assert_eq!(set(MSI, none, 0, 1, &[]), Errno::INVAL);
    assert_eq!(client.signal(device, MSIX, 0, &[good]), Ok(()));
}

#[test]
fn a_full_eventfd_holds_nobody_up() {
    let client = Client::new(1);
    let (device, ..) = client.ready(0);
    let full = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
    rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    let fd = client.native(full);
    client.signal(device, MSI, 0, &[fd]).unwrap();
    copy(&client, device);
}
