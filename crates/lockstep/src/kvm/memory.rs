//! What a slot may give to a guest, and the mappings of files that this process makes for it.

use super::{KvmError, slots};
use addr::Hva;
use rustix::mm::{MapFlags, ProtFlags};
use std::any::Any;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr;
use std::sync::Arc;

/// Memory that a slot may give to a guest: a part of this process, and an owner that keeps it what it is.
///
/// KVM and the guest read and write it at any time, so it is never a Rust reference. Clones are handles of the same memory.
#[derive(Clone, Debug)]
pub struct Memory {
    hva: Hva,
    len_bytes: u64,
    _owner: Arc<dyn Any + Send + Sync>,
}

impl Memory {
    /// Memory of somebody else.
    ///
    /// The constructor is unsafe and not a trait, so that whoever owns mappings (in Lockstep: `backing`, bridged by the crate) makes the
    /// promise in one place and all others pass the handle on.
    ///
    /// # Safety
    /// As long as a clone of `owner` lives, `len_bytes` from `hva` are either mapped as memory meant for a guest, or not accessible;
    /// nothing else is ever mapped there, and no Rust reference to any of it exists.
    pub unsafe fn new(hva: Hva, len_bytes: u64, owner: Arc<dyn Any + Send + Sync>) -> Self {
        Self { hva, len_bytes, _owner: owner }
    }

    /// A shared mapping of a file, of its own: a memfd, or a guest_memfd made with [`MemfdFlags::MMAP`](super::MemfdFlags::MMAP).
    ///
    /// # Errors
    /// When the span is not whole pages, or the kernel will not map it.
    pub fn of_file(file: BorrowedFd<'_>, offset: u64, len_bytes: u64) -> Result<Self, KvmError> {
        let part = slots::aligned("a mapping of a file", addr::Page::new(offset), len_bytes)?;
        let mapping =
            Mapping::new(file, part.start().get(), len_bytes).map_err(|error| KvmError::os("mapping a guest's memory file", error))?;
        Ok(Self { hva: Hva::new(mapping.base as u64), len_bytes, _owner: Arc::new(mapping) })
    }

    /// Where this process sees it.
    pub fn hva(&self) -> Hva {
        self.hva
    }

    /// How much it is.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }
}

/// How a slot is made.
#[derive(Clone, Copy, Debug, Default)]
pub struct SlotOptions<'a> {
    /// The guest_memfd behind the memory, and where in it the slot begins. The memory must be a mapping of that part, where it can be
    /// mapped. `None`: the memory alone.
    pub guest_memfd: Option<(BorrowedFd<'a>, u64)>,
    /// The guest may only read; a write comes back as a register write.
    pub read_only: bool,
    /// KVM notes which pages the guest writes.
    pub log_dirty: bool,
}

/// A shared mapping of a file of our own.
#[derive(Debug)]
pub(super) struct Mapping {
    pub(super) base: usize,
    pub(super) len: usize,
}

impl Mapping {
    pub(super) fn new(file: BorrowedFd<'_>, offset: u64, len_bytes: u64) -> io::Result<Self> {
        let len = usize::try_from(len_bytes).map_err(|_| io::ErrorKind::OutOfMemory)?;
        // SAFETY: a new mapping where the kernel finds room takes nothing away from anybody.
        let base = unsafe { rustix::mm::mmap(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, file, offset)? };
        Ok(Self { base: base.expose_provenance(), len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length, and unmapped only here. A failure leaves it mapped, which harms nobody.
        let _still_mapped = unsafe { rustix::mm::munmap(ptr::with_exposed_provenance_mut(self.base), self.len) };
    }
}
