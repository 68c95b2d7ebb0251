//! The descriptors of a process that calls in process: files of ours, and real ones that it was given.

use crate::{Answer, File, Memory, Mmap, Opened, Refusal};
use addr::{PAGE_BYTES, Page, Span};
use backing::{Backing, CopyFault, Frames, HostAddr, Owner, PageName, PageState, PinError};
use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The descriptors that every program has.
const FIRST: i32 = 3;

#[derive(Debug)]
pub(super) struct Files {
    table: Mutex<BTreeMap<i32, Entry>>,
    most: AtomicUsize,
    /// The memory behind files of ours, and what of it is mapped where: by the file's address, which says no more than which one it is.
    shared: Mutex<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    memory: BTreeMap<usize, OwnedFd>,
    mappings: BTreeMap<u64, (usize, Mmap)>,
}

impl Default for Files {
    fn default() -> Self {
        Self { table: Mutex::default(), most: AtomicUsize::new(1024), shared: Mutex::default() }
    }
}

#[derive(Clone, Debug)]
enum Entry {
    Ours(Arc<Handle>),
    Other(Arc<Real>),
}

/// What descriptors of one open file share: the file goes when the last of them does.
#[derive(Debug)]
struct Handle(Arc<dyn File>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.released();
    }
}

/// A real file, and its pages once somebody has mapped them.
#[derive(Debug)]
struct Real {
    fd: OwnedFd,
    backing: Mutex<Option<Arc<Backing>>>,
}

fn which(file: &dyn File) -> usize {
    std::ptr::from_ref(file).cast::<()>().addr()
}

impl Files {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<i32, Entry>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, entry: Entry) -> Answer<i32> {
        let mut table = self.lock();
        if table.len() >= self.most.load(Ordering::Relaxed) {
            return Err(Refusal::of(Errno::MFILE, "the process has as many descriptors as it may have"));
        }
        let fd = (FIRST..).find(|fd| !table.contains_key(fd)).unwrap_or(FIRST);
        table.insert(fd, entry);
        Ok(fd)
    }

    fn entry(&self, fd: i32) -> Answer<Entry> {
        self.lock().get(&fd).cloned().ok_or_else(|| not_open(fd))
    }

    pub(super) fn install(&self, file: Arc<dyn File>) -> Answer<i32> {
        let handle = Arc::new(Handle(file));
        sync::fail::step("iommufd.install")?;
        self.add(Entry::Ours(handle))
    }

    pub(super) fn give(&self, fd: OwnedFd) -> Answer<i32> {
        self.add(Entry::Other(Arc::new(Real { fd, backing: Mutex::default() })))
    }

    pub(super) fn dup(&self, fd: i32) -> Answer<i32> {
        self.add(self.entry(fd)?)
    }

    pub(super) fn close(&self, fd: i32) -> Answer {
        // Bound to a name, so that a file is released without the lock.
        let gone = self.lock().remove(&fd);
        gone.map(drop).ok_or_else(|| not_open(fd))
    }

    pub(super) fn close_all(&self) {
        drop(std::mem::take(&mut *self.lock()));
        self.lock_shared().mappings.clear();
    }

    pub(super) fn fork(&self) -> Self {
        let most = AtomicUsize::new(self.most.load(Ordering::Relaxed));
        Self { table: Mutex::new(self.lock().clone()), most, shared: Mutex::default() }
    }

    pub(super) fn set_most(&self, most: usize) {
        self.most.store(most, Ordering::Relaxed);
    }

    pub(super) fn numbers(&self) -> Vec<i32> {
        self.lock().keys().copied().collect()
    }

    pub(super) fn get(&self, fd: i32) -> Answer<Opened> {
        Ok(match self.entry(fd)? {
            Entry::Ours(handle) => Opened::Ours(Arc::clone(&handle.0)),
            Entry::Other(_) => Opened::Other,
        })
    }

    pub(super) fn memory(&self, fd: i32, start: u64, len: u64) -> Answer<Memory> {
        let Entry::Other(real) = self.entry(fd)? else {
            return Err(Refusal::new(Errno::INVAL, format!("descriptor {fd} is a file of ours")));
        };
        let end = start.checked_add(len).ok_or(Refusal::of(Errno::OVERFLOW, "the range wraps around the file"))?;
        if let Some(backing) = real.backing(end)? {
            return Ok(Memory { backing, offset: start });
        }
        let size = rustix::fs::fstat(&real.fd).map_or(0, |stat| stat.st_size.cast_unsigned());
        let wrong = if backing::file_kind(real.fd.as_fd()).is_some() { None } else { Some(backing::file_words(real.fd.as_fd())) };
        let inside = start & (PAGE_BYTES - 1);
        let pages = len.saturating_add(inside).next_multiple_of(PAGE_BYTES);
        let owner = Arc::new(Never { size, wrong });
        let backing = Backing::foreign(pages, owner, Frames::Contiguous).map_err(|error| Refusal::new(Errno::NOMEM, error.to_string()))?;
        Ok(Memory { backing, offset: inside })
    }

    /// A descriptor of the memory behind a file of ours, empty at first.
    pub(super) fn shared(&self, file: &dyn File) -> Answer<OwnedFd> {
        let mut shared = self.lock_shared();
        let of = |errno| Refusal::of(errno, "no memory could be had for the file");
        if let Some(memory) = shared.memory.get(&which(file)) {
            return memory.try_clone().map_err(|_| of(Errno::MFILE));
        }
        let memory = rustix::fs::memfd_create("iommufd", MemfdFlags::CLOEXEC).map_err(of)?;
        let own = memory.try_clone().map_err(|_| of(Errno::MFILE))?;
        shared.memory.insert(which(file), own);
        Ok(memory)
    }

    pub(super) fn is_mapped(&self, file: &dyn File, offset: u64, len: u64) -> bool {
        let meets = |own: &Mmap| own.offset < offset.saturating_add(len) && offset < own.offset.saturating_add(own.len);
        self.lock_shared().mappings.values().any(|(own, mapping)| *own == which(file) && meets(mapping))
    }

    pub(super) fn note_mapping(&self, file: &dyn File, at: u64, wanted: &Mmap) {
        self.lock_shared().mappings.insert(at, (which(file), *wanted));
    }

    pub(super) fn forget_mapping(&self, at: u64) -> Answer<u64> {
        let gone = self.lock_shared().mappings.remove(&at);
        gone.map(|(_, mapping)| mapping.len).ok_or(Refusal::of(Errno::INVAL, "no mapping of a file of ours begins there"))
    }
}

#[cold]
fn not_open(fd: i32) -> Refusal {
    Refusal::new(Errno::BADF, format!("the process has no descriptor {fd}"))
}

impl Real {
    /// Its pages, if it has any and reaches to `end`.
    fn backing(&self, end: u64) -> Answer<Option<Arc<Backing>>> {
        let mut known = self.backing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(backing) = known.as_ref().filter(|backing| end <= backing.len_bytes()) {
            return Ok(Some(Arc::clone(backing)));
        }
        let size = rustix::fs::fstat(&self.fd).map_or(0, |stat| stat.st_size.cast_unsigned()) & !(PAGE_BYTES - 1);
        if end > size || backing::file_kind(self.fd.as_fd()).is_none() {
            return Ok(None);
        }
        let fd = self.fd.try_clone().map_err(|_| Refusal::of(Errno::MFILE, "this process has no descriptor left"))?;
        // The host's until somebody converts them, whatever kind of file it is.
        let backing = Backing::open(fd, 0, size, Frames::Contiguous.starting(PageState::Shared))?;
        Ok(Some(Arc::clone(known.insert(backing))))
    }
}

/// A file without such pages: found when they are pinned (rule 22).
#[derive(Debug)]
struct Never {
    /// How long it is.
    size: u64,
    /// What it is, when it is no memory.
    wrong: Option<&'static str>,
}

impl Owner for Never {
    fn pin(&self, pages: Span<Page>, _: bool) -> Result<(), PinError> {
        Err(match self.wrong {
            None => PinError::Outside { pages, size: self.size },
            Some(is) => PinError::WrongFile { pages, is },
        })
    }

    fn unpin(&self, _: Span<Page>) {}

    fn host(&self, _: u64, _: u64) -> Option<HostAddr> {
        None
    }

    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), CopyFault> {
        Err(CopyFault { done: 0 })
    }

    fn write(&self, _: u64, _: &[u8]) -> Result<(), CopyFault> {
        Err(CopyFault { done: 0 })
    }

    fn name(&self, page: Page) -> PageName {
        PageName::Memory { space: u64::MAX, page: page.get() }
    }

    fn pins_for_access(&self) -> bool {
        true
    }
}
