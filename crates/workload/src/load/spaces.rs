//! The same edits through an address space that a domain shows: areas over the pages of a backing, with span locks, invalidation and grace.
//! There is no reader, so a grace period has nobody to wait for.

use super::edits::Edits;
use super::pair::{Pair, Task};
use crate::{Error, Work, in_format};
use addr::{Iova, Lg2, PAGE_BYTES, PAGE_LG2, Page, SizeSet, Span};
use backing::{Backing, Frames};
use ioas::{Edit, Ioas, MapAll, Pages, Place};
use iommu::{Config, Iommu, SystemRmp};
use pt::{FormatKind, Perm};
use std::hint::black_box;
use std::sync::Arc;

/// Within the 38 bits of the narrowest format.
const AT: u64 = 1 << 36;
const BATCH: u64 = 64;

/// What both threads share.
struct Machine {
    ioas: Arc<Ioas>,
    memory: Arc<Backing>,
}

impl Machine {
    fn new(format: FormatKind, edits: Edits) -> Result<Arc<Self>, Error> {
        let config = Config { domain: in_format(format), table_bytes: 64 << 20, ..Config::default() };
        let iommu = Iommu::new(&config, SystemRmp::new().into())?;
        let ioas = Ioas::new(&iommu, Arc::new(MapAll));
        ioas.attach(&iommu.domain()?)?;
        let memory = Backing::simulated(2 * edits.stride(), Frames::Contiguous)?;
        Ok(Arc::new(Self { ioas, memory }))
    }
}

/// One thread of it.
struct Hand {
    machine: Arc<Machine>,
    edits: Edits,
    offset: u64,
}

impl Hand {
    fn new(machine: &Arc<Machine>, edits: Edits, thread: u64) -> Self {
        let hand = Self { machine: Arc::clone(machine), edits, offset: thread * edits.stride() };
        if edits == Edits::CutMerge {
            (0..BATCH).for_each(|index| hand.map(index));
        } else {
            // The tables on the way stay.
            hand.map(BATCH);
        }
        hand
    }

    fn task(self) -> Task {
        Box::new(move |times| {
            let mut left = times;
            while left > 0 {
                let now = left.min(BATCH);
                left -= now;
                if self.edits == Edits::CutMerge {
                    (0..now).for_each(|index| self.cut(index));
                    (0..now).for_each(|index| self.merge(index));
                } else {
                    (0..now).for_each(|index| self.map(index));
                    (0..now).for_each(|index| self.unmap(index));
                }
            }
        })
    }

    fn map(&self, index: u64) {
        let offset = self.offset + index * self.edits.len();
        let at = Place::Fixed(Iova::new(black_box(AT + offset)));
        let done = self.machine.ioas.map_file(&self.machine.memory, offset, self.edits.len(), at, Perm::RW);
        assert!(done.is_ok(), "{done:?}");
    }

    fn unmap(&self, index: u64) {
        let at = black_box(AT + self.offset + index * self.edits.len());
        let done = self.machine.ioas.unmap(crate::tree::span(at, self.edits.len()));
        assert!(done.is_ok(), "{done:?}");
    }

    fn pages(&self, index: u64) -> Span<Page> {
        let first = (self.offset + index * self.edits.len()) >> PAGE_LG2;
        Span::of(Page::new(first), Page::new(first + (self.edits.len() >> PAGE_LG2) - 1))
    }

    /// One page stands alone afterwards.
    fn cut(&self, index: u64) {
        let page = Page::new(self.pages(index).start().get() + 0x55);
        let page = black_box(Span::one(page));
        let _held = self.machine.memory.lock(page);
        let (all, mut edit) = (Pages::of(&self.machine.memory), Edit::new());
        let done = all
            .reserve(page, Lg2::K4, &mut edit)
            .and_then(|()| all.cut(page, SizeSet::ALL.up_to(Lg2(PAGE_BYTES.trailing_zeros() as u8)), &mut edit));
        assert!(done.is_ok(), "{done:?}");
    }

    fn merge(&self, index: u64) {
        let pages = black_box(self.pages(index));
        let _held = self.machine.memory.lock(pages);
        let mut edit = Edit::new();
        Pages::of(&self.machine.memory).merge(pages, &mut edit);
        edit.flush();
    }
}

/// Both threads in one address space, over one backing.
pub(super) fn one_space(format: FormatKind, edits: Edits) -> Result<Box<dyn Work>, Error> {
    let machine = Machine::new(format, edits)?;
    Pair::work([Hand::new(&machine, edits, 0).task(), Hand::new(&machine, edits, 1).task()], false)
}

/// Each with an IOMMU, an address space and a backing of its own.
pub(super) fn apart(format: FormatKind, edits: Edits) -> Result<Box<dyn Work>, Error> {
    let [one, other] = [Machine::new(format, edits)?, Machine::new(format, edits)?];
    Pair::work([Hand::new(&one, edits, 0).task(), Hand::new(&other, edits, 0).task()], true)
}
