//! Unmap: whole areas, from low to high, with one flush for all of them. Cannot run out of memory (I-9).
//!
//! Three rounds. First each area is marked closing and its leaves are taken out under its pages' lock; it stays in both trees. Then
//! one flush. Then the areas leave the trees, first the pages' and then the address space's: as long as somebody may find an area by its pages, and clear what
//! it finds at its IOVA, nobody else has that IOVA. Whoever converts or punches their pages in between finds them closing: it installs nothing for
//! them, and flushes their domains as well, so it never relies on a flush that is still to come.
//!
//! An area that software has pinned ends the first round. When the areas before it are gone, accessors are asked to let go of it, with nothing locked, and
//! the rounds begin again at that area.

use crate::area::{Area, AreaState};
use crate::edit::Edit;
use crate::ioas::Domains;
use crate::map::uninstall;
use crate::{Error, Ioas};
use addr::{Address, Iova, Span};
use std::sync::Arc;
use sync::pause::pause;

/// How often accessors are asked to let go of an area (rule 28).
const TRIES: u32 = 100;

/// What ends a round early.
pub(crate) enum End {
    Error(Error),
    /// This area has pins; it takes no new ones.
    Pinned(Span<Iova>),
}

impl Ioas {
    /// Unmaps every area in `span`; gaps do not matter. Answers how many bytes that were. When it returns, no device reaches the pages
    /// through this address space.
    ///
    /// # Errors
    /// `NotMapped` when nothing was there; `CutsArea`, `Busy` and `Deadlock`, with every area below gone, as in the kernel; `HeldByCaller`.
    pub fn unmap(&self, span: Span<Iova>) -> Result<u64, Error> {
        match self.unmap_what_is_there(span)? {
            0 => Err(Error::NotMapped { at: span }),
            bytes => Ok(bytes),
        }
    }

    /// Unmaps everything; fine with nothing there, too.
    ///
    /// # Errors
    /// `Busy` and `Deadlock`, with every area below gone; `HeldByCaller`.
    pub fn unmap_all(&self) -> Result<u64, Error> {
        self.unmap_what_is_there(Span::whole())
    }

    fn unmap_what_is_there(&self, span: Span<Iova>) -> Result<u64, Error> {
        let mut bytes = 0;
        let mut rest = span;
        let mut tries = 0;
        loop {
            let domains = self.read_domains();
            Self::check_slices(&domains)?;
            let (gone, end) = self.close(&domains, rest);
            drop(domains);
            bytes += gone;
            match end {
                None => return Ok(bytes),
                Some(End::Error(error)) => return Err(error),
                Some(End::Pinned(area)) => {
                    if rest.start() != area.start() {
                        tries = 0;
                    }
                    tries += 1;
                    if tries > TRIES {
                        return Err(Error::Deadlock { area });
                    }
                    rest = Span::of(area.start(), span.last());
                    self.notify(area);
                }
            }
        }
    }

    /// The three rounds; answers the bytes that are gone, and what ended the first round early.
    pub(crate) fn close(&self, domains: &Domains, span: Span<Iova>) -> (u64, Option<End>) {
        let ticket = self.ticket();
        let mut edit = Edit::new();
        let mut rest = Some(span);
        let mut end = None;
        let (mut first, mut last) = (None, None);
        while let Some(todo) = rest {
            let area = match self.close_first(todo, ticket) {
                Ok(Some(area)) => area,
                Ok(None) => break,
                Err(why) => {
                    end = Some(why);
                    break;
                }
            };
            uninstall(&area, &mut edit);
            last = Some(area.span().last());
            rest = area.span().last().checked_add(1).and_then(|next| Span::new(next, span.last()));
            first.get_or_insert(area);
        }
        let (Some(first), Some(last)) = (first, last) else { return (0, end) };
        edit.flush();
        if first.span().last() == last {
            return (self.forget(&first, domains), end);
        }
        (self.drop_closed(domains, Span::of(span.start(), last), ticket), end)
    }

    /// Closes the first area in `span`, if it may go.
    fn close_first(&self, span: Span<Iova>, ticket: u64) -> Result<Option<Arc<Area>>, End> {
        let space = self.space();
        let Some((found, area)) = space.areas.overlapping(span).next() else { return Ok(None) };
        let busy = End::Error(Error::Busy { area: found });
        if area.state() != AreaState::Live || area.locks() > 0 {
            return Err(busy);
        }
        if !span.covers(found) {
            return Err(End::Error(Error::CutsArea { span, area: found }));
        }
        match area.shut() {
            Some(0) if area.close(ticket) => Ok(Some(Arc::clone(area))),
            Some(1..) => Err(End::Pinned(found)),
            _ => Err(busy),
        }
    }

    /// Takes the areas that `ticket` closed out of the trees.
    fn drop_closed(&self, domains: &Domains, span: Span<Iova>, ticket: u64) -> u64 {
        let mut bytes = 0u64;
        let mut rest = Some(span);
        while let Some(todo) = rest {
            let Some((found, area)) = self.space().areas.overlapping(todo).next().map(|(found, area)| (found, Arc::clone(area))) else {
                break;
            };
            rest = found.last().checked_add(1).and_then(|next| Span::new(next, todo.last()));
            // Others may have mapped in the gaps meanwhile.
            if area.is_closed_by(ticket) {
                bytes = bytes.saturating_add(self.forget(&area, domains));
            }
        }
        bytes
    }

    /// Takes an area that is closed and flushed off its pages, which may go now, and then out of the address space; answers its length.
    fn forget(&self, area: &Area, domains: &Domains) -> u64 {
        area.pages.unregister(area);
        pause();
        let gone = self.space_mut().areas.remove(area.span().start());
        drop(gone);
        pause();
        if domains.show() {
            area.release();
        }
        area.span().len()
    }
}
