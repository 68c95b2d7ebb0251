//! Devices with translation caches of their own: a flush ends with an answer or with a quarantine, and nothing stale is usable after either.

mod common;

use addr::{Address, Gpa, Iova, Lg2, SizeSet, Span};
use backing::Frames;
use common::{ASID, BASE, Machine, map_in, span};
use lockstep_iommu_device::{AtsDma, Config, Dma, FaultKind, Iommu, SystemRmp, Tdisp, Trust};
use pt::{Gather, Perm};
use secure::{Reason, RmpSize, RmpState, Vmpl};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const TIMEOUT: Duration = Duration::from_millis(100);

/// Planted faults are the process's, so all tests of this file take turns.
static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());

fn turn() -> std::sync::MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn ats(machine: &Machine) -> AtsDma {
    AtsDma::new(&machine.device).unwrap()
}

#[test]
fn a_translation_is_asked_for_once_and_goes_with_the_mapping() {
    let _turn = turn();
    let machine = Machine::new(4 << 20, Frames::Contiguous);
    machine.map(BASE, 0, 2 << 20, Perm::RW, SizeSet::ALL);
    machine.map_small(BASE.plus(2 << 20), 2 << 20, 0x4000);
    let mut dma = ats(&machine);
    dma.write(BASE.plus(0x1f_fffc), b"over two leaves").unwrap();
    assert_eq!(machine.peek(0x1f_fffc, 15), b"over two leaves");
    assert_eq!((dma.cached(), dma.requests()), (2, 2));
    let mut back = [0; 15];
    dma.read(BASE.plus(0x1f_fffc), &mut back).unwrap();
    assert_eq!((&back, dma.requests()), (b"over two leaves", 2));
    machine.unmap(span(BASE.plus(2 << 20), 0x1000));
    assert_eq!(dma.cached(), 1, "the other leaf stays");
    let fault = dma.write(BASE.plus(0x1f_fffc), b"over two leaves").unwrap_err();
    assert_eq!((fault.reason, fault.done, fault.iova), (FaultKind::NotMapped, 4, BASE.plus(2 << 20)));
    let stats = machine.device.ats();
    assert_eq!((stats.caches, stats.sent, stats.timeouts, stats.quarantines), (1, 1, 0, 0));
    drop(dma);
    machine.unmap(span(BASE, 2 << 20));
    assert_eq!((machine.device.ats().caches, machine.device.ats().sent), (0, 1), "a cache that is gone is asked nothing");
}

/// A merge takes a table and changes no translation: walkers hear of it, devices do not.
#[test]
fn a_merge_is_nothing_to_a_device() {
    let _turn = turn();
    let machine = Machine::new(2 << 20, Frames::Contiguous);
    machine.map_small(BASE, 0, 2 << 20);
    let mut dma = ats(&machine);
    dma.write(BASE, b"before").unwrap();
    for _ in 0..2000 {
        machine.merge(span(BASE, 2 << 20));
        machine.cut(span(BASE, 0x1000));
        machine.cut(span(BASE.plus(0x1000), 0x1000));
    }
    assert!(machine.domain.flush_stats().spans >= 2000, "each merge is in the log");
    let stats = machine.device.ats();
    assert_eq!((stats.sent, stats.timeouts, dma.cached()), (0, 0, 1));
    dma.write(BASE, b"after").unwrap();
    assert_eq!(dma.requests(), 1);
    // And the log was not overrun meanwhile, for one who is asked now.
    machine.unmap(span(BASE.plus(0x1000), 0x1000));
    assert_eq!((machine.device.ats().sent, dma.cached()), (1, 1));
}

/// Read translations don't serve writes: the page table has to learn of those (dirty bits).
#[test]
fn writes_are_asked_for_as_such() {
    let _turn = turn();
    let machine = Machine::new(2 << 20, Frames::Contiguous);
    machine.map(BASE, 0, 0x1000, Perm::READ, SizeSet::ALL);
    machine.map_small(BASE.plus(0x1000), 0x1000, 0x1000);
    let mut dma = ats(&machine);
    dma.read(BASE, &mut [0; 8]).unwrap();
    assert_eq!(dma.write(BASE, &[1]).unwrap_err().reason, FaultKind::NoPermission);
    let page = BASE.plus(0x1000);
    dma.write(page, &[1]).unwrap();
    machine.domain.track_dirty(true);
    dma.read(page, &mut [0; 8]).unwrap();
    assert!(!machine.domain.table().walk(page).unwrap().dirty);
    dma.write(page, &[2]).unwrap();
    assert!(machine.domain.table().walk(page).unwrap().dirty, "written after tracking began");
}

#[test]
fn a_device_that_does_not_answer_is_quarantined_in_time() {
    let _turn = turn();
    let machine = Machine::new(2 << 20, Frames::Contiguous);
    machine.map_small(BASE, 0, 0x4000);
    let (mut dma, mut plain) = (ats(&machine), machine.dma());
    dma.write(BASE, b"cached").unwrap();
    dma.write(BASE.plus(0x3000), b"cached").unwrap();
    dma.set_mute(true);
    let began = Instant::now();
    machine.unmap(span(BASE, 0x2000));
    let took = began.elapsed();
    assert!(took >= TIMEOUT && took < 20 * TIMEOUT, "{took:?}");
    assert!(machine.device.is_quarantined());
    assert_eq!(dma.cached(), 2, "the device still has what it was to forget");
    // Translated or not, mapped or not, whatever its trust says.
    let run = Trust::Trusted { asid: ASID, vmpl: Vmpl::V0, tdisp: Tdisp::Run, sdte_valid: true, vtom: None };
    for trust in [Trust::Untrusted, run] {
        machine.device.set_trust(trust).unwrap();
        for page in [0, 0x3000] {
            let at = BASE.plus(page);
            assert_eq!(dma.read(at, &mut [0; 8]).unwrap_err().reason, FaultKind::Quarantined);
        }
        assert_eq!(plain.read(BASE.plus(0x3000), &mut [0; 8]).unwrap_err().reason, FaultKind::Quarantined);
    }
    machine.device.set_trust(Trust::Untrusted).unwrap();
    let log = machine.iommu.faults().drain();
    let fault = log.iter().find(|fault| fault.reason == FaultKind::NotAnswered).expect("an event");
    assert_eq!((fault.device, fault.iova, fault.reason.amd_event()), (machine.device.id(), BASE, Some(0x7)));
    assert_eq!(machine.device.unanswered(), Some(span(BASE, 0x2000)));
    // Nobody waits for it again.
    let began = Instant::now();
    machine.unmap(span(BASE.plus(0x2000), 0x1000));
    assert!(began.elapsed() < TIMEOUT);
    let stats = machine.device.ats();
    assert_eq!((stats.sent, stats.timeouts, stats.quarantines), (1 + 3 + 1, 1, 1), "two unmaps, and everything at each change of trust");

    machine.device.reset().unwrap();
    assert!(!machine.device.is_quarantined());
    assert_eq!(dma.cached(), 0);
    dma.set_mute(false);
    dma.write(BASE.plus(0x3000), b"back").unwrap();
    plain.read(BASE.plus(0x3000), &mut [0; 8]).unwrap();
    machine.unmap(span(BASE.plus(0x3000), 0x1000));
    assert!(!machine.device.is_quarantined());
    assert_eq!(dma.read(BASE.plus(0x3000), &mut [0; 8]).unwrap_err().reason, FaultKind::NotMapped);
}

/// An edit over several domains sends in all before it waits in any.
#[test]
fn time_outs_overlap() {
    let _turn = turn();
    let machine = Machine::new(2 << 20, Frames::Contiguous);
    let domains: Vec<_> = (0..3).map(|_| machine.iommu.domain().unwrap()).collect();
    let devices: Vec<_> = (0..3).map(|at| machine.iommu.device(&format!("mute {at}"))).collect();
    let mut dmas = Vec::new();
    for (domain, device) in domains.iter().zip(&devices) {
        device.attach(domain).unwrap();
        map_in(domain, BASE, machine.oa(0), 0x1000, Perm::RW, SizeSet::ALL);
        let mut dma = AtsDma::new(device).unwrap();
        dma.read(BASE, &mut [0]).unwrap();
        dma.set_mute(true);
        dmas.push(dma);
    }
    let began = Instant::now();
    let mut gather = Gather::new();
    gather.add(span(BASE, 0x1000));
    gather.finish(machine.iommu.arena(), |gather| domains.iter().for_each(|domain| domain.invalidate(gather)));
    domains.iter().for_each(|domain| domain.wait());
    let took = began.elapsed();
    assert!(took >= TIMEOUT && took < 2 * TIMEOUT, "{took:?}");
    assert!(devices.iter().all(|device| device.is_quarantined()));
}

#[test]
fn a_change_of_domain_or_identity_empties_the_caches() {
    let _turn = turn();
    let machine = Machine::new(2 << 20, Frames::Contiguous);
    let other = machine.iommu.domain().unwrap();
    machine.map_small(BASE, 0, 0x1000);
    map_in(&other, BASE, machine.oa(0x1000), 0x1000, Perm::RW, SizeSet::ALL);
    machine.poke(0, b"one");
    machine.poke(0x1000, b"two");
    let mut dma = ats(&machine);
    let mut seen = [0; 3];
    dma.read(BASE, &mut seen).unwrap();
    assert_eq!(&seen, b"one");
    machine.device.attach(&other).unwrap();
    assert_eq!(dma.cached(), 0);
    dma.read(BASE, &mut seen).unwrap();
    assert_eq!(&seen, b"two");
    // The domain that was left asks nothing any more; the one that was joined does.
    let sent = machine.device.ats().sent;
    machine.unmap(span(BASE, 0x1000));
    assert_eq!((machine.device.ats().sent, dma.cached()), (sent, 1));
    machine.device.detach().unwrap();
    assert_eq!((dma.cached(), dma.read(BASE, &mut seen).unwrap_err().reason), (0, FaultKind::NotAttached));
    machine.device.attach(&other).unwrap();
    dma.read(BASE, &mut seen).unwrap();
    dma.set_mute(true);
    machine.device.detach().unwrap();
    assert!(machine.device.is_quarantined(), "it may have kept what it had");
    machine.device.attach(&machine.domain).unwrap();
    assert!(machine.device.is_quarantined(), "and attaching it elsewhere does not help");
    assert_eq!(dma.read(BASE, &mut seen).unwrap_err().reason, FaultKind::Quarantined);
}

#[test]
fn who_misses_more_than_the_queue_holds_forgets_everything() {
    let _turn = turn();
    let machine = Machine::new(8 << 20, Frames::Contiguous);
    machine.map_small(BASE, 0, 8 << 20);
    let mut dma = ats(&machine);
    dma.read(BASE, &mut [0]).unwrap();
    dma.read(BASE.plus(0x7f_f000), &mut [0]).unwrap();
    assert_eq!(dma.cached(), 2);
    let mut gather = Gather::new();
    gather.reserve(3000);
    // No two in a row are neighbours, which would be one span.
    (0..3000).for_each(|page| gather.add(span(BASE.plus((page * 7 % 1024) << 12), 0x1000)));
    assert!(gather.spans().count() > 1024);
    gather.finish(machine.iommu.arena(), |gather| machine.domain.invalidate(gather));
    machine.domain.wait();
    assert_eq!(dma.cached(), 0);
    assert!(!machine.device.is_quarantined());
}

/// The secure world has the last word on translated requests, too, as far as it knows the page.
#[test]
fn an_owner_that_changed_refuses_a_stale_translation() {
    let _turn = turn();
    let machine = Machine::new(4 << 20, Frames::Contiguous);
    machine.map(BASE, 0, 2 << 20, Perm::RW, SizeSet::ALL);
    let mut dma = ats(&machine);
    dma.read(BASE, &mut [0; 8]).unwrap();
    machine.make_private(0x5000, Gpa::new(0x9000), RmpSize::K4);
    // Page by page, since the leaf is not known: the neighbour is still there.
    dma.read(BASE.plus(0x4000), &mut [0; 0x1000]).unwrap();
    let fault = dma.read(BASE.plus(0x4800), &mut [0; 0x1000]).unwrap_err();
    assert_eq!((fault.reason, fault.iova, fault.done), (FaultKind::SecureTranslated, BASE.plus(0x5000), 0x800));
    assert_eq!((fault.refusal.unwrap().reason, fault.reason.amd_event()), (Reason::Assigned, Some(0xd)));
    // A new translation is checked as a whole leaf.
    let mut fresh = ats(&machine);
    assert_eq!(fresh.read(BASE.plus(0x4000), &mut [0; 8]).unwrap_err().reason, FaultKind::Secure);

    // Trusted: owner, validation and permission are known by the page, its address is not.
    let trust = |asid| Trust::Trusted { asid, vmpl: Vmpl::V0, tdisp: Tdisp::Run, sdte_valid: true, vtom: None };
    machine.device.set_trust(trust(ASID)).unwrap();
    machine.make_private(0x20_0000, Gpa::new(0x7000), RmpSize::K4);
    machine.map_small(Iova::new(0x7000), 0x20_0000, 0x1000);
    dma.write(Iova::new(0x7000), b"mine").unwrap();
    machine.iommu.rmp().rmpupdate(machine.oa(0x20_0000), RmpState::private(Gpa::new(0x7000), RmpSize::K4, ASID + 1)).unwrap();
    let fault = dma.write(Iova::new(0x7000), b"theirs").unwrap_err();
    assert_eq!((fault.reason, fault.refusal.unwrap().reason), (FaultKind::SecureTranslated, Reason::WrongAsid));
    machine.iommu.rmp().rmpupdate(machine.oa(0x20_0000), RmpState::shared(RmpSize::K4)).unwrap();
    dma.write(Iova::new(0x7000), b"ours").unwrap();
}

#[test]
fn a_false_answer_leaves_the_cache_as_it_was() {
    let _turn = turn();
    let machine = Machine::new(2 << 20, Frames::Contiguous);
    machine.map_small(BASE, 0, 0x1000);
    let mut dma = ats(&machine);
    dma.read(BASE, &mut [0]).unwrap();
    let plant = sync::fail::plant("iommu.ats_false_answer", 0, 1);
    machine.unmap(span(BASE, 0x1000));
    assert_eq!((plant.fired(), dma.cached()), (1, 1));
    drop(plant);
    let mut found = Vec::new();
    machine.domain.each_cached_by_devices(span(BASE.plus(0x800), 0x10), |device, part, oa| found.push((device, part, oa)));
    assert_eq!(found, [(machine.device.id(), span(BASE.plus(0x800), 0x10), machine.oa(0x800))], "an audit sees it");
    assert!(dma.read(BASE, &mut [0]).is_ok(), "the planted fault shows");
}

/// Attach, detach, flushes, resets and caches that come and go, all at once: nothing hangs, and at the end all is in order.
#[test]
fn everything_at_once_comes_to_an_end() {
    let _turn = turn();
    let iommu = Iommu::new(&Config { ats_timeout: Duration::from_millis(3), ..Config::default() }, Arc::new(SystemRmp::new())).unwrap();
    let memory = backing::Backing::memfd(2 << 20, Frames::Contiguous).unwrap();
    let domains = [iommu.domain().unwrap(), iommu.domain().unwrap()];
    let device = iommu.device("nic");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for (seed, domain) in [(1, &domains[0]), (2, &domains[1]), (3, &domains[0])] {
            let (stop, memory) = (&stop, &memory);
            scope.spawn(move || {
                let at = BASE.plus(seed << 12);
                while !stop.load(Ordering::Relaxed) {
                    map_in(domain, at, memory.window().start(), 0x1000, Perm::RW, SizeSet::ALL);
                    let mut gather = Gather::new();
                    assert_eq!(domain.table().unmap(span(at, 0x1000), &mut gather), None);
                    domain.flush(gather);
                    std::thread::yield_now();
                }
            });
        }
        for seed in 0..2 {
            let (stop, device) = (&stop, &device);
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(seed);
                while !stop.load(Ordering::Relaxed) {
                    let mut dma = AtsDma::new(device).unwrap();
                    for _ in 0..100 {
                        let _ = dma.read(BASE.plus(random.u64(0..4) << 12), &mut [0; 64]);
                        if random.u8(..) == 0 {
                            dma.set_mute(random.bool());
                        }
                    }
                }
            });
        }
        let mut random = fastrand::Rng::with_seed(9);
        let until = Instant::now() + Duration::from_millis(1500);
        while Instant::now() < until {
            match random.u8(..4) {
                0 => device.detach().unwrap(),
                1 => device.reset().unwrap(),
                _ => device.attach(&domains[random.usize(..2)]).unwrap(),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        stop.store(true, Ordering::Relaxed);
    });
    println!("{:?}", device.ats());
    assert_eq!(device.ats().caches, 0);
    device.reset().unwrap();
    device.attach(&domains[0]).unwrap();
    map_in(&domains[0], BASE, memory.window().start(), 0x1000, Perm::RW, SizeSet::ALL);
    AtsDma::new(&device).unwrap().read(BASE, &mut [0; 8]).unwrap();
}

const PAGES: u64 = 8;
const POISON: u64 = 0xdead_dead_dead_dead;

fn content(page: u64, colour: u64) -> u64 {
    0x1000 + page * 2 + colour
}

#[derive(Debug)]
struct Outcome {
    accesses: u64,
    moves: u64,
    stale: u64,
    quarantines: u64,
}

/// Devices with caches against a writer that moves pages, as in `stress.rs`: each page has a frame of each of two colours, and the frame that was
/// taken away holds a poison mark until it is mapped again. With `silent`, the devices stop answering in turns and are reset a while
/// later.
fn run(enough_moves: u64, devices: u64, silent: bool) -> Outcome {
    let machine = Machine::new((2 * PAGES) << 12, Frames::Contiguous);
    let iommu = Iommu::new(
        &Config { ats_timeout: Duration::from_millis(if silent { 2 } else { 1000 }), ..Config::default() },
        Arc::clone(machine.iommu.rmp()),
    )
    .unwrap();
    let domain = iommu.domain().unwrap();
    let offset = |page: u64, colour: u64| (page * 2 + colour) << 12;
    let at = |page: u64| BASE.plus(page << 12);
    let put = |page: u64, colour: u64, value: u64| {
        machine.memory.host(machine.oa(offset(page, colour)), 8).unwrap().store_u64(0, value).unwrap();
    };
    let sizes = SizeSet::only(Lg2(12));
    for page in 0..PAGES {
        (0..2).for_each(|colour| put(page, colour, if colour == 0 { content(page, 0) } else { POISON }));
        map_in(&domain, at(page), machine.oa(offset(page, 0)), 0x1000, Perm::RW, sizes);
    }
    let (accesses, stale, stop) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let (mut moves, mut quarantines) = (0, 0u64);
    std::thread::scope(|scope| {
        let mut all = Vec::new();
        for reader in 0..devices {
            let device = iommu.device(&format!("ats {reader}"));
            device.attach(&domain).unwrap();
            all.push(Arc::clone(&device));
            let (accesses, stale, stop) = (&accesses, &stale, &stop);
            scope.spawn(move || {
                let mut dma = AtsDma::new(&device).unwrap();
                let mut random = fastrand::Rng::with_seed(reader);
                while !stop.load(Ordering::Relaxed) {
                    for _ in 0..64 {
                        let page = random.u64(0..PAGES);
                        let mut word = [0; 8];
                        match dma.read(at(page), &mut word) {
                            Ok(()) => {
                                let found = u64::from_le_bytes(word);
                                if found != content(page, 0) && found != content(page, 1) {
                                    stale.fetch_add(1, Ordering::Relaxed);
                                }
                            }
                            Err(fault) if fault.reason == FaultKind::NotMapped => {}
                            Err(fault) if silent && fault.reason == FaultKind::Quarantined => std::thread::yield_now(),
                            Err(fault) => panic!("{fault}"),
                        }
                    }
                    accesses.fetch_add(64, Ordering::Relaxed);
                    if silent {
                        dma.set_mute(random.u8(..8) == 0);
                    }
                }
            });
        }
        let mut random = fastrand::Rng::with_seed(99);
        let mut colours = [0; PAGES as usize];
        let give_up = Instant::now() + Duration::from_secs(60);
        // All that is asked about must have had its turn, however the threads are scheduled.
        let short = |moves, quarantines| moves < enough_moves || accesses.load(Ordering::Relaxed) < 10_000 || (silent && quarantines == 0);
        while short(moves, quarantines) && stale.load(Ordering::Relaxed) == 0 && Instant::now() < give_up {
            let page = random.u64(0..PAGES);
            let (old, new) = (colours[page as usize], 1 - colours[page as usize]);
            let mut gather = Gather::new();
            assert_eq!(domain.table().unmap(span(at(page), 0x1000), &mut gather), None);
            domain.flush(gather);
            put(page, old, POISON);
            put(page, new, content(page, new));
            map_in(&domain, at(page), machine.oa(offset(page, new)), 0x1000, Perm::RW, sizes);
            colours[page as usize] = new;
            moves += 1;
            if moves % 8 == 0 {
                std::thread::yield_now();
                if silent {
                    quarantines = all.iter().map(|device| device.ats().quarantines).sum();
                    all.iter().filter(|device| device.is_quarantined()).for_each(|device| device.reset().unwrap());
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
        quarantines = all.iter().map(|device| device.ats().quarantines).sum();
    });
    Outcome { accesses: accesses.into_inner(), moves, stale: stale.into_inner(), quarantines }
}

const MOVES: u64 = if cfg!(debug_assertions) { 2_000 } else { 20_000 };

#[test]
fn nothing_stale_after_a_flush() {
    let _turn = turn();
    for devices in [1, 2] {
        let outcome = run(MOVES, devices, false);
        println!("{devices} devices: {outcome:?}");
        assert_eq!((outcome.stale, outcome.quarantines), (0, 0));
        assert!(outcome.moves >= MOVES && outcome.accesses >= 10_000);
    }
}

#[test]
fn nothing_stale_though_devices_fall_silent() {
    let _turn = turn();
    let outcome = run(MOVES / 4, 2, true);
    println!("{outcome:?}");
    assert_eq!(outcome.stale, 0);
    assert!(outcome.quarantines > 0 && outcome.moves >= MOVES / 4);
}

/// Each breaks the promise in its own way; the same detector sees each.
#[test]
fn planted_faults_are_seen() {
    let _turn = turn();
    for name in ["iommu.ats_false_answer", "iommu.ats_ignore_answers"] {
        let plant = sync::fail::plant(name, 0, u64::MAX);
        let outcome = run(50 * MOVES, 1, false);
        println!("{name}: {outcome:?}");
        assert!(plant.fired() > 0, "{name} never fired");
        assert!(outcome.stale > 0, "{name} went unseen in {} accesses", outcome.accesses);
    }
}

/// Two contexts of one device, one with a cache and one without, are quarantined together.
#[test]
fn the_whole_device_is_quarantined() {
    let _turn = turn();
    let machine = Machine::new(2 << 20, Frames::Contiguous);
    machine.map_small(BASE, 0, 0x2000);
    let plant = sync::fail::plant("iommu.ats_never_answers", 0, u64::MAX);
    let mut caches = [ats(&machine), ats(&machine)];
    let mut plain = Dma::new(&machine.device).unwrap();
    caches[0].read(BASE, &mut [0]).unwrap();
    machine.unmap(span(BASE, 0x1000));
    drop(plant);
    assert!(machine.device.is_quarantined());
    for dma in &mut caches {
        assert_eq!(dma.read(BASE.plus(0x1000), &mut [0]).unwrap_err().reason, FaultKind::Quarantined);
    }
    assert_eq!(plain.read(BASE.plus(0x1000), &mut [0]).unwrap_err().reason, FaultKind::Quarantined);
    machine.domain.each_cached_by_devices(Span::whole(), |_, part, _| panic!("a quarantined device cannot use {part}"));
}
