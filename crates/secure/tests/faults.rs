//! The seams by which tests make the table fail or lie.

use addr::{Gpa, Oa, Span};
use lockstep_secure::*;
use std::sync::atomic::AtomicU64;

type Table = Rmp<Box<[AtomicU64]>>;

const START: u64 = 1 << 30;

fn oa(page: u64) -> Oa {
    Oa::new(START + (page << 12))
}

/// One 2 MiB entry.
fn table() -> Table {
    let rmp = Table::new();
    let span = Span::from_len(oa(0), 2 << 20).unwrap();
    rmp.add_segment(span, (0..Table::words_for(span)).map(|_| AtomicU64::new(0)).collect()).unwrap();
    rmp.rmpupdate(oa(0), RmpState::private(Gpa::new(0x20_0000), RmpSize::M2, 5)).unwrap();
    rmp
}

#[test]
fn each_step_can_fail_and_then_nothing_has_changed() {
    let rmp = table();
    let before: Vec<_> = (0..512).map(|page| rmp.raw(oa(page))).collect();
    let unchanged = || (0..).zip(&before).all(|(page, entry)| rmp.raw(oa(page)) == *entry);
    {
        let guard = sync::fail::nth(1);
        assert_eq!(rmp.psmash(oa(0)), Err(Code::FailInUse));
        assert_eq!(guard.fired(), Some("secure.psmash"));
    }
    {
        let guard = sync::fail::nth(1);
        assert_eq!(rmp.rmpupdate(oa(0), RmpState::shared(RmpSize::M2)), Err(Code::FailInUse));
        assert_eq!(guard.fired(), Some("secure.rmpupdate"));
    }
    assert!(unchanged());
    rmp.recount(|error| panic!("{error:?}"));
}

#[test]
fn a_planted_psmash_lies() {
    let rmp = table();
    {
        let _plant = sync::fail::plant("secure.forget_psmash", 0, 1);
        assert_eq!(rmp.psmash(oa(0)), Ok(()));
        assert_eq!(rmp.size_at(oa(0)), RmpSize::M2);
    }
    assert_eq!(rmp.psmash(oa(0)), Ok(()));
    assert_eq!(rmp.size_at(oa(0)), RmpSize::K4);
}
