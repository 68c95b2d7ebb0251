//! The way of a trusted device as a VMM passes its steps on, with a guest's messages that may hold anything.

mod common;

use backing::Frames;
use common::{ASID, Guest, MIB, iova};
use iommu::FaultKind;
use lockstep_iommu::{Error, Nonce, Owner, Policy, SDTE_WRITE_BYTES, Sdte, SdteStatus, Tdisp, Trust};
use pt::Perm;
use secure::Vmpl;

fn message(id: u16, entry: Sdte) -> [u8; SDTE_WRITE_BYTES] {
    let mut message = [0; SDTE_WRITE_BYTES];
    message[..2].copy_from_slice(&id.to_le_bytes());
    message[16..].copy_from_slice(&entry.to_bytes());
    message
}

#[test]
fn a_guest_accepts_a_device_and_lets_it_go() {
    let guest = Guest::new(4 * MIB, Frames::Contiguous, Policy::Mirror);
    let nic = guest.dma.add_device("nic", Trust::Untrusted).unwrap();
    let mut dma = guest.context(&nic);
    guest.convert(0x3000, 0x1000, Owner::Private);
    guest.pvalidate(0x3000, 0x1000, true);
    let status = |message: &[u8; SDTE_WRITE_BYTES]| {
        let answer = guest.dma.sdte_write(message).unwrap();
        assert_eq!((&answer[..2], &answer[4..]), (&message[..2], &[0; 12][..]));
        u16::from_le_bytes([answer[2], answer[3]])
    };
    let accept = message(0x108, Sdte::new(Perm::RW, Vmpl::V0, None));
    assert_eq!(status(&accept), SdteStatus::InvalidTdi as u16, "no such interface");
    let nonce = guest.dma.bind_device(&nic, 0x108).unwrap();
    assert_eq!((nic.interface_state(), nic.bound()), (Tdisp::Locked, Some(ASID)));
    assert!(matches!(guest.dma.bind_device(&guest.trusted, 0x108), Err(Error::Interface { taken: true, .. })));
    assert!(guest.dma.bind_device(&nic, 0x109).is_err(), "bound already");
    assert_eq!(status(&accept), SdteStatus::InvalidTdi as u16, "not in RUN");
    assert!(guest.dma.start_device(0x108, Nonce([0; 32])).is_err());
    guest.dma.start_device(0x108, nonce).unwrap();
    assert_eq!(dma.read(iova(0x3000), &mut [0; 8]).unwrap_err().reason, FaultKind::NotRunning);
    let mut odd = accept;
    odd[7] = 1;
    assert_eq!(status(&odd), SdteStatus::Reserved as u16);
    assert_eq!(status(&accept), SdteStatus::Success as u16);
    dma.write(iova(0x3000), b"accepted").unwrap();
    // Another number's message is not about this device.
    assert_eq!(status(&message(0x109, Sdte::default())), SdteStatus::InvalidTdi as u16);
    dma.write(iova(0x3000), b"accepted").unwrap();
    assert_eq!(status(&message(0x108, Sdte::default())), SdteStatus::Success as u16);
    assert_eq!(dma.read(iova(0x3000), &mut [0; 8]).unwrap_err().reason, FaultKind::NotRunning);
    assert_eq!(status(&accept), SdteStatus::Success as u16);
    // Bound to nobody behind the table's back: firmware knows.
    nic.unbind().unwrap();
    assert_eq!(status(&accept), SdteStatus::NotBound as u16);
    guest.dma.unbind_device(0x108).unwrap();
    assert!(matches!(guest.dma.unbind_device(0x108), Err(Error::Interface { taken: false, .. })));
    assert_eq!(nic.interface_state(), Tdisp::Unlocked);
    assert_eq!(dma.read(iova(0x3000), &mut [0; 8]).unwrap_err().reason, FaultKind::Secure, "untrusted again");
    let nonce = guest.dma.bind_device(&nic, 0x108).unwrap();
    guest.dma.start_device(0x108, nonce).unwrap();
    assert_eq!(dma.read(iova(0x3000), &mut [0; 8]).unwrap_err().reason, FaultKind::NotRunning, "and has to be accepted again");
    guest.clean();
}
