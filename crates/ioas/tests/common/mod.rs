//! What every test here needs: an IOMMU with memory for tables, canonical dumps, and an audit that reads the tables itself.
#![allow(dead_code, reason = "each test file uses a part of it")]

use addr::{Address, Iova, Lg2, Oa, PAGE_BYTES, Page, SizeSet, Span};
use backing::{Backing, Frames, PageState};
use iommu::{Config, Domain, Iommu};
use lockstep_ioas::{Area, AreaState, Ioas, LeafRule, MapAll, Pages, Place};
use pt::{Leaf, Perm};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub(crate) mod client;

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const GIB: u64 = 1 << 30;

pub(crate) fn iommu_with(table_bytes: u64) -> Arc<Iommu> {
    let config = Config { table_bytes, iotlb_entries: 64, fault_records: 16, ..Config::default() };
    Iommu::new(&config, Arc::new(secure::Rmp::new())).unwrap()
}

pub(crate) fn iommu() -> Arc<Iommu> {
    iommu_with(64 * MIB)
}

pub(crate) fn ioas() -> Arc<Ioas> {
    Ioas::new(&iommu(), Arc::new(MapAll))
}

pub(crate) fn simulated(len: u64) -> Arc<Backing> {
    Backing::simulated(len, Frames::Contiguous).unwrap()
}

pub(crate) fn iova(start: u64, len: u64) -> Span<Iova> {
    Span::from_len(Iova::new(start), len).unwrap()
}

pub(crate) fn pages(start: u64, len: u64) -> Span<Page> {
    Span::from_len(Page::new(start), len).unwrap()
}

pub(crate) fn at(start: u64) -> Place {
    Place::Fixed(Iova::new(start))
}

/// Everything a domain's table says, in order.
pub(crate) fn leaves(domain: &Domain) -> Vec<Leaf> {
    let mut all = Vec::new();
    domain.table().leaves(Span::whole(), |leaf| all.push(leaf));
    all
}

/// What a device would find there.
pub(crate) fn walk(domain: &Domain, at: u64) -> Option<(Oa, Perm)> {
    domain.table().walk(Iova::new(at)).map(|leaf| (leaf.oa_of(Iova::new(at)), leaf.perm))
}

/// Everything an address space and its domains say, for comparison before and after. Tables in use are a part of it.
pub(crate) fn dump(ioas: &Ioas) -> String {
    use std::fmt::Write;
    let mut out = String::new();
    for area in ioas.areas() {
        let over = Pages::of(area.backing()).areas_over(area.page_span()).len();
        writeln!(out, "{area:?} domains {:?} over {over}", area.domains().iter().map(|domain| domain.id()).collect::<Vec<_>>()).unwrap();
    }
    for domain in ioas.domains() {
        writeln!(out, "domain {} {:?}", domain.id(), leaves(&domain)).unwrap();
    }
    let tables = ioas.iommu().arena().tables_in_use();
    writeln!(out, "ranges {:?} alignment {} tables {tables}", ioas.ranges(), ioas.alignment()).unwrap();
    out
}

/// Compares every domain's leaves with what the areas and page states call for, page by page and from both sides.
pub(crate) fn audit(ioas: &Ioas) {
    for domain in ioas.domains() {
        let mut found = leaves(&domain).into_iter();
        let mut rest = Vec::new();
        for area in ioas.areas() {
            assert_eq!(area.state(), AreaState::Live);
            area.expected(area.page_span(), |iova, oa, sizes| rest.push((iova, oa, sizes, area.perm())));
        }
        for (run, oa, sizes, perm) in rest {
            let mut next = run.start();
            loop {
                let leaf = found.next().unwrap_or_else(|| panic!("{run} is not mapped from {next} on in domain {}", domain.id()));
                assert_eq!((leaf.iova, leaf.perm), (next, perm), "in {run}");
                assert!(run.covers(leaf.span()) && sizes.has(leaf.size), "{leaf:?} in {run}, sizes {sizes:x?}");
                assert_eq!(leaf.oa, oa.plus(next.offset_from(run.start())), "{leaf:?} in {run}");
                if leaf.span().last() == run.last() {
                    break;
                }
                next = leaf.span().last().plus(1);
            }
        }
        assert_eq!(found.next(), None, "domain {} maps what no area calls for", domain.id());
    }
}

/// A rule that counts how often it is asked: once for each run of equal pages in each domain.
#[derive(Debug, Default)]
pub(crate) struct Counting(pub(crate) AtomicU64);

impl LeafRule for Counting {
    fn leaf(&self, backing: &Backing, run: Span<Page>, state: PageState) -> (Span<Page>, Option<SizeSet>) {
        self.0.fetch_add(1, Ordering::Relaxed);
        MapAll.leaf(backing, run, state)
    }
}

impl Counting {
    pub(crate) fn take(&self) -> u64 {
        self.0.swap(0, Ordering::Relaxed)
    }
}

/// As a confidential guest's rule would do it: private pages in 4 KiB and 2 MiB leaves, shared ones in any.
#[derive(Debug)]
pub(crate) struct Mirror;

impl LeafRule for Mirror {
    fn leaf(&self, _: &Backing, run: Span<Page>, state: PageState) -> (Span<Page>, Option<SizeSet>) {
        let sizes = match state {
            PageState::Shared => Some(SizeSet::ALL),
            PageState::Private => Some(SizeSet(SizeSet::only(Lg2::K4).0 | SizeSet::only(Lg2::M2).0)),
            PageState::Absent => None,
        };
        (run, sizes)
    }
}

pub(crate) fn oa_of(area: &Area, page: u64) -> Oa {
    area.backing().oa(Page::new(page))
}

pub(crate) const PAGE: u64 = PAGE_BYTES;
