//! The devices as the guest sees them: 8-byte registers, and the lists that a doorbell takes.
//!
//! List layout and result codes are those of the GHCB specification's page state change request, as Linux has them in
//! `arch/x86/include/asm/sev-common.h` (`struct psc_hdr`, `struct psc_entry`) and `arch/x86/kvm/svm/sev.c` (`snp_begin_psc`).
//! An IOVA that a DMA engine is given is a GPA.

use addr::Gpa;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The doorbell's page.
pub const DOORBELL: Gpa = Gpa::new(0xfe00_0000);
/// The engine of the trusted device: one page of registers.
pub const TRUSTED: Gpa = Gpa::new(0xfe01_0000);
/// The engine of the untrusted device.
pub const UNTRUSTED: Gpa = Gpa::new(0xfe02_0000);

/// Registers of the doorbell page, as offsets.
pub mod bell {
    /// Write the GPA of a page state change list: it is performed.
    pub const PSC: u64 = 0x00;
    /// Read what became of it: SW_EXITINFO2, 0 for good.
    pub const PSC_RESULT: u64 = 0x08;
    /// Write the GPA of a PVALIDATE list; op 1 validates, 2 rescinds.
    pub const PVALIDATE: u64 = 0x10;
    /// Read what became of it: 0, or the instruction's code for the entry that `cur_entry` names.
    pub const PVALIDATE_RESULT: u64 = 0x18;
    /// Write: the guest has ended; 0 for good, else why.
    pub const DONE: u64 = 0x20;
}

/// Registers of a DMA engine, as offsets.
pub mod dma {
    /// Source IOVA, read and write.
    pub const SRC: u64 = 0x00;
    /// Destination IOVA, read and write.
    pub const DST: u64 = 0x08;
    /// Length in bytes, read and write.
    pub const LEN: u64 = 0x10;
    /// Write a command: [`COPY`] or [`FILL`].
    pub const CMD: u64 = 0x18;
    /// Read [`OK`], [`BUSY`] or [`FAULTED`].
    pub const STATUS: u64 = 0x20;
    /// First IOVA that was refused.
    pub const FAULT_IOVA: u64 = 0x28;
    /// What [`FILL`] writes, read and write.
    pub const VALUE: u64 = 0x30;
    /// Why it was refused.
    pub const FAULT_CODE: u64 = 0x38;

    /// Command: copy from source to destination.
    pub const COPY: u64 = 1;
    /// Command: fill the destination with the value.
    pub const FILL: u64 = 2;

    /// Status: idle, and the last command was carried out.
    pub const OK: u64 = 0;
    /// Status: at work.
    pub const BUSY: u64 = 1;
    /// Status: the last command was refused.
    pub const FAULTED: u64 = 2;
}

/// Entries a list has room for.
pub const MAX_ENTRIES: u64 = 253;
/// Result: `end_entry` is past the last entry that exists.
pub const BAD_HEADER: u64 = 1 << 32 | 1;
/// Result: an entry whose `cur_page` is past its size, or of 2 MiB that does not begin on 2 MiB.
pub const BAD_ENTRY: u64 = 1 << 32 | 2;
/// Result: the host could not do it.
pub const GENERIC_ERROR: u64 = 0x100 << 32;
/// PVALIDATE's code for a 2 MiB request on 4 KiB RMP entries (APM vol. 3, PVALIDATE).
pub const SIZE_MISMATCH: u64 = 6;
/// Hypercall number of KVM_HC_MAP_GPA_RANGE (Linux `include/uapi/linux/kvm_para.h`): gpa, pages, flags.
pub const HC_MAP_GPA_RANGE: u64 = 12;

/// Op of a page state change: make private. Of a PVALIDATE list: validate.
pub const OP_PRIVATE: u8 = 1;
/// Op of a page state change: make shared. Of a PVALIDATE list: rescind.
pub const OP_SHARED: u8 = 2;

/// A list as it lies in guest memory. The guest may write anything into it at any time: copy it, then check the copy.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct List {
    /// The entry that is next.
    pub cur_entry: u16,
    /// The last entry.
    pub end_entry: u16,
    /// Zero.
    pub reserved: u32,
    /// The entries.
    pub entries: [Entry; MAX_ENTRIES as usize],
}

const _: () = assert!(size_of::<List>() == 2032);

/// One entry of a list.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Entry(pub u64);

impl Entry {
    /// An entry whose work has not begun.
    pub const fn new(gpa: Gpa, op: u8, large: bool) -> Self {
        Self(gpa.get() & 0x000f_ffff_ffff_f000 | ((op as u64) & 15) << 52 | (large as u64) << 56)
    }
    /// Pages of the entry that are done.
    pub const fn cur_page(self) -> u64 {
        self.0 & 0xfff
    }
    /// First byte of its memory.
    pub const fn gpa(self) -> Gpa {
        Gpa::new(self.0 & 0x000f_ffff_ffff_f000)
    }
    /// What to do.
    pub const fn op(self) -> u8 {
        (self.0 >> 52 & 15) as u8
    }
    /// Whether it is for 2 MiB.
    pub const fn large(self) -> bool {
        self.0 >> 56 & 1 == 1
    }
    /// Pages it is for: 1 or 512.
    pub const fn pages(self) -> u64 {
        if self.large() { 512 } else { 1 }
    }
    /// The entry with another count of pages done.
    #[must_use]
    pub const fn with_cur_page(self, pages: u64) -> Self {
        Self(self.0 & !0xfff | pages & 0xfff)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entry_bits() {
        // Typed from the layout: gfn 0x12345, op 2, 2 MiB, 3 pages done.
        let entry = Entry(0x0120_0000_1234_5003);
        assert_eq!((entry.cur_page(), entry.gpa(), entry.op(), entry.large()), (3, Gpa::new(0x1234_5000), 2, true));
        assert_eq!(Entry::new(Gpa::new(0x1234_5000), 2, true).with_cur_page(3), entry);
    }
}
