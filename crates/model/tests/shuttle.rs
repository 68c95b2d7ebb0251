//! The real transaction under shuttle's schedulers: whole conversions against each other, and against punches, merges, device changes and DMA, on locks and atomics
//! that hand over at every step. Built with `RUSTFLAGS="--cfg shuttle"`; `LOCKSTEP_SHUTTLE` is the number of runs of each test, `LOCKSTEP_SEED` the first seed.
//!
//! Left out: what the RMP and the IOTLB do inside one step, and the words of page tables between two pauses; `secure`'s and `pt`'s own tests have those.
#![cfg(shuttle)]

use addr::{Gpa, Iova, Page, Span};
use backing::{Backing, Frames};
use ioas::{Edit, Pages};
use iommu::{Access, Device};
use lockstep::{Change, Config, Dma, GuestDma, Owner, RecordedStage2, Tdisp, Trust};
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::sync::atomic::{AtomicBool, Ordering::SeqCst};
use shuttle::thread;
use std::sync::Arc;
use std::sync::Mutex;

const BYTES: u64 = 2 << 20;
const PAGE: u64 = 0x1000;
const ASID: u32 = 3;

/// What a punch takes.
const PUNCHED: std::ops::Range<u64> = 3..5;

/// A planted fault is the whole process's.
static ALONE: Mutex<()> = Mutex::new(());

struct World {
    dma: GuestDma,
    backing: Arc<Backing>,
    trusted: Arc<Device>,
    untrusted: Arc<Device>,
}

fn run_trust() -> Trust {
    Trust::Trusted { asid: ASID, vmpl: secure::Vmpl::V0, tdisp: Tdisp::Run, sdte_valid: true, vtom: None }
}

fn span(first: u64, pages: u64) -> Span<Gpa> {
    Span::from_len(Gpa::new(first * PAGE), pages * PAGE).unwrap()
}

impl World {
    fn new() -> Arc<Self> {
        let iommu = iommu::Config { table_bytes: 1 << 20, ..iommu::Config::default() };
        let dma = GuestDma::new(&Config { asid: ASID, iommu, ..Config::default() }, Arc::new(RecordedStage2::new())).unwrap();
        let backing = Backing::memfd(BYTES, Frames::Contiguous).unwrap();
        dma.add_memory(Gpa::new(0), BYTES, &backing, 0).unwrap();
        let trusted = dma.add_device("trusted", run_trust()).unwrap();
        let untrusted = dma.add_device("untrusted", Trust::Untrusted).unwrap();
        Arc::new(Self { dma, backing, trusted, untrusted })
    }

    fn convert(&self, first: u64, pages: u64, to: Owner) {
        self.dma.convert(&[Change { span: span(first, pages), to }]).unwrap();
    }

    fn is_assigned(&self, page: u64) -> bool {
        self.dma.rmp().entry(self.backing.oa(Page::new(page))).assigned()
    }

    /// The tables agree.
    fn audit(&self) {
        let report = self.dma.audit();
        assert!(report.is_clean(), "{:#?}", report.differences);
    }
}

/// An untrusted device that stays on pages for a while, and looks whether they stay what they were.
fn untrusted_dma(world: &World, pages: &[u64], gone: &AtomicBool) {
    let mut dma = Dma::new(&world.untrusted).unwrap();
    for &page in pages {
        if let Ok(slice) = dma.slice(Iova::new(page * PAGE), 8, Access::Write) {
            let may_go = PUNCHED.contains(&page) && !gone.load(SeqCst);
            for _ in 0..3 {
                thread::yield_now();
                assert!(!world.is_assigned(page), "page {page} turned private under an untrusted device");
                assert!(!may_go || !gone.load(SeqCst), "page {page} was given back under a device");
            }
            slice.write(0, &[1; 8]).unwrap();
        }
    }
}

fn trusted_dma(world: &World, pages: &[u64]) {
    let mut dma = Dma::new(&world.trusted).unwrap();
    for &page in pages {
        if let Ok(slice) = dma.slice(Iova::new(page * PAGE), 8, Access::Read) {
            let before = world.is_assigned(page);
            for _ in 0..3 {
                thread::yield_now();
                assert_eq!(world.is_assigned(page), before, "page {page} changed hands under a device");
            }
            drop(slice);
        }
    }
}

type Actor = fn(&World, &AtomicBool);

/// Runs the actors against each other, in many orders. Answers the panic, if there was one.
fn explore(name: &str, prepare: fn(&World), actors: &'static [Actor], prints: bool) -> Result<(), String> {
    let number = |name: &str, default: u64| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    let (runs, seed) = (number("LOCKSTEP_SHUTTLE", 500) as usize, number("LOCKSTEP_SEED", 1));
    println!("{name}: {runs} random runs and {runs} PCT runs from seed {seed}");
    let body = move || {
        let world = World::new();
        prepare(&world);
        let gone = Arc::new(AtomicBool::new(false));
        let start = |actor: &'static Actor| {
            let (world, gone) = (Arc::clone(&world), Arc::clone(&gone));
            thread::spawn(move || actor(&world, &gone))
        };
        let threads: Vec<_> = actors.iter().map(start).collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        world.audit();
    };
    let mut config = shuttle::Config::new();
    config.stack_size = 1 << 20;
    if !prints {
        config.failure_persistence = shuttle::FailurePersistence::None;
    }
    // A reader or writer that is never run again would be waited for.
    config.max_steps = shuttle::MaxSteps::FailAfter(1_000_000);
    let caught = std::panic::catch_unwind(move || {
        shuttle::Runner::new(RandomScheduler::new_from_seed(seed, runs), config.clone()).run(body);
        shuttle::Runner::new(PctScheduler::new_from_seed(seed, 3, runs), config).run(body);
    });
    caught.map_err(|panic| match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(panic) => panic.downcast_ref::<&str>().map_or_else(|| "a panic without words".into(), |text| (*text).into()),
    })
}

fn holds(name: &str, prepare: fn(&World), actors: &'static [Actor]) {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    explore(name, prepare, actors, true).unwrap_or_else(|text| panic!("{name}: {text}"));
}

fn finds(name: &str, plant: Option<&'static str>, prepare: fn(&World), actors: &'static [Actor], words: &str) {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let plant = plant.map(|plant| sync::fail::plant(plant, 0, u64::MAX));
    let found = explore(name, prepare, actors, false);
    assert!(plant.is_none_or(|plant| plant.fired() > 0));
    let text = found.expect_err("the planted fault was not found");
    assert!(text.contains(words), "{name}: {text}");
}

const THERE_AND_BACK: Actor = |world, _| {
    world.convert(3, 1, Owner::Private);
    world.convert(3, 1, Owner::Shared);
};
const ALL_PRIVATE: Actor = |world, _| world.convert(0, 512, Owner::Private);
const OVERLAPPING: Actor = |world, _| {
    world.convert(2, 6, Owner::Private);
    world.convert(0, 5, Owner::Shared);
};
const PUNCH: Actor = |world, gone| {
    if world.dma.punch(span(PUNCHED.start, 2)).is_ok() {
        gone.store(true, SeqCst);
    }
};
const MERGE: Actor = |world, _| _ = world.dma.merge(Gpa::new(0), u64::MAX);
const MERGE_WITHOUT_LOCK: Actor = |world, _| {
    let mut edit = Edit::new();
    Pages::of(&world.backing).merge(world.backing.pages(), &mut edit);
    edit.flush();
};
const UNTRUSTED: Actor = |world, gone| untrusted_dma(world, &[3, 9, 3], gone);
const TRUSTED: Actor = |world, _| trusted_dma(world, &[3, 4]);
const LEAVES_AND_COMES: Actor = |world, _| {
    world.dma.remove_device(&world.trusted).unwrap();
    world.dma.add_device("again", run_trust()).unwrap();
};
const BOTH_LEAVE: Actor = |world, _| {
    world.dma.remove_device(&world.trusted).unwrap();
    world.dma.remove_device(&world.untrusted).unwrap();
    world.dma.add_device("again", run_trust()).unwrap();
};

#[test]
fn overlapping_conversions() {
    holds("overlapping conversions", |_| {}, &[THERE_AND_BACK, OVERLAPPING]);
    holds("a part out of a large entry", |world| world.convert(0, 512, Owner::Private), &[THERE_AND_BACK, OVERLAPPING]);
    holds("a part and the whole", |_| {}, &[THERE_AND_BACK, ALL_PRIVATE]);
}

#[test]
fn conversion_against_punch() {
    holds("conversion against punch", |_| {}, &[|world, _| world.convert(3, 1, Owner::Shared), PUNCH, UNTRUSTED]);
    holds("punch against punch", |_| {}, &[PUNCH, PUNCH, UNTRUSTED]);
}

#[test]
fn conversion_against_dma() {
    holds("conversion against two devices", |_| {}, &[THERE_AND_BACK, UNTRUSTED, TRUSTED]);
    holds("a large entry against two devices", |world| world.convert(0, 512, Owner::Private), &[THERE_AND_BACK, UNTRUSTED, TRUSTED]);
}

#[test]
fn conversion_against_attach_and_detach() {
    holds("conversion against attach and detach", |_| {}, &[THERE_AND_BACK, LEAVES_AND_COMES, UNTRUSTED]);
    holds("conversion against a domain that goes", |_| {}, &[THERE_AND_BACK, BOTH_LEAVE]);
}

#[test]
fn conversion_against_merge() {
    holds(
        "conversion against merge",
        |world| world.convert(3, 1, Owner::Private),
        &[|world, _| world.convert(3, 1, Owner::Shared), MERGE, UNTRUSTED],
    );
    holds("conversion there and back against merge", |_| {}, &[THERE_AND_BACK, MERGE]);
}

#[test]
fn planted_faults_are_found() {
    finds("skip-grace", Some("iommu.skip_grace"), |_| {}, &[THERE_AND_BACK, UNTRUSTED], "turned private under");
    finds("skip-grace, punch", Some("iommu.skip_grace"), |_| {}, &[PUNCH, UNTRUSTED], "given back under");
    finds("ignore-punch", Some("backing.ignore_punch"), |_| {}, &[PUNCH, UNTRUSTED], "given back under");
    finds("leave-shared-leaf", Some("convert.leave_leaf"), |_| {}, &[THERE_AND_BACK, UNTRUSTED], "page 3");
    // Small leaves that could be joined, of which one is just being taken out.
    let small: fn(&World) = |world| {
        world.convert(3, 1, Owner::Private);
        world.convert(3, 1, Owner::Shared);
    };
    finds("merge without the lock", None, small, &[|world, _| world.convert(3, 1, Owner::Private), MERGE_WITHOUT_LOCK], "");
}
