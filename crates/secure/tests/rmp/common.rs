//! A small table and the few words that every test of it uses.

use addr::{Gpa, Oa, Span};
use lockstep_secure::{Code, Pvalidate, PvalidateError, Rmp, RmpSize, RmpState, Vmpl};
use std::sync::atomic::AtomicU64;

pub(crate) type Table = Rmp<Box<[AtomicU64]>>;

pub(crate) const M2: u64 = 2 << 20;
pub(crate) const ASID: u32 = 5;
/// The last 2 MiB of one GiB, so that whatever follows lies in the next.
pub(crate) const START: Oa = Oa::new((5 << 30) - M2);
/// Where the tests' guest has the page at [`START`].
pub(crate) const GUEST: Gpa = Gpa::new(0x12_0000_0000);

pub(crate) fn span(start: Oa, bytes: u64) -> Span<Oa> {
    Span::from_len(start, bytes).unwrap()
}

pub(crate) fn words(span: Span<Oa>) -> Box<[AtomicU64]> {
    (0..Table::words_for(span)).map(|_| AtomicU64::new(0)).collect()
}

/// One segment of `blocks` times 2 MiB at [`START`].
pub(crate) fn table(blocks: u64) -> Table {
    let rmp = Table::new();
    let span = span(START, blocks * M2);
    rmp.add_segment(span, words(span)).unwrap();
    rmp
}

pub(crate) fn oa(page: u64) -> Oa {
    Oa::new(START.get() + (page << 12))
}

pub(crate) fn gpa(page: u64) -> Gpa {
    Gpa::new(GUEST.get() + (page << 12))
}

pub(crate) fn leaf(page: u64, lg2: u8) -> Span<Oa> {
    Span::block(oa(page), lg2)
}

/// Until the group's lock is free: a writer that lost its CPU may keep others out for longer than they are ready to wait.
pub(crate) fn done<T>(mut attempt: impl FnMut() -> Result<T, Code>) -> T {
    loop {
        match attempt() {
            Err(Code::FailInUse | Code::FailOverlap) => std::thread::yield_now(),
            result => return result.unwrap(),
        }
    }
}

/// The page becomes Guest-Invalid.
pub(crate) fn assign(rmp: &Table, page: u64, size: RmpSize) {
    done(|| rmp.rmpupdate(oa(page), RmpState::private(gpa(page), size, ASID)));
}

/// The page becomes the hypervisor's.
pub(crate) fn share(rmp: &Table, page: u64, size: RmpSize) {
    done(|| rmp.rmpupdate(oa(page), RmpState::shared(size)));
}

/// PVALIDATE as the page's owner would execute it.
pub(crate) fn pvalidate(page: u64, size: RmpSize, validate: bool) -> Pvalidate {
    Pvalidate { asid: ASID, vmpl: Vmpl::V0, gpa: gpa(page), oa: oa(page), size, validate }
}

/// The page becomes Guest-Valid.
pub(crate) fn assign_valid(rmp: &Table, page: u64, size: RmpSize) {
    assign(rmp, page, size);
    done(|| match rmp.pvalidate(pvalidate(page, size, true)) {
        Err(PvalidateError::Fail(code)) => Err(code),
        result => Ok(result.unwrap()),
    });
}

/// Every summary says what the entries say.
#[track_caller]
pub(crate) fn assert_summaries(rmp: &Table) {
    let mut wrong = Vec::new();
    rmp.recount(|error| wrong.push(error));
    assert_eq!(wrong, [], "summaries disagree with entries");
}
