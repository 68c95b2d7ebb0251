//! Domains whose smallest leaf is half a page, and domains that have only some of their format's sizes: areas may begin and end inside a
//! page, and every granule leads exactly where it should.

mod common;

use addr::{Address, Iova, Lg2, Oa, Page, SizeSet, Span};
use backing::{Backing, Frames, PageState};
use common::{MIB, PAGE, at, iommu, iova, leaves, pages};
use iommu::{Domain, DomainConfig, Iommu};
use lockstep_ioas::{Edit, Error, Ioas, MapAll, Pages};
use pt::{FormatKind, Perm};
use std::collections::BTreeMap;
use std::sync::Arc;

const HALF: u64 = 2048;
const HALF_LG2: u8 = 11;

/// What the kernel's mock device has by default.
fn mock(iommu: &Iommu) -> Arc<Domain> {
    let aperture = Span::of(Iova::new(16 * MIB), Iova::new(0x7fff_ffff));
    iommu.domain_with(&DomainConfig { format: FormatKind::AmdV1K2, aperture: Some(aperture), ..DomainConfig::default() }).unwrap()
}

/// The same device's page table of few sizes.
fn mock_huge(iommu: &Iommu) -> Arc<Domain> {
    let sizes = SizeSet(1 << 20 | 1 << 12);
    let aperture = Some(Span::of(Iova::new(0), Iova::new(0x3f_ffff_ffff)));
    iommu.domain_with(&DomainConfig { format: FormatKind::AmdV1K2, sizes, aperture, tracks_dirty: true }).unwrap()
}

fn with(domain: impl Fn(&Iommu) -> Arc<Domain>) -> (Arc<Ioas>, Arc<Domain>) {
    let ioas = Ioas::new(&iommu(), Arc::new(MapAll));
    let domain = domain(ioas.iommu());
    ioas.attach(&domain).unwrap();
    (ioas, domain)
}

/// The byte of a backing by its offset.
fn byte(memory: &Backing, offset: u64) -> Oa {
    memory.oa(Page::new(offset / PAGE)).plus(offset % PAGE)
}

/// A plain model: where each area's first granule lies in the memory.
#[derive(Default)]
struct Model {
    areas: BTreeMap<u64, (u64, u64)>,
    punched: std::collections::BTreeSet<u64>,
}

impl Model {
    fn is_free(&self, start: u64, len: u64) -> bool {
        self.areas.range(..start + len).next_back().is_none_or(|(at, (_, own))| at + own <= start)
    }

    /// Compares every granule of `window`, and counts the leaves' bytes, so that nothing is mapped outside.
    fn check(&self, domain: &Domain, memory: &Backing, window: Span<Iova>) {
        let mut mapped = 0;
        for granule in window.blocks(HALF_LG2) {
            let at = granule.start().get();
            let area = self.areas.range(..=at).next_back().filter(|(start, (_, len))| at < *start + len);
            let offset = area.map(|(start, (offset, _))| offset + (at - start));
            let want = offset.filter(|offset| !self.punched.contains(&(offset / PAGE))).map(|offset| byte(memory, offset));
            let found = domain.table().walk(granule.start()).map(|leaf| leaf.oa_of(granule.start()));
            assert_eq!(found, want, "at {at:#x}");
            mapped += u64::from(want.is_some()) * HALF;
        }
        assert_eq!(leaves(domain).iter().map(|leaf| leaf.size.bytes()).sum::<u64>(), mapped, "a leaf reaches out of its area");
    }
}

const WINDOW: u64 = 4 * MIB;
const BASE: u64 = 16 * MIB;

fn random_history(frames: Frames, seed: u64) {
    let (ioas, domain) = with(mock);
    let memory = Backing::memfd(8 * MIB, frames).unwrap();
    let window = iova(BASE, WINDOW);
    let (mut model, mut random) = (Model::default(), fastrand::Rng::with_seed(seed));
    let mut largest = Lg2(0);
    for _ in 0..300 {
        match random.u32(..8) {
            0..4 => {
                // Half of the pieces are round, so that large leaves fit.
                let round = [0, 0, 3, 7, 9][random.usize(..5)];
                let number = |random: &mut fastrand::Rng, limit: u64| (random.u64(..limit / HALF) >> round << round) * HALF;
                let len = number(&mut random, MIB).max(HALF << round);
                let (start, offset) = (BASE + number(&mut random, WINDOW - len), number(&mut random, 8 * MIB - len));
                let done = ioas.map_file(&memory, offset, len, at(start), Perm::RW);
                assert_eq!(done.is_ok(), model.is_free(start, len), "{done:?}");
                if done.is_ok() {
                    model.areas.insert(start, (offset, len));
                }
            }
            4 | 5 => {
                let areas: Vec<_> = model.areas.iter().map(|(start, (_, len))| (*start, *len)).collect();
                if let Some((start, len)) = random.choice(areas) {
                    assert_eq!(ioas.unmap(iova(start, len)).unwrap(), len);
                    model.areas.remove(&start);
                }
            }
            6 => {
                let page = random.u64(..8 * MIB / PAGE);
                memory.punch(pages(page, 1)).unwrap();
                model.punched.insert(page);
            }
            _ => {
                if let Some(page) = model.punched.pop_first() {
                    memory.populate(pages(page, 1), PageState::Shared).unwrap();
                }
            }
        }
        model.check(&domain, &memory, window);
        largest = leaves(&domain).iter().map(|leaf| leaf.size).max().unwrap_or(largest).max(largest);
    }
    if frames == Frames::Contiguous {
        assert!(largest >= Lg2(19), "the largest leaf was {largest}");
    }
    ioas.unmap_all().unwrap();
    assert_eq!(leaves(&domain), []);
}

#[test]
fn random_pieces_of_contiguous_memory() {
    (0..4).for_each(|seed| random_history(Frames::Contiguous, seed));
}

#[test]
fn random_pieces_of_scattered_memory() {
    (0..4).for_each(|seed| random_history(Frames::Scattered { seed }, seed));
}

#[test]
fn a_punch_takes_both_halves_of_a_page_and_nothing_else() {
    let (ioas, domain) = with(mock);
    let memory = Backing::memfd(MIB, Frames::Contiguous).unwrap();
    // Page 5 is the end of one area and the beginning of another, at places that have nothing to do with each other.
    ioas.map_file(&memory, 0, 5 * PAGE + HALF, at(BASE), Perm::RW).unwrap();
    ioas.map_file(&memory, 5 * PAGE + HALF, 2 * PAGE, at(BASE + MIB + HALF), Perm::READ).unwrap();
    let walk = |at: u64| domain.table().walk(Iova::new(at)).map(|leaf| leaf.oa_of(Iova::new(at)));
    assert_eq!(walk(BASE + 5 * PAGE + 7), Some(byte(&memory, 5 * PAGE + 7)));
    assert_eq!(walk(BASE + 5 * PAGE + HALF), None, "the area ends here");
    assert_eq!(walk(BASE + MIB + HALF), Some(byte(&memory, 5 * PAGE + HALF)));
    memory.punch(pages(5, 1)).unwrap();
    assert_eq!(walk(BASE + 5 * PAGE), None);
    assert_eq!(walk(BASE + 5 * PAGE - 1), Some(byte(&memory, 5 * PAGE - 1)));
    assert_eq!(walk(BASE + MIB + HALF), None);
    assert_eq!(walk(BASE + MIB + 2 * HALF), Some(byte(&memory, 6 * PAGE)));
    memory.populate(pages(5, 1), PageState::Shared).unwrap();
    assert_eq!(walk(BASE + 5 * PAGE + HALF - 1), Some(byte(&memory, 5 * PAGE + HALF - 1)));
    assert_eq!(walk(BASE + 5 * PAGE + HALF), None);
    assert_eq!(walk(BASE + MIB + HALF), Some(byte(&memory, 5 * PAGE + HALF)));
}

#[test]
fn alignment_follows_the_domains_that_are_there() {
    let (ioas, half) = with(mock);
    assert_eq!(ioas.alignment(), HALF);
    assert_eq!(ioas.ranges(), [Span::of(Iova::new(16 * MIB), Iova::new(0x7fff_ffff))]);
    let page = ioas.iommu().domain().unwrap();
    ioas.attach(&page).unwrap();
    assert_eq!(ioas.alignment(), PAGE);
    ioas.detach(&page).unwrap();
    assert_eq!(ioas.alignment(), HALF);
    let memory = Backing::memfd(MIB, Frames::Contiguous).unwrap();
    ioas.map_file(&memory, HALF, HALF, at(BASE), Perm::RW).unwrap();
    assert!(matches!(ioas.attach(&page), Err(Error::InUse { .. })));
    assert!(matches!(ioas.map_file(&memory, 0, HALF / 2, at(BASE + MIB), Perm::RW), Err(Error::Span(_))));
    assert!(matches!(ioas.map_file(&memory, 0, PAGE, at(BASE - PAGE), Perm::RW), Err(Error::Reserved { .. })));
    ioas.detach(&half).unwrap();
    assert_eq!((ioas.alignment(), ioas.ranges()), (1, vec![Span::whole()]));
}

#[test]
fn pages_larger_than_the_hosts_are_refused() {
    let ioas = Ioas::new(&iommu(), Arc::new(MapAll));
    let config = DomainConfig { sizes: SizeSet(1 << 20 | 1 << 21), ..DomainConfig::default() };
    let domain = ioas.iommu().domain_with(&config).unwrap();
    assert!(matches!(ioas.attach(&domain), Err(Error::DomainPages { smallest }) if smallest == Lg2(20)));
    assert_eq!((ioas.alignment(), ioas.domains().len()), (1, 0));
}

/// Sizes of all leaves, ascending, each once.
fn sizes(domain: &Domain) -> Vec<u8> {
    let mut sizes: Vec<u8> = leaves(domain).iter().map(|leaf| leaf.size.0).collect();
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

#[test]
fn leaves_keep_to_the_sizes_of_their_domain() {
    let (ioas, huge) = with(mock_huge);
    let any = ioas.iommu().domain().unwrap();
    ioas.attach(&any).unwrap();
    let memory = Backing::memfd(8 * MIB, Frames::Contiguous).unwrap();
    ioas.map_file(&memory, 0, 8 * MIB - PAGE, at(0x100_0000), Perm::RW).unwrap();
    let all = |what: &str| {
        assert_eq!(sizes(&huge), [12, 20], "{what}");
        assert!(sizes(&any).contains(&21), "{what}: the other domain takes what fits");
        common::audit(&ioas);
    };
    all("map");
    memory.punch(pages(300, 1)).unwrap();
    all("punch, which cuts a leaf of 1 MiB");
    assert_eq!(leaves(&huge).len(), 6 + 255 + 255);
    memory.populate(pages(300, 1), PageState::Shared).unwrap();
    let mut edit = Edit::new();
    let held = memory.lock(pages(0, 2047));
    Pages::of(&memory).merge(pages(0, 2047), &mut edit);
    edit.flush();
    drop(held);
    all("merge");
    assert_eq!(leaves(&huge).len(), 7 + 255);
    // A read that clears dirty bits cuts at the borders of its span.
    ioas.track_dirty(&huge, true).unwrap();
    assert!(huge.table().mark_dirty(Iova::new(0x100_0000)));
    let mut found = Vec::new();
    ioas.read_dirty(&huge, iova(0x100_0000, PAGE), true, |span| found.push(span)).unwrap();
    assert_eq!(found, [iova(0x100_0000, PAGE)]);
    all("dirty read");
}

#[test]
fn without_large_leaves_each_is_one_page() {
    let ioas = Ioas::new(&iommu(), Arc::new(MapAll));
    ioas.set_large_leaves(false).unwrap();
    let domain = mock(ioas.iommu());
    ioas.attach(&domain).unwrap();
    assert_eq!(ioas.alignment(), PAGE);
    let memory = Backing::memfd(MIB, Frames::Contiguous).unwrap();
    ioas.map_file(&memory, PAGE, 64 * PAGE, at(BASE), Perm::RW).unwrap();
    assert_eq!(sizes(&domain), [12]);
    ioas.set_large_leaves(true).unwrap();
    assert_eq!(ioas.alignment(), HALF);
    ioas.map_file(&memory, 0, MIB, at(BASE + MIB), Perm::RW).unwrap();
    assert_eq!(sizes(&domain), [12, 20]);
}

/// The bound that a reserve goes by holds where a table reaches half as far and areas begin inside pages.
#[test]
fn nothing_fails_after_the_reserve() {
    for frames in [Frames::Contiguous, Frames::Scattered { seed: 4 }] {
        let iommu = iommu();
        let ioas = Ioas::new(&iommu, Arc::new(common::Mirror));
        let memory = Backing::simulated(16 * MIB, frames).unwrap();
        ioas.map_file(&memory, 0, 8 * MIB, at(BASE), Perm::RW).unwrap();
        ioas.map_file(&memory, 3 * MIB + HALF, 8 * MIB, at(BASE + 9 * MIB + HALF), Perm::RW).unwrap();
        ioas.map_file(&memory, 4 * MIB, 8 * MIB + HALF, at(BASE + 32 * MIB + HALF), Perm::RW).unwrap();
        for domain in [mock(&iommu), mock(&iommu)] {
            ioas.attach(&domain).unwrap();
        }
        let all = Pages::of(&memory);
        let mut random = fastrand::Rng::with_seed(11);
        for round in 0..300 {
            let len = [1, 1, 3, 256, 512, 700, 1025][random.usize(..7)];
            let start = random.u64(..4096 - len + 1);
            let span = pages(if random.bool() { start & !255 } else { start }, len);
            let held = memory.lock(span);
            held.reserve(1).unwrap();
            let mut edit = Edit::new();
            all.reserve(span, Lg2::K4, &mut edit).unwrap();
            let plan = sync::fail::nth(1);
            all.clear(span, &mut edit);
            edit.flush();
            memory.set_state(&held, span, [PageState::Private, PageState::Shared][round % 2]).unwrap();
            all.fill(span, &mut edit).unwrap();
            edit.flush();
            assert_eq!(plan.fired(), None, "something was taken that had not been reserved");
            drop((plan, held));
        }
        assert_eq!(all.leaves_shed(), 0);
        for domain in ioas.domains() {
            let mapped: u64 = leaves(&domain).iter().map(|leaf| leaf.size.bytes()).sum();
            assert_eq!(mapped, 24 * MIB + HALF);
        }
    }
}
