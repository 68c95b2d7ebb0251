//! IO address spaces: what mapping a file and attaching a domain cost, by extent where pages lie in a row, by page where they do not.

use crate::{Error, Row, Unit, Work, batches, in_format};
use addr::{Iova, Span};
use backing::{Backing, Frames};
use ioas::{Ioas, MapAll, Place};
use iommu::{Config, Domain, Iommu, SystemRmp};
use pt::{FormatKind, Perm};
use std::hint::black_box;
use std::sync::Arc;

const K4: u64 = 4 << 10;
const G1: u64 = 1 << 30;
const PAGES: u64 = G1 / K4;
/// Where rows map; aligned to all they map.
const AT: Iova = Iova::new(1 << 36);
const SCATTERED: Frames = Frames::Scattered { seed: 1 };
/// Calls of 4 KiB between two looks at the clock.
const BATCH: u64 = 128;

macro_rules! row {
    ($name:literal, $unit:expr, $make:expr) => {
        Row { name: $name, format: "amdv1", unit: $unit, kind: FormatKind::AmdV1, make: $make }
    };
}

/// Its rows.
pub fn rows() -> Vec<Row> {
    let one = Unit::Call;
    let pages = Unit::Page(PAGES);
    vec![
        row!("map_1g_memfd_contiguous", one, |format| map(format, Backing::memfd(G1, Frames::Contiguous)?)),
        row!("unmap_1g_memfd_contiguous", one, |format| unmap(format, Backing::memfd(G1, Frames::Contiguous)?)),
        row!("map_1g_memfd_scattered", pages, |format| map(format, Backing::memfd(G1, SCATTERED)?)),
        row!("unmap_1g_memfd_scattered", pages, |format| unmap(format, Backing::memfd(G1, SCATTERED)?)),
        row!("attach_1g", one, |format| attach(format, Backing::memfd(G1, Frames::Contiguous)?)),
        row!("attach_64g", one, |format| attach(format, Backing::simulated(64 * G1, Frames::Contiguous)?)),
        row!("attach_1g_scattered", pages, |format| attach(format, Backing::memfd(G1, SCATTERED)?)),
        row!("map_4k_ioas", one, |format| map_4k(format)),
        row!("unmap_4k_ioas", one, |format| unmap_4k(format)),
    ]
}

struct Space {
    iommu: Arc<Iommu>,
    ioas: Arc<Ioas>,
    memory: Arc<Backing>,
    second: Arc<Domain>,
}

impl Space {
    /// An address space that one domain shows; a second one is at hand.
    fn new(format: FormatKind, memory: Arc<Backing>) -> Result<Self, Error> {
        let config = Config { domain: in_format(format), ..Config::default() };
        let iommu = Iommu::new(&config, SystemRmp::new().into())?;
        let ioas = Ioas::new(&iommu, Arc::new(MapAll));
        ioas.attach(&iommu.domain()?)?;
        Ok(Self { second: iommu.domain()?, iommu, ioas, memory })
    }

    fn map(&self, offset: u64, len: u64) {
        let at = Place::Fixed(Iova::new(AT.get() + offset));
        let done = self.ioas.map_file(&self.memory, offset, len, black_box(at), Perm::RW);
        assert!(done.is_ok(), "{done:?}");
    }

    fn unmap(&self, offset: u64, len: u64) {
        let at = Iova::new(AT.get() + offset);
        let done = self.ioas.unmap(black_box(Span::of(at, Iova::new(at.get() + (len - 1)))));
        assert!(done.is_ok(), "{done:?}");
    }

    fn map_all(&mut self, _: u64) {
        self.map(0, self.memory.len_bytes());
    }

    fn unmap_all(&mut self, _: u64) {
        self.unmap(0, self.memory.len_bytes());
    }

    fn map_pages(&mut self, count: u64) {
        (0..count).for_each(|page| self.map(page * K4, K4));
    }

    fn unmap_pages(&mut self, count: u64) {
        (0..count).for_each(|page| self.unmap(page * K4, K4));
    }
}

fn map(format: FormatKind, memory: Arc<Backing>) -> Result<Box<dyn Work>, Error> {
    let mut space = Space::new(format, memory)?;
    Ok(Box::new(move |times| batches(&mut space, times, 1, |_, _| {}, Space::map_all, Space::unmap_all)))
}

fn unmap(format: FormatKind, memory: Arc<Backing>) -> Result<Box<dyn Work>, Error> {
    let mut space = Space::new(format, memory)?;
    Ok(Box::new(move |times| batches(&mut space, times, 1, Space::map_all, Space::unmap_all, |_, _| {})))
}

/// A second domain for what a first one shows already.
fn attach(format: FormatKind, memory: Arc<Backing>) -> Result<Box<dyn Work>, Error> {
    let mut space = Space::new(format, memory)?;
    space.map_all(1);
    Ok(Box::new(move |times| {
        let fresh = |space: &mut Space, _| space.second = space.iommu.domain().expect("a table for a domain");
        let attach = |space: &mut Space, _| space.ioas.attach(black_box(&space.second)).expect("an empty domain can be attached");
        let detach = |space: &mut Space, _| space.ioas.detach(&space.second).expect("it was attached");
        batches(&mut space, times, 1, fresh, attach, detach)
    }))
}

fn map_4k(format: FormatKind) -> Result<Box<dyn Work>, Error> {
    let mut space = Space::new(format, Backing::memfd(BATCH * K4, SCATTERED)?)?;
    Ok(Box::new(move |times| batches(&mut space, times, BATCH, |_, _| {}, Space::map_pages, Space::unmap_pages)))
}

fn unmap_4k(format: FormatKind) -> Result<Box<dyn Work>, Error> {
    let mut space = Space::new(format, Backing::memfd(BATCH * K4, SCATTERED)?)?;
    Ok(Box::new(move |times| batches(&mut space, times, BATCH, Space::map_pages, Space::unmap_pages, |_, _| {})))
}
