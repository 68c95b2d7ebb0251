//! What a conversion promises: after it, the three tables agree, trusted devices see what the policy says, untrusted devices never see
//! private memory, and neighbours never notice.

mod common;

use addr::Gpa;
use backing::Frames;
use common::{ASID, Guest, MIB, change, iova, span};
use iommu::{FaultKind, RefusedBy};
use lockstep_iommu::{ConvertError, Owner, Policy, Step, Tdisp, Trust};
use secure::RmpSize;
use std::sync::{Arc, Mutex};

#[test]
fn one_page_of_a_large_leaf() {
    let guest = Guest::new(64 * MIB, Frames::Contiguous, Policy::Mirror);
    let (mut trusted, mut untrusted) = (guest.context(&guest.trusted), guest.context(&guest.untrusted));
    untrusted.write(iova(0x12_3000), b"seen by all").unwrap();
    assert_eq!(guest.convert(0x12_3000, 0x1000, Owner::Private), 1);
    guest.clean();
    let fault = untrusted.write(iova(0x12_3000), b"x").unwrap_err();
    assert_eq!((fault.table, fault.reason), (RefusedBy::SecureWorld, FaultKind::Secure));
    assert!(trusted.write(iova(0x12_3000), b"x").is_err(), "the guest has not validated the page yet");
    guest.pvalidate(0x12_3000, 0x1000, true);
    trusted.write(iova(0x12_3000), b"by the trusted device").unwrap();
    untrusted.write(iova(0x12_4000), b"the neighbours never noticed").unwrap();
    untrusted.write(iova(0x12_2000), b"the neighbours never noticed").unwrap();
    assert!(guest.dma.cuts_and_merges().0 >= 1);

    guest.pvalidate(0x12_3000, 0x1000, false);
    assert_eq!(guest.convert(0x12_3000, 0x1000, Owner::Shared), 1);
    guest.clean();
    untrusted.write(iova(0x12_3000), b"back").unwrap();
    assert_eq!(guest.dma.merge(Gpa::new(0), u64::MAX), Gpa::new(0));
    assert!(guest.dma.cuts_and_merges().1 >= 1);
    guest.clean();
    let mut leaves = 0;
    guest.dma.ioas().domains()[0].table().leaves(addr::Span::whole(), |_| leaves += 1);
    assert_eq!(leaves, 1, "64 MiB are one leaf again");
}

#[test]
fn large_private_pages_and_their_smash() {
    let guest = Guest::new(64 * MIB, Frames::Contiguous, Policy::Mirror);
    let mut trusted = guest.context(&guest.trusted);
    assert_eq!(guest.convert(4 * MIB, 4 * MIB, Owner::Private), 1024);
    guest.clean();
    let oa = guest.backing.oa(addr::Page::new((4 * MIB) >> 12));
    assert_eq!(guest.dma.rmp().size_at(oa), RmpSize::M2);
    guest.dma.space().pvalidate(Gpa::new(4 * MIB), RmpSize::M2, true).unwrap();
    trusted.write(iova(4 * MIB + 5), b"through a 2 MiB leaf").unwrap();

    assert_eq!(guest.convert(4 * MIB + 0x7000, 0x1000, Owner::Shared), 1);
    guest.clean();
    assert_eq!((guest.dma.rmp().size_at(oa), guest.dma.counters().smashed), (RmpSize::K4, 1));
    trusted.write(iova(4 * MIB + 5), b"still valid after the smash").unwrap();
    assert_eq!(guest.dma.rmp().size_at(guest.backing.oa(addr::Page::new((6 * MIB) >> 12))), RmpSize::M2, "the other block stays large");
}

#[test]
fn scattered_frames() {
    let guest = Guest::new(16 * MIB, Frames::Scattered { seed: 5 }, Policy::Mirror);
    assert_eq!(guest.convert(0x3000, 0x5000, Owner::Private), 5);
    guest.clean();
    assert_eq!(guest.convert(0, 16 * MIB, Owner::Private), 4096 - 5);
    guest.clean();
    assert_eq!(guest.convert(0, 16 * MIB, Owner::Shared), 4096);
    guest.clean();
}

#[test]
fn shared_only_never_maps_private_pages() {
    let guest = Guest::new(16 * MIB, Frames::Contiguous, Policy::SharedOnly);
    let mut trusted = guest.context(&guest.trusted);
    guest.convert(MIB, MIB, Owner::Private);
    guest.clean();
    let fault = trusted.write(iova(MIB), b"x").unwrap_err();
    assert_eq!((fault.table, fault.reason), (RefusedBy::IoPageTable, FaultKind::NotMapped));
    guest.convert(MIB, MIB, Owner::Shared);
    guest.clean();
    trusted.write(iova(MIB), b"x").unwrap();
}

#[test]
fn a_device_that_is_not_running_reaches_nothing() {
    let guest = Guest::new(4 * MIB, Frames::Contiguous, Policy::Mirror);
    let mut trusted = guest.context(&guest.trusted);
    guest.convert(0, 0x1000, Owner::Private);
    guest.pvalidate(0, 0x1000, true);
    trusted.write(iova(0), b"x").unwrap();
    for (tdisp, sdte_valid) in [(Tdisp::Locked, true), (Tdisp::Error, true), (Tdisp::Unlocked, true), (Tdisp::Run, false)] {
        guest.trusted.set_trust(Trust::Trusted { asid: ASID, vmpl: secure::Vmpl::V0, tdisp, sdte_valid, vtom: None }).unwrap();
        assert_eq!(trusted.write(iova(0), b"x").unwrap_err().table, RefusedBy::Device);
    }
    guest
        .trusted
        .set_trust(Trust::Trusted { asid: ASID + 1, vmpl: secure::Vmpl::V0, tdisp: Tdisp::Run, sdte_valid: true, vtom: None })
        .unwrap();
    assert_eq!(trusted.write(iova(0), b"x").unwrap_err().table, RefusedBy::SecureWorld, "another guest's device");
}

#[test]
fn batches_and_repeats() {
    let guest = Guest::new(16 * MIB, Frames::Contiguous, Policy::Mirror);
    let batch: Vec<_> = (0..253).map(|page| change(page * 0x2000, 0x1000, Owner::Private)).collect();
    let flushes = |guest: &Guest| guest.dma.ioas().domains()[0].flush_stats().graces;
    let before = flushes(&guest);
    assert_eq!(guest.dma.convert(&batch).unwrap().pages, 253);
    assert!(flushes(&guest) - before <= 2, "a batch shares one detach");
    assert_eq!(guest.dma.convert(&batch).unwrap().pages, 0, "what is private already is left alone");
    guest.clean();
    let mixed = [change(0, 0x1000, Owner::Shared), change(0x1000, 0x1000, Owner::Private)];
    assert_eq!(guest.dma.convert(&mixed).unwrap().pages, 2);
    guest.clean();
}

#[test]
fn what_is_refused_before_anything_changes() {
    let guest = Guest::new(4 * MIB, Frames::Contiguous, Policy::Mirror);
    let before = guest.dump();
    let refused = |changes: &[_]| guest.dma.convert(changes).unwrap_err();
    assert!(matches!(refused(&[change(0x800, 0x1000, Owner::Private)]), ConvertError::Span(_)));
    assert!(
        matches!(refused(&[change(4 * MIB - 0x1000, 0x2000, Owner::Private)]), ConvertError::NoMemory { at, .. } if at == Gpa::new(4 * MIB))
    );
    assert!(matches!(refused(&[change(0, 0x2000, Owner::Private), change(0x1000, 0x1000, Owner::Shared)]), ConvertError::Twice { .. }));
    assert_eq!(guest.dump(), before);
}

#[test]
fn punched_pages_are_nobodys() {
    let guest = Guest::new(16 * MIB, Frames::Contiguous, Policy::Mirror);
    let mut untrusted = guest.context(&guest.untrusted);
    untrusted.write(iova(0x8000), b"here").unwrap();
    guest.dma.punch(span(0x8000, 0x2000)).unwrap();
    let fault = untrusted.write(iova(0x8000), b"gone").unwrap_err();
    assert_eq!((fault.table, fault.reason), (RefusedBy::IoPageTable, FaultKind::NotMapped));
    guest.clean();
    guest.dma.populate(span(0x8000, 0x2000)).unwrap();
    let mut bytes = [1; 4];
    untrusted.read(iova(0x8000), &mut bytes).unwrap();
    assert_eq!(bytes, [0; 4], "the page came back empty");
    guest.clean();
}

#[test]
fn memory_comes_and_goes() {
    let guest = Guest::new(4 * MIB, Frames::Contiguous, Policy::Mirror);
    let before = guest.dump();
    let more = backing::Backing::memfd(4 * MIB, Frames::Contiguous).unwrap();
    assert!(guest.dma.add_memory(Gpa::new(2 * MIB), 4 * MIB, &more, 0).is_err(), "overlaps");
    assert!(guest.dma.add_memory(Gpa::new(8 * MIB), 8 * MIB, &more, 0).is_err(), "longer than the file");
    assert!(guest.dma.add_memory(Gpa::new(8 * MIB + 1), MIB, &more, 0).is_err(), "misaligned");
    assert_eq!(guest.dump(), before);
    guest.dma.add_memory(Gpa::new(8 * MIB), 4 * MIB, &more, 0).unwrap();
    guest.convert(9 * MIB, 0x3000, Owner::Private);
    guest.clean();
    guest.convert(9 * MIB, 0x3000, Owner::Shared);
    guest.dma.remove_memory(Gpa::new(8 * MIB)).unwrap();
    assert!(guest.context(&guest.untrusted).write(iova(9 * MIB), b"x").is_err());
    assert!(guest.dma.remove_memory(Gpa::new(8 * MIB)).is_err());
    guest.clean();
}

#[test]
fn no_page_has_two_addresses() {
    let guest = Guest::new(4 * MIB, Frames::Contiguous, Policy::Mirror);
    assert!(guest.dma.add_memory(Gpa::new(16 * MIB), MIB, &guest.backing, 0).is_err(), "the same pages twice");
    guest.convert(0, 0x1000, Owner::Private);
    guest.dma.remove_memory(Gpa::new(0)).unwrap();
    assert!(guest.dma.add_memory(Gpa::new(16 * MIB), 4 * MIB, &guest.backing, 0).is_err(), "a page that is still private, elsewhere");
}

/// Guests ask page by page; what lies in a row is one piece, in whichever order it was named, and what does not go on stays apart.
#[test]
fn neighbours_are_converted_as_one() {
    let guest = Guest::new(16 * MIB, Frames::Contiguous, Policy::Mirror);
    let pieces = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&pieces);
    guest.dma.space().on_transition(move |transition| {
        if transition.step() == Step::Switch {
            seen.lock().unwrap().push(transition.pages().map(|(gpa, ..)| gpa).collect::<Vec<_>>());
        }
    });
    let mut changes: Vec<_> = (0..8).rev().map(|page| change(0x5000 + page * 0x1000, 0x1000, Owner::Private)).collect();
    changes.push(change(0x10_0000, 0x2000, Owner::Private));
    assert_eq!(guest.dma.convert(&changes).unwrap().pages, 10);
    assert_eq!(*pieces.lock().unwrap(), [[span(0x5000, 0x8000), span(0x10_0000, 0x2000)]]);
    guest.clean();
    // Two owners, side by side.
    let changes = [change(0x5000, 0x1000, Owner::Shared), change(0xd000, 0x1000, Owner::Private)];
    assert_eq!(guest.dma.convert(&changes).unwrap().pages, 2);
    assert_eq!(pieces.lock().unwrap()[1].len(), 2);
    guest.clean();
}

/// Whoever watches sees every step, in the order of design D-6, and nothing of a conversion that has nothing to do.
#[test]
fn steps_are_made_in_their_order() {
    let guest = Guest::new(16 * MIB, Frames::Contiguous, Policy::Mirror);
    let steps = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&steps);
    guest.dma.space().on_transition(move |transition| seen.lock().unwrap().push(transition.step()));
    guest.convert(0x5000, 0x1000, Owner::Private);
    assert_eq!(*steps.lock().unwrap(), Step::ALL);
    guest.convert(0x5000, 0x1000, Owner::Private);
    assert_eq!(steps.lock().unwrap().len(), Step::ALL.len());
}

/// A part of a large private entry is mapped anew: its leaf is small, so the entry has to be.
#[test]
fn a_part_of_a_large_entry_is_restored() {
    let guest = Guest::new(4 * MIB, Frames::Contiguous, Policy::Mirror);
    guest.convert(0, 2 * MIB, Owner::Private);
    guest.dma.space().restore(span(0x3000, 0x2000)).unwrap();
    guest.clean();
}
