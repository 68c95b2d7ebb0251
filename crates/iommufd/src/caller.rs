//! Who makes a call: a process whose memory, descriptors and rights the answer depends on. Each front has its own kind; handlers know this
//! trait alone (D-10).

use crate::{Answer, File, Refusal};
use backing::{Backing, PageName};
use rustix::io::Errno;
use std::any::Any;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Memory that a call names, as pages that an IOAS can map.
#[derive(Clone, Debug)]
pub struct Memory {
    /// Whose pages.
    pub backing: Arc<Backing>,
    /// The byte that the caller named first.
    pub offset: u64,
}

/// Names an address space of a process: two threads share one, a child after fork has its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpaceId(pub u64);

/// What a call's answer depends on about its process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its address space.
    pub space: SpaceId,
    /// Its real user.
    pub uid: u32,
    /// CAP_IPC_LOCK: pinned memory is not limited.
    pub ipc_lock: bool,
    /// CAP_SYS_RESOURCE.
    pub sys_resource: bool,
    /// CAP_SYS_RAWIO.
    pub sys_rawio: bool,
    /// RLIMIT_MEMLOCK, soft, in bytes.
    pub memlock_bytes: u64,
}

/// What stands behind a descriptor of the caller.
#[derive(Clone, Debug)]
pub enum Opened {
    /// One of the files that this library serves.
    Ours(Arc<dyn File>),
    /// Something else.
    Other,
}

/// The process that makes a call, for as long as the call takes.
///
/// Everything it names is untrusted: addresses may be bad, descriptors closed, the process dead. That is an error of the call and nothing more.
pub trait Caller: Send + Sync {
    /// Copies from its memory.
    ///
    /// # Errors
    /// `EFAULT`; what is in `into` then is unspecified.
    fn read(&self, at: u64, into: &mut [u8]) -> Answer;

    /// Copies to its memory.
    ///
    /// # Errors
    /// `EFAULT`; a part may have been written.
    fn write(&self, at: u64, from: &[u8]) -> Answer;

    /// Its rights and limits now.
    ///
    /// # Errors
    /// `ESRCH` when it is gone.
    fn process(&self) -> Answer<Process>;

    /// `len` bytes of its memory from `va` on. Bad addresses are found when the pages are pinned, not here (rule 16).
    ///
    /// # Errors
    /// `ENOMEM`; `EOVERFLOW` when the end wraps.
    fn memory(&self, va: u64, len: u64) -> Answer<Memory>;

    /// `len` bytes from `start` on of the file behind its descriptor `fd`. Wrong kinds of files and bad ranges are found when the pages are
    /// pinned, not here (rule 22).
    ///
    /// # Errors
    /// `EBADF`, `ENOMEM`.
    fn file_memory(&self, fd: i32, start: u64, len: u64) -> Answer<Memory>;

    /// What stands behind its descriptor.
    ///
    /// # Errors
    /// `EBADF`.
    fn file(&self, fd: i32) -> Answer<Opened>;

    /// A duplicate of its descriptor, close-on-exec: for files that are used in place of the client, such as an eventfd that is signalled later.
    ///
    /// # Errors
    /// `EBADF`; `ENODEV` when the front cannot.
    fn descriptor(&self, fd: i32) -> Answer<OwnedFd> {
        Err(Refusal::new(Errno::NODEV, format!("descriptor {fd} cannot be duplicated through this front")))
    }

    /// Gives it a new descriptor, close-on-exec. It is there when the call has been answered with success; a call that fails installs nothing.
    ///
    /// # Errors
    /// `EMFILE`.
    fn install(&self, file: Arc<dyn File>) -> Answer<i32>;

    /// The memory behind the descriptor that the call came through, which a mapping of that descriptor shows. Give it back before the call ends:
    /// as long as anybody has it, the file does not close.
    ///
    /// # Errors
    /// `ENODEV` when the front has none.
    fn shared(&self) -> Answer<OwnedFd>;

    /// Whether any process maps a byte of `len` from `offset` on of the descriptor that the call came through.
    fn is_mapped(&self, offset: u64, len: u64) -> bool;

    /// Names the page behind an address now, touching it.
    ///
    /// # Errors
    /// `EFAULT` when nothing is there.
    fn page_name(&self, va: u64) -> Answer<PageName>;

    /// Its process and thread, for traces; `None` when it is this process itself.
    fn ids(&self) -> Option<(i32, i32)> {
        None
    }

    /// For a front that wants its own type back.
    fn as_any(&self) -> &dyn Any;
}
