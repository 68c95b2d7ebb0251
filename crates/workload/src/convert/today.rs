//! What VMMs do today, for comparison: a bitmap with a bit per 4 KiB, and an area per 4 KiB, since the kernel cannot cut one, so that each
//! page is one map or one unmap call. No RMP and no attributes: only the part of a conversion that concerns the IO page table, and that over
//! our own IOAS, whose calls are the quicker ones (compare `lockstep bench iommufd`).

use super::{G1, K4, in_a_row};
use crate::{Error, Work, batches, in_format};
use addr::{Iova, Span};
use backing::{Backing, Frames};
use ioas::{Ioas, MapAll, Place};
use iommu::{Config, Dma, Iommu, SystemRmp};
use pt::{FormatKind, Perm};
use std::sync::Arc;

struct Vmm {
    ioas: Arc<Ioas>,
    memory: Arc<Backing>,
    is_shared: Vec<u64>,
    /// A context that stands by, as in the rows beside this one.
    _dma: Dma,
}

impl Vmm {
    fn new(format: FormatKind) -> Result<Self, Error> {
        let iommu = Iommu::new(&Config { domain: in_format(format), ..Config::default() }, SystemRmp::new().into())?;
        let ioas = Ioas::new(&iommu, Arc::new(MapAll));
        let device = iommu.device("bench");
        ioas.attach_device(&device)?;
        let vmm = Self {
            _dma: Dma::new(&device)?,
            ioas,
            memory: Backing::memfd(G1, Frames::Contiguous)?,
            is_shared: vec![0; (G1 / K4 / 64) as usize],
        };
        Ok(vmm)
    }

    fn share(&mut self, page: u64) {
        self.is_shared[(page / 64) as usize] |= 1 << (page % 64);
        let mapped = self.ioas.map_file(&self.memory, page * K4, K4, Place::Fixed(Iova::new(page * K4)), Perm::RW);
        assert!(mapped.is_ok(), "{mapped:?}");
    }

    fn unshare(&mut self, page: u64) {
        self.is_shared[(page / 64) as usize] &= !(1 << (page % 64));
        let unmapped = self.ioas.unmap(Span::of(Iova::new(page * K4), Iova::new(page * K4 + (K4 - 1))));
        assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}

/// A batch that becomes private, or shared again, page by page.
pub(super) fn batch(format: FormatKind, private: bool) -> Result<Box<dyn Work>, Error> {
    let mut vmm = Vmm::new(format)?;
    (0..G1 / K4).for_each(|page| vmm.share(page));
    let pages = in_a_row();
    if !private {
        pages.iter().for_each(|page| vmm.unshare(*page));
    }
    Ok(Box::new(move |times| {
        let unshare = |vmm: &mut Vmm, _| pages.iter().for_each(|page| vmm.unshare(*page));
        let share = |vmm: &mut Vmm, _| pages.iter().for_each(|page| vmm.share(*page));
        if private {
            batches(&mut vmm, times, 1, |_, _| {}, unshare, share)
        } else {
            batches(&mut vmm, times, 1, |_, _| {}, share, unshare)
        }
    }))
}
