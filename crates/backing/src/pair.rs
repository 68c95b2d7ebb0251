//! Pairs: two files behind the same pages. A shared page lies in a file that this process maps; a private one in another that it does not see, KVM's
//! guest_memfd beside a memfd for example, as VMMs lay out a memslot whose pages change sides. A page's state says on which side it is, so it is
//! never on both, and each side has output addresses of its own, so neither a leaf nor an RMP entry of one side can stand for the other.
//!
//! Who changes a state changes the side with it. What is left behind on the old side is nobody's until [`Backing::discard_side`].

use crate::backing::Memory;
use crate::file::{Source, check_size, look};
use crate::{Backing, Error, Kind, Layout, Owner, PageState, SpanGuard, window};
use addr::{Address, Oa, PAGE_LG2, Page, Span};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use sync::fail::step;

/// The side of the private pages.
#[derive(Debug)]
pub(crate) struct Hidden {
    pub(crate) file: Source,
    /// Where in the window it begins.
    pub(crate) start: u64,
    /// Who copies its bytes.
    pub(crate) copier: Option<Arc<dyn Owner>>,
}

impl Backing {
    /// `len_bytes` of two files, from their starts: shared pages lie in `shared`, a memfd or a tmpfs file, private ones in `private`, a guest_memfd
    /// or, where there is no KVM, a memfd. All pages begin shared unless the layout says otherwise.
    ///
    /// This process never maps the private file. DMA that the secure world allows there is copied by `copier`, whose offsets are the pair's; without
    /// one it faults. A copier is not asked for pins.
    ///
    /// # Errors
    /// `Length`; `Outside` when a file ends before; `Unsupported` for files of another kind; what the system calls answer.
    pub fn pair(
        shared: OwnedFd,
        private: OwnedFd,
        len_bytes: u64,
        copier: Option<Arc<dyn Owner>>,
        layout: impl Into<Layout>,
    ) -> Result<Arc<Self>, Error> {
        crate::backing::check_len(len_bytes)?;
        let mut layout = layout.into();
        layout.initial.get_or_insert(PageState::Shared);
        for (file, kinds) in [(&shared, &[Kind::Memfd][..]), (&private, &[Kind::GuestMemfd, Kind::Memfd])] {
            let (kind, _) = look(file.as_fd(), 0, len_bytes)?;
            if !kinds.contains(&kind) {
                return Err(Error::Unsupported { kind, what: "be this side of a pair" });
            }
            check_size(file, 0, len_bytes)?;
        }
        let start = len_bytes.next_multiple_of(1 << window::align_lg2(len_bytes));
        let file = Source { fd: private, offset: 0, granule_lg2: PAGE_LG2 };
        let memory = Memory { hidden: Some(Hidden { file, start, copier }), ..Memory::default() };
        Self::of_files(shared, 0, len_bytes, layout, (Kind::Pair, PAGE_LG2), memory)
    }

    /// The file of a pair's private pages, for KVM's memslots.
    pub fn private_file(&self) -> Option<BorrowedFd<'_>> {
        self.memory.hidden.as_ref().map(|hidden| hidden.file.fd.as_fd())
    }

    /// Whether an output address is one of a pair's private side.
    #[inline]
    pub(crate) fn is_hidden(&self, oa: Oa) -> bool {
        let inside = |hidden: &Hidden| self.window().contains(oa) && oa.offset_from(self.window().start()) >= hidden.start;
        self.memory.hidden.as_ref().is_some_and(inside)
    }

    /// The output address that a page would have on the side where it is not: nobody has anything to do there. `None` unless it is a pair.
    pub fn unused_oa(&self, page: Page) -> Option<Oa> {
        let other = if self.state(page) == PageState::Private { PageState::Shared } else { PageState::Private };
        self.memory.hidden.as_ref().map(|_| self.oa_as(page, other))
    }

    /// Gives back the memory that a pair's pages have on the side where they would lie in `state`; they must not lie there now. Other backings have
    /// one side only, and nothing happens.
    ///
    /// # Errors
    /// `NotHeld`; `Unsupported` when a page is on that side; what fallocate answers.
    pub fn discard_side(&self, held: &SpanGuard<'_>, pages: Span<Page>, state: PageState) -> Result<(), Error> {
        self.check_held(held, pages)?;
        let Some(hidden) = &self.memory.hidden else { return Ok(()) };
        if self.states(pages).any(|(_, now)| now == state) {
            return Err(Error::Unsupported { kind: Kind::Pair, what: "discard a side that pages are on" });
        }
        step("backing.punch")?;
        match state {
            PageState::Private => hidden.file.punch(pages),
            _ => self.memory.file.as_ref().map_or(Ok(()), |file| file.punch(pages)),
        }
    }
}
