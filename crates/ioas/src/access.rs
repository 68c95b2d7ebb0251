//! Access by software, through the same areas and permissions that devices use: what a driver in the host would do.

use crate::area::{Area, AreaState};
use crate::{Error, Ioas};
use addr::{Address, Iova, PAGE_BYTES, PAGE_LG2, Page, Span};
use backing::{Backing, CopyFault, PageState};
use pt::Perm;
use std::sync::Arc;

/// How much is copied before the pages are let go: others may punch them in between.
const CHUNK_BYTES: u64 = 64 << 10;

/// Where bytes go to or come from.
enum Buffer<'a> {
    Into(&'a mut [u8]),
    From(&'a [u8]),
}

impl Buffer<'_> {
    fn perm(&self) -> Perm {
        if matches!(self, Self::Into(_)) { Perm::READ } else { Perm::WRITE }
    }

    /// Copies the part at `at` from or to byte `offset` of a backing: directly where this process sees it, by its owner otherwise.
    fn copy(&mut self, at: usize, len: usize, backing: &Backing, offset: u64) -> Result<(), CopyFault> {
        let oa = backing.oa(Page::new(offset >> PAGE_LG2)).plus(offset % PAGE_BYTES);
        let nowhere = CopyFault { done: 0 };
        match (self, backing.host(oa, len as u64)) {
            (Self::Into(into), Some(host)) => host.read(0, &mut into[at..at + len]),
            (Self::From(from), Some(host)) => host.write(0, &from[at..at + len]),
            (Self::Into(into), None) => backing.owner().ok_or(nowhere)?.read(offset, &mut into[at..at + len]),
            (Self::From(from), None) => backing.owner().ok_or(nowhere)?.write(offset, &from[at..at + len]),
        }
    }
}

impl Ioas {
    /// Reads from `at` on. Any alignment; areas are visited in order.
    ///
    /// # Errors
    /// `Shut`, `Denied`, `DeviceMemory`, `NotMapped`, `NotShared`, `Fault`, `Pin`: what comes before has been read. `Span` for an empty or wrapping
    /// span.
    pub fn read(&self, at: Iova, into: &mut [u8]) -> Result<(), Error> {
        let span = Span::from_len(at, into.len() as u64)?;
        self.access(span, Buffer::Into(into))
    }

    /// Writes from `at` on. Any alignment; areas are visited in order.
    ///
    /// # Errors
    /// As [`Ioas::read`]: what comes before has been written.
    pub fn write(&self, at: Iova, from: &[u8]) -> Result<(), Error> {
        let span = Span::from_len(at, from.len() as u64)?;
        self.access(span, Buffer::From(from))
    }

    fn access(&self, span: Span<Iova>, mut buffer: Buffer<'_>) -> Result<(), Error> {
        let mut rest = Some(span);
        while let Some(todo) = rest {
            let area = self.area_at(todo.start()).ok_or_else(|| self.gap(todo))?;
            if area.is_shut() && area.state() == AreaState::Live {
                return Err(Error::Shut { area: area.span() });
            }
            if !area.perm().allows(buffer.perm()) {
                return Err(Error::Denied { area: area.span() });
            }
            if area.is_device() {
                return Err(Error::DeviceMemory { area: area.span() });
            }
            let last = todo.last().min(area.span().last());
            let chunk = Span::of(todo.start(), last.min(todo.start().checked_add(CHUNK_BYTES - 1).unwrap_or(last)));
            let done = chunk.start().offset_from(span.start()) as usize;
            if !access_pinned(&area, chunk, done, &mut buffer)? {
                // A split may have put another area in its place.
                if self.area_at(todo.start()).is_none_or(|now| Arc::ptr_eq(&now, &area)) {
                    return Err(Error::NotMapped { at: chunk });
                }
                continue;
            }
            rest = chunk.last().checked_add(1).and_then(|next| Span::new(next, span.last()));
        }
        Ok(())
    }

    /// The stretch without an area that `todo` begins with.
    fn gap(&self, todo: Span<Iova>) -> Error {
        Error::NotMapped { at: self.space().areas.runs(todo).next().map_or(todo, |(gap, _)| gap) }
    }
}

/// Pins the pages of a chunk meanwhile, if their kind needs that and nobody has done it. Nobody pays for it.
fn access_pinned(area: &Area, chunk: Span<Iova>, done: usize, buffer: &mut Buffer<'_>) -> Result<bool, Error> {
    let backing = area.backing();
    let (first, last) = (area.byte_of(chunk.start()), area.byte_of(chunk.last()));
    let pages = Span::of(Page::new(first), Page::new(last)).index::<Page>(PAGE_LG2);
    match area.source() {
        Some(source) if backing.pins_for_access() && !source.covers(pages) => {
            backing.pin(pages, buffer.perm() == Perm::WRITE)?;
            let copied = access_area(area, (first, last), pages, done, buffer);
            backing.unpin(pages);
            copied
        }
        _ => access_area(area, (first, last), pages, done, buffer),
    }
}

/// Copies one chunk of one area, whose pages are held meanwhile; `false` when the area has gone.
fn access_area(area: &Area, (first, last): (u64, u64), pages: Span<Page>, done: usize, buffer: &mut Buffer<'_>) -> Result<bool, Error> {
    let backing = area.backing();
    let _held = backing.lock(pages);
    // An unmap that has begun waits for us, or has had the pages already.
    if area.state() != AreaState::Live {
        return Ok(false);
    }
    for (run, state) in backing.states(pages) {
        if state != PageState::Shared {
            return Err(Error::NotShared { page: run.start(), state });
        }
        for (extent, _) in backing.extents(run) {
            let start = extent.start().bytes().max(first);
            let end = (extent.last().bytes() + (PAGE_BYTES - 1)).min(last);
            let at = done + (start - first) as usize;
            let fault = |fault: CopyFault| Error::Fault { page: Page::new((start + fault.done as u64) >> PAGE_LG2) };
            buffer.copy(at, (end - start + 1) as usize, backing, start).map_err(fault)?;
        }
    }
    Ok(true)
}
