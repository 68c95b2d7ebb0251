//! Every unsafe line of this crate: host memory that others can truncate, punch or write at any time, and copies that survive it.
//!
//! Why safe code may use a [`HostAddr`] freely:
//!
//! 1. An access reaches two kinds of memory only: the one reservation of this process, and ranges given to [`UserRegion::adopt`], whose
//!    caller promised (that function is unsafe) that nothing of Rust refers to them. Every access checks that, whatever the address.
//! 2. No Rust reference to such memory exists anywhere. It is touched by the machine code below and by the kernel; other processes
//!    and KVM guests may write it meanwhile, which makes the bytes unpredictable and nothing worse.
//! 3. The reservation is never unmapped. A window that goes away becomes `PROT_NONE` again and only windows are mapped there, so a
//!    stale address faults or meets another window: wrong, but never a Rust object.
//! 4. An adopted range lies outside, so every access to one looks it up under a read lock that its end takes for writing: a
//!    stale address finds nothing.
//! 5. A fault in the machine code (the file shrank, no huge page is left, `PROT_NONE`) becomes a short count by our signal handler; every
//!    other fault goes to the handler that was there before.
//!
//! [`Words`], the one thing here that hands out references, is private memory outside the reservation.
#![expect(unsafe_code, reason = "mmap, signal handlers and copies from memory that may vanish have no safe interface")]

use crate::reservation::Reservation;
use crate::user::UserRegion;
use addr::{Hva, Span};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use std::collections::BTreeMap;
use std::ops::Deref;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Once, OnceLock, PoisonError, RwLock};
use thiserror::Error;

/// Where the reservation begins and ends; both 0 until there is one.
static START: AtomicUsize = AtomicUsize::new(0);
static END: AtomicUsize = AtomicUsize::new(0);
/// Adopted ranges that are alive: first byte, length.
static ADOPTED: RwLock<BTreeMap<usize, usize>> = RwLock::new(BTreeMap::new());

/// Takes `len_bytes` of address space, `PROT_NONE`, for windows. Called once, by [`Reservation`].
pub(crate) fn reserve(len_bytes: usize) -> Result<Span<Hva>, Errno> {
    install_handlers();
    // SAFETY: a new anonymous mapping where the kernel likes; it is never unmapped.
    let start = unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), len_bytes, ProtFlags::empty(), RESERVED) }? as usize;
    START.store(start, Ordering::Relaxed);
    END.store(start + len_bytes, Ordering::Relaxed);
    Span::from_len(Hva::new(start as u64), len_bytes as u64).map_err(|_| Errno::NOMEM)
}

const RESERVED: MapFlags = MapFlags::PRIVATE.union(MapFlags::NORESERVE);
const ACCESS: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

/// Memory that [`HostAddr`]s may point into: a window's mapping, or an adopted range. Unmapped, or forgotten, when dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: usize,
    len_bytes: usize,
    /// What to give back to the reservation; `None` for an adopted range.
    reserved: Option<Span<Hva>>,
}

impl Mapping {
    /// Maps a file, shared, at an address aligned to `1 << align_lg2`. Without `commit` nothing is reserved of a huge page pool.
    pub(crate) fn file(fd: BorrowedFd<'_>, offset: u64, len_bytes: usize, align_lg2: u8, commit: bool) -> Result<Self, Errno> {
        let flags = MapFlags::SHARED | MapFlags::FIXED | if commit { MapFlags::empty() } else { MapFlags::NORESERVE };
        Self::fixed(len_bytes, align_lg2, |at| {
            // SAFETY: `fixed` gives a part of the reservation that belongs to nobody else, so nothing is mapped over.
            unsafe { rustix::mm::mmap(at, len_bytes, ACCESS, flags, fd, offset) }
        })
    }

    /// Maps new shared memory of this process.
    pub(crate) fn anonymous(len_bytes: usize, align_lg2: u8) -> Result<Self, Errno> {
        let flags = MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE;
        // SAFETY: as in `file`.
        Self::fixed(len_bytes, align_lg2, |at| unsafe { rustix::mm::mmap_anonymous(at, len_bytes, ACCESS, flags) })
    }

    fn fixed(
        len_bytes: usize,
        align_lg2: u8,
        map: impl FnOnce(*mut libc::c_void) -> Result<*mut libc::c_void, Errno>,
    ) -> Result<Self, Errno> {
        let reserved = Reservation::get().ok_or(Errno::NOMEM)?.take(len_bytes as u64, align_lg2).ok_or(Errno::NOMEM)?;
        let start = reserved.start().get() as usize;
        match map(ptr::with_exposed_provenance_mut(start)) {
            Ok(_) => Ok(Self { start, len_bytes, reserved: Some(reserved) }),
            Err(errno) => {
                // A failed MAP_FIXED may have unmapped what was there.
                give_back(reserved);
                Err(errno)
            }
        }
    }

    /// First byte.
    pub(crate) fn start(&self) -> Hva {
        Hva::new(self.start as u64)
    }

    /// Bytes.
    pub(crate) fn len_bytes(&self) -> u64 {
        self.len_bytes as u64
    }

    /// Whether the memory was the caller's own.
    pub(crate) fn is_adopted(&self) -> bool {
        self.reserved.is_none()
    }

    /// The byte at `offset`, when `len` bytes from there are inside.
    #[inline]
    pub(crate) fn at(&self, offset: u64, len: u64) -> Option<HostAddr> {
        (offset <= self.len_bytes() && len <= self.len_bytes() - offset).then(|| HostAddr(self.start + offset as usize))
    }

    /// Bit 0 of each byte: whether that 4 KiB page is in the page cache (of a file), or was touched by this process (otherwise).
    /// `offset` is a multiple of 4 KiB.
    pub(crate) fn residency(&self, offset: u64, pages: &mut [u8]) -> Result<(), Errno> {
        let at = self.at(offset, (pages.len() as u64) << addr::PAGE_LG2).ok_or(Errno::INVAL)?;
        // SAFETY: mincore looks at the range and writes one byte per page into `pages`.
        match unsafe { libc::mincore(ptr::with_exposed_provenance_mut(at.0), pages.len() << addr::PAGE_LG2, pages.as_mut_ptr()) } {
            0 => Ok(()),
            _ => Err(last_errno()),
        }
    }

    /// Allocates every page and enters it in this process's page table.
    pub(crate) fn populate(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.advise(offset, len, Advice::LinuxPopulateWrite)
    }

    /// Gives the pages back; they read as zero afterwards.
    pub(crate) fn discard(&self, offset: u64, len: u64) -> Result<(), Errno> {
        // REMOVE frees shared memory; private memory (adopted) refuses it and is freed by DONTNEED.
        match self.advise(offset, len, Advice::LinuxRemove) {
            Err(Errno::INVAL | Errno::ACCESS) if self.is_adopted() => self.advise(offset, len, Advice::LinuxDontNeed),
            other => other,
        }
    }

    fn advise(&self, offset: u64, len: u64, advice: Advice) -> Result<(), Errno> {
        let at = self.at(offset, len).ok_or(Errno::INVAL)?;
        // SAFETY: the range is inside this mapping, to whose bytes anything may happen (points 1 and 2 above).
        unsafe { rustix::mm::madvise(ptr::with_exposed_provenance_mut(at.0), len as usize, advice) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        match self.reserved {
            Some(reserved) => give_back(reserved),
            None => drop(ADOPTED.write().unwrap_or_else(PoisonError::into_inner).remove(&self.start)),
        }
    }
}

/// Turns a part of the reservation back into `PROT_NONE` and lets it be taken again.
fn give_back(reserved: Span<Hva>) {
    let start = ptr::with_exposed_provenance_mut(reserved.start().get() as usize);
    // SAFETY: the range was taken from the reservation by the mapping that ends here; what is mapped over is nobody else's.
    let cleared = unsafe { rustix::mm::mmap_anonymous(start, reserved.len() as usize, ProtFlags::empty(), RESERVED | MapFlags::FIXED) };
    if let (Ok(_), Some(reservation)) = (cleared, Reservation::get()) {
        reservation.put_back(reserved);
    }
    // Otherwise the process has no memory areas left, and the range is lost: it stays taken, so nothing is ever mapped over it.
}

impl UserRegion {
    /// Memory that this process has mapped already: a VMM's guest memory, a buffer of its own. Not copied, not moved.
    ///
    /// # Errors
    /// Start and length must be multiples of 4 KiB, and the range must not meet one that is adopted already or our own windows.
    ///
    /// # Safety
    /// Until the region and every [`crate::Backing`] made of it are gone, `start..start + len_bytes` is memory to which
    /// anything may happen at any time: devices read and write it, [`crate::Backing::punch`] zeroes it. So no Rust reference to any of it may be
    /// alive. It may be unmapped meanwhile (accesses then fail), but then nothing else may be mapped there.
    pub unsafe fn adopt(start: *mut u8, len_bytes: u64) -> Result<Self, crate::Error> {
        let start = start.expose_provenance();
        let len = crate::backing::check_len(len_bytes)?;
        let span = Span::aligned(Hva::new(start as u64), len_bytes, addr::PAGE_LG2)?;
        install_handlers();
        let _ = Reservation::get();
        let (low, high) = (START.load(Ordering::Relaxed) as u64, END.load(Ordering::Relaxed) as u64);
        let mut adopted = ADOPTED.write().unwrap_or_else(PoisonError::into_inner);
        let before = adopted.range(..=span.last().get() as usize).next_back();
        let taken = before.is_some_and(|(&other, &len)| other + len > start) || (span.start().get() < high && low <= span.last().get());
        if taken {
            return Err(crate::Error::RegionTaken { span });
        }
        adopted.insert(start, len);
        drop(adopted);
        Ok(Self::of(Mapping { start, len_bytes: len, reserved: None }))
    }
}

/// A byte of host memory that devices may touch. Any access through it, even a stale one, is safe; it fails when the memory is gone.
/// Good for as long as the backing it came from; how many bytes from here on belong together is known to whoever asked for it.
///
/// Copies promise no order and no atomicity among their bytes, as DMA does not.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct HostAddr(usize);

/// The memory is not there: truncated, punched without a page to replace it, unmapped, or the address is stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("host memory is gone after {done} bytes; was the file truncated, or its window closed?")]
pub struct CopyFault {
    /// At least this many bytes from the start had been copied. Some of those behind may have been, too.
    pub done: usize,
}

impl HostAddr {
    /// Where it is, for messages and for the page tables of others.
    pub fn hva(self) -> Hva {
        Hva::new(self.0 as u64)
    }

    /// The address `bytes` behind this one. It is checked when it is used, like any other.
    #[inline]
    #[must_use]
    pub fn plus(self, bytes: u64) -> Self {
        Self(self.0.wrapping_add(bytes as usize))
    }

    /// Copies from `off` bytes behind this address.
    ///
    /// # Errors
    /// [`CopyFault`].
    #[inline]
    pub fn read(self, off: u64, into: &mut [u8]) -> Result<(), CopyFault> {
        let (to, len) = (into.as_mut_ptr().expose_provenance(), into.len());
        // SAFETY: `to` is ours alone; `with` has checked the other side.
        self.with(off, len, |from| unsafe { machine::copy(to, from, len) })
    }

    /// Copies to `off` bytes behind this address.
    ///
    /// # Errors
    /// [`CopyFault`].
    #[inline]
    pub fn write(self, off: u64, from: &[u8]) -> Result<(), CopyFault> {
        let (from, len) = (from.as_ptr().expose_provenance(), from.len());
        // SAFETY: `from` is borrowed for the copy; `with` has checked the other side.
        self.with(off, len, |to| unsafe { machine::copy(to, from, len) })
    }

    /// Copies between two places of which both may vanish. Where they overlap, what arrives is unspecified.
    ///
    /// # Errors
    /// [`CopyFault`].
    #[inline]
    pub fn copy(src: Self, dst: Self, len: usize) -> Result<(), CopyFault> {
        if let (Some(from), Some(to)) = (src.reserved(0, len), dst.reserved(0, len)) {
            // SAFETY: both ranges are inside the reservation (point 3).
            return done(len, unsafe { machine::copy(to, from, len) });
        }
        let adopted = ADOPTED.read().unwrap_or_else(PoisonError::into_inner);
        let place = |at: Self| at.reserved(0, len).or_else(|| at.adopted(&adopted, 0, len));
        let (Some(from), Some(to)) = (place(src), place(dst)) else { return Err(CopyFault { done: 0 }) };
        // SAFETY: each range is inside the reservation or an adopted range that cannot end while the lock is held (point 4).
        done(len, unsafe { machine::copy(to, from, len) })
    }

    /// One aligned 64-bit word, atomically, with acquire.
    ///
    /// # Errors
    /// [`CopyFault`], also when the address is not a multiple of 8.
    #[inline]
    pub fn load_u64(self, off: u64) -> Result<u64, CopyFault> {
        let mut value = 0;
        self.with(self.aligned(off)?, 8, |at| {
            // SAFETY: `with` has checked the place.
            match unsafe { machine::load(at) } {
                Some(loaded) => {
                    value = loaded;
                    0
                }
                None => 8,
            }
        })?;
        Ok(value)
    }

    /// One aligned 64-bit word, atomically, with release.
    ///
    /// # Errors
    /// [`CopyFault`], also when the address is not a multiple of 8.
    #[inline]
    pub fn store_u64(self, off: u64, value: u64) -> Result<(), CopyFault> {
        // SAFETY: `with` has checked the place.
        self.with(self.aligned(off)?, 8, |at| if unsafe { machine::store(at, value) } { 0 } else { 8 })
    }

    #[inline]
    fn aligned(self, off: u64) -> Result<u64, CopyFault> {
        if (self.0 as u64).wrapping_add(off).is_multiple_of(8) { Ok(off) } else { Err(CopyFault { done: 0 }) }
    }

    /// Runs `access` on the address, which answers how many bytes it left out, if all of `len` bytes is memory of the kind point 1 names.
    #[inline]
    fn with(self, off: u64, len: usize, access: impl FnOnce(usize) -> usize) -> Result<(), CopyFault> {
        match self.reserved(off, len) {
            Some(at) => done(len, access(at)),
            None => self.with_adopted(off, len, access),
        }
    }

    #[cold]
    #[inline(never)]
    fn with_adopted(self, off: u64, len: usize, access: impl FnOnce(usize) -> usize) -> Result<(), CopyFault> {
        let adopted = ADOPTED.read().unwrap_or_else(PoisonError::into_inner);
        done(len, self.adopted(&adopted, off, len).map_or(len.max(1), access))
    }

    #[inline]
    fn reserved(self, off: u64, len: usize) -> Option<usize> {
        let at = self.0.checked_add(off as usize)?;
        let end = END.load(Ordering::Relaxed);
        (at >= START.load(Ordering::Relaxed) && at <= end && len <= end - at).then_some(at)
    }

    fn adopted(self, ranges: &BTreeMap<usize, usize>, off: u64, len: usize) -> Option<usize> {
        let at = self.0.checked_add(off as usize)?;
        let (&start, &range_len) = ranges.range(..=at).next_back()?;
        (at - start <= range_len && len <= range_len - (at - start)).then_some(at)
    }
}

#[inline]
fn done(len: usize, left: usize) -> Result<(), CopyFault> {
    if left == 0 { Ok(()) } else { Err(CopyFault { done: len.saturating_sub(left) }) }
}

/// Lazily zeroed 64-bit words for tables: an anonymous mapping of which only touched pages cost memory.
///
/// ```
/// use std::sync::atomic::Ordering;
/// let words = lockstep_backing::Words::new(1 << 30).unwrap(); // 8 GiB of addresses, no memory yet
/// words[12_345].store(7, Ordering::Relaxed);
/// assert_eq!(words[12_346].load(Ordering::Relaxed), 0);
/// ```
#[derive(Debug)]
pub struct Words {
    start: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: an owned mapping of atomics.
unsafe impl Send for Words {}
// SAFETY: an owned mapping of atomics.
unsafe impl Sync for Words {}

impl Words {
    /// `words` zeroes.
    ///
    /// # Errors
    /// What mmap answers; `InvalidInput` for none or too many.
    pub fn new(words: usize) -> std::io::Result<Self> {
        let bytes = words.checked_mul(8).filter(|&bytes| bytes != 0 && bytes <= isize::MAX as usize);
        let bytes = bytes.ok_or(std::io::ErrorKind::InvalidInput)?;
        // SAFETY: a new anonymous mapping where the kernel likes.
        let start = unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), bytes, ACCESS, RESERVED) }?;
        let start = NonNull::new(start.cast()).ok_or(std::io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, words })
    }

    /// Gives every word its memory now, in large pages where the host allows it, so that no later access pays for a first touch.
    ///
    /// # Errors
    /// What madvise answers: no memory.
    pub fn prefault(&self) -> std::io::Result<()> {
        // SAFETY: our own mapping; neither advice changes its bytes.
        unsafe {
            let _ = rustix::mm::madvise(self.start.as_ptr().cast(), self.words * 8, Advice::LinuxHugepage);
            Ok(rustix::mm::madvise(self.start.as_ptr().cast(), self.words * 8, Advice::LinuxPopulateWrite)?)
        }
    }
}

impl Deref for Words {
    type Target = [AtomicU64];
    #[inline]
    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: `words` zeroed words, mapped until `self` is dropped; zero is a valid AtomicU64.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`; no reference outlives `self`. An error would leave it mapped, which harms nobody.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.words * 8) };
    }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL)
}

/// The copies themselves. Every function answers how much it could not do instead of faulting.
///
/// # Safety
/// Of all: each range is valid for the access, or memory of the kind that point 1 at the top names.
#[cfg(target_arch = "x86_64")]
mod machine {
    use super::{AtomicU8, AtomicUsize, Ordering};
    use std::arch::is_x86_feature_detected;

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
}

/// Elsewhere the kernel copies, and answers EFAULT. Slower (a system call each), and a word is only as atomic as the kernel's own copy of
/// 8 aligned bytes, which is one access on every 64-bit port.
///
/// # Safety
/// Of all: each range is valid for the access, or memory of the kind that point 1 at the top names.
#[cfg(not(target_arch = "x86_64"))]
mod machine {
    use super::{Ordering, ptr};

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
}

/// The handlers that were there before ours: of SIGSEGV, of SIGBUS.
static BEFORE: OnceLock<[libc::sigaction; 2]> = OnceLock::new();
/// Which of them asked to be called once only (SA_RESETHAND) and has been: bit 0, bit 1.
static SPENT: AtomicU8 = AtomicU8::new(0);
const SIGNALS: [libc::c_int; 2] = [libc::SIGSEGV, libc::SIGBUS];

/// Puts our handler in front of the present ones. A handler installed later must pass on what it does not know, as ours does; a thread that
/// blocks these signals is killed by the kernel when it faults.
fn install_handlers() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        machine::prepare();
        if !cfg!(target_arch = "x86_64") {
            return;
        }
        // What a fault must be passed on to has to be known before the first one can arrive.
        let before = BEFORE.get_or_init(|| {
            SIGNALS.map(|signal| {
                // SAFETY: all zeroes is a valid sigaction, and sigaction fills it in.
                unsafe {
                    let mut before: libc::sigaction = std::mem::zeroed();
                    libc::sigaction(signal, ptr::null(), &mut before);
                    before
                }
            })
        });
        for (signal, before) in SIGNALS.into_iter().zip(before) {
            // SAFETY: as above; `on_fault` has the signature that SA_SIGINFO asks for. Neither call can fail for these signals.
            unsafe {
                let mut ours: libc::sigaction = std::mem::zeroed();
                ours.sa_sigaction = on_fault as *const () as usize;
                // On the alternate stack where the thread has one: a stack overflow must still reach whoever reports it.
                ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | (before.sa_flags & libc::SA_RESTART);
                libc::sigemptyset(&mut ours.sa_mask);
                libc::sigaction(signal, &ours, ptr::null_mut());
            }
        }
    });
}

extern "C" fn on_fault(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a handler with SA_SIGINFO a valid siginfo and context.
    let code = unsafe { (*info).si_code };
    // Only what the processor found at this very instruction has a context that says what faulted: not kill(), whose codes are not
    // positive, nor news of broken memory somewhere else.
    let sent = code <= 0 || (signal == libc::SIGBUS && code == libc::BUS_MCEERR_AO);
    // SAFETY: as above, and the fault was synchronous.
    if !sent && unsafe { machine::abandon(context.cast()) } {
        return;
    }
    pass_on(signal, info, context, sent);
}

/// Does what the kernel would have done, had our handler not been there.
#[cold]
fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void, sent: bool) {
    let slot = usize::from(signal == libc::SIGBUS);
    let Some(before) = BEFORE.get().map(|before| &before[slot]) else { return };
    let spent = 1 << slot;
    let handler = if SPENT.load(Ordering::Relaxed) & spent == 0 { before.sa_sigaction } else { libc::SIG_DFL };
    // SAFETY: only functions that are safe in a signal handler are called; a handler that was installed is a function of the kind its
    // flags say.
    unsafe {
        match handler {
            // The kernel does not let a process ignore its own faults.
            libc::SIG_IGN if sent => {}
            libc::SIG_DFL | libc::SIG_IGN => {
                let mut default: libc::sigaction = std::mem::zeroed();
                default.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(signal, &default, ptr::null_mut());
                // A fault happens again when we return, and kills with the right address; a sent signal has to be sent again.
                if sent {
                    libc::raise(signal);
                }
            }
            handler => {
                if before.sa_flags & libc::SA_RESETHAND != 0 {
                    SPENT.fetch_or(spent, Ordering::Relaxed);
                }
                // What was blocked before comes back when our handler returns.
                libc::pthread_sigmask(libc::SIG_BLOCK, &before.sa_mask, ptr::null_mut());
                if before.sa_flags & libc::SA_NODEFER != 0 {
                    let mut own: libc::sigset_t = std::mem::zeroed();
                    libc::sigaddset(&mut own, signal);
                    libc::pthread_sigmask(libc::SIG_UNBLOCK, &own, ptr::null_mut());
                }
                if before.sa_flags & libc::SA_SIGINFO != 0 {
                    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = std::mem::transmute(handler);
                    handler(signal, info, context);
                } else {
                    let handler: extern "C" fn(libc::c_int) = std::mem::transmute(handler);
                    handler(signal);
                }
            }
        }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::machine;

    /// A processor takes one way through a length; here each takes all that it has.
    #[test]
    fn every_way_copies_alike() {
        let source: Vec<u8> = (0..20_000).map(|at| (at * 31 + at / 255) as u8).collect();
        for mode in machine::modes() {
            for len in (0..600).chain([1000, 4095, 4096, 4097, 8191, 8192, 8193, 12_345]) {
                for (from, to) in [(0, 0), (1, 0), (0, 1), (63, 5), (7, 63), (64, 32)] {
                    let mut target = vec![0xaa; len + 200];
                    let (a, b) = (source[from..].as_ptr().expose_provenance(), target[to..].as_mut_ptr().expose_provenance());
                    // SAFETY: both ranges are inside their vectors.
                    let left = unsafe { machine::copy_in_mode(b, a, len, mode) };
                    assert_eq!(left, 0, "mode {mode}, {len} bytes");
                    assert!(target[to..to + len] == source[from..from + len], "mode {mode}, {len} bytes from {from} to {to}");
                    assert!(target[..to].iter().chain(&target[to + len..]).all(|&byte| byte == 0xaa), "mode {mode}, {len} bytes: too many");
                }
            }
        }
    }
}
