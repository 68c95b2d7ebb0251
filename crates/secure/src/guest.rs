//! The guest's instructions: PVALIDATE and RMPADJUST. The identity test comes before everything the guest may learn, because a page that
//! is not what the guest believes is the host's business (#NPF), not the guest's.

use crate::code::{Attributes, Code, Pvalidate, PvalidateError, RmpadjustError, Validated, npf};
use crate::entry::{Perms, RawEntry, RmpSize, Vmpl};
use crate::rmp::Rmp;
use addr::{Address, Gpa, Oa};
use core::ops::Deref;
use core::sync::atomic::AtomicU64;

impl<W: Deref<Target = [AtomicU64]>> Rmp<W> {
    /// PVALIDATE: the guest accepts a page, or gives it up.
    ///
    /// # Errors
    /// In this order: `Fail(FailPermission)` above VMPL 0; `Fail(FailInput)` for an address that is not aligned to `size`; `Fail(FailInUse)` when the entry is
    /// locked or another instruction works on the group for too long; `Npf` when the page is unassigned, immutable, another guest's, at another
    /// GPA, or 2 MiB when 4 KiB was asked; `Fail(FailSizeMismatch)` when it is 4 KiB and 2 MiB was asked.
    pub fn pvalidate(&self, op: Pvalidate) -> Result<Validated, PvalidateError> {
        let Pvalidate { asid, vmpl, gpa, oa, size, validate } = op;
        if vmpl != Vmpl::V0 {
            return Err(PvalidateError::Fail(Code::FailPermission));
        }
        if !oa.is_aligned(size.lg2()) || !gpa.is_aligned(size.lg2()) {
            return Err(PvalidateError::Fail(Code::FailInput));
        }
        let (segment, page, group) = match self.lock(oa, Code::FailBadAddr, Code::FailInUse) {
            Ok(locked) => locked,
            Err(Code::FailBadAddr) => return Err(PvalidateError::Npf(NPF)),
            Err(code) => return Err(PvalidateError::Fail(code)),
        };
        let from = segment.speaker(page);
        let entry = group.effective(page);
        if entry.q1.lock() {
            return Err(PvalidateError::Fail(Code::FailInUse));
        }
        if let Some(bits) = wrong_page(entry, asid, gpa, size) {
            return Err(PvalidateError::Npf(bits));
        }
        if size == RmpSize::M2 && entry.size() == RmpSize::K4 {
            return Err(PvalidateError::Fail(Code::FailSizeMismatch));
        }
        let changed = entry.validated() != validate;
        if changed {
            group.set_q1(from, group.q1(from).with_validated(validate));
        }
        Ok(Validated { changed })
    }

    /// RMPADJUST: the guest, running at `vmpl`, sets what a less privileged level may do with a page.
    ///
    /// # Errors
    /// In this order: `Fail(FailPermission)` when the target is not less privileged; `Fail(FailInput)` for an address that is not aligned; `Fail(FailInUse)` as
    /// for PVALIDATE; `Npf` for the wrong page as there; `NotValidated`; `Fail(FailSizeMismatch)`; `Fail(FailPermission)` when `vmpl` gives
    /// what it does not have, or makes a VMSA without being VMPL 0.
    pub fn rmpadjust(&self, asid: u32, vmpl: Vmpl, gpa: Gpa, oa: Oa, size: RmpSize, set: Attributes) -> Result<(), RmpadjustError> {
        if set.target <= vmpl {
            return Err(RmpadjustError::Fail(Code::FailPermission));
        }
        if !oa.is_aligned(size.lg2()) || !gpa.is_aligned(size.lg2()) || set.perms.0 & !Perms::FULL.0 != 0 {
            return Err(RmpadjustError::Fail(Code::FailInput));
        }
        let (segment, page, group) = match self.lock(oa, Code::FailBadAddr, Code::FailInUse) {
            Ok(locked) => locked,
            Err(Code::FailBadAddr) => return Err(RmpadjustError::Npf(NPF)),
            Err(code) => return Err(RmpadjustError::Fail(code)),
        };
        let from = segment.speaker(page);
        let entry = group.effective(page);
        if entry.q1.lock() {
            return Err(RmpadjustError::Fail(Code::FailInUse));
        }
        if let Some(bits) = wrong_page(entry, asid, gpa, size) {
            return Err(RmpadjustError::Npf(bits));
        }
        if !entry.validated() {
            return Err(RmpadjustError::NotValidated);
        }
        if size == RmpSize::M2 && entry.size() == RmpSize::K4 {
            return Err(RmpadjustError::Fail(Code::FailSizeMismatch));
        }
        if !entry.q2.perms_of(vmpl).has(set.perms) || (set.vmsa && vmpl != Vmpl::V0) {
            return Err(RmpadjustError::Fail(Code::FailPermission));
        }
        group.set_q2(from, entry.q2.with_perms_of(set.target, set.perms));
        if vmpl == Vmpl::V0 {
            group.set_q1(from, group.q1(from).with_vmsa(set.vmsa));
        }
        Ok(())
    }
}

const NPF: u64 = npf::RMP | npf::FINAL | npf::ENC;

/// The bits of the nested page fault when the page is not the one that the guest means.
fn wrong_page(entry: RawEntry, asid: u32, gpa: Gpa, size: RmpSize) -> Option<u64> {
    if !entry.assigned() || entry.q1.immutable() || entry.asid() != asid || asid == 0 || entry.gpa() != gpa {
        return Some(NPF);
    }
    (size == RmpSize::K4 && entry.size() == RmpSize::M2).then_some(NPF | npf::SIZEM)
}
