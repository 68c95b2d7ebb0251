//! Each fault that a layer can be told to make is noticed above it. One test, because a planted fault is the whole process's.

mod common;

use addr::{Page, Span};
use backing::Frames;
use common::{Guest, MIB, change, iova, span};
use convert::Auditor;
use lockstep_iommu::{Owner, Policy};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

fn guest() -> Guest {
    let guest = Guest::new(16 * MIB, Frames::Contiguous, Policy::Mirror);
    guest.backing.populate(guest.backing.pages(), backing::PageState::Shared).unwrap();
    guest.convert(4 * MIB, 2 * MIB, Owner::Private);
    guest
}

/// What the audit says after a few changes, those in the middle of a conversion among them.
fn found_by_audit(name: &'static str) -> u64 {
    let guest = guest();
    let in_transition = Arc::new(AtomicU64::new(0));
    let (space, seen) = (Arc::downgrade(guest.dma.space()), Arc::clone(&in_transition));
    guest.dma.space().on_transition(move |transition| {
        if let Some(space) = space.upgrade() {
            seen.fetch_add(Auditor::new(&space).check_transition(transition).count, Ordering::Relaxed);
        }
    });
    let plant = sync::fail::plant(name, 0, 1);
    let _ = guest.dma.convert(&[change(4 * MIB + 0x3000, 0x1000, Owner::Shared)]);
    let _ = guest.dma.convert(&[change(0x3000, 0x1000, Owner::Private)]);
    let _ = guest.dma.punch(span(0x9000, 0x1000));
    assert_eq!(plant.fired(), 1, "{name}");
    drop(plant);
    Auditor::new(guest.dma.space()).populated().audit(guest.dma.ioas()).count + in_transition.load(Ordering::Relaxed)
}

/// Whether a device that had used a page reaches it after the page was given back.
fn found_by_dma(name: &'static str) -> bool {
    let guest = guest();
    let mut dma = guest.context(&guest.untrusted);
    let plant = sync::fail::plant(name, 0, 1);
    dma.write(iova(0x9000), b"before").unwrap();
    guest.dma.punch(span(0x9000, 0x1000)).unwrap();
    let reached = dma.write(iova(0x9000), b"after").is_ok();
    assert_eq!(plant.fired(), 1, "{name}");
    reached
}

/// Whether a punch returns while a device holds the page.
fn found_by_a_slice(name: Option<&'static str>) -> bool {
    let guest = guest();
    let plant = name.map(|name| sync::fail::plant(name, 0, u64::MAX));
    let mut dma = guest.context(&guest.untrusted);
    let slice = dma.slice(iova(0x9000), 64, iommu::Access::Read).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            guest.dma.punch(span(0x9000, 0x1000)).unwrap();
            done.store(true, Ordering::SeqCst);
        });
        std::thread::sleep(Duration::from_millis(100));
        let early = done.load(Ordering::SeqCst);
        drop(slice);
        assert!(plant.is_none_or(|plant| plant.fired() > 0));
        early
    })
}

#[test]
fn every_planted_fault_is_noticed() {
    for name in ["convert.map_before_switch", "convert.leave_leaf", "secure.forget_psmash", "backing.ignore_punch", "pt.corrupt_leaf"] {
        assert!(found_by_audit(name) > 0, "{name}");
    }
    assert_eq!(found_by_audit_without(), 0);
    for name in ["iommu.skip_invalidate", "iommu.late_fill"] {
        assert!(found_by_dma(name), "{name}");
    }
    assert!(found_by_a_slice(Some("iommu.skip_grace")));
    assert!(!found_by_a_slice(None));
}

/// The same changes without a fault.
fn found_by_audit_without() -> u64 {
    let guest = guest();
    guest.convert(4 * MIB + 0x3000, 0x1000, Owner::Shared);
    guest.convert(0x3000, 0x1000, Owner::Private);
    guest.dma.punch(span(0x9000, 0x1000)).unwrap();
    assert!(!guest.backing.holes(Span::one(Page::new(9))).unwrap().is_empty());
    Auditor::new(guest.dma.space()).populated().audit(guest.dma.ioas()).count
}
