//! One object that has pages: what it is made of, where its window lies, and which page is at which address.

use crate::file::Source;
use crate::frames::Permutation;
use crate::pair::Hidden;
use crate::raw::{HostAddr, Mapping};
use crate::reservation::Reservation;
use crate::revoke::Listeners;
use crate::states::States;
use crate::{Error, Frames, Layout, Owner, PageState, Runs, UserRegion, window};
use addr::{Address, Hva, PAGE_BYTES, PAGE_LG2, Page, Span, SpanMap};
use crossbeam_utils::sync::ShardedLock;
use std::any::Any;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, Weak};
use sync::SpanLock;
use sync::fail::step;
use sync::prim::Mutex;

/// Names a backing; never used twice in a process. Spans of several backings are locked in the order of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackingId(u64);

impl BackingId {
    /// The bare number.
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// What a backing's memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// KVM's guest_memfd.
    GuestMemfd,
    /// A memfd, or a file on tmpfs.
    Memfd,
    /// A memfd of huge pages, or a file on hugetlbfs.
    HugeMemfd,
    /// Memory of this process without a file.
    User,
    /// None: addresses only, for page-table work at scale.
    Simulated,
    /// Somebody else's, who says when it may be touched and how: see [`Owner`].
    Foreign,
    /// Two files, one of which holds a page while it is shared and the other while it is private: see [`Backing::pair`].
    Pair,
}

/// Pages with a window. Always in an [`Arc`]; when the last one goes the window closes.
#[derive(Debug)]
pub struct Backing {
    id: BackingId,
    kind: Kind,
    pages: Span<Page>,
    place: window::Place,
    frames: Frames,
    permutation: Option<Permutation>,
    pub(crate) memory: Memory,
    /// What goes with this backing, one of a kind: see [`Backing::companion`].
    companion: ShardedLock<Option<Weak<dyn Any + Send + Sync>>>,
    pub(crate) lock: SpanLock<Page>,
    pub(crate) states: States,
    pub(crate) listeners: Listeners,
    /// Pages known to have had memory, by which a later hole is known to be somebody else's doing.
    pub(crate) known: Mutex<Known>,
}

/// What a backing is made of.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    pub(crate) file: Option<Source>,
    /// The whole object, linearly, when the kernel lets us map it.
    pub(crate) mapping: Option<Mapping>,
    /// Of a foreign one.
    pub(crate) owner: Option<Arc<dyn Owner>>,
    /// Of a pair: what holds its private pages. The file and the mapping are the shared ones'.
    pub(crate) hidden: Option<Hidden>,
}

#[derive(Default)]
pub(crate) struct Known(pub(crate) SpanMap<Page, ()>);

impl std::fmt::Debug for Known {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} extents", self.0.len())
    }
}

/// The address space of this process that windows are mapped in.
#[derive(Clone, Copy, Debug)]
pub struct HostSpace;

impl HostSpace {
    /// Where it lies; `None` when the process may not have that much address space.
    pub fn span() -> Option<Span<Hva>> {
        Reservation::get().map(Reservation::span)
    }
}

impl Backing {
    /// Memory of this process.
    ///
    /// # Errors
    /// No output addresses, no memory.
    pub fn user(region: UserRegion, layout: impl Into<Layout>) -> Result<Arc<Self>, Error> {
        let mapping = region.into_mapping();
        Self::assemble(Kind::User, mapping.len_bytes(), layout.into(), Memory { mapping: Some(mapping), ..Memory::default() })
    }

    /// Addresses without memory: [`Backing::host`] never finds anything.
    ///
    /// # Errors
    /// `Length`; no output addresses.
    pub fn simulated(len_bytes: u64, layout: impl Into<Layout>) -> Result<Arc<Self>, Error> {
        check_len(len_bytes)?;
        Self::assemble(Kind::Simulated, len_bytes, layout.into(), Memory::default())
    }

    pub(crate) fn assemble(kind: Kind, len_bytes: u64, layout: Layout, memory: Memory) -> Result<Arc<Self>, Error> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        step("backing.window")?;
        let pages = Span::from_len(Page::new(0), len_bytes >> PAGE_LG2)?;
        let hidden = kind == Kind::GuestMemfd && memory.mapping.is_none();
        let initial = layout.initial.unwrap_or(if hidden { PageState::Private } else { PageState::Shared });
        let permutation = match layout.frames {
            Frames::Contiguous => None,
            Frames::Scattered { seed } => Some(Permutation::new(pages.len(), seed)),
        };
        let window_bytes = memory.hidden.as_ref().map_or(len_bytes, |hidden| hidden.start + len_bytes);
        let backing = Arc::new(Self {
            id: BackingId(NEXT_ID.fetch_add(1, Ordering::Relaxed)),
            kind,
            pages,
            place: window::Place::take(window_bytes, kind == Kind::Foreign)?,
            frames: layout.frames,
            permutation,
            memory,
            companion: ShardedLock::default(),
            lock: SpanLock::new(),
            states: States::new(pages, initial),
            listeners: Listeners::default(),
            known: Mutex::default(),
        });
        backing.place.register(Arc::downgrade(&backing))?;
        Ok(backing)
    }

    /// Its name.
    pub fn id(&self) -> BackingId {
        self.id
    }

    /// What its memory is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Its length.
    pub fn len_bytes(&self) -> u64 {
        self.pages.len() << PAGE_LG2
    }

    /// Its pages: from 0.
    #[inline]
    pub fn pages(&self) -> Span<Page> {
        self.pages
    }

    /// Its output addresses, in whole 2 MiB: behind the last page there may be addresses without a page.
    #[inline]
    pub fn window(&self) -> Span<addr::Oa> {
        self.place.window
    }

    /// How its pages lie in the window.
    pub fn frames(&self) -> Frames {
        self.frames
    }

    /// Its file, for KVM's memslots and for others who map it.
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        self.memory.file.as_ref().map(|source| source.fd.as_fd())
    }

    /// Where page 0 lies in the file.
    pub fn file_offset(&self) -> u64 {
        self.memory.file.as_ref().map_or(0, |source| source.offset)
    }

    /// Where this process sees page 0; the others follow in order, whatever their output addresses. For KVM's memslots, and for guests that
    /// run as a thread. `None` when there is no memory, or it cannot be mapped.
    pub fn linear_hva(&self) -> Option<Hva> {
        self.memory.mapping.as_ref().map(Mapping::start)
    }

    /// The pages of `len` bytes at `offset`.
    ///
    /// # Errors
    /// `Span` when they are not whole pages, `Outside` when the backing ends before.
    pub fn pages_at(&self, offset: u64, len: u64) -> Result<Span<Page>, Error> {
        // `Page` stands in for a byte offset, which has no type of its own, until `index` makes it what it says.
        let bytes = Span::aligned(Page::new(offset), len, PAGE_LG2)?;
        let span = bytes.index::<Page>(PAGE_LG2);
        if self.pages.covers(span) { Ok(span) } else { Err(Error::Outside { offset, len, size: self.len_bytes() }) }
    }

    /// # Errors
    /// `NoSuchPages`.
    #[inline]
    pub(crate) fn check(&self, span: Span<Page>) -> Result<(), Error> {
        if self.pages.covers(span) { Ok(()) } else { Err(Error::NoSuchPages { span, pages: self.pages }) }
    }

    /// The output address of a page's first byte. Those of a pair's pages change with their state.
    ///
    /// # Panics
    /// When the backing has no such page: check spans from outside with [`Backing::pages_at`].
    #[inline]
    #[track_caller]
    pub fn oa(&self, page: Page) -> addr::Oa {
        let state = if self.memory.hidden.is_none() { PageState::Shared } else { self.state(page) };
        self.oa_as(page, state)
    }

    /// The output address that a page has in `state`: the same in all of them, but for a pair's.
    ///
    /// # Panics
    /// As [`Backing::oa`].
    #[inline]
    #[track_caller]
    pub fn oa_as(&self, page: Page, state: PageState) -> addr::Oa {
        assert!(self.pages.contains(page), "{page} lies outside of {}", self.pages);
        let frame = self.permutation.as_ref().map_or(page.get(), |permutation| permutation.forward(page.get()));
        self.place.window.start().plus((frame << PAGE_LG2) + self.side_start(state))
    }

    /// Where in the window pages in `state` lie.
    #[inline]
    fn side_start(&self, state: PageState) -> u64 {
        self.memory.hidden.as_ref().filter(|_| state == PageState::Private).map_or(0, |hidden| hidden.start)
    }

    /// The page at an output address.
    #[inline]
    pub fn page_of(&self, oa: addr::Oa) -> Option<Page> {
        let window = self.place.window;
        let mut offset = window.contains(oa).then(|| oa.offset_from(window.start()))?;
        if let Some(hidden) = &self.memory.hidden
            && offset >= hidden.start
        {
            offset -= hidden.start;
        }
        let frame = offset >> PAGE_LG2;
        let inside = self.pages.contains(Page::new(frame));
        inside.then(|| Page::new(self.permutation.as_ref().map_or(frame, |permutation| permutation.backward(frame))))
    }

    /// The physically contiguous runs of a span, ascending by page: one for a contiguous window, one for each page of a scattered one. In a pair
    /// they also end where the state changes.
    ///
    /// # Panics
    /// As [`Backing::oa`].
    #[track_caller]
    pub fn extents(&self, span: Span<Page>) -> impl Iterator<Item = (Span<Page>, addr::Oa)> + '_ {
        let mut states = self.memory.hidden.is_some().then(|| self.states(span));
        let mut whole = states.is_none().then_some((span, PageState::Shared));
        let runs = std::iter::from_fn(move || states.as_mut().map_or_else(|| whole.take(), Iterator::next));
        runs.flat_map(|(run, state)| self.extents_as(run, state))
    }

    /// As [`Backing::extents`], of pages as they lie in `state`.
    ///
    /// # Panics
    /// As [`Backing::oa`].
    #[track_caller]
    pub fn extents_as(&self, span: Span<Page>, state: PageState) -> impl Iterator<Item = (Span<Page>, addr::Oa)> + '_ {
        assert!(self.pages.covers(span), "{span} lies outside of {}", self.pages);
        // Blocks of 2^64 pages are the span itself.
        span.blocks(if self.permutation.is_some() { 0 } else { 64 }).map(move |run| (run, self.oa_as(run.start(), state)))
    }

    /// Where to touch `len` bytes at `oa`, if they are all of this backing, mapped, and in a row.
    #[inline]
    pub fn host(&self, oa: addr::Oa, len: u64) -> Option<HostAddr> {
        let Some(mapping) = &self.memory.mapping else { return self.host_of_owner(oa, len) };
        if self.permutation.is_none() {
            let window = self.place.window;
            return window.contains(oa).then(|| mapping.at(oa.offset_from(window.start()), len))?;
        }
        let inside = oa.get() & (PAGE_BYTES - 1);
        let page = self.page_of(oa).filter(|_| !self.is_hidden(oa))?;
        (len <= PAGE_BYTES - inside).then(|| mapping.at(page.bytes() + inside, len))?
    }

    /// The byte of the backing at `oa`, when `len` bytes from there on are all of this backing and follow each other.
    pub fn offset_of(&self, oa: addr::Oa, len: u64) -> Option<u64> {
        let inside = oa.get() & (PAGE_BYTES - 1);
        let offset = self.page_of(oa)?.bytes() + inside;
        let fits = if self.permutation.is_some() { len <= PAGE_BYTES - inside } else { len <= self.len_bytes() - offset };
        fits.then_some(offset)
    }

    /// The one `T` that goes with this backing as long as anybody keeps it: what is there, or what `make` makes. A backing has room for one such
    /// type.
    pub fn companion<T: Any + Send + Sync>(&self, make: impl FnOnce() -> Arc<T>) -> Arc<T> {
        let upgrade = |place: &Option<Weak<_>>| place.as_ref().and_then(Weak::upgrade).and_then(|any| Arc::downcast::<T>(any).ok());
        if let Some(found) = upgrade(&self.companion.read().unwrap_or_else(PoisonError::into_inner)) {
            return found;
        }
        let mut place = self.companion.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = upgrade(&place) {
            return found;
        }
        let made = make();
        let kept: Weak<T> = Arc::downgrade(&made);
        *place = Some(kept);
        made
    }

    /// The state of a page; a page that does not exist is absent.
    #[inline]
    pub fn state(&self, page: Page) -> PageState {
        if !self.pages.contains(page) {
            return PageState::Absent;
        }
        self.states.run(Span::one(page)).1
    }

    /// The states of a span, run by run.
    pub fn states(&self, span: Span<Page>) -> Runs<'_> {
        Runs::new(&self.states, span)
    }

    /// How many extents the page states take: what their memory grows with.
    pub fn state_extents(&self) -> usize {
        self.states.extents()
    }
}

/// # Errors
/// `Length` for nothing, for part of a page, and for more than the output addresses could hold.
pub(crate) fn check_len(len_bytes: u64) -> Result<usize, Error> {
    let most = window::OA_LAST.get() - window::OA_BASE.get();
    let fine = len_bytes != 0 && len_bytes.is_multiple_of(PAGE_BYTES) && len_bytes <= most;
    if fine { Ok(len_bytes as usize) } else { Err(Error::Length { len_bytes, granule_bytes: PAGE_BYTES }) }
}
