//! The memory of a process that calls in process: backings that were shown to it, scratch memory, and bad addresses everywhere else.

use super::frame::{FRAME_AT, Words};
use crate::{Answer, Memory, Refusal};
use addr::{Address, Hva, PAGE_BYTES, PAGE_LG2, Page, Span, SpanMap};
use backing::{Backing, CopyFault, Frames, HostAddr, Owner, PageName, PinError};
use rustix::io::Errno;
use std::fmt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

/// Bytes of scratch memory, and where they are.
const SCRATCH_BYTES: usize = 1 << 20;
const SCRATCH_AT: u64 = FRAME_AT - 2 * SCRATCH_BYTES as u64;

/// What may be done with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    /// Everything, and what was mapped for devices stays so after the process has let go of it. The cheapest.
    Always,
    /// Everything, for as long as the process has it: what was mapped for devices and not pinned yet is gone afterwards.
    WhileShown,
    /// As `WhileShown`, reading only.
    ReadOnly,
}

#[derive(Clone)]
struct Region {
    backing: Arc<Backing>,
    /// The address of the backing's first byte.
    base: u64,
    touch: Touch,
}

impl PartialEq for Region {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.backing, &other.backing) && (self.base, self.touch) == (other.base, other.touch)
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "backing {} at {:#x} ({:?})", self.backing.id().get(), self.base, self.touch)
    }
}

/// Addresses to regions; shared with the owners of memory that is looked up when it is pinned.
#[derive(Debug, Default)]
struct Regions {
    map: RwLock<SpanMap<Hva, Region>>,
    /// Names the address space in the names of pages that are nowhere.
    space: u64,
}

pub(super) struct Space {
    regions: Arc<Regions>,
    scratch: Words<Box<[AtomicU64]>>,
    next: AtomicUsize,
}

impl fmt::Debug for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.regions.fmt(f)
    }
}

impl Space {
    pub(super) fn new(space: u64) -> Self {
        let scratch = (0..SCRATCH_BYTES / 8).map(|_| AtomicU64::new(0)).collect();
        Self { regions: Arc::new(Regions { map: RwLock::default(), space }), scratch: Words(scratch), next: AtomicUsize::new(0) }
    }

    pub(super) fn fork(&self, space: u64) -> Self {
        let child = Self::new(space);
        *child.regions.write() = self.regions.read().clone();
        child
    }

    pub(super) fn clear(&self) {
        *self.regions.write() = SpanMap::new();
    }

    pub(super) fn show(&self, backing: &Arc<Backing>, at: u64, touch: Touch) -> Answer {
        let span =
            Span::aligned(Hva::new(at), backing.len_bytes(), PAGE_LG2).map_err(|error| Refusal::new(Errno::INVAL, error.to_string()))?;
        if Span::of(Hva::new(SCRATCH_AT), Hva::new(FRAME_AT + PAGE_BYTES - 1)).overlaps(span) {
            return Err(Refusal::of(Errno::INVAL, "scratch memory is there"));
        }
        let region = Region { backing: Arc::clone(backing), base: at, touch };
        self.regions.write().insert(span, region).map_err(|error| Refusal::new(Errno::INVAL, error.to_string()))
    }

    pub(super) fn hide(&self, at: u64, len: u64) -> Answer {
        let span = Span::aligned(Hva::new(at), len, PAGE_LG2).map_err(|error| Refusal::new(Errno::INVAL, error.to_string()))?;
        Ok(self.regions.write().clear(span)?)
    }

    pub(super) fn put(&self, bytes: &[u8]) -> u64 {
        let len = bytes.len().next_multiple_of(64).min(SCRATCH_BYTES);
        let begin = |next: usize| if next + len <= SCRATCH_BYTES { next } else { 0 };
        let next = self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| Some(begin(next) + len));
        let at = begin(next.unwrap_or_default());
        self.scratch.set_at(at, &bytes[..bytes.len().min(SCRATCH_BYTES)]);
        SCRATCH_AT + at as u64
    }

    fn scratch_at(&self, at: u64, len: usize) -> Option<usize> {
        let offset = usize::try_from(at.checked_sub(SCRATCH_AT)?).ok()?;
        (offset <= self.scratch.len() && len <= self.scratch.len() - offset).then_some(offset)
    }

    pub(super) fn read(&self, at: u64, into: &mut [u8]) -> Answer {
        if let Some(offset) = self.scratch_at(at, into.len()) {
            self.scratch.get_at(offset, into);
            return Ok(());
        }
        let mut done = 0;
        while done < into.len() {
            let (host, now) = self.regions.host(at.wrapping_add(done as u64), into.len() - done, false).ok_or_else(|| fault(at))?;
            host.read(0, &mut into[done..done + now]).map_err(|_| fault(at))?;
            done += now;
        }
        Ok(())
    }

    pub(super) fn write(&self, at: u64, from: &[u8]) -> Answer {
        if let Some(offset) = self.scratch_at(at, from.len()) {
            self.scratch.set_at(offset, from);
            return Ok(());
        }
        let mut done = 0;
        while done < from.len() {
            let (host, now) = self.regions.host(at.wrapping_add(done as u64), from.len() - done, true).ok_or_else(|| fault(at))?;
            host.write(0, &from[done..done + now]).map_err(|_| fault(at))?;
            done += now;
        }
        Ok(())
    }

    pub(super) fn memory(&self, va: u64, len: u64) -> Answer<Memory> {
        let span = Span::from_len(Hva::new(va), len).map_err(|error| Refusal::new(Errno::OVERFLOW, error.to_string()))?;
        let found = self.regions.read().get(span.start()).filter(|(whole, _)| whole.covers(span)).map(|(_, region)| region.clone());
        if let Some(Region { backing, base, touch: Touch::Always }) = found {
            return Ok(Memory { backing, offset: va - base });
        }
        let whole = span.widen(PAGE_LG2);
        let owner = Lookup { regions: Arc::clone(&self.regions), base: whole.start().get() };
        let backing = Backing::foreign(whole.len(), Arc::new(owner), Frames::Contiguous)
            .map_err(|error| Refusal::new(Errno::NOMEM, error.to_string()))?;
        Ok(Memory { backing, offset: va - whole.start().get() })
    }

    pub(super) fn page_name(&self, va: u64) -> Answer<PageName> {
        self.regions.name(va).ok_or_else(|| fault(va))
    }
}

#[cold]
fn fault(at: u64) -> Refusal {
    Refusal::new(Errno::FAULT, format!("there is no memory at {at:#x}, or not for this access"))
}

impl Regions {
    fn read(&self) -> RwLockReadGuard<'_, SpanMap<Hva, Region>> {
        self.map.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, SpanMap<Hva, Region>> {
        self.map.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The memory at `at`: up to `len` bytes in a row.
    fn host(&self, at: u64, len: usize, write: bool) -> Option<(HostAddr, usize)> {
        let regions = self.read();
        let (_, region) = regions.get(Hva::new(at))?;
        if write && region.touch == Touch::ReadOnly {
            return None;
        }
        let inside = at & (PAGE_BYTES - 1);
        let now = len.min((PAGE_BYTES - inside) as usize);
        let oa = region.backing.oa(Page::new((at - region.base) >> PAGE_LG2)).plus(inside);
        Some((region.backing.host(oa, now as u64)?, now))
    }

    fn name(&self, at: u64) -> Option<PageName> {
        let regions = self.read();
        let (_, region) = regions.get(Hva::new(at))?;
        Some(region.backing.page_name(Page::new((at - region.base) >> PAGE_LG2)))
    }
}

/// Memory that is looked for when somebody needs it (rule 16).
#[derive(Debug)]
struct Lookup {
    regions: Arc<Regions>,
    /// The address of page 0.
    base: u64,
}

impl Lookup {
    fn at(&self, page: Page) -> u64 {
        self.base.wrapping_add(page.bytes())
    }
}

impl Owner for Lookup {
    fn pin(&self, pages: Span<Page>, write: bool) -> Result<(), PinError> {
        let regions = self.regions.read();
        let mut page = pages.start();
        loop {
            let found = regions.get(Hva::new(self.at(page))).filter(|(_, region)| !write || region.touch != Touch::ReadOnly);
            let (span, _) = found.ok_or(PinError::Fault { page })?;
            let here = (span.last().get() - self.at(page)) >> PAGE_LG2;
            match page.checked_add(here + 1).filter(|next| *next <= pages.last()) {
                Some(next) => page = next,
                None => return Ok(()),
            }
        }
    }

    fn unpin(&self, _: Span<Page>) {}

    fn host(&self, offset: u64, len: u64) -> Option<HostAddr> {
        let (host, now) = self.regions.host(self.base.wrapping_add(offset), usize::try_from(len).ok()?, false)?;
        (now as u64 == len).then_some(host)
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), CopyFault> {
        let mut done = 0;
        while done < into.len() {
            let at = self.base.wrapping_add(offset + done as u64);
            let (host, now) = self.regions.host(at, into.len() - done, false).ok_or(CopyFault { done })?;
            host.read(0, &mut into[done..done + now]).map_err(|fault| CopyFault { done: done + fault.done })?;
            done += now;
        }
        Ok(())
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<(), CopyFault> {
        let mut done = 0;
        while done < from.len() {
            let at = self.base.wrapping_add(offset + done as u64);
            let (host, now) = self.regions.host(at, from.len() - done, true).ok_or(CopyFault { done })?;
            host.write(0, &from[done..done + now]).map_err(|fault| CopyFault { done: done + fault.done })?;
            done += now;
        }
        Ok(())
    }

    fn name(&self, page: Page) -> PageName {
        let at = self.at(page);
        self.regions.name(at).unwrap_or(PageName::Memory { space: self.regions.space, page: at >> PAGE_LG2 })
    }
}
