//! Every unsafe line of this crate is here and in this module's folder: host memory that others can truncate, punch or write at any time, and copies that survive it.
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

mod faults;
#[cfg_attr(target_arch = "x86_64", path = "raw/x86_64.rs")]
#[cfg_attr(not(target_arch = "x86_64"), path = "raw/elsewhere.rs")]
mod machine;
mod words;

pub use words::Words;

use crate::reservation::Reservation;
use crate::user::UserRegion;
use addr::{Hva, Span};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{PoisonError, RwLock};
use thiserror::Error;

/// Where the reservation begins and ends; both 0 until there is one.
static START: AtomicUsize = AtomicUsize::new(0);
static END: AtomicUsize = AtomicUsize::new(0);
/// Adopted ranges that are alive: first byte, length.
static ADOPTED: RwLock<BTreeMap<usize, usize>> = RwLock::new(BTreeMap::new());

/// Takes `len_bytes` of address space, `PROT_NONE`, for windows. Called once, by [`Reservation`].
pub(crate) fn reserve(len_bytes: usize) -> Result<Span<Hva>, Errno> {
    faults::install_handlers();
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
        faults::install_handlers();
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

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL)
}
