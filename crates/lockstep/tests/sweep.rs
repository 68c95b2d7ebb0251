//! Every fallible step of a call, failed once (style habit 11): afterwards everything is as before, or exactly as the error says.

mod common;

use addr::{Gpa, Iova, Span};
use backing::{Backing, Frames, PageState};
use common::{ASID, Guest, MIB, change, iova, span};
use convert::Step;
use ioas::Place;
use lockstep_iommu::{Change, ConvertError, Owner, Policy, Tdisp, Trust};
use pt::Perm;
use secure::RmpSize;
use std::collections::BTreeMap;
use std::fmt::Debug;

/// What a failed call may leave behind.
enum Outcome {
    AsBefore,
    /// Some of it was done, and the error said what.
    AsSaid,
}

/// Fails step after step, each on a fresh object, until the call passes. Answers how often each step failed.
fn sweep<S, E: Debug>(
    name: &str,
    make: impl Fn() -> S,
    dump: impl Fn(&S) -> String,
    call: impl Fn(&S) -> Result<(), E>,
    judge: impl Fn(&S, &E) -> Outcome,
) -> BTreeMap<&'static str, u64> {
    let mut fired = BTreeMap::new();
    for nth in 1.. {
        let subject = make();
        let before = dump(&subject);
        let plan = sync::fail::nth(nth);
        let result = call(&subject);
        let (step, steps) = (plan.fired(), plan.steps());
        drop(plan);
        let Some(step) = step else {
            result.unwrap_or_else(|error| panic!("{name} failed without a failed step: {error:?}"));
            assert!(steps > 0, "{name} has no steps");
            println!("{name}: {steps} steps, failed {fired:?}");
            break;
        };
        *fired.entry(step).or_default() += 1;
        match result {
            // PSMASH is tried again while another instruction has the group; what stage 2 has already it need not be told.
            Ok(()) => {
                assert!(["secure.psmash", "convert.stage2"].contains(&step), "{name}: step {nth}, {step}, failed and the call did not")
            }
            Err(error) => match judge(&subject, &error) {
                Outcome::AsBefore => assert_eq!(dump(&subject), before, "{name}: after step {nth}, {step}: {error:?}"),
                Outcome::AsSaid => {}
            },
        }
    }
    fired
}

fn new_guest() -> Guest {
    let guest = Guest::new(16 * MIB, Frames::Contiguous, Policy::Mirror);
    // A large private leaf, a small one that is validated, a hole.
    guest.convert(8 * MIB, 4 * MIB, Owner::Private);
    guest.dma.space().pvalidate(Gpa::new(8 * MIB), RmpSize::M2, true).unwrap();
    guest.convert(0x5000, 0x3000, Owner::Private);
    guest.pvalidate(0x5000, 0x2000, true);
    guest.dma.punch(span(0x9000, 0x1000)).unwrap();
    guest
}

/// How many pages of `changes` have the owner that is asked for.
fn pages_done(guest: &Guest, changes: &[Change]) -> u64 {
    let has =
        |page: Span<Gpa>, to: Owner| guest.dma.space().page_at(page.start()).is_some_and(|(backing, at)| backing.state(at) == to.into());
    changes.iter().map(|change| change.span.blocks(12).filter(|page| has(*page, change.to)).count() as u64).sum()
}

fn judge_conversion(guest: &Guest, error: &ConvertError, changes: &[Change], before: u64) -> Outcome {
    let done = pages_done(guest, changes) - before;
    match error {
        ConvertError::Reserve { .. } => {
            guest.clean();
            Outcome::AsBefore
        }
        ConvertError::Busy { .. } => {
            // Borders were made for it, and large entries may have been split, and that is all: the leaves are back under their old owner.
            assert_eq!(done, 0);
            guest.clean();
            retry(guest, changes);
            Outcome::AsSaid
        }
        ConvertError::Refused { step, done_pages, .. } => {
            assert_eq!(*step, Step::Switch);
            assert_eq!(*done_pages, done);
            guest.clean();
            retry(guest, changes);
            Outcome::AsSaid
        }
        ConvertError::Leaks { span, done_pages, oa, .. } => {
            assert_eq!(*done_pages, done);
            assert_eq!(guest.dma.counters().leaked, span.len() >> 12);
            assert_eq!(guest.dma.rmp().leaked_pages(), span.len() >> 12);
            assert!(guest.dma.rmp().leaked().contains(oa));
            guest.clean();
            leaked_for_ever(guest, *span);
            Outcome::AsSaid
        }
        ConvertError::Stage2 { source, done_pages } => {
            // The owners have changed, devices have nothing, stage 2 is told again: the audit names these pages and no others.
            let report = guest.dma.audit();
            assert!(report.count > 0);
            let asked = |at: Span<Iova>| changes.iter().any(|change| change.span.covers(at.onto(Gpa::new(at.start().get()))));
            for difference in &report.differences {
                assert!(asked(difference.iova), "{difference}");
                assert!(["I-10", "I-11"].contains(&difference.invariant), "{difference}");
            }
            assert!(report.differences.iter().any(|difference| difference.iova.start().get() == source.span.start().get()));
            assert!(*done_pages < done);
            retry(guest, changes);
            Outcome::AsSaid
        }
        other => panic!("{other}"),
    }
}

/// Asked for again without a failure, all of it is done.
fn retry(guest: &Guest, changes: &[Change]) {
    guest.dma.convert(changes).unwrap();
    assert_eq!(pages_done(guest, changes), changes.iter().map(|change| change.span.len() >> 12).sum());
    guest.clean();
}

/// Nothing brings a leaked page back.
fn leaked_for_ever(guest: &Guest, leaked: Span<Gpa>) {
    let page = Span::block(leaked.start(), 12);
    assert!(guest.dma.populate(page).is_err());
    for to in [Owner::Private, Owner::Shared] {
        assert!(matches!(guest.dma.convert(&[Change { span: page, to }]), Err(ConvertError::Leaked { .. })));
    }
    let (backing, at) = guest.dma.space().page_at(page.start()).unwrap();
    assert_eq!(backing.state(at), PageState::Absent);
    for device in [&guest.trusted, &guest.untrusted] {
        assert!(guest.context(device).write(iova(page.start().get()), b"x").is_err());
    }
    guest.clean();
}

fn sweep_conversion(name: &str, make: impl Fn() -> Guest, changes: &[Change]) -> BTreeMap<&'static str, u64> {
    let before = pages_done(&make(), changes);
    let fired = sweep(
        name,
        make,
        Guest::dump,
        |guest| guest.dma.convert(changes).map(drop).inspect(|()| guest.clean()),
        |guest, error| judge_conversion(guest, error, changes, before),
    );
    for step in ["convert.reserve", "ioas.edit", "convert.settle", "backing.states", "secure.rmpupdate", "convert.stage2"] {
        assert!(fired.contains_key(step), "{name}: {step} never failed");
    }
    fired
}

#[test]
fn one_page_to_private() {
    let fired = sweep_conversion("one page to private", new_guest, &[change(0x3000, 0x1000, Owner::Private)]);
    assert!(!fired.contains_key("ioas.cut"), "a cut with tables in stock cannot fail");
    let fresh = || Guest::new(16 * MIB, Frames::Contiguous, Policy::SharedOnly);
    let fired = sweep_conversion("one page out of 16 MiB", fresh, &[change(0x12_3000, 0x1000, Owner::Private)]);
    assert!(fired.contains_key("pt.table"));
}

#[test]
fn one_page_to_shared() {
    sweep_conversion("one page to shared", new_guest, &[change(0x6000, 0x1000, Owner::Shared)]);
}

#[test]
fn one_page_out_of_a_private_block() {
    let fired = sweep_conversion("partial smash", new_guest, &[change(8 * MIB + 0x7000, 0x1000, Owner::Shared)]);
    assert!(fired.contains_key("secure.psmash"));
}

#[test]
fn ranges() {
    sweep_conversion("range to private", new_guest, &[change(0x4000, 0x20000, Owner::Private)]);
    sweep_conversion("range to shared", new_guest, &[change(0x4000, 0x20000, Owner::Shared)]);
    let fired = sweep_conversion("range with two smashes", new_guest, &[change(9 * MIB, 2 * MIB, Owner::Shared)]);
    assert_eq!(fired["secure.psmash"], 2);
}

#[test]
fn blocks() {
    sweep_conversion("block to private", new_guest, &[change(4 * MIB, 2 * MIB, Owner::Private)]);
    sweep_conversion("block to shared", new_guest, &[change(8 * MIB, 2 * MIB, Owner::Shared)]);
}

#[test]
fn scattered() {
    let guest = || {
        let guest = Guest::new(4 * MIB, Frames::Scattered { seed: 3 }, Policy::Mirror);
        guest.convert(0x10_0000, 0x8000, Owner::Private);
        guest
    };
    sweep_conversion("scattered to private", guest, &[change(0x2000, 0x4000, Owner::Private)]);
    sweep_conversion("scattered to shared", guest, &[change(0x10_2000, 0x4000, Owner::Shared)]);
}

#[test]
fn mixed_batch() {
    let batch = [
        change(0x0, 0x1000, Owner::Private),
        change(0x5000, 0x1000, Owner::Shared),
        change(0x9000, 0x1000, Owner::Private),
        change(8 * MIB + 0x1000, 0x2000, Owner::Shared),
        change(10 * MIB, 2 * MIB, Owner::Shared),
        change(2 * MIB, 2 * MIB, Owner::Private),
        change(5 * MIB, 0x3000, Owner::Private),
        change(14 * MIB, 0x1000, Owner::Private),
    ];
    sweep_conversion("batch of 8", new_guest, &batch);
}

#[test]
fn a_smash_that_is_refused_changes_nothing() {
    let guest = new_guest();
    let oa = guest.backing.oa(addr::Page::new(((8 * MIB) >> 12) + 9));
    guest.dma.rmp().set_in_use(oa, true);
    let before = guest.dump();
    let error = guest.dma.convert(&[change(8 * MIB + 0x7000, 0x1000, Owner::Shared)]).unwrap_err();
    assert!(matches!(error, ConvertError::Refused { step: Step::Smash, done_pages: 0, .. }));
    assert_eq!(guest.dump(), before);
    // Of several blocks those before the refused one stay small, entry and leaf alike.
    let second = guest.backing.oa(addr::Page::new((10 * MIB) >> 12));
    guest.dma.rmp().set_in_use(oa, false);
    guest.dma.rmp().set_in_use(second, true);
    let wide = change(9 * MIB, 2 * MIB, Owner::Shared);
    assert!(matches!(guest.dma.convert(&[wide]).unwrap_err(), ConvertError::Refused { step: Step::Smash, done_pages: 0, .. }));
    assert_eq!(pages_done(&guest, &[wide]), 0);
    guest.clean();
    guest.dma.rmp().set_in_use(second, false);
    retry(&guest, &[wide]);
}

#[test]
fn map() {
    let make = || {
        let guest = new_guest();
        let more = Backing::memfd(4 * MIB, Frames::Scattered { seed: 9 }).unwrap();
        (guest, more)
    };
    let fired = sweep(
        "map",
        make,
        |(guest, _)| guest.dump(),
        |(guest, more)| guest.dma.add_memory(Gpa::new(64 * MIB), 3 * MIB, more, MIB).inspect(|()| guest.clean()),
        |(guest, _), _| {
            guest.clean();
            Outcome::AsBefore
        },
    );
    for step in ["lockstep.rmp", "convert.slot", "ioas.pages", "ioas.room", "ioas.register", "pt.table"] {
        assert!(fired.contains_key(step), "{step} never failed");
    }
}

#[test]
fn copy() {
    let fired = sweep(
        "copy",
        new_guest,
        Guest::dump,
        |guest| {
            let ioas = guest.dma.ioas();
            ioas.copy(ioas, Span::from_len(iova(0x3000), MIB).unwrap(), Place::Fixed(iova(256 * MIB)), Perm::READ).map(drop)
        },
        |_, _| Outcome::AsBefore,
    );
    assert!(fired.contains_key("ioas.part") && fired.contains_key("pt.table"));
}

#[test]
fn attach() {
    let run = Trust::Trusted { asid: ASID, vmpl: secure::Vmpl::V0, tdisp: Tdisp::Run, sdte_valid: true, vtom: None };
    let make = || {
        let guest = new_guest();
        guest.dma.remove_device(&guest.trusted).unwrap();
        guest.dma.remove_device(&guest.untrusted).unwrap();
        assert!(guest.dma.ioas().domains().is_empty());
        guest
    };
    let fired =
        sweep("attach", make, Guest::dump, |guest| guest.dma.add_device("third", run).map(|_| guest.clean()), |_, _| Outcome::AsBefore);
    for step in ["iommu.domain", "ioas.seats", "ioas.area", "pt.table", "iommu.attach"] {
        assert!(fired.contains_key(step), "{step} never failed: {fired:?}");
    }
    sweep(
        "attach one domain more",
        new_guest,
        Guest::dump,
        |guest| guest.dma.ioas().attach(&guest.dma.iommu().domain()?).inspect(|()| guest.clean()),
        |_, _| Outcome::AsBefore,
    );
}
