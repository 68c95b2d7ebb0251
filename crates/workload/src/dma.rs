//! A device's side: translations that hit and miss the IOTLB, and copies beside a plain memcpy of the same bytes.
//!
//! `iotlb` rows look into the cache alone; `translate` rows are whole descriptors: guard, log, cache, secure check.

use crate::{Error, Row, Unit, Work, choices, in_format, timed};
use addr::{Gpa, Iova, Lg2};
use backing::{Backing, Frames};
use iommu::{Access, Iotlb, IotlbStats};
use lockstep::{Config, Dma, GuestDma, RecordedStage2, Trust};
use pt::{FormatKind, Perm};
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

const K4: u64 = 4 << 10;
/// The hot set that does not fit any first-level cache of a processor.
const MANY: u64 = 10_000;
const FEW: u64 = 64;
/// Lookups before the sequence repeats; a power of two.
const SEQUENCE: usize = 1 << 14;
/// Where copies go, in turn.
const TARGET_BYTES: u64 = 1 << 20;

macro_rules! row {
    ($name:literal, $format:literal, $make:expr) => {
        Row { name: $name, format: $format, unit: Unit::Call, kind: FormatKind::AmdV1, make: $make }
    };
}

/// Its rows.
pub fn rows() -> Vec<Row> {
    vec![
        row!("iotlb_hit_64", "-", |_| Ok(Box::new(Cache::new(FEW)))),
        row!("iotlb_hit_10000", "-", |_| Ok(Box::new(Cache::new(MANY)))),
        row!("translate_hit_64", "amdv1", |format| Translate::work(format, FEW, 1 << 14)),
        row!("translate_hit_10000", "amdv1", |format| Translate::work(format, MANY, 1 << 15)),
        row!("translate_miss", "amdv1", |format| Translate::work(format, MANY, 16)),
        row!("dma_write_64", "amdv1", |format| dma_write(format, 64)),
        row!("memcpy_64", "-", |_| memcpy(64)),
        row!("dma_write_4k", "amdv1", |format| dma_write(format, K4)),
        row!("memcpy_4k", "-", |_| memcpy(K4)),
        row!("dma_write_64k", "amdv1", |format| dma_write(format, 64 << 10)),
        row!("memcpy_64k", "-", |_| memcpy(64 << 10)),
    ]
}

/// The IOTLB alone.
struct Cache {
    iotlb: Iotlb<[u64; 3]>,
    sequence: Vec<Iova>,
    before: IotlbStats,
}

impl Cache {
    fn new(pages: u64) -> Self {
        let mut iotlb = Iotlb::new(1 << 15);
        for page in 0..pages {
            iotlb.fill(Iova::new(page * K4), Lg2::K4, Perm::RW, [page; 3]);
        }
        let sequence = choices(SEQUENCE, pages).into_iter().map(|page| Iova::new(page * K4 + page % 4096)).collect();
        Self { before: iotlb.stats(), iotlb, sequence }
    }
}

impl Work for Cache {
    fn run(&mut self, times: u64) -> Duration {
        timed(|| {
            for index in 0..times as usize {
                let at = self.sequence[index % SEQUENCE];
                black_box(self.iotlb.lookup(at).map(|hit| hit.value[0]));
            }
        })
    }

    fn note(&self) -> Option<String> {
        Some(hit_rate(self.before, self.iotlb.stats()))
    }
}

fn hit_rate(before: IotlbStats, now: IotlbStats) -> String {
    let (hits, misses) = (now.hits - before.hits, now.misses - before.misses);
    format!("{:.2} % hits", 100.0 * hits as f64 / (hits + misses).max(1) as f64)
}

/// A guest with one device that it does not trust, and `memory` mapped for it from 0 on.
fn machine(format: FormatKind, memory: &Arc<Backing>, iotlb_entries: usize) -> Result<(GuestDma, Dma), Error> {
    let iommu = iommu::Config { table_bytes: 64 << 20, iotlb_entries, domain: in_format(format), ..iommu::Config::default() };
    let guest = GuestDma::new(&Config { iommu, ..Config::default() }, Arc::new(RecordedStage2::new()))?;
    guest.add_memory(Gpa::new(0), memory.len_bytes(), memory, 0)?;
    let device = guest.add_device("bench", Trust::Untrusted)?;
    let dma = Dma::new(&device)?;
    Ok((guest, dma))
}

/// Whole descriptors that only translate.
struct Translate {
    dma: Dma,
    /// Its address space unmaps everything when it goes.
    _guest: GuestDma,
    sequence: Vec<Iova>,
    before: IotlbStats,
}

impl Translate {
    fn work(format: FormatKind, pages: u64, iotlb_entries: usize) -> Result<Box<dyn Work>, Error> {
        // In no order, so that every page has a leaf of its own.
        let memory = Backing::memfd(64 << 20, Frames::Scattered { seed: 1 })?;
        let (guest, mut dma) = machine(format, &memory, iotlb_entries)?;
        for page in 0..pages {
            dma.translate(Iova::new(page * K4), Access::Read)?;
        }
        let sequence = choices(SEQUENCE, pages).into_iter().map(|page| Iova::new(page * K4 + page % 4096)).collect();
        Ok(Box::new(Self { before: dma.stats().iotlb, dma, _guest: guest, sequence }))
    }
}

impl Work for Translate {
    fn run(&mut self, times: u64) -> Duration {
        timed(|| {
            for index in 0..times as usize {
                let at = self.sequence[index % SEQUENCE];
                black_box(self.dma.translate(at, Access::Read).map(|translation| translation.oa)).ok();
            }
        })
    }

    fn note(&self) -> Option<String> {
        Some(hit_rate(self.before, self.dma.stats().iotlb))
    }
}

/// Memory that was written and begins on a page, as the guest's does: copies depend on how the two sides are aligned to each other.
struct Buffer {
    memory: Vec<u8>,
    first: usize,
}

impl Buffer {
    fn new() -> Self {
        let memory = vec![0x5a; (TARGET_BYTES + K4) as usize];
        Self { first: memory.as_ptr().align_offset(K4 as usize).min(K4 as usize), memory }
    }

    fn bytes(&self) -> &[u8] {
        &self.memory[self.first..][..TARGET_BYTES as usize]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.first..][..TARGET_BYTES as usize]
    }
}

fn dma_write(format: FormatKind, len: u64) -> Result<Box<dyn Work>, Error> {
    let memory = Backing::memfd(2 << 20, Frames::Contiguous)?;
    let (guest, mut dma) = machine(format, &memory, 1 << 14)?;
    let source = Buffer::new();
    dma.write(Iova::new(0), source.bytes())?;
    Ok(Box::new(move |times| {
        // It keeps the memory mapped.
        let _guest = &guest;
        timed(|| {
            let mut at = 0;
            for _ in 0..times {
                let done = dma.write(Iova::new(black_box(at)), black_box(&source.bytes()[..len as usize]));
                assert!(done.is_ok(), "{done:?}");
                at = (at + len) % TARGET_BYTES;
            }
        })
    }))
}

fn memcpy(len: u64) -> Result<Box<dyn Work>, Error> {
    let source = Buffer::new();
    let mut target = Buffer::new();
    Ok(Box::new(move |times| {
        timed(|| {
            let mut at = 0;
            for _ in 0..times {
                let at_now = black_box(at) as usize;
                let to = &mut target.bytes_mut()[at_now..at_now + len as usize];
                to.copy_from_slice(black_box(&source.bytes()[..len as usize]));
                black_box(to);
                at = (at + len) % TARGET_BYTES;
            }
        })
    }))
}
