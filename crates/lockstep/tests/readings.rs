//! Both answers to each of two open questions about the hardware: leaves above 2 MiB over shared memory, and where the change of an owner must show.

mod common;

use addr::{Gpa, SizeSet, Span};
use backing::{Backing, Frames};
use common::{Guest, MIB, iova};
use iommu::FaultKind;
use lockstep_iommu::{AtsDma, Borders, Config, Owner, Policy, Reading, Trust};
use secure::Reason;

const GIB: u64 = 1 << 30;

fn guest(bytes: u64, policy: Policy, reading: Reading) -> Guest {
    let guest = Guest::configured(Gpa::new(0), bytes, Frames::Contiguous, Config { policy, reading, ..Config::default() });
    guest.backing.populate(Span::of(addr::Page::new(0), addr::Page::new(1023)), backing::PageState::Shared).unwrap();
    guest
}

/// Sizes of leaves, and how many.
fn leaves(guest: &Guest) -> (u64, usize) {
    let domain = &guest.dma.ioas().domains()[0];
    let (root, level) = domain.table().root();
    let tree = convert::read_tree(domain.format(), &|at| domain.table().arena().peek(at), root, level + 1, Span::whole());
    (tree.leaves.iter().map(|leaf| leaf.span.last_offset() + 1).max().unwrap_or(0), tree.leaves.len())
}

/// Strict: none is refused, because none is made. Otherwise a leaf of 1 GiB is one leaf, judged by its pages.
#[test]
fn leaves_above_2_mib() {
    for (strict, largest) in [(false, GIB), (true, 2 * MIB)] {
        for borders in Borders::ALL {
            let guest = guest(GIB, Policy::Mirror, Reading { strict, borders });
            assert_eq!(leaves(&guest).0, largest);
            let mut dma = guest.context(&guest.untrusted);
            for at in [0, GIB / 2, GIB - 8] {
                dma.write(iova(at), &[1; 8]).unwrap();
            }
            guest.clean();
        }
    }
    // A leaf that somebody makes all the same: refused by the strict reading, and only by that.
    for strict in [false, true] {
        let guest = guest(GIB, Policy::Mirror, Reading { strict, ..Reading::default() });
        let other = Backing::memfd(GIB, Frames::Contiguous).unwrap();
        let domain = guest.dma.iommu().domain().unwrap();
        let (mut stock, mut gather) = (pt::Stock::new(guest.dma.iommu().arena()), pt::Gather::new());
        let span = Span::from_len(iova(0), GIB).unwrap();
        domain.table().map(span, other.window().start(), pt::Perm::RW, SizeSet::ALL, &mut stock, &mut gather).unwrap();
        domain.flush(gather);
        let device = guest.dma.iommu().device("by hand");
        device.attach(&domain).unwrap();
        let refused = guest.context(&device).read(iova(0), &mut [0; 8]).err();
        assert_eq!(refused.map(|fault| fault.refusal.unwrap().reason), strict.then_some(Reason::TooLarge));
    }
}

/// Borders in the table: leaves end where the owner changes. In the RMP: not one leaf is touched, and the owner decides at each access.
#[test]
fn borders_in_the_table_or_in_the_rmp() {
    for borders in Borders::ALL {
        let guest = guest(8 * MIB, Policy::Mirror, Reading { borders, ..Reading::default() });
        let keeps = borders == Borders::Rmp;
        let before = (leaves(&guest), guest.dma.cuts_and_merges());
        let (mut trusted, mut untrusted) = (guest.context(&guest.trusted), guest.context(&guest.untrusted));
        let mut cached = AtsDma::new(&guest.dma.add_device("ats", Trust::Untrusted).unwrap()).unwrap();
        for at in [0x5000, 0x6000] {
            cached.write(iova(at), b"shared").unwrap();
            untrusted.write(iova(at), b"shared").unwrap();
        }
        guest.convert(0x5000, 0x1000, Owner::Private);
        assert_eq!((leaves(&guest), guest.dma.cuts_and_merges()) == before, keeps, "{borders}");
        assert_eq!(cached.cached() == 0, !keeps || cached.cached() == 0);
        assert_eq!(untrusted.write(iova(0x5000), b"x").unwrap_err().reason, FaultKind::Secure);
        assert_eq!(cached.write(iova(0x5000), b"x").unwrap_err().reason, FaultKind::Secure, "it had to ask again");
        assert_eq!(trusted.write(iova(0x5000), b"x").unwrap_err().refusal.unwrap().reason, Reason::NotValidated);
        guest.pvalidate(0x5000, 0x1000, true);
        trusted.write(iova(0x5000), b"private").unwrap();
        // Across the border in one access, on both sides.
        trusted.write(iova(0x4ff0), &[2; 0x1020]).unwrap();
        let fault = untrusted.write(iova(0x4ff0), &[2; 0x1020]).unwrap_err();
        assert_eq!((fault.iova, fault.done), (iova(0x5000), 0x10), "the pages before are shared");
        for at in [0x4000, 0x6000] {
            untrusted.write(iova(at), b"neighbour").unwrap();
            cached.write(iova(at), b"neighbour").unwrap();
        }
        guest.clean();
        // A large private entry, of which a part goes back: the RMP is split, the leaf is not.
        let before = (leaves(&guest), guest.dma.cuts_and_merges());
        guest.convert(2 * MIB, 2 * MIB, Owner::Private);
        guest.dma.space().pvalidate(Gpa::new(2 * MIB), secure::RmpSize::M2, true).unwrap();
        trusted.write(iova(2 * MIB + 0x7ff0), &[3; 0x20]).unwrap();
        guest.clean();
        guest.convert(2 * MIB + 0x8000, 0x1000, Owner::Shared);
        assert_eq!(guest.dma.counters().smashed, 1);
        assert_eq!((leaves(&guest), guest.dma.cuts_and_merges()) == before, keeps, "{borders}");
        untrusted.write(iova(2 * MIB + 0x8000), b"shared again").unwrap();
        assert!(untrusted.write(iova(2 * MIB + 0x9000), b"x").is_err());
        trusted.write(iova(2 * MIB + 0x7ff0), &[3; 0x1020]).unwrap();
        guest.clean();
        guest.dma.punch(Span::from_len(Gpa::new(2 * MIB + 0x8000), 0x1000).unwrap()).unwrap();
        assert_eq!(untrusted.read(iova(2 * MIB + 0x8000), &mut [0]).unwrap_err().reason, FaultKind::NotMapped);
        guest.convert(2 * MIB + 0x8000, 0x1000, Owner::Private);
        guest.pvalidate(2 * MIB + 0x8000, 0x1000, true);
        trusted.write(iova(2 * MIB + 0x7ff0), &[4; 0x1020]).unwrap();
        guest.clean();
    }
}

/// Where private pages must not be mapped at all, leaves end at them under either reading.
#[test]
fn shared_only_cuts_whatever_the_reading() {
    let guest = guest(8 * MIB, Policy::SharedOnly, Reading { borders: Borders::Rmp, strict: false });
    guest.convert(0x5000, 0x1000, Owner::Private);
    assert_eq!(guest.context(&guest.untrusted).read(iova(0x5000), &mut [0]).unwrap_err().reason, FaultKind::NotMapped);
    guest.context(&guest.untrusted).write(iova(0x6000), b"x").unwrap();
    guest.clean();
}

/// The page's leaf goes when the secure world keeps the page.
#[test]
fn a_leaked_page_is_not_left_mapped() {
    let guest = guest(8 * MIB, Policy::Mirror, Reading { borders: Borders::Rmp, strict: false });
    guest.convert(0x5000, 0x1000, Owner::Private);
    guest.dma.rmp().set_in_use(guest.backing.oa(addr::Page::new(5)), true);
    guest.dma.convert(&[common::change(0x5000, 0x1000, Owner::Shared)]).unwrap_err();
    assert_eq!(guest.dma.counters().leaked, 1);
    assert_eq!(guest.context(&guest.trusted).read(iova(0x5000), &mut [0]).unwrap_err().reason, FaultKind::NotMapped);
    guest.clean();
}

/// When the conversion returns, no access that was let in by the old owner is under way, though the leaf was never taken out.
#[test]
fn a_kept_leaf_lets_nobody_in_late() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let guest = guest(8 * MIB, Policy::Mirror, Reading { borders: Borders::Rmp, strict: false });
    let (stop, mut late) = (AtomicBool::new(false), 0);
    std::thread::scope(|scope| {
        let mut cached = AtsDma::new(&guest.dma.add_device("ats", Trust::Untrusted).unwrap()).unwrap();
        let (mut plain, stop) = (guest.context(&guest.untrusted), &stop);
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let _ = (plain.write(iova(0x5000), &[0xd5; 0x1000]), cached.write(iova(0x5000), &[0xd5; 0x1000]));
            }
        });
        for _ in 0..if cfg!(debug_assertions) { 1000 } else { 10_000 } {
            guest.convert(0x5000, 0x1000, Owner::Private);
            guest.dma.write(Gpa::new(0x5000), &[0x11; 0x1000]).unwrap();
            std::thread::yield_now();
            let mut back = [0; 0x1000];
            guest.dma.read(Gpa::new(0x5000), &mut back).unwrap();
            late += u32::from(back != [0x11; 0x1000]);
            guest.convert(0x5000, 0x1000, Owner::Shared);
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(late, 0, "writes after the page had turned private");
}

/// The same without chance: an access that was let in before the owner changed is waited for.
#[test]
fn a_conversion_waits_for_who_was_let_in() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let guest = guest(8 * MIB, Policy::Mirror, Reading { borders: Borders::Rmp, strict: false });
    let mut dma = guest.context(&guest.untrusted);
    let slice = dma.slice(iova(0x5000), 64, iommu::Access::Write).unwrap();
    let done = AtomicBool::new(false);
    let early = std::thread::scope(|scope| {
        scope.spawn(|| {
            guest.convert(0x5000, 0x1000, Owner::Private);
            done.store(true, Ordering::SeqCst);
        });
        std::thread::sleep(std::time::Duration::from_millis(100));
        let early = done.load(Ordering::SeqCst);
        drop(slice);
        early
    });
    assert!(!early && done.load(Ordering::SeqCst));
    assert!(dma.write(iova(0x5000), b"x").is_err());
}
