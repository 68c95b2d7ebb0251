//! Calls from this process itself: no kernel, no client, no copies between processes. Tests, fuzzing, benches and programs that link the
//! library make their ioctls through it (D-10).
//!
//! Its memory is what was shown to it, at whatever address, and scratch memory for the structures of calls; everything else is a bad address.
//! Its descriptors are numbers that it hands out itself.
//!
//! ```
//! use lockstep_iommufd::uapi::{IoasAlloc, io};
//! use lockstep_iommufd::{Host, HostConfig, Local};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (host, local) = (Host::new(HostConfig::default())?, Local::new());
//! let context = host.open();
//! let mut arg = IoasAlloc { size: 12, ..IoasAlloc::default() };
//! local.ioctl(&*context, io(0x81), &mut arg)?;
//! assert_eq!(arg.out_ioas_id, 1);
//! # Ok(())
//! # }
//! ```

mod files;
mod frame;
mod memory;

pub use memory::Touch;

use crate::uapi::Struct;
use crate::{Answer, Caller, File, Memory, Mmap, Opened, Process, Refusal, SpaceId};
use backing::{Backing, PageName};
use files::Files;
use frame::{FRAME_AT, Frame};
use memory::Space;
use rustix::io::Errno;
use std::any::Any;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use zerocopy::{FromBytes, IntoBytes};

/// The process that links this library, or a pretended one in a test. Any thread may call.
#[derive(Debug)]
pub struct Local {
    space: Space,
    files: Files,
    process: RwLock<Option<Process>>,
}

impl Default for Local {
    fn default() -> Self {
        Self::new()
    }
}

impl Local {
    /// A process with every right, no memory but scratch memory, no descriptors.
    pub fn new() -> Self {
        Self::with_rights(Process {
            space: new_space(),
            uid: 0,
            ipc_lock: true,
            sys_resource: true,
            sys_rawio: true,
            memlock_bytes: u64::MAX,
        })
    }

    /// The same with these rights.
    pub fn with_rights(process: Process) -> Self {
        Self { space: Space::new(process.space.0), files: Files::default(), process: RwLock::new(Some(process)) }
    }

    /// A child: memory and open files are shared with it, what either opens later is its own. Its address space counts anew.
    pub fn fork(&self) -> Self {
        let space = new_space();
        let process = self.process.read().unwrap_or_else(PoisonError::into_inner).map(|process| Process { space, ..process });
        Self { space: self.space.fork(space.0), files: self.files.fork(), process: RwLock::new(process) }
    }

    /// Changes its rights.
    pub fn set_process(&self, change: impl FnOnce(&mut Process)) {
        self.process.write().unwrap_or_else(PoisonError::into_inner).iter_mut().for_each(change_once(change));
    }

    /// The process ends: memory that nobody pinned is gone, its files are closed, calls answer `ESRCH`.
    pub fn exit(&self) {
        *self.process.write().unwrap_or_else(PoisonError::into_inner) = None;
        self.space.clear();
        self.files.close_all();
    }

    /// An ioctl whose structure lies in memory of its own for as long as the call takes. `arg` is as the call left it.
    ///
    /// # Errors
    /// The call's.
    pub fn ioctl<S: Struct>(&self, file: &dyn File, command: u32, arg: &mut S) -> Answer<i64> {
        let frame = Frame::new(self, file, arg.as_bytes());
        let answer = frame.call(command, FRAME_AT);
        frame.words().get(arg.as_mut_bytes());
        answer
    }

    /// An ioctl with a bare argument: a number, or an address in its memory.
    ///
    /// # Errors
    /// The call's.
    pub fn call(&self, file: &dyn File, command: u32, arg: u64) -> Answer<i64> {
        Frame::new(self, file, &[]).call(command, arg)
    }

    /// Maps part of a file of ours, and shows it in memory. Answers the address.
    ///
    /// # Errors
    /// What the file says; `ENOMEM`.
    pub fn mmap(&self, file: &dyn File, wanted: &Mmap) -> Answer<u64> {
        let frame = Frame::new(self, file, &[]);
        file.mmap(&frame, wanted)?;
        let backing = Backing::open(self.files.shared(file)?, wanted.offset, wanted.len, backing::Frames::Contiguous)?;
        let at = self.add(&backing)?;
        self.files.note_mapping(file, at, wanted);
        Ok(at)
    }

    /// Takes a mapping of [`Local::mmap`] away.
    ///
    /// # Errors
    /// `EINVAL` when there is none.
    pub fn munmap(&self, at: u64) -> Answer {
        let len = self.files.forget_mapping(at)?;
        self.space.hide(at, len)
    }

    /// Puts a structure, or anything else, into scratch memory. Answers the address. Scratch memory is a ring of 1 MiB: what was put long ago
    /// is overwritten.
    pub fn put<T: IntoBytes + zerocopy::Immutable + ?Sized>(&self, value: &T) -> u64 {
        self.space.put(value.as_bytes())
    }

    /// What is in memory at `at`; zeros where nothing is.
    pub fn get<S: FromBytes + IntoBytes>(&self, at: u64) -> S {
        let mut value = S::new_zeroed();
        let _ = self.space.read(at, value.as_mut_bytes());
        value
    }

    /// Shows a backing in its memory, where this process has it mapped anyway. Answers the address.
    ///
    /// # Errors
    /// `EINVAL` when this process does not see the backing, or something is there.
    pub fn add(&self, backing: &Arc<Backing>) -> Answer<u64> {
        let at = backing.linear_hva().ok_or(Refusal::of(Errno::INVAL, "this process has no mapping of the memory; choose an address"))?;
        self.add_at(backing, at.get(), Touch::Always)?;
        Ok(at.get())
    }

    /// Shows a backing in its memory from `at` on, a multiple of 4 KiB.
    ///
    /// # Errors
    /// `EINVAL` when something is there, or it does not fit.
    pub fn add_at(&self, backing: &Arc<Backing>, at: u64, touch: Touch) -> Answer {
        self.space.show(backing, at, touch)
    }

    /// Makes a hole: nothing of its memory is left there. Pages that were mapped for devices before stay mapped.
    ///
    /// # Errors
    /// `EINVAL` for what are not whole pages.
    pub fn hide(&self, at: u64, len: u64) -> Answer {
        self.space.hide(at, len)
    }

    /// Gives it a file that is not ours: a memfd, a pipe. Answers the descriptor.
    ///
    /// # Errors
    /// `EMFILE`.
    pub fn give(&self, file: OwnedFd) -> Answer<i32> {
        self.files.give(file)
    }

    /// Another descriptor of the same file.
    ///
    /// # Errors
    /// `EBADF`, `EMFILE`.
    pub fn dup(&self, fd: i32) -> Answer<i32> {
        self.files.dup(fd)
    }

    /// Closes a descriptor. The last one of a file of ours releases it.
    ///
    /// # Errors
    /// `EBADF`.
    pub fn close(&self, fd: i32) -> Answer {
        self.files.close(fd)
    }

    /// The file of ours behind a descriptor.
    ///
    /// # Errors
    /// `EBADF`, also when it is not ours.
    pub fn opened(&self, fd: i32) -> Answer<Arc<dyn File>> {
        match self.files.get(fd)? {
            Opened::Ours(file) => Ok(file),
            Opened::Other => Err(Refusal::new(Errno::BADF, format!("descriptor {fd} is no file of ours"))),
        }
    }

    /// How many descriptors it may have; 1024 at first.
    pub fn set_most_files(&self, most: usize) {
        self.files.set_most(most);
    }

    /// Its descriptors, ascending.
    pub fn descriptors(&self) -> Vec<i32> {
        self.files.numbers()
    }
}

fn change_once<T>(change: impl FnOnce(&mut T)) -> impl FnMut(&mut T) {
    let mut change = Some(change);
    move |value| change.take().into_iter().for_each(|change| change(value))
}

fn new_space() -> SpaceId {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    SpaceId(NEXT.fetch_add(1, Ordering::Relaxed))
}

impl Caller for Local {
    fn read(&self, at: u64, into: &mut [u8]) -> Answer {
        self.space.read(at, into)
    }

    fn write(&self, at: u64, from: &[u8]) -> Answer {
        self.space.write(at, from)
    }

    fn process(&self) -> Answer<Process> {
        let process = *self.process.read().unwrap_or_else(PoisonError::into_inner);
        process.ok_or(Refusal::of(Errno::SRCH, "the process is gone"))
    }

    fn memory(&self, va: u64, len: u64) -> Answer<Memory> {
        self.space.memory(va, len)
    }

    fn file_memory(&self, fd: i32, start: u64, len: u64) -> Answer<Memory> {
        self.files.memory(fd, start, len)
    }

    fn file(&self, fd: i32) -> Answer<Opened> {
        self.files.get(fd)
    }

    fn install(&self, file: Arc<dyn File>) -> Answer<i32> {
        self.files.install(file)
    }

    fn shared(&self) -> Answer<OwnedFd> {
        Err(Refusal::of(Errno::NODEV, "which descriptor is called is known only to Local::ioctl, Local::call and Local::mmap"))
    }

    fn is_mapped(&self, _: u64, _: u64) -> bool {
        false
    }

    fn page_name(&self, va: u64) -> Answer<PageName> {
        self.space.page_name(va)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
