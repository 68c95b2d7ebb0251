//! A client's thread in the middle of a call.

use crate::clients::{self, Thread, lock};
use crate::files::{Inode, What, reopen};
use crate::memory::{ClientMemory, FileMemory, name_of};
use crate::server::Server;
use crate::space::{self, Space};
use crate::sys::{self, Limit};
use addr::{PAGE_BYTES, PAGE_LG2};
use backing::PageName;
use iommufd::{Answer, Caller, File, Memory, Opened, Process, Refusal};
use rustix::fs::OFlags;
use rustix::io::Errno;
use std::any::Any;
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

/// A client's thread, for as long as one of its calls takes. Handlers that need more than [`Caller`] tells get it from [`Caller::as_any`].
pub struct RemoteCaller {
    server: Arc<Server>,
    thread: Arc<Thread>,
    /// The call; `None` when there is none any more.
    call: Option<u64>,
    through: Option<OwnedFd>,
    /// What the client gets when the call succeeds.
    installs: Mutex<Vec<Install>>,
}

/// A descriptor that is promised to a client.
pub(crate) struct Install {
    pub(crate) number: u32,
    pub(crate) file: Arc<dyn File>,
}

impl fmt::Debug for RemoteCaller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "thread {} of process {}", self.tid(), self.pid())
    }
}

impl RemoteCaller {
    pub(crate) fn new(server: &Arc<Server>, thread: Arc<Thread>, call: Option<u64>, through: Option<OwnedFd>) -> Self {
        Self { server: Arc::clone(server), thread, call, through, installs: Mutex::default() }
    }

    /// Its process.
    pub fn pid(&self) -> i32 {
        self.thread.process.pid
    }

    /// The thread.
    pub fn tid(&self) -> i32 {
        self.thread.tid
    }

    pub(crate) fn thread(&self) -> &Arc<Thread> {
        &self.thread
    }

    /// What is to be installed, once.
    pub(crate) fn take_installs(&self) -> Vec<Install> {
        std::mem::take(&mut *lock(&self.installs))
    }

    fn is_waiting(&self) -> bool {
        self.call.is_some_and(|call| self.server.listener.is_waiting(call))
    }

    fn space(&self) -> Answer<Arc<Space>> {
        self.server.clients.space(&self.thread.process).map_err(|errno| {
            if matches!(errno, Errno::PERM | Errno::ACCESS) {
                self.server.warn(NO_MEMORY);
            }
            Refusal::of(Errno::SRCH, "the process is gone, or may not be looked at")
        })
    }

    fn bad_address(&self, at: u64, len: usize, errno: Option<Errno>) -> Refusal {
        if errno == Some(Errno::PERM) {
            self.server.warn(NO_MEMORY);
        }
        Refusal::new(Errno::FAULT, format!("{len} bytes at {at:#x} are not all there, or not for this access"))
    }
}

const NO_MEMORY: &str =
    "the memory of a client cannot be reached (it is another user's, or not dumpable): its calls fail; CAP_SYS_PTRACE helps";

fn errno(errno: Errno, what: &'static str) -> Refusal {
    Refusal::of(errno, what)
}

impl Caller for RemoteCaller {
    fn read(&self, at: u64, into: &mut [u8]) -> Answer {
        if into.is_empty() {
            return Ok(());
        }
        let copied = sys::read_memory(self.thread.tid, at, into);
        // When the client is gone its number may be somebody else's, and so may the bytes.
        if copied == Ok(into.len()) && self.is_waiting() { Ok(()) } else { Err(self.bad_address(at, into.len(), copied.err())) }
    }

    fn write(&self, at: u64, from: &[u8]) -> Answer {
        if from.is_empty() {
            return Ok(());
        }
        let copied = if self.is_waiting() { sys::write_memory(self.thread.tid, at, from) } else { Err(Errno::SRCH) };
        if copied == Ok(from.len()) { Ok(()) } else { Err(self.bad_address(at, from.len(), copied.err())) }
    }

    fn process(&self) -> Answer<Process> {
        const RAWIO: u64 = 1 << 17;
        const IPC_LOCK: u64 = 1 << 14;
        const RESOURCE: u64 = 1 << 24;
        let gone = |_| errno(Errno::SRCH, "the process is gone");
        let mut capabilities = sys::capabilities(self.thread.tid).map_err(gone)?;
        // Capabilities in a user namespace of its own are none to the system.
        if capabilities & (RAWIO | IPC_LOCK | RESOURCE) != 0 && !self.server.is_own_user_namespace(self.thread.tid) {
            capabilities = 0;
        }
        Ok(Process {
            space: self.space()?.id,
            uid: self.thread.user().map_err(gone)?,
            ipc_lock: capabilities & IPC_LOCK != 0,
            sys_resource: capabilities & RESOURCE != 0,
            sys_rawio: capabilities & RAWIO != 0,
            memlock_bytes: clients::soft_limit(self.thread.tid, Limit::LockedBytes).map_err(gone)?,
        })
    }

    fn memory(&self, va: u64, len: u64) -> Answer<Memory> {
        let wraps = || Refusal::new(Errno::OVERFLOW, format!("{len:#x} bytes at {va:#x} reach behind the last address"));
        let start = va & !(PAGE_BYTES - 1);
        let end = va.checked_add(len).and_then(|end| end.checked_next_multiple_of(PAGE_BYTES)).ok_or_else(wraps)?;
        let backing = ClientMemory::backing(&self.server, self.space()?, start, end - start)?;
        Ok(Memory { backing, offset: va - start })
    }

    fn descriptor(&self, fd: i32) -> Answer<OwnedFd> {
        self.thread.fetch(fd).map_err(|_| errno(Errno::BADF, "no such descriptor"))
    }

    fn file_memory(&self, fd: i32, start: u64, len: u64) -> Answer<Memory> {
        let wraps = || Refusal::new(Errno::OVERFLOW, format!("{len:#x} bytes at {start:#x} reach behind the largest file"));
        let end = start.checked_add(len).ok_or_else(wraps)?;
        let file = self.thread.fetch(fd).map_err(|_| errno(Errno::BADF, "no such descriptor"))?;
        let inode = Inode::of(&file).map_err(|_| errno(Errno::BADF, "no such descriptor"))?;
        let is_ours = self.server.files.find(inode).is_some();
        if !is_ours && let Some(backing) = self.server.shared_files.backing(inode, end, || rustix::io::dup(&file).ok()) {
            if backing.kind() == backing::Kind::GuestMemfd {
                self.server.keep_guest_memory(&self.thread.process, &backing);
            }
            return Ok(Memory { backing, offset: start });
        }
        let first = start & !(PAGE_BYTES - 1);
        let whole = end.checked_next_multiple_of(PAGE_BYTES).ok_or_else(wraps)? - first;
        let backing = FileMemory::backing(&self.server, inode, (!is_ours).then_some(file), first, whole)?;
        Ok(Memory { backing, offset: start - first })
    }

    fn file(&self, fd: i32) -> Answer<Opened> {
        let file = self.thread.fetch(fd).map_err(|_| errno(Errno::BADF, "no such descriptor"))?;
        let entry = Inode::of(file).ok().and_then(|inode| self.server.files.find(inode));
        Ok(match entry.as_ref().map(|entry| &entry.what) {
            Some(What::File(file)) => Opened::Ours(Arc::clone(file)),
            _ => Opened::Other,
        })
    }

    fn install(&self, file: Arc<dyn File>) -> Answer<i32> {
        let few = |_| errno(Errno::MFILE, "no free descriptor number for a file of ours: raise the limit of open files");
        let number = self.server.promise_number(&self.thread, 0).map_err(few)?;
        lock(&self.installs).push(Install { number, file });
        Ok(number.cast_signed())
    }

    fn shared(&self) -> Answer<OwnedFd> {
        let none = |_| errno(Errno::NODEV, "the descriptor has no memory to share");
        let through = self.through.as_ref().ok_or_else(|| none(Errno::NODEV))?;
        let mode = rustix::fs::fcntl_getfl(through).map_err(none)?;
        let is_memory = rustix::fs::fcntl_get_seals(through).is_ok();
        if !is_memory {
            return Err(none(Errno::NODEV));
        }
        if mode.contains(OFlags::RDWR) { rustix::io::dup(through) } else { reopen(through.as_fd(), libc::O_RDWR) }.map_err(none)
    }

    fn is_mapped(&self, offset: u64, len: u64) -> bool {
        let inode = self.through.as_ref().and_then(|through| Inode::of(through).ok());
        inode.is_some_and(|inode| space::is_mapped_anywhere(inode.device, inode.number, offset, len))
    }

    fn page_name(&self, va: u64) -> Answer<PageName> {
        let page = va >> PAGE_LG2 << PAGE_LG2;
        name_of(&*self.space()?, page).ok_or_else(|| Refusal::new(Errno::FAULT, format!("nothing is mapped at {va:#x}")))
    }

    fn ids(&self) -> Option<(i32, i32)> {
        Some((self.pid(), self.tid()))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Drop for RemoteCaller {
    fn drop(&mut self) {
        // A call that failed keeps no promise.
        for install in self.take_installs() {
            lock(&self.thread.process.promised).remove(&install.number);
        }
    }
}
