//! The secure world has the last word: on the whole leaf, on every access, hit or miss.

mod common;

use addr::{Address, Gpa, Iova, Lg2, SizeSet, Span};
use backing::{Backing, Frames};
use common::{ASID, BASE, Machine, span};
use lockstep_iommu_device::{Access, FaultKind, RefusedBy, Tdisp, Trust};
use pt::{Gather, Perm, Stock};
use secure::{Reason, RmpSize, RmpState, Vmpl};

const MIB: u64 = 1 << 20;

fn trusted(tdisp: Tdisp, sdte_valid: bool) -> Trust {
    Trust::Trusted { asid: ASID, vmpl: Vmpl::V0, tdisp, sdte_valid, vtom: None }
}

/// One private page makes a whole large leaf unusable for an untrusted device, also where the leaf is cached, also for its shared bytes.
#[test]
fn one_private_page_spoils_a_large_shared_leaf() {
    let machine = Machine::new(4 * MIB, Frames::Contiguous);
    machine.map(BASE, 0, 2 * MIB, Perm::RW, SizeSet::ALL);
    machine.map_small(BASE.plus(2 * MIB), 2 * MIB, 2 * MIB);
    let mut dma = machine.dma();
    dma.write(BASE, b"shared").unwrap();
    machine.make_private(0x5000, Gpa::new(0x9000), RmpSize::K4);
    machine.make_private(2 * MIB + 0x5000, Gpa::new(0xa000), RmpSize::K4);
    let misses = dma.stats().iotlb.misses;
    let fault = dma.write(BASE, b"shared").unwrap_err();
    assert_eq!(dma.stats().iotlb.misses, misses, "a hit was checked again");
    assert_eq!((fault.table, fault.reason, fault.oa), (RefusedBy::SecureWorld, FaultKind::Secure, Some(machine.oa(0))));
    let refusal = fault.refusal.unwrap();
    assert_eq!((refusal.reason, refusal.at), (Reason::Assigned, machine.oa(0x5000)));
    assert_eq!(fault.reason.amd_event(), Some(0xd));
    // 4 KiB leaves: only the private page itself is out of reach.
    let second = BASE.plus(2 * MIB);
    let fault = dma.write(second.plus(0x4000), &[1; 0x3000]).unwrap_err();
    assert_eq!((fault.iova, fault.done), (second.plus(0x5000), 0x1000));
    dma.write(second.plus(0x6000), &[1; 0x1000]).unwrap();
    // A cut of the leaf, without any invalidation of the spoiled entry, does not help; an invalidation does.
    machine.iommu.rmp().rmpupdate(machine.oa(0x5000), RmpState::shared(RmpSize::K4)).unwrap();
    dma.write(BASE, b"shared").unwrap();
}

/// A leaf above 1 GiB is cached and checked 1 GiB at a time: a check of the whole would read a summary for each GiB, with every access.
#[test]
fn leaves_of_many_gib_are_checked_piece_by_piece() {
    const GIB: u64 = 1 << 30;
    // Where the window lies is chance; half of it can be one leaf.
    let machine = Machine::over(Backing::simulated(128 * GIB, Frames::Contiguous).unwrap());
    let first = machine.oa(0).get().wrapping_neg() % (64 * GIB);
    let base = Iova::new(64 * GIB);
    machine.map(base, first, 64 * GIB, Perm::RW, SizeSet::ALL);
    assert_eq!(machine.domain.table().leaf_at(base).unwrap().size, Lg2(36), "one leaf");
    let mut dma = machine.dma();
    for gib in [63, 0, 5] {
        let found = dma.translate(base.plus(gib * GIB + 0x1234), Access::Write).unwrap();
        assert_eq!((found.oa, found.leaf), (machine.oa(first + gib * GIB + 0x1234), span(base.plus(gib * GIB), GIB)));
    }
    assert_eq!(dma.stats().walks, 3);
    machine.make_private(first + 5 * GIB + 0x5000, Gpa::new(0x9000), RmpSize::K4);
    let fault = dma.translate(base.plus(6 * GIB - 1), Access::Read).unwrap_err();
    assert_eq!(fault.refusal.unwrap().at, machine.oa(first + 5 * GIB + 0x5000));
    dma.translate(base.plus(6 * GIB), Access::Read).unwrap();
    dma.translate(base.plus(5 * GIB - 1), Access::Read).unwrap();
    // One unmap takes all pieces out of the cache.
    let mut gather = Gather::new();
    assert_eq!(machine.domain.table().unmap(span(base, 64 * GIB), &mut gather), None);
    machine.domain.flush(gather);
    for gib in [0, 4, 5, 6, 63] {
        assert_eq!(dma.translate(base.plus(gib * GIB), Access::Read).unwrap_err().reason, FaultKind::NotMapped);
    }
}

#[test]
fn trust_needs_run_and_a_valid_entry() {
    let machine = Machine::new(2 * MIB, Frames::Contiguous);
    // The mirror policy: a private page is mapped where its GPA says.
    machine.make_private(0x1000, Gpa::new(0x1000), RmpSize::K4);
    machine.map_small(Iova::new(0), 0, 0x4000);
    let mut dma = machine.dma();
    let (private, shared) = (Iova::new(0x1000), Iova::new(0x2000));
    assert_eq!(dma.read(private, &mut [0; 4]).unwrap_err().reason, FaultKind::Secure);
    dma.read(shared, &mut [0; 4]).unwrap();
    for (tdisp, sdte_valid) in [(Tdisp::Unlocked, true), (Tdisp::Locked, true), (Tdisp::Error, true), (Tdisp::Run, false)] {
        machine.device.set_trust(trusted(tdisp, sdte_valid)).unwrap();
        for iova in [private, shared] {
            let fault = dma.read(iova, &mut [0; 4]).unwrap_err();
            assert_eq!((fault.table, fault.reason), (RefusedBy::Device, FaultKind::NotRunning), "{tdisp:?}, {sdte_valid}");
        }
    }
    machine.device.set_trust(trusted(Tdisp::Run, true)).unwrap();
    dma.write(private, b"mine").unwrap();
    dma.write(shared, b"ours").unwrap();
    machine.device.set_trust(Trust::Trusted { asid: ASID + 1, vmpl: Vmpl::V0, tdisp: Tdisp::Run, sdte_valid: true, vtom: None }).unwrap();
    assert_eq!(dma.read(private, &mut [0; 4]).unwrap_err().refusal.unwrap().reason, Reason::WrongAsid);
    machine.device.set_trust(Trust::Untrusted).unwrap();
    assert_eq!(dma.read(private, &mut [0; 4]).unwrap_err().refusal.unwrap().reason, Reason::Assigned);
    dma.read(shared, &mut [0; 4]).unwrap();
}

#[test]
fn a_private_page_answers_to_its_own_address_only() {
    let machine = Machine::new(2 * MIB, Frames::Contiguous);
    machine.device.set_trust(trusted(Tdisp::Run, true)).unwrap();
    machine.make_private(0, Gpa::new(0x7000), RmpSize::K4);
    machine.map_small(Iova::new(0x7000), 0, 0x1000);
    machine.map_small(Iova::new(0x8000), 0, 0x1000);
    let mut dma = machine.dma();
    dma.write(Iova::new(0x7010), b"x").unwrap();
    assert_eq!(dma.write(Iova::new(0x8010), b"x").unwrap_err().refusal.unwrap().reason, Reason::WrongGpa);
    machine.device.set_gpa_offset(0x1000u64.wrapping_neg()).unwrap();
    dma.write(Iova::new(0x8010), b"x").unwrap();
    assert!(dma.write(Iova::new(0x7010), b"x").is_err());
}

#[test]
fn sizes_must_agree_and_a_fresh_walk_decides() {
    let machine = Machine::new(4 * MIB, Frames::Contiguous);
    machine.device.set_trust(trusted(Tdisp::Run, true)).unwrap();
    let (gpa, rmp) = (Gpa::new(0), machine.iommu.rmp());
    machine.make_private(0, gpa, RmpSize::M2);
    machine.map(Iova::new(0), 0, 2 * MIB, Perm::RW, SizeSet::ALL);
    let mut dma = machine.dma();
    dma.write(Iova::new(0x3000), b"2 MiB over 2 MiB").unwrap();

    // Split in the order of D-6. In between the sizes differ, and nobody notices.
    let oa = machine.oa(0);
    rmp.smash_begin(oa);
    dma.write(Iova::new(0x3000), b"before").unwrap();
    rmp.psmash(oa).unwrap();
    dma.write(Iova::new(0x3000), b"between").unwrap();
    let mut stock = Stock::new(machine.iommu.arena());
    machine.domain.cut(span(Iova::new(0x3000), 0x1000), SizeSet::only(Lg2::K4), &mut stock).unwrap();
    rmp.smash_end(oa);
    // The cached 2 MiB entry is wrong now; a fresh walk finds the cut leaf, and from then on that one answers.
    let rechecks = dma.stats().rechecks;
    dma.write(Iova::new(0x3000), b"after").unwrap();
    assert_eq!(dma.stats().rechecks, rechecks + 1);
    dma.write(Iova::new(0x3000), b"again").unwrap();
    assert_eq!(dma.stats().rechecks, rechecks + 1, "the stale entry is gone");
    assert_eq!(dma.translate(Iova::new(0x3000), Access::Read).unwrap().leaf, Span::block(Iova::new(0x3000), 12));

    // A real mismatch, at rest: a fault, although ownership agrees.
    machine.make_private(2 * MIB, Gpa::new(2 * MIB), RmpSize::M2);
    machine.map_small(Iova::new(2 * MIB), 2 * MIB, 2 * MIB);
    let fault = dma.write(Iova::new(2 * MIB), b"x").unwrap_err();
    assert_eq!((fault.reason, fault.refusal.unwrap().reason), (FaultKind::Secure, Reason::Size));
    // While some other split runs in the same segment, the mismatch alone is no fault; a wrong owner still is.
    rmp.smash_begin(oa);
    dma.write(Iova::new(2 * MIB), b"x").unwrap();
    machine.device.set_trust(Trust::Trusted { asid: 9, vmpl: Vmpl::V0, tdisp: Tdisp::Run, sdte_valid: true, vtom: None }).unwrap();
    assert_eq!(dma.write(Iova::new(2 * MIB), b"x").unwrap_err().refusal.unwrap().reason, Reason::WrongAsid);
    rmp.smash_end(oa);
}

/// DMA to a block that is split over and over, entry and leaf, sees neither a fault nor a wait.
#[test]
fn splits_under_dma_are_invisible() {
    let blocks = 24u64;
    let machine = Machine::new(blocks * 2 * MIB, Frames::Contiguous);
    machine.device.set_trust(trusted(Tdisp::Run, true)).unwrap();
    for block in 0..blocks {
        machine.make_private(block * 2 * MIB, Gpa::new(block * 2 * MIB), RmpSize::M2);
        machine.map(Iova::new(block * 2 * MIB), block * 2 * MIB, 2 * MIB, Perm::RW, SizeSet::ALL);
    }
    let splitting = std::sync::atomic::AtomicBool::new(true);
    std::thread::scope(|scope| {
        let mut dma = machine.dma();
        let splitting = &splitting;
        let reader = scope.spawn(move || {
            let (mut random, mut accesses) = (fastrand::Rng::with_seed(3), 0u64);
            while splitting.load(std::sync::atomic::Ordering::Relaxed) {
                dma.write(Iova::new(random.u64(0..blocks * 2 * MIB / 8) * 8), &[1; 8]).unwrap();
                accesses += 1;
            }
            (accesses, dma.stats())
        });
        for block in 0..blocks {
            let (oa, iova) = (machine.oa(block * 2 * MIB), Iova::new(block * 2 * MIB));
            machine.iommu.rmp().smash_begin(oa);
            let cut = || {
                let mut stock = Stock::new(machine.iommu.arena());
                machine.domain.cut(span(iova, 0x1000), SizeSet::only(Lg2::K4), &mut stock).unwrap();
                // The pieces beside the cut page are larger than 4 KiB; all of them must become small.
                for page in iova.get() >> 12..(iova.get() + 2 * MIB) >> 12 {
                    machine.domain.cut(span(Iova::new(page << 12), 0x1000), SizeSet::only(Lg2::K4), &mut stock).unwrap();
                }
            };
            if block % 2 == 0 {
                cut();
            }
            machine.iommu.rmp().psmash(oa).unwrap();
            if block % 2 == 1 {
                cut();
            }
            machine.iommu.rmp().smash_end(oa);
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        splitting.store(false, std::sync::atomic::Ordering::Relaxed);
        let (accesses, stats) = reader.join().unwrap();
        println!("{accesses} accesses, {} rechecks, no fault", stats.rechecks);
        assert_eq!(stats.faults, 0);
        assert!(accesses > 100);
    });
}

#[test]
fn vtom_divides_private_from_shared() {
    let machine = Machine::new(2 * MIB, Frames::Contiguous);
    let vtom = Some(Gpa::new(0x10_0000));
    machine.device.set_trust(Trust::Trusted { asid: ASID, vmpl: Vmpl::V0, tdisp: Tdisp::Run, sdte_valid: true, vtom }).unwrap();
    machine.make_private(0x1000, Gpa::new(0x1000), RmpSize::K4);
    machine.map_small(Iova::new(0x1000), 0x1000, 0x2000);
    machine.map_small(Iova::new(0x10_0000), 0x1000, 0x2000);
    let mut dma = machine.dma();
    dma.read(Iova::new(0x1000), &mut [0]).unwrap();
    assert_eq!(dma.read(Iova::new(0x2000), &mut [0]).unwrap_err().refusal.unwrap().reason, Reason::NotAssigned);
    assert_eq!(dma.read(Iova::new(0x10_0000), &mut [0]).unwrap_err().refusal.unwrap().reason, Reason::Assigned);
    dma.read(Iova::new(0x10_1000), &mut [0]).unwrap();
}
