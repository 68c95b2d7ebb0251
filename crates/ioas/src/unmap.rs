//! Unmap: whole areas, from low to high, with one flush for all of them. Cannot run out of memory (I-9).
//!
//! Three rounds. First each area is marked closing and its leaves are taken out under its pages' lock; it stays in both trees. Then
//! one flush. Then the areas leave the trees. Whoever converts or punches their pages in between finds them closing: it installs nothing for
//! them, and flushes their domains as well, so it never relies on a flush that is still to come.

use crate::area::AreaState;
use crate::edit::Edit;
use crate::ioas::Domains;
use crate::map::uninstall;
use crate::{Error, Ioas};
use addr::{Address, Iova, Span};
use std::sync::Arc;

impl Ioas {
    /// Unmaps every area in `span`; gaps do not matter. Answers how many bytes that were. When it returns, no device reaches the pages
    /// through this address space.
    ///
    /// # Errors
    /// `NotMapped` when nothing was there; `CutsArea` and `Busy`, with every area below gone, as in the kernel; `HeldByCaller`.
    pub fn unmap(&self, span: Span<Iova>) -> Result<u64, Error> {
        let domains = self.read_domains();
        Self::check_slices(&domains)?;
        let (bytes, end) = self.close(&domains, span);
        match end {
            Some(error) => Err(error),
            None if bytes == 0 => Err(Error::NotMapped { at: span }),
            None => Ok(bytes),
        }
    }

    /// Unmaps everything; fine with nothing there, too.
    ///
    /// # Errors
    /// `Busy`, with every area below gone; `HeldByCaller`.
    pub fn unmap_all(&self) -> Result<u64, Error> {
        let domains = self.read_domains();
        Self::check_slices(&domains)?;
        let (bytes, end) = self.close(&domains, Span::whole());
        end.map_or(Ok(bytes), Err)
    }

    /// The three rounds; answers the bytes that are gone, and what ended the first round early.
    pub(crate) fn close(&self, _domains: &Domains, span: Span<Iova>) -> (u64, Option<Error>) {
        let ticket = self.ticket();
        let mut edit = Edit::new();
        let mut rest = Some(span);
        let mut end = None;
        let mut last = None;
        while let Some(todo) = rest {
            let area = {
                let space = self.space();
                let Some((found, area)) = space.areas.overlapping(todo).next() else { break };
                if !todo.covers(found) {
                    end = Some(Error::CutsArea { span: todo, area: found });
                    break;
                }
                if area.state() != AreaState::Live || !area.close(ticket) {
                    end = Some(Error::Busy { area: found });
                    break;
                }
                Arc::clone(area)
            };
            uninstall(&area, &mut edit);
            last = Some(area.span().last());
            rest = area.span().last().checked_add(1).and_then(|next| Span::new(next, span.last()));
        }
        let Some(last) = last else { return (0, end) };
        edit.flush();
        (self.drop_closed(Span::of(span.start(), last), ticket), end)
    }

    /// Takes the areas that `ticket` closed out of the trees.
    fn drop_closed(&self, span: Span<Iova>, ticket: u64) -> u64 {
        let mut bytes = 0u64;
        let mut rest = Some(span);
        while let Some(todo) = rest {
            let found = {
                let mut space = self.space_mut();
                let Some((found, area)) = space.areas.overlapping(todo).next() else { break };
                // Others may have mapped in the gaps meanwhile.
                let gone = area.is_closed_by(ticket).then(|| space.areas.remove(found.start())).flatten();
                (found, gone)
            };
            let (found, gone) = found;
            rest = found.last().checked_add(1).and_then(|next| Span::new(next, todo.last()));
            if let Some((_, area)) = gone {
                area.pages.unregister(&area);
                bytes = bytes.saturating_add(found.len());
            }
        }
        bytes
    }
}
