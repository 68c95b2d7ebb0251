//! Edits as a domain makes them: the entries, then invalidation and the grace period, with nobody else there, with a device that stands by
//! and with one that translates all the time.

use super::{AT, Calls, K4, SMALL};
use crate::tree::{OA, span};
use crate::{Error, Work, batches, in_format};
use addr::{Iova, Oa, SizeSet};
use iommu::{Config, Domain, Iommu, SystemRmp};
use pt::{FormatKind, Gather, Perm, Stock};
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// The page that the reader translates.
const SEEN: u64 = AT - K4;

/// The device beside the edits.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Reader {
    /// There is none.
    None,
    /// It has a context, and does nothing.
    Idle,
    /// It translates all the time, on another thread.
    Busy,
}

/// A domain, and its reader.
pub(super) struct Flushing {
    domain: Arc<Domain>,
    stock: Stock<backing::Words>,
    calls: Calls,
    /// What is measured; the other one undoes it, off the clock.
    maps: bool,
    reader: Option<Thread>,
}

/// It stops when this is dropped.
struct Thread {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Flushing {
    pub(super) fn map(format: FormatKind, calls: Calls, reader: Reader) -> Result<Box<dyn Work>, Error> {
        Ok(Box::new(Self { maps: true, ..Self::new(format, calls, reader)? }))
    }

    pub(super) fn unmap(format: FormatKind, calls: Calls, reader: Reader) -> Result<Box<dyn Work>, Error> {
        Ok(Box::new(Self::new(format, calls, reader)?))
    }

    fn new(format: FormatKind, calls: Calls, reader: Reader) -> Result<Self, Error> {
        let iommu = Iommu::new(&Config { table_bytes: 16 << 20, domain: in_format(format), ..Config::default() }, SystemRmp::new().into())?;
        let domain = iommu.domain()?;
        let mut work = Self { stock: Stock::new(iommu.arena()), domain, calls, maps: false, reader: None };
        work.map_one(SEEN, K4, SMALL);
        if reader != Reader::None {
            let device = iommu.device("reader");
            device.attach(&work.domain)?;
            let mut dma = iommu::Dma::new(&device)?;
            dma.translate(Iova::new(SEEN), iommu::Access::Read)?;
            let stop = Arc::new(AtomicBool::new(false));
            let stopped = Arc::clone(&stop);
            let read = move || {
                while reader == Reader::Busy && !stopped.load(Ordering::Relaxed) {
                    black_box(dma.translate(Iova::new(SEEN), iommu::Access::Read).is_ok());
                }
                while !stopped.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(1));
                }
            };
            work.reader = Some(Thread { stop, thread: Some(std::thread::Builder::new().name("reader".into()).spawn(read)?) });
        }
        Ok(work)
    }

    fn map_one(&mut self, at: u64, len: u64, sizes: SizeSet) {
        let mut gather = Gather::new();
        let oa = Oa::new(OA + at);
        let done = self.domain.table().map(span(at, len), oa, Perm::RW, sizes, &mut self.stock, &mut gather);
        assert!(done.is_ok(), "{done:?}");
        self.domain.flush(gather);
    }

    fn map_all(&mut self, count: u64) {
        let Calls { len, sizes, .. } = self.calls;
        (0..count).for_each(|index| self.map_one(black_box(AT + index * len), len, sizes));
    }

    fn unmap_all(&mut self, count: u64) {
        for index in 0..count {
            let mut gather = Gather::new();
            let _none_crosses = self.domain.table().unmap(span(black_box(AT + index * self.calls.len), self.calls.len), &mut gather);
            self.domain.flush(gather);
        }
    }
}

impl Work for Flushing {
    fn run(&mut self, times: u64) -> Duration {
        let most = self.calls.batch;
        if self.maps {
            batches(self, times, most, |_, _| {}, Self::map_all, Self::unmap_all)
        } else {
            batches(self, times, most, Self::map_all, Self::unmap_all, |_, _| {})
        }
    }

    fn note(&self) -> Option<String> {
        let stats = self.domain.flush_stats();
        self.reader.is_some().then(|| format!("{} grace periods", stats.graces))
    }
}
