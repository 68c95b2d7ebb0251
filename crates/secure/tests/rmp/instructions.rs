//! Each instruction: every check, the order of the checks, the code, and what success leaves behind.

use crate::common::*;
use addr::{Gpa, Oa};
use lockstep_secure::*;

const K4: RmpSize = RmpSize::K4;
const BIG: RmpSize = RmpSize::M2;

fn private(page: u64, size: RmpSize) -> RmpState {
    RmpState::private(gpa(page), size, ASID)
}

fn immutable(page: u64, size: RmpSize) -> RmpState {
    RmpState { immutable: true, ..private(page, size) }
}

#[test]
fn rmpupdate_refuses_malformed_operands() {
    let rmp = table(2);
    let shared = RmpState::shared(K4);
    let cases = [
        ("uncovered", Oa::new(0), private(0, K4)),
        ("unaligned address", Oa::new(oa(1).get() + 8), private(1, K4)),
        ("2 MiB not aligned", oa(1), private(1, BIG)),
        ("2 MiB GPA not aligned", oa(0), RmpState { gpa: gpa(1), ..private(0, BIG) }),
        ("GPA low bits", oa(1), RmpState { gpa: Gpa::new(1), ..private(1, K4) }),
        ("GPA bit 51", oa(1), RmpState { gpa: Gpa::new(1 << 51), ..private(1, K4) }),
        ("ASID beyond its field", oa(1), RmpState { asid: 1 << 10, ..private(1, K4) }),
        ("the impossible ASID", oa(1), RmpState { asid: 0x3ff, ..private(1, K4) }),
        ("unassigned and immutable", oa(1), RmpState { immutable: true, ..shared }),
        ("unassigned with an ASID", oa(1), RmpState { asid: 1, ..shared }),
        ("firmware's, mutable", oa(1), RmpState { asid: 0, ..private(1, K4) }),
        ("forged metadata", oa(1), RmpState { asid: 0, ..immutable(1, K4) }),
    ];
    for (what, at, state) in cases {
        assert_eq!(rmp.rmpupdate(at, state), Err(Code::FailInput), "{what}");
    }
    assert_eq!(rmp.assigned_in(addr::Span::whole()), 0);
}

#[test]
fn rmpupdate_checks_in_order() {
    let rmp = table(2);
    // Immutable before in use before overlap: remove the reasons one by one.
    rmp.rmpupdate(oa(3), immutable(3, K4)).unwrap();
    rmp.set_in_use(oa(3), true);
    rmp.firmware_lock(oa(0)).unwrap();
    assert_eq!(rmp.rmpupdate(oa(3), RmpState { asid: 0x3ff, ..private(3, K4) }), Err(Code::FailInput));
    assert_eq!(rmp.rmpupdate(oa(3), private(3, K4)), Err(Code::FailPermission));
    rmp.firmware_unlock(oa(0));
    rmp.firmware(oa(3), K4, Command::PageReclaim).unwrap();
    rmp.firmware_lock(oa(0)).unwrap();
    assert_eq!(rmp.rmpupdate(oa(3), private(3, K4)), Err(Code::FailInUse));
    rmp.set_in_use(oa(3), false);
    assert_eq!(rmp.rmpupdate(oa(3), private(3, K4)), Err(Code::FailOverlap));
    assert_eq!(rmp.rmpupdate(oa(512), private(512, K4)), Ok(()), "another 2 MiB is not locked");
    rmp.firmware_unlock(oa(511));
    assert_eq!(rmp.rmpupdate(oa(3), private(3, K4)), Ok(()));
    // An entry that is locked by itself, without its range.
    let [q1, q2] = rmp.raw(oa(3));
    rmp.poke(oa(3), [q1 | 1 << 63, q2]);
    assert_eq!(rmp.rmpupdate(oa(3), RmpState::shared(K4)), Err(Code::FailInUse));
}

#[test]
fn rmpupdate_never_overlaps_sizes() {
    let rmp = table(2);
    assign(&rmp, 0, BIG);
    for page in [0, 1, 511] {
        assert_eq!(rmp.rmpupdate(oa(page), private(page, K4)), Err(Code::FailOverlap), "4 KiB in 2 MiB, page {page}");
        assert_eq!(rmp.rmpupdate(oa(page), RmpState::shared(K4)), Err(Code::FailOverlap));
    }
    for page in [512, 513, 1023] {
        assign(&rmp, page, K4);
        assert_eq!(rmp.rmpupdate(oa(512), private(512, BIG)), Err(Code::FailOverlap), "2 MiB over 4 KiB, page {page}");
        assert_eq!(rmp.rmpupdate(oa(512), RmpState::shared(BIG)), Err(Code::FailOverlap));
        rmp.rmpupdate(oa(page), RmpState::shared(K4)).unwrap();
    }
    rmp.set_in_use(oa(700), true);
    assert_eq!(rmp.rmpupdate(oa(512), private(512, BIG)), Err(Code::FailInUse));
    assert_eq!(rmp.rmpupdate(oa(701), private(701, K4)), Ok(()));
    rmp.rmpupdate(oa(701), RmpState::shared(K4)).unwrap();
    rmp.set_in_use(oa(700), false);
    rmp.firmware(oa(600), K4, Command::SetHvFixed).unwrap();
    assert_eq!(rmp.rmpupdate(oa(512), private(512, BIG)), Err(Code::FailOverlap));
    assert_eq!(rmp.rmpupdate(oa(600), private(600, K4)), Err(Code::FailPermission));
    assert_summaries(&rmp);
}

#[test]
fn rmpupdate_keeps_what_the_guest_said_only_for_the_same_page() {
    let q2 = |rmp: &Table| rmp.entry(oa(1)).q2;
    let fresh = || {
        let rmp = table(1);
        assign_valid(&rmp, 1, K4);
        let set = Attributes { target: Vmpl::V1, perms: Perms::READ, vmsa: true };
        rmp.rmpadjust(ASID, Vmpl::V0, gpa(1), oa(1), K4, set).unwrap();
        assert_eq!(q2(&rmp).perms(), 0x011f);
        rmp
    };
    let rmp = fresh();
    rmp.rmpupdate(oa(1), immutable(1, K4)).unwrap();
    assert_eq!(rmp.state(oa(1)), PageState::PreSwap, "validated and permissions stay");
    assert!(rmp.entry(oa(1)).q1.vmsa() && q2(&rmp).perms() == 0x011f);

    let changes = [
        ("asid", RmpState { asid: 6, ..private(1, K4) }, PageState::GuestInvalid, 0x1f),
        ("gpa", RmpState { gpa: gpa(2), ..private(1, K4) }, PageState::GuestInvalid, 0x1f),
        ("gpa, immutable", RmpState { gpa: gpa(2), ..immutable(1, K4) }, PageState::PreGuest, 0x1f),
        ("assigned", RmpState::shared(K4), PageState::Hypervisor, 0),
        ("firmware", RmpState { gpa: Gpa::new(0), asid: 0, ..immutable(1, K4) }, PageState::Firmware, 0x1f),
    ];
    for (what, new, state, perms) in changes {
        let rmp = fresh();
        rmp.rmpupdate(oa(1), new).unwrap();
        assert_eq!(rmp.state(oa(1)), state, "{what}");
        let entry = rmp.entry(oa(1));
        assert!(!entry.validated() && !entry.q1.vmsa(), "{what}");
        assert_eq!(entry.q2.perms(), perms, "{what}");
        assert_summaries(&rmp);
    }
}

#[test]
fn rmpupdate_2m_raw_entries() {
    let rmp = table(2);
    assign(&rmp, 512, BIG);
    assert_eq!(rmp.raw(oa(512)), [0x0028_0012_0020_0003, 0x1f], "only the first says 2 MiB");
    assert_eq!((rmp.raw(oa(513)), rmp.raw(oa(1023))), ([1, 0], [1, 0]));
    assert_eq!(rmp.entry(oa(700)).gpa(), gpa(700));
    assert_eq!(rmp.size_at(oa(700)), BIG);
    assert_eq!((rmp.summary_2m(oa(600)), rmp.summary_1g(oa(600)), rmp.assigned_pages()), (512, 512, 512));
    let view = rmp.rmpread(oa(512)).unwrap();
    assert!(view.assigned && view.hpage_region_status && view.pagesize == BIG && view.gpa == gpa(512));
    assert_eq!(rmp.rmpread(Oa::new(0)), Err(Code::FailInput));
    rmp.rmpupdate(oa(512), RmpState::shared(BIG)).unwrap();
    for page in 512..1024 {
        assert_eq!(rmp.raw(oa(page)), [0, 0]);
    }
    assert!(!rmp.rmpread(oa(513)).unwrap().hpage_region_status);
    assert_summaries(&rmp);
}

#[test]
fn subpage_count_leaves_the_first_page_out() {
    let rmp = table(1);
    let count = || rmp.raw(oa(0))[0] >> 3 & 0x1ff;
    assign(&rmp, 0, K4);
    assert_eq!(count(), 0);
    assign(&rmp, 7, K4);
    assign(&rmp, 8, K4);
    assert_eq!(count(), 2);
    rmp.rmpupdate(oa(0), RmpState::shared(K4)).unwrap();
    assert_eq!((count(), rmp.state(oa(0))), (2, PageState::Hypervisor));
    rmp.rmpupdate(oa(7), RmpState::shared(K4)).unwrap();
    assert_eq!((count(), rmp.summary_2m(oa(0))), (1, 1));
    assert_summaries(&rmp);
}

#[test]
fn psmash_checks_in_order() {
    let rmp = table(2);
    assert_eq!(rmp.psmash(Oa::new(0x1000)), Err(Code::FailInput), "alignment before coverage");
    assert_eq!(rmp.psmash(Oa::new(0)), Err(Code::FailBadAddr));
    assert_eq!(rmp.psmash(oa(0)), Err(Code::FailInput), "hypervisor page");
    assign(&rmp, 0, K4);
    rmp.set_in_use(oa(9), true);
    assert_eq!(rmp.psmash(oa(0)), Err(Code::FailInput), "4 KiB, although in use");
    rmp.rmpupdate(oa(0), RmpState::shared(K4)).unwrap();
    rmp.set_in_use(oa(9), false);
    assign(&rmp, 0, BIG);
    rmp.set_in_use(oa(9), true);
    assert_eq!(rmp.psmash(oa(0)), Err(Code::FailInUse));
    rmp.set_in_use(oa(9), false);
    rmp.firmware_lock(oa(5)).unwrap();
    assert_eq!(rmp.psmash(oa(0)), Err(Code::FailInUse));
    rmp.firmware_unlock(oa(5));
    assert_eq!(rmp.psmash(oa(0)), Ok(()));
    assert_eq!(rmp.psmash(oa(0)), Err(Code::FailInput), "there is nothing left to split");
}

#[test]
fn psmash_keeps_everything_but_the_size() {
    let rmp = table(1);
    assign_valid(&rmp, 0, BIG);
    let set = Attributes { target: Vmpl::V2, perms: Perms(3), vmsa: true };
    rmp.rmpadjust(ASID, Vmpl::V0, gpa(0), oa(0), BIG, set).unwrap();
    let before: Vec<_> = (0..512).map(|page| rmp.entry(oa(page))).collect();
    rmp.psmash(oa(0)).unwrap();
    for (page, before) in (0..).zip(before) {
        let mut after = rmp.entry(oa(page));
        assert_eq!((after.size(), after.gpa()), (K4, gpa(page)));
        after.q1 = after.q1.with_subpage_count(0).with_size(BIG);
        assert_eq!(after, before, "page {page}");
    }
    assert_eq!(rmp.raw(oa(0))[0] >> 3 & 0x1ff, 511);
    assert_eq!(rmp.summary_2m(oa(0)), 512);
    assert_summaries(&rmp);
    // Now single pages can go.
    rmp.rmpupdate(oa(9), RmpState::shared(K4)).unwrap();
    assert_eq!((rmp.state(oa(9)), rmp.state(oa(10))), (PageState::Hypervisor, PageState::GuestValid));
}

#[test]
fn pvalidate_checks_in_order() {
    let rmp = table(3);
    let npf = npf::RMP | npf::FINAL | npf::ENC;
    assign(&rmp, 0, BIG);
    assign(&rmp, 513, K4);
    assign(&rmp, 512, K4);
    let good = pvalidate(513, K4, true);
    assert_eq!(rmp.pvalidate(Pvalidate { vmpl: Vmpl::V1, oa: oa(1024), ..good }), Err(PvalidateError::Fail(Code::FailPermission)));
    assert_eq!(rmp.pvalidate(Pvalidate { oa: Oa::new(7), ..good }), Err(PvalidateError::Fail(Code::FailInput)));
    let wrong = [
        ("uncovered", Pvalidate { oa: Oa::new(0), ..good }),
        ("unassigned", Pvalidate { oa: oa(1024), ..good }),
        ("other ASID", Pvalidate { asid: 6, ..good }),
        ("ASID 0", Pvalidate { asid: 0, ..good }),
        ("other GPA", Pvalidate { gpa: gpa(7), ..good }),
        ("other GPA, 2 MiB on 4 KiB", Pvalidate { gpa: gpa(0), ..pvalidate(512, BIG, true) }),
        ("4 KiB on 2 MiB at the wrong GPA", Pvalidate { gpa: gpa(4), ..pvalidate(3, K4, true) }),
    ];
    for (what, op) in wrong {
        assert_eq!(rmp.pvalidate(op), Err(PvalidateError::Npf(npf)), "{what}");
    }
    let sizem = Err(PvalidateError::Npf(npf | npf::SIZEM));
    assert_eq!(rmp.pvalidate(pvalidate(3, K4, true)), sizem);
    assert_eq!(rmp.pvalidate(pvalidate(0, K4, true)), sizem);
    assert_eq!(rmp.pvalidate(pvalidate(512, BIG, false)), Err(PvalidateError::Fail(Code::FailSizeMismatch)), "before NOUPDATE");
    assert_eq!(rmp.pvalidate(good), Ok(Validated { changed: true }));
    assert_eq!(rmp.pvalidate(good), Ok(Validated { changed: false }));
    assert_eq!(rmp.state(oa(513)), PageState::GuestValid);
    assert_eq!(rmp.pvalidate(pvalidate(513, K4, false)), Ok(Validated { changed: true }));
    assert_eq!(rmp.state(oa(513)), PageState::GuestInvalid);
    assert_eq!(rmp.pvalidate(pvalidate(0, BIG, true)), Ok(Validated { changed: true }));
    assert_eq!(rmp.state(oa(300)), PageState::GuestValid);
    rmp.rmpupdate(oa(513), immutable(513, K4)).unwrap();
    assert_eq!(rmp.pvalidate(good), Err(PvalidateError::Npf(npf)), "immutable");
    rmp.firmware_lock(oa(0)).unwrap();
    assert_eq!(rmp.pvalidate(pvalidate(0, BIG, false)), Err(PvalidateError::Fail(Code::FailInUse)));
}

#[test]
fn rmpadjust_checks_in_order() {
    let rmp = table(2);
    let npf = npf::RMP | npf::FINAL | npf::ENC;
    assign(&rmp, 0, BIG);
    assign(&rmp, 512, K4);
    let set = Attributes { target: Vmpl::V1, perms: Perms(3), vmsa: false };
    let adjust = |vmpl, page, size, set| rmp.rmpadjust(ASID, vmpl, gpa(page), oa(page), size, set);
    let permission = Err(RmpadjustError::Fail(Code::FailPermission));
    assert_eq!(adjust(Vmpl::V1, 900, K4, set), permission, "target not below, page not looked at");
    assert_eq!(adjust(Vmpl::V0, 900, K4, set), Err(RmpadjustError::Npf(npf)));
    assert_eq!(adjust(Vmpl::V0, 3, K4, set), Err(RmpadjustError::Npf(npf | npf::SIZEM)));
    assert_eq!(adjust(Vmpl::V0, 512, BIG, set), Err(RmpadjustError::NotValidated), "before the size");
    rmp.pvalidate(pvalidate(512, K4, true)).unwrap();
    assert_eq!(adjust(Vmpl::V0, 512, BIG, set), Err(RmpadjustError::Fail(Code::FailSizeMismatch)));
    assert_eq!(adjust(Vmpl::V0, 512, K4, set), Ok(()));
    let below = Attributes { target: Vmpl::V2, ..set };
    assert_eq!(adjust(Vmpl::V1, 512, K4, below), Ok(()));
    assert_eq!(adjust(Vmpl::V1, 512, K4, Attributes { perms: Perms(7), ..below }), permission, "more than it has");
    assert_eq!(adjust(Vmpl::V1, 512, K4, Attributes { vmsa: true, ..below }), permission);
    assert_eq!(rmp.entry(oa(512)).q2.perms(), 0x0003_031f);
    assert_eq!(adjust(Vmpl::V0, 512, K4, Attributes { vmsa: true, ..set }), Ok(()));
    assert!(rmp.entry(oa(512)).q1.vmsa());
}

#[test]
fn firmware_moves_pages_through_their_states() {
    let rmp = table(2);
    let step = |page, command| rmp.firmware(oa(page), K4, command);
    rmp.rmpupdate(oa(1), RmpState { gpa: Gpa::new(0), asid: 0, ..immutable(1, K4) }).unwrap();
    for (command, state) in [
        (Command::GctxCreate, PageState::Context),
        (Command::Decommission, PageState::Firmware),
        (Command::SwapOutMetadata, PageState::Metadata),
        (Command::PageReclaim, PageState::Reclaim),
    ] {
        step(1, command).unwrap();
        assert_eq!(rmp.state(oa(1)), state);
        assert!(rmp.entry(oa(1)).assigned());
    }
    let firmware = RmpState { gpa: Gpa::new(0), asid: 0, ..immutable(1, K4) };
    rmp.rmpupdate(oa(1), firmware).unwrap();
    assert_eq!(rmp.state(oa(1)), PageState::Firmware, "reclaimed and given again");
    step(1, Command::PageReclaim).unwrap();
    rmp.rmpupdate(oa(1), firmware).unwrap();
    step(1, Command::PageReclaim).unwrap();
    rmp.rmpupdate(oa(1), RmpState::shared(K4)).unwrap();

    rmp.rmpupdate(oa(2), immutable(2, K4)).unwrap();
    let refused = rmp.launch_update(oa(2), 6, [Perms::NONE; 3], false);
    assert!(matches!(refused, Err(FirmwareError::InvalidPageState { from: PageState::PreGuest, .. })), "{refused:?}");
    rmp.launch_update(oa(2), ASID, [Perms(1), Perms(0), Perms(0)], true).unwrap();
    assert_eq!((rmp.state(oa(2)), rmp.entry(oa(2)).q2.perms()), (PageState::GuestValid, 0x011f));
    rmp.rmpupdate(oa(2), immutable(2, K4)).unwrap();
    assert_eq!(step(2, Command::SwapOut), Ok(()));
    assert_eq!(step(2, Command::SwapIn), Ok(()));
    assert_eq!(step(2, Command::PageReclaim), Ok(()));
    assert_eq!(rmp.state(oa(2)), PageState::GuestValid);
    assert!(step(2, Command::GctxCreate).is_err());

    assign(&rmp, 512, BIG);
    assert_eq!(step(513, Command::PageReclaim), Err(FirmwareError::InvalidPageSize { at: oa(513) }), "size named is not the entry's");
    assert_eq!(rmp.firmware(Oa::new(0), K4, Command::SetHvFixed), Err(FirmwareError::NotCovered { at: Oa::new(0) }));
    assert_summaries(&rmp);
}

#[test]
fn unsmash_takes_512_alike() {
    let rmp = table(1);
    assign_valid(&rmp, 0, BIG);
    rmp.psmash(oa(0)).unwrap();
    assert_eq!(rmp.page_unsmash(oa(0)), Err(FirmwareError::NotUniform { at: oa(0), index: 0 }), "still mutable");
    for page in 0..512 {
        assert!(rmp.page_unsmash(oa(0)).is_err());
        rmp.rmpupdate(oa(page), immutable(page, K4)).unwrap();
    }
    let [q1, q2] = rmp.raw(oa(300));
    rmp.poke(oa(300), [q1, q2 | 0x100]);
    assert_eq!(rmp.page_unsmash(oa(0)), Err(FirmwareError::NotUniform { at: oa(0), index: 300 }), "permissions differ");
    rmp.poke(oa(300), [q1, q2]);
    rmp.page_unsmash(oa(0)).unwrap();
    assert_eq!(rmp.raw(oa(0)), [0x4028_0012_0000_0003, 0x1f]);
    assert_eq!(rmp.raw(oa(5)), [1, 0]);
    assert_eq!(rmp.state(oa(5)), PageState::GuestValid);
    assert_summaries(&rmp);
}
