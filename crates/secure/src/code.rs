//! What the instructions take and what they answer, with the numbers that software finds in EAX.

use crate::entry::{Perms, Q1, RmpSize, Vmpl, gfn_of};
use addr::{Address, Gpa, Oa};
use thiserror::Error;

/// Bits of EXITINFO1 of a nested page fault (#NPF); bit 31 is also the RMP bit of a page fault's error code.
pub mod npf {
    /// The RMP refused.
    pub const RMP: u64 = 1 << 31;
    /// At the final translation.
    pub const FINAL: u64 = 1 << 32;
    /// During the walk of the guest's page table.
    pub const WALK: u64 = 1 << 33;
    /// The access was private (C=1).
    pub const ENC: u64 = 1 << 34;
    /// The sizes of the nested leaf and of the RMP entry differ.
    pub const SIZEM: u64 = 1 << 35;
    /// The VMPL lacks the permission.
    pub const VMPL: u64 = 1 << 36;
}

/// Why an instruction did nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
pub enum Code {
    /// The operand is malformed, or names what the table does not have.
    #[error("malformed operand (FAIL_INPUT)")]
    FailInput,
    /// The entry is immutable, or the caller lacks the privilege.
    #[error("not permitted (FAIL_PERMISSION)")]
    FailPermission,
    /// The page, its entry or its 2 MiB group is in use; may be tried again.
    #[error("in use, try again (FAIL_INUSE)")]
    FailInUse,
    /// RMPUPDATE: an entry of the other size is in the way, or firmware has locked the range.
    #[error("an entry of the other size or a firmware lock is in the way (FAIL_OVERLAP)")]
    FailOverlap,
    /// PSMASH: the table does not cover the address.
    #[error("address not covered by the RMP (FAIL_BADADDR)")]
    FailBadAddr,
    /// PVALIDATE, RMPADJUST: asked for 2 MiB, the entry is 4 KiB; to be repeated page by page.
    #[error("the entry is smaller than asked (FAIL_SIZEMISMATCH)")]
    FailSizeMismatch,
}

impl Code {
    /// The number in EAX. Two names share 4.
    pub const fn eax(self) -> u32 {
        match self {
            Self::FailInput => 1,
            Self::FailPermission => 2,
            Self::FailInUse => 3,
            Self::FailOverlap | Self::FailBadAddr => 4,
            Self::FailSizeMismatch => 6,
        }
    }
}

/// The operand of RMPUPDATE (`struct rmp_state` of the kernel).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RmpState {
    /// Where the owner shall have the page.
    pub gpa: Gpa,
    /// Clear gives the page to the hypervisor.
    pub assigned: bool,
    /// How much is meant.
    pub pagesize: RmpSize,
    /// Nothing but firmware may touch it afterwards.
    pub immutable: bool,
    /// The owner; 0 is the firmware.
    pub asid: u32,
}

impl RmpState {
    /// A guest's page.
    pub const fn private(gpa: Gpa, pagesize: RmpSize, asid: u32) -> Self {
        Self { gpa, assigned: true, pagesize, immutable: false, asid }
    }

    /// The hypervisor's page.
    pub const fn shared(pagesize: RmpSize) -> Self {
        Self { gpa: Gpa::new(0), assigned: false, pagesize, immutable: false, asid: 0 }
    }

    /// From the 16 bytes in memory.
    ///
    /// # Errors
    /// `FailInput` when a reserved bit is set.
    pub fn from_bytes(bytes: &[u8; 16]) -> Result<Self, Code> {
        let [g0, g1, g2, g3, g4, g5, g6, g7, assigned, pagesize, immutable, reserved, a0, a1, a2, a3] = *bytes;
        if (assigned | pagesize | immutable) > 1 || reserved != 0 {
            return Err(Code::FailInput);
        }
        Ok(Self {
            gpa: Gpa::new(u64::from_le_bytes([g0, g1, g2, g3, g4, g5, g6, g7])),
            assigned: assigned == 1,
            pagesize: if pagesize == 1 { RmpSize::M2 } else { RmpSize::K4 },
            immutable: immutable == 1,
            asid: u32::from_le_bytes([a0, a1, a2, a3]),
        })
    }

    /// The first quadword that it asks for at `oa`, or `FailInput`.
    ///
    /// An entry of ASID 0 belongs to firmware, and the host may only make the state Firmware: immutable, GPA 0 (page states of
    /// the firmware's `sev_rmp.h`). ASID 0x3ff is what firmware writes while it locks an entry; no guest has it.
    #[inline]
    pub(crate) fn to_q1(self, oa: Oa) -> Result<Q1, Code> {
        let lg2 = self.pagesize.lg2();
        let gfn = gfn_of(self.gpa).ok_or(Code::FailInput)?;
        if !oa.is_aligned(lg2) || !self.gpa.is_aligned(lg2) || self.asid >= 0x3ff {
            return Err(Code::FailInput);
        }
        if !self.assigned {
            return if self.immutable || self.asid != 0 { Err(Code::FailInput) } else { Ok(Q1::new()) };
        }
        if self.asid == 0 && (!self.immutable || gfn != 0) {
            return Err(Code::FailInput);
        }
        Ok(Q1::new().with_assigned(true).with_size(self.pagesize).with_immutable(self.immutable).with_gfn(gfn).with_asid(self.asid as u16))
    }
}

/// The operand of PVALIDATE, and who executes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pvalidate {
    /// The guest.
    pub asid: u32,
    /// The level it runs at; only VMPL 0 may.
    pub vmpl: Vmpl,
    /// The page as the guest names it.
    pub gpa: Gpa,
    /// Where the nested page table puts it.
    pub oa: Oa,
    /// How much is meant.
    pub size: RmpSize,
    /// Accept, or give up.
    pub validate: bool,
}

/// PVALIDATE went through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validated {
    /// Clear when the page was in that state already (CF=1, which software calls NOUPDATE).
    pub changed: bool,
}

/// PVALIDATE did nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum PvalidateError {
    /// #VMEXIT(NPF) with these bits of EXITINFO1: the host has to act.
    #[error("nested page fault {0:#x}")]
    Npf(u64),
    /// A code for the guest.
    #[error(transparent)]
    Fail(Code),
}

/// What RMPADJUST shall set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Whose permissions.
    pub target: Vmpl,
    /// The permissions.
    pub perms: Perms,
    /// Whether the page becomes a VMSA.
    pub vmsa: bool,
}

/// RMPADJUST did nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RmpadjustError {
    /// #VMEXIT(NPF) with these bits of EXITINFO1: the host has to act.
    #[error("nested page fault {0:#x}")]
    Npf(u64),
    /// #VC 0x404: the page is not validated.
    #[error("page not validated (#VC 0x404)")]
    NotValidated,
    /// A code for the guest.
    #[error(transparent)]
    Fail(Code),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_eax() {
        use Code::*;
        let numbers = [FailInput, FailPermission, FailInUse, FailOverlap, FailBadAddr, FailSizeMismatch].map(Code::eax);
        assert_eq!(numbers, [1, 2, 3, 4, 4, 6]);
    }

    #[test]
    fn operand_bytes() {
        let bytes = [0, 0x60, 0x45, 0x23, 1, 0, 0, 0, 1, 0, 0, 0, 5, 0, 0, 0];
        assert_eq!(RmpState::from_bytes(&bytes), Ok(RmpState::private(Gpa::new(0x1_2345_6000), RmpSize::K4, 5)));
        for (at, value) in [(8, 2), (9, 2), (10, 2), (11, 1)] {
            let mut bad = bytes;
            bad[at] = value;
            assert_eq!(RmpState::from_bytes(&bad), Err(Code::FailInput), "byte {at}");
        }
    }
}
