//! How long translations take one reader, as a distribution, without and with a writer beside it.
//!
//! The clock is looked at before and after a few translations, since a look costs more than a translation; it counts in full, and what it costs
//! is among the figures. A percentile is that of such groups, per translation: one slow translation in a group counts as a part.

use super::processors::{Apart, Processor};
use crate::tree::{OA, span};
use crate::{Error, Further, Work, choices, in_format};
use addr::{Iova, Lg2, Oa, SizeSet};
use backing::{Backing, Frames, Words};
use iommu::{Access, Config, Dma, Domain, Iommu, SystemRmp};
use pt::{FormatKind, Gather, Perm, Stock};
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use sync::Slot;

const K4: u64 = 4 << 10;
const M2: u64 = 2 << 20;
const G1: u64 = 1 << 30;
/// Within the 38 bits of the narrowest format, 1 GiB aligned.
const AT: u64 = 1 << 36;
/// Pages that the reader translates: their tables stay in the processor's own cache.
const PAGES: u64 = 4096;
const GROUP: u64 = 4;
const EDITS_OF_A_ROUND: u64 = 9;
const PACE: Duration = Duration::from_micros(100);
const SEQUENCE: usize = 1 << 14;

/// What the reader does.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Reads {
    /// Walks of the page table, each in a guard of its own.
    Walks,
    /// Whole descriptors that only translate: guard, log, IOTLB, secure check.
    Translations,
}

/// What the writer edits.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Where {
    /// There is no writer.
    Nowhere,
    /// Other spans of the same page table.
    Elsewhere,
    /// The same, with pauses.
    ElsewherePaced,
    /// Those, and it cuts and joins the leaf that the reader translates through.
    SameLeaf,
}

pub(super) struct Beside {
    reader: Reader,
    writer: Option<(Writer, Apart)>,
    times: u64,
    alone: Histogram,
    beside: Histogram,
    /// What the writer did meanwhile, and how long that was.
    edits: u64,
    edited_for: Duration,
}

impl Beside {
    pub(super) fn work(format: FormatKind, reads: Reads, edits: Where) -> Result<Box<dyn Work>, Error> {
        let iommu = Iommu::new(&Config { domain: in_format(format), table_bytes: 64 << 20, ..Config::default() }, SystemRmp::new().into())?;
        let domain = iommu.domain()?;
        let memory = Backing::simulated(G1, Frames::Contiguous)?;
        let mut hand = Hand { domain: Arc::clone(&domain), stock: Stock::new(iommu.arena()) };
        // What is read: one large leaf where it is cut and joined under the reader, page by page otherwise.
        let sizes = if edits == Where::SameLeaf { SizeSet::ALL } else { SizeSet::only(Lg2::K4) };
        let len = if edits == Where::SameLeaf { G1 } else { PAGES * K4 };
        hand.map(AT, len, memory.window().start().get(), sizes);
        hand.map(AT + G1, G1, OA, SizeSet::ALL);
        hand.map(AT + 2 * G1, K4, OA, SizeSet::only(Lg2::K4));
        let reader = match reads {
            Reads::Walks => Reader::Walks(iommu.readers().slot(), Arc::clone(&domain)),
            Reads::Translations => {
                let device = iommu.device("reader");
                device.attach(&domain)?;
                Reader::Translations(Box::new(Dma::new(&device)?))
            }
        };
        let writer = match edits {
            Where::Nowhere => None,
            _ => {
                let (apart, processor) = Apart::new()?;
                Some((Writer::new(move || hand.edit(edits), processor)?, apart))
            }
        };
        let [alone, beside] = [0; 2].map(|_| Histogram::new());
        Ok(Box::new(Self { reader, writer, times: 0, alone, beside, edits: 0, edited_for: Duration::ZERO }))
    }
}

impl Work for Beside {
    /// The reader's time; with a writer, that beside it.
    fn run(&mut self, times: u64) -> Duration {
        if self.times != times {
            self.times = times;
            self.alone.clear();
            self.beside.clear();
            (self.edits, self.edited_for) = (0, Duration::ZERO);
        }
        let alone = self.reader.run(times, &mut self.alone);
        let Some((writer, _)) = &self.writer else { return alone };
        writer.turn(EDITS);
        let before = writer.turns.rounds.load(Ordering::Relaxed);
        let (beside, whole) = {
            let start = Instant::now();
            (self.reader.run(times, &mut self.beside), start.elapsed())
        };
        self.edits += EDITS_OF_A_ROUND * (writer.turns.rounds.load(Ordering::Relaxed) - before);
        self.edited_for += whole;
        writer.turn(RESTS);
        beside
    }

    fn figures(&self) -> Vec<Further> {
        let measured = if self.writer.is_some() { &self.beside } else { &self.alone };
        let mut figures = vec![
            Further::new("p50_ns", measured.percentile(50.0)),
            Further::new("p99_ns", measured.percentile(99.0)),
            Further::new("p99.9_ns", measured.percentile(99.9)),
        ];
        if self.writer.is_some() {
            figures.push(Further::new("p50_alone_ns", self.alone.percentile(50.0)));
            figures.push(Further::new("p99_alone_ns", self.alone.percentile(99.0)));
            figures.push(Further::new("p99.9_alone_ns", self.alone.percentile(99.9)));
            figures.push(Further::new("p99_ratio", measured.percentile(99.0) / self.alone.percentile(99.0)));
            figures.push(Further::new("edit_ns", self.edited_for.as_nanos() as f64 / self.edits as f64));
        }
        figures.push(Further::new("clock_ns", clock_ns() / GROUP as f64));
        figures
    }
}

/// What two looks at the clock with nothing in between say, at the median.
fn clock_ns() -> f64 {
    let mut looks = Histogram::new();
    for _ in 0..10_000 {
        let start = Instant::now();
        looks.add(start.elapsed());
    }
    looks.percentile(50.0) * GROUP as f64
}

enum Reader {
    Walks(Slot, Arc<Domain>),
    Translations(Box<Dma>),
}

impl Reader {
    fn run(&mut self, times: u64, histogram: &mut Histogram) -> Duration {
        let pages = choices(SEQUENCE, PAGES);
        let mut next = pages.iter().cycle().map(|page| Iova::new(AT + page * K4 + page % K4));
        match self {
            Self::Walks(slot, domain) => {
                let id = domain.id();
                groups(times, histogram, || {
                    let at = next.next();
                    let _guard = slot.guard(id);
                    black_box(at.and_then(|at| domain.table().walk(at)));
                })
            }
            Self::Translations(dma) => groups(times, histogram, || {
                let at = next.next();
                black_box(at.and_then(|at| dma.translate(at, Access::Read).ok()).map(|translation| translation.oa));
            }),
        }
    }
}

#[inline(always)]
fn groups(times: u64, histogram: &mut Histogram, mut translate: impl FnMut()) -> Duration {
    let mut took = Duration::ZERO;
    for _ in 0..times.div_ceil(GROUP) {
        let start = Instant::now();
        for _ in 0..GROUP {
            translate();
        }
        let group = start.elapsed();
        histogram.add(group);
        took += group;
    }
    took.mul_f64(times as f64 / (times.div_ceil(GROUP) * GROUP) as f64)
}

/// Groups by their time in nanoseconds. What is longer than the last count is counted there.
struct Histogram {
    counts: Vec<u64>,
    all: u64,
}

impl Histogram {
    const LONGEST_NS: usize = 1 << 16;

    fn new() -> Self {
        Self { counts: vec![0; Self::LONGEST_NS], all: 0 }
    }

    fn clear(&mut self) {
        self.counts.fill(0);
        self.all = 0;
    }

    #[inline(always)]
    fn add(&mut self, group: Duration) {
        self.counts[(group.as_nanos() as usize).min(Self::LONGEST_NS - 1)] += 1;
        self.all += 1;
    }

    /// Per translation. Not a number while there is none.
    fn percentile(&self, percent: f64) -> f64 {
        let rank = (self.all as f64 * percent / 100.0).ceil() as u64;
        let mut below = 0;
        let at = self.counts.iter().position(|count| {
            below += count;
            below >= rank.max(1)
        });
        at.map_or(f64::NAN, |ns| ns as f64 / GROUP as f64)
    }
}

/// A writer's means.
struct Hand {
    domain: Arc<Domain>,
    stock: Stock<Words>,
}

impl Hand {
    fn map(&mut self, at: u64, len: u64, oa: u64, sizes: SizeSet) {
        let mut gather = Gather::new();
        let done = self.domain.table().map(span(at, len), Oa::new(oa), Perm::RW, sizes, &mut self.stock, &mut gather);
        self.domain.flush(gather);
        assert!(done.is_ok(), "{done:?}");
    }

    fn unmap(&mut self, at: u64, len: u64) {
        let mut gather = Gather::new();
        let _none_crosses = self.domain.table().unmap(span(at, len), &mut gather);
        self.domain.flush(gather);
    }

    fn cut(&mut self, at: u64) {
        let done = self.domain.cut(span(at, K4), SizeSet::ALL, &mut self.stock);
        assert!(done.is_ok(), "{done:?}");
    }

    fn merge(&mut self, at: u64) {
        let mut gather = Gather::new();
        self.domain.merge(span(at, G1), SizeSet::ALL, &mut gather);
        self.domain.flush(gather);
    }

    /// [`EDITS_OF_A_ROUND`] edits, of every kind.
    fn edit(&mut self, edits: Where) {
        let start = Instant::now();
        let cut = if edits == Where::SameLeaf { AT } else { AT + G1 };
        self.cut(cut + 7 * K4);
        self.cut(cut + 3 * M2 + 9 * K4);
        let page = AT + 2 * G1 + 5 * K4;
        self.map(page, K4, OA, SizeSet::only(Lg2::K4));
        self.unmap(page, K4);
        // Whole tables come and go.
        self.map(AT + 2 * G1 + 8 * M2, M2, OA, SizeSet::only(Lg2::K4));
        self.unmap(AT + 2 * G1 + 8 * M2, M2);
        self.map(AT + 2 * G1 + 8 * M2, M2, OA, SizeSet::ALL);
        self.unmap(AT + 2 * G1 + 8 * M2, M2);
        self.merge(cut);
        while edits == Where::ElsewherePaced && start.elapsed() < PACE {
            std::hint::spin_loop();
        }
    }
}

const RESTS: u8 = 0;
const EDITS: u8 = 1;
const ENDS: u8 = 2;

/// A thread that edits in its turns, and otherwise sleeps. It ends when this is dropped.
struct Writer {
    turns: Arc<Turns>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Turns {
    wanted: AtomicU8,
    now: AtomicU8,
    rounds: AtomicU64,
}

impl Writer {
    fn new(mut edit: impl FnMut() + Send + 'static, processor: Processor) -> Result<Self, Error> {
        let turns = Arc::new(Turns::default());
        let own = Arc::clone(&turns);
        let work = move || {
            let placed = processor.stay();
            assert!(placed.is_ok(), "{placed:?}");
            loop {
                let wanted = own.wanted.load(Ordering::Acquire);
                match wanted {
                    EDITS => {
                        edit();
                        own.rounds.fetch_add(1, Ordering::Relaxed);
                    }
                    ENDS => break,
                    _ => {}
                }
                own.now.store(wanted, Ordering::Release);
                if wanted == RESTS {
                    std::thread::park();
                }
            }
        };
        Ok(Self { turns, thread: Some(std::thread::Builder::new().name("writer".into()).spawn(work)?) })
    }

    /// Comes back when the writer is at it, or at rest.
    fn turn(&self, to: u8) {
        self.turns.wanted.store(to, Ordering::Release);
        self.thread.iter().for_each(|thread| thread.thread().unpark());
        while self.turns.now.load(Ordering::Acquire) != to && self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            std::thread::yield_now();
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.turns.wanted.store(ENDS, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // What it panicked about is on stderr already.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_known_times() {
        let mut histogram = Histogram::new();
        assert!(histogram.percentile(50.0).is_nan());
        (1..=1000).for_each(|ns| histogram.add(Duration::from_nanos(ns * GROUP)));
        for (percent, ns) in [(50.0, 500.0), (99.0, 990.0), (99.9, 999.0), (100.0, 1000.0)] {
            assert_eq!(histogram.percentile(percent), ns);
        }
        histogram.add(Duration::from_secs(1));
        assert_eq!(histogram.percentile(100.0), (Histogram::LONGEST_NS - 1) as f64 / GROUP as f64);
    }
}
