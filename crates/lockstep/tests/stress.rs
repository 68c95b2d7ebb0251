//! Everything at once: converters that meet, a balloon, a merger, devices that come and go, DMA of both kinds, and an auditor. The tables agree at
//! every moment, and an untrusted device never reads what was written while the page was private.

mod common;

use addr::{Address, Gpa, PAGE_LG2};
use backing::Frames;
use common::{Guest, MIB, change, iova, span};
use lockstep_iommu::{AuditReport, Dma, Owner, Policy, Trust};
use secure::RmpSize;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

const BYTES: u64 = 32 * MIB;
const PAGE: u64 = 1 << PAGE_LG2;
const SECRET: u64 = 0x5ec2_e75e_c2e7_5ec2;
const TIME: Duration = Duration::from_secs(2);
/// Of each converter alone; what they fight over; the balloon's. Nobody's pages lie between them in the same large leaves.
const OWN: [(u64, u64); 2] = [(0, 8 * MIB), (8 * MIB, 8 * MIB)];
const FOUGHT_OVER: (u64, u64) = (16 * MIB, 8 * MIB);
const BALLOON: (u64, u64) = (24 * MIB, 4 * MIB);

#[derive(Default)]
struct Counts {
    stop: AtomicBool,
    converted: AtomicU64,
    secrets: AtomicU64,
    punched: AtomicU64,
    merges: AtomicU64,
    allowed: AtomicU64,
    refused: AtomicU64,
    audits: AtomicU64,
    attached: AtomicU64,
    /// What must stay zero: secrets in untrusted hands, differences.
    leaked: AtomicU64,
    differences: AtomicU64,
}

impl Counts {
    fn go_on(&self) -> bool {
        !self.stop.load(Relaxed)
    }
}

fn add(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Relaxed);
}

/// One page, a few, or a whole block of 2 MiB of a stretch.
fn pick(random: &mut fastrand::Rng, (start, len): (u64, u64)) -> (u64, u64) {
    match random.u8(..4) {
        0 => (start + random.u64(..len / (2 * MIB)) * 2 * MIB, 2 * MIB),
        1 => (start + random.u64(..len / PAGE - 40) * PAGE, random.u64(2..40) * PAGE),
        _ => (start + random.u64(..len / PAGE) * PAGE, PAGE),
    }
}

/// To private, a secret written by the trusted device, the secret wiped, back to shared.
fn convert_own(guest: &Guest, counts: &Counts, stretch: (u64, u64), seed: u64) {
    let (mut random, mut trusted) = (fastrand::Rng::with_seed(seed), guest.context(&guest.trusted));
    while counts.go_on() {
        let (at, len) = pick(&mut random, stretch);
        add(&counts.converted, guest.convert(at, len, Owner::Private));
        for page in span(at, len).blocks(PAGE_LG2).take(8) {
            let here = iova(page.start().get());
            if guest.dma.policy() == Policy::Mirror {
                guest.dma.space().pvalidate(page.start(), RmpSize::K4, true).unwrap();
                trusted.write(here.plus(8), &SECRET.to_le_bytes()).unwrap();
                add(&counts.secrets, 1);
            }
        }
        std::thread::sleep(Duration::from_micros(random.u64(..50)));
        for page in span(at, len).blocks(PAGE_LG2).take(8) {
            if guest.dma.policy() == Policy::Mirror {
                trusted.write(iova(page.start().get() + 8), &[0; 8]).unwrap();
            }
        }
        add(&counts.converted, guest.convert(at, len, Owner::Shared));
    }
}

fn convert_fought_over(guest: &Guest, counts: &Counts, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    while counts.go_on() {
        let mut batch = Vec::new();
        let mut next = FOUGHT_OVER.0;
        for _ in 0..random.u8(1..6) {
            let (at, len) = pick(&mut random, FOUGHT_OVER);
            if at >= next {
                batch.push(change(at, len, if random.bool() { Owner::Private } else { Owner::Shared }));
                next = at + len;
            }
        }
        add(&counts.converted, guest.dma.convert(&batch).unwrap().pages);
    }
}

fn balloon(guest: &Guest, counts: &Counts, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    while counts.go_on() {
        let (at, len) = pick(&mut random, BALLOON);
        guest.dma.punch(span(at, len)).unwrap();
        assert!(guest.context(&guest.untrusted).read(iova(at), &mut [0; 8]).is_err(), "a punched page was read");
        guest.dma.populate(span(at, len)).unwrap();
        add(&counts.punched, len / PAGE);
    }
}

fn merge(guest: &Guest, counts: &Counts) {
    let mut from = Gpa::new(0);
    while counts.go_on() {
        from = guest.dma.merge(from, 2048);
        add(&counts.merges, 1);
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn untrusted_dma(guest: &Guest, counts: &Counts, seed: u64) {
    let (mut random, mut dma) = (fastrand::Rng::with_seed(seed), guest.context(&guest.untrusted));
    let mut bytes = vec![0; 3 * PAGE as usize];
    while counts.go_on() {
        let at = random.u64(..BYTES / PAGE - 3) * PAGE;
        let len = if random.bool() { 16 } else { bytes.len() };
        bytes.fill(0);
        let done = dma.read(iova(at), &mut bytes[..len]);
        if bytes.windows(8).step_by(8).any(|word| word == SECRET.to_le_bytes()) {
            add(&counts.leaked, 1);
        }
        add(if done.is_ok() { &counts.allowed } else { &counts.refused }, 1);
        // Into a place of its own, so that nobody's secret is overwritten.
        let written = dma.write(iova(at + 64), b"untrusted");
        add(if written.is_ok() { &counts.allowed } else { &counts.refused }, 1);
    }
}

fn trusted_dma(guest: &Guest, counts: &Counts, seed: u64) {
    let (mut random, mut dma) = (fastrand::Rng::with_seed(seed), guest.context(&guest.trusted));
    while counts.go_on() {
        let at = random.u64(..BYTES / PAGE) * PAGE + 128;
        let done = dma.write(iova(at), b"trusted");
        add(if done.is_ok() { &counts.allowed } else { &counts.refused }, 1);
    }
}

/// Devices of a domain of their own come and go.
fn visitors(guest: &Guest, counts: &Counts) {
    while counts.go_on() {
        let domain = guest.dma.iommu().domain().unwrap();
        guest.dma.ioas().attach(&domain).unwrap();
        let device = guest.dma.iommu().device("visitor");
        device.set_trust(Trust::Untrusted).unwrap();
        device.attach(&domain).unwrap();
        let mut dma = Dma::new(&device).unwrap();
        let mut bytes = [0; 16];
        for page in (0..BYTES / PAGE).step_by(61) {
            if dma.read(iova(page * PAGE), &mut bytes).is_ok() && bytes[8..] == SECRET.to_le_bytes() {
                add(&counts.leaked, 1);
            }
        }
        guest.dma.ioas().detach(&domain).unwrap();
        assert!(dma.read(iova(0), &mut bytes).is_err());
        device.detach().unwrap();
        add(&counts.attached, 1);
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn note(counts: &Counts, report: &AuditReport) {
    add(&counts.audits, 1);
    if report.count > 0 && counts.differences.fetch_add(report.count, Relaxed) == 0 {
        println!("{} differences, the first: {}", report.count, report.differences[0]);
    }
}

fn everything(policy: Policy, frames: Frames) -> Counts {
    let guest = Guest::new(BYTES, frames, policy);
    let counts = Counts::default();
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let (guest, counts) = (&guest, &counts);
        for (seed, stretch) in OWN.into_iter().enumerate() {
            scope.spawn(move || convert_own(guest, counts, stretch, seed as u64));
            scope.spawn(move || convert_fought_over(guest, counts, 10 + seed as u64));
        }
        scope.spawn(move || balloon(guest, counts, 20));
        scope.spawn(move || merge(guest, counts));
        scope.spawn(move || untrusted_dma(guest, counts, 30));
        scope.spawn(move || trusted_dma(guest, counts, 40));
        scope.spawn(move || visitors(guest, counts));
        while begin.elapsed() < TIME {
            note(counts, &guest.dma.audit());
        }
        counts.stop.store(true, Relaxed);
    });
    note(&counts, &guest.dma.audit());
    let read = |counter: &AtomicU64| counter.load(Relaxed);
    println!(
        "{policy}, {frames:?}: {} pages converted, {} secrets, {} pages punched, {} merges, DMA {} allowed and {} refused, {} visits, {} audits",
        read(&counts.converted),
        read(&counts.secrets),
        read(&counts.punched),
        read(&counts.merges),
        read(&counts.allowed),
        read(&counts.refused),
        read(&counts.attached),
        read(&counts.audits)
    );
    assert_eq!(guest.dma.counters().failed, 0);
    counts
}

fn check(policy: Policy, frames: Frames) {
    let counts = everything(policy, frames);
    assert_eq!(
        (counts.leaked.into_inner(), counts.differences.into_inner()),
        (0, 0),
        "secrets read by untrusted devices, audit differences"
    );
    for counter in [counts.converted, counts.punched, counts.merges, counts.allowed, counts.refused, counts.attached, counts.audits] {
        assert!(counter.into_inner() > 0);
    }
}

#[test]
fn mirror() {
    check(Policy::Mirror, Frames::Contiguous);
}

#[test]
fn shared_only() {
    check(Policy::SharedOnly, Frames::Contiguous);
}

#[test]
fn scattered() {
    check(Policy::Mirror, Frames::Scattered { seed: 8 });
}
