//! A device's side: translations that hit and miss the IOTLB, and copies beside a plain memcpy of the same bytes.
//!
//! `iotlb` rows look into the cache alone; `translate` rows are whole descriptors: guard, log, cache, secure check.

use crate::beside::{Beside, InTurn};
use crate::iotlb::{self, SEQUENCE, hit_rate, sequence};
use crate::{Error, Row, Unit, Work, in_format, timed};
use addr::{Gpa, Iova};
use backing::{Backing, Frames};
use iommu::{Access, Descriptor, IotlbStats, OnFault};
use lockstep::{Config, Dma, GuestDma, RecordedStage2, Trust};
use pt::FormatKind;
use std::fs::File;
use std::hint::black_box;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

const K4: u64 = 4 << 10;
/// The hot set that does not fit any first-level cache of a processor.
const MANY: u64 = 10_000;
const FEW: u64 = 64;
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
        row!("iotlb_hit_64", "-", |_| iotlb::hits(FEW)),
        row!("iotlb_hit_10000", "-", |_| iotlb::hits(MANY)),
        row!("vm_memory_hit_64", "-", |_| iotlb::vm_memory(FEW)),
        row!("vm_memory_hit_10000", "-", |_| iotlb::vm_memory(MANY)),
        row!("translate_hit_64", "amdv1", |format| Translate::work(format, FEW, 1 << 14, 0)),
        row!("translate_hit_10000", "amdv1", |format| Translate::work(format, MANY, 1 << 15, 0)),
        row!("translate_miss", "amdv1", |format| Translate::work(format, MANY, 16, 0)),
        row!("translate_miss_walk_cache", "amdv1", |format| Translate::work(format, MANY, 16, 64)),
        row!("dma_write_64", "amdv1", |format| dma_write(format, 64)),
        row!("dma_write_4k", "amdv1", |format| dma_write(format, K4)),
        row!("dma_write_16k", "amdv1", |format| dma_write(format, 16 << 10)),
        row!("dma_write_64k", "amdv1", |format| dma_write(format, 64 << 10)),
        row!("dma_write_1m", "amdv1", |format| dma_write(format, 1 << 20)),
        row!("dma_queue_64", "amdv1", |format| dma_queue(format, 64)),
        row!("dma_queue_4k", "amdv1", |format| dma_queue(format, K4)),
        row!("dma_queue_16k", "amdv1", |format| dma_queue(format, 16 << 10)),
        row!("dma_queue_64k", "amdv1", |format| dma_queue(format, 64 << 10)),
        row!("memcpy_64", "-", |_| memcpy(64)),
        row!("memcpy_4k", "-", |_| memcpy(K4)),
        row!("memcpy_16k", "-", |_| memcpy(16 << 10)),
        row!("memcpy_64k", "-", |_| memcpy(64 << 10)),
        row!("memcpy_1m", "-", |_| memcpy(1 << 20)),
    ]
}

/// A guest with one device that it does not trust, and `memory` mapped for it from 0 on.
fn machine(format: FormatKind, memory: &Arc<Backing>, iotlb_entries: usize, walk_cache_entries: usize) -> Result<(GuestDma, Dma), Error> {
    let domain = in_format(format);
    let iommu = iommu::Config { table_bytes: 64 << 20, iotlb_entries, walk_cache_entries, domain, ..iommu::Config::default() };
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
    fn work(format: FormatKind, pages: u64, iotlb_entries: usize, walk_cache_entries: usize) -> Result<Box<dyn Work>, Error> {
        // In no order, so that every page has a leaf of its own.
        let memory = Backing::memfd(64 << 20, Frames::Scattered { seed: 1 })?;
        let (guest, mut dma) = machine(format, &memory, iotlb_entries, walk_cache_entries)?;
        for page in 0..pages {
            dma.translate(Iova::new(page * K4), Access::Read)?;
        }
        Ok(Box::new(Self { before: dma.stats().iotlb, dma, _guest: guest, sequence: sequence(pages) }))
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
}

/// What copies go through: a device whose memory is one leaf, and the buffer on its own side.
struct Copies {
    dma: Dma,
    /// It keeps the memory mapped.
    _guest: GuestDma,
    buffer: Rc<Buffer>,
    len: usize,
}

impl Copies {
    /// With the memcpy of the same bytes to the same pages.
    fn new(format: FormatKind, len: u64) -> Result<(Self, Memcpy), Error> {
        let memory = Backing::memfd(2 << 20, Frames::Contiguous)?;
        let (guest, mut dma) = machine(format, &memory, 1 << 14, 0)?;
        let (buffer, len) = (Rc::new(Buffer::new()), len as usize);
        dma.write(Iova::new(0), buffer.bytes())?;
        let memcpy = Memcpy::new(&memory, &buffer, len)?;
        Ok((Self { dma, _guest: guest, buffer, len }, memcpy))
    }
}

/// One call for each descriptor.
struct Write(Copies);

impl Work for Write {
    fn run(&mut self, times: u64) -> Duration {
        let Copies { dma, buffer, len, .. } = &mut self.0;
        timed(|| {
            let mut at = 0;
            for _ in 0..times {
                let done = dma.write(Iova::new(black_box(at)), black_box(&buffer.bytes()[..*len]));
                assert!(done.is_ok(), "{done:?}");
                at = (at + *len as u64) % TARGET_BYTES;
            }
        })
    }
}

/// Descriptors of a queue that is run as a whole.
struct Queue(Copies);

impl Work for Queue {
    fn run(&mut self, times: u64) -> Duration {
        let Copies { dma, buffer, len, .. } = &mut self.0;
        let (bytes, len) = (&buffer.bytes()[..*len], *len as u64);
        let mut ring: Vec<_> = (0..TARGET_BYTES / len).map(|at| Descriptor::write(Iova::new(at * len), bytes)).collect();
        timed(|| {
            let mut left = times as usize;
            while left > 0 {
                let now = left.min(ring.len());
                let run = dma.run(black_box(&mut ring[..now]), OnFault::Stop);
                assert!(run == now && ring[now - 1].result() == Some(&Ok(())), "{:?}", ring[run - 1]);
                left -= now;
            }
        })
    }
}

fn dma_write(format: FormatKind, len: u64) -> Result<Box<dyn Work>, Error> {
    beside_memcpy(format, len, Write)
}

fn dma_queue(format: FormatKind, len: u64) -> Result<Box<dyn Work>, Error> {
    beside_memcpy(format, len, Queue)
}

/// What a copy costs depends on where its pages happen to lie, for memcpy more than for us: the rows go through this many places in turn.
const PLACES: usize = 8;

fn beside_memcpy<W: Work + 'static>(format: FormatKind, len: u64, ours: fn(Copies) -> W) -> Result<Box<dyn Work>, Error> {
    let places = (0..PLACES).map(|_| Copies::new(format, len)).collect::<Result<Vec<_>, _>>()?;
    let (copies, memcpys): (Vec<_>, Vec<_>) = places.into_iter().unzip();
    let ours = InTurn::new(copies.into_iter().map(ours));
    Ok(Box::new(Beside::new(ours, InTurn::new(memcpys), "memcpy", |ratio| format!("{:.1} % of its speed", 100.0 * ratio))))
}

/// The same bytes without a device: from the same buffer to the same pages of the file, seen through a mapping of vm-memory's, whose copies of more
/// than a word are the C library's memcpy.
struct Memcpy {
    region: MmapRegion,
    buffer: Rc<Buffer>,
    len: usize,
}

impl Memcpy {
    fn new(memory: &Backing, buffer: &Rc<Buffer>, len: usize) -> Result<Self, Error> {
        let file = File::from(memory.file().ok_or("a memfd has a file")?.try_clone_to_owned()?);
        let region = MmapRegion::from_file(FileOffset::new(file, memory.file_offset()), TARGET_BYTES as usize)?;
        region.as_volatile_slice().copy_from(buffer.bytes());
        Ok(Self { region, buffer: Rc::clone(buffer), len })
    }
}

impl Work for Memcpy {
    fn run(&mut self, times: u64) -> Duration {
        let (all, source) = (self.region.as_volatile_slice(), &self.buffer.bytes()[..self.len]);
        let targets: Vec<_> = (0..TARGET_BYTES as usize / self.len).map_while(|at| all.subslice(at * self.len, self.len).ok()).collect();
        timed(|| {
            let mut at = 0;
            for _ in 0..times {
                targets[black_box(at)].copy_from(black_box(source));
                at = if at + 1 == targets.len() { 0 } else { at + 1 };
            }
        })
    }
}

fn memcpy(len: u64) -> Result<Box<dyn Work>, Error> {
    let place = |_| Memcpy::new(&*Backing::memfd(2 << 20, Frames::Contiguous)?, &Rc::new(Buffer::new()), len as usize);
    Ok(Box::new(InTurn::new((0..PLACES).map(place).collect::<Result<Vec<_>, Error>>()?)))
}
