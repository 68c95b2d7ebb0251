//! What this host's KVM offers, as far as the link makes use of it.
#![forbid(unsafe_code)]

use kvm_bindings::{
    KVM_CAP_EXIT_HYPERCALL, KVM_CAP_GUEST_MEMFD, KVM_CAP_MEMORY_ATTRIBUTES, KVM_CAP_MEMORY_FAULT_INFO, KVM_CAP_USER_MEMORY2,
};
use kvm_ioctls::{Cap, VmFd};
use std::ops::BitOr;

/// `KVM_CAP_GUEST_MEMFD_FLAGS` of Linux 6.18 (`include/uapi/linux/kvm.h`), which the bindings do not have yet.
const KVM_CAP_GUEST_MEMFD_FLAGS: u64 = 244;
/// Bit of [`Caps::attributes`]: the page is private to the guest.
pub const ATTRIBUTE_PRIVATE: u64 = kvm_bindings::KVM_MEMORY_ATTRIBUTE_PRIVATE as u64;

/// How a guest_memfd is made: `GUEST_MEMFD_FLAG_*` of Linux 6.18.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemfdFlags(u64);

impl MemfdFlags {
    /// Cannot be mapped; what every kernel with guest_memfd can make.
    pub const NONE: Self = Self(0);
    /// User space may map it.
    pub const MMAP: Self = Self(1);
    /// Its pages are shared from the start, so that a mapping can be used. Only for a VM without private memory of its own.
    pub const INIT_SHARED: Self = Self(2);

    /// The bits as the kernel wants them.
    pub const fn bits(self) -> u64 {
        self.0
    }
    /// From bits as the kernel gives them.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
    /// Whether all of `other` is in it.
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitOr for MemfdFlags {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// What a VM on this host can do. Asked once, when it is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caps {
    /// guest_memfd can be created.
    pub guest_memfd: bool,
    /// With these flags.
    pub memfd_flags: MemfdFlags,
    /// Slots can have a guest_memfd (`KVM_SET_USER_MEMORY_REGION2`).
    pub user_memory2: bool,
    /// Attributes the kernel keeps per page; 0 = none, then the link keeps them alone.
    pub attributes: u64,
    /// Hypercalls that user space may ask to see, as bits of their numbers. The instruction may not reach KVM all the same: see
    /// [`hypercall_instruction`](super::hypercall_instruction).
    pub exit_hypercall: u64,
    /// Exits that say which memory a guest missed.
    pub memory_fault: bool,
    /// How many memory slots there are.
    pub slots: u32,
}

impl Caps {
    pub(super) fn of(vm: &VmFd) -> Self {
        let raw = |cap: u64| vm.check_extension_raw(cap).max(0).unsigned_abs();
        Self {
            guest_memfd: raw(KVM_CAP_GUEST_MEMFD.into()) > 0,
            memfd_flags: MemfdFlags(raw(KVM_CAP_GUEST_MEMFD_FLAGS).into()),
            user_memory2: raw(KVM_CAP_USER_MEMORY2.into()) > 0,
            attributes: raw(KVM_CAP_MEMORY_ATTRIBUTES.into()).into(),
            exit_hypercall: raw(KVM_CAP_EXIT_HYPERCALL.into()).into(),
            memory_fault: raw(KVM_CAP_MEMORY_FAULT_INFO.into()) > 0,
            slots: u32::try_from(vm.check_extension_int(Cap::NrMemslots)).unwrap_or(0).max(32),
        }
    }
}
