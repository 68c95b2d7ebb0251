//! Pages that are given back to the host under DMA, and come again: what was punched is out of every device's reach when the punch returns, and
//! no late write brings it back.

use crate::run::checks::{Checks, Detector, add};
use crate::run::load::pace;
use addr::{Address, Gpa, Iova, PAGE_LG2, Span};
use convert::Auditor;
use lockstep::{Dma, GuestDma};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Pages of the balloon.
pub(crate) const PAGES: u64 = 16;
/// How long a page stays away: long enough for many DMA tries, and for a write that should have been waited for to land.
const AWAY: Duration = Duration::from_micros(600);

/// The balloon's part of guest memory.
#[derive(Clone, Debug)]
pub(crate) struct Balloon {
    pub(crate) dma: Arc<GuestDma>,
    pub(crate) checks: Arc<Checks>,
    pub(crate) span: Span<Gpa>,
    /// Per page: odd while it is away, and counted up, so that one absence is told from the next.
    pub(crate) away: Arc<[AtomicU64]>,
}

impl Balloon {
    fn page(&self, index: u64) -> Span<Gpa> {
        Span::block(self.span.start().plus(index << PAGE_LG2), PAGE_LG2)
    }

    /// Punches and populates, page by page, for ever.
    pub(crate) fn breathe(&self, mut own: Dma, seed: u64) {
        let mut random = fastrand::Rng::with_seed(seed);
        while !self.checks.stopped() {
            let index = random.u64(..PAGES);
            let page = self.page(index);
            let iova = Iova::new(page.start().get());
            // This context has the translation cached when the page goes.
            if let Err(fault) = own.write(iova, b"here") {
                self.find(page, &format!("DMA to a page of the balloon that is there: {fault}"));
                return;
            }
            if let Err(error) = self.dma.punch(page) {
                self.find(page, &format!("punch: {error}"));
                return;
            }
            self.away[index as usize].fetch_add(1, Ordering::SeqCst);
            if own.write(iova, b"late").is_ok() {
                self.find(page, "a device wrote to a page after it was given back");
                return;
            }
            std::thread::sleep(AWAY);
            self.still_away(page);
            self.away[index as usize].fetch_add(1, Ordering::SeqCst);
            if let Err(error) = self.dma.populate(page) {
                self.find(page, &format!("populate: {error}"));
                return;
            }
            if let Some((backing, index)) = self.dma.space().page_at(page.start()) {
                self.checks.take(Auditor::new(self.dma.space()).audit_part(&backing, Span::one(index)));
            }
            add(&self.checks.punches, 1);
            add(&self.checks.dma_checks, 3);
        }
    }

    /// A hole stays a hole: a write that was still in flight when the punch returned would have filled it.
    fn still_away(&self, page: Span<Gpa>) {
        let Some((backing, index)) = self.dma.space().page_at(page.start()) else { return };
        let Ok(holes) = backing.holes(Span::one(index)) else { return };
        if holes.is_empty() {
            self.find(page, "a page that was given back has memory again: a write that was under way was not waited for");
        }
    }

    /// DMA to all pages of the balloon, whether they are there or not. While one is away, nothing may get through.
    pub(crate) fn press(&self, mut device: Dma, seed: u64) {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut turns = 0;
        while !self.checks.stopped() {
            let index = random.u64(..PAGES);
            let page = self.page(index);
            let before = self.away[index as usize].load(Ordering::SeqCst);
            let done = device.write(Iova::new(page.start().get() + 64), b"pressing");
            let after = self.away[index as usize].load(Ordering::SeqCst);
            if done.is_ok() && before == after && before % 2 == 1 {
                self.find(page, "a device wrote to a page that was given back");
            }
            add(&self.checks.bytes_moved, if done.is_ok() { 8 } else { 0 });
            add(&self.checks.dma_checks, 1);
            pace(&mut turns, 64);
        }
    }

    fn find(&self, page: Span<Gpa>, what: &str) {
        if !self.checks.stopped() {
            self.checks.find_at(&self.dma, Detector::DmaCheck, page.start(), "I-4", what);
        }
    }
}
