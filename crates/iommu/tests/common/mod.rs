//! A small machine: an IOMMU, a device, a domain, memory, and the RMP over it.
#![allow(dead_code, unused_imports, reason = "each test uses its part")]

use addr::{Address, Gpa, Iova, Lg2, Oa, SizeSet, Span};
use backing::{Backing, Frames, Words};
use lockstep_iommu_device::{Config, Device, Dma, Domain, Iommu, SystemRmp};
use pt::{Gather, Perm, Stock};
use secure::{Pvalidate, RmpSize, RmpState, Vmpl};
use std::sync::Arc;

pub(crate) const ASID: u32 = 7;
/// Where memory is mapped in most tests.
pub(crate) const BASE: Iova = Iova::new(0x4000_0000);

/// Maps, and flushes when an empty table had to make room for a larger leaf.
pub(crate) fn map_in(domain: &Domain, at: Iova, oa: Oa, len: u64, perm: Perm, sizes: SizeSet) {
    let (mut stock, mut gather) = (Stock::new(domain.table().arena()), Gather::new());
    domain.table().map(span(at, len), oa, perm, sizes, &mut stock, &mut gather).unwrap();
    domain.flush(gather);
}

pub(crate) struct Machine {
    pub(crate) iommu: Arc<Iommu>,
    pub(crate) domain: Arc<Domain>,
    pub(crate) device: Arc<Device>,
    pub(crate) memory: Arc<Backing>,
}

pub(crate) fn span(start: Iova, len: u64) -> Span<Iova> {
    Span::from_len(start, len).unwrap()
}

impl Machine {
    /// `len` bytes of memory, nothing mapped, all shared.
    pub(crate) fn new(len: u64, frames: Frames) -> Self {
        Self::over(Backing::memfd(len, frames).unwrap())
    }

    pub(crate) fn over(memory: Arc<Backing>) -> Self {
        Self::with(memory, Config::default())
    }

    pub(crate) fn with(memory: Arc<Backing>, config: Config) -> Self {
        let rmp = SystemRmp::new();
        rmp.add_segment(memory.window(), Words::new(SystemRmp::words_for(memory.window())).unwrap()).unwrap();
        let iommu = Iommu::new(&Config { table_bytes: 256 << 20, ..config }, Arc::new(rmp)).unwrap();
        let (domain, device) = (iommu.domain().unwrap(), iommu.device("nic"));
        device.attach(&domain).unwrap();
        Self { iommu, domain, device, memory }
    }

    pub(crate) fn dma(&self) -> Dma {
        Dma::new(&self.device).unwrap()
    }

    /// The output address of a byte of the memory, by its offset in the window.
    pub(crate) fn oa(&self, offset: u64) -> Oa {
        self.memory.window().start().plus(offset)
    }

    pub(crate) fn map(&self, at: Iova, offset: u64, len: u64, perm: Perm, sizes: SizeSet) {
        map_in(&self.domain, at, self.oa(offset), len, perm, sizes);
    }

    pub(crate) fn map_small(&self, at: Iova, offset: u64, len: u64) {
        self.map(at, offset, len, Perm::RW, SizeSet::only(Lg2::K4));
    }

    pub(crate) fn unmap(&self, span: Span<Iova>) {
        let mut gather = Gather::new();
        assert_eq!(self.domain.table().unmap(span, &mut gather), None);
        self.domain.flush(gather);
    }

    pub(crate) fn cut(&self, span: Span<Iova>) {
        self.domain.cut(span, SizeSet::ALL, &mut Stock::new(self.iommu.arena())).unwrap();
    }

    /// How many leaves came out.
    pub(crate) fn merge(&self, span: Span<Iova>) -> u32 {
        let mut gather = Gather::new();
        let merges = self.domain.merge(span, SizeSet::ALL, &mut gather);
        self.domain.flush(gather);
        merges
    }

    /// Makes a page, or a 2 MiB block, private to [`ASID`] at `gpa`, and accepts it for the guest.
    pub(crate) fn make_private(&self, offset: u64, gpa: Gpa, size: RmpSize) {
        let (rmp, oa) = (self.iommu.rmp(), self.oa(offset));
        rmp.rmpupdate(oa, RmpState::private(gpa, size, ASID)).unwrap();
        rmp.pvalidate(Pvalidate { asid: ASID, vmpl: Vmpl::V0, gpa, oa, size, validate: true }).unwrap();
    }

    /// Writes straight into the memory, past the IOMMU.
    pub(crate) fn poke(&self, offset: u64, bytes: &[u8]) {
        self.memory.host(self.oa(offset), bytes.len() as u64).unwrap().write(0, bytes).unwrap();
    }

    pub(crate) fn peek(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.host(self.oa(offset), len as u64).unwrap().read(0, &mut bytes).unwrap();
        bytes
    }
}
