//! BAR2: bytes that a client may map. They live in the memory behind its descriptor, which the front maps for it, at the region's offset; here they are
//! reached by file calls for as long as one call takes, because whoever keeps that memory open keeps the client's file from closing.

use crate::regions::{BUFFER_BYTES, Region};
use iommufd::{Answer, Caller, Refusal};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Where the bytes are.
#[derive(Debug)]
pub(crate) enum Buffer {
    /// Behind the client's descriptor: it can map them.
    Shared,
    /// With us, for a front whose descriptors have no memory.
    Own(OwnedFd),
}

/// The bytes, during one call.
pub(crate) enum Memory<'a> {
    Open(OwnedFd),
    Own(BorrowedFd<'a>),
    /// Nothing is there; why was told when it was opened.
    Gone,
}

impl Buffer {
    /// Makes room for the bytes, all zero.
    ///
    /// # Errors
    /// The host's, when there is no memory.
    pub(crate) fn new(caller: &dyn Caller) -> Answer<Self> {
        match caller.shared() {
            Ok(shared) => {
                room(shared.as_fd())?;
                Ok(Self::Shared)
            }
            Err(refusal) if refusal.errno == Errno::NODEV => {
                let own = memfd_create("lockstep-vfio-buffer", MemfdFlags::CLOEXEC).map_err(no_room)?;
                room(own.as_fd())?;
                Ok(Self::Own(own))
            }
            Err(refusal) => Err(refusal),
        }
    }

    /// Whether a client may map it.
    pub(crate) fn is_mappable(&self) -> bool {
        matches!(self, Self::Shared)
    }

    /// The bytes, for this call.
    pub(crate) fn open(&self, caller: &dyn Caller) -> Memory<'_> {
        match self {
            Self::Shared => caller.shared().map_or(Memory::Gone, Memory::Open),
            Self::Own(own) => Memory::Own(own.as_fd()),
        }
    }
}

/// The file is sparse: its length costs nothing.
fn room(file: BorrowedFd<'_>) -> Answer {
    ftruncate(file, Region::Buffer.offset() + BUFFER_BYTES).map_err(no_room)
}

fn no_room(errno: Errno) -> Refusal {
    Refusal::new(errno, format!("no memory for the device's buffer of {BUFFER_BYTES:#x} bytes"))
}

impl Memory<'_> {
    fn file(&self) -> Result<BorrowedFd<'_>, Errno> {
        match self {
            Self::Open(open) => Ok(open.as_fd()),
            Self::Own(own) => Ok(*own),
            Self::Gone => Err(Errno::NODEV),
        }
    }

    /// Copies bytes of the buffer from offset `at` on.
    pub(crate) fn read(&self, at: u64, into: &mut [u8]) -> Result<(), Errno> {
        let (file, mut done) = (self.file()?, 0);
        while done < into.len() {
            match rustix::io::pread(file, &mut into[done..], Region::Buffer.offset() + at + done as u64)? {
                0 => return Err(Errno::IO),
                now => done += now,
            }
        }
        Ok(())
    }

    /// Copies bytes into the buffer from offset `at` on.
    pub(crate) fn write(&self, at: u64, from: &[u8]) -> Result<(), Errno> {
        let (file, mut done) = (self.file()?, 0);
        while done < from.len() {
            match rustix::io::pwrite(file, &from[done..], Region::Buffer.offset() + at + done as u64)? {
                0 => return Err(Errno::IO),
                now => done += now,
            }
        }
        Ok(())
    }
}
