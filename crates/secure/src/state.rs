//! The twelve states of a page and which of them can follow which, as the firmware decodes and enforces them (`sev_rmp.h`,
//! `sev_mcmd.c`). What is not listed here does not happen.

use crate::entry::{Q1, RawEntry};

/// State of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageState {
    /// Outside every segment: hypervisor owned for ever.
    Default,
    /// Hypervisor owned.
    Hypervisor,
    /// Hypervisor owned, and stays so.
    HvFixed,
    /// Firmware's.
    Firmware,
    /// Firmware's, for the IOMMU's logs: the host reads, the IOMMU writes.
    FirmwareIommu,
    /// Given back by firmware; the host may take it.
    Reclaim,
    /// A guest's context.
    Context,
    /// What is kept about a page that was swapped out.
    Metadata,
    /// A guest's, in firmware's hands, not validated.
    PreGuest,
    /// A guest's, in firmware's hands, validated.
    PreSwap,
    /// A guest's, not validated.
    GuestInvalid,
    /// A guest's, validated.
    GuestValid,
}

/// Firmware keeps a code in GPA bits 50:48 of entries that have ASID 0, because a GPA of 0 means something there.
const FIRMWARE_CODE_SHIFT: u32 = 36;
const FIRMWARE: u64 = 0;
const METADATA: u64 = 1;
const FIRMWARE_IOMMU: u64 = 2;

impl PageState {
    /// The state of a page whose effective entry this is (for a page in a 2 MiB entry that of the 2 MiB entry).
    pub const fn of(entry: RawEntry) -> Self {
        let q1 = entry.q1;
        match (q1.assigned(), q1.asid() != 0, q1.immutable(), q1.validated()) {
            (false, _, false, _) => Self::Hypervisor,
            (false, _, true, _) => Self::HvFixed,
            (true, false, false, _) => Self::Reclaim,
            (true, false, true, _) if q1.vmsa() => Self::Context,
            (true, false, true, _) => match q1.gfn() >> FIRMWARE_CODE_SHIFT {
                FIRMWARE => Self::Firmware,
                FIRMWARE_IOMMU => Self::FirmwareIommu,
                _ => Self::Metadata,
            },
            (true, true, true, false) => Self::PreGuest,
            (true, true, true, true) => Self::PreSwap,
            (true, true, false, false) => Self::GuestInvalid,
            (true, true, false, true) => Self::GuestValid,
        }
    }

    /// Whether RMPUPDATE may lead from here to `to`. `same` says that owner, GPA and size stay as they are; when they do not, the
    /// instruction goes through Hypervisor in one step, so both halves must be legal.
    pub fn may_update(self, to: Self, same: bool) -> bool {
        use PageState::*;
        if same {
            return matches!(
                (self, to),
                (GuestInvalid, GuestInvalid | PreGuest) | (GuestValid, GuestValid | PreSwap) | (Hypervisor, Hypervisor)
            );
        }
        matches!(self, Hypervisor | GuestInvalid | GuestValid | Reclaim) && matches!(to, Hypervisor | Firmware | PreGuest | GuestInvalid)
    }

    /// Where a firmware command leads from here; `None` when it must be refused.
    pub fn after(self, command: Command) -> Option<Self> {
        use PageState::*;
        Some(match (command, self) {
            (Command::LaunchUpdate, PreGuest) => GuestValid,
            (Command::PageReclaim, PreGuest) => GuestInvalid,
            (Command::PageReclaim, PreSwap) => GuestValid,
            (Command::PageReclaim, Firmware | Metadata) => Reclaim,
            (Command::PageReclaim, GuestInvalid | GuestValid | Reclaim) => self,
            (Command::GctxCreate, Firmware) => Context,
            (Command::Decommission, Context) => Firmware,
            (Command::SwapOut, PreSwap) => PreGuest,
            (Command::SwapOutMetadata, Firmware) => Metadata,
            (Command::SwapIn, PreGuest) => PreSwap,
            (Command::SetHvFixed, Hypervisor) => HvFixed,
            (Command::SetIommu, Firmware) => FirmwareIommu,
            _ => return None,
        })
    }

    /// The first quadword in this state, everything that the state leaves open being as in `q1`.
    pub(crate) const fn apply(self, q1: Q1) -> Q1 {
        let code = match self {
            Self::Metadata => METADATA,
            Self::FirmwareIommu => FIRMWARE_IOMMU,
            _ => FIRMWARE,
        };
        match self {
            Self::Default | Self::Hypervisor => Q1::new().with_subpage_count(q1.subpage_count()),
            Self::HvFixed => Q1::new().with_subpage_count(q1.subpage_count()).with_immutable(true),
            Self::Firmware | Self::FirmwareIommu | Self::Metadata => {
                q1.with_immutable(true).with_validated(false).with_vmsa(false).with_gfn(code << FIRMWARE_CODE_SHIFT)
            }
            Self::Context => q1.with_immutable(true).with_validated(false).with_vmsa(true).with_gfn(0),
            Self::Reclaim => q1.with_immutable(false).with_validated(false).with_vmsa(false),
            Self::PreGuest => q1.with_immutable(true).with_validated(false),
            Self::PreSwap => q1.with_immutable(true).with_validated(true),
            Self::GuestInvalid => q1.with_immutable(false).with_validated(false),
            Self::GuestValid => q1.with_immutable(false).with_validated(true),
        }
    }
}

/// What firmware can do to a page's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// LAUNCH_UPDATE: the page is measured and becomes part of the guest.
    LaunchUpdate,
    /// PAGE_RECLAIM: firmware lets go of the page. Does nothing when it had.
    PageReclaim,
    /// GCTX_CREATE: the page becomes a guest's context.
    GctxCreate,
    /// DECOMMISSION: the context ends.
    Decommission,
    /// SWAP_OUT, for the page that leaves.
    SwapOut,
    /// SWAP_OUT, for the page that keeps what is needed to bring it back.
    SwapOutMetadata,
    /// SWAP_IN.
    SwapIn,
    /// PAGE_SET_STATE to HV-Fixed.
    SetHvFixed,
    /// At SNP enable, for the IOMMU's logs.
    SetIommu,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::{Q2, RmpSize};

    const ALL: [PageState; 12] = [
        PageState::Default,
        PageState::Hypervisor,
        PageState::HvFixed,
        PageState::Firmware,
        PageState::FirmwareIommu,
        PageState::Reclaim,
        PageState::Context,
        PageState::Metadata,
        PageState::PreGuest,
        PageState::PreSwap,
        PageState::GuestInvalid,
        PageState::GuestValid,
    ];

    fn of(words: u64) -> PageState {
        PageState::of(RawEntry { q1: Q1::from_bits(words), q2: Q2::new() })
    }

    /// Typed from the comment table of the firmware's header: assigned, validated, ASID, immutable, VMSA.
    #[test]
    fn decoded_as_firmware_does() {
        let guest = 0x0028_0000_0000_0000;
        assert_eq!(of(0), PageState::Hypervisor);
        assert_eq!(of(0x4), PageState::HvFixed);
        assert_eq!(of(0x5), PageState::Firmware);
        assert_eq!(of(0x2000_0000_0000_0005), PageState::Context);
        assert_eq!(of(0x0001_0000_0000_0005), PageState::Metadata);
        assert_eq!(of(0x0002_0000_0000_0005), PageState::FirmwareIommu);
        assert_eq!(of(0x1), PageState::Reclaim);
        assert_eq!(of(0x1234_5001), PageState::Reclaim);
        assert_eq!(of(guest | 0x5), PageState::PreGuest);
        assert_eq!(of(guest | 0x4000_0000_0000_0005), PageState::PreSwap);
        assert_eq!(of(guest | 0x1), PageState::GuestInvalid);
        assert_eq!(of(0x4028_0001_2345_6001), PageState::GuestValid);
    }

    #[test]
    fn applied_states_decode_to_themselves() {
        let guest = Q1::new().with_assigned(true).with_asid(7).with_gfn(0x1_0000_0123);
        let firmware = Q1::new().with_assigned(true);
        for state in ALL {
            use PageState::*;
            let start = match state {
                Default => continue,
                PreGuest | PreSwap | GuestInvalid | GuestValid => guest,
                _ => firmware,
            };
            assert_eq!(PageState::of(RawEntry { q1: state.apply(start), q2: Q2::new() }), state);
            assert_eq!(state.apply(start).size(), RmpSize::K4);
        }
    }

    /// The whole table, typed a second time as a list; everything else is refused.
    #[test]
    fn nothing_but_the_listed_transitions() {
        use Command::*;
        use PageState::*;
        let listed = [
            (PreGuest, LaunchUpdate, GuestValid),
            (PreGuest, PageReclaim, GuestInvalid),
            (PreSwap, PageReclaim, GuestValid),
            (Firmware, PageReclaim, Reclaim),
            (Metadata, PageReclaim, Reclaim),
            (GuestInvalid, PageReclaim, GuestInvalid),
            (GuestValid, PageReclaim, GuestValid),
            (Reclaim, PageReclaim, Reclaim),
            (Firmware, GctxCreate, Context),
            (Context, Decommission, Firmware),
            (PreSwap, SwapOut, PreGuest),
            (Firmware, SwapOutMetadata, Metadata),
            (PreGuest, SwapIn, PreSwap),
            (Hypervisor, SetHvFixed, HvFixed),
            (Firmware, SetIommu, FirmwareIommu),
        ];
        let commands = [LaunchUpdate, PageReclaim, GctxCreate, Decommission, SwapOut, SwapOutMetadata, SwapIn, SetHvFixed, SetIommu];
        for from in ALL {
            for command in commands {
                let expected = listed.iter().find(|&&(f, c, _)| (f, c) == (from, command)).map(|&(_, _, to)| to);
                assert_eq!(from.after(command), expected, "{from:?} {command:?}");
            }
        }
        let updates = [
            (Hypervisor, Firmware),
            (Hypervisor, PreGuest),
            (Hypervisor, GuestInvalid),
            (GuestInvalid, Hypervisor),
            (GuestValid, Hypervisor),
            (Reclaim, Hypervisor),
        ];
        let one_step = |from, to| from == to || updates.contains(&(from, to));
        for from in ALL {
            for to in ALL {
                let two_steps = one_step(from, Hypervisor) && one_step(Hypervisor, to);
                assert_eq!(from.may_update(to, false), two_steps, "{from:?} {to:?}");
            }
        }
        assert!(GuestInvalid.may_update(PreGuest, true) && GuestValid.may_update(PreSwap, true));
        assert!(!GuestInvalid.may_update(PreSwap, true) && !GuestInvalid.may_update(GuestValid, true));
        assert!(!PreGuest.may_update(GuestInvalid, true) && !Context.may_update(Hypervisor, false));
    }
}
