//! The promise of a flush, under load: while a writer moves pages about, a reader that finds one through a translation finds it in that
//! life, and after the flush returned nothing stale is ever seen (I-4).
//!
//! Every page has a frame of each of two colours. The writer maps one or the other, and after a flush it writes a poison mark into the frame that it
//! took away, and takes the mark off again before the frame is mapped. So a reader that copies a mark used a translation after its
//! grace period.

mod common;

use addr::{Address, Lg2, SizeSet};
use backing::Frames;
use common::{BASE, Machine, map_in, span};
use lockstep_iommu_device::{Access, Dma, FaultKind};
use pt::{Gather, Perm};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const PAGES: u64 = 8;
const POISON: u64 = 0xdead_dead_dead_dead;

/// What lies in the frame of a page and a colour while it may be reached.
fn content(page: u64, colour: u64) -> u64 {
    0x1000 + page * 2 + colour
}

struct Outcome {
    accesses: u64,
    refused: u64,
    moves: u64,
    stale: u64,
}

/// Runs readers against one writer until `enough` accesses and `enough_moves` were made, or something stale was seen.
fn run(enough: u64, enough_moves: u64, readers: u64, block_pages: u64) -> Outcome {
    let machine = Machine::new((2 * PAGES * block_pages) << 12, Frames::Contiguous);
    let bytes = block_pages << 12;
    let offset = |page: u64, colour: u64| (page * 2 + colour) * bytes;
    let at = |page: u64| BASE.plus(page * bytes);
    let put = |page: u64, colour: u64, value: u64| {
        machine.memory.host(machine.oa(offset(page, colour)), 8).unwrap().store_u64(0, value).unwrap();
    };
    let sizes = SizeSet::only(Lg2(12 + block_pages.trailing_zeros() as u8));
    for page in 0..PAGES {
        (0..2).for_each(|colour| put(page, colour, if colour == 0 { content(page, 0) } else { POISON }));
        map_in(&machine.domain, at(page), machine.oa(offset(page, 0)), bytes, Perm::RW, sizes);
    }
    let (accesses, refused, stale, stop) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let mut moves = 0;
    std::thread::scope(|scope| {
        for reader in 0..readers {
            let mut dma = Dma::new(&machine.device).unwrap();
            let (accesses, refused, stale, stop) = (&accesses, &refused, &stale, &stop);
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(reader);
                while !stop.load(Ordering::Relaxed) {
                    for _ in 0..256 {
                        let page = random.u64(0..PAGES);
                        let mut word = [0; 8];
                        match dma.read(at(page), &mut word) {
                            Ok(()) => {
                                let found = u64::from_le_bytes(word);
                                if found != content(page, 0) && found != content(page, 1) {
                                    stale.fetch_add(1, Ordering::Relaxed);
                                }
                            }
                            Err(fault) if fault.reason == FaultKind::NotMapped => _ = refused.fetch_add(1, Ordering::Relaxed),
                            Err(fault) => panic!("{fault}"),
                        }
                    }
                    accesses.fetch_add(256, Ordering::Relaxed);
                }
            });
        }
        let mut random = fastrand::Rng::with_seed(99);
        let mut colours = [0; PAGES as usize];
        let give_up = Instant::now() + Duration::from_secs(60);
        let short = |moves| accesses.load(Ordering::Relaxed) < enough || moves < enough_moves;
        while short(moves) && stale.load(Ordering::Relaxed) == 0 && Instant::now() < give_up {
            let page = random.u64(0..PAGES);
            let (old, new) = (colours[page as usize], 1 - colours[page as usize]);
            let mut gather = Gather::new();
            assert_eq!(machine.domain.table().unmap(span(at(page), bytes), &mut gather), None);
            machine.domain.flush(gather);
            put(page, old, POISON);
            put(page, new, content(page, new));
            map_in(&machine.domain, at(page), machine.oa(offset(page, new)), bytes, Perm::RW, sizes);
            colours[page as usize] = new;
            moves += 1;
            if moves % 16 == 0 {
                // With two processors, readers need a chance to fill their caches.
                std::thread::yield_now();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    Outcome { accesses: accesses.into_inner(), refused: refused.into_inner(), moves, stale: stale.into_inner() }
}

fn show(what: &str, outcome: &Outcome) {
    let Outcome { accesses, refused, moves, stale } = outcome;
    println!("{what}: {accesses} accesses, {refused} refused, {moves} moves, {stale} stale");
}

/// Planted faults are the process's, so all tests of this file take turns.
static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());

fn turn() -> std::sync::MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

const ENOUGH: u64 = if cfg!(debug_assertions) { 200_000 } else { 2_000_000 };

const MOVES: u64 = if cfg!(debug_assertions) { 200 } else { 2_000 };

#[test]
fn nothing_stale_after_a_flush() {
    let _turn = turn();
    for (readers, block_pages) in [(2, 1), (1, 8)] {
        let outcome = run(ENOUGH, MOVES, readers, block_pages);
        show(&format!("{readers} readers, leaves of {block_pages} pages"), &outcome);
        assert_eq!(outcome.stale, 0);
        assert!(outcome.accesses >= ENOUGH && outcome.moves >= MOVES);
    }
}

/// Each planted fault breaks the promise in its own way; the same detector sees each.
#[test]
fn planted_faults_are_seen() {
    let _turn = turn();
    for name in ["iommu.skip_invalidate", "iommu.late_fill", "iommu.skip_grace"] {
        let plant = sync::fail::plant(name, 0, u64::MAX);
        let outcome = run(50 * ENOUGH, 50 * MOVES, 1, 1);
        show(name, &outcome);
        assert!(plant.fired() > 0, "{name} never fired");
        assert!(outcome.stale > 0, "{name} went unseen in {} accesses", outcome.accesses);
    }
}

/// The late fill without any race: the walk is before the unmap, the fill after it.
#[test]
fn a_late_fill_outlives_the_unmap() {
    let _turn = turn();
    let machine = Machine::new(2 << 20, Frames::Contiguous);
    machine.map_small(BASE, 0, 0x1000);
    let mut dma = machine.dma();
    let plant = sync::fail::plant("iommu.late_fill", 0, 1);
    dma.translate(BASE, Access::Read).unwrap();
    machine.unmap(span(BASE, 0x1000));
    assert_eq!(plant.fired(), 1);
    assert!(dma.translate(BASE, Access::Read).is_ok(), "the planted fault shows");
    drop(plant);
    machine.map_small(BASE, 0, 0x1000);
    machine.unmap(span(BASE, 0x1000));
    assert!(dma.translate(BASE, Access::Read).is_err(), "and without it the promise holds");
}

#[test]
fn a_skipped_invalidation_leaves_the_cache_as_it_was() {
    let _turn = turn();
    let machine = Machine::new(2 << 20, Frames::Contiguous);
    machine.map_small(BASE, 0, 0x1000);
    let mut dma = machine.dma();
    dma.translate(BASE, Access::Read).unwrap();
    let plant = sync::fail::plant("iommu.skip_invalidate", 0, 1);
    machine.unmap(span(BASE, 0x1000));
    assert!(dma.translate(BASE, Access::Read).is_ok(), "the planted fault shows");
    assert_eq!(plant.fired(), 1);
    drop(plant);
    assert!(machine.dma().translate(BASE, Access::Read).is_err());
}
