//! The 16 bytes that the table keeps for each 4 KiB page, bit by bit as the firmware's source lays them out (`sev_rmp.h`), so that a
//! dump of the model reads like a dump of the real table.

use addr::{Address, Gpa};
use bitfield_struct::bitfield;

/// Size of the page that an entry speaks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RmpSize {
    /// 4 KiB.
    K4 = 0,
    /// 2 MiB.
    M2 = 1,
}

impl RmpSize {
    /// Logarithm of its bytes.
    pub const fn lg2(self) -> u8 {
        match self {
            Self::K4 => 12,
            Self::M2 => 21,
        }
    }

    /// How many 4 KiB pages it has.
    pub const fn pages(self) -> u64 {
        1 << (self.lg2() - 12)
    }

    const fn from_bits(bits: u8) -> Self {
        if bits & 1 == 0 { Self::K4 } else { Self::M2 }
    }

    const fn into_bits(self) -> u8 {
        self as u8
    }
}

/// A virtual machine privilege level; 0 is the most privileged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(u8)]
pub enum Vmpl {
    /// The most privileged.
    #[default]
    V0 = 0,
    /// One below.
    V1 = 1,
    /// Two below.
    V2 = 2,
    /// The least privileged.
    V3 = 3,
}

impl Vmpl {
    /// From a number; `None` above 3.
    pub const fn new(level: u8) -> Option<Self> {
        match level {
            0 => Some(Self::V0),
            1 => Some(Self::V1),
            2 => Some(Self::V2),
            3 => Some(Self::V3),
            _ => None,
        }
    }
}

/// What one VMPL may do with a page (APM vol. 2, 15.36.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Perms(pub u8);

impl Perms {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// Bit 0.
    pub const READ: Self = Self(1);
    /// Bit 1. Without [`Perms::READ`] it makes every access fail.
    pub const WRITE: Self = Self(2);
    /// Bit 2.
    pub const EXECUTE_USER: Self = Self(4);
    /// Bit 3.
    pub const EXECUTE_SUPERVISOR: Self = Self(8);
    /// Bit 4: supervisor shadow stack.
    pub const SHADOW_STACK: Self = Self(16);
    /// Every defined bit.
    pub const FULL: Self = Self(0x1f);

    /// Whether every bit of `other` is in it.
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether it says something that the architecture forbids: write without read, or a reserved bit.
    pub const fn is_illegal(self) -> bool {
        self.0 & !Self::FULL.0 != 0 || (self.has(Self::WRITE) && !self.has(Self::READ))
    }
}

/// First quadword.
#[bitfield(u64)]
#[derive(PartialEq, Eq, Hash)]
pub struct Q1 {
    /// Clear: hypervisor owned.
    pub assigned: bool,
    /// Of a 2 MiB entry only the first of its 512 entries says 2 MiB.
    #[bits(1, default = RmpSize::K4)]
    pub size: RmpSize,
    /// RMPUPDATE does not touch it, and no access to it as guest memory passes.
    pub immutable: bool,
    /// In the entry of a 2 MiB aligned page: how many of the other 511 pages are assigned as 4 KiB pages.
    #[bits(9)]
    pub subpage_count: u16,
    /// GPA bits 50:12, where they stand in the address.
    #[bits(39)]
    pub gfn: u64,
    /// The owner; 0 is the firmware.
    #[bits(10)]
    pub asid: u16,
    /// The page holds a virtual CPU's register state.
    pub vmsa: bool,
    /// The guest has accepted the page.
    pub validated: bool,
    /// Firmware is working on it.
    pub lock: bool,
}

/// Second quadword.
#[bitfield(u64)]
#[derive(PartialEq, Eq, Hash)]
pub struct Q2 {
    /// Permissions of VMPL 0 to 3, a byte each.
    pub perms: u32,
    /// Which memory key is used when none is named.
    pub implicit_key_select: bool,
    #[bits(16)]
    __: u16,
    /// SEV-TIO: the root port of private MMIO.
    #[bits(5)]
    pub root_port_id: u8,
    /// SEV-TIO: the IDE stream of private MMIO.
    pub pcie_ide_stream_id: u8,
    /// The page is being moved by the migration engine.
    #[bits(2)]
    pub page_migration: u8,
}

impl Q2 {
    /// What RMPUPDATE leaves behind: VMPL 0 may do everything, the others nothing.
    pub const RESET: Self = Self::new().with_perms(Perms::FULL.0 as u32);

    /// The permissions of one VMPL.
    pub const fn perms_of(self, vmpl: Vmpl) -> Perms {
        Perms((self.perms() >> (8 * vmpl as u32)) as u8)
    }

    /// The same with the permissions of one VMPL replaced.
    pub const fn with_perms_of(self, vmpl: Vmpl, perms: Perms) -> Self {
        let shift = 8 * vmpl as u32;
        self.with_perms(self.perms() & !(0xff << shift) | (perms.0 as u32) << shift)
    }
}

/// One entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct RawEntry {
    /// First quadword.
    pub q1: Q1,
    /// Second quadword.
    pub q2: Q2,
}

impl RawEntry {
    /// From the two words as they lie in memory.
    pub const fn from_words(words: [u64; 2]) -> Self {
        Self { q1: Q1::from_bits(words[0]), q2: Q2::from_bits(words[1]) }
    }

    /// As the two words lie in memory.
    pub const fn words(self) -> [u64; 2] {
        [self.q1.into_bits(), self.q2.into_bits()]
    }

    /// Whether a guest or firmware owns the page.
    pub const fn assigned(self) -> bool {
        self.q1.assigned()
    }

    /// The owner; 0 is the firmware.
    pub const fn asid(self) -> u32 {
        self.q1.asid() as u32
    }

    /// Where the owner has the page.
    pub const fn gpa(self) -> Gpa {
        Gpa::new(self.q1.gfn() << addr::PAGE_LG2)
    }

    /// The size it speaks for.
    pub const fn size(self) -> RmpSize {
        self.q1.size()
    }

    /// Whether the guest has accepted the page.
    pub const fn validated(self) -> bool {
        self.q1.validated()
    }
}

/// What RMPREAD stores: the architectural view of an entry, 16 bytes (`struct rmpentry` of the kernel).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RmpRead {
    /// Where the owner has the page.
    pub gpa: Gpa,
    /// Owned by a guest or by firmware.
    pub assigned: bool,
    /// The size bit of this very entry.
    pub pagesize: RmpSize,
    /// At least one page of the surrounding 2 MiB is assigned.
    pub hpage_region_status: bool,
    /// RMPUPDATE does not touch it.
    pub immutable: bool,
    /// The owner.
    pub asid: u32,
}

impl RmpRead {
    /// As the instruction writes it, little endian.
    pub fn to_bytes(self) -> [u8; 16] {
        let mut out = [0; 16];
        out[..8].copy_from_slice(&self.gpa.get().to_le_bytes());
        out[8] = u8::from(self.assigned);
        out[9] = self.pagesize as u8 | u8::from(self.hpage_region_status) << 1;
        out[10] = u8::from(self.immutable);
        out[12..].copy_from_slice(&self.asid.to_le_bytes());
        out
    }
}

/// The part of `gpa` that an entry can hold, as a frame; `None` when something would be lost.
pub(crate) fn gfn_of(gpa: Gpa) -> Option<u64> {
    (gpa.is_aligned(addr::PAGE_LG2) && gpa.get() >> 51 == 0).then_some(gpa.get() >> addr::PAGE_LG2)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values typed from the field layout of the firmware's header and its own constants.
    #[test]
    fn golden_vectors() {
        let valid = Q1::new().with_assigned(true).with_gfn(0x12_3456).with_asid(5).with_validated(true);
        assert_eq!(valid.into_bits(), 0x4028_0001_2345_6001);
        assert_eq!(Q1::new().with_immutable(true).into_bits(), 0x4);
        let firmware = Q1::new().with_assigned(true).with_immutable(true);
        assert_eq!(firmware.into_bits(), 0x5);
        assert_eq!(firmware.with_lock(true).into_bits(), 0x8000_0000_0000_0005);
        assert_eq!(firmware.with_vmsa(true).into_bits(), 0x2000_0000_0000_0005);
    }

    #[test]
    fn every_field_has_its_place() {
        let q1 = |q: Q1| q.into_bits();
        assert_eq!(q1(Q1::new().with_size(RmpSize::M2)), 1 << 1);
        assert_eq!(q1(Q1::new().with_subpage_count(511)), 0x1ff << 3);
        assert_eq!(q1(Q1::new().with_gfn((1 << 39) - 1)), 0x0007_ffff_ffff_f000);
        assert_eq!(q1(Q1::new().with_asid(0x3ff)), 0x3ff << 51);
        assert_eq!(q1(Q1::new().with_validated(true)), 1 << 62);
        let q2 = |q: Q2| q.into_bits();
        assert_eq!(q2(Q2::new().with_perms_of(Vmpl::V0, Perms(0xff))), 0xff);
        assert_eq!(q2(Q2::new().with_perms_of(Vmpl::V3, Perms(0xff))), 0xff << 24);
        assert_eq!(q2(Q2::new().with_implicit_key_select(true)), 1 << 32);
        assert_eq!(q2(Q2::new().with_root_port_id(0x1f)), 0x1f << 49);
        assert_eq!(q2(Q2::new().with_pcie_ide_stream_id(0xff)), 0xff << 54);
        assert_eq!(q2(Q2::new().with_page_migration(3)), 3 << 62);
    }

    #[test]
    fn the_view_of_rmpread() {
        let view = RmpRead {
            gpa: Gpa::new(0x1_2345_6000),
            assigned: true,
            pagesize: RmpSize::M2,
            hpage_region_status: true,
            immutable: true,
            asid: 0x102,
        };
        assert_eq!(view.to_bytes(), [0x00, 0x60, 0x45, 0x23, 0x01, 0, 0, 0, 1, 3, 1, 0, 0x02, 0x01, 0, 0]);
    }

    #[test]
    fn write_needs_read() {
        assert!(Perms::WRITE.is_illegal() && Perms(0x20).is_illegal());
        assert!(!Perms::FULL.is_illegal() && !Perms::NONE.is_illegal());
    }
}
