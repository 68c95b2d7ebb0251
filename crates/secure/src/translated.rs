//! The check of a translated request: a device with a translation cache of its own (PCIe ATS) names output addresses, so neither the leaf nor the
//! guest's address is known any more. What is left is what the entry of each accessed page says by itself.
//!
//! No document says what SEV-TIO checks here; the rule below is the part of the documented one that needs nothing but the page.

use crate::check::{Access, Requester, judge};
use crate::refusal::{Asker, Reason, Refusal};
use crate::rmp::Rmp;
use addr::{Address, Oa, PAGE_LG2, Span};
use core::ops::Deref;
use core::sync::atomic::AtomicU64;

impl<W: Deref<Target = [AtomicU64]>> Rmp<W> {
    /// May the device touch the bytes at `span`, which it got by an earlier translation?
    ///
    /// Every page that is touched answers for itself. Untrusted: it is unassigned. Trusted: it is unassigned, or assigned to that ASID, mutable,
    /// validated and permitted to the VMPL. That the page still stands for the address that was translated is the promise of the
    /// invalidation protocol, not of this check.
    ///
    /// # Errors
    /// [`Refusal`], for the first page that may not be touched.
    pub fn check_translated(&self, who: Requester, span: Span<Oa>, access: Access) -> Result<(), Refusal> {
        let Requester::Trusted { asid, vmpl, .. } = who else { return self.shared(span, Asker::Device) };
        for page in span.blocks(PAGE_LG2) {
            let at = page.start().align_down(PAGE_LG2);
            let entry = self.entry(at);
            if !entry.assigned() {
                continue;
            }
            let Some(segment) = self.directory.find(at) else { continue };
            // The entry's own address and size: these two cannot be compared with anything.
            let claim = crate::check::Claim { asid, vmpl, needs: access.needs(), asker: Asker::Device };
            match judge(&segment, segment.page(at), entry.gpa(), None, false, claim) {
                // Given back a moment ago: shared, like any other.
                Ok(()) | Err((Reason::NotAssigned, _)) => {}
                Err((reason, entry)) => return Err(Refusal::new(reason, at, entry, Asker::Device)),
            }
        }
        Ok(())
    }
}
