//! Copies, loads and stores that a signal handler can abandon at any instruction. Every function answers how much it could not do
//! instead of faulting.
//!
//! # Safety
//! Of all: each range is valid for the access, or memory of the kind that point 1 of the parent's head names.

use std::arch::is_x86_feature_detected;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

/// What this processor has, in the bits that `copy_x86_64.s` knows.
static MODE: AtomicU8 = AtomicU8::new(0);
/// Where the text of `copy_text` ends.
static COPY_END: AtomicUsize = AtomicUsize::new(0);
const AVX: u8 = 1;
const FAST_REP: u8 = 2;
const AVX512: u8 = 4;
const TELL_END: u32 = 128;

pub(super) fn prepare() {
    // SAFETY: a length of 0 touches no memory.
    COPY_END.store(unsafe { copy_text(0, 0, 0, TELL_END) }, Ordering::Relaxed);
    let avx = if is_x86_feature_detected!("avx") { AVX } else { 0 };
    let rep = if is_x86_feature_detected!("ermsb") { FAST_REP } else { 0 };
    // Processors with VBMI2 do not lower their clock for 64-byte registers; the first with AVX-512 did.
    let avx512 = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vbmi2");
    MODE.store(avx | rep | if avx512 { AVX512 } else { 0 }, Ordering::Relaxed);
}

#[inline]
pub(super) unsafe fn copy(to: usize, from: usize, len: usize) -> usize {
    // SAFETY: passed on to the caller.
    unsafe { copy_text(to, from, len, u32::from(MODE.load(Ordering::Relaxed))) }
}

/// Every set of what `copy_text` may use that this processor has.
#[cfg(test)]
pub(super) fn modes() -> impl Iterator<Item = u8> {
    prepare();
    let all = MODE.load(Ordering::Relaxed);
    (0..=all).filter(move |mode| mode & !all == 0)
}

#[cfg(test)]
pub(super) unsafe fn copy_in_mode(to: usize, from: usize, len: usize, mode: u8) -> usize {
    // SAFETY: passed on to the caller.
    unsafe { copy_text(to, from, len, u32::from(mode)) }
}

#[inline]
pub(super) unsafe fn load(at: usize) -> Option<u64> {
    // SAFETY: passed on to the caller.
    let word = unsafe { load_text(at) };
    (word.faulted == 0).then_some(word.value)
}

#[inline]
pub(super) unsafe fn store(at: usize, value: u64) -> bool {
    // SAFETY: passed on to the caller.
    unsafe { store_text(at, value) }.faulted == 0
}

/// Comes back in rax and rdx.
#[repr(C)]
struct Word {
    value: u64,
    faulted: u64,
}

#[unsafe(naked)]
unsafe extern "sysv64" fn copy_text(to: usize, from: usize, len: usize, mode: u32) -> usize {
    core::arch::naked_asm!(include_str!("copy_x86_64.s"))
}

/// Where a copy that faulted goes on: the stack is as at its entry.
#[unsafe(naked)]
unsafe extern "sysv64" fn copy_fixup() {
    core::arch::naked_asm!("mov rax, rcx", "test r8d, 1", "jz 2f", "vzeroupper", "2: ret")
}

/// Its first instruction is the one that may fault.
#[unsafe(naked)]
unsafe extern "sysv64" fn load_text(at: usize) -> Word {
    core::arch::naked_asm!("mov rax, qword ptr [rdi]", "xor edx, edx", "ret")
}

/// Its first instruction is the one that may fault.
#[unsafe(naked)]
unsafe extern "sysv64" fn store_text(at: usize, value: u64) -> Word {
    core::arch::naked_asm!("mov qword ptr [rdi], rsi", "xor edx, edx", "ret")
}

#[unsafe(naked)]
unsafe extern "sysv64" fn word_fixup() {
    core::arch::naked_asm!("mov edx, 1", "ret")
}

/// Makes the interrupted thread go on behind its copy. False when the fault did not happen in one.
///
/// # Safety
/// `context` is what the kernel gave to a handler of a synchronous fault.
pub(super) unsafe fn abandon(context: *mut libc::ucontext_t) -> bool {
    // SAFETY: the kernel's context, ours to change until the handler returns.
    let ip = unsafe { &mut (*context).uc_mcontext.gregs[libc::REG_RIP as usize] };
    let at = *ip as usize;
    let fixup = if (copy_text as *const () as usize..COPY_END.load(Ordering::Relaxed)).contains(&at) {
        copy_fixup as *const () as usize
    } else if at == load_text as *const () as usize || at == store_text as *const () as usize {
        word_fixup as *const () as usize
    } else {
        return false;
    };
    *ip = fixup as i64;
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raw::Mapping;
    use std::os::fd::AsFd;

    /// A processor takes one way through a length; here each takes all that it has.
    #[test]
    fn every_way_copies_alike() {
        let source: Vec<u8> = (0..20_000).map(|at| (at * 31 + at / 255) as u8).collect();
        for mode in modes() {
            for len in (0..600).chain([1000, 4095, 4096, 4097, 8191, 8192, 8193, 12_345]) {
                for (from, to) in [(0, 0), (1, 0), (0, 1), (63, 5), (7, 63), (64, 32)] {
                    let mut target = vec![0xaa; len + 200];
                    let (a, b) = (source[from..].as_ptr().expose_provenance(), target[to..].as_mut_ptr().expose_provenance());
                    // SAFETY: both ranges are inside their vectors.
                    let left = unsafe { copy_in_mode(b, a, len, mode) };
                    assert_eq!(left, 0, "mode {mode}, {len} bytes");
                    assert!(target[to..to + len] == source[from..from + len], "mode {mode}, {len} bytes from {from} to {to}");
                    assert!(target[..to].iter().chain(&target[to + len..]).all(|&byte| byte == 0xaa), "mode {mode}, {len} bytes: too many");
                }
            }
        }
    }

    /// A fault leaves the truth behind, to 128 bytes, whichever way the copy went.
    #[test]
    fn every_way_says_where_it_ended() {
        const END: usize = 64 << 12;
        let file = rustix::fs::memfd_create("lockstep-short", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 2 << 20).unwrap();
        let mapping = Mapping::file(file.as_fd(), 0, 2 << 20, 21, true).unwrap();
        let at = mapping.at(0, 2 << 20).unwrap();
        at.write(0, &[0x11; END]).unwrap();
        rustix::fs::ftruncate(&file, END as u64).unwrap();
        let base = at.hva().get() as usize;
        for mode in modes() {
            for len in [65, 128, 129, 200, 256, 1000, 4096, 8192, 8193, 65_536, 200_000] {
                for inside in
                    [0, 1, 33, 64, 100, 127, 128, 129, 1000, 4095, 4096, 6000, 8191, 100_000].into_iter().filter(|&inside| inside < len)
                {
                    for skew in [0, 1, 8, 40, 63] {
                        let mut heap = vec![0u8; len + skew];
                        // SAFETY: one side is ours, the other a window of the reservation.
                        let left = unsafe { copy_in_mode(heap[skew..].as_mut_ptr().expose_provenance(), base + END - inside, len, mode) };
                        let done = len - left;
                        assert!(done <= inside && done + 128 >= inside, "mode {mode}, {len} bytes, {inside} there, skew {skew}: {done}");
                        assert!(heap[skew..skew + done].iter().all(|&byte| byte == 0x11), "mode {mode}, {len} bytes, {inside} there");
                    }
                }
            }
        }
    }
}
