//! Real formats under load: readers check every translation against a truth that is plain arithmetic, while two writers cut, merge, map, unmap
//! and read dirty bits at random, each within its own spans, with real grace periods (I-1, I-4, I-14, I-15).
//!
//! - What is always mapped answers with the same address at every moment; where leaves are broken before they change, for a moment with nothing.
//! - What comes and goes answers with nothing, or with the life that it is in: a generation that is not over as long as the guard is open.
//! - What a device wrote was noted: a page that was written after it was last copied is dirty in the end.
//!
//! It takes a few seconds for all formats together; LOCKSTEP_STRESS_SECONDS makes it longer, LOCKSTEP_STRESS_SEED repeats the random choices.
#![cfg(not(loom))]

mod common;

use addr::{Address, Iova, Lg2, Oa, SizeSet, Span};
use common::{Words, arena};
use lockstep_pt::{Arena, Config, Entry, Format, FormatKind, FormatVisitor, Gather, Perm, Stock, Table};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use sync::{Readers, Slot};

const DOMAIN: u32 = 1;
const WRITERS: u64 = 2;
/// Frames of what is always mapped, and of what comes and goes: 64 GiB for each of 16 generations.
const SOLID_FRAMES: u64 = 1 << 40;
const PLACE_FRAMES: u64 = 4 << 40;
const GENERATION_LG2: u32 = 36;
const GENERATIONS: u64 = 16;
/// Places of one kind, half of them each writer's.
const ALIKE: u64 = 8;
const TRACKED: u64 = 64;

/// What is wrong on purpose.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Plant {
    Nothing,
    /// Retired tables go back, and pages are taken for free, without a grace period.
    NoGrace,
    /// A piece of a cut leaf says what its neighbour says.
    WrongHalf,
    /// A dirty bit is cleared and not reported.
    LostBit,
}

/// A span that one writer maps and unmaps again and again.
struct Place {
    span: Span<Iova>,
    frames: u64,
    /// The generation that is mapped or was last.
    generation: AtomicU64,
    /// Generations that are over: unmapped, flushed, and after their grace period.
    over: AtomicU64,
}

impl Place {
    fn oa(&self, generation: u64) -> Oa {
        Oa::new(PLACE_FRAMES + ((generation % GENERATIONS) << GENERATION_LG2) + self.frames)
    }
}

/// A page that devices write to.
struct Tracked {
    at: Iova,
    written: AtomicU64,
    copied: AtomicU64,
}

#[derive(Default)]
struct Counts {
    translations: AtomicU64,
    found_in_places: AtomicU64,
    writes: AtomicU64,
    cuts: AtomicU64,
    merges: AtomicU64,
    maps: AtomicU64,
    dirty_reads: AtomicU64,
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

struct Ground<F: Format> {
    table: Table<F, Words>,
    arena: Arc<Arena<Words>>,
    readers: Arc<Readers>,
    sizes: SizeSet,
    /// Always mapped; each writer holds its part.
    solid: Span<Iova>,
    places: Vec<Place>,
    tracked: Vec<Tracked>,
    plant: Plant,
    counts: Counts,
    stop: AtomicBool,
    wrong: Mutex<Option<String>>,
}

impl<F: Format> Ground<F> {
    fn new(config: Config, plant: Plant) -> Self {
        let arena = arena::<F>(2048);
        let item = F::item_lg2(1);
        let table = Table::with_start(Arc::clone(&arena), config.start_level).unwrap();
        let solid = Span::from_len(Iova::new(0), 2 << F::item_lg2(2)).unwrap();
        let region = 4u64 << F::item_lg2(2);
        // Single granules and short runs share one table; whole items come and go with their tables; four items are more than one table.
        let kinds = [(0, 1 << F::GRANULE_LG2), (1 << (item - 1), 24 << F::GRANULE_LG2), (1 << item, 1 << item), (64 << item, 4 << item)];
        let mut places = Vec::new();
        for (first, len) in kinds {
            places.extend((0..ALIKE).map(|index| (region + first + index * len, len, first + index * len)));
        }
        // The last granule of all: where a tree can grow, it has to.
        places.push((F::aperture().last().get() & !((1 << F::GRANULE_LG2) - 1), 1 << F::GRANULE_LG2, 1 << 35));
        let place = |(start, len, frames): (u64, u64, u64)| {
            let [generation, over] = [0; 2].map(AtomicU64::new);
            Place { span: Span::from_len(Iova::new(start), len).unwrap(), frames, generation, over }
        };
        let step = solid.len() / TRACKED;
        let tracked = |index: u64| Tracked { at: Iova::new(index * step + 40), written: AtomicU64::new(0), copied: AtomicU64::new(0) };
        let ground = Self {
            table,
            arena,
            readers: Arc::new(Readers::new()),
            sizes: config.sizes.and(F::SIZES),
            solid,
            places: places.into_iter().map(place).collect(),
            tracked: (0..TRACKED).map(tracked).collect(),
            plant,
            counts: Counts::default(),
            stop: AtomicBool::new(false),
            wrong: Mutex::default(),
        };
        ground.map(solid, Oa::new(SOLID_FRAMES), ground.sizes, &mut Stock::new(&ground.arena));
        ground
    }

    fn wrong(&self, what: String) {
        self.wrong.lock().unwrap().get_or_insert(what);
        self.stop.store(true, Ordering::Relaxed);
    }

    fn is_over(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn grace(&self) {
        if self.plant != Plant::NoGrace {
            self.readers.grace(DOMAIN);
        }
    }

    fn finish(&self, gather: Gather) {
        gather.finish(&self.arena, |_| self.grace());
    }

    fn flush_broken(&self) {
        assert!(!F::HITLESS.is_allowed(), "{}: a flush in the middle of an edit", F::NAME);
        self.grace();
    }

    fn map(&self, span: Span<Iova>, oa: Oa, sizes: SizeSet, stock: &mut Stock<Words>) {
        let mut gather = Gather::new();
        self.table.map(span, oa, Perm::RW, sizes, stock, &mut gather).unwrap();
        self.finish(gather);
    }
}

/// A device.
impl<F: Format> Ground<F> {
    fn read(&self, seed: u64) {
        let mut slot = self.readers.slot();
        let mut random = fastrand::Rng::with_seed(seed);
        while !self.is_over() {
            (0..4).for_each(|_| self.one_guard(&mut slot, &mut random));
            // With fewer processors than threads, a reader had better wait for its turn here than inside a guard.
            std::thread::yield_now();
        }
    }

    fn one_guard(&self, slot: &mut Slot, random: &mut fastrand::Rng) {
        let guard = slot.guard(DOMAIN);
        let mut found = [None; 8];
        for _ in 0..24 {
            let iova = Iova::new(random.u64(..self.solid.len()));
            match self.table.walk(iova) {
                Some(leaf) if leaf.oa_of(iova).get() == SOLID_FRAMES + iova.get() => {}
                None if !F::HITLESS.is_allowed() => {}
                other => self.wrong(format!("{iova}, which is always mapped, answers {other:x?}")),
            }
        }
        for found in &mut found {
            let place = &self.places[random.usize(..self.places.len())];
            let iova = place.span.start().plus(random.u64(..place.span.len()));
            *found = self.table.walk(iova).map(|leaf| (place, iova, leaf.oa_of(iova)));
        }
        for page in [random.usize(..self.tracked.len()), random.usize(..self.tracked.len())] {
            self.write(&self.tracked[page]);
        }
        // Still inside the guard: what was found may have been unmapped since, and its life may not be over.
        for (place, iova, oa) in found.iter().flatten() {
            let alive = place.over.load(Ordering::Relaxed) + 1;
            if *oa != place.oa(alive).plus(iova.offset_from(place.span.start())) {
                self.wrong(format!("{iova} answers {oa}, which is not of generation {alive} of {}", place.span));
            }
        }
        drop(guard);
        count(&self.counts.translations, 34);
        count(&self.counts.found_in_places, found.iter().flatten().count() as u64);
    }

    fn write(&self, page: &Tracked) {
        if self.table.walk(page.at).is_some() {
            if !self.table.mark_dirty(page.at) && F::DIRTY != 0 {
                self.wrong(format!("a write to {} that nobody will know of", page.at));
            }
            count(&page.written, 1);
            count(&self.counts.writes, 1);
        }
    }
}

/// A writer, which holds every `WRITERS`th place and a part of the solid span.
impl<F: Format> Ground<F> {
    fn edit(&self, writer: u64, seed: u64) {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut stock = Stock::new(&self.arena);
        let len = self.solid.len() / WRITERS;
        let own = Span::from_len(Iova::new(writer * len), len).unwrap();
        let places: Vec<_> = self.places.iter().skip(writer as usize).step_by(WRITERS as usize).collect();
        let inside = |random: &mut fastrand::Rng| {
            let lg2 = F::GRANULE_LG2 + [0, 1, 4, F::INDEX_LG2, F::INDEX_LG2 + 3][random.usize(..5)];
            Span::block(own.start().plus(random.u64(..len)), lg2)
        };
        let mut edits = 0u32;
        while !self.is_over() {
            edits += 1;
            if edits.is_multiple_of(64) {
                std::thread::yield_now();
            }
            match random.u8(..16) {
                0..4 => self.cut(inside(&mut random), &mut random, &mut stock),
                4 => self.merge(if random.u8(..4) == 0 { own } else { inside(&mut random) }),
                5 => self.read_dirty(if random.bool() { own } else { inside(&mut random) }),
                _ => self.come_or_go(places[random.usize(..places.len())], &mut random, &mut stock),
            }
        }
        for place in places.into_iter().filter(|place| place.is_mapped()) {
            self.unmap(place);
        }
    }

    fn cut(&self, span: Span<Iova>, random: &mut fastrand::Rng, stock: &mut Stock<Words>) {
        let sizes = if random.bool() { self.sizes } else { self.sizes.up_to(Lg2(F::item_lg2(1))) };
        let cuts = self.table.cut(span, sizes, stock, |_| self.flush_broken()).unwrap();
        count(&self.counts.cuts, cuts.into());
        if self.plant == Plant::WrongHalf && cuts > 0 {
            self.confuse(span.start());
        }
    }

    fn merge(&self, span: Span<Iova>) {
        let mut gather = Gather::new();
        count(&self.counts.merges, self.table.merge(span, self.sizes, &mut gather, |_| self.flush_broken()).into());
        self.finish(gather);
    }

    /// Copies what was written, as somebody does who migrates a guest. A leaf is reported as a whole, also where it sticks out.
    fn read_dirty(&self, span: Span<Iova>) {
        let (mut gather, mut dirty) = (Gather::new(), Vec::new());
        self.table.read_dirty(span, true, &mut gather, |span| dirty.push(span));
        self.finish(gather);
        count(&self.counts.dirty_reads, 1);
        if self.plant == Plant::LostBit {
            dirty.pop();
        }
        self.copy(&dirty);
    }

    fn copy(&self, dirty: &[Span<Iova>]) {
        for page in self.tracked.iter().filter(|page| dirty.iter().any(|span| span.contains(page.at))) {
            page.copied.fetch_max(page.written.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    fn come_or_go(&self, place: &Place, random: &mut fastrand::Rng, stock: &mut Stock<Words>) {
        if place.is_mapped() {
            if random.bool() {
                self.cut(Span::block(place.span.start().plus(random.u64(..place.span.len())), F::GRANULE_LG2), random, stock);
            }
            return self.unmap(place);
        }
        let generation = place.generation.load(Ordering::Relaxed) + 1;
        place.generation.store(generation, Ordering::Relaxed);
        let smallest = self.sizes.smallest().unwrap();
        // A configuration without small leaves has none for the small places.
        if place.span.is_aligned(smallest.0) && place.span.len() >= smallest.bytes() {
            let sizes = if random.bool() { self.sizes } else { SizeSet::only(smallest) };
            self.map(place.span, place.oa(generation), sizes, stock);
            count(&self.counts.maps, 1);
        }
    }

    fn unmap(&self, place: &Place) {
        let mut gather = Gather::new();
        let crossing = self.table.unmap(place.span, &mut gather);
        assert!(crossing.is_none(), "{crossing:x?} sticks out of {}", place.span);
        self.finish(gather);
        // From here on its pages may be anybody's.
        place.over.store(place.generation.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// Makes the slot of `iova` say what the one beside it says.
    fn confuse(&self, iova: Iova) {
        let (mut table, mut level) = self.table.root();
        loop {
            let slot = |slot: usize| table.plus(8 * slot as u64);
            let own = slot(F::slot(iova, level));
            match F::decode(self.arena.peek(own).unwrap(), level) {
                Entry::Table(below) => (table, level) = (below, level - 1),
                _ => return assert!(self.arena.poke(own, self.arena.peek(slot(F::slot(iova, level) ^ 1)).unwrap())),
            }
        }
    }
}

impl Place {
    /// Asked by the writer that holds it.
    fn is_mapped(&self) -> bool {
        self.generation.load(Ordering::Relaxed) != self.over.load(Ordering::Relaxed)
    }
}

impl<F: Format> Ground<F> {
    /// Two readers and two writers, for `time` and until each has done something, or until something is wrong.
    fn run(&self, time: Duration, seed: u64) {
        let c = &self.counts;
        // Leaves of one size are never cut.
        let cuts = if self.sizes.0.count_ones() > 1 { &c.cuts } else { &c.maps };
        let busy = [cuts, &c.maps, &c.dirty_reads, &c.writes, &c.found_in_places];
        let is_enough = |started: Instant| {
            let all = busy.iter().all(|counter| counter.load(Ordering::Relaxed) > 0);
            all && started.elapsed() >= time && c.translations.load(Ordering::Relaxed) >= 20_000
        };
        std::thread::scope(|scope| {
            (0..2).for_each(|reader| _ = scope.spawn(move || self.read(seed + reader)));
            (0..WRITERS).for_each(|writer| _ = scope.spawn(move || self.edit(writer, seed + 2 + writer)));
            let started = Instant::now();
            while !self.is_over() && !is_enough(started) {
                std::thread::sleep(Duration::from_millis(1));
            }
            self.stop.store(true, Ordering::Relaxed);
        });
        if self.plant != Plant::NoGrace && self.plant != Plant::WrongHalf {
            self.look_at_the_end();
        }
    }

    /// Nobody is there any more: what was written last is copied or dirty, and no table is lost.
    fn look_at_the_end(&self) {
        let (mut gather, mut dirty) = (Gather::new(), Vec::new());
        self.table.read_dirty(Span::whole(), false, &mut gather, |span| dirty.push(span));
        self.finish(gather);
        self.copy(&dirty);
        for page in self.tracked.iter().filter(|_| F::DIRTY != 0) {
            let (written, copied) = (page.written.load(Ordering::Relaxed), page.copied.load(Ordering::Relaxed));
            if written != copied {
                self.wrong(format!("{} was written {written} times, {copied} of them copied, and is clean", page.at));
            }
        }
        let in_tree = self.table.bytes_in_tables() / self.arena.table_bytes();
        if u64::from(self.arena.tables_in_use()) != in_tree {
            self.wrong(format!("{} tables are in use, {in_tree} in the tree", self.arena.tables_in_use()));
        }
    }
}

fn seed() -> u64 {
    let given = std::env::var("LOCKSTEP_STRESS_SEED").ok().map(|seed| seed.parse().expect("LOCKSTEP_STRESS_SEED is a number"));
    given.unwrap_or_else(|| fastrand::u64(..1 << 32))
}

fn seconds() -> f64 {
    let given = std::env::var("LOCKSTEP_STRESS_SECONDS").ok().map(|time| time.parse().expect("LOCKSTEP_STRESS_SECONDS is a number"));
    given.unwrap_or(4.0)
}

#[test]
fn every_translation_is_true_in_every_format() {
    struct Visitor(Duration, u64);
    impl FormatVisitor for Visitor {
        type Output = ();
        fn visit<F: Format>(self) {
            for config in F::CONFIGS {
                let ground = Ground::<F>::new(*config, Plant::Nothing);
                ground.run(self.0, self.1);
                let c = &ground.counts;
                let [translations, cuts, merges, maps, writes, reads] =
                    [&c.translations, &c.cuts, &c.merges, &c.maps, &c.writes, &c.dirty_reads]
                        .map(|counter| counter.load(Ordering::Relaxed));
                println!(
                    "{}, {}: {translations} translations, {cuts} cuts, {merges} merges, {maps} maps, {writes} writes, {reads} dirty reads",
                    F::NAME,
                    config.name
                );
                let wrong = ground.wrong.into_inner().unwrap();
                assert_eq!(wrong, None, "{}, {}, seed {}", F::NAME, config.name, self.1);
            }
        }
    }
    let seed = seed();
    println!("seed {seed}");
    let runs: usize = FormatKind::ALL.iter().map(|kind| kind.configs().len()).sum();
    let time = Duration::from_secs_f64(seconds() / runs as f64);
    for kind in FormatKind::ALL {
        kind.visit(Visitor(time, seed));
    }
}

/// The same load with something wrong on purpose, until that is noticed.
#[test]
fn planted_faults_are_noticed() {
    fn noticed<F: Format>(plant: Plant) -> String {
        let seed = seed();
        for round in 0..200 {
            let ground = Ground::<F>::new(F::CONFIGS[0], plant);
            ground.run(Duration::from_millis(100), seed + round);
            if let Some(wrong) = ground.wrong.into_inner().unwrap() {
                return wrong;
            }
        }
        panic!("{}: nobody noticed {plant:?}, seed {seed}", F::NAME);
    }
    struct Visitor;
    impl FormatVisitor for Visitor {
        type Output = ();
        fn visit<F: Format>(self) {
            for plant in [Plant::NoGrace, Plant::WrongHalf, Plant::LostBit] {
                println!("{} with {plant:?}: {}", F::NAME, noticed::<F>(plant));
            }
        }
    }
    for kind in [FormatKind::AmdV1, FormatKind::Armv8S2] {
        kind.visit(Visitor);
    }
}
