//! One object that has pages: what it is made of, where its window lies, and which page is at which address.

use crate::frames::Permutation;
use crate::raw::{HostAddr, Mapping};
use crate::reservation::Reservation;
use crate::revoke::Listeners;
use crate::states::States;
use crate::{Error, Frames, Layout, PageState, Runs, UserRegion, window};
use addr::{Address, Hva, OutOfMemory, PAGE_BYTES, PAGE_LG2, Page, Span, SpanMap};
use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use sync::SpanLock;
use sync::fail::step;

/// Names a backing; never used twice in a process. Spans of several backings are locked in the order of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackingId(u32);

impl BackingId {
    /// The bare number.
    pub const fn get(self) -> u32 {
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
}

/// Pages with a window. Always in an [`Arc`]; when the last one goes the window closes.
#[derive(Debug)]
pub struct Backing {
    id: BackingId,
    kind: Kind,
    pages: Span<Page>,
    window: Span<addr::Oa>,
    frames: Frames,
    permutation: Option<Permutation>,
    pub(crate) file: Option<Source>,
    /// The whole object, linearly, when the kernel lets us map it.
    pub(crate) mapping: Option<Mapping>,
    pub(crate) lock: SpanLock<Page>,
    pub(crate) states: States,
    pub(crate) listeners: Listeners,
    /// Pages known to have had memory, by which a later hole is known to be somebody else's doing.
    pub(crate) known: Mutex<Known>,
}

/// A file, and which part of it.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) fd: OwnedFd,
    /// Where page 0 lies in it.
    pub(crate) offset: u64,
    /// Logarithm of what it can be punched by.
    pub(crate) granule_lg2: u8,
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

const TMPFS_MAGIC: u64 = 0x0102_1994;
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
const HUGE_LG2: u8 = 21;

impl Backing {
    /// A new memfd. It is not sealed: whoever has its descriptor can truncate it, which accesses survive.
    ///
    /// # Errors
    /// `Length`, and what memfd_create, ftruncate and mmap answer.
    pub fn memfd(len_bytes: u64, layout: impl Into<Layout>) -> Result<Arc<Self>, Error> {
        let file = new_memfd(len_bytes, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING, PAGE_LG2)?;
        Self::from_file(file, 0, len_bytes, layout)
    }

    /// A new memfd of 2 MiB pages, which are reserved for it at once.
    ///
    /// # Errors
    /// `Length` when it is no multiple of 2 MiB; `NoHugePages` when the host's pool is too small; what the system calls answer.
    pub fn huge_memfd(len_bytes: u64, layout: impl Into<Layout>) -> Result<Arc<Self>, Error> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        let file = new_memfd(len_bytes, flags, HUGE_LG2)?;
        Self::from_file(file, 0, len_bytes, layout)
    }

    /// A guest_memfd, from its start. Mapped when it was made mappable (KVM's flag MMAP); whether its pages can be touched then is up to its flag
    /// INIT_SHARED, and copies answer when not. Its pages begin shared when it is mapped and private when it is not, unless the layout
    /// says otherwise.
    ///
    /// # Errors
    /// `Length`; `Outside` when the file is smaller; what the system calls answer.
    pub fn guest_memfd(file: OwnedFd, len_bytes: u64, layout: impl Into<Layout>) -> Result<Arc<Self>, Error> {
        let len = check_len(len_bytes)?;
        check_size(&file, 0, len_bytes)?;
        step("backing.mmap")?;
        let mapping = match Mapping::file(file.as_fd(), 0, len, window::align_lg2(len_bytes), false) {
            Ok(mapping) => Some(mapping),
            Err(Errno::NODEV) => None,
            Err(errno) => return Err(Error::os("mmap", 0, len_bytes)(errno)),
        };
        let source = Source { fd: file, offset: 0, granule_lg2: PAGE_LG2 };
        Self::assemble(Kind::GuestMemfd, len_bytes, layout.into(), Some(source), mapping)
    }

    /// `len_bytes` at `offset` of the caller's own memfd, tmpfs or hugetlbfs file. The file stays the caller's to write, punch and
    /// truncate; see [`Backing::recheck`].
    ///
    /// # Errors
    /// `Length`, `Span` for a misaligned offset, `Outside` when the file ends before, `NotMemory` for other files, `NoHugePages`; what
    /// the system calls answer.
    pub fn from_file(file: OwnedFd, offset: u64, len_bytes: u64, layout: impl Into<Layout>) -> Result<Arc<Self>, Error> {
        let stat = rustix::fs::fstatfs(&file).map_err(Error::os("fstatfs", offset, len_bytes))?;
        let (kind, granule_lg2) = match stat.f_type as u64 & 0xffff_ffff {
            TMPFS_MAGIC => (Kind::Memfd, PAGE_LG2),
            HUGETLBFS_MAGIC => (Kind::HugeMemfd, (stat.f_bsize as u64).trailing_zeros() as u8),
            magic => return Err(Error::NotMemory { magic }),
        };
        let len = check_len(len_bytes)?;
        Span::aligned(Page::new(offset), len_bytes, granule_lg2)?;
        check_size(&file, offset, len_bytes)?;
        step("backing.mmap")?;
        let align_lg2 = window::align_lg2(len_bytes).max(granule_lg2);
        let mapping = Mapping::file(file.as_fd(), offset, len, align_lg2, kind == Kind::HugeMemfd);
        let mapping = mapping
            .map_err(|errno| no_huge_pages(kind, errno, len_bytes).unwrap_or_else(|| Error::os("mmap", offset, len_bytes)(errno)))?;
        Self::assemble(kind, len_bytes, layout.into(), Some(Source { fd: file, offset, granule_lg2 }), Some(mapping))
    }

    /// Memory of this process.
    ///
    /// # Errors
    /// No output addresses, no memory.
    pub fn user(region: UserRegion, layout: impl Into<Layout>) -> Result<Arc<Self>, Error> {
        let mapping = region.into_mapping();
        Self::assemble(Kind::User, mapping.len_bytes(), layout.into(), None, Some(mapping))
    }

    /// Addresses without memory: [`Backing::host`] never finds anything.
    ///
    /// # Errors
    /// `Length`; no output addresses.
    pub fn simulated(len_bytes: u64, layout: impl Into<Layout>) -> Result<Arc<Self>, Error> {
        check_len(len_bytes)?;
        Self::assemble(Kind::Simulated, len_bytes, layout.into(), None, None)
    }

    fn assemble(kind: Kind, len_bytes: u64, layout: Layout, file: Option<Source>, mapping: Option<Mapping>) -> Result<Arc<Self>, Error> {
        static NEXT_ID: AtomicU32 = AtomicU32::new(1);
        step("backing.window")?;
        let pages = Span::from_len(Page::new(0), len_bytes >> PAGE_LG2)?;
        let hidden = kind == Kind::GuestMemfd && mapping.is_none();
        let initial = layout.initial.unwrap_or(if hidden { PageState::Private } else { PageState::Shared });
        let permutation = match layout.frames {
            Frames::Contiguous => None,
            Frames::Scattered { seed } => Some(Permutation::new(pages.len(), seed)),
        };
        let id = NEXT_ID.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |id| id.checked_add(1)).map_err(|_| OutOfMemory)?;
        let backing = Arc::new(Self {
            id: BackingId(id),
            kind,
            pages,
            window: window::allocate(len_bytes)?,
            frames: layout.frames,
            permutation,
            file,
            mapping,
            lock: SpanLock::new(),
            states: States::new(pages, initial)?,
            listeners: Listeners::default(),
            known: Mutex::default(),
        });
        window::register(backing.window, Arc::downgrade(&backing))?;
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
        self.window
    }

    /// How its pages lie in the window.
    pub fn frames(&self) -> Frames {
        self.frames
    }

    /// Its file, for KVM's memslots and for others who map it.
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(|source| source.fd.as_fd())
    }

    /// Where page 0 lies in the file.
    pub fn file_offset(&self) -> u64 {
        self.file.as_ref().map_or(0, |source| source.offset)
    }

    /// Where this process sees page 0; the others follow in order, whatever their output addresses. For KVM's memslots, and for guests that
    /// run as a thread. `None` when there is no memory, or it cannot be mapped.
    pub fn linear_hva(&self) -> Option<Hva> {
        self.mapping.as_ref().map(Mapping::start)
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

    /// The output address of a page's first byte.
    ///
    /// # Panics
    /// When the backing has no such page: check spans from outside with [`Backing::pages_at`].
    #[inline]
    #[track_caller]
    pub fn oa(&self, page: Page) -> addr::Oa {
        assert!(self.pages.contains(page), "{page} lies outside of {}", self.pages);
        let frame = self.permutation.as_ref().map_or(page.get(), |permutation| permutation.forward(page.get()));
        self.window.start().plus(frame << PAGE_LG2)
    }

    /// The page at an output address.
    #[inline]
    pub fn page_of(&self, oa: addr::Oa) -> Option<Page> {
        let frame = self.window.contains(oa).then(|| oa.offset_from(self.window.start()) >> PAGE_LG2)?;
        let inside = self.pages.contains(Page::new(frame));
        inside.then(|| Page::new(self.permutation.as_ref().map_or(frame, |permutation| permutation.backward(frame))))
    }

    /// The physically contiguous runs of a span, ascending by page: one for a contiguous window, one for each page of a scattered one.
    ///
    /// # Panics
    /// As [`Backing::oa`].
    #[track_caller]
    pub fn extents(&self, span: Span<Page>) -> impl Iterator<Item = (Span<Page>, addr::Oa)> + '_ {
        assert!(self.pages.covers(span), "{span} lies outside of {}", self.pages);
        // Blocks of 2^64 pages are the span itself.
        span.blocks(if self.permutation.is_some() { 0 } else { 64 }).map(|run| (run, self.oa(run.start())))
    }

    /// Where to touch `len` bytes at `oa`, if they are all of this backing, mapped, and in a row.
    #[inline]
    pub fn host(&self, oa: addr::Oa, len: u64) -> Option<HostAddr> {
        let mapping = self.mapping.as_ref()?;
        if self.permutation.is_none() {
            return self.window.contains(oa).then(|| mapping.at(oa.offset_from(self.window.start()), len))?;
        }
        let inside = oa.get() & (PAGE_BYTES - 1);
        let page = self.page_of(oa)?;
        (len <= PAGE_BYTES - inside).then(|| mapping.at(page.bytes() + inside, len))?
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

impl Drop for Backing {
    fn drop(&mut self) {
        window::unregister(self.window);
    }
}

/// # Errors
/// `Length` for nothing, for part of a page, and for more than the output addresses could hold.
pub(crate) fn check_len(len_bytes: u64) -> Result<usize, Error> {
    let most = window::OA_LAST.get() - window::OA_BASE.get();
    let fine = len_bytes != 0 && len_bytes.is_multiple_of(PAGE_BYTES) && len_bytes <= most;
    if fine { Ok(len_bytes as usize) } else { Err(Error::Length { len_bytes, granule_bytes: PAGE_BYTES }) }
}

impl Source {
    /// How long the file is now.
    pub(crate) fn size(&self) -> Result<u64, Error> {
        file_size(&self.fd)
    }
}

fn file_size(file: &OwnedFd) -> Result<u64, Error> {
    Ok(rustix::fs::fstat(file).map_err(Error::os("fstat", 0, 0))?.st_size as u64)
}

fn check_size(file: &OwnedFd, offset: u64, len: u64) -> Result<(), Error> {
    let size = file_size(file)?;
    let fits = offset.checked_add(len).is_some_and(|end| end <= size);
    if fits { Ok(()) } else { Err(Error::Outside { offset, len, size }) }
}

fn new_memfd(len_bytes: u64, flags: MemfdFlags, granule_lg2: u8) -> Result<OwnedFd, Error> {
    check_len(len_bytes)?;
    if !len_bytes.is_multiple_of(1 << granule_lg2) {
        return Err(Error::Length { len_bytes, granule_bytes: 1 << granule_lg2 });
    }
    step("backing.memfd")?;
    let file = rustix::fs::memfd_create("lockstep", flags).map_err(Error::os("memfd_create", 0, len_bytes))?;
    step("backing.ftruncate")?;
    rustix::fs::ftruncate(&file, len_bytes).map_err(Error::os("ftruncate", 0, len_bytes))?;
    Ok(file)
}

/// Whether a failed mmap of a huge memfd means that the pool is too small.
fn no_huge_pages(kind: Kind, errno: Errno, len_bytes: u64) -> Option<Error> {
    let of = |name: &str| {
        let text = std::fs::read_to_string(format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}_hugepages")).ok()?;
        text.trim().parse::<u64>().ok()
    };
    let needed = len_bytes >> HUGE_LG2;
    let (total, free) = (of("nr")?, of("free")?.saturating_sub(of("resv")?));
    (kind == Kind::HugeMemfd && errno == Errno::NOMEM && needed > free).then_some(Error::NoHugePages { needed, free, total })
}
