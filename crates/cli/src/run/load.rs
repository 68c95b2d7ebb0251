//! What host threads do while the guest runs: a converter that moves pages back and forth, DMA on its neighbours that must never
//! notice, and an untrusted prober that must never see a secret.

use crate::run::checks::{Checks, Detector, add};
use addr::{Address, Gpa, Iova, PAGE_BYTES, PAGE_LG2, Span};
use iommu::FaultKind;
use lockstep::{AtsDma, Change, Dma, Fault, GuestDma, Owner, Policy};
use secure::RmpSize;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

/// What private pages of the host's region hold, and nothing else ever does.
pub(crate) const SECRET: u64 = 0x5345_4352_4554_2021;

/// The host's part of guest memory. Even blocks of 16 pages convert, odd ones stay shared.
#[derive(Clone, Debug)]
pub(crate) struct Region {
    pub(crate) dma: Arc<GuestDma>,
    pub(crate) checks: Arc<Checks>,
    pub(crate) span: Span<Gpa>,
}

/// A device's DMA, whether it translates ahead or not.
pub(crate) trait Accesses {
    fn read(&mut self, at: Iova, into: &mut [u8]) -> Result<(), Fault>;
    fn write(&mut self, at: Iova, from: &[u8]) -> Result<(), Fault>;
}

impl Accesses for Dma {
    fn read(&mut self, at: Iova, into: &mut [u8]) -> Result<(), Fault> {
        self.read(at, into)
    }

    fn write(&mut self, at: Iova, from: &[u8]) -> Result<(), Fault> {
        self.write(at, from)
    }
}

impl Accesses for AtsDma {
    fn read(&mut self, at: Iova, into: &mut [u8]) -> Result<(), Fault> {
        self.read(at, into)
    }

    fn write(&mut self, at: Iova, from: &[u8]) -> Result<(), Fault> {
        self.write(at, from)
    }
}

/// Which of so many threads this is, where each writes to blocks of its own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lane {
    pub(crate) index: u64,
    pub(crate) of: u64,
}

impl Lane {
    fn pick(self, random: &mut fastrand::Rng, blocks: u64) -> u64 {
        random.u64(..(blocks / self.of).max(1)) * self.of + self.index
    }
}

const BLOCK_PAGES: u64 = 16;
const BLOCK_BYTES: u64 = BLOCK_PAGES << PAGE_LG2;
const HUGE_BYTES: u64 = 2 << 20;

impl Region {
    fn blocks(&self) -> u64 {
        self.span.len() / BLOCK_BYTES
    }

    fn block(&self, index: u64) -> Gpa {
        self.span.start().plus(index * BLOCK_BYTES)
    }

    /// Converts blocks to private, lets the trusted device write a secret there, wipes it, and converts them back; now and then a whole 2 MiB
    /// block, of which then a part goes back first.
    pub(crate) fn convert(&self, mut device: Dma, seed: u64) {
        let mut random = fastrand::Rng::with_seed(seed);
        let huge: Vec<Gpa> = (0..self.span.len() / HUGE_BYTES).map(|index| self.span.start().plus(index * HUGE_BYTES)).collect();
        while !self.checks.stopped() {
            let (at, len) = if random.u8(..8) == 0 && !huge.is_empty() {
                (huge[random.usize(..huge.len())], HUGE_BYTES)
            } else {
                let pages = random.u64(1..=BLOCK_PAGES);
                let block = self.block(random.u64(..self.blocks().div_ceil(2)) * 2);
                (block.plus(random.u64(..=BLOCK_PAGES - pages) << PAGE_LG2), pages << PAGE_LG2)
            };
            let Ok(span) = Span::from_len(at, len) else { return };
            if !self.may_take(span) {
                continue;
            }
            self.to_private(span, &mut device);
            if len == HUGE_BYTES {
                let part = at.plus(random.u64(..512) << PAGE_LG2);
                if let Ok(part) = Span::from_len(part, PAGE_BYTES) {
                    self.to_shared(part, &mut device);
                }
            }
            self.to_shared(span, &mut device);
        }
    }

    /// 2 MiB conversions take the region's second half alone, where no steady DMA is.
    fn may_take(&self, span: Span<Gpa>) -> bool {
        let half = self.span.start().plus((self.span.len() / 2).next_multiple_of(HUGE_BYTES));
        span.len() < HUGE_BYTES || span.start() >= half
    }

    fn to_private(&self, span: Span<Gpa>, device: &mut Dma) {
        if !self.change(span, Owner::Private) {
            return;
        }
        self.validate(span, true);
        if self.dma.policy() == Policy::Mirror {
            for page in span.blocks(PAGE_LG2) {
                let done = device.write(Iova::new(page.start().get() + 8), &SECRET.to_le_bytes());
                self.must(done.is_ok(), page.start(), "the trusted device was refused a private page that the guest has validated");
            }
            add(&self.checks.bytes_moved, span.len() / PAGE_BYTES * 8);
        }
    }

    fn to_shared(&self, span: Span<Gpa>, device: &mut Dma) {
        for page in span.blocks(PAGE_LG2).filter(|page| !self.dma.is_shared(page.start())) {
            if self.dma.policy() == Policy::Mirror {
                let mut seen = [0; 8];
                let done = device.read(Iova::new(page.start().get() + 8), &mut seen).is_ok();
                self.must(done && u64::from_le_bytes(seen) == SECRET, page.start(), "the trusted device does not read back what it wrote");
                let wiped = device.write(Iova::new(page.start().get() + 8), &[0; 8]);
                self.must(wiped.is_ok(), page.start(), "the trusted device was refused a private page that the guest has validated");
            }
        }
        self.validate(span, false);
        self.change(span, Owner::Shared);
    }

    fn change(&self, span: Span<Gpa>, to: Owner) -> bool {
        match self.dma.convert(&[Change { span, to }]) {
            Ok(_) => true,
            Err(error) => {
                let at = error.span().unwrap_or(span).start();
                self.checks.find_at(&self.dma, Detector::Conversion, at, "I-10", &error.to_string());
                false
            }
        }
    }

    /// The guest's PVALIDATE; it tries 2 MiB and goes on page by page, as guests do.
    fn validate(&self, span: Span<Gpa>, validate: bool) {
        let space = self.dma.space();
        for block in span.blocks(21) {
            if block.len() == HUGE_BYTES && space.pvalidate(block.start(), RmpSize::M2, validate).is_ok() {
                continue;
            }
            for page in block.blocks(PAGE_LG2).filter(|page| !self.dma.is_shared(page.start())) {
                let _ = space.pvalidate(page.start(), RmpSize::K4, validate);
            }
        }
    }

    /// Steady DMA on the odd blocks of the first half, which lie in the same large leaves as pages that convert: it must never fault
    /// and never read anything but what it wrote.
    pub(crate) fn neighbours(&self, mut device: impl Accesses, lane: Lane, seed: u64) {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut bytes = vec![0; BLOCK_BYTES as usize];
        let mut wrote = vec![0u8; BLOCK_BYTES as usize];
        let mut turns = 0;
        while !self.checks.stopped() {
            let block = self.block(lane.pick(&mut random, (self.blocks() / 4).max(1)) * 2 + 1);
            let len = 1 << random.u32(3..17);
            let (at, len) = (Iova::new(block.get()), len.min(BLOCK_BYTES as usize));
            random.fill(&mut wrote[..len]);
            let put = device.write(at, &wrote[..len]);
            let got = device.read(at, &mut bytes[..len]);
            if [&put, &got].into_iter().any(|done| matches!(done, Err(fault) if fault.reason == FaultKind::Quarantined)) {
                // Said elsewhere, and once.
                return;
            }
            self.must(put.is_ok(), block, "DMA to a page that nobody converted was refused");
            self.must(
                got.is_ok() && bytes[..len] == wrote[..len],
                block,
                "DMA to a page that nobody converted reads something else than it wrote",
            );
            add(&self.checks.bytes_moved, 2 * len as u64);
            add(&self.checks.dma_checks, 2);
            pace(&mut turns, 32);
        }
    }

    /// An untrusted device reads everywhere, all the time. It may get shared pages; it must never get a secret.
    pub(crate) fn probe(&self, mut device: impl Accesses, all: Span<Gpa>, refused: &AtomicU64, seed: u64) {
        let mut random = fastrand::Rng::with_seed(seed);
        let pages = |span: Span<Gpa>| span.len() >> PAGE_LG2;
        let mut turns = 0;
        while !self.checks.stopped() {
            let within = if random.bool() { self.span } else { all };
            let page = within.start().plus(random.u64(..pages(within)) << PAGE_LG2);
            let mut seen = [0; 8];
            match device.read(Iova::new(page.get() + 8), &mut seen) {
                Ok(()) => self.must(
                    u64::from_le_bytes(seen) != SECRET,
                    page,
                    "an untrusted device read what was written while the page was private",
                ),
                Err(fault) => {
                    // With a cache of its own: at the latest by its answer it had forgotten the page, and that was before the page turned. Where
                    // leaves stay, it is asked after that.
                    let stale = fault.reason == FaultKind::SecureTranslated && !self.dma.space().keeps_leaves();
                    self.must(!stale, page, "an untrusted device used a translation that it had answered to have forgotten");
                    add(refused, 1);
                }
            }
            add(&self.checks.bytes_moved, 8);
            add(&self.checks.dma_checks, 1);
            pace(&mut turns, 256);
        }
    }

    fn must(&self, right: bool, at: Gpa, what: &str) {
        if !right && !self.checks.stopped() {
            self.checks.find_at(&self.dma, Detector::DmaCheck, at, "I-13", what);
        }
    }
}

/// Lets others have the processor after every `burst` turns: a run has more threads than a small host has processors, and a conversion waits for every
/// guard that is open, also for one whose thread does not run.
pub(crate) fn pace(turns: &mut u32, burst: u32) {
    *turns += 1;
    if *turns == burst {
        *turns = 0;
        std::thread::sleep(Duration::from_micros(100));
    }
}
