//! Where this crate has no machine code of its own, the kernel copies, and answers EFAULT. Slower (a system call each), and a word is
//! only as atomic as the kernel's own copy of 8 aligned bytes, which is one access on every 64-bit port.
//!
//! # Safety
//! Of all: each range is valid for the access, or memory of the kind that point 1 of the parent's head names.

use std::ptr;
use std::sync::atomic::Ordering;

pub(super) fn prepare() {}

pub(super) unsafe fn copy(to: usize, from: usize, len: usize) -> usize {
    let mut left = len;
    while left > 0 {
        let done = len - left;
        let part = |at: usize| libc::iovec { iov_base: ptr::with_exposed_provenance_mut(at + done), iov_len: left };
        // SAFETY: the kernel checks both sides and stops at what is not there; the ranges are the caller's promise.
        match unsafe { libc::process_vm_readv(libc::getpid(), &part(to), 1, &part(from), 1, 0) } {
            count @ 1.. => left -= count as usize,
            _ => return left,
        }
    }
    0
}

pub(super) unsafe fn load(at: usize) -> Option<u64> {
    let mut value = 0u64;
    // SAFETY: `value` is ours; the rest is the caller's promise.
    let left = unsafe { copy((&raw mut value).expose_provenance(), at, 8) };
    std::sync::atomic::fence(Ordering::Acquire);
    (left == 0).then_some(value)
}

pub(super) unsafe fn store(at: usize, value: u64) -> bool {
    std::sync::atomic::fence(Ordering::Release);
    // SAFETY: as in `load`.
    unsafe { copy(at, (&raw const value).expose_provenance(), 8) == 0 }
}

pub(super) unsafe fn abandon(_context: *mut libc::ucontext_t) -> bool {
    false
}
