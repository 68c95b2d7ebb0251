//! Memory of a client as pages that an IOAS can map: what its address range consists of when somebody pins it, and how to get at the
//! bytes.
//!
//! Shared memory (a memfd, tmpfs, huge pages, `MAP_SHARED | MAP_ANONYMOUS`) is opened and mapped here: the same pages, which outlive the client
//! and which devices reach directly. Private memory stays where it is and is copied by way of the client's address space, so it is as the client
//! sees it at any time, and ends with it.

use crate::clients::lock;
use crate::files::Inode;
use crate::server::Server;
use crate::space::{Gone, Space};
use crate::sys::Vma;
use addr::{Address, OutOfMemory, PAGE_BYTES, PAGE_LG2, Page, Span, SpanMap};
use backing::{Backing, CopyFault, HostAddr, Owner, PageName, PinError};
use rustix::fs::{Mode, OFlags};
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, OnceLock, Weak};

/// A range of a client's addresses.
pub(crate) struct ClientMemory {
    server: Weak<Server>,
    space: Arc<Space>,
    /// Address of page 0.
    start: u64,
    pinned: Mutex<SpanMap<Page, Pinned>>,
    this: Weak<Self>,
    /// The backing that these pages are.
    backing: OnceLock<Weak<Backing>>,
}

impl fmt::Debug for ClientMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "memory of process {} from {:#x} on", self.space.pid, self.start)
    }
}

/// A run of pinned pages.
#[derive(Clone, PartialEq)]
struct Pinned {
    /// By how many users.
    count: u32,
    write: bool,
    piece: Piece,
}

#[derive(Clone)]
enum Piece {
    Private,
    /// Page `page` of the range is page `page + ahead`, wrapping, of the file.
    Shared {
        file: Arc<Backing>,
        inode: Inode,
        ahead: u64,
    },
}

impl PartialEq for Piece {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Private, Self::Private) => true,
            (Self::Shared { file, ahead, .. }, Self::Shared { file: other_file, ahead: other_ahead, .. }) => {
                Arc::ptr_eq(file, other_file) && ahead == other_ahead
            }
            _ => false,
        }
    }
}

impl ClientMemory {
    /// A backing of `len` bytes from `start` on, whole pages. Nothing is looked at yet.
    pub(crate) fn backing(server: &Arc<Server>, space: Arc<Space>, start: u64, len: u64) -> Result<Arc<Backing>, backing::Error> {
        let memory = Arc::new_cyclic(|this| Self {
            server: Arc::downgrade(server),
            space,
            start,
            pinned: Mutex::default(),
            this: Weak::clone(this),
            backing: OnceLock::new(),
        });
        let owner: Arc<dyn Owner> = Arc::<Self>::clone(&memory);
        let backing = Backing::foreign(len, owner, backing::Frames::Contiguous)?;
        let _ = memory.backing.set(Arc::downgrade(&backing));
        Ok(backing)
    }

    fn address(&self, page: Page) -> u64 {
        self.start + (page.get() << PAGE_LG2)
    }

    /// Where pinned pages show pages of a file.
    pub(crate) fn places_of(&self, inode: Inode, file_pages: Span<Page>) -> Vec<(Arc<Backing>, Span<Page>)> {
        let Some(backing) = self.backing.get().and_then(Weak::upgrade) else { return Vec::new() };
        let pinned = lock(&self.pinned);
        let part = |(span, pinned): (Span<Page>, &Pinned)| match &pinned.piece {
            Piece::Shared { inode: of, ahead, .. } if *of == inode => {
                let shown = Span::new(shift(span.start(), *ahead), shift(span.last(), *ahead))?.intersect(file_pages)?;
                Some(Span::of(shift(shown.start(), ahead.wrapping_neg()), shift(shown.last(), ahead.wrapping_neg())))
            }
            _ => None,
        };
        pinned.iter().filter_map(part).map(|span| (Arc::clone(&backing), span)).collect()
    }

    /// What is mapped at these pages now, run by run.
    fn look(&self, pages: Span<Page>, write: bool) -> Result<Vec<(Span<Page>, Piece)>, PinError> {
        let fault = |page| PinError::Fault { page };
        let mut found = Vec::new();
        let mut next = Some(pages.start());
        while let Some(page) = next.filter(|page| *page <= pages.last()) {
            let vma = self.space.vma(self.address(page)).map_err(|Gone| fault(page))?;
            let vma = vma.filter(|vma| vma.start <= self.address(page) && vma.readable && (!write || vma.writable)).ok_or(fault(page))?;
            let last = Page::new(page.get() + ((vma.end - self.address(page)) >> PAGE_LG2) - 1).min(pages.last());
            let run = Span::of(page, last);
            let piece = self.piece(run, &vma)?;
            found.try_reserve(1).map_err(|_| PinError::NoMemory { pages })?;
            found.push((run, piece));
            next = last.checked_add(1);
        }
        Ok(found)
    }

    fn piece(&self, run: Span<Page>, vma: &Vma) -> Result<Piece, PinError> {
        let first = self.address(run.start());
        let file_start = vma.offset + (first - vma.start);
        if vma.shared
            && vma.inode != 0
            && let Some(server) = self.server.upgrade()
        {
            let inode = Inode { device: vma.device, number: vma.inode };
            let end = file_start + (run.len() << PAGE_LG2);
            let file = server.shared_files.backing(inode, end, || self.open_mapped(&server, vma));
            if let Some(file) = file {
                let ahead = (file_start >> PAGE_LG2).wrapping_sub(run.start().get());
                file.pin(Span::of(shift(run.start(), ahead), shift(run.last(), ahead)), true)
                    .map_err(|_| PinError::Fault { page: run.start() })?;
                server.shared_files.note(inode, &self.this);
                return Ok(Piece::Shared { file, inode, ahead });
            }
        }
        // Memory without a file is there when it is touched. A file may end before its mapping does, and a device's mapping is no memory.
        let pages = if vma.inode == 0 { 1 } else { run.len() as usize };
        let touched = self.space.touch(first, pages);
        if touched < pages { Err(PinError::Fault { page: Page::new(run.start().get() + touched as u64) }) } else { Ok(Piece::Private) }
    }

    /// Opens what the client has mapped.
    fn open_mapped(&self, server: &Server, vma: &Vma) -> Option<OwnedFd> {
        let path = format!("/proc/{}/map_files/{:x}-{:x}", self.space.pid, vma.start, vma.end);
        match rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
            Ok(file) => Some(file),
            Err(errno) => {
                if matches!(errno, rustix::io::Errno::PERM | rustix::io::Errno::ACCESS) {
                    server.warn(
                        "shared memory of clients cannot be opened (CAP_CHECKPOINT_RESTORE is missing): it is copied by way of the \
                         client instead, and ends with it",
                    );
                }
                None
            }
        }
    }

    /// The piece at a byte, and how many bytes from there on are of it, at most `len`.
    fn at(&self, offset: u64, len: u64) -> (Option<Piece>, u64) {
        let pinned = lock(&self.pinned);
        let page = Page::new(offset >> PAGE_LG2);
        let until = |next: Option<Page>| next.map_or(len, |next| next.bytes().saturating_sub(offset).min(len));
        match pinned.get(page) {
            Some((span, pinned)) => (Some(pinned.piece.clone()), until(span.last().checked_add(1))),
            None => (None, until(pinned.first_at_or_after(page).map(|(span, _)| span.start()))),
        }
    }

    /// Copies piece by piece: by way of the file where the pages are pinned and shared, and of the client's address space elsewhere.
    fn copy(
        &self,
        offset: u64,
        len: usize,
        mut near: impl FnMut(HostAddr, std::ops::Range<usize>) -> Result<(), CopyFault>,
        mut far: impl FnMut(u64, std::ops::Range<usize>) -> usize,
    ) -> Result<(), CopyFault> {
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let (piece, count) = self.at(at, (len - done) as u64);
            let part = done..done + count as usize;
            if let Some(Piece::Shared { file, ahead, .. }) = &piece {
                let host = shared_host(file, *ahead, at, count).ok_or(CopyFault { done })?;
                near(host, part).map_err(|fault| CopyFault { done: done + fault.done })?;
            } else {
                let copied = far(self.start + at, part);
                if copied < count as usize {
                    return Err(CopyFault { done: done + copied });
                }
            }
            done += count as usize;
        }
        Ok(())
    }
}

fn shift(page: Page, by: u64) -> Page {
    Page::new(page.get().wrapping_add(by))
}

fn shared_host(file: &Backing, ahead: u64, offset: u64, len: u64) -> Option<HostAddr> {
    let page = shift(Page::new(offset >> PAGE_LG2), ahead);
    file.host(file.pages().contains(page).then(|| file.oa(page))?.plus(offset & (PAGE_BYTES - 1)), len)
}

impl Owner for ClientMemory {
    fn pin(&self, pages: Span<Page>, write: bool) -> Result<(), PinError> {
        let found = self.look(pages, write)?;
        let no_memory = |_: OutOfMemory| PinError::NoMemory { pages };
        let mut pinned = lock(&self.pinned);
        // Room for every run that is cut or added, so that nothing below fails half way.
        let runs = found.len() + pinned.overlapping(pages).count();
        pinned.reserve(4 * runs + 4).map_err(no_memory)?;
        for (run, piece) in found {
            let present: Vec<(Span<Page>, Option<Pinned>)> = pinned.runs(run).map(|(part, there)| (part, there.cloned())).collect();
            for (part, there) in present {
                let now = match there {
                    // Somebody has these pinned, as they were then.
                    Some(before) => Pinned { count: before.count.saturating_add(1), write: before.write || write, piece: before.piece },
                    None => Pinned { count: 1, write, piece: piece.clone() },
                };
                pinned.set(part, now).map_err(no_memory)?;
            }
        }
        Ok(())
    }

    fn unpin(&self, pages: Span<Page>) {
        let mut pinned = lock(&self.pinned);
        let present: Vec<(Span<Page>, Pinned)> =
            pinned.overlapping(pages).filter_map(|(span, there)| Some((span.intersect(pages)?, there.clone()))).collect();
        for (part, there) in present {
            // Without memory for the cut the pages stay as they are a little longer: until the backing goes.
            let _ = match there.count {
                0 | 1 => pinned.clear(part),
                count => pinned.set(part, Pinned { count: count - 1, ..there }),
            };
        }
    }

    fn host(&self, offset: u64, len: u64) -> Option<HostAddr> {
        match self.at(offset, len) {
            (Some(Piece::Shared { file, ahead, .. }), count) if count == len => shared_host(&file, ahead, offset, len),
            _ => None,
        }
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), CopyFault> {
        let len = into.len();
        // The two ways take turns.
        let into = std::cell::RefCell::new(into);
        self.copy(
            offset,
            len,
            |host, part| host.read(0, &mut into.borrow_mut()[part]),
            |at, part| self.space.read(at, &mut into.borrow_mut()[part]),
        )
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<(), CopyFault> {
        self.copy(offset, from.len(), |host, part| host.write(0, &from[part]), |at, part| self.space.write(at, &from[part]))
    }

    fn name(&self, page: Page) -> PageName {
        let piece = lock(&self.pinned).get(page).map(|(_, pinned)| pinned.piece.clone());
        match piece {
            Some(Piece::Shared { inode, ahead, .. }) => file_name(inode, shift(page, ahead)),
            Some(Piece::Private) => memory_name(&self.space, self.address(page)),
            None => name_of(&self.space, self.address(page)).unwrap_or(memory_name(&self.space, self.address(page))),
        }
    }
}

fn file_name(inode: Inode, page: Page) -> PageName {
    PageName::File { device: inode.device, inode: inode.number, page: page.get() }
}

fn memory_name(space: &Space, at: u64) -> PageName {
    PageName::Memory { space: space.id.0, page: at >> PAGE_LG2 }
}

/// What is at an address of a client now; `None` when nothing is.
pub(crate) fn name_of(space: &Space, at: u64) -> Option<PageName> {
    let vma = space.vma(at).ok()??;
    if vma.start > at || !vma.readable {
        return None;
    }
    if vma.shared && vma.inode != 0 {
        let page = Page::new((vma.offset + (at - vma.start)) >> PAGE_LG2);
        return Some(file_name(Inode { device: vma.device, number: vma.inode }, page));
    }
    (space.touch(at, 1) == 1).then(|| memory_name(space, at))
}

/// A part of a client's file that is not there, or not of the right kind, when it is named. Looked at anew whenever it is pinned.
#[derive(Debug)]
pub(crate) struct FileMemory {
    server: Weak<Server>,
    inode: Inode,
    /// `None` for a file of ours, which is never memory, and which would never close if we kept it.
    file: Option<OwnedFd>,
    /// Byte of the file where page 0 is.
    start: u64,
    found: Mutex<Option<Arc<Backing>>>,
}

impl FileMemory {
    pub(crate) fn backing(
        server: &Arc<Server>,
        inode: Inode,
        file: Option<OwnedFd>,
        start: u64,
        len: u64,
    ) -> Result<Arc<Backing>, backing::Error> {
        let memory = Self { server: Arc::downgrade(server), inode, file, start, found: Mutex::default() };
        Backing::foreign(len, Arc::new(memory), backing::Frames::Contiguous)
    }
}

impl Owner for FileMemory {
    fn pin(&self, pages: Span<Page>, write: bool) -> Result<(), PinError> {
        let wrong = |is| PinError::WrongFile { pages, is };
        let (Some(file), Some(server)) = (&self.file, self.server.upgrade()) else { return Err(wrong("a file of this server")) };
        backing::file_kind(file.as_fd()).ok_or_else(|| wrong(backing::file_words(file.as_fd())))?;
        let size = rustix::fs::fstat(file).map_or(0, |stat| stat.st_size as u64);
        let outside = PinError::Outside { pages, size };
        let end = (pages.last().get() + 1).checked_mul(PAGE_BYTES).and_then(|len| self.start.checked_add(len)).ok_or(outside.clone())?;
        let found = server.shared_files.backing(self.inode, end, || rustix::io::dup(file).ok()).ok_or(outside)?;
        let ahead = self.start >> PAGE_LG2;
        found.pin(Span::of(shift(pages.start(), ahead), shift(pages.last(), ahead)), write)?;
        *lock(&self.found) = Some(found);
        Ok(())
    }

    fn unpin(&self, _: Span<Page>) {}

    fn host(&self, offset: u64, len: u64) -> Option<HostAddr> {
        let found = lock(&self.found).clone()?;
        shared_host(&found, self.start >> PAGE_LG2, offset, len)
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), CopyFault> {
        self.host(offset, into.len() as u64).ok_or(CopyFault { done: 0 })?.read(0, into)
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<(), CopyFault> {
        self.host(offset, from.len() as u64).ok_or(CopyFault { done: 0 })?.write(0, from)
    }

    fn name(&self, page: Page) -> PageName {
        file_name(self.inode, shift(page, self.start >> PAGE_LG2))
    }

    fn pins_for_access(&self) -> bool {
        true
    }
}
