//! DMA as a client sees it: it maps memory, starts a command, and the bytes arrive, or the registers say why not.

mod common;

use common::*;
use iommu::FaultKind;
use iommufd::uapi::io;
use lockstep_vfio::registers::{cmd as own, fault, reg};
use lockstep_vfio::uapi::{ATTACH_IOMMUFD_PT, BIND_IOMMUFD, RESET};
use rustix::io::Errno;
use std::sync::atomic::{AtomicBool, Ordering};

/// Where [`IOVA`] is in the client's memory.
const MAPPED: u64 = 1 << 20;

#[test]
fn bytes_arrive() {
    let client = Client::new(1);
    let (device, ..) = client.ready(0);
    client.poke(MAPPED + 5, b"from here to there");
    assert_eq!(client.command(device, IOVA + 5, IOVA + 0x1f_fff0, 18, cmd::COPY), status::IDLE);
    assert_eq!(client.peek(MAPPED + 0x1f_fff0, 18), b"from here to there");
    client.set_register(device, engine::VALUE, 0x0807_0605_0403_0201);
    assert_eq!(client.command(device, 0, IOVA + 0x3000, 12, cmd::FILL), status::IDLE);
    assert_eq!(client.peek(MAPPED + 0x3000, 13), [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 0]);
    let large = 16 << 20;
    client.poke(MAPPED, &vec![7; large as usize]);
    assert_eq!(client.command(device, IOVA, IOVA + large, large, cmd::COPY), status::IDLE);
    assert_eq!(client.peek(MAPPED + 2 * large - 1, 2), [7, 0]);
    assert_eq!(client.fault(device), [0, 0, large]);
}

#[test]
fn the_buffer_takes_part() {
    let client = Client::new(1);
    let (device, ..) = client.ready(0);
    client.poke(MAPPED + 0x1000, &[9; 0x1_0000]);
    assert_eq!(client.command(device, IOVA + 0x1000, 0, 0x1_0000, own::TO_BUFFER), status::IDLE);
    assert_eq!(client.pread(device, BUFFER, 0x1_0000), Ok(vec![9; 0x1_0000]));
    client.pwrite(device, BUFFER + 0x100, b"from the buffer").unwrap();
    assert_eq!(client.command(device, 0x100, IOVA + 0x4_0001, 15, own::FROM_BUFFER), status::IDLE);
    assert_eq!(client.peek(MAPPED + 0x4_0001, 15), b"from the buffer");
    assert_eq!(client.fault(device), [0, 0, 15]);
    // Faults of the device's own kind.
    assert_eq!(client.command(device, IOVA, 0xffff, 2, own::TO_BUFFER), status::FAULTED);
    assert_eq!(client.fault(device), [0xffff, fault::OUTSIDE_BUFFER, 0]);
    assert_eq!(client.command(device, u64::MAX, IOVA, 2, own::FROM_BUFFER), status::FAULTED);
    assert_eq!(client.fault(device), [u64::MAX, fault::OUTSIDE_BUFFER, 0]);
    assert_eq!(client.command(device, IOVA, 0, 17 << 20, own::TO_BUFFER), status::FAULTED);
    assert_eq!(client.fault(device)[1], FaultKind::BadLength as u64);
    assert_eq!(client.command(device, 0, IOVA - 0x1000, 8, own::FROM_BUFFER), status::FAULTED);
    assert_eq!(client.fault(device), [IOVA - 0x1000, FaultKind::NotMapped as u64, 0]);
    assert_eq!(client.command(device, u64::MAX - 3, 0, 8, own::TO_BUFFER), status::FAULTED);
    assert_eq!(client.fault(device)[1], FaultKind::Wraps as u64);
    rustix::fs::ftruncate(client.shared(device), BUFFER).unwrap();
    assert_eq!(client.command(device, 0, IOVA, 8, own::FROM_BUFFER), status::FAULTED);
    assert_eq!(client.fault(device), [0, fault::BUFFER_GONE, 0]);
    // The engine's own commands show in the same registers.
    assert_eq!(client.command(device, IOVA, IOVA + 0x2000, 8, cmd::COPY), status::IDLE);
    assert_eq!(client.fault(device), [0, 0, 8]);
}

#[test]
fn nothing_moves_before_the_device_is_master() {
    let client = Client::new(1);
    let (device, ..) = client.ready(0);
    client.pwrite(device, CONFIG + 4, &2u16.to_le_bytes()).unwrap();
    client.poke(MAPPED, &[1; 8]);
    assert_eq!(client.command(device, IOVA, IOVA + 0x1000, 8, cmd::COPY), status::FAULTED);
    assert_eq!(client.fault(device), [IOVA + 0x1000, fault::NOT_MASTER, 0]);
    assert_eq!(client.peek(MAPPED + 0x1000, 8), [0; 8]);
    client.make_master(device);
    assert_eq!(client.command(device, IOVA, IOVA + 0x1000, 8, cmd::COPY), status::IDLE);
    assert_eq!(client.peek(MAPPED + 0x1000, 8), [1; 8]);
}

#[test]
fn what_is_not_mapped_is_refused() {
    let client = Client::new(1);
    let (device, iommufd, ioas) = client.ready(0);
    assert_eq!(client.command(device, IOVA, IOVA - 8, 16, cmd::COPY), status::FAULTED);
    assert_eq!(client.fault(device), [IOVA - 8, FaultKind::NotMapped as u64, 0]);
    let whole = BYTES - MAPPED;
    assert_eq!(client.unmap(iommufd, ioas, IOVA, whole), Ok(whole));
    assert_eq!(client.command(device, IOVA, IOVA + 0x1000, 16, cmd::COPY), status::FAULTED);
    assert_eq!(client.fault(device), [IOVA, FaultKind::NotMapped as u64, 0]);
    client.map(iommufd, ioas, MAPPED, 0x2000, IOVA).unwrap();
    assert_eq!(client.command(device, IOVA, IOVA + 0x1000, 16, cmd::COPY), status::IDLE);
    // The second half of it leaves the map.
    assert_eq!(client.command(device, IOVA, IOVA + 0x1ff8, 16, cmd::COPY), status::FAULTED);
    assert_eq!(client.fault(device), [IOVA + 0x2000, FaultKind::NotMapped as u64, 8]);
}

#[test]
fn a_detached_device_reaches_nothing() {
    let client = Client::new(1);
    let (device, _, ioas) = client.ready(0);
    assert_eq!(client.detach(device), Ok(()));
    assert_eq!(client.command(device, IOVA, IOVA + 0x1000, 8, cmd::COPY), status::FAULTED);
    assert_eq!(client.fault(device)[1], FaultKind::NotAttached as u64);
    // Detaching what is not attached is fine, as in the kernel.
    assert_eq!(client.detach(device), Ok(()));
    client.attach(device, ioas).unwrap();
    assert_eq!(client.command(device, IOVA, IOVA + 0x1000, 8, cmd::COPY), status::IDLE);
}

#[test]
fn attach_to_what_is_no_address_space() {
    let client = Client::new(1);
    let (device, iommufd) = (client.open_device(0), client.open_iommufd());
    client.bind(device, iommufd).unwrap();
    assert!(client.attach(device, u32::MAX).is_err());
    assert!(client.attach(device, 0).is_err());
    assert_eq!(client.detach(device), Ok(()));
}

#[test]
fn an_answer_that_cannot_be_written_back_leaves_nothing_done() {
    let client = Client::new(1);
    let (device, iommufd) = (client.open_device(0), client.open_iommufd());
    client.poke(READ_ONLY, &[24u32, 0, iommufd as u32, 0, 0, 0].map(u32::to_le_bytes).concat());
    assert_eq!(client.ioctl_at(device, io(BIND_IOMMUFD), VA + READ_ONLY), Err(Errno::FAULT));
    client.bind(device, iommufd).unwrap();
    let ioas = client.ioas(iommufd);
    client.poke(READ_ONLY, &[12u32, 0, ioas].map(u32::to_le_bytes).concat());
    assert_eq!(client.ioctl_at(device, io(ATTACH_IOMMUFD_PT), VA + READ_ONLY), Err(Errno::FAULT));
    assert!(client.fleet.device(0).unwrap().domain().is_none());
    let mut destroy = iommufd::uapi::Destroy { size: 8, id: ioas };
    assert_eq!(client.ioctl(iommufd, 0x80, &mut destroy), Ok(0));
}

#[test]
fn two_devices_in_one_address_space() {
    let client = Client::new(2);
    let (first, iommufd, ioas) = client.ready(0);
    let second = client.open_device(1);
    client.bind(second, iommufd).unwrap();
    client.make_master(second);
    assert_eq!(client.command(second, IOVA, IOVA + 0x1000, 8, cmd::COPY), status::FAULTED);
    client.attach(second, ioas).unwrap();
    client.poke(MAPPED, b"relayed!");
    assert_eq!(client.command(first, IOVA, IOVA + 0x1000, 8, cmd::COPY), status::IDLE);
    assert_eq!(client.command(second, IOVA + 0x1000, IOVA + 0x2000, 8, cmd::COPY), status::IDLE);
    assert_eq!(client.peek(MAPPED + 0x2000, 8), b"relayed!");
    client.close(first);
    assert_eq!(client.command(second, IOVA, IOVA + 0x3000, 8, cmd::COPY), status::IDLE);
}

#[test]
fn reset_forgets_registers_and_keeps_the_address_space() {
    let client = Client::new(1);
    let (device, ..) = client.ready(0);
    assert_eq!(client.command(device, IOVA, 8, 8, cmd::COPY), status::FAULTED);
    client.pwrite(device, BUFFER, b"kept").unwrap();
    assert_eq!(client.ioctl_at(device, io(RESET), 0), Ok(0));
    for register in [engine::SRC, engine::DST, engine::LEN, engine::STATUS, engine::FAULT_CODE, reg::IRQ_STATUS, reg::RAISED] {
        assert_eq!(client.register(device, register), 0, "{register:#x}");
    }
    assert_eq!(client.register(device, reg::IRQ_ENABLE), 3);
    assert_eq!(client.pread(device, BUFFER, 4), Ok(b"kept".to_vec()));
    assert_eq!(client.command(device, IOVA, IOVA + 0x1000, 8, cmd::COPY), status::IDLE);
    // A function level reset, through configuration space.
    client.pwrite(device, CONFIG + 0x88, &0x8000u16.to_le_bytes()).unwrap();
    assert_eq!(client.register(device, engine::LEN), 0);
    assert_eq!(client.pread(device, CONFIG + 0x89, 1).unwrap()[0] & 0x80, 0);
}

#[test]
fn closing_gives_everything_back() {
    let client = Client::new(1);
    let (device, iommufd, ioas) = client.ready(0);
    client.close(device);
    assert!(client.fleet.device(0).unwrap().domain().is_none());
    // The device's reserved window is free again, and nothing needs the address space.
    client.map(iommufd, ioas, 0x1000, 0x1000, 0xfee0_0000).unwrap();
    let mut destroy = iommufd::uapi::Destroy { size: 8, id: ioas };
    assert_eq!(client.ioctl(iommufd, 0x80, &mut destroy), Ok(0));
}

#[test]
fn closing_the_iommufd_first() {
    let client = Client::new(1);
    let (device, iommufd, _) = client.ready(0);
    client.close(iommufd);
    // The bound device keeps what it was bound to.
    assert_eq!(client.command(device, IOVA, IOVA + 0x1000, 8, cmd::COPY), status::IDLE);
    client.close(device);
    assert!(client.fleet.device(0).unwrap().domain().is_none());
}

#[test]
fn the_interrupt_window_is_reserved() {
    let client = Client::new(1);
    let (device, iommufd, ioas) = client.ready(0);
    assert_eq!(client.map(iommufd, ioas, 0x1000, 0x1000, 0xfee0_0000), Err(Errno::INVAL));
    assert_eq!(client.map(iommufd, ioas, 0x1000, 0x1000, 0xfeef_f000), Err(Errno::INVAL));
    client.map(iommufd, ioas, 0x1000, 0x1000, 0xfef0_0000).unwrap();
    client.detach(device).unwrap();
    client.map(iommufd, ioas, 0x1000, 0x1000, 0xfee0_0000).unwrap();
    assert_eq!(client.attach(device, ioas), Err(Errno::ADDRINUSE));
}

#[test]
fn replace_while_dma_is_in_flight() {
    let client = Client::new(1);
    let (device, iommufd, first) = client.ready(0);
    let second = client.ioas(iommufd);
    client.map(iommufd, second, MAPPED, BYTES - MAPPED, IOVA).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let replacing = scope.spawn(|| {
            let mut replaced = 0;
            while !stop.load(Ordering::Relaxed) {
                for ioas in [second, first] {
                    client.attach(device, ioas).unwrap();
                    replaced += 1;
                }
            }
            replaced
        });
        let mut commands = 0;
        for round in 0..200u64 {
            client.poke(MAPPED, &round.to_le_bytes());
            // Both address spaces map the same, so each command goes well whichever it meets.
            assert_eq!(client.command(device, IOVA, IOVA + 0x20_0000, 1 << 20, cmd::COPY), status::IDLE, "{:x?}", client.fault(device));
            assert_eq!(client.peek(MAPPED + 0x20_0000, 8), round.to_le_bytes());
            commands += 1;
        }
        stop.store(true, Ordering::Relaxed);
        let replaced = replacing.join().unwrap();
        assert!(commands == 200 && replaced > 0);
    });
    client.attach(device, second).unwrap();
    let mut destroy = iommufd::uapi::Destroy { size: 8, id: first };
    assert_eq!(client.ioctl(iommufd, 0x80, &mut destroy), Ok(0));
}
