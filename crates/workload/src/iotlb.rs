//! The IOTLB alone, and vm-memory's on the same lookups.
//!
//! Both get the same translations and the same addresses in the same order, and both answer a question in full: is this byte mapped, may it
//! be read, where is it. Frames are scattered, as a guest_memfd's are, because vm-memory keeps ranges and would join a run of pages into one.

use crate::beside::Beside;
use crate::{Error, Work, choices, timed};
use addr::{Address, Iova, Lg2};
use iommu::{Iotlb, IotlbStats};
use pt::Perm;
use std::hint::black_box;
use std::time::Duration;
use vm_memory::{GuestAddress, Permissions};

const K4: u64 = 4 << 10;
/// Lookups before the sequence repeats; a power of two.
pub(crate) const SEQUENCE: usize = 1 << 14;

/// Lookups in a set of `pages`, in an order that nobody can guess.
pub(crate) fn sequence(pages: u64) -> Vec<Iova> {
    choices(SEQUENCE, pages).into_iter().map(|page| Iova::new(page * K4 + page % 4096)).collect()
}

/// Where a page is: no two neighbours lie in a row. Any odd factor permutes the numbers below a power of two.
fn frame(page: u64) -> u64 {
    (1 << 40) | ((page.wrapping_mul(0x9e37_79b1) & 0xf_ffff) * K4)
}

/// The row: ours, with vm-memory's beside it.
pub(crate) fn hits(pages: u64) -> Result<Box<dyn Work>, Error> {
    let (mut ours, theirs) = (Ours::new(pages), Theirs::new(pages)?);
    for &at in &ours.sequence.clone() {
        let (own, other) = (ours.answer(at), theirs.answer(at));
        if own.is_none() || own != other {
            return Err(format!("{at} is {own:x?} to us and {other:x?} to vm-memory").into());
        }
    }
    ours.before = ours.iotlb.stats();
    Ok(Box::new(Beside::new(ours, theirs, "vm-memory", |ratio| format!("{ratio:.1} times as fast"))))
}

/// The row of vm-memory alone.
pub(crate) fn vm_memory(pages: u64) -> Result<Box<dyn Work>, Error> {
    Ok(Box::new(Theirs::new(pages)?))
}

struct Ours {
    iotlb: Iotlb<[u64; 3]>,
    sequence: Vec<Iova>,
    before: IotlbStats,
}

impl Ours {
    fn new(pages: u64) -> Self {
        let mut iotlb = Iotlb::new(1 << 15);
        for page in 0..pages {
            iotlb.fill(Iova::new(page * K4), Lg2::K4, Perm::RW, [frame(page), page, page]);
        }
        Self { before: iotlb.stats(), iotlb, sequence: sequence(pages) }
    }

    #[inline(always)]
    fn answer(&mut self, at: Iova) -> Option<u64> {
        let hit = self.iotlb.lookup(at).filter(|hit| hit.perm.allows(Perm::READ))?;
        Some(hit.value[0] + at.offset_from(hit.start))
    }
}

impl Work for Ours {
    fn run(&mut self, times: u64) -> Duration {
        timed(|| {
            for index in 0..times as usize {
                let at = self.sequence[index % SEQUENCE];
                black_box(self.answer(at));
            }
        })
    }

    fn note(&self) -> Option<String> {
        Some(hit_rate(self.before, self.iotlb.stats()))
    }
}

pub(crate) fn hit_rate(before: IotlbStats, now: IotlbStats) -> String {
    rate(now.hits - before.hits, now.misses - before.misses)
}

fn rate(hits: u64, misses: u64) -> String {
    format!("{:.2} % hits", 100.0 * hits as f64 / (hits + misses).max(1) as f64)
}

struct Theirs {
    iotlb: vm_memory::Iotlb,
    sequence: Vec<Iova>,
    hits: u64,
    misses: u64,
}

impl Theirs {
    fn new(pages: u64) -> Result<Self, Error> {
        let mut iotlb = vm_memory::Iotlb::new();
        for page in 0..pages {
            iotlb.set_mapping(GuestAddress(page * K4), GuestAddress(frame(page)), K4 as usize, Permissions::ReadWrite)?;
        }
        let whole = vm_memory::Iotlb::lookup(&iotlb, GuestAddress(0), (pages * K4) as usize, Permissions::Read);
        let ranges = whole.map_or(0, Iterator::count) as u64;
        if ranges != pages {
            return Err(format!("vm-memory keeps {ranges} ranges of {pages} pages").into());
        }
        Ok(Self { iotlb, sequence: sequence(pages), hits: 0, misses: 0 })
    }

    #[inline(always)]
    fn answer(&self, at: Iova) -> Option<u64> {
        let mut found = vm_memory::Iotlb::lookup(&self.iotlb, GuestAddress(at.get()), 1, Permissions::Read).ok()?;
        found.next().map(|range| range.base.0)
    }
}

impl Work for Theirs {
    fn run(&mut self, times: u64) -> Duration {
        let mut hits = 0;
        let took = timed(|| {
            for index in 0..times as usize {
                hits += u64::from(black_box(self.answer(self.sequence[index % SEQUENCE])).is_some());
            }
        });
        (self.hits, self.misses) = (self.hits + hits, self.misses + times - hits);
        took
    }

    fn note(&self) -> Option<String> {
        Some(format!("vm-memory {}", rate(self.hits, self.misses)))
    }
}
