//! Where things lie in guest memory: the program's own pages below 1 MiB, then the state table, then the work span.

use crate::control::{Params, Report};
use addr::{Gpa, PAGE_BYTES, Span};
use thiserror::Error;

/// The control page: [`Params`], and the [`Report`] in its second half.
pub const CONTROL: Gpa = Gpa::new(0x1000);
/// Where the [`Report`] lies.
pub const REPORT: Gpa = Gpa::new(0x1800);
/// Its length in bytes.
pub const REPORT_BYTES: usize = size_of::<Report>();
/// The stop flag: a 64-bit word, anything but 0 stops the guest after its round.
pub const STOP: Gpa = REPORT;
/// Where the [image](crate::image) is loaded.
pub const IMAGE: Gpa = Gpa::new(0x8000);
/// The stack's end; it grows down.
pub const STACK_TOP: Gpa = Gpa::new(0x1_0000);
pub(crate) const PSC_LIST: Gpa = Gpa::new(0x2000);
pub(crate) const PVALIDATE_LIST: Gpa = Gpa::new(0x3000);
pub(crate) const STATES: Gpa = Gpa::new(0x10_0000);

const _: () = assert!(size_of::<Params>() <= 0x800 && size_of::<Report>() <= 0x800);

/// Why guest memory of that size will not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum LayoutError {
    /// Too small, or not whole pages.
    #[error("{0:#x} bytes of guest memory will not do: give at least 4 MiB, in whole pages")]
    TooSmall(u64),
    /// It would reach into the device registers.
    #[error("{0:#x} bytes of guest memory reach into the device registers at {doorbell:#x}: give less", doorbell = crate::registers::DOORBELL.get())]
    TooLarge(u64),
}

/// The layout for one size of guest memory.
///
/// ```
/// let layout = lockstep_guest::Layout::new(64 << 20)?;
/// assert!(layout.work.is_aligned(12) && layout.tables.len() >= 64 * 4096);
/// # Ok::<(), lockstep_guest::LayoutError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// All of guest memory, from 0.
    pub memory: Span<Gpa>,
    /// Free for the host to put the guest's page tables in.
    pub tables: Span<Gpa>,
    /// A page that is free for the host: the stage-2 probe's code.
    pub scratch: Gpa,
    /// What the program itself needs: from 0 up to the work span. It stays shared, for the host reads lists and report there.
    pub low: Span<Gpa>,
    /// The pages whose state changes and that DMA reaches. Begins on 2 MiB.
    pub work: Span<Gpa>,
}

impl Layout {
    /// For `memory_bytes` of guest memory from GPA 0: all of it that lies above the program is work span.
    ///
    /// # Errors
    /// When the size is below 4 MiB, not whole pages, or reaches the device registers.
    pub fn new(memory_bytes: u64) -> Result<Self, LayoutError> {
        if memory_bytes < 4 << 20 || !memory_bytes.is_multiple_of(PAGE_BYTES) {
            return Err(LayoutError::TooSmall(memory_bytes));
        }
        if memory_bytes > crate::registers::DOORBELL.get() {
            return Err(LayoutError::TooLarge(memory_bytes));
        }
        let span = |start: u64, end: u64| Span::of(Gpa::new(start), Gpa::new(end - 1));
        // A byte of state table a page, rounded up to where a 2 MiB block begins.
        let work = (STATES.get() + memory_bytes / PAGE_BYTES).next_multiple_of(2 << 20);
        Ok(Self {
            memory: span(0, memory_bytes),
            tables: span(0x2_0000, STATES.get()),
            scratch: STACK_TOP,
            low: span(0, work),
            work: span(work, memory_bytes),
        })
    }

    /// The first `pages` pages of the work span only; the others are left to the host.
    #[must_use]
    pub fn with_work_pages(mut self, pages: u64) -> Self {
        let pages = pages.clamp(1, self.work_pages());
        self.work = Span::of(self.work.start(), Gpa::new(self.work.start().get() + pages * PAGE_BYTES - 1));
        self
    }

    /// Pages of the work span.
    pub fn work_pages(&self) -> u64 {
        self.work.len() / PAGE_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(Layout::new(0x3ff_000), Err(LayoutError::TooSmall(0x3ff_000)));
        assert_eq!(Layout::new((4 << 20) + 1), Err(LayoutError::TooSmall((4 << 20) + 1)));
        assert_eq!(Layout::new(0xfe00_1000), Err(LayoutError::TooLarge(0xfe00_1000)));
        let layout = Layout::new(0xfe00_0000).unwrap();
        // 1 MiB + 0xfe000 bytes of state table end at 0x1fe000.
        assert_eq!(layout.work, Span::of(Gpa::new(0x20_0000), Gpa::new(0xfdff_ffff)));
        assert!(crate::image().len() as u64 <= STACK_TOP.get() - IMAGE.get() - PAGE_BYTES, "no page of stack is left");
        assert_eq!(layout.with_work_pages(3).work.len(), 0x3000);
    }
}
