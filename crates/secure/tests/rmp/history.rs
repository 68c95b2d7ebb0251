//! Random histories against an oracle: a plain list of pages on which the rules are written a second time, as slowly and literally as the
//! documents put them. Codes, entries and access checks must agree after every step, and the summaries with the entries.

use crate::common::*;
use addr::{Gpa, Oa, Span};
use lockstep_secure::*;
use proptest::prelude::*;

const PAGES: usize = 1024;

/// What the documents say about a 4 KiB page. In a 2 MiB page only the first of the 512 counts.
#[derive(Clone, Copy, Default, PartialEq, Debug)]
struct Page {
    assigned: bool,
    huge: bool,
    immutable: bool,
    gfn: u64,
    asid: u32,
    validated: bool,
    vmsa: bool,
    perms: [u8; 4],
}

struct Oracle {
    pages: Vec<Page>,
    locked: [bool; PAGES / 512],
}

fn base(page: usize) -> usize {
    page / 512 * 512
}

impl Oracle {
    fn new() -> Self {
        Self { pages: vec![Page::default(); PAGES], locked: [false; PAGES / 512] }
    }

    fn is_huge(&self, page: usize) -> bool {
        self.pages[base(page)].huge
    }

    /// What holds for this page.
    fn effective(&self, page: usize) -> Page {
        if !self.is_huge(page) {
            return self.pages[page];
        }
        let mut first = self.pages[base(page)];
        // What firmware owns has no GPA to count up.
        if first.asid != 0 {
            first.gfn += (page % 512) as u64;
        }
        first
    }

    fn holder(&mut self, page: usize) -> &mut Page {
        let at = if self.is_huge(page) { base(page) } else { page };
        &mut self.pages[at]
    }

    fn rmpupdate(&mut self, page: usize, new: RmpState) -> Result<(), Code> {
        let huge = new.pagesize == RmpSize::M2;
        let gfn = new.gpa.get() >> 12;
        if new.gpa.get() & 0xfff != 0 || new.gpa.get() >= 1 << 51 || new.asid >= 1023 {
            return Err(Code::FailInput);
        }
        if huge && (!page.is_multiple_of(512) || !gfn.is_multiple_of(512)) {
            return Err(Code::FailInput);
        }
        if !new.assigned && (new.immutable || new.asid != 0) {
            return Err(Code::FailInput);
        }
        if new.assigned && new.asid == 0 && !(new.immutable && gfn == 0) {
            return Err(Code::FailInput);
        }
        if self.pages[page].immutable {
            return Err(Code::FailPermission);
        }
        if self.locked[page / 512] {
            return Err(Code::FailOverlap);
        }
        if !huge && self.is_huge(page) {
            return Err(Code::FailOverlap);
        }
        if huge && !self.is_huge(page) {
            for other in page..page + 512 {
                if self.pages[other].assigned || self.pages[other].immutable {
                    return Err(Code::FailOverlap);
                }
            }
        }
        let old = self.pages[page];
        let mut next = Page { assigned: new.assigned, ..Page::default() };
        if new.assigned {
            next = Page { huge, immutable: new.immutable, gfn, asid: new.asid, perms: [0x1f, 0, 0, 0], ..next };
            let changed = (old.assigned, old.huge, old.gfn, old.asid) != (next.assigned, next.huge, next.gfn, next.asid);
            if !changed && new.asid != 0 {
                next = Page { immutable: new.immutable, ..old };
            }
        }
        self.pages[page] = next;
        if huge {
            for other in page + 1..page + 512 {
                self.pages[other] = Page { assigned: next.assigned, ..Page::default() };
            }
        }
        Ok(())
    }

    fn psmash(&mut self, page: usize) -> Result<(), Code> {
        if !page.is_multiple_of(512) || !self.pages[page].huge {
            return Err(Code::FailInput);
        }
        if self.locked[page / 512] {
            return Err(Code::FailInUse);
        }
        let first = self.pages[page];
        for k in 0..512 {
            let gfn = if first.asid == 0 { first.gfn } else { first.gfn + k as u64 };
            self.pages[page + k] = Page { huge: false, gfn, ..first };
        }
        Ok(())
    }

    fn pvalidate(&mut self, page: usize, op: Pvalidate) -> Result<Validated, PvalidateError> {
        let npf = npf::RMP | npf::FINAL | npf::ENC;
        if op.vmpl != Vmpl::V0 {
            return Err(PvalidateError::Fail(Code::FailPermission));
        }
        let want_huge = op.size == RmpSize::M2;
        if want_huge && (!page.is_multiple_of(512) || !op.gpa.get().is_multiple_of(M2)) {
            return Err(PvalidateError::Fail(Code::FailInput));
        }
        // A lock over the range is in the first entry; it matters to whom that entry speaks for.
        if self.locked[page / 512] && (self.is_huge(page) || page.is_multiple_of(512)) {
            return Err(PvalidateError::Fail(Code::FailInUse));
        }
        let now = self.effective(page);
        if !now.assigned || now.immutable || now.asid != op.asid || now.asid == 0 || now.gfn << 12 != op.gpa.get() {
            return Err(PvalidateError::Npf(npf));
        }
        if now.huge && !want_huge {
            return Err(PvalidateError::Npf(npf | npf::SIZEM));
        }
        if !now.huge && want_huge {
            return Err(PvalidateError::Fail(Code::FailSizeMismatch));
        }
        self.holder(page).validated = op.validate;
        Ok(Validated { changed: now.validated != op.validate })
    }

    /// A device, by looking at every page of the leaf.
    fn check(&self, who: Requester, leaf: Span<Oa>, at: Gpa, access: Access) -> Option<Reason> {
        let inside = |&page: &usize| leaf.contains(oa(page as u64));
        let pages: Vec<usize> = (0..PAGES).filter(inside).collect();
        let shared = || pages.iter().any(|&page| self.pages[page].assigned).then_some(Reason::Assigned);
        let Requester::Trusted { asid, vmpl, vtom } = who else { return shared() };
        let private = match vtom {
            Some(vtom) if at >= vtom => false,
            Some(vtom) if at.get() + leaf.last_offset() >= vtom.get() => return Some(Reason::StraddlesVtom),
            Some(_) => true,
            None => index(leaf.start()).is_some_and(|page| self.pages[page].assigned),
        };
        if !private {
            return shared();
        }
        let Some(first) = index(leaf.start()) else { return Some(Reason::NotCovered) };
        let now = self.effective(first);
        if self.locked[first / 512] && (self.is_huge(first) || first.is_multiple_of(512)) {
            return Some(Reason::InUse);
        }
        let size = if now.huge { M2 } else { 4096 };
        let perms = now.perms[vmpl as usize];
        let bit = if access == Access::Write { 2 } else { 1 };
        if !now.assigned {
            Some(Reason::NotAssigned)
        } else if now.asid != asid || asid == 0 {
            Some(Reason::WrongAsid)
        } else if now.gfn << 12 != at.get() {
            Some(Reason::WrongGpa)
        } else if now.immutable {
            Some(Reason::Immutable)
        } else if leaf.len() != size {
            Some(Reason::Size)
        } else if !now.validated {
            Some(Reason::NotValidated)
        } else if perms & bit == 0 || perms & 3 == 2 {
            Some(Reason::Permission)
        } else {
            None
        }
    }
}

fn index(oa: Oa) -> Option<usize> {
    let page = oa.get().checked_sub(START.get())? >> 12;
    (page < PAGES as u64).then_some(page as usize)
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Update(u64, RmpState),
    Smash(u64),
    Validate(Pvalidate, u64),
    Perms(u64, Vmpl, u8),
    Reclaim(u64),
    Fix(u64),
    Lock(u64),
    Unlock(u64),
}

fn page() -> impl Strategy<Value = u64> {
    prop_oneof![6 => prop::sample::select(vec![0u64, 1, 2, 511, 512, 513, 1023]), 3 => 0..PAGES as u64]
}

fn size() -> impl Strategy<Value = RmpSize> {
    prop_oneof![Just(RmpSize::K4), Just(RmpSize::M2)]
}

fn asid() -> impl Strategy<Value = u32> {
    prop_oneof![8 => Just(ASID), 2 => Just(6), 1 => Just(0), 1 => Just(1023)]
}

/// Mostly the page's own place, so that histories get somewhere.
fn place(page: u64) -> impl Strategy<Value = Gpa> {
    prop_oneof![12 => Just(gpa(page)), 1 => Just(gpa(0)), 1 => Just(Gpa::new(0)), 1 => Just(Gpa::new(1 << 51))]
}

fn update() -> impl Strategy<Value = Op> {
    (page(), size(), asid(), prop::bool::weighted(0.7), prop::bool::weighted(0.15)).prop_flat_map(
        |(page, pagesize, asid, assigned, immutable)| {
            let page = if pagesize == RmpSize::M2 && page % 3 != 0 { page / 512 * 512 } else { page };
            let asid = if assigned || asid == 6 { asid } else { 0 };
            place(page).prop_map(move |gpa| {
                // What firmware shall own is mostly asked for as it must be.
                let firmware = asid == 0 && assigned && gpa != Gpa::new(1 << 51);
                let (gpa, immutable) = if firmware { (Gpa::new(0), true) } else { (gpa, immutable) };
                Op::Update(page, RmpState { gpa, assigned, pagesize, immutable, asid })
            })
        },
    )
}

fn op() -> impl Strategy<Value = Op> {
    let validate =
        (page(), size(), asid(), any::<bool>(), prop::bool::weighted(0.05)).prop_flat_map(|(page, size, asid, validate, low)| {
            let page = if size == RmpSize::M2 && page % 3 != 0 { page / 512 * 512 } else { page };
            let vmpl = if low { Vmpl::V1 } else { Vmpl::V0 };
            place(page).prop_map(move |gpa| Op::Validate(Pvalidate { asid, vmpl, gpa, oa: oa(page), size, validate }, page))
        });
    let level = prop::sample::select(vec![Vmpl::V1, Vmpl::V2, Vmpl::V3]);
    prop_oneof![
        10 => update(),
        8 => validate,
        3 => prop::sample::select(vec![0u64, 512, 512, 0, 1]).prop_map(Op::Smash),
        3 => (page(), level, 0..32u8).prop_map(|(page, vmpl, perms)| Op::Perms(page, vmpl, perms)),
        2 => page().prop_map(Op::Reclaim),
        1 => page().prop_map(Op::Fix),
        1 => page().prop_map(Op::Lock),
        2 => page().prop_map(Op::Unlock),
    ]
}

fn run(rmp: &Table, oracle: &mut Oracle, op: Op) {
    match op {
        Op::Update(page, new) => assert_eq!(rmp.rmpupdate(oa(page), new), oracle.rmpupdate(page as usize, new)),
        Op::Smash(page) => assert_eq!(rmp.psmash(oa(page)), oracle.psmash(page as usize)),
        Op::Validate(op, page) => assert_eq!(rmp.pvalidate(op), oracle.pvalidate(page as usize, op)),
        Op::Perms(page, target, perms) => {
            let now = oracle.effective(page as usize);
            let size = if now.huge { RmpSize::M2 } else { RmpSize::K4 };
            let page = if now.huge { base(page as usize) as u64 } else { page };
            let set = Attributes { target, perms: Perms(perms), vmsa: perms & 16 != 0 };
            let at = Gpa::new(oracle.effective(page as usize).gfn << 12);
            let done = rmp.rmpadjust(now.asid, Vmpl::V0, at, oa(page), size, set);
            let locked = oracle.locked[page as usize / 512] && (now.huge || page.is_multiple_of(512));
            let allowed = now.assigned && now.asid != 0 && !now.immutable && now.validated && !locked;
            assert_eq!(done.is_ok(), allowed, "{done:?}");
            if allowed {
                let holder = oracle.holder(page as usize);
                holder.perms[target as usize] = perms;
                holder.vmsa = perms & 16 != 0;
            }
        }
        Op::Reclaim(page) => {
            let now = oracle.effective(page as usize);
            let size = if now.huge { RmpSize::M2 } else { RmpSize::K4 };
            let aligned = !now.huge || page.is_multiple_of(512);
            // A hypervisor page is not firmware's to give back; a context ends otherwise.
            let allowed = now.assigned && aligned && !oracle.locked[page as usize / 512];
            assert_eq!(rmp.firmware(oa(page), size, Command::PageReclaim).is_ok(), allowed);
            if allowed {
                oracle.holder(page as usize).immutable = false;
                if now.asid == 0 {
                    oracle.holder(page as usize).validated = false;
                }
            }
        }
        Op::Fix(page) => {
            let now = oracle.effective(page as usize);
            let allowed = !now.assigned && !now.immutable && !oracle.locked[page as usize / 512];
            assert_eq!(rmp.firmware(oa(page), RmpSize::K4, Command::SetHvFixed).is_ok(), allowed);
            if allowed {
                oracle.holder(page as usize).immutable = true;
            }
        }
        Op::Lock(page) => {
            let free = !oracle.locked[page as usize / 512];
            assert_eq!(rmp.firmware_lock(oa(page)).is_ok(), free);
            oracle.locked[page as usize / 512] = true;
        }
        Op::Unlock(page) => {
            rmp.firmware_unlock(oa(page));
            oracle.locked[page as usize / 512] = false;
        }
    }
}

fn compare_entries(rmp: &Table, oracle: &Oracle) {
    for page in 0..PAGES {
        let (is, should) = (rmp.entry(oa(page as u64)), oracle.effective(page));
        let is = Page {
            assigned: is.assigned(),
            huge: is.size() == RmpSize::M2,
            immutable: is.q1.immutable(),
            gfn: is.q1.gfn(),
            asid: is.asid(),
            validated: is.validated(),
            vmsa: is.q1.vmsa(),
            perms: is.q2.perms().to_le_bytes(),
        };
        assert_eq!(is, should, "page {page}");
    }
}

fn compare_checks(rmp: &Table, oracle: &Oracle, rng: &mut fastrand::Rng) {
    for _ in 0..30 {
        let page = if rng.bool() { rng.u64(..PAGES as u64) } else { *rng.choice(&[0u64, 1, 511, 512, 1023]).unwrap() };
        let lg2 = *rng.choice(&[12u8, 12, 12, 13, 16, 21, 21, 22, 30, 31]).unwrap();
        let leaf = leaf(page, lg2);
        let first = Gpa::new(GUEST.get().wrapping_add(leaf.start().get()).wrapping_sub(START.get()));
        let vmpl = *rng.choice(&[Vmpl::V0, Vmpl::V0, Vmpl::V1, Vmpl::V3]).unwrap();
        let vtom = *rng.choice(&[None, None, Some(gpa(512)), Some(Gpa::new(1 << 50))]).unwrap();
        let asid = *rng.choice(&[ASID, ASID, ASID, 6, 0]).unwrap();
        let who = if rng.u8(..3) == 0 { Requester::Untrusted } else { Requester::Trusted { asid, vmpl, vtom } };
        let access = if rng.bool() { Access::Read } else { Access::Write };
        let is = rmp.check_device(who, leaf, first, access).err().map(|refusal| refusal.reason);
        assert_eq!(is, oracle.check(who, leaf, first, access), "{who:?} {leaf} {access:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn agrees_with_the_oracle(ops in prop::collection::vec(op(), 1..80), seed: u64) {
        let rmp = table(2);
        let mut oracle = Oracle::new();
        let mut rng = fastrand::Rng::with_seed(seed);
        for op in ops {
            run(&rmp, &mut oracle, op);
            compare_entries(&rmp, &oracle);
            compare_checks(&rmp, &oracle, &mut rng);
            assert_summaries(&rmp);
        }
    }
}
