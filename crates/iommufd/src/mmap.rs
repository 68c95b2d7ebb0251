//! What of the iommufd itself can be mapped: pages that a virtual IOMMU shares with its user (rule 12).

use crate::{Answer, Caller, Mmap, Refusal};
use addr::PAGE_BYTES;
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

const MAP_SHARED: u32 = 1;
const MAP_SHARED_VALIDATE: u32 = 3;
const PROT_EXEC: u32 = 4;

/// Registered regions: offset to length, both whole pages.
#[derive(Debug, Default)]
pub(crate) struct Regions(Mutex<BTreeMap<u64, u64>>);

impl Regions {
    /// Takes the lowest free stretch of `len` bytes from one page on, and puts `content` at its start, where a mapping of the descriptor shows it.
    ///
    /// # Errors
    /// What the front answers when there is no memory behind the descriptor.
    pub(crate) fn add(&self, caller: &dyn Caller, len: u64, content: &[u8]) -> Answer<u64> {
        let memory = caller.shared()?;
        let mut regions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut at = PAGE_BYTES;
        for (start, own) in regions.iter() {
            if start - at >= len {
                break;
            }
            at = start + own;
        }
        let grown = rustix::fs::fstat(&memory).map_err(os)?.st_size.cast_unsigned().max(at + len);
        rustix::fs::ftruncate(&memory, grown).map_err(os)?;
        let mut page = vec![0; usize::try_from(len).map_err(|_| os(Errno::NOMEM))?];
        page.iter_mut().zip(content).for_each(|(to, from)| *to = *from);
        let mut done = 0;
        while done < page.len() {
            done += rustix::io::pwrite(&memory, &page[done..], at + done as u64).map_err(os)?;
        }
        regions.insert(at, len);
        Ok(at)
    }

    /// Nobody maps it anew.
    pub(crate) fn remove(&self, at: u64) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&at);
    }

    pub(crate) fn check(&self, wanted: &Mmap) -> Answer {
        if wanted.len == 0 || !wanted.len.is_multiple_of(PAGE_BYTES) || ![MAP_SHARED, MAP_SHARED_VALIDATE].contains(&(wanted.flags & 0xf)) {
            return Err(Refusal::of(Errno::INVAL, "a mapping of the iommufd is shared and whole pages long"));
        }
        if wanted.prot & PROT_EXEC != 0 {
            return Err(Refusal::of(Errno::PERM, "pages of the iommufd hold no code"));
        }
        let regions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match regions.get(&wanted.offset) {
            Some(len) if *len == wanted.len => Ok(()),
            _ => {
                let text = format!(
                    "no region is {:#x} bytes at offset {:#x}; map exactly what a virtual IOMMU announced",
                    wanted.len, wanted.offset
                );
                Err(Refusal::new(Errno::NXIO, text))
            }
        }
    }
}

fn os(errno: Errno) -> Refusal {
    Refusal::of(errno, "the memory behind the descriptor could not be used")
}
