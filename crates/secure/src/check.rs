//! May this access go on? The checks of APM vol. 2, table 15-39, for the CPU, and what is known of the IOMMU's for devices. Their order
//! matters: it selects the fault that is reported.

use crate::code::npf;
use crate::entry::{Perms, Q1, RawEntry, RmpSize, Vmpl};
use crate::refusal::{Asker, Reason, Refusal};
use crate::rmp::{Rmp, smash_seq};
use crate::segment::Segment;
use addr::{Address, Gpa, Oa, Span};
use core::ops::Deref;
use core::sync::atomic::{AtomicU64, Ordering};

/// What is done with the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Data is read.
    Read,
    /// Data is written, or an accessed or dirty bit.
    Write,
    /// An instruction is fetched by user code.
    ExecuteUser,
    /// An instruction is fetched by supervisor code.
    ExecuteSupervisor,
    /// The CPU reads a guest page table.
    TableWalk,
}

impl Access {
    pub(crate) const fn needs(self) -> Perms {
        match self {
            Self::Read | Self::TableWalk => Perms::READ,
            Self::Write => Perms::WRITE,
            Self::ExecuteUser => Perms::EXECUTE_USER,
            Self::ExecuteSupervisor => Perms::EXECUTE_SUPERVISOR,
        }
    }
}

/// A device, as the IOMMU knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Requester {
    /// Its requests carry T=0, or nobody accepted it: it reaches hypervisor pages only.
    Untrusted,
    /// A TDI in RUN, with what its secure device table entry says.
    Trusted {
        /// The guest it belongs to.
        asid: u32,
        /// The level it acts for.
        vmpl: Vmpl,
        /// Addresses below are private, others shared. Without it the page decides: assigned, the private rule applies; else the
        /// shared one (policy *mirror*, D-7).
        vtom: Option<Gpa>,
    },
}

/// A CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cpu {
    /// In the host.
    Host,
    /// In a guest without SNP.
    PlainGuest,
    /// In an SNP guest.
    Guest {
        /// The guest.
        asid: u32,
        /// The level it runs at.
        vmpl: Vmpl,
        /// The C-bit. Instruction fetches and page-table walks are private whatever it says.
        private: bool,
    },
}

/// What a private access claims about every page it reaches.
#[derive(Clone, Copy)]
pub(crate) struct Claim {
    pub(crate) asid: u32,
    pub(crate) vmpl: Vmpl,
    pub(crate) needs: Perms,
    pub(crate) asker: Asker,
}

impl<W: Deref<Target = [AtomicU64]>> Rmp<W> {
    /// May the device use a leaf of the IO page table? `leaf_oa` is everything the leaf spans, `leaf_addr` the address for which
    /// its first byte stands (the GPA, for a private leaf).
    ///
    /// Shared rule: every page of the span is unassigned. Private rule: assigned, to that ASID, at that GPA, mutable, of the leaf's size
    /// (4 KiB or 2 MiB; not compared when pages are judged one by one), validated, permitted to the VMPL. A mismatch of nothing but the size passes while the smash sequence of the
    /// segment is odd.
    ///
    /// # Errors
    /// [`Refusal`].
    #[inline(always)]
    pub fn check_device(&self, who: Requester, leaf_oa: Span<Oa>, leaf_addr: Gpa, access: Access) -> Result<(), Refusal> {
        if leaf_oa.last_offset() >> 21 != 0 && self.strict.load(Ordering::Relaxed) {
            return Err(self.refuse(Reason::TooLarge, leaf_oa.start(), Asker::Device));
        }
        match who {
            Requester::Untrusted => self.shared(leaf_oa, Asker::Device),
            Requester::Trusted { asid, vmpl, vtom } => {
                self.trusted(leaf_oa, leaf_addr, Claim { asid, vmpl, needs: access.needs(), asker: Asker::Device }, vtom)
            }
        }
    }

    fn trusted(&self, leaf_oa: Span<Oa>, leaf_addr: Gpa, claim: Claim, vtom: Option<Gpa>) -> Result<(), Refusal> {
        let Some(vtom) = vtom else { return self.mirrored(leaf_oa, leaf_addr, claim) };
        if leaf_addr >= vtom {
            self.shared(leaf_oa, Asker::Device)
        } else if leaf_addr.get().saturating_add(leaf_oa.last_offset()) < vtom.get() {
            self.private(self.directory.find(leaf_oa.start()), leaf_oa, leaf_addr, claim)
        } else {
            Err(self.refuse(Reason::StraddlesVtom, leaf_oa.start(), Asker::Device))
        }
    }

    /// May a CPU access `oa`, which it calls `gpa` when it runs a guest, through a mapping of `1 << leaf_lg2` bytes (the nested one for
    /// a guest)? The RMP knows no mapping above 2 MiB: 1 GiB counts as 2 MiB.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn check_cpu(&self, who: Cpu, oa: Oa, gpa: Gpa, leaf_lg2: u8, access: Access) -> Result<(), Refusal> {
        let lg2 = if leaf_lg2 < RmpSize::M2.lg2() { RmpSize::K4.lg2() } else { RmpSize::M2.lg2() };
        let leaf = Span::block(oa, lg2);
        let at = if access == Access::TableWalk { npf::WALK } else { npf::FINAL };
        match who {
            Cpu::Guest { asid, vmpl, private } if private || !matches!(access, Access::Read | Access::Write) => {
                let claim = Claim { asid, vmpl, needs: access.needs(), asker: Asker::Guest(npf::RMP | npf::ENC | at) };
                let Some(segment) = self.directory.find(oa) else {
                    return Err(self.refuse(Reason::NotCovered, oa, claim.asker));
                };
                let size = if lg2 == RmpSize::M2.lg2() { RmpSize::M2 } else { RmpSize::K4 };
                // Only the accessed page counts; whoever calls its first byte otherwise means another page.
                let first = Gpa::new(gpa.get().wrapping_sub(oa.get() & (addr::PAGE_BYTES - 1)));
                judge(&segment, segment.page(oa), first, Some(size), true, claim)
                    .map_err(|(reason, entry)| Refusal::new(reason, oa.align_down(addr::PAGE_LG2), entry, claim.asker))
            }
            _ if access != Access::Write => Ok(()),
            Cpu::Host => self.shared(leaf, Asker::Host),
            Cpu::PlainGuest | Cpu::Guest { .. } => self.shared(leaf, Asker::Guest(npf::RMP | at)),
        }
    }

    #[inline(always)]
    pub(crate) fn shared(&self, leaf: Span<Oa>, asker: Asker) -> Result<(), Refusal> {
        match self.first_assigned(leaf) {
            None => Ok(()),
            Some(at) => Err(self.refuse(Reason::Assigned, at, asker)),
        }
    }

    #[inline]
    fn mirrored(&self, leaf: Span<Oa>, addr: Gpa, claim: Claim) -> Result<(), Refusal> {
        match self.directory.find(leaf.start()) {
            Some(segment) if segment.q1(segment.page(leaf.start())).assigned() => self.private(Some(segment), leaf, addr, claim),
            _ => self.shared(leaf, claim.asker),
        }
    }

    #[inline]
    fn private(&self, segment: Option<Segment<'_>>, leaf: Span<Oa>, addr: Gpa, claim: Claim) -> Result<(), Refusal> {
        if let Some(segment) = segment
            && let Some(size) = size_of(leaf)
        {
            let page = segment.page(leaf.start());
            let from = segment.speaker(page);
            let q1 = segment.q1(from);
            let perms = segment.q2(from).perms_of(claim.vmpl);
            // The first word once more: the permissions were this owner's.
            let same = segment.q1(from) == q1;
            // A first entry that speaks for another page is never of that page's size, unless it changed between two loads.
            if from == page && same && as_claimed(q1, size, addr, claim) && permits(perms, claim.needs) {
                return Ok(());
            }
        }
        self.private_in_detail(segment, leaf, addr, claim)
    }

    #[cold]
    #[inline(never)]
    fn private_in_detail(&self, segment: Option<Segment<'_>>, leaf: Span<Oa>, addr: Gpa, claim: Claim) -> Result<(), Refusal> {
        let at = leaf.start();
        let Some(segment) = segment else {
            return Err(self.refuse(Reason::NotCovered, at, claim.asker));
        };
        let (reason, entry) = match judge(&segment, segment.page(at), addr, size_of(leaf), !self.checks_pages(), claim) {
            Ok(()) => return Ok(()),
            Err(refused) => refused,
        };
        let by_device = matches!(claim.asker, Asker::Device);
        if reason == Reason::Size && by_device && smash_seq(&segment) & 1 == 1 && agrees_but_for_size(&segment, leaf, addr, claim) {
            return Ok(());
        }
        Err(Refusal::new(reason, at.align_down(addr::PAGE_LG2), entry, claim.asker))
    }

    #[cold]
    fn refuse(&self, reason: Reason, at: Oa, asker: Asker) -> Refusal {
        Refusal::new(reason, at, self.entry(at), asker)
    }
}

/// The entry size that a leaf asks for, if there is one.
#[inline]
fn size_of(leaf: Span<Oa>) -> Option<RmpSize> {
    match leaf.last_offset() {
        0xfff if leaf.start().is_aligned(12) => Some(RmpSize::K4),
        0x1f_ffff if leaf.start().is_aligned(21) => Some(RmpSize::M2),
        _ => None,
    }
}

/// Bits of the first word that no access depends on: subpage_count and vmsa.
const IGNORED: u64 = 0x1ff << 3 | 1 << 61;

/// Whether the first word is exactly that of a valid page of the claimant with this size and address.
#[inline]
fn as_claimed(q1: Q1, size: RmpSize, addr: Gpa, claim: Claim) -> bool {
    const VALID: u64 = Q1::new().with_assigned(true).with_validated(true).into_bits();
    let plain = VALID | (size as u64) << 1 | addr.get() | u64::from(claim.asid) << 51;
    // An ASID or address that does not fit its field would spill into others.
    let fits = addr.get() & !0x0007_ffff_ffff_f000 == 0 && claim.asid.wrapping_sub(1) < 0x3ff;
    fits && q1.into_bits() & !IGNORED == plain
}

#[inline]
fn permits(perms: Perms, needs: Perms) -> bool {
    perms.has(needs) && !perms.is_illegal()
}

/// The private rule for one page, or for the 2 MiB entry that begins there, in the documented order; with `size_matters` off the entry's size is
/// not looked at.
pub(crate) fn judge(
    segment: &Segment<'_>,
    page: usize,
    addr: Gpa,
    size: Option<RmpSize>,
    size_matters: bool,
    claim: Claim,
) -> Result<(), (Reason, RawEntry)> {
    let entry = snapshot(segment, page).map_err(|entry| (Reason::InUse, entry))?;
    let q1 = entry.q1;
    let reason = match () {
        () if q1.lock() => Reason::InUse,
        () if !q1.assigned() => Reason::NotAssigned,
        () if entry.asid() != claim.asid || claim.asid == 0 => Reason::WrongAsid,
        () if entry.gpa() != addr => Reason::WrongGpa,
        () if q1.immutable() => Reason::Immutable,
        () if size_matters && size != Some(entry.size()) => Reason::Size,
        () if !q1.validated() => Reason::NotValidated,
        () if !permits(entry.q2.perms_of(claim.vmpl), claim.needs) => Reason::Permission,
        () => return Ok(()),
    };
    Err((reason, entry))
}

/// An entry whose two words belong together: the first is the same before and after the second was read. A few attempts, then the
/// last one as an error: a reader does not wait for a writer (I-15).
fn snapshot(segment: &Segment<'_>, page: usize) -> Result<RawEntry, RawEntry> {
    let significant = |entry: RawEntry| entry.q1.into_bits() & !IGNORED;
    let mut entry = segment.effective(page);
    for _ in 0..4 {
        let again = segment.effective(page);
        if significant(again) == significant(entry) {
            return Ok(entry);
        }
        entry = again;
    }
    Err(entry)
}

/// While a split is under way: whether each page of the leaf is what the claimant says, whatever the size of its entry.
fn agrees_but_for_size(segment: &Segment<'_>, leaf: Span<Oa>, addr: Gpa, claim: Claim) -> bool {
    if size_of(leaf).is_none() {
        return false;
    }
    let first = segment.page(leaf.start());
    let pages = (leaf.last_offset() >> 12) as usize + 1;
    (0..pages).all(|k| {
        let Some(addr) = addr.checked_add((k as u64) << 12) else { return false };
        judge(segment, first + k, addr, None, false, claim).is_ok()
    })
}
