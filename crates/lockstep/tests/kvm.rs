//! The KVM link on this host's /dev/kvm. Where there is none, each test says so and passes.

use addr::{Gpa, Span};
use lockstep_iommu::kvm::{
    Applied, Exit, HypercallInstruction, KvmError, MapGpaRange, MemfdFlags, Memory, ProbeAt, Probed, Prober, SlotOptions, Start, Vcpu, Vm,
    hypercall_instruction, identity_tables, identity_tables_bytes,
};
use rustix::fs::{FallocateFlags, fallocate, ftruncate, memfd_create};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const TABLES: Span<Gpa> = span(0x1000, 0x8000);
const CODE: Gpa = Gpa::new(0x8000);
const STACK: Gpa = Gpa::new(0x1_0000);
const MEMORY: u64 = 8 << 20;
const REGISTER: Gpa = Gpa::new(0xfe00_0000);

const fn span(start: u64, end: u64) -> Span<Gpa> {
    match Span::<Gpa>::const_of(Gpa::new(start), Gpa::new(end - 1)) {
        Some(span) => span,
        None => panic!("backwards"),
    }
}

fn vm() -> Option<Vm> {
    match Vm::new() {
        Ok(vm) => Some(vm),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}
