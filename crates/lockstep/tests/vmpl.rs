//! A device acts at the VMPL of its sDTE: what RMPADJUST takes from that level, its DMA loses at the next access, whatever is cached.

mod common;

use addr::Gpa;
use backing::Frames;
use common::{Guest, MIB, iova};
use iommu::FaultKind;
use lockstep_iommu::{AtsDma, Fault, Owner, Policy, Sdte, SdteStatus, Trust};
use pt::Perm;
use secure::{Delivery, Perms, Reason, RmpSize, Vmpl};

fn reason(done: Result<(), Fault>) -> Option<(FaultKind, Reason)> {
    done.err().map(|fault| {
        let refusal = fault.refusal.expect("the RMP's answer");
        assert_eq!(refusal.delivery, Delivery::Aborted);
        (fault.reason, refusal.reason)
    })
}

#[test]
fn rights_are_asked_for_at_every_access() {
    let guest = Guest::new(8 * MIB, Frames::Contiguous, Policy::Mirror);
    let space = guest.dma.space();
    let device = guest.dma.add_device("VMPL1", Trust::Untrusted).unwrap();
    let nonce = guest.dma.bind_device(&device, 0x20).unwrap();
    guest.dma.start_device(0x20, nonce).unwrap();
    assert_eq!(device.write_sdte(Sdte::new(Perm::RW, Vmpl::V1, None)).unwrap(), SdteStatus::Success);
    guest.convert(0x4000, 0x2000, Owner::Private);
    guest.pvalidate(0x4000, 0x2000, true);
    let (mut dma, mut cached) = (guest.context(&device), AtsDma::new(&device).unwrap());
    let at = iova(0x4000);
    let adjust = |perms: Perms| space.rmpadjust(Vmpl::V0, Gpa::new(0x4000), RmpSize::K4, Vmpl::V1, perms).unwrap();
    let refused = Some((FaultKind::Secure, Reason::Permission));
    assert_eq!(reason(dma.read(at, &mut [0; 8])), refused, "a fresh page is VMPL 0's alone");
    guest.clean();

    adjust(Perms(Perms::READ.0 | Perms::WRITE.0));
    dma.write(at, b"allowed").unwrap();
    cached.write(at, b"allowed").unwrap();
    cached.read(at, &mut [0; 8]).unwrap();
    let (misses, requests) = (dma.stats().iotlb.misses, cached.requests());
    guest.clean();
    // Both have it cached now, and lose it without an invalidation.
    adjust(Perms::READ);
    dma.read(at, &mut [0; 8]).unwrap();
    cached.read(at, &mut [0; 8]).unwrap();
    assert_eq!(reason(dma.write(at, b"denied")), refused);
    assert_eq!(reason(cached.write(at, b"denied")), Some((FaultKind::SecureTranslated, Reason::Permission)));
    adjust(Perms(0));
    assert_eq!(reason(dma.read(at, &mut [0; 8])), refused);
    assert_eq!(reason(cached.read(at, &mut [0; 8])), Some((FaultKind::SecureTranslated, Reason::Permission)));
    assert_eq!((dma.stats().iotlb.misses, cached.requests()), (misses, requests), "by what was cached before");
    guest.clean();
    // The neighbour page has its own permissions, VMPL 0 keeps its own, and a level cannot give what it does not have.
    adjust(Perms(Perms::READ.0 | Perms::WRITE.0));
    assert_eq!(reason(dma.write(iova(0x5000), b"x")), refused);
    guest.context(&guest.trusted).write(at, b"VMPL 0").unwrap();
    assert!(space.rmpadjust(Vmpl::V1, Gpa::new(0x4000), RmpSize::K4, Vmpl::V0, Perms::READ).is_err());
    assert!(space.rmpadjust(Vmpl::V1, Gpa::new(0x5000), RmpSize::K4, Vmpl::V2, Perms::READ).is_err());
    space.rmpadjust(Vmpl::V1, Gpa::new(0x4000), RmpSize::K4, Vmpl::V2, Perms::READ).unwrap();
    guest.clean();
    // What was given goes with the page.
    guest.pvalidate(0x4000, 0x2000, false);
    guest.convert(0x4000, 0x2000, Owner::Shared);
    guest.convert(0x4000, 0x2000, Owner::Private);
    guest.pvalidate(0x4000, 0x2000, true);
    assert_eq!(reason(dma.read(at, &mut [0; 8])), refused);
    guest.clean();
}

/// 4 KiB of a 2 MiB entry: it is split, and the rest keeps what it had.
#[test]
fn a_part_of_a_large_entry() {
    let guest = Guest::new(8 * MIB, Frames::Contiguous, Policy::Mirror);
    let device = guest.dma.add_device("VMPL2", Trust::Untrusted).unwrap();
    device
        .set_trust(Trust::Trusted { asid: common::ASID, vmpl: Vmpl::V2, tdisp: iommu::Tdisp::Run, sdte_valid: true, vtom: None })
        .unwrap();
    guest.convert(2 * MIB, 2 * MIB, Owner::Private);
    let space = guest.dma.space();
    space.pvalidate(Gpa::new(2 * MIB), RmpSize::M2, true).unwrap();
    space.rmpadjust(Vmpl::V0, Gpa::new(2 * MIB), RmpSize::M2, Vmpl::V2, Perms(Perms::READ.0 | Perms::WRITE.0)).unwrap();
    let mut dma = guest.context(&device);
    dma.write(iova(2 * MIB + 0x3000), b"all of it").unwrap();
    guest.clean();
    space.rmpadjust(Vmpl::V0, Gpa::new(2 * MIB + 0x3000), RmpSize::K4, Vmpl::V2, Perms::READ).unwrap();
    assert_eq!(guest.dma.counters().smashed, 1);
    assert_eq!(reason(dma.write(iova(2 * MIB + 0x3000), b"x")), Some((FaultKind::Secure, Reason::Permission)));
    dma.read(iova(2 * MIB + 0x3000), &mut [0; 8]).unwrap();
    dma.write(iova(2 * MIB + 0x4000), b"still").unwrap();
    guest.clean();
}
