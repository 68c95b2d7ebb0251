//! What is left when a step fails, row by row: the failure matrix of the transaction (design D-6). Each test fails one step in the one way, and holds the
//! whole state, dumped, against the one before or against what the error says. `sweep.rs` fails every step wherever it comes up; these
//! say which row they are.

mod common;

use addr::{Gpa, PAGE_LG2, Span};
use backing::Frames;
use common::{ASID, Guest, MIB, change, iova, span};
use lockstep_iommu::{Change, Config, ConvertError, Dma, GuestDma, Owner, Policy, RecordedStage2, Stage2, Step, Tdisp, Trust};
use std::sync::{Arc, Mutex};
use sync::fail;

const AT: u64 = 0x5000;

fn guest() -> Guest {
    let guest = Guest::new(16 * MIB, Frames::Contiguous, Policy::Mirror);
    // A border that is there already, so that a call that puts all back makes no new one.
    guest.convert(AT, 0x1000, Owner::Private);
    guest.convert(AT, 0x1000, Owner::Shared);
    guest
}

/// Converts with the first step of this name made to fail.
fn fail_at(guest: &Guest, step: &str, changes: &[Change]) -> ConvertError {
    for nth in 1.. {
        // Counted on an equal guest, since every try leaves its mark.
        let twin = self::guest();
        prepare_like(guest, &twin);
        let plan = fail::nth(nth);
        let result = twin.dma.convert(changes);
        let fired = plan.fired();
        drop(plan);
        assert!(fired.is_some(), "no step is called {step}: {result:?}");
        if fired == Some(step) {
            let plan = fail::nth(nth);
            let error = guest.dma.convert(changes).expect_err("the step failed");
            assert_eq!(plan.fired(), Some(step));
            return error;
        }
    }
    unreachable!("steps end")
}

/// Makes the same pages private.
fn prepare_like(guest: &Guest, twin: &Guest) {
    for (run, private) in guest.dma.space().stage2().runs(span(0, 16 * MIB)) {
        if private {
            twin.dma.convert(&[Change { span: run, to: Owner::Private }]).unwrap();
        }
    }
}

/// Row "reservation": nothing changed.
#[test]
fn no_memory_for_later_steps() {
    for step in ["convert.reserve", "backing.states", "ioas.edit"] {
        let guest = guest();
        let before = guest.dump();
        let error = fail_at(&guest, step, &[change(AT, 0x1000, Owner::Private)]);
        assert_eq!((error.step(), guest.dump()), (Step::Reserve, before), "{step}: {error}");
        guest.clean();
    }
}

/// Row "refcount check": the leaves are mapped again, the caller is told which page, and a retry goes through.
#[test]
fn a_page_that_somebody_holds() {
    let guest = guest();
    let before = guest.dump();
    let error = fail_at(&guest, "convert.settle", &[change(AT, 0x1000, Owner::Private)]);
    assert!(matches!(error, ConvertError::Busy { at, .. } if at == Gpa::new(AT)), "{error}");
    assert_eq!((error.step(), guest.dump()), (Step::Settle, before));
    guest.clean();
    guest.context(&guest.untrusted).write(iova(AT), b"still the host's").unwrap();
    assert_eq!(guest.convert(AT, 0x1000, Owner::Private), 1);
}

/// Row "IO page table unmap": cannot fail, also when no table is left for a cut. The promise holds, the neighbours' translations go with it, and they
/// are counted.
#[test]
fn no_table_for_a_cut_behind_our_back() {
    // The host takes one page out of a large leaf. What it needs beforehand it may fail for; the cut it may not.
    let punched = (1..20).find_map(|nth| {
        let guest = Guest::new(16 * MIB, Frames::Contiguous, Policy::Mirror);
        let plan = fail::nth(nth);
        let punched = guest.dma.punch(span(AT, 0x1000));
        (plan.fired() == Some("pt.table")).then_some((guest, punched))
    });
    let (guest, punched) = punched.expect("a punch cuts");
    punched.unwrap();
    assert!(guest.context(&guest.untrusted).read(iova(AT), &mut [0]).is_err());
    assert!(ioas::Pages::of(&guest.backing).leaves_shed() > 0);
}

/// Row "RMPUPDATE to private": still shared, mapped again.
#[test]
fn the_secure_world_refuses_a_page() {
    let guest = guest();
    let before = guest.dump();
    let error = fail_at(&guest, "secure.rmpupdate", &[change(AT, 0x1000, Owner::Private)]);
    assert!(matches!(error, ConvertError::Refused { step: Step::Switch, done_pages: 0, .. }), "{error}");
    assert_eq!(guest.dump(), before);
    guest.clean();
    guest.context(&guest.untrusted).write(iova(AT), b"still the host's").unwrap();
}

/// Row "PSMASH": tried again, as hosts do; when the entry stays locked, it stays large, leaf and all.
#[test]
fn an_entry_that_cannot_be_split() {
    let guest = guest();
    guest.convert(4 * MIB, 2 * MIB, Owner::Private);
    let oa = guest.backing.oa(addr::Page::new((4 * MIB) >> PAGE_LG2));
    guest.dma.rmp().firmware_lock(oa).unwrap();
    let before = guest.dump();
    let error = guest.dma.convert(&[change(4 * MIB + AT, 0x1000, Owner::Shared)]).unwrap_err();
    assert!(matches!(error, ConvertError::Refused { step: Step::Smash, .. }), "{error}");
    assert_eq!(guest.dump(), before);
    guest.dma.rmp().firmware_unlock(oa);
    assert_eq!(guest.convert(4 * MIB + AT, 0x1000, Owner::Shared), 1);
    guest.clean();
}

/// Row "RMPUPDATE to shared": the page is leaked, counted and listed, and never mapped again.
#[test]
fn a_page_that_the_secure_world_keeps() {
    let guest = guest();
    guest.convert(AT, 0x1000, Owner::Private);
    let error = fail_at(&guest, "secure.rmpupdate", &[change(AT, 0x1000, Owner::Shared)]);
    let ConvertError::Leaks { oa, done_pages: 0, .. } = error else { panic!("{error}") };
    assert_eq!((guest.dma.counters().leaked, guest.dma.rmp().leaked()), (1, vec![oa]));
    guest.clean();
    for to in [Owner::Private, Owner::Shared] {
        let again = guest.dma.convert(&[change(AT, 0x1000, to)]);
        assert!(matches!(again, Err(ConvertError::Leaked { .. })), "{again:?}");
    }
    assert!(guest.dma.populate(span(AT, 0x1000)).is_err());
    for device in [&guest.trusted, &guest.untrusted] {
        assert!(guest.context(device).read(iova(AT), &mut [0]).is_err());
    }
}

/// Row "mapping the new leaf": the owner has changed and stays, devices fault, and restoring the span mends it. Its tables are reserved beforehand, so
/// somebody has to take them away for this to happen: here the planted loss of a reserve.
#[test]
fn pages_that_could_not_be_mapped_again() {
    let guest = guest();
    guest.convert(AT, 0x1000, Owner::Private);
    guest.pvalidate(AT, 0x1000, true);
    // The leaf is lost as it would be then.
    let held = guest.backing.lock(guest.backing.pages());
    let pages = ioas::Pages::of(&guest.backing);
    let mut edit = ioas::Edit::new();
    let page = Span::one(addr::Page::new(AT >> PAGE_LG2));
    pages.clear(page, &mut edit);
    edit.flush();
    drop(held);
    assert!(guest.context(&guest.trusted).write(iova(AT), b"x").is_err(), "devices fault");
    assert!(guest.dma.audit().count > 0, "and the audit says so");
    guest.dma.space().restore(span(AT, 0x1000)).unwrap();
    guest.context(&guest.trusted).write(iova(AT), b"x").unwrap();
    guest.clean();
}

/// Row "stage 2 refuses after the switch": never rolled back; the pages are unmapped until the same call is made again.
#[test]
fn stage_2_that_is_not_told() {
    let guest = guest();
    let error = fail_at(&guest, "convert.stage2", &[change(AT, 0x1000, Owner::Private)]);
    assert!(matches!(error, ConvertError::Stage2 { done_pages: 0, .. }), "{error}");
    assert!(guest.dma.rmp().entry(guest.backing.oa(addr::Page::new(AT >> PAGE_LG2))).assigned(), "the owner has changed");
    for device in [&guest.trusted, &guest.untrusted] {
        assert!(guest.context(device).read(iova(AT), &mut [0]).is_err());
    }
    assert_eq!(guest.convert(AT, 0x1000, Owner::Private), 1);
    guest.clean();
}

/// Row "middle of a batch": the prefix is done and said, the rest is as before.
#[test]
fn a_batch_that_stops_half_way() {
    let guest = guest();
    let changes: Vec<Change> = (0..253).map(|entry| change(MIB + entry * 0x3000, 0x1000, Owner::Private)).collect();
    // A page that the CPU keeps for itself (a VMSA, say): RMPUPDATE answers FAIL_INUSE, and that is nothing to wait for.
    let kept = guest.backing.oa(addr::Page::new((MIB + 100 * 0x3000) >> PAGE_LG2));
    guest.dma.rmp().set_in_use(kept, true);
    let error = guest.dma.convert(&changes).unwrap_err();
    let ConvertError::Refused { step: Step::Switch, done_pages, span: at, .. } = error else { panic!("{error}") };
    let private = |change: &Change| guest.dma.space().stage2().is_private(change.span.start());
    assert_eq!(changes.iter().filter(|change| private(change)).count() as u64, done_pages);
    assert!(changes[..done_pages as usize].iter().all(private), "what is done is a prefix");
    assert_eq!((done_pages, at), (100, changes[100].span));
    guest.clean();
    guest.dma.rmp().set_in_use(kept, false);
    assert_eq!(guest.dma.convert(&changes).unwrap().pages, 253 - done_pages);
    guest.clean();
}

/// Row "vCPU fault races": from freeze to thaw nobody gets in, whatever fails in between; each freeze is followed by one thaw.
#[test]
fn vcpus_wait_until_the_end() {
    #[derive(Default)]
    struct Log {
        told: RecordedStage2,
        open: Mutex<Vec<Vec<Span<Gpa>>>>,
        freezes: Mutex<u32>,
    }
    impl Stage2 for Log {
        fn freeze(&self, spans: &[Span<Gpa>]) {
            self.open.lock().unwrap().push(spans.to_vec());
            *self.freezes.lock().unwrap() += 1;
        }
        fn settle(&self, spans: &[Span<Gpa>]) -> Result<(), convert::Busy> {
            assert_eq!(self.open.lock().unwrap().last().map(Vec::as_slice), Some(spans), "asked outside of a freeze");
            self.told.settle(spans)
        }
        fn commit(&self, span: Span<Gpa>, private: bool) -> Result<(), convert::Stage2Error> {
            assert!(self.open.lock().unwrap().iter().flatten().any(|open| open.covers(span)), "told outside of a freeze");
            self.told.commit(span, private)
        }
        fn thaw(&self, spans: &[Span<Gpa>]) {
            assert_eq!(self.open.lock().unwrap().pop().as_deref(), Some(spans), "another span is let in than was kept out");
        }
        fn is_private(&self, gpa: Gpa) -> bool {
            self.told.is_private(gpa)
        }
        fn runs(&self, span: Span<Gpa>) -> Vec<(Span<Gpa>, bool)> {
            self.told.runs(span)
        }
    }
    let stage2 = Arc::new(Log::default());
    let iommu = iommu::Config { table_bytes: 64 * MIB, ..iommu::Config::default() };
    let dma = GuestDma::new(&Config { asid: ASID, iommu, ..Config::default() }, stage2.clone()).unwrap();
    dma.add_memory(Gpa::new(0), 4 * MIB, &backing::Backing::memfd(4 * MIB, Frames::Contiguous).unwrap(), 0).unwrap();
    let run = Trust::Trusted { asid: ASID, vmpl: secure::Vmpl::V0, tdisp: Tdisp::Run, sdte_valid: true, vtom: None };
    let _context = Dma::new(&dma.add_device("trusted", run).unwrap()).unwrap();
    let mut failed = 0;
    for nth in 1..200 {
        let plan = fail::nth(nth);
        let to = if nth % 2 == 0 { Owner::Private } else { Owner::Shared };
        failed += u32::from(dma.convert(&[change(nth % 900 * 0x1000, 0x3000, to)]).is_err());
        drop(plan);
        assert!(stage2.open.lock().unwrap().is_empty(), "after step {nth} vCPUs are still kept out");
    }
    assert!(failed > 5 && *stage2.freezes.lock().unwrap() > 50);
}
