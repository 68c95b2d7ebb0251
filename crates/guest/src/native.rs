//! The crate's one file with unsafe code: the assembled program as bytes and as a function, and memory by its address.
//!
//! The program is assembled into this crate, so that a thread runs it where it stands and a VM gets a copy of the same bytes.
#![expect(unsafe_code, reason = "labels of assembled code, a call into it, and memory that a guest shares")]

use crate::control::{self, Features, PageState, Params, Report, error};
use crate::registers::{self, bell, dma};
use crate::{Memory, Platform, STOP, layout};
use addr::{Gpa, Hva};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use std::any::Any;
use std::arch::global_asm;
use std::mem::offset_of;
use std::os::fd::BorrowedFd;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

global_asm!(
    include_str!("asm/main.s"),
    include_str!("asm/psc.s"),
    include_str!("asm/list.s"),
    include_str!("asm/dma.s"),
    magic = const control::MAGIC,
    report = const layout::REPORT.get(),
    p_magic = const offset_of!(Params, magic),
    p_seed = const offset_of!(Params, seed),
    p_work = const offset_of!(Params, work_gpa),
    p_pages = const offset_of!(Params, work_pages),
    p_states = const offset_of!(Params, states_gpa),
    p_psc = const offset_of!(Params, psc_gpa),
    p_pvalidate = const offset_of!(Params, pvalidate_gpa),
    p_doorbell = const offset_of!(Params, doorbell_gpa),
    p_trusted = const offset_of!(Params, trusted_gpa),
    p_untrusted = const offset_of!(Params, untrusted_gpa),
    p_features = const offset_of!(Params, features),
    p_max_rounds = const offset_of!(Params, max_rounds),
    p_polls = const offset_of!(Params, polls),
    p_read = const offset_of!(Params, read),
    p_write = const offset_of!(Params, write),
    p_hypercall = const offset_of!(Params, hypercall),
    p_context = const offset_of!(Params, context),
    r_stop = const offset_of!(Report, stop),
    r_rounds = const offset_of!(Report, rounds),
    r_psc_calls = const offset_of!(Report, psc_calls),
    r_psc_entries = const offset_of!(Report, psc_entries),
    r_psc_large = const offset_of!(Report, psc_large),
    r_psc_resumed = const offset_of!(Report, psc_resumed),
    r_psc_errors = const offset_of!(Report, psc_errors),
    r_psc_refused = const offset_of!(Report, psc_refused),
    r_psc_wrong_answers = const offset_of!(Report, psc_wrong_answers),
    r_hypercalls = const offset_of!(Report, hypercalls),
    r_pvalidate_calls = const offset_of!(Report, pvalidate_calls),
    r_size_mismatches = const offset_of!(Report, size_mismatches),
    r_dma_started = const offset_of!(Report, dma_started),
    r_dma_ok = const offset_of!(Report, dma_ok),
    r_dma_refused = const offset_of!(Report, dma_refused_untrusted),
    r_dma_wrong = const offset_of!(Report, dma_wrong),
    r_bytes_verified = const offset_of!(Report, bytes_verified),
    r_mismatches = const offset_of!(Report, mismatches),
    r_mismatch_gpa = const offset_of!(Report, mismatch_gpa),
    r_mismatch_expected = const offset_of!(Report, mismatch_expected),
    r_mismatch_got = const offset_of!(Report, mismatch_got),
    r_errors = const offset_of!(Report, errors),
    r_last_error = const offset_of!(Report, last_error),
    f_hypercall = const Features::HYPERCALL.0,
    f_vmcall = const Features::VMCALL.0,
    f_shared_only = const Features::SHARED_ONLY.0,
    private = const PageState::Private as u8,
    shared = const PageState::Shared as u8,
    mark = const MARK,
    op_shared = const registers::OP_SHARED,
    op_validate = const registers::OP_PRIVATE,
    op_rescind = const registers::OP_SHARED,
    max_entries = const registers::MAX_ENTRIES,
    bad_header = const registers::BAD_HEADER,
    bad_entry = const registers::BAD_ENTRY,
    size_mismatch = const registers::SIZE_MISMATCH,
    hc_map_gpa_range = const registers::HC_MAP_GPA_RANGE,
    bell_psc = const bell::PSC,
    bell_pvalidate = const bell::PVALIDATE,
    bell_done = const bell::DONE,
    dma_src = const dma::SRC,
    dma_dst = const dma::DST,
    dma_len = const dma::LEN,
    dma_cmd = const dma::CMD,
    dma_status = const dma::STATUS,
    dma_fault_iova = const dma::FAULT_IOVA,
    dma_value = const dma::VALUE,
    cmd_copy = const dma::COPY,
    cmd_fill = const dma::FILL,
    status_faulted = const dma::FAULTED,
    step = const STEP,
    submit_tries = const control::SUBMIT_TRIES,
    done_bad_control = const error::BAD_CONTROL,
    err_backwards = const error::BACKWARDS,
    err_stuck = const error::STUCK,
    err_list_changed = const error::LIST_CHANGED,
    err_fault_elsewhere = const error::FAULT_ELSEWHERE,
    err_dma_failed = const error::DMA_FAILED,
    err_not_refused = const error::NOT_REFUSED,
);

/// In the state table: this page is in the batch that is being made.
const MARK: u8 = 0x80;
/// From one word of a pattern to the next: 2^64 over the golden ratio, so that no two words of a page are alike. Signed for the assembler.
const STEP: i64 = 0x9e37_79b9_7f4a_7c15_u64.cast_signed();

// The program stores as wide as a whole list entry; what it addresses by 8-byte slots must keep to them.
const _: () = assert!(layout::REPORT.get().is_multiple_of(8) && offset_of!(Params, context) == 17 * 8);

unsafe extern "sysv64" {
    fn lockstep_guest_main(base: *mut u8, params: *const Params);
}

unsafe extern "C" {
    static lockstep_guest_start: u8;
    static lockstep_guest_end: u8;
}

pub(crate) fn image() -> &'static [u8] {
    let (start, end) = (&raw const lockstep_guest_start, &raw const lockstep_guest_end);
    // SAFETY: the two labels enclose the section's content, assembled in one piece; code is never written.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// Runs the program; `params` has been checked against `memory`.
pub(crate) fn run(memory: &Memory, params: &Params, platform: &mut dyn Platform) {
    let mut host = Host { platform, memory, panic: None };
    let params = Params {
        read: read as *const () as u64,
        write: write as *const () as u64,
        hypercall: hypercall as *const () as u64,
        context: (&raw mut host).expose_provenance() as u64,
        ..*params
    };
    let base = ptr::with_exposed_provenance_mut::<u8>(memory.hva().get() as usize);
    // SAFETY: the program keeps the System V convention and uses less than 1 KiB of stack. It reaches memory only inside the spans
    // of `params`, which the caller checked to lie in `memory`: indices that it reads back from memory are checked by it. `memory` is
    // mapped for the length of the call and nobody has a reference into it. `host` is used only through the context until it returns.
    unsafe { lockstep_guest_main(base, &raw const params) };
    if let Some(panic) = host.panic {
        resume_unwind(panic);
    }
}

/// What the services get as their context.
struct Host<'a> {
    platform: &'a mut dyn Platform,
    memory: &'a Memory,
    panic: Option<Box<dyn Any + Send>>,
}

impl Host<'_> {
    /// Calls the platform. No panic may cross the assembled frames, which have no unwind tables: it is kept, and the guest is stopped.
    fn call(&mut self, service: impl FnOnce(&mut dyn Platform) -> u64) -> u64 {
        if self.panic.is_some() {
            return u64::MAX;
        }
        catch_unwind(AssertUnwindSafe(|| service(self.platform))).unwrap_or_else(|panic| {
            self.panic = Some(panic);
            let _inside = self.memory.write(STOP, &1u64.to_le_bytes());
            u64::MAX
        })
    }
}

extern "sysv64" fn read(host: *mut Host<'_>, gpa: u64) -> u64 {
    // SAFETY: the context that `run` gave, alive until the program returns and used by one service call at a time.
    let host = unsafe { &mut *host };
    host.call(|platform| platform.mmio_read(Gpa::new(gpa), 8))
}

extern "sysv64" fn write(host: *mut Host<'_>, gpa: u64, value: u64) {
    // SAFETY: as in `read`.
    let host = unsafe { &mut *host };
    host.call(|platform| {
        platform.mmio_write(Gpa::new(gpa), 8, value);
        0
    });
}

extern "sysv64" fn hypercall(host: *mut Host<'_>, nr: u64, a: u64, b: u64, c: u64) -> u64 {
    // SAFETY: as in `read`.
    let host = unsafe { &mut *host };
    host.call(|platform| platform.hypercall(nr, [a, b, c]))
}

/// Memory by its address, and whatever keeps it mapped.
pub(crate) struct Mapping {
    base: usize,
    len: usize,
    /// `None`: mapped here, unmapped on drop.
    owner: Option<Arc<dyn Any + Send + Sync>>,
}

impl Mapping {
    pub(crate) fn new(file: Option<BorrowedFd<'_>>, offset: u64, len_bytes: u64) -> Result<Self, Errno> {
        let len = usize::try_from(len_bytes).map_err(|_| Errno::NOMEM)?;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping where the kernel finds room takes nothing away from anybody.
        let base = unsafe {
            match file {
                Some(file) => rustix::mm::mmap(ptr::null_mut(), len, prot, MapFlags::SHARED, file, offset)?,
                None => rustix::mm::mmap_anonymous(ptr::null_mut(), len, prot, MapFlags::SHARED | MapFlags::NORESERVE)?,
            }
        };
        Ok(Self { base: base.expose_provenance(), len, owner: None })
    }

    pub(crate) fn len_bytes(&self) -> u64 {
        self.len as u64
    }

    pub(crate) fn hva(&self) -> Hva {
        Hva::new(self.base as u64)
    }

    /// The caller has checked that all of it lies inside.
    pub(crate) fn read(&self, offset: u64, into: &mut [u8]) {
        let (head, words, tail) = split(offset as usize, into.len());
        assert!(tail.end <= self.len);
        for (i, byte) in head.clone().chain(tail.clone()).zip((0..head.len()).chain(into.len() - tail.len()..into.len())) {
            into[byte] = self.byte(i).load(Ordering::Relaxed);
        }
        for (i, chunk) in words.step_by(8).zip(into[head.len()..].chunks_exact_mut(8)) {
            chunk.copy_from_slice(&self.word(i).load(Ordering::Relaxed).to_le_bytes());
        }
    }

    /// The caller has checked that all of it lies inside.
    pub(crate) fn write(&self, offset: u64, from: &[u8]) {
        let (head, words, tail) = split(offset as usize, from.len());
        assert!(tail.end <= self.len);
        for (i, byte) in head.clone().chain(tail.clone()).zip((0..head.len()).chain(from.len() - tail.len()..from.len())) {
            self.byte(i).store(from[byte], Ordering::Relaxed);
        }
        for (i, chunk) in words.step_by(8).zip(from[head.len()..].chunks_exact(8)) {
            self.word(i).store(u64::from_le_bytes(chunk.try_into().expect("8 bytes")), Ordering::Relaxed);
        }
    }

    fn byte(&self, at: usize) -> &AtomicU8 {
        debug_assert!(at < self.len);
        // SAFETY: mapped (`new`, `adopt`), inside by the assertions above, and touched by atomics and machine code only.
        unsafe { AtomicU8::from_ptr(ptr::with_exposed_provenance_mut(self.base + at)) }
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        debug_assert!(at.is_multiple_of(8) && at + 8 <= self.len);
        // SAFETY: as in `byte`; `at` and the base are multiples of 8.
        unsafe { AtomicU64::from_ptr(ptr::with_exposed_provenance_mut(self.base + at)) }
    }
}

impl Memory {
    /// Memory that somebody else mapped.
    ///
    /// # Safety
    /// `len_bytes` from `base` must be mapped readable and writable until the last clone of `owner` held here is dropped, `base` must
    /// be a multiple of 8, and no Rust reference to any of it may exist in that time.
    pub unsafe fn adopt(base: Hva, len_bytes: u64, owner: Arc<dyn Any + Send + Sync>) -> Self {
        Self(Arc::new(Mapping { base: base.get() as usize, len: len_bytes as usize, owner: Some(owner) }))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.owner.is_none() {
            // SAFETY: mapped by `new` with this length, and unmapped only here. A failure leaves it mapped, which harms nobody.
            let _still_mapped = unsafe { rustix::mm::munmap(ptr::with_exposed_provenance_mut(self.base), self.len) };
        }
    }
}

/// A range of bytes as those before the first whole 8-byte word, whole words, and the rest.
fn split(start: usize, len: usize) -> (std::ops::Range<usize>, std::ops::Range<usize>, std::ops::Range<usize>) {
    let end = start + len;
    let first = start.next_multiple_of(8).min(end);
    let last = first.max(end & !7);
    (start..first, first..last, last..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_of_any_alignment() {
        let mapping = Mapping::new(None, 0, 4096).unwrap();
        let bytes: Vec<u8> = (1..=64).collect();
        for start in 0..17usize {
            for len in 0..40 {
                mapping.write(0, &[0; 64]);
                mapping.write(start as u64, &bytes[..len]);
                let mut all = [0u8; 64];
                mapping.read(0, &mut all);
                let mut wanted = [0u8; 64];
                wanted[start..start + len].copy_from_slice(&bytes[..len]);
                assert_eq!(all, wanted, "{len} bytes at {start}");
                let mut part = vec![0; len];
                mapping.read(start as u64, &mut part);
                assert_eq!(part, bytes[..len]);
            }
        }
    }
}
