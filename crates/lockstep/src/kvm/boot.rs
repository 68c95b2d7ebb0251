//! Long mode without firmware: page tables that map guest memory onto itself, and a vCPU that starts in 64-bit code.
//!
//! Register bits and descriptor fields: AMD64 APM vol. 2, sections 3.1 (CR0, CR4, EFER), 4.8 (segment descriptors) and 5.3 (long-mode
//! page translation). There is no GDT: the segment caches are loaded directly, and no instruction of the guest reloads them.
#![forbid(unsafe_code)]

use super::{KvmError, Vcpu, slots};
use addr::{Gpa, PAGE_BYTES, Span};
use kvm_bindings::{kvm_regs, kvm_segment};
use std::io;

/// Writes bytes into guest memory; the caller of the link provides it.
pub type Writer<'a> = dyn FnMut(Gpa, &[u8]) -> io::Result<()> + 'a;

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;
/// Set beforehand, so that the guest's page walks need not write to the tables.
const ACCESSED_DIRTY: u64 = 0b11 << 5;
const GIB: u64 = 1 << 30;
/// Bytes one level-4 entry maps; more than one is not made.
const TOP_BYTES: u64 = 512 * GIB;

/// Bytes of page tables that [`identity_tables`] needs for `mapped_bytes`: two pages and one for each GiB.
pub fn identity_tables_bytes(mapped_bytes: u64) -> u64 {
    (2 + mapped_bytes.div_ceil(GIB)) * PAGE_BYTES
}

/// Writes page tables into `tables` that map the first `mapped_bytes` of guest memory, rounded up to 1 GiB, onto themselves, in 2 MiB
/// pages. Answers their root, for [`Start::root`]. Device registers must lie below `mapped_bytes`, too.
///
/// # Errors
/// `Span` when `tables` does not keep to pages or more than 512 GiB are to be mapped, `NoRoom` when it is too short, and what the writer says.
pub fn identity_tables(tables: Span<Gpa>, mapped_bytes: u64, write: &mut Writer<'_>) -> Result<Gpa, KvmError> {
    let what = "identity page tables";
    slots::aligned(what, tables.start(), tables.len())?;
    slots::aligned(what, Gpa::new(0), mapped_bytes.next_multiple_of(PAGE_BYTES))?;
    let needed = identity_tables_bytes(mapped_bytes);
    if needed > tables.len() || mapped_bytes > TOP_BYTES {
        return Err(KvmError::NoRoom { what, needed, span: tables });
    }
    let table = |n: u64| tables.start().get() + n * PAGE_BYTES;
    let mut put = |n: u64, entries: &mut dyn Iterator<Item = u64>| {
        let mut bytes: Vec<u8> = entries.flat_map(u64::to_le_bytes).collect();
        bytes.resize(PAGE_BYTES as usize, 0);
        let at = Gpa::new(table(n));
        write(at, &bytes).map_err(|error| KvmError::Write { what, at, error })
    };
    let gibs = mapped_bytes.div_ceil(GIB);
    put(0, &mut std::iter::once(table(1) | PRESENT_WRITABLE))?;
    put(1, &mut (0..gibs).map(|gib| table(2 + gib) | PRESENT_WRITABLE))?;
    for gib in 0..gibs {
        put(2 + gib, &mut (0..512).map(|i| (gib * GIB + (i << 21)) | LARGE | ACCESSED_DIRTY | PRESENT_WRITABLE))?;
    }
    Ok(tables.start())
}

/// Where and how a vCPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// Root of its page tables.
    pub root: Gpa,
    /// First instruction.
    pub entry: Gpa,
    /// End of its stack.
    pub stack: Gpa,
    /// rdi and rsi: the first two arguments of the System V convention.
    pub args: [u64; 2],
}

impl Vcpu {
    /// Puts the vCPU at the start of 64-bit code, ring 0, interrupts off, paging on.
    ///
    /// # Errors
    /// When KVM refuses the registers.
    pub fn start_in_long_mode(&mut self, start: Start) -> Result<(), KvmError> {
        const PE_ET_NE_WP_PG: u64 = 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
        const PAE: u64 = 1 << 5;
        const LME_LMA: u64 = 1 << 8 | 1 << 10;
        // Type 11: code, readable, accessed. Type 3: data, writable, accessed.
        let code = kvm_segment { limit: u32::MAX, selector: 8, type_: 11, present: 1, s: 1, l: 1, g: 1, ..Default::default() };
        let data = kvm_segment { selector: 16, type_: 3, l: 0, db: 1, ..code };
        self.settle();
        let fd = self.fd();
        let mut sregs = fd.get_sregs().map_err(|error| KvmError::at("reading a vCPU's system registers", error))?;
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (PE_ET_NE_WP_PG, start.root.get(), PAE, LME_LMA);
        (sregs.cs, sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (code, data, data, data, data, data);
        fd.set_sregs(&sregs).map_err(|error| KvmError::at("setting a vCPU's system registers", error))?;
        let regs = kvm_regs {
            rip: start.entry.get(),
            rsp: start.stack.get(),
            rdi: start.args[0],
            rsi: start.args[1],
            rflags: 2,
            ..Default::default()
        };
        fd.set_regs(&regs).map_err(|error| KvmError::at("setting a vCPU's registers", error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_walk_to_themselves() {
        let tables = Span::from_len(Gpa::new(0x2_0000), 6 * PAGE_BYTES).unwrap();
        let mut memory = vec![0u8; 0x10_0000];
        let mut write = |gpa: Gpa, bytes: &[u8]| {
            memory[gpa.get() as usize..][..bytes.len()].copy_from_slice(bytes);
            Ok(())
        };
        let root = identity_tables(tables, (4 << 30) - 5, &mut write).unwrap();
        let error = identity_tables(tables, 5 << 30, &mut write).unwrap_err();
        assert!(matches!(error, KvmError::NoRoom { needed: 0x7000, .. }), "{error}");
        let entry = |table: u64, index: u64| {
            let at = ((table & 0x000f_ffff_ffff_f000) + index * 8) as usize;
            u64::from_le_bytes(memory[at..at + 8].try_into().unwrap())
        };
        for gpa in [0u64, 0x1234_5678, 0xfe00_0000, 0xffff_ffff] {
            let leaf = [39, 30].into_iter().fold(root.get(), |table, shift| entry(table, gpa >> shift & 511));
            let leaf = entry(leaf, gpa >> 21 & 511);
            assert_eq!(leaf & 0x83, 0x83);
            assert_eq!(leaf & 0x000f_ffff_ffe0_0000, gpa & !0x1f_ffff);
        }
    }
}
