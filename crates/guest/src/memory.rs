//! Guest memory that a thread guest can run in: a shared mapping, touched by copies only and never as a Rust reference.

use crate::native::Mapping;
use addr::{Gpa, Hva};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use thiserror::Error;

/// Why memory could not be had, or reached.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The kernel would not map it.
    #[error("mapping {len_bytes:#x} bytes of guest memory: {errno}")]
    Map {
        /// How much.
        len_bytes: u64,
        /// Why not.
        errno: rustix::io::Errno,
    },
    /// An access that is not inside.
    #[error("{len:#x} bytes at {gpa:?} are not inside {memory:#x} bytes of guest memory")]
    Outside {
        /// Where.
        gpa: Gpa,
        /// How many bytes.
        len: u64,
        /// How much memory there is.
        memory: u64,
    },
}

/// Guest memory from GPA 0, mapped readable and writable for as long as this lives. Clones are handles of the same memory.
///
/// Guest, devices and host touch it at the same time; what it gives out are copies. A file that somebody else cuts short under a
/// mapping turns an access into SIGBUS, here as everywhere.
#[derive(Clone)]
pub struct Memory(pub(crate) Arc<Mapping>);

impl Memory {
    /// Fresh zero memory.
    ///
    /// # Errors
    /// When the kernel will not map it.
    pub fn anonymous(len_bytes: u64) -> Result<Self, MemoryError> {
        let mapping = Mapping::new(None, 0, len_bytes).map_err(|errno| MemoryError::Map { len_bytes, errno })?;
        Ok(Self(Arc::new(mapping)))
    }

    /// A shared mapping of a file (a memfd, a mappable guest_memfd) from `offset`.
    ///
    /// # Errors
    /// When the kernel will not map it.
    pub fn of_file(file: BorrowedFd<'_>, offset: u64, len_bytes: u64) -> Result<Self, MemoryError> {
        let mapping = Mapping::new(Some(file), offset, len_bytes).map_err(|errno| MemoryError::Map { len_bytes, errno })?;
        Ok(Self(Arc::new(mapping)))
    }

    /// How much there is.
    pub fn len_bytes(&self) -> u64 {
        self.0.len_bytes()
    }

    /// Where this process sees GPA 0.
    pub fn hva(&self) -> Hva {
        self.0.hva()
    }

    /// Copies memory out.
    ///
    /// # Errors
    /// `Outside`.
    pub fn read(&self, gpa: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        self.check(gpa, into.len() as u64)?;
        self.0.read(gpa.get(), into);
        Ok(())
    }

    /// Copies memory in.
    ///
    /// # Errors
    /// `Outside`.
    pub fn write(&self, gpa: Gpa, from: &[u8]) -> Result<(), MemoryError> {
        self.check(gpa, from.len() as u64)?;
        self.0.write(gpa.get(), from);
        Ok(())
    }

    fn check(&self, gpa: Gpa, len: u64) -> Result<(), MemoryError> {
        let memory = self.len_bytes();
        if gpa.get() <= memory && len <= memory - gpa.get() { Ok(()) } else { Err(MemoryError::Outside { gpa, len, memory }) }
    }
}
