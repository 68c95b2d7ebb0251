//! Access by software, through the same areas and permissions that devices use: what a driver in the host would do.

use crate::area::{Area, AreaState};
use crate::{Error, Ioas};
use addr::{Address, Iova, PAGE_BYTES, PAGE_LG2, Page, Span};
use backing::{CopyFault, HostAddr, PageState};
use pt::Perm;
use std::sync::Arc;

/// How much is copied before the pages are let go: others may punch them in between.
const CHUNK_BYTES: u64 = 64 << 10;

impl Ioas {
    /// Reads from `at` on. Any alignment; areas are visited in order.
    ///
    /// # Errors
    /// `Denied`, `NotMapped`, `NotShared`, `Fault`: what comes before has been read. `Span` for an empty or wrapping span.
    pub fn read(&self, at: Iova, into: &mut [u8]) -> Result<(), Error> {
        let span = Span::from_len(at, into.len() as u64)?;
        self.access(span, Perm::READ, |done, host, len| host.read(0, &mut into[done..done + len]))
    }

    /// Writes from `at` on. Any alignment; areas are visited in order.
    ///
    /// # Errors
    /// As [`Ioas::read`]: what comes before has been written.
    pub fn write(&self, at: Iova, from: &[u8]) -> Result<(), Error> {
        let span = Span::from_len(at, from.len() as u64)?;
        self.access(span, Perm::WRITE, |done, host, len| host.write(0, &from[done..done + len]))
    }

    fn access(
        &self,
        span: Span<Iova>,
        perm: Perm,
        mut copy: impl FnMut(usize, HostAddr, usize) -> Result<(), CopyFault>,
    ) -> Result<(), Error> {
        let mut rest = Some(span);
        while let Some(todo) = rest {
            let found = self.space().areas.runs(todo).next().map(|(piece, area)| (piece, area.map(Arc::clone)));
            let Some((piece, Some(area))) = found else {
                return Err(Error::NotMapped { at: found.map_or(todo, |(piece, _)| piece) });
            };
            if !area.perm().allows(perm) {
                return Err(Error::Denied { area: area.span() });
            }
            let chunk = Span::of(piece.start(), piece.last().min(piece.start().checked_add(CHUNK_BYTES - 1).unwrap_or(piece.last())));
            access_area(&area, chunk, |done, host, len| copy((chunk.start().offset_from(span.start()) as usize) + done, host, len))?;
            rest = chunk.last().checked_add(1).and_then(|next| Span::new(next, span.last()));
        }
        Ok(())
    }
}

/// Copies one chunk of one area, whose pages are held meanwhile.
fn access_area(area: &Area, chunk: Span<Iova>, mut copy: impl FnMut(usize, HostAddr, usize) -> Result<(), CopyFault>) -> Result<(), Error> {
    let backing = area.backing();
    let first = area.byte_of(chunk.start());
    let last = first + chunk.last_offset();
    let pages = Span::of(Page::new(first), Page::new(last)).index::<Page>(PAGE_LG2);
    let _held = backing.lock(pages);
    // An unmap that has begun waits for us, or has had the pages already.
    if area.state() != AreaState::Live {
        return Err(Error::NotMapped { at: chunk });
    }
    for (run, state) in backing.states(pages) {
        if state != PageState::Shared {
            return Err(Error::NotShared { page: run.start(), state });
        }
        for (extent, oa) in backing.extents(run) {
            let start = extent.start().bytes().max(first);
            let end = (extent.last().bytes() + (PAGE_BYTES - 1)).min(last);
            let len = end - start + 1;
            let fault = |done: u64| Error::Fault { page: Page::new((start + done) >> PAGE_LG2) };
            let host = backing.host(oa.plus(start - extent.start().bytes()), len).ok_or_else(|| fault(0))?;
            copy((start - first) as usize, host, len as usize).map_err(|error| fault(error.done as u64))?;
        }
    }
    Ok(())
}
