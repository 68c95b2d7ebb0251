//! Access checks: who may reach what, in which order the reasons come, and how a refusal is delivered.

use crate::common::*;
use addr::{Gpa, Oa, Span};
use lockstep_secure::*;

const K4: RmpSize = RmpSize::K4;
const BIG: RmpSize = RmpSize::M2;
const NPF: u64 = npf::RMP | npf::FINAL;

fn trusted(vtom: Option<Gpa>) -> Requester {
    Requester::Trusted { asid: ASID, vmpl: Vmpl::V0, vtom }
}

fn reason(result: Result<(), Refusal>) -> Option<Reason> {
    result.err().map(|refusal| refusal.reason)
}

#[test]
fn untrusted_leaf_must_be_shared_as_a_whole() {
    // Page 512 is the first of the next GiB; blocks up to there and beyond.
    let rmp = table(1024);
    let check = |span| rmp.check_device(Requester::Untrusted, span, Gpa::new(0), Access::Read);
    for private in [512, 513, 1023, 512 + 300 * 512 + 77] {
        assign(&rmp, private, K4);
        for lg2 in 12..=36 {
            let refusal = check(leaf(private, lg2)).unwrap_err();
            assert_eq!((refusal.reason, refusal.at, refusal.delivery), (Reason::Assigned, oa(private), Delivery::Aborted), "{lg2}");
            assert!(!refusal.size_mismatch);
            // The neighbour of the same size.
            let neighbour = Span::block(Oa::new(leaf(private, lg2).start().get() ^ 1 << lg2), lg2);
            assert_eq!(check(neighbour), Ok(()), "{lg2}");
        }
        rmp.rmpupdate(oa(private), RmpState::shared(K4)).unwrap();
        assert_eq!(check(leaf(private, 40)), Ok(()));
    }
    // Spans that are no blocks: two pages across the GiB, everything, and what no segment covers.
    assign(&rmp, 512, BIG);
    assert_eq!(check(Span::of(oa(510), Oa::new(oa(512).get() - 1))), Ok(()));
    assert_eq!(check(Span::of(oa(511), oa(512))).unwrap_err().at, oa(512));
    assert_eq!(check(Span::of(oa(1023), oa(1024))).unwrap_err().at, oa(1023), "last page of a 2 MiB entry");
    assert_eq!(check(Span::whole()).unwrap_err().at, oa(512));
    assert_eq!(check(Span::from_len(Oa::new(0), START.get()).unwrap()), Ok(()));
    assert_eq!(check(Span::of(oa(1024 * 512), Oa::new(u64::MAX))), Ok(()));
}

#[test]
fn strict_refuses_leaves_above_2m() {
    let rmp = table(1);
    let check = |lg2| reason(rmp.check_device(Requester::Untrusted, leaf(0, lg2), Gpa::new(0), Access::Read));
    assert_eq!((check(22), check(30)), (None, None));
    rmp.set_strict(true);
    assert_eq!((check(12), check(21), check(22), check(30)), (None, None, Some(Reason::TooLarge), Some(Reason::TooLarge)));
}

/// The other reading: whoever asks about a page gets an answer for that page, whatever the size of its entry.
#[test]
fn judged_by_page_sizes_are_not_compared() {
    let rmp = table(2);
    assign_valid(&rmp, 512, BIG);
    let check = |page, at| reason(rmp.check_device(trusted(None), leaf(page, 12), gpa(at), Access::Write));
    assert_eq!(check(515, 515), Some(Reason::Size));
    rmp.set_by_page(true);
    assert!(rmp.checks_pages());
    assert_eq!((check(515, 515), check(512, 512)), (None, None));
    assert_eq!(check(515, 516), Some(Reason::WrongGpa), "and nothing else is forgiven");
    let other = Requester::Trusted { asid: ASID, vmpl: Vmpl::V1, vtom: None };
    assert_eq!(reason(rmp.check_device(other, leaf(515, 12), gpa(515), Access::Read)), Some(Reason::Permission));
    assert_eq!(reason(rmp.check_device(Requester::Untrusted, leaf(515, 12), gpa(515), Access::Read)), Some(Reason::Assigned));
}

/// A device that translated earlier: each page answers for itself, by all that needs no address.
#[test]
fn translated_requests_are_judged_by_their_pages() {
    let rmp = table(2);
    assign_valid(&rmp, 2, K4);
    assign_valid(&rmp, 512, BIG);
    let check = |who, from, to| rmp.check_translated(who, Span::of(oa(from), Oa::new(oa(to).get() - 1)), Access::Write);
    let refused = check(Requester::Untrusted, 1, 4).unwrap_err();
    assert_eq!((refused.reason, refused.at, refused.delivery), (Reason::Assigned, oa(2), Delivery::Aborted));
    assert_eq!((check(Requester::Untrusted, 0, 2), check(Requester::Untrusted, 3, 512)), (Ok(()), Ok(())));
    assert_eq!(check(Requester::Untrusted, 700, 701).unwrap_err().at, oa(700));
    // Shared and private, small and large, in one go.
    assert_eq!(check(trusted(None), 0, 600), Ok(()));
    let inside = Span::of(Oa::new(oa(2).get() + 0x123), Oa::new(oa(2).get() + 0x456));
    assert_eq!(rmp.check_translated(trusted(None), inside, Access::Read), Ok(()));
    let stranger = Requester::Trusted { asid: ASID + 1, vmpl: Vmpl::V0, vtom: None };
    let low = Requester::Trusted { asid: ASID, vmpl: Vmpl::V2, vtom: None };
    for (who, why) in [(stranger, Reason::WrongAsid), (low, Reason::Permission)] {
        let refused = check(who, 0, 600).unwrap_err();
        assert_eq!((refused.reason, refused.at), (why, oa(2)));
    }
    rmp.pvalidate(pvalidate(2, K4, false)).unwrap();
    assert_eq!(reason(check(trusted(None), 2, 3)), Some(Reason::NotValidated));
    rmp.rmpupdate(oa(2), RmpState::shared(K4)).unwrap();
    assert_eq!(check(stranger, 0, 512), Ok(()));
    let uncovered = Span::block(Oa::new(0), 12);
    assert_eq!(rmp.check_translated(trusted(None), uncovered, Access::Write), Ok(()));
}

#[test]
fn trusted_private_rule_in_order() {
    let rmp = table(2);
    let vtom = Some(Gpa::new(1 << 40));
    let check = |who, page, lg2, at, access| rmp.check_device(who, leaf(page, lg2), at, access);
    let read = |who, page, lg2| reason(check(who, page, lg2, gpa(page), Access::Read));
    assert_eq!(read(trusted(vtom), 1, 12), Some(Reason::NotAssigned));
    assert_eq!(read(trusted(None), 1, 12), None, "the page decides: shared");
    let uncovered = Span::block(Oa::new(0), 12);
    assert_eq!(reason(rmp.check_device(trusted(vtom), uncovered, gpa(0), Access::Read)), Some(Reason::NotCovered));
    assert_eq!(reason(rmp.check_device(trusted(None), uncovered, gpa(0), Access::Read)), None);

    assign_valid(&rmp, 1, K4);
    for vtom in [vtom, None] {
        // From the last reason to the first, each hiding those after it.
        let other = Requester::Trusted { asid: ASID, vmpl: Vmpl::V1, vtom };
        let stranger = Requester::Trusted { asid: 6, vmpl: Vmpl::V1, vtom };
        assert_eq!(read(trusted(vtom), 1, 12), None);
        assert_eq!(reason(check(trusted(vtom), 1, 12, gpa(1), Access::Write)), None);
        assert_eq!(read(other, 1, 12), Some(Reason::Permission));
        rmp.pvalidate(pvalidate(1, K4, false)).unwrap();
        assert_eq!(read(other, 1, 12), Some(Reason::NotValidated));
        assert_eq!(
            read(other, 1, 13),
            Some(if vtom.is_some() { Reason::NotAssigned } else { Reason::Assigned }),
            "leaf starts at a shared page"
        );
        rmp.rmpupdate(oa(1), RmpState { immutable: true, ..RmpState::private(gpa(1), K4, ASID) }).unwrap();
        assert_eq!(read(other, 1, 12), Some(Reason::Immutable));
        assert_eq!(reason(check(other, 1, 12, gpa(2), Access::Read)), Some(Reason::WrongGpa));
        assert_eq!(reason(check(stranger, 1, 12, gpa(2), Access::Read)), Some(Reason::WrongAsid));
        rmp.firmware_lock(oa(0)).unwrap();
        rmp.firmware_unlock(oa(0));
        rmp.firmware(oa(1), K4, Command::PageReclaim).unwrap();
        rmp.pvalidate(pvalidate(1, K4, true)).unwrap();
    }
    let odd = Requester::Trusted { asid: 0, vmpl: Vmpl::V0, vtom };
    assert_eq!(read(odd, 1, 12), Some(Reason::WrongAsid));
    for bit in 10..32 {
        let odd = Requester::Trusted { asid: ASID | 1 << bit, vmpl: Vmpl::V0, vtom };
        assert_eq!(read(odd, 1, 12), Some(Reason::WrongAsid), "an ASID that spills over its field into bit {bit}");
    }
    assert_eq!(reason(check(trusted(None), 1, 12, Gpa::new(gpa(1).get() | 1 << 62), Access::Read)), Some(Reason::WrongGpa));
    assert_eq!(reason(check(trusted(None), 1, 12, Gpa::new(gpa(1).get() | 1), Access::Read)), Some(Reason::WrongGpa));
}

#[test]
fn trusted_sizes_must_match_exactly() {
    let rmp = table(2);
    assign_valid(&rmp, 0, BIG);
    let check = |page, lg2| rmp.check_device(trusted(None), leaf(page, lg2), gpa(page), Access::Write);
    assert_eq!(check(0, 21), Ok(()));
    for (page, lg2) in [(0, 12), (7, 12), (0, 13), (0, 20), (0, 22)] {
        let refusal = rmp.check_device(trusted(None), span(oa(page), 1 << lg2), gpa(page), Access::Write).unwrap_err();
        assert!(refusal.size_mismatch && refusal.reason == Reason::Size, "page {page} lg2 {lg2}");
    }
    rmp.psmash(oa(0)).unwrap();
    assert_eq!((check(0, 12), check(511, 12)), (Ok(()), Ok(())));
    assert!(check(0, 21).unwrap_err().size_mismatch);
    assert!(check(0, 13).unwrap_err().size_mismatch);
}

#[test]
fn a_size_mismatch_passes_while_a_split_is_under_way() {
    let rmp = table(2);
    assign_valid(&rmp, 0, BIG);
    assign_valid(&rmp, 512, BIG);
    let check = |who, page, lg2| rmp.check_device(who, leaf(page, lg2), gpa(page), Access::Write);
    let before = rmp.smash_seq(oa(0));
    assert_eq!(before & 1, 0);
    rmp.smash_begin(oa(0));
    rmp.smash_begin(oa(512));
    assert_eq!(rmp.smash_seq(oa(900)) & 1, 1, "two at once are still odd");
    assert_eq!(check(trusted(None), 7, 12), Ok(()), "leaf cut, entry not yet");
    rmp.psmash(oa(512)).unwrap();
    assert_eq!(check(trusted(None), 512, 21), Ok(()), "entry split, leaf not yet");
    let at_v1 = Requester::Trusted { asid: ASID, vmpl: Vmpl::V1, vtom: None };
    assert_eq!(reason(check(at_v1, 7, 12)), Some(Reason::Size), "only the size may be wrong");
    assert_eq!(
        reason(rmp.check_device(trusted(None), span(oa(0), 8192), gpa(0), Access::Read)),
        Some(Reason::Size),
        "no entry has that size"
    );
    rmp.rmpupdate(oa(800), RmpState::shared(K4)).unwrap();
    assert_eq!(reason(check(trusted(None), 512, 21)), Some(Reason::Size), "one page went");
    rmp.smash_end(oa(0));
    assert_eq!(rmp.smash_seq(oa(0)) & 1, 1);
    rmp.smash_end(oa(512));
    let after = rmp.smash_seq(oa(0));
    assert!(after & 1 == 0 && after != before);
    assert_eq!(reason(check(trusted(None), 7, 12)), Some(Reason::Size));
    assert_eq!(rmp.smash_seq(Oa::new(0)), 0);
}

#[test]
fn vtom_splits_private_from_shared() {
    let rmp = table(2);
    let vtom = Some(gpa(512));
    assign_valid(&rmp, 511, K4);
    let check = |oa_span, at| reason(rmp.check_device(trusted(vtom), oa_span, at, Access::Read));
    assert_eq!(check(leaf(511, 12), gpa(511)), None);
    assert_eq!(check(leaf(600, 12), gpa(511)), Some(Reason::NotAssigned), "below vTOM nothing shared");
    assert_eq!(check(leaf(600, 12), gpa(512)), None);
    assert_eq!(check(leaf(511, 12), gpa(512)), Some(Reason::Assigned), "at vTOM nothing private");
    assert_eq!(check(leaf(0, 22), gpa(0)), Some(Reason::StraddlesVtom));
}

#[test]
fn illegal_permissions_help_nobody() {
    let rmp = table(1);
    assign_valid(&rmp, 0, K4);
    let [q1, _] = rmp.raw(oa(0));
    for (perms, read, write) in [(0x3, true, true), (0x1, true, false), (0x2, false, false), (0x23, false, false), (0xc, false, false)] {
        rmp.poke(oa(0), [q1, perms]);
        let check = |access| rmp.check_device(trusted(None), leaf(0, 12), gpa(0), access).is_ok();
        assert_eq!((check(Access::Read), check(Access::Write)), (read, write), "{perms:#x}");
    }
}

#[test]
fn host_cpu() {
    let rmp = table(2);
    assign(&rmp, 7, K4);
    let check = |page, lg2, access| rmp.check_cpu(Cpu::Host, oa(page), Gpa::new(0), lg2, access);
    assert_eq!(check(7, 12, Access::Read), Ok(()), "reads are never checked");
    let refusal = check(7, 12, Access::Write).unwrap_err();
    assert_eq!((refusal.delivery, refusal.at), (Delivery::PageFault(1 << 31), oa(7)));
    assert_eq!(check(8, 12, Access::Write), Ok(()));
    assert_eq!(check(8, 21, Access::Write).unwrap_err().at, oa(7), "the whole 2 MiB must be free");
    assert_eq!(check(520, 30, Access::Write), Ok(()), "1 GiB counts as 2 MiB");
    assert_eq!(rmp.check_cpu(Cpu::PlainGuest, oa(7), Gpa::new(0), 12, Access::Write).unwrap_err().delivery, Delivery::Npf(NPF));
    assert_eq!(rmp.check_cpu(Cpu::Host, Oa::new(0), Gpa::new(0), 12, Access::Write), Ok(()));
}

#[test]
fn guest_cpu() {
    let rmp = table(2);
    assign(&rmp, 1, K4);
    assign_valid(&rmp, 512, BIG);
    let guest = |private| Cpu::Guest { asid: ASID, vmpl: Vmpl::V0, private };
    let check = |private, page, lg2, access| rmp.check_cpu(guest(private), oa(page), gpa(page), lg2, access).err();
    let delivery = |refusal: Option<Refusal>| refusal.map(|refusal| refusal.delivery);
    assert_eq!(delivery(check(true, 1, 12, Access::Read)), Some(Delivery::Vc(0x404)), "not validated goes to the guest");
    assert_eq!(delivery(check(true, 1, 21, Access::Read)), Some(Delivery::Npf(NPF | npf::ENC | npf::SIZEM)), "size before validated");
    assert_eq!(delivery(check(true, 2, 12, Access::Read)), Some(Delivery::Npf(NPF | npf::ENC)));
    assert_eq!(check(true, 700, 21, Access::Write), None);
    assert_eq!(check(true, 700, 30, Access::Write), None, "a 1 GiB nested leaf goes with a 2 MiB entry");
    assert_eq!(delivery(check(true, 700, 12, Access::Write)), Some(Delivery::Npf(NPF | npf::ENC | npf::SIZEM)));
    let low = Cpu::Guest { asid: ASID, vmpl: Vmpl::V3, private: true };
    let refusal = rmp.check_cpu(low, oa(700), gpa(700), 21, Access::Read).unwrap_err();
    assert_eq!(refusal.delivery, Delivery::Npf(NPF | npf::ENC | npf::VMPL));
    let elsewhere = Gpa::new(gpa(700).get() + 0x123);
    assert!(rmp.check_cpu(guest(true), Oa::new(oa(700).get() + 0x123), elsewhere, 21, Access::Read).is_ok(), "bytes inside the page");
    assert_eq!(reason(rmp.check_cpu(guest(true), oa(700), elsewhere, 21, Access::Read)), Some(Reason::WrongGpa));
    // C=0.
    assert_eq!(check(false, 700, 21, Access::Read), None);
    assert_eq!(delivery(check(false, 700, 21, Access::Write)), Some(Delivery::Npf(NPF)));
    assert_eq!(check(false, 2, 12, Access::Write), None);
    assert!(check(false, 2, 12, Access::ExecuteUser).is_some(), "fetches are private whatever C says");
    let walk = check(false, 2, 12, Access::TableWalk);
    assert_eq!(delivery(walk), Some(Delivery::Npf(npf::RMP | npf::ENC | npf::WALK)));
}
