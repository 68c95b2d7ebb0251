//! Conversions under devices with translation caches of their own: each ends with an answer or a quarantine, and never with a stale translation.

mod common;

use addr::Gpa;
use backing::Frames;
use common::{Guest, MIB, change, iova, span};
use convert::Auditor;
use iommu::FaultKind;
use lockstep_iommu::{AtsDma, Config, Owner, Policy, Step, Trust};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

fn guest(timeout: Duration) -> Guest {
    let iommu = iommu::Config { ats_timeout: timeout, ..iommu::Config::default() };
    let guest = Guest::configured(Gpa::new(0), 8 * MIB, Frames::Contiguous, Config { iommu, ..Config::default() });
    guest.backing.populate(guest.backing.pages(), backing::PageState::Shared).unwrap();
    guest
}

/// The row of the failure matrix: the conversion neither hangs nor lies.
#[test]
fn a_conversion_goes_on_without_a_device_that_does_not_answer() {
    let timeout = Duration::from_millis(100);
    let guest = guest(timeout);
    let silent = guest.dma.add_device("silent", Trust::Untrusted).unwrap();
    let (mut dma, mut other) = (AtsDma::new(&silent).unwrap(), guest.context(&guest.untrusted));
    dma.write(iova(0x5000), b"cached").unwrap();
    dma.set_mute(true);
    let began = Instant::now();
    assert_eq!(guest.convert(0x5000, 0x1000, Owner::Private), 1);
    assert!(began.elapsed() >= timeout && began.elapsed() < 20 * timeout, "{:?}", began.elapsed());
    assert!(silent.is_quarantined());
    assert_eq!(silent.unanswered(), Some(span(0x5000, 0x1000).onto(iova(0x5000))));
    for at in [0x5000, 0x6000] {
        assert_eq!(dma.read(iova(at), &mut [0; 8]).unwrap_err().reason, FaultKind::Quarantined);
    }
    other.write(iova(0x6000), b"others go on").unwrap();
    guest.clean();
    // Punch, unmap and conversions back wait for nobody now.
    let began = Instant::now();
    guest.dma.punch(span(0x9000, 0x1000)).unwrap();
    guest.dma.populate(span(0x9000, 0x1000)).unwrap();
    guest.convert(0x5000, 0x1000, Owner::Shared);
    assert!(began.elapsed() < timeout);
    silent.reset().unwrap();
    dma.set_mute(false);
    dma.read(iova(0x5000), &mut [0; 8]).unwrap();
    guest.convert(0x5000, 0x1000, Owner::Private);
    assert!(!silent.is_quarantined());
    assert_eq!(dma.read(iova(0x5000), &mut [0; 8]).unwrap_err().reason, FaultKind::Secure);
    guest.clean();
    guest.dma.remove_device(&silent).unwrap();
}

/// Every way by which memory goes away takes the same flush.
#[test]
fn punch_detach_and_removal_are_answered_too() {
    let guest = guest(Duration::from_secs(5));
    let device = guest.dma.add_device("ats", Trust::Untrusted).unwrap();
    let mut dma = AtsDma::new(&device).unwrap();
    dma.read(iova(0x3000), &mut [0; 8]).unwrap();
    guest.dma.punch(span(0x3000, 0x1000)).unwrap();
    assert_eq!((dma.cached(), dma.read(iova(0x3000), &mut [0; 8]).unwrap_err().reason), (0, FaultKind::NotMapped));
    dma.read(iova(0x4000), &mut [0; 8]).unwrap();
    guest.dma.remove_memory(Gpa::new(0)).unwrap();
    assert_eq!((dma.cached(), dma.read(iova(0x4000), &mut [0; 8]).unwrap_err().reason), (0, FaultKind::NotMapped));
    guest.dma.add_memory(Gpa::new(0), 8 * MIB, &guest.backing, 0).unwrap();
    dma.read(iova(0x4000), &mut [0; 8]).unwrap();
    guest.dma.remove_device(&device).unwrap();
    assert_eq!((dma.cached(), dma.read(iova(0x4000), &mut [0; 8]).unwrap_err().reason), (0, FaultKind::NotAttached));
    assert_eq!((device.ats().timeouts, device.ats().quarantines), (0, 0));
}

/// Devices with caches write to pages that convert all the time. The host keeps a mark in each private page: no write may reach it before the page is
/// shared again.
fn marks_lost(seconds: f64) -> u64 {
    const PAGES: u64 = 8;
    let guest = guest(Duration::from_secs(5));
    let stop = AtomicBool::new(false);
    let (lost, writes) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for seed in 0..2 {
            let device = guest.dma.add_device(&format!("ats {seed}"), Trust::Untrusted).unwrap();
            let (stop, writes) = (&stop, &writes);
            scope.spawn(move || {
                let mut dma = AtsDma::new(&device).unwrap();
                let mut random = fastrand::Rng::with_seed(seed);
                while !stop.load(Ordering::Relaxed) {
                    for _ in 0..32 {
                        let _ = dma.write(iova(random.u64(0..PAGES) << 12), &[0xd5; 0x1000]);
                    }
                    writes.fetch_add(32, Ordering::Relaxed);
                }
            });
        }
        let mut random = fastrand::Rng::with_seed(7);
        let until = Instant::now() + Duration::from_secs_f64(seconds);
        while Instant::now() < until || writes.load(Ordering::Relaxed) < 1000 {
            let at = random.u64(0..PAGES) << 12;
            guest.convert(at, 0x1000, Owner::Private);
            guest.dma.write(Gpa::new(at), &[0x11; 0x1000]).unwrap();
            std::thread::yield_now();
            let mut back = [0; 0x1000];
            guest.dma.read(Gpa::new(at), &mut back).unwrap();
            lost.fetch_add(u64::from(back != [0x11; 0x1000]), Ordering::Relaxed);
            guest.convert(at, 0x1000, Owner::Shared);
        }
        stop.store(true, Ordering::Relaxed);
    });
    guest.clean();
    lost.into_inner()
}

/// What audits find in a conversion under a device that answers and forgets nothing.
fn found_by_audit(plant: Option<&'static str>) -> (u64, u64) {
    let guest = guest(Duration::from_secs(5));
    let device = guest.dma.add_device("ats", Trust::Untrusted).unwrap();
    let mut dma = AtsDma::new(&device).unwrap();
    dma.read(iova(0x5000), &mut [0; 8]).unwrap();
    let seen = Arc::new(AtomicU64::new(0));
    let (space, count) = (Arc::downgrade(guest.dma.space()), Arc::clone(&seen));
    guest.dma.space().on_transition(move |transition| {
        if let Some(space) = space.upgrade().filter(|_| transition.step() == Step::Switch) {
            count.fetch_add(Auditor::new(&space).check_transition(transition).count, Ordering::Relaxed);
        }
    });
    let plant = plant.map(|name| sync::fail::plant(name, 0, u64::MAX));
    guest.dma.convert(&[change(0x5000, 0x1000, Owner::Private)]).unwrap();
    guest.dma.punch(span(0x8000, 0x1000)).unwrap();
    drop(plant);
    (seen.load(Ordering::Relaxed), guest.dma.audit().count)
}

/// One test for all that plants: a planted fault is the whole process's.
#[test]
fn stale_translations_under_conversions() {
    assert_eq!(marks_lost(1.0), 0);
    assert_eq!(found_by_audit(None), (0, 0));
    let (in_transition, at_rest) = found_by_audit(Some("iommu.ats_false_answer"));
    assert!(in_transition > 0 && at_rest > 0, "{in_transition} in transition, {at_rest} at rest");
    // The page stays where it is, so what a stale translation leads to is refused by its new owner.
    let guest = guest(Duration::from_secs(5));
    let device = guest.dma.add_device("ats", Trust::Untrusted).unwrap();
    let mut dma = AtsDma::new(&device).unwrap();
    dma.read(iova(0x5000), &mut [0; 8]).unwrap();
    let plant = sync::fail::plant("iommu.ats_false_answer", 0, u64::MAX);
    guest.convert(0x5000, 0x1000, Owner::Private);
    assert_eq!(dma.read(iova(0x5000), &mut [0; 8]).unwrap_err().reason, FaultKind::SecureTranslated);
    drop(plant);
    // Policies do not matter to caches.
    let shared_only = Guest::new(4 * MIB, Frames::Contiguous, Policy::SharedOnly);
    let device = shared_only.dma.add_device("ats", Trust::Untrusted).unwrap();
    let mut dma = AtsDma::new(&device).unwrap();
    dma.read(iova(0x5000), &mut [0; 8]).unwrap();
    shared_only.convert(0x5000, 0x1000, Owner::Private);
    assert_eq!((dma.cached(), dma.read(iova(0x5000), &mut [0; 8]).unwrap_err().reason), (0, FaultKind::NotMapped));
}
