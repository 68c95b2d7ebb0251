//! What firmware does to the table: the state changes that no instruction may make, joining 512 entries to one, and the lock that it
//! holds over a range meanwhile.

use crate::entry::{Perms, Q2, RmpSize, Vmpl};
use crate::insn::COVERED;
use crate::rmp::Rmp;
use crate::segment::{GROUP_PAGES, Group, is_huge};
use crate::state::{Command, PageState};
use crate::{Code, RawEntry};
use addr::{Address, Oa};
use core::ops::Deref;
use core::sync::atomic::AtomicU64;
use thiserror::Error;

/// Why firmware did nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum FirmwareError {
    /// The page's state does not allow the command.
    #[error("{command:?} is not allowed for the page at {at} in state {from:?}")]
    InvalidPageState {
        /// The page.
        at: Oa,
        /// Its state.
        from: PageState,
        /// What was asked.
        command: Command,
    },
    /// The operand's size is not the entry's, or the address not aligned to it.
    #[error("the page at {at} does not have the size that was named")]
    InvalidPageSize {
        /// The page.
        at: Oa,
    },
    /// The 512 entries are not ready to become one.
    #[error("the entries of the 2 MiB at {at} do not say one thing; entry {index} differs")]
    NotUniform {
        /// First page.
        at: Oa,
        /// The first entry that is wrong, counted from 0.
        index: u64,
    },
    /// The table does not cover the page.
    #[error("{at} is not covered by the RMP")]
    NotCovered {
        /// The page.
        at: Oa,
    },
    /// Somebody else works on the range; may be tried again.
    #[error("the range around {at} is in use, try again")]
    InUse {
        /// The page.
        at: Oa,
    },
}

impl<W: Deref<Target = [AtomicU64]>> Rmp<W> {
    /// Carries out a firmware command on the page at `oa`, 4 KiB or 2 MiB as `size` says.
    ///
    /// # Errors
    /// [`FirmwareError`]; nothing has changed then.
    pub fn firmware(&self, oa: Oa, size: RmpSize, command: Command) -> Result<(), FirmwareError> {
        let (page, group) = self.lock_for_firmware(oa)?;
        let entry = group.effective(page);
        let from = PageState::of(entry);
        let to = from.after(command).ok_or(FirmwareError::InvalidPageState { at: oa, from, command })?;
        if !oa.is_aligned(size.lg2()) || entry.size() != size {
            return Err(FirmwareError::InvalidPageSize { at: oa });
        }
        group.set_q1(page, to.apply(group.q1(page)));
        Ok(())
    }

    /// LAUNCH_UPDATE of one 4 KiB page: Pre-Guest to Guest-Valid, with the permissions of VMPL 1 to 3, perhaps as a VMSA.
    ///
    /// # Errors
    /// [`FirmwareError`]; nothing has changed then.
    pub fn launch_update(&self, oa: Oa, asid: u32, perms: [Perms; 3], vmsa: bool) -> Result<(), FirmwareError> {
        let command = Command::LaunchUpdate;
        let (page, group) = self.lock_for_firmware(oa)?;
        let entry = group.effective(page);
        let from = PageState::of(entry);
        let refused = FirmwareError::InvalidPageState { at: oa, from, command };
        let to = from.after(command).filter(|_| entry.asid() == asid).ok_or(refused)?;
        if entry.size() != RmpSize::K4 || !oa.is_aligned(addr::PAGE_LG2) {
            return Err(FirmwareError::InvalidPageSize { at: oa });
        }
        let [v1, v2, v3] = perms;
        let q2 = Q2::RESET.with_perms_of(Vmpl::V1, v1).with_perms_of(Vmpl::V2, v2).with_perms_of(Vmpl::V3, v3);
        // While the entry is immutable nobody gets in, so the permissions come first.
        group.set_q2(page, q2);
        group.set_q1(page, to.apply(group.q1(page)).with_vmsa(vmsa));
        Ok(())
    }

    /// PAGE_UNSMASH: 512 entries that say one thing become one of 2 MiB. They must be 4 KiB, assigned, immutable, no VMSA, of one guest,
    /// in one state, with the same permissions and with GPAs that count up from a 2 MiB boundary. The result is mutable.
    ///
    /// # Errors
    /// [`FirmwareError`]; nothing has changed then.
    pub fn page_unsmash(&self, oa: Oa) -> Result<(), FirmwareError> {
        if !oa.is_aligned(RmpSize::M2.lg2()) {
            return Err(FirmwareError::InvalidPageSize { at: oa });
        }
        let (page, group) = self.lock_for_firmware(oa)?;
        let first = RawEntry { q1: group.q1(page).with_subpage_count(0), q2: group.q2(page) };
        let q1 = first.q1;
        let fit =
            q1.assigned() && !is_huge(q1) && q1.immutable() && !q1.vmsa() && q1.asid() != 0 && q1.gfn().is_multiple_of(GROUP_PAGES as u64);
        if !fit {
            return Err(FirmwareError::NotUniform { at: oa, index: 0 });
        }
        let differs = group.others().zip(1..).find(|&(other, k)| {
            let expected = RawEntry { q1: q1.with_gfn(q1.gfn() + k), q2: first.q2 };
            RawEntry { q1: group.q1(other), q2: group.q2(other) } != expected
        });
        if let Some((_, index)) = differs {
            return Err(FirmwareError::NotUniform { at: oa, index });
        }
        // The first entry speaks for all from this store on; the others are ignored, whatever they still say.
        group.set_q1(page, q1.with_size(RmpSize::M2).with_immutable(false));
        for other in group.others() {
            group.set_q1(other, COVERED);
            group.set_q2(other, Q2::new());
        }
        Ok(())
    }

    /// Firmware locks the 2 MiB around `oa`: RMPUPDATE in it answers FAIL_OVERLAP, PSMASH FAIL_INUSE, until
    /// [`Rmp::firmware_unlock`]. (Real firmware also writes an impossible ASID first, to shut out microcode; the model's group lock stands for that.)
    ///
    /// # Errors
    /// `InUse` when it is locked already, `NotCovered`.
    pub fn firmware_lock(&self, oa: Oa) -> Result<(), FirmwareError> {
        let (_, group) = self.lock_for_firmware(oa)?;
        group.set_q1(group.base, group.q1(group.base).with_lock(true));
        Ok(())
    }

    /// Ends [`Rmp::firmware_lock`].
    pub fn firmware_unlock(&self, oa: Oa) {
        // It must not stay locked because somebody else is at work there.
        loop {
            match self.lock(oa, Code::FailBadAddr, Code::FailInUse) {
                Ok((_, _, group)) => return group.set_q1(group.base, group.q1(group.base).with_lock(false)),
                Err(Code::FailInUse) => core::hint::spin_loop(),
                Err(_) => return,
            }
        }
    }

    fn lock_for_firmware(&self, oa: Oa) -> Result<(usize, Group<'_>), FirmwareError> {
        let (_, page, group) = self.lock(oa, Code::FailBadAddr, Code::FailInUse).map_err(|code| match code {
            Code::FailBadAddr => FirmwareError::NotCovered { at: oa },
            _ => FirmwareError::InUse { at: oa },
        })?;
        if group.q1(group.base).lock() {
            return Err(FirmwareError::InUse { at: oa });
        }
        Ok((page, group))
    }
}
