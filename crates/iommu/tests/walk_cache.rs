//! Walks that begin at cached tables: they find what a walk from the top finds, through every edit that takes a table out, and a table that is
//! in use again is in no cache.

mod common;

use addr::{Address, Iova, Lg2, SizeSet};
use backing::{Backing, Frames};
use common::{Machine, map_in, span};
use lockstep_iommu_device::{Access, Config, Dma, DomainConfig, FaultKind};
use pt::{FormatKind, Gather, Perm};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const M2: u64 = 2 << 20;
/// In reach of the smallest tree; most formats begin low enough to grow to it.
const AT: Iova = Iova::new(0x4000_0000);

/// Planted faults are the process's, so all tests of this file take turns.
static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());

fn turn() -> std::sync::MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// An IOTLB of the smallest size, so that most accesses walk.
fn machine(len: u64, format: FormatKind, walk_cache_entries: usize) -> Machine {
    let domain = DomainConfig { format, ..DomainConfig::default() };
    let config = Config { iotlb_entries: 16, walk_cache_entries, domain, ..Config::default() };
    Machine::with(Backing::memfd(len, Frames::Contiguous).unwrap(), config)
}

/// Where a device finds a byte, as an offset in the memory.
fn found(machine: &Machine, dma: &mut Dma, at: Iova) -> Option<u64> {
    match dma.translate(at, Access::Read) {
        Ok(found) => Some(found.oa.offset_from(machine.memory.window().start())),
        Err(fault) => {
            assert_eq!(fault.reason, FaultKind::NotMapped, "{fault}");
            None
        }
    }
}

#[test]
fn a_walk_begins_at_the_table_that_the_last_one_came_by() {
    let _turn = turn();
    for (entries, short) in [(64, 511), (0, 0)] {
        let machine = machine(M2, FormatKind::AmdV1, entries);
        machine.map_small(AT, 0, M2);
        let mut dma = machine.dma();
        for page in 0..512 {
            assert_eq!(found(&machine, &mut dma, AT.plus(page << 12)), Some(page << 12));
        }
        let stats = dma.stats();
        assert_eq!((stats.walks, stats.short_walks), (512, short), "{entries} entries");
    }
}

/// In every format: pages, then leaves of the sizes that it has, cut, merged, unmapped and mapped elsewhere, in a tree that grows meanwhile. One context
/// keeps all that it can and another keeps nothing; they agree.
#[test]
fn every_edit_in_every_format() {
    let _turn = turn();
    for kind in FormatKind::ALL.iter().copied() {
        let len = 8 * M2;
        let machine = machine(len, kind, 64);
        let (mut dma, fresh) = (machine.dma(), || machine.dma());
        let mut random = fastrand::Rng::with_seed(7);
        let mut look = |what: &str| {
            for _ in 0..64 {
                let at = AT.plus(random.u64(..2 * len));
                assert_eq!(found(&machine, &mut dma, at), found(&machine, &mut fresh(), at), "{kind}: {at} after {what}");
            }
            // Every region is known before the next edit.
            for region in 0..2 * len / M2 {
                found(&machine, &mut dma, AT.plus(region * M2 + 5));
            }
        };
        for round in 0..6 {
            let small = if round % 2 == 0 { SizeSet::only(kind.granule()) } else { SizeSet::ALL };
            machine.map(AT, 0, len, Perm::RW, small);
            look("map");
            // The other way round, in the second half.
            for block in 0..len / M2 {
                machine.map(AT.plus(len + block * M2), len - M2 - block * M2, M2, Perm::RW, small);
            }
            look("map behind it");
            machine.merge(span(AT, len));
            look("merge");
            for block in 0..4 {
                machine.cut(span(AT.plus(block * 3 * M2 + 0x3000), 0x1000));
            }
            look("cut");
            machine.merge(span(AT, 2 * len));
            look("merge of all");
            machine.cut(span(AT.plus(M2 / 2), len));
            machine.unmap(span(AT.plus(M2 / 2), len));
            look("unmap");
            if round == 2 {
                // The tree grows over what is cached, in formats that can.
                let last = kind.aperture().last();
                map_in(&machine.domain, last.align_down(12), machine.oa(0), 0x1000, Perm::RW, SizeSet::ALL);
                look("growth");
            }
            machine.unmap(span(AT, 2 * len));
            look("unmap of all");
        }
        assert!(dma.stats().short_walks > 500, "{kind}: {:?}", dma.stats());
    }
}

/// A merge drops the way to the table and no translation.
#[test]
fn a_merge_costs_no_cached_translation() {
    let _turn = turn();
    let machine = machine(M2, FormatKind::AmdV1, 64);
    machine.map_small(AT, 0, M2);
    let mut dma = machine.dma();
    (0..4).for_each(|page| assert_eq!(found(&machine, &mut dma, AT.plus(page << 12)), Some(page << 12)));
    assert_eq!((dma.stats().walks, dma.stats().short_walks), (4, 3));
    assert_eq!(machine.merge(span(AT, M2)), 1);
    (0..4).for_each(|page| assert_eq!(found(&machine, &mut dma, AT.plus(page << 12)), Some(page << 12)));
    assert_eq!((dma.stats().walks, dma.stats().short_walks), (4, 3), "still cached");
    assert_eq!(found(&machine, &mut dma, AT.plus(0x5000)), Some(0x5000));
    assert_eq!((dma.stats().walks, dma.stats().short_walks), (5, 3), "from the top");
}

/// The planted fault without any race: the table becomes that of another region, and who still goes there finds the other's pages.
#[test]
fn a_merge_that_forgets_the_walkers_leads_elsewhere() {
    let _turn = turn();
    let machine = machine(2 * M2, FormatKind::AmdV1, 64);
    machine.map_small(AT, 0, M2);
    let mut dma = machine.dma();
    assert_eq!(found(&machine, &mut dma, AT), Some(0));
    let plant = sync::fail::plant("pt.merge_forgets_walkers", 0, 1);
    assert_eq!(machine.merge(span(AT, M2)), 1);
    assert_eq!(plant.fired(), 1);
    drop(plant);
    machine.map_small(AT.plus(M2), M2, M2);
    assert_eq!(found(&machine, &mut dma, AT.plus(0x1000)), Some(M2 + 0x1000), "the planted fault shows");
    assert_eq!(found(&machine, &mut machine.dma(), AT.plus(0x1000)), Some(0x1000), "and the table itself is right");
}

struct Outcome {
    accesses: u64,
    short: u64,
    rounds: u64,
    wrong: u64,
}

/// Two regions side by side: one is merged, the other mapped in pages, over and over and in turn, so that each time the table that one gave
/// back serves the other. Readers go to the first, which says the same all the time, and whatever is in it says where it belongs.
fn run(enough: u64, enough_rounds: u64) -> Outcome {
    let machine = machine(2 * M2, FormatKind::AmdV1, 64);
    for page in 0..1024u64 {
        machine.poke(page << 12, &(page + 1).to_le_bytes());
    }
    let (first, second) = (span(AT, M2), span(AT.plus(M2), M2));
    machine.map_small(AT, 0, M2);
    let [accesses, short, wrong] = [const { AtomicU64::new(0) }; 3];
    let stop = AtomicBool::new(false);
    let mut rounds = 0;
    std::thread::scope(|scope| {
        for reader in 0..2 {
            let (machine, accesses, short, wrong, stop) = (&machine, &accesses, &short, &wrong, &stop);
            scope.spawn(move || {
                let mut dma = machine.dma();
                let mut random = fastrand::Rng::with_seed(reader);
                while !stop.load(Ordering::Relaxed) {
                    for _ in 0..256 {
                        let page = random.u64(..512);
                        let mut word = [0; 8];
                        let done = dma.read(AT.plus(page << 12), &mut word);
                        if done.is_err() || u64::from_le_bytes(word) != page + 1 {
                            wrong.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    accesses.fetch_add(256, Ordering::Relaxed);
                }
                short.fetch_add(dma.stats().short_walks, Ordering::Relaxed);
            });
        }
        let give_up = Instant::now() + Duration::from_secs(60);
        let going = || wrong.load(Ordering::Relaxed) == 0 && Instant::now() < give_up;
        while (rounds < enough_rounds || accesses.load(Ordering::Relaxed) < enough) && going() {
            assert_eq!(machine.merge(first), 1);
            machine.map_small(second.start(), M2, M2);
            // Somebody else's invalidation of the leaves, so that all are walked for.
            let mut gather = Gather::new();
            gather.add(first);
            machine.domain.flush(gather);
            std::thread::yield_now();
            let mut gather = Gather::new();
            assert_eq!(machine.domain.table().unmap(second, &mut gather), None);
            machine.domain.flush(gather);
            machine.domain.cut(first, SizeSet::only(Lg2::K4), &mut pt::Stock::new(machine.iommu.arena())).unwrap();
            let mut gather = Gather::new();
            gather.add(first);
            machine.domain.flush(gather);
            std::thread::yield_now();
            rounds += 1;
        }
        stop.store(true, Ordering::Relaxed);
    });
    Outcome { accesses: accesses.into_inner(), short: short.into_inner(), rounds, wrong: wrong.into_inner() }
}

const ENOUGH: u64 = if cfg!(debug_assertions) { 200_000 } else { 2_000_000 };

#[test]
fn a_table_in_use_again_is_in_no_cache() {
    let _turn = turn();
    let outcome = run(ENOUGH, 500);
    let Outcome { accesses, short, rounds, wrong } = outcome;
    println!("{accesses} accesses, {short} walks from a cached table, {rounds} tables given back and used again, {wrong} wrong");
    assert_eq!(wrong, 0);
    assert!(accesses >= ENOUGH && short > 1000 && rounds >= 500);
}

/// The same detector sees the planted fault. A table that is given away while a walk is inside it takes a moment that is too short to be met here;
/// loom meets it (crate `iotlb`, `loom_walks`).
#[test]
fn a_planted_fault_is_seen() {
    let _turn = turn();
    let plant = sync::fail::plant("pt.merge_forgets_walkers", 4, u64::MAX);
    let Outcome { accesses, rounds, wrong, .. } = run(50 * ENOUGH, 50_000);
    println!("{wrong} wrong in {accesses} accesses, {rounds} rounds");
    assert!(plant.fired() > 0 && wrong > 0, "unseen in {accesses} accesses");
}

/// Nothing of one device's old domain is in the way of the new one's.
#[test]
fn another_domain_has_other_tables() {
    let _turn = turn();
    let machine = machine(2 * M2, FormatKind::AmdV1, 64);
    machine.map_small(AT, 0, M2);
    let other = machine.iommu.domain().unwrap();
    map_in(&other, AT, machine.oa(M2), M2, Perm::RW, SizeSet::only(Lg2::K4));
    let mut dma = machine.dma();
    for (domain, offset) in [(&machine.domain, 0), (&other, M2), (&machine.domain, 0)] {
        machine.device.attach(domain).unwrap();
        for page in 0..32 {
            assert_eq!(found(&machine, &mut dma, AT.plus(page << 12)), Some(offset + (page << 12)));
        }
    }
}
