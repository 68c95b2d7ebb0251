//! Memory for tables: private, lazily zeroed, outside the reservation.

use super::{ACCESS, RESERVED};
use rustix::mm::Advice;
use std::ops::Deref;
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicU64;

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
