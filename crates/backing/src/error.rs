//! What can go wrong, with the span or value that was wrong and what to do about it.

use crate::Kind;
use addr::{Hva, Page, Span, SpanError};
use std::error::Error as StdError;
use std::io;
use thiserror::Error;

/// Why a call failed. Where nothing else is said, nothing was changed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// A length that no backing can have.
    #[error("length {len_bytes:#x} is not a positive multiple of {granule_bytes:#x}, or more than the address space has")]
    Length {
        /// As it was given.
        len_bytes: u64,
        /// What it must be a multiple of.
        granule_bytes: u64,
    },
    /// A span that is none, or not aligned as its kind of memory needs it.
    #[error(transparent)]
    Span(#[from] SpanError),
    /// Bytes that the backing, or the file, does not have.
    #[error("{len:#x} bytes at offset {offset:#x} reach behind the end, {size:#x}")]
    Outside {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// How many there are.
        size: u64,
    },
    /// Pages that the backing does not have.
    #[error("{span} lies outside the backing's {pages}")]
    NoSuchPages {
        /// As it was given.
        span: Span<Page>,
        /// What there is.
        pages: Span<Page>,
    },
    /// The guard that was shown does not hold these pages of this backing.
    #[error("{span} is not held by the guard that was given; lock it first")]
    NotHeld {
        /// What was to be changed.
        span: Span<Page>,
    },
    /// The 52 bits of output addresses are used up; they are not handed out twice.
    #[error("no output addresses left for {len_bytes:#x} bytes; start a new process")]
    NoOutputAddresses {
        /// What was to be placed.
        len_bytes: u64,
    },
    /// The range to adopt overlaps one that is adopted, or our own windows.
    #[error("{span} is adopted already, or is a window of this process")]
    RegionTaken {
        /// As it was given.
        span: Span<Hva>,
    },
    /// The host's pool of huge pages is too small.
    #[error("{needed} huge pages of 2 MiB needed and {free} of the pool's {total} are free; raise /proc/sys/vm/nr_hugepages to at least {}", .total - .free + .needed)]
    NoHugePages {
        /// For this backing.
        needed: u64,
        /// Pages in the pool that nobody has or has reserved.
        free: u64,
        /// Pages in the pool.
        total: u64,
    },
    /// The file is neither a memfd nor on tmpfs or hugetlbfs.
    #[error("the file is no memfd (file system {magic:#x}); give a memfd, a tmpfs or a hugetlbfs file, and a guest_memfd as such")]
    NotMemory {
        /// `statfs.f_type`.
        magic: u64,
    },
    /// The kind of memory cannot do this.
    #[error("a backing of kind {kind:?} cannot {what}")]
    Unsupported {
        /// Whose.
        kind: Kind,
        /// What was asked for.
        what: &'static str,
    },
    /// A system call failed.
    #[error("{call} of {len:#x} bytes at {offset:#x} failed: {source}")]
    Os {
        /// Which.
        call: &'static str,
        /// Offset of the first byte, in the file or the region.
        offset: u64,
        /// Bytes.
        len: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// The page states changed as asked for, but a listener could not map the pages again: they are present and unmapped there.
    #[error("{span} is back, but could not be mapped again everywhere: {source}")]
    Restore {
        /// Which pages.
        span: Span<Page>,
        /// What the listener said.
        source: RestoreError,
    },
    /// No memory for the page states.
    #[error(transparent)]
    OutOfMemory(#[from] addr::OutOfMemory),
    /// A test made this step fail.
    #[error(transparent)]
    Injected(#[from] sync::fail::Injected),
}

/// Why a listener could not map pages again.
pub type RestoreError = Box<dyn StdError + Send + Sync>;

impl Error {
    pub(crate) fn os(call: &'static str, offset: u64, len: u64) -> impl FnOnce(rustix::io::Errno) -> Self {
        move |errno| Self::Os { call, offset, len, source: errno.into() }
    }
}
