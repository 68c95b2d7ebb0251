//! What a soak adds to a run: memory that is added, moved and taken away, a second address space that maps the same pages elsewhere, devices that
//! come and go, and a second guest whose every step may fail.

use crate::run::checks::{Checks, Detector, add};
use crate::run::load::{SECRET, pace};
use addr::{Address, Gpa, Iova, PAGE_BYTES, PAGE_LG2, Page, Span};
use backing::{Backing, Frames, PageState};
use convert::Auditor;
use ioas::{Ioas, Place, SharedOnly};
use lockstep::{Change, Config, ConvertError, Dma, GuestDma, Owner, Policy, RecordedStage2, Tdisp, Trust};
use pt::Perm;
use secure::RmpSize;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

const MIB: u64 = 1 << 20;
/// A memslot that comes and goes.
const SLOT_BYTES: u64 = 4 * MIB;
/// Where it may be, one after the other.
const PLACES: u64 = 4;
/// Areas that the second address space has at most.
const AREAS: usize = 64;
/// Calls that a guest whose steps fail makes before the next one takes its place.
const CALLS_OF_A_GUEST: u32 = 256;
/// Changes of one batch: as many as one request of a guest holds.
const BATCH: u64 = 253;

/// What it did.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) slots_added: AtomicU64,
    pub(crate) slots_moved: AtomicU64,
    pub(crate) batches: AtomicU64,
    pub(crate) maps: AtomicU64,
    pub(crate) unmaps: AtomicU64,
    pub(crate) devices: AtomicU64,
    pub(crate) failures: AtomicU64,
    pub(crate) leaks: AtomicU64,
    /// Second guests of one file, and of a pair.
    pub(crate) guests: AtomicU64,
    pub(crate) pair_guests: AtomicU64,
}

/// A run's guest, and the threads around it.
pub(crate) struct Weather<'a> {
    pub(crate) dma: &'a Arc<GuestDma>,
    pub(crate) checks: &'a Checks,
    pub(crate) counts: &'a Counts,
    pub(crate) memory: Span<Gpa>,
    pub(crate) region: Span<Gpa>,
    pub(crate) frames: Frames,
}

impl Weather<'_> {
    /// A memslot is added behind the guest's memory, its pages are converted in batches under DMA, then it moves, and in the end goes. What
    /// was in it is in it at its new place, and nothing answers at the old one.
    pub(crate) fn slots(&self, seed: u64) -> Result<(), crate::run::machine::Failure> {
        let mut random = fastrand::Rng::with_seed(seed);
        let first = (self.memory.last().get() + 1).next_multiple_of(SLOT_BYTES);
        let place = |index: u64| Gpa::new(first + index % PLACES * SLOT_BYTES);
        let device = self.dma.add_device("visitor", Trust::Untrusted)?;
        let mut dma = Dma::new(&device)?;
        let mut turn = 0;
        while !self.checks.stopped() {
            let backing = Backing::memfd(SLOT_BYTES, self.frames)?;
            // As in the rest of the guest's memory, a hole is a loss and nothing else.
            backing.populate(backing.pages(), PageState::Shared)?;
            self.dma.add_memory(place(turn), SLOT_BYTES, &backing, 0)?;
            add(&self.counts.slots_added, 1);
            let mark = random.u64(..);
            self.expect(dma.write(Iova::new(place(turn).get() + 24), &mark.to_le_bytes()).is_ok(), place(turn), "a new memslot's page");
            for _ in 0..random.u8(1..4) {
                self.batches(place(turn), &mut random);
            }
            let (old, new) = (place(turn), place(turn + 1));
            self.dma.remove_memory(old)?;
            self.expect(dma.read(Iova::new(old.get() + 24), &mut [0; 8]).is_err(), old, "a memslot that was taken away");
            self.dma.add_memory(new, SLOT_BYTES, &backing, 0)?;
            add(&self.counts.slots_moved, 1);
            let mut seen = [0; 8];
            let same = dma.read(Iova::new(new.get() + 24), &mut seen).is_ok() && u64::from_le_bytes(seen) == mark;
            self.expect(same, new, "what a moved memslot holds");
            self.dma.remove_memory(new)?;
            turn += 1;
        }
        Ok(())
    }

    /// Pages of one memslot to private and back, as many changes at once as a guest can ask for, in no order.
    fn batches(&self, slot: Gpa, random: &mut fastrand::Rng) {
        let mut pages: Vec<u64> = (1..SLOT_BYTES >> PAGE_LG2).collect();
        random.shuffle(&mut pages);
        for to in [Owner::Private, Owner::Shared] {
            let change = |page: &u64| Change { span: Span::block(slot.plus(page << PAGE_LG2), PAGE_LG2), to };
            let changes: Vec<Change> = pages[..BATCH as usize].iter().map(change).collect();
            match self.dma.convert(&changes) {
                Ok(done) => self.expect(done.pages == BATCH, slot, "the number of pages that a batch converted"),
                Err(error) => self.checks.find_at(self.dma, Detector::Conversion, slot, "I-10", &error.to_string()),
            }
            add(&self.counts.batches, 1);
        }
    }

    /// A second address space shows shared pages of the guest at other addresses: areas come and go while pages convert, and a device on it
    /// never reads a secret.
    pub(crate) fn second_space(&self, seed: u64) -> Result<(), crate::run::machine::Failure> {
        let mut random = fastrand::Rng::with_seed(seed);
        let ioas = Ioas::new(self.dma.iommu(), Arc::new(SharedOnly));
        let device = self.dma.iommu().device("stranger");
        ioas.attach_device(&device)?;
        let mut dma = Dma::new(&device)?;
        let (backing, _) = self.dma.space().page_at(self.region.start()).ok_or("the region has no memory")?;
        let mut areas: Vec<(Iova, u64)> = Vec::new();
        let mut turns = 0;
        while !self.checks.stopped() {
            if areas.len() < AREAS && random.bool() {
                let pages = random.u64(1..=600).min(self.region.len() >> PAGE_LG2);
                let page = random.u64(..=(self.region.len() >> PAGE_LG2) - pages);
                let offset = self.region.start().get() + (page << PAGE_LG2);
                let at = ioas.map_file(&backing, offset, pages << PAGE_LG2, Place::Auto, Perm::RW)?;
                areas.push((at, pages));
                add(&self.counts.maps, 1);
            } else if !areas.is_empty() {
                let (at, pages) = areas.swap_remove(random.usize(..areas.len()));
                let span = Span::from_len(at, pages << PAGE_LG2)?;
                let last = Iova::new(span.last().get() & !(PAGE_BYTES - 1));
                ioas.unmap(span)?;
                add(&self.counts.unmaps, 1);
                let gone = dma.read(at, &mut [0]).is_err() && dma.read(last, &mut [0]).is_err();
                self.expect(gone, self.region.start(), "an area of the second address space that was unmapped");
            }
            for _ in 0..8 {
                let Some(&(at, pages)) = areas.get(random.usize(..areas.len().max(1))) else { break };
                let mut seen = [0; 8];
                let read = dma.read(at.plus((random.u64(..pages) << PAGE_LG2) + 8), &mut seen);
                self.expect(read.is_err() || u64::from_le_bytes(seen) != SECRET, self.region.start(), "a private page at a second address");
                add(&self.checks.dma_checks, 1);
            }
            if random.u8(..64) == 0 {
                self.checks.take(Auditor::new(self.dma.space()).populated().audit(&ioas));
                add(&self.checks.audits, 1);
            }
            pace(&mut turns, 16);
        }
        Ok(())
    }

    /// Devices, trusted and not, are plugged in, read about, and are pulled out again; afterwards none of their DMA goes through.
    pub(crate) fn devices(&self, seed: u64) -> Result<(), crate::run::machine::Failure> {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut turns = 0;
        while !self.checks.stopped() {
            let trusted = random.bool();
            let device = self.dma.add_device("guest star", if trusted { trust(self.dma.space().asid()) } else { Trust::Untrusted })?;
            let mut dma = Dma::new(&device)?;
            for _ in 0..random.u8(1..32) {
                let page = self.region.start().plus(random.u64(..self.region.len() >> PAGE_LG2) << PAGE_LG2);
                let mut seen = [0; 8];
                let read = dma.read(Iova::new(page.get() + 8), &mut seen);
                let right = trusted || read.is_err() || u64::from_le_bytes(seen) != SECRET;
                self.expect(right, page, "what a device that was just plugged in reads");
                add(&self.checks.dma_checks, 1);
            }
            self.dma.remove_device(&device)?;
            let gone = dma.read(Iova::new(self.region.start().get()), &mut [0]).is_err();
            self.expect(gone, self.region.start(), "a device that was pulled out");
            add(&self.counts.devices, 1);
            pace(&mut turns, 4);
        }
        Ok(())
    }

    fn expect(&self, right: bool, at: Gpa, what: &str) {
        if !right && !self.checks.stopped() {
            self.checks.find_at(self.dma, Detector::DmaCheck, at, "I-4", &format!("{what} is not as it must be"));
        }
    }
}

fn trust(asid: u32) -> Trust {
    Trust::Trusted { asid, vmpl: secure::Vmpl::V0, tdisp: Tdisp::Run, sdte_valid: true, vtom: None }
}

/// Second guests of the same host, one of whose steps fails in every call. What the error says is so, a retry finishes, and the tables agree.
pub(crate) fn failures(checks: &Checks, counts: &Counts, frames: Frames, seed: u64) -> Result<(), crate::run::machine::Failure> {
    let mut random = fastrand::Rng::with_seed(seed);
    for guest in 0u64.. {
        if checks.stopped() {
            break;
        }
        let iommu = iommu::Config { table_bytes: 64 * MIB, ..iommu::Config::default() };
        let config = Config { policy: Policy::Mirror, asid: 2, iommu, ..Config::default() };
        let dma = Arc::new(GuestDma::new(&config, Arc::new(RecordedStage2::new()))?);
        // In turns: one file for all pages, or one for each side.
        let backing = if guest.is_multiple_of(2) { Backing::memfd(SLOT_BYTES, frames)? } else { pair(frames)? };
        dma.add_memory(Gpa::new(0), SLOT_BYTES, &backing, 0)?;
        let _devices = [dma.add_device("own", trust(2))?, dma.add_device("other", Trust::Untrusted)?];
        // Leaked pages are never used again, so after a while there is a new guest.
        let mut turns = 0;
        while !checks.stopped() && turns < CALLS_OF_A_GUEST {
            fail_once(&dma, checks, counts, &mut random);
            turns += 1;
            std::thread::sleep(std::time::Duration::from_micros(20));
        }
        // Nobody else has touched its files.
        if let Some(lost) = backing.recheck(backing.pages())?.lost.first() {
            checks.find_at(&dma, Detector::Audit, Gpa::new(lost.start().bytes()), "I-4", &format!("{lost} counts as lost"));
        }
        add(if guest.is_multiple_of(2) { &counts.guests } else { &counts.pair_guests }, 1);
    }
    Ok(())
}

/// Memory of two files. Nobody here can copy private bytes, so a trusted device is refused them.
fn pair(frames: Frames) -> Result<Arc<Backing>, crate::run::machine::Failure> {
    let file = || {
        let file = rustix::fs::memfd_create("lockstep-side", rustix::fs::MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&file, SLOT_BYTES)?;
        Ok::<_, std::io::Error>(file)
    };
    Ok(Backing::pair(file()?, file()?, SLOT_BYTES, None, frames)?)
}

fn fail_once(dma: &GuestDma, checks: &Checks, counts: &Counts, random: &mut fastrand::Rng) {
    let pages = SLOT_BYTES >> PAGE_LG2;
    let (first, count) =
        if random.u8(..4) == 0 { (random.u64(..pages / 512) * 512, 512) } else { (random.u64(..pages - 20), random.u64(1..20)) };
    let Ok(span) = Span::from_len(Gpa::new(first << PAGE_LG2), count << PAGE_LG2) else { return };
    let change = [Change { span, to: if random.bool() { Owner::Private } else { Owner::Shared } }];
    let plan = sync::fail::nth(random.u64(1..40));
    let result = dma.convert(&change);
    let fired = plan.fired();
    drop(plan);
    if let Err(error) = result {
        add(&counts.failures, 1);
        // A page that was leaked before is refused without a step that fails.
        if fired.is_none() && !matches!(error, ConvertError::Leaked { .. }) {
            checks.find_at(dma, Detector::Conversion, span.start(), "I-10", &format!("failed without a failed step: {error}"));
        }
        let mended = match error {
            ConvertError::Leaks { span, .. } => {
                add(&counts.leaks, span.len() >> PAGE_LG2);
                Ok(())
            }
            ConvertError::Leaked { .. } => Ok(()),
            ConvertError::NotMapped { span, .. } | ConvertError::NotDiscarded { span, .. } => dma.space().restore(span),
            _ => match dma.convert(&change) {
                Err(ConvertError::Leaked { .. }) => Ok(()),
                other => other.map(|_| ()),
            },
        };
        if let Err(error) = mended {
            checks.find_at(dma, Detector::Conversion, span.start(), "I-10", &format!("a retry failed: {error}"));
        }
        checks.take(dma.audit());
        add(&checks.audits, 1);
    }
    if random.u8(..8) == 0 {
        let page = Gpa::new(random.u64(..pages) << PAGE_LG2);
        // Whether the guest holds it is its affair; both answers are legal.
        let _ = dma.space().pvalidate(page, RmpSize::K4, true);
        let _ = dma.merge(Gpa::new(0), Page::new(pages).get());
    }
}
