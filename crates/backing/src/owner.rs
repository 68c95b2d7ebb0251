//! Foreign pages: memory that belongs to somebody else, a client process for example. This crate gives it addresses; its owner says when it
//! stays put, and reads and writes what this process cannot see.

use crate::backing::Memory;
use crate::{Backing, CopyFault, Error, HostAddr, Kind, Layout, PageName};
use addr::{Oa, Page, Span};
use std::fmt::Debug;
use std::sync::Arc;
use sync::fail::Injected;
use thiserror::Error;

/// Who owns the pages of a foreign backing. Pages and offsets are the backing's.
///
/// It is called while locks of the layers above are held, so it must not call back into them.
pub trait Owner: Send + Sync + Debug {
    /// From now until [`Owner::unpin`] these pages stay what they are and can be touched, for writing too with `write`. Asked for pages that are
    /// not pinned yet by the same user of the backing; other users pin for themselves.
    ///
    /// # Errors
    /// Why not; then none of them is pinned.
    fn pin(&self, pages: Span<Page>, write: bool) -> Result<(), PinError>;

    /// Undoes a pin, or a part of one. It cannot fail, and does not wait for the owner's other work.
    fn unpin(&self, pages: Span<Page>);

    /// Where this process sees `len` bytes from `offset` on, if it does and in a row. The answer must hold for as long as they are pinned.
    fn host(&self, offset: u64, len: u64) -> Option<HostAddr>;

    /// Reads bytes that this process sees nowhere.
    ///
    /// # Errors
    /// [`CopyFault`], with what has been read.
    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), CopyFault>;

    /// Writes bytes that this process sees nowhere.
    ///
    /// # Errors
    /// [`CopyFault`], with what has been written.
    fn write(&self, offset: u64, from: &[u8]) -> Result<(), CopyFault>;

    /// What the page is.
    fn name(&self, page: Page) -> PageName;

    /// Whether software may touch the pages only while they are pinned, as it is with files. Memory of a living process is touched as it is.
    fn pins_for_access(&self) -> bool {
        false
    }
}

/// Why pages could not be pinned. Nothing is pinned then.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PinError {
    /// Nothing is mapped there, or not for this access, or its process is gone.
    #[error("page {page} cannot be touched: nothing is mapped there, or not for this access")]
    Fault {
        /// The first such page of the backing.
        page: Page,
    },
    /// The file has no pages that a device could use.
    #[error("{pages} belong to {is}, which is no memory; give a memfd, a guest_memfd, a tmpfs or a hugetlbfs file")]
    WrongFile {
        /// What was asked for.
        pages: Span<Page>,
        /// What the file is.
        is: &'static str,
    },
    /// The file ends before.
    #[error("{pages} reach behind the end of the file, which has {size:#x} bytes now")]
    Outside {
        /// What was asked for.
        pages: Span<Page>,
        /// How long the file is.
        size: u64,
    },
    /// No memory, for the pages or to keep account of them.
    #[error("no memory to pin {pages}")]
    NoMemory {
        /// What was asked for.
        pages: Span<Page>,
    },
    /// More than whoever pays may have pinned.
    #[error("{pages} more pinned pages are over the limit of {limit_pages}; raise RLIMIT_MEMLOCK")]
    Limit {
        /// How many were to be added.
        pages: u64,
        /// What is allowed altogether.
        limit_pages: u64,
    },
    /// A test made this step fail.
    #[error(transparent)]
    Injected(#[from] Injected),
}

impl Backing {
    /// Pages of somebody else, all shared. Making one and dropping it again is cheap.
    ///
    /// # Errors
    /// `Length`; no output addresses.
    pub fn foreign(len_bytes: u64, owner: Arc<dyn Owner>, layout: impl Into<Layout>) -> Result<Arc<Self>, Error> {
        crate::backing::check_len(len_bytes)?;
        Self::assemble(Kind::Foreign, len_bytes, layout.into(), Memory { owner: Some(owner), ..Memory::default() })
    }

    /// Who copies what this process sees nowhere: the owner of a foreign backing's pages, the copier of a pair's private ones.
    pub fn owner(&self) -> Option<&Arc<dyn Owner>> {
        let copier = || self.memory.hidden.as_ref()?.copier.as_ref();
        self.memory.owner.as_ref().or_else(copier)
    }

    /// Makes sure that the pages can be touched until [`Backing::unpin`]: asks the owner of foreign ones, and compares a file with its present
    /// length. The other kinds have nothing to do.
    ///
    /// # Errors
    /// What the owner says; `Outside` when the file was cut short, or the backing has no such pages.
    pub fn pin(&self, pages: Span<Page>, write: bool) -> Result<(), PinError> {
        if !self.pages().covers(pages) {
            return Err(PinError::Outside { pages, size: self.len_bytes() });
        }
        match (&self.memory.owner, &self.memory.file) {
            (Some(owner), _) => owner.pin(pages, write),
            // A guest_memfd never changes its length.
            (None, Some(source)) if self.kind() != Kind::GuestMemfd => source.check_pages(pages),
            _ => Ok(()),
        }
    }

    /// Undoes a pin, or a part of one.
    pub fn unpin(&self, pages: Span<Page>) {
        if let Some(owner) = &self.memory.owner {
            owner.unpin(pages);
        }
    }

    /// Whether software, too, may touch the pages only while they are pinned.
    pub fn pins_for_access(&self) -> bool {
        match &self.memory.owner {
            Some(owner) => owner.pins_for_access(),
            None => self.memory.file.is_some(),
        }
    }

    /// [`Backing::host`] where this process has no mapping of its own.
    #[cold]
    pub(crate) fn host_of_owner(&self, oa: Oa, len: u64) -> Option<HostAddr> {
        let owner = self.memory.owner.as_ref()?;
        owner.host(self.offset_of(oa, len)?, len)
    }
}
