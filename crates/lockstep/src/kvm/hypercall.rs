//! Whether a guest's hypercalls reach KVM on this host, and by which instruction.
//!
//! A KVM that interprets its guests may offer `KVM_CAP_EXIT_HYPERCALL` and still never exit: it "repairs" VMCALL into VMMCALL or the
//! reverse, and interprets it anew, for ever. So it is tried, in a VM of its own where that repair is turned off.
#![forbid(unsafe_code)]

use super::{Exit, HC_MAP_GPA_RANGE, KvmError, Memory, SlotOptions, Start, Vm, identity_tables};
use addr::{Gpa, Span};
use kvm_bindings::{KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_FIX_HYPERCALL_INSN, kvm_enable_cap};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::os::fd::AsFd;

/// The instruction by which a guest makes a hypercall.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HypercallInstruction {
    /// `0f 01 c1`, Intel's.
    Vmcall,
    /// `0f 01 d9`, AMD's.
    Vmmcall,
}

const MEMORY_BYTES: u64 = 0x1_0000;
const CODE: Gpa = Gpa::new(0x8000);

/// Finds the instruction whose KVM_HC_MAP_GPA_RANGE comes to user space; `None` where none does. Takes some milliseconds.
///
/// # Errors
/// When no VM can be made to try it in.
pub fn hypercall_instruction() -> Result<Option<HypercallInstruction>, KvmError> {
    for (instruction, opcode) in [(HypercallInstruction::Vmmcall, 0xd9), (HypercallInstruction::Vmcall, 0xc1)] {
        let vm = Vm::new()?;
        if vm.caps().exit_hypercall >> HC_MAP_GPA_RANGE & 1 == 0 {
            return Ok(None);
        }
        let mut quirk = kvm_enable_cap { cap: KVM_CAP_DISABLE_QUIRKS2, ..Default::default() };
        quirk.args[0] = KVM_X86_QUIRK_FIX_HYPERCALL_INSN.into();
        if vm.fd().enable_cap(&quirk).is_err() {
            // Without that, the wrong instruction might never come back.
            return Ok(None);
        }
        if exits(&vm, opcode)? {
            return Ok(Some(instruction));
        }
    }
    Ok(None)
}

fn exits(vm: &Vm, opcode: u8) -> Result<bool, KvmError> {
    let file = memfd_create("hypercall-try", MemfdFlags::CLOEXEC).map_err(|error| KvmError::os("creating a memfd", error.into()))?;
    ftruncate(&file, MEMORY_BYTES).map_err(|error| KvmError::os("sizing a memfd", error.into()))?;
    let mut write = |gpa: Gpa, bytes: &[u8]| -> std::io::Result<()> { Ok(rustix::io::pwrite(&file, bytes, gpa.get()).map(|_| ())?) };
    let tables = Span::of(Gpa::new(0x1000), Gpa::new(0x3fff));
    let root = identity_tables(tables, MEMORY_BYTES, &mut write)?;
    // mov eax, 12; mov ebx, 0x1000; mov ecx, 1; xor edx, edx; vmcall or vmmcall; hlt
    let code = [0xb8, 12, 0, 0, 0, 0xbb, 0, 0x10, 0, 0, 0xb9, 1, 0, 0, 0, 0x31, 0xd2, 0x0f, 0x01, opcode, 0xf4];
    write(CODE, &code).map_err(|error| KvmError::Write { what: "a try of a hypercall", at: CODE, error })?;
    vm.set_memslot(0, Gpa::new(0), Memory::of_file(file.as_fd(), 0, MEMORY_BYTES)?, SlotOptions::default())?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.start_in_long_mode(Start { root, entry: CODE, stack: CODE, args: [0; 2] })?;
    loop {
        match vcpu.run()? {
            Exit::Interrupted => {}
            exit => return Ok(matches!(exit, Exit::MapGpaRange(_))),
        }
    }
}
