//! The link to KVM: guest memory files, memory slots, attributes, vCPUs, and the probe of stage 2. All unsafe code of the crate is in this module's folder.
//!
//! A [`Vm`] keeps the memory of every slot mapped until the slot is gone (its [`Memory`] has an owner), refuses spans that cannot be
//! right before the kernel is asked, and keeps the private/shared attribute itself where KVM has none. A [`Vcpu`] comes back with an
//! [`Exit`] that is decoded and checked; a [`Kick`] makes it come back. Files that need no unsafe code forbid it.
//!
//! Structures and their meaning: Linux `Documentation/virt/kvm/api.rst` (4.35, 4.126, 4.140 to 4.142, 5).
#![expect(unsafe_code, reason = "KVM reaches guest memory by address, and kvm_run is shared with the kernel")]

mod attributes;
mod boot;
mod caps;
mod copier;
mod error;
mod exit;
mod hypercall;
mod kick;
mod memory;
mod probe;
mod signal;
mod slots;
mod vcpu;
mod vm;

pub use attributes::Applied;
pub use boot::{Start, Writer, identity_tables, identity_tables_bytes};
pub use caps::{ATTRIBUTE_PRIVATE, Caps, MemfdFlags};
pub use copier::{Copier, CopierAt};
pub use error::KvmError;
pub use exit::{Exit, ExitCounts, HC_MAP_GPA_RANGE, MapGpaRange};
pub use hypercall::{HypercallInstruction, hypercall_instruction};
pub use kick::Kick;
pub use memory::{Memory, SlotOptions};
pub use probe::{ProbeAt, Probed, Prober};
pub use vcpu::Vcpu;
pub use vm::Vm;

use std::sync::{Mutex, MutexGuard, PoisonError};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is complete or has not begun when something can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
