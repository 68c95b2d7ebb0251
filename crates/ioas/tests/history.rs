//! Long random histories against a plain model: a list of areas, a state for each page, and nothing else.

mod common;

use addr::{Iova, Lg2, Page};
use backing::{Backing, Frames, PageState};
use common::{MIB, PAGE, at, audit, iommu, iova, pages};
use iommu::Domain;
use lockstep_ioas::{Edit, Error, Ioas, LeafRule, MapAll, Pages, Place, SharedOnly};
use pt::Perm;
use std::sync::Arc;

const PAGES: u64 = 2048;
/// The histories play in this many pages of IOVA, so that mappings meet.
const ROOM: u64 = 8192;

#[derive(Clone)]
struct Mapped {
    start: u64,
    len: u64,
    memory: usize,
    first: u64,
    perm: Perm,
    writable: bool,
}

struct Model {
    areas: Vec<Mapped>,
    states: [Vec<PageState>; 2],
    shared_only: bool,
}

impl Model {
    fn over(&self, start: u64, len: u64) -> Vec<usize> {
        (0..self.areas.len()).filter(|n| self.areas[*n].start < start + len && start < self.areas[*n].start + self.areas[*n].len).collect()
    }

    fn translate(&self, page: u64) -> Option<(usize, u64, Perm)> {
        let area = &self.areas[*self.over(page, 1).first()?];
        let index = area.first + page - area.start;
        let mapped = match self.states[area.memory][index as usize] {
            PageState::Shared => true,
            PageState::Private => !self.shared_only,
            PageState::Absent => false,
        };
        mapped.then_some((area.memory, index, area.perm))
    }
}

struct Run {
    ioas: Arc<Ioas>,
    memory: [Arc<Backing>; 2],
    domains: Vec<Arc<Domain>>,
    model: Model,
    rng: fastrand::Rng,
}

impl Run {
    fn new(seed: u64) -> Self {
        let iommu = iommu();
        let shared_only = seed % 2 == 1;
        let rule: Arc<dyn LeafRule> = if shared_only { Arc::new(SharedOnly) } else { Arc::new(MapAll) };
        let memory = [Frames::Contiguous, Frames::Scattered { seed }].map(|frames| Backing::simulated(PAGES * PAGE, frames).unwrap());
        let states = [(); 2].map(|()| vec![PageState::Shared; PAGES as usize]);
        let model = Model { areas: Vec::new(), states, shared_only };
        Self { ioas: Ioas::new(&iommu, rule), memory, domains: Vec::new(), model, rng: fastrand::Rng::with_seed(seed) }
    }

    fn stretch(&mut self, room: u64) -> (u64, u64) {
        let len = [1, 2, 5, 16, 512, 600][self.rng.usize(..6)];
        let start = self.rng.u64(..room - len + 1);
        (if self.rng.bool() { start & !511 } else { start }, len)
    }

    fn map(&mut self) {
        let (first, len) = self.stretch(PAGES);
        let (start, _) = self.stretch(ROOM - len);
        let memory = self.rng.usize(..2);
        let perm = [Perm::READ, Perm::WRITE, Perm::RW][self.rng.usize(..3)];
        let auto = self.rng.u32(..3) == 0;
        let place = if auto { Place::Auto } else { at(start * PAGE) };
        let result = self.ioas.map_file(&self.memory[memory], first * PAGE, len * PAGE, place, perm);
        let start = match (&result, auto) {
            (Ok(found), true) => found.get() / PAGE,
            _ => start,
        };
        if self.model.over(start, len).is_empty() {
            assert_eq!(result.unwrap(), Iova::new(start * PAGE));
            self.model.areas.push(Mapped { start, len, memory, first, perm, writable: perm.allows(Perm::WRITE) });
        } else {
            assert!(matches!(result, Err(Error::Occupied { .. })), "{result:?}");
        }
    }

    fn copy(&mut self) {
        let (from, len) = self.stretch(ROOM);
        let (to, _) = self.stretch(ROOM - len);
        let perm = [Perm::READ, Perm::RW][self.rng.usize(..2)];
        let result = self.ioas.copy(&self.ioas, iova(from * PAGE, len * PAGE), at(to * PAGE), perm);
        let mut parts = self.model.over(from, len).into_iter().map(|n| self.model.areas[n].clone()).collect::<Vec<_>>();
        parts.sort_by_key(|area| area.start);
        let mut pieces = Vec::new();
        for area in parts {
            let start = area.start.max(from);
            let end = (area.start + area.len).min(from + len);
            pieces.push(Mapped { start: to + start - from, len: end - start, first: area.first + start - area.start, perm, ..area });
        }
        let whole = pieces.iter().map(|piece| piece.len).sum::<u64>() == len;
        let allowed = !perm.allows(Perm::WRITE) || pieces.iter().all(|piece| piece.writable);
        if whole && allowed && self.model.over(to, len).is_empty() {
            assert_eq!(result.unwrap(), Iova::new(to * PAGE));
            self.model.areas.extend(pieces);
        } else {
            assert!(result.is_err());
        }
    }

    fn unmap(&mut self) {
        let (start, len) = self.stretch(ROOM);
        let result = self.ioas.unmap(iova(start * PAGE, len * PAGE));
        let mut over = self.model.over(start, len);
        over.sort_by_key(|n| self.model.areas[*n].start);
        let inside = |area: &Mapped| start <= area.start && area.start + area.len <= start + len;
        let gone: Vec<_> = over.iter().copied().take_while(|n| inside(&self.model.areas[*n])).collect();
        let bytes = gone.iter().map(|n| self.model.areas[*n].len * PAGE).sum::<u64>();
        match result {
            Ok(unmapped) => assert!(unmapped == bytes && gone.len() == over.len() && bytes > 0),
            Err(Error::NotMapped { .. }) => assert!(over.is_empty()),
            Err(Error::CutsArea { .. }) => assert!(gone.len() < over.len()),
            Err(error) => panic!("{error}"),
        }
        let mut kept = 0..self.model.areas.len();
        self.model.areas.retain(|_| !gone.contains(&kept.next().unwrap()));
    }

    fn change_states(&mut self) {
        let (first, len) = self.stretch(PAGES);
        let which = self.rng.usize(..2);
        let memory = &self.memory[which];
        let span = pages(first, len);
        let own = &mut self.model.states[which][first as usize..(first + len) as usize];
        match self.rng.u32(..3) {
            0 => {
                memory.punch(span).unwrap();
                own.fill(PageState::Absent);
            }
            1 => {
                memory.populate(span, PageState::Shared).unwrap();
                own.iter_mut().filter(|state| **state == PageState::Absent).for_each(|state| *state = PageState::Shared);
            }
            _ => {
                let to = [PageState::Private, PageState::Shared][self.rng.usize(..2)];
                let held = memory.lock(span);
                let all = Pages::of(memory);
                let mut edit = Edit::new();
                all.reserve(span, Lg2::K4, &mut edit).unwrap();
                all.clear(span, &mut edit);
                edit.flush();
                memory.set_state(&held, span, to).unwrap();
                all.fill(span, &mut edit).unwrap();
                edit.flush();
                own.fill(to);
            }
        }
        if self.rng.bool() {
            let held = memory.lock(memory.pages());
            let mut edit = Edit::new();
            Pages::of(memory).merge(memory.pages(), &mut edit);
            edit.flush();
            drop(held);
        }
    }

    fn change_domains(&mut self) {
        if self.domains.len() < 3 && self.rng.bool() {
            let domain = self.ioas.iommu().domain().unwrap();
            self.ioas.attach(&domain).unwrap();
            self.domains.push(domain);
        } else if !self.domains.is_empty() {
            let domain = self.domains.swap_remove(self.rng.usize(..self.domains.len()));
            self.ioas.detach(&domain).unwrap();
            assert!(common::leaves(&domain).is_empty());
        }
    }

    fn check(&mut self) {
        for _ in 0..20 {
            let page = self.rng.u64(..ROOM + 100);
            let expected = self.model.translate(page).map(|(memory, index, perm)| (self.memory[memory].oa(Page::new(index)), perm));
            for domain in &self.domains {
                let found = domain.table().walk(Iova::new(page * PAGE));
                assert_eq!(found.map(|leaf| (leaf.oa_of(Iova::new(page * PAGE)), leaf.perm)), expected, "page {page:#x}");
            }
        }
    }
}

#[test]
fn random_histories() {
    for seed in 0..24 {
        let mut run = Run::new(seed);
        for step in 0..300 {
            match run.rng.u32(..100) {
                0..40 => run.map(),
                40..55 => run.copy(),
                55..75 => run.unmap(),
                75..95 => run.change_states(),
                _ => run.change_domains(),
            }
            run.check();
            if step % 50 == 0 {
                audit(&run.ioas);
            }
        }
        audit(&run.ioas);
        let tops = run.domains.iter().map(|domain| domain.table().bytes_in_tables() / PAGE).sum::<u64>();
        assert_eq!(u64::from(run.ioas.iommu().arena().tables_in_use()), tops, "seed {seed}: a table is in use and in no tree");
        let (arena, domains) = (Arc::clone(run.ioas.iommu().arena()), std::mem::take(&mut run.domains));
        drop(run);
        assert!(domains.iter().all(|domain| common::leaves(domain).is_empty()));
        drop(domains);
        assert_eq!(arena.tables_in_use(), 0, "seed {seed}");
    }
}

#[test]
fn a_large_address_space_stays_quick() {
    let ioas = common::ioas();
    let memory = common::simulated(MIB);
    ioas.attach(&ioas.iommu().domain().unwrap()).unwrap();
    for n in 0..20_000 {
        ioas.map_file(&memory, 0, PAGE, at(n * 2 * PAGE), Perm::RW).unwrap();
    }
    memory.punch(pages(0, 1)).unwrap();
    assert!(common::leaves(&ioas.domains()[0]).is_empty());
    memory.populate(pages(0, 1), PageState::Shared).unwrap();
    audit(&ioas);
    assert_eq!(ioas.unmap_all().unwrap(), 20_000 * PAGE);
}
