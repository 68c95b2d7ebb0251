//! Readers against writers in real threads: at no moment may a check answer what was true neither before nor after.

use crate::common::*;
use addr::{Gpa, Oa, Span};
use lockstep_secure::*;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::thread;

const K4: RmpSize = RmpSize::K4;
const BIG: RmpSize = RmpSize::M2;
const TRUSTED: Requester = Requester::Trusted { asid: ASID, vmpl: Vmpl::V0, vtom: None };

/// A writer's rounds. What it holds true in a phase, readers test; an answer counts when the phase did not change meanwhile.
#[derive(Debug)]
struct Phases {
    now: AtomicU64,
    /// Answers that counted, in odd phases: those that promise something.
    seen: AtomicU64,
    done: AtomicBool,
}

impl Phases {
    fn new() -> Self {
        Self { now: AtomicU64::new(0), seen: AtomicU64::new(0), done: AtomicBool::new(false) }
    }

    fn next(&self) {
        self.now.fetch_add(1, Ordering::SeqCst);
    }

    /// Ends the readers also when the writer panics.
    fn end(&self) -> Ends<'_> {
        Ends(&self.done)
    }

    /// The writer's rounds: at least `least`, and on until readers have seen enough, which on a busy machine takes longer.
    fn rounds(&self, least: u64) -> impl Iterator<Item = u64> {
        let enough = move |round| round >= least && self.seen.load(Ordering::Relaxed) >= 300;
        (0..100 * least).take_while(move |&round| !enough(round) && !self.done.load(Ordering::Relaxed))
    }

    /// Runs `test` with each phase until the writer is done; `test` answers whether it found what the phase promises.
    fn watch(&self, kinds: u64, mut test: impl FnMut(u64) -> Result<(), String>) {
        // A reader that fails ends the others and the writer.
        let _end = self.end();
        while !self.done.load(Ordering::Relaxed) {
            let phase = self.now.load(Ordering::SeqCst);
            let result = test(phase % kinds);
            if self.now.load(Ordering::SeqCst) == phase {
                result.unwrap_or_else(|what| panic!("phase {}: {what}", phase % kinds));
                self.seen.fetch_add(phase % 2, Ordering::Relaxed);
            }
        }
    }
}

struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A walk and a check as the IOMMU makes them: a mismatch of sizes is a fault only under an even sequence that did not change.
fn dma(rmp: &Table, leaf_lg2: &AtomicU8, page: u64) -> Result<(), Refusal> {
    loop {
        let before = rmp.smash_seq(oa(page));
        let lg2 = leaf_lg2.load(Ordering::Acquire);
        let leaf = leaf(page, lg2);
        let first = Gpa::new(gpa(page).get() >> lg2 << lg2);
        match rmp.check_device(TRUSTED, leaf, first, Access::Write) {
            Err(refusal) if refusal.size_mismatch && (before & 1 == 1 || rmp.smash_seq(oa(page)) != before) => {}
            result => return result,
        }
    }
}

/// Phase 1: the 2 MiB is valid and is split, entry and leaf in either order; no DMA may fail. Phase 0: anything goes.
#[test]
fn a_split_is_one_event_for_dma() {
    let rmp = table(2);
    let leaf_lg2 = AtomicU8::new(21);
    let phases = Phases::new();
    thread::scope(|scope| {
        let end = phases.end();
        let readers: Vec<_> = [0, 77, 511]
            .map(|page| {
                let (rmp, phases, leaf_lg2) = (&rmp, &phases, &leaf_lg2);
                scope.spawn(move || {
                    phases.watch(2, |phase| match dma(rmp, leaf_lg2, page) {
                        Err(refusal) if phase == 1 => Err(format!("page {page}: {refusal}")),
                        _ => Ok(()),
                    })
                })
            })
            .into();
        for round in phases.rounds(4000) {
            leaf_lg2.store(21, Ordering::Release);
            assign_valid(&rmp, 0, BIG);
            phases.next();
            rmp.smash_begin(oa(0));
            if round % 2 == 0 {
                rmp.psmash(oa(0)).unwrap();
                leaf_lg2.store(12, Ordering::Release);
            } else {
                leaf_lg2.store(12, Ordering::Release);
                rmp.psmash(oa(0)).unwrap();
            }
            rmp.smash_end(oa(0));
            if round % 16 == 0 {
                thread::yield_now();
            }
            phases.next();
            for page in 0..512 {
                share(&rmp, page, K4);
            }
        }
        drop(end);
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        assert!(phases.seen.load(Ordering::Relaxed) >= 300, "readers saw too little: {phases:?}");
    });
    assert_summaries(&rmp);
}

/// Phase 0: page 300 becomes private; whoever has seen that sees it in every leaf. Phase 1: it is. Phase 3: it is shared again. Meanwhile a second writer changes other pages of its group.
#[test]
fn ownership_is_seen_at_once_by_leaves_of_every_size() {
    let rmp = table(2);
    let phases = Phases::new();
    let untrusted = |leaf: Span<Oa>| rmp.check_device(Requester::Untrusted, leaf, Gpa::new(0), Access::Write);
    thread::scope(|scope| {
        let end = phases.end();
        let readers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    phases.watch(4, |phase| {
                        let mut seen = phase == 1;
                        for lg2 in [12, 14, 21, 30] {
                            let result = untrusted(leaf(300, lg2));
                            let wrong = (seen && result.is_ok()) || (phase == 3 && lg2 < 21 && result.is_err());
                            if wrong {
                                return Err(format!("{lg2}: {result:?}"));
                            }
                            seen |= phase == 0 && lg2 < 21 && result.is_err();
                        }
                        match untrusted(leaf(600, 21)) {
                            Err(refusal) => Err(format!("a group nobody touches: {refusal}")),
                            Ok(()) => Ok(()),
                        }
                    })
                })
            })
            .collect();
        let noise = scope.spawn(|| {
            let mut page = 0;
            while !phases.done.load(Ordering::Relaxed) {
                // Not page 300, nor its 16 KiB.
                page = (page + 37) % 290;
                assign_valid(&rmp, page, K4);
                share(&rmp, page, K4);
            }
        });
        for round in phases.rounds(15_000) {
            assign(&rmp, 300, K4);
            phases.next();
            if round % 64 == 0 {
                thread::yield_now();
            }
            phases.next();
            share(&rmp, 300, K4);
            phases.next();
            if round % 64 == 32 {
                thread::yield_now();
            }
            phases.next();
        }
        drop(end);
        noise.join().unwrap();
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        assert!(phases.seen.load(Ordering::Relaxed) >= 300, "readers saw too little: {phases:?}");
    });
    assert_summaries(&rmp);
    assert_eq!((rmp.summary_2m(oa(0)), rmp.assigned_pages()), (0, 0));
}

/// Whatever the writer does with the page, nobody gets in who at no time was let in: neither a stranger, nor a VMPL without
/// permission in any of the page's lives, nor the owner at another address.
#[test]
fn no_half_written_entry_lets_anyone_in() {
    let rmp = table(1);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let end = Ends(&done);
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    for (asid, vmpl, page) in [(5, Vmpl::V2, 9), (6, Vmpl::V1, 9), (7, Vmpl::V0, 9), (5, Vmpl::V0, 10)] {
                        let who = Requester::Trusted { asid, vmpl, vtom: Some(Gpa::new(1 << 50)) };
                        let result = rmp.check_device(who, leaf(9, 12), gpa(page), Access::Read);
                        assert!(result.is_err(), "ASID {asid} {vmpl:?} got in");
                    }
                }
            });
        }
        for _ in 0..60_000 {
            // Two guests in turn; with ASID 5 VMPL 1 may read, with ASID 6 VMPL 2 may.
            for (asid, level) in [(5, Vmpl::V1), (6, Vmpl::V2)] {
                rmp.rmpupdate(oa(9), RmpState::private(gpa(9), K4, asid)).unwrap();
                rmp.pvalidate(Pvalidate { asid, ..pvalidate(9, K4, true) }).unwrap();
                let set = Attributes { target: level, perms: Perms::READ, vmsa: false };
                rmp.rmpadjust(asid, Vmpl::V0, gpa(9), oa(9), K4, set).unwrap();
            }
        }
        drop(end);
    });
}

/// The first page's GPA is the owner's, but not at page 77: not before a split, not after, not in between.
#[test]
fn no_split_lets_a_first_page_speak_for_another() {
    let rmp = table(1);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let end = Ends(&done);
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let who = Requester::Trusted { asid: ASID, vmpl: Vmpl::V0, vtom: Some(Gpa::new(1 << 50)) };
                    assert!(rmp.check_device(who, leaf(77, 12), gpa(0), Access::Read).is_err());
                    let entry = rmp.entry(oa(77));
                    assert!(!entry.validated() || entry.gpa() == gpa(77), "{entry:?}");
                }
            });
        }
        for _ in 0..10_000 {
            assign_valid(&rmp, 0, BIG);
            rmp.psmash(oa(0)).unwrap();
            for page in 0..512 {
                share(&rmp, page, K4);
            }
        }
        drop(end);
    });
}

/// PVALIDATE and PSMASH at the same moment: the guest's word is neither lost nor halved.
#[test]
fn no_validation_is_lost_in_a_split() {
    let rmp = table(1);
    let barrier = Barrier::new(2);
    const ROUNDS: usize = 3000;
    thread::scope(|scope| {
        let guest = scope.spawn(|| {
            let mut answers = Vec::new();
            for _ in 0..ROUNDS {
                barrier.wait();
                answers.push(loop {
                    match rmp.pvalidate(pvalidate(0, BIG, true)) {
                        Err(PvalidateError::Fail(Code::FailInUse)) => thread::yield_now(),
                        answer => break answer,
                    }
                });
                barrier.wait();
                barrier.wait();
            }
            answers
        });
        let mut valid = Vec::new();
        for _ in 0..ROUNDS {
            assign(&rmp, 0, BIG);
            barrier.wait();
            done(|| rmp.psmash(oa(0)));
            barrier.wait();
            valid.push((0..512).filter(|&page| rmp.entry(oa(page)).validated()).count());
            for page in 0..512 {
                share(&rmp, page, K4);
            }
            barrier.wait();
        }
        for (answer, valid) in guest.join().unwrap().into_iter().zip(valid) {
            match answer {
                Ok(Validated { changed: true }) => assert_eq!(valid, 512),
                Err(PvalidateError::Fail(Code::FailSizeMismatch)) => assert_eq!(valid, 0),
                other => panic!("{other:?} and {valid} valid pages"),
            }
        }
    });
    assert_summaries(&rmp);
}

/// Writers in every group, while segments come and go beside them.
#[test]
fn readers_do_not_notice_segments_that_come_and_go() {
    let rmp = table(4);
    let done = AtomicBool::new(false);
    assign(&rmp, 600, K4);
    thread::scope(|scope| {
        let end = Ends(&done);
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let check = |page, lg2| rmp.check_device(Requester::Untrusted, leaf(page, lg2), Gpa::new(0), Access::Read);
                assert_eq!(check(3, 21), Ok(()));
                assert_eq!(check(3, 12), Ok(()));
                assert_eq!(check(600, 12).unwrap_err().at, oa(600));
                assert_eq!(check(601, 21).unwrap_err().at, oa(600));
            }
        });
        let mut rng = fastrand::Rng::with_seed(3);
        for _ in 0..20_000 {
            let start = Oa::new(START.get() + (4 + rng.u64(..300)) * M2);
            let beside = span(start, rng.u64(1..4) * M2);
            rmp.add_segment(beside, words(beside)).unwrap();
            rmp.rmpupdate(start, RmpState::private(Gpa::new(0), K4, 9)).unwrap();
            rmp.rmpupdate(start, RmpState::shared(K4)).unwrap();
            rmp.remove_segment(beside).unwrap();
        }
        drop(end);
    });
    assert_summaries(&rmp);
}
