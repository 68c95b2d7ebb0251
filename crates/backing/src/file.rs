//! Backings that are files: which kinds of file have pages of ours, and where those pages lie.

use crate::backing::{Memory, check_len};
use crate::raw::Mapping;
use crate::{Backing, Error, Kind, Layout, PinError, window};
use addr::{PAGE_LG2, Page, Span};
use rustix::fs::{FallocateFlags, FileType, MemfdFlags};
use rustix::io::Errno;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use sync::fail::step;

/// A file, and which part of it.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) fd: OwnedFd,
    /// Where page 0 lies in it.
    pub(crate) offset: u64,
    /// Logarithm of what it can be punched by.
    pub(crate) granule_lg2: u8,
}

const TMPFS_MAGIC: u64 = 0x0102_1994;
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
/// A guest_memfd is an anonymous inode with a name of its own, and in later kernels an inode of its own file system, "GMEM".
const ANON_INODE_MAGIC: u64 = 0x0904_1934;
const GUEST_MEMFD_MAGIC: u64 = 0x474d_454d;
const GUEST_MEMFD_LINK: &[u8] = b"anon_inode:[kvm-gmem]";
const HUGE_LG2: u8 = 21;

/// What kind of backing a file can be; `None` for a file that is no memory. Changes nothing.
pub fn file_kind(file: BorrowedFd<'_>) -> Option<Kind> {
    look(file, 0, 0).ok().map(|(kind, _)| kind)
}

/// What a file is, in words, for messages about files that are no memory.
pub fn file_words(file: BorrowedFd<'_>) -> &'static str {
    let Ok(stat) = rustix::fs::fstat(file) else { return "a file that cannot be looked at" };
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => "a regular file of a file system on disk or of the kernel",
        FileType::Directory => "a directory",
        FileType::Fifo => "a pipe",
        FileType::Socket => "a socket",
        FileType::CharacterDevice => "a character device",
        FileType::BlockDevice => "a block device",
        FileType::Symlink => "a symbolic link",
        // Anonymous inodes have no type at all.
        FileType::Unknown => "a descriptor without a file: an eventfd, a timerfd, an epoll or the like",
    }
}

/// The kind, and the logarithm of what it can be punched by.
pub(crate) fn look(file: BorrowedFd<'_>, offset: u64, len: u64) -> Result<(Kind, u8), Error> {
    let stat = rustix::fs::fstatfs(file).map_err(Error::os("fstatfs", offset, len))?;
    match stat.f_type as u64 & 0xffff_ffff {
        TMPFS_MAGIC => Ok((Kind::Memfd, PAGE_LG2)),
        HUGETLBFS_MAGIC => Ok((Kind::HugeMemfd, (stat.f_bsize as u64).trailing_zeros() as u8)),
        GUEST_MEMFD_MAGIC => Ok((Kind::GuestMemfd, PAGE_LG2)),
        ANON_INODE_MAGIC if is_guest_memfd(file) => Ok((Kind::GuestMemfd, PAGE_LG2)),
        magic => Err(Error::NotMemory { magic }),
    }
}

fn is_guest_memfd(file: BorrowedFd<'_>) -> bool {
    let link = rustix::fs::readlink(format!("/proc/self/fd/{}", file.as_raw_fd()), Vec::new());
    link.is_ok_and(|link| link.as_bytes() == GUEST_MEMFD_LINK)
}

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
        check_len(len_bytes)?;
        check_size(&file, 0, len_bytes)?;
        Self::of_file(file, 0, len_bytes, layout.into(), (Kind::GuestMemfd, PAGE_LG2))
    }

    /// `len_bytes` at `offset` of the caller's own memfd, guest_memfd, tmpfs or hugetlbfs file. The file stays the caller's to write, punch and
    /// truncate; see [`Backing::recheck`].
    ///
    /// # Errors
    /// `Length`, `Span` for a misaligned offset, `Outside` when the file ends before, `NotMemory` for other files, `NoHugePages`; what
    /// the system calls answer.
    pub fn from_file(file: OwnedFd, offset: u64, len_bytes: u64, layout: impl Into<Layout>) -> Result<Arc<Self>, Error> {
        let kind = look(file.as_fd(), offset, len_bytes)?;
        check_len(len_bytes)?;
        Span::aligned(Page::new(offset), len_bytes, kind.1)?;
        check_size(&file, offset, len_bytes)?;
        Self::of_file(file, offset, len_bytes, layout.into(), kind)
    }

    /// As [`Backing::from_file`], for a file that may end before: that is found when the pages are pinned, and whoever touches
    /// pages behind the end gets a fault. Files of huge pages must be long enough now, because mapping them would make them longer.
    ///
    /// # Errors
    /// As [`Backing::from_file`], without `Outside` for all but files of huge pages.
    pub fn open(file: OwnedFd, offset: u64, len_bytes: u64, layout: impl Into<Layout>) -> Result<Arc<Self>, Error> {
        let kind = look(file.as_fd(), offset, len_bytes)?;
        check_len(len_bytes)?;
        Span::aligned(Page::new(offset), len_bytes, kind.1)?;
        if kind.0 == Kind::HugeMemfd {
            check_size(&file, offset, len_bytes)?;
        }
        Self::of_file(file, offset, len_bytes, layout.into(), kind)
    }

    fn of_file(file: OwnedFd, offset: u64, len_bytes: u64, layout: Layout, kind: (Kind, u8)) -> Result<Arc<Self>, Error> {
        Self::of_files(file, offset, len_bytes, layout, kind, Memory::default())
    }

    /// `memory` has what there is beside the file.
    pub(crate) fn of_files(
        file: OwnedFd,
        offset: u64,
        len_bytes: u64,
        layout: Layout,
        (kind, granule_lg2): (Kind, u8),
        memory: Memory,
    ) -> Result<Arc<Self>, Error> {
        step("backing.mmap")?;
        let align_lg2 = window::align_lg2(len_bytes).max(granule_lg2);
        let mapping = match Mapping::file(file.as_fd(), offset, len_bytes as usize, align_lg2, kind == Kind::HugeMemfd) {
            Ok(mapping) => Some(mapping),
            // Not every guest_memfd can be mapped.
            Err(Errno::NODEV) if kind == Kind::GuestMemfd => None,
            Err(errno) => {
                let none_left = no_huge_pages(kind, errno, len_bytes);
                return Err(none_left.unwrap_or_else(|| Error::os("mmap", offset, len_bytes)(errno)));
            }
        };
        Self::assemble(kind, len_bytes, layout, Memory { file: Some(Source { fd: file, offset, granule_lg2 }), mapping, ..memory })
    }
}

impl Source {
    /// Gives the memory of these pages back.
    pub(crate) fn punch(&self, pages: Span<Page>) -> Result<(), Error> {
        let (at, len) = (self.offset + pages.start().bytes(), pages.len() << PAGE_LG2);
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.fd, mode, at, len).map_err(Error::os("fallocate(PUNCH_HOLE)", at, len))
    }

    /// Makes sure that these pages have memory.
    pub(crate) fn allocate(&self, pages: Span<Page>) -> Result<(), Error> {
        let (at, len) = (self.offset + pages.start().bytes(), pages.len() << PAGE_LG2);
        // Allocation would also work behind the end of a file that somebody else has cut short, where no access can.
        let size = self.size()?;
        if size < at + len {
            return Err(Error::Outside { offset: at, len, size });
        }
        rustix::fs::fallocate(&self.fd, FallocateFlags::KEEP_SIZE, at, len).map_err(Error::os("fallocate", at, len))
    }

    /// How long the file is now.
    pub(crate) fn size(&self) -> Result<u64, Error> {
        file_size(&self.fd)
    }

    /// # Errors
    /// `Outside` when the file, as it is now, ends before the last of these pages does.
    pub(crate) fn check_pages(&self, pages: Span<Page>) -> Result<(), PinError> {
        let size = self.size().map_err(|_| PinError::Fault { page: pages.start() })?;
        let end = (self.offset >> PAGE_LG2).checked_add(pages.last().get()).and_then(|last| last.checked_add(1));
        match end {
            Some(end) if end <= size >> PAGE_LG2 => Ok(()),
            _ => Err(PinError::Outside { pages, size }),
        }
    }
}

fn file_size(file: &OwnedFd) -> Result<u64, Error> {
    Ok(rustix::fs::fstat(file).map_err(Error::os("fstat", 0, 0))?.st_size as u64)
}

pub(crate) fn check_size(file: &OwnedFd, offset: u64, len: u64) -> Result<(), Error> {
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
