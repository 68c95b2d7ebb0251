//! The host's instructions: RMPUPDATE and PSMASH. Checks come in the documented order (APM vol. 2, 15.36.3 to 15.36.12); the order of
//! the stores is such that a reader at any moment answers as before, as after, or refuses.

use crate::code::{Code, RmpState};
use crate::entry::{Q1, Q2, RawEntry, RmpSize};
use crate::rmp::Rmp;
use crate::segment::{GROUP_PAGES, Group, is_huge};
use crate::state::PageState;
use addr::{Address, Oa};
use core::ops::Deref;
use core::sync::atomic::AtomicU64;

impl<W: Deref<Target = [AtomicU64]>> Rmp<W> {
    /// RMPUPDATE: the host changes who owns the page at `oa`, 4 KiB or 2 MiB as `new` says.
    ///
    /// When ASID, GPA, size or assigned change, or the new ASID is 0, the page is no longer validated, no VMSA, and only VMPL 0 has
    /// permissions; otherwise only `immutable` can have changed and all that is kept.
    ///
    /// # Errors
    /// In this order: `FailInput` for a malformed operand or an address that is not covered; `FailPermission` when the entry is
    /// immutable; `FailInUse` when the page is in use or its entry is locked; `FailOverlap` when an assigned entry of the other size (for 2
    /// MiB also any HV-fixed page) is in the way, firmware has locked the range, or another instruction works on the group for too long.
    #[inline]
    pub fn rmpupdate(&self, oa: Oa, new: RmpState) -> Result<(), Code> {
        sync::fail::step("secure.rmpupdate").map_err(|_| Code::FailInUse)?;
        let new_q1 = new.to_q1(oa)?;
        let (_, page, mut group) = self.lock(oa, Code::FailInput, Code::FailOverlap)?;
        let old = group.q1(page);
        let base = group.q1(group.base);
        if old.immutable() {
            return Err(Code::FailPermission);
        }
        if (old.lock() && page != group.base) || self.any_in_use(oa, new.pagesize.lg2()) {
            return Err(Code::FailInUse);
        }
        if base.lock() {
            return Err(Code::FailOverlap);
        }
        let huge = is_huge(base);
        match new.pagesize {
            RmpSize::K4 if huge => return Err(Code::FailOverlap),
            RmpSize::M2 if !huge && any_in_the_way(&group) => return Err(Code::FailOverlap),
            _ => {}
        }
        let target = target(old, new_q1);
        debug_assert!(
            state(old).may_update(state(target), same_identity(old, new_q1)),
            "{oa}: {:?} to {:?} by RMPUPDATE",
            state(old),
            state(target)
        );
        match new.pagesize {
            RmpSize::K4 => write_page(&mut group, page, old, target),
            RmpSize::M2 => write_block(&mut group, old, target),
        }
        if sync::fail::planted("secure.flip_bit") {
            group.set_q1(page, Q1::from_bits(group.q1(page).into_bits() ^ FLIPPED));
        }
        Ok(())
    }

    /// PSMASH: the 2 MiB entry at `oa` becomes 512 entries of 4 KiB that say the same.
    ///
    /// The other 511 entries mean nothing while the first says 2 MiB, so they are filled first; the store that makes the first say 4 KiB
    /// is the one moment of change.
    ///
    /// # Errors
    /// `FailInput` when `oa` is not 2 MiB aligned; `FailBadAddr` when it is not covered; `FailInput` when there is no assigned 2 MiB entry;
    /// `FailInUse` as for [`Rmp::rmpupdate`], while firmware has locked the range, and when another instruction works on the group for too long.
    pub fn psmash(&self, oa: Oa) -> Result<(), Code> {
        sync::fail::step("secure.psmash").map_err(|_| Code::FailInUse)?;
        if !oa.is_aligned(RmpSize::M2.lg2()) {
            return Err(Code::FailInput);
        }
        let (_, page, group) = self.lock(oa, Code::FailBadAddr, Code::FailInUse)?;
        let base = group.q1(page);
        if !is_huge(base) {
            return Err(Code::FailInput);
        }
        if base.lock() || self.any_in_use(oa, RmpSize::M2.lg2()) {
            return Err(Code::FailInUse);
        }
        if sync::fail::planted("secure.forget_psmash") {
            return Ok(());
        }
        let q2 = group.q2(page);
        let small = base.with_size(RmpSize::K4).with_subpage_count(0);
        // Entries of ASID 0 have no GPA to count up.
        let step = u64::from(base.asid() != 0);
        for (other, k) in group.others().zip(1..) {
            group.set_q2(other, q2);
            group.set_q1(other, small.with_gfn((base.gfn() + k * step) & GFN_MASK));
        }
        group.set_q1(page, small.with_subpage_count(511));
        Ok(())
    }
}

/// What a planted fault flips in an entry: a bit of its GPA.
const FLIPPED: u64 = 1 << 20;
const GFN_MASK: u64 = (1 << 39) - 1;

/// What an entry of a 2 MiB group says besides the first.
pub(crate) const COVERED: Q1 = Q1::new().with_assigned(true);

#[inline]
fn state(q1: Q1) -> PageState {
    PageState::of(RawEntry { q1, q2: Q2::new() })
}

/// Whether owner, GPA, size and assigned stay as they are, so that what the guest has said about the page stays valid.
#[inline]
fn same_identity(old: Q1, new: Q1) -> bool {
    let identity = |q1: Q1| (q1.assigned(), q1.asid(), q1.gfn(), q1.size());
    // Two hypervisor pages are alike whatever GPA stands there.
    (!old.assigned() && !new.assigned()) || (identity(old) == identity(new) && new.asid() != 0)
}

/// The first quadword after the update.
#[inline]
fn target(old: Q1, new: Q1) -> Q1 {
    if new.assigned() && same_identity(old, new) {
        old.with_immutable(new.immutable())
    } else {
        new.with_subpage_count(old.subpage_count())
    }
}

fn any_in_the_way(group: &Group<'_>) -> bool {
    (group.base..group.base + GROUP_PAGES).any(|page| {
        let q1 = group.q1(page);
        q1.assigned() || q1.immutable() || q1.lock()
    })
}

#[inline]
fn write_page(group: &mut Group<'_>, page: usize, old: Q1, target: Q1) {
    let is_base = page == group.base;
    let keeps = target.assigned() && same_identity(old, target);
    if target.assigned() && !old.assigned() {
        group.raise(1);
        if !is_base {
            group.count_subpage(true);
        }
    }
    if keeps {
        group.set_q1(page, target);
        return;
    }
    // The first word decides: as long as it says unassigned or not validated, the second is not looked at.
    group.set_q1(page, target);
    group.set_q2(page, if target.assigned() { Q2::RESET } else { Q2::new() });
    if old.assigned() && !target.assigned() {
        if !is_base {
            group.count_subpage(false);
        }
        group.lower(1);
    }
}

fn write_block(group: &mut Group<'_>, old: Q1, target: Q1) {
    let base = group.base;
    let keeps = target.assigned() && same_identity(old, target);
    if target.assigned() && !old.assigned() {
        group.raise(GROUP_PAGES as u64);
        for page in group.others() {
            group.set_q1(page, COVERED);
        }
    }
    group.set_q1(base, target);
    if keeps {
        return;
    }
    group.set_q2(base, if target.assigned() { Q2::RESET } else { Q2::new() });
    if old.assigned() && !target.assigned() {
        for page in group.others() {
            group.set_q1(page, Q1::new());
            group.set_q2(page, Q2::new());
        }
        group.lower(GROUP_PAGES as u64);
    }
}
