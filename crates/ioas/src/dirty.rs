//! Which pages a device has written to, for whoever migrates the guest.

use crate::edit::Edit;
use crate::{Error, Ioas, tables};
use addr::{Address, Iova, PAGE_LG2, Page, Span};
use iommu::Domain;
use pt::Gather;

impl Ioas {
    /// From now on writes through `domain` are noted, or no longer. Switching on forgets what was noted before; twice is fine (rule 55).
    ///
    /// # Errors
    /// `NotAttached`; no table for a cut.
    pub fn track_dirty(&self, domain: &Domain, on: bool) -> Result<(), Error> {
        if on {
            self.visit_dirty(domain, Span::whole(), true, |_| {})?;
        }
        domain.track_dirty(on);
        Ok(())
    }

    /// Shows `sink` what was written to in `span`, in spans clipped to it, ascending within each area. A leaf is dirty as a whole. With `clear` it is
    /// forgotten, and the next write notes it again. Gaps are passed over.
    ///
    /// Nothing is lost at the borders: with `clear`, a leaf that sticks out of the span is cut first; where there is no table for that, or
    /// the rule has no leaves so small, it is reported and stays dirty.
    ///
    /// # Errors
    /// `NotAttached`; `Span` when the span does not keep to the alignment of the address space.
    pub fn read_dirty(&self, domain: &Domain, span: Span<Iova>, clear: bool, sink: impl FnMut(Span<Iova>)) -> Result<(), Error> {
        span.check_aligned(self.alignment().trailing_zeros() as u8)?;
        self.visit_dirty(domain, span, clear, sink)
    }

    /// As [`Ioas::read_dirty`], into a bitmap: bit n stands for `page_bytes` at `span.start() + n * page_bytes`. Bits are set, never cleared;
    /// none beyond the span (rules 56 to 58). Of a `page_bytes` that is no power of two, the lowest bit is what one bit stands for.
    ///
    /// # Errors
    /// As [`Ioas::read_dirty`], and `Span` when `page_bytes` is 0, or `page_bytes - 1` has a bit in common with the start or the end of the span.
    pub fn read_dirty_bitmap(
        &self,
        domain: &Domain,
        span: Span<Iova>,
        page_bytes: u64,
        clear: bool,
        bitmap: &mut [u8],
    ) -> Result<(), Error> {
        let (start, end) = (span.start().get(), span.last().get().wrapping_add(1));
        let lg2 = page_bytes.trailing_zeros();
        if page_bytes == 0 || (start | end) & (page_bytes - 1) != 0 {
            return Err(addr::SpanError::Misaligned { start, len: end.wrapping_sub(start), align_lg2: lg2 as u8 }.into());
        }
        self.read_dirty(domain, span, clear, |dirty| {
            let bits = (dirty.start().offset_from(span.start()) >> lg2)..=(dirty.last().offset_from(span.start()) >> lg2);
            for bit in bits {
                if let Some(byte) = bitmap.get_mut((bit / 8) as usize) {
                    *byte |= 1 << (bit % 8);
                }
            }
        })
    }

    /// Notes a write at `iova` as if a device had made it through `domain`, whatever the leaf allows: what an emulated device does that keeps
    /// account of its own writes. Answers whether there is a leaf.
    ///
    /// # Errors
    /// `NotAttached`; `NotTracking` when the domain does not note writes.
    pub fn mark_dirty(&self, domain: &Domain, iova: Iova) -> Result<bool, Error> {
        let domains = self.read_domains();
        if !domains.seats.iter().any(|seat| std::ptr::eq(&*seat.domain, domain)) {
            return Err(Error::NotAttached { what: "domain", id: domain.id() });
        }
        if !domain.tracks_dirty() {
            return Err(Error::NotTracking { domain: domain.id() });
        }
        let space = self.space();
        let Some((_, area)) = space.areas.get(iova) else { return Ok(false) };
        let page = Page::new(area.byte_of(iova) >> PAGE_LG2);
        // Held, the tables on the way stay.
        let _held = area.backing().lock(Span::one(page));
        Ok(domain.table().mark_dirty(iova))
    }

    fn visit_dirty(&self, domain: &Domain, span: Span<Iova>, clear: bool, mut sink: impl FnMut(Span<Iova>)) -> Result<(), Error> {
        let domains = self.read_domains();
        let Some(seat) = domains.seats.iter().find(|seat| std::ptr::eq(&*seat.domain, domain)) else {
            return Err(Error::NotAttached { what: "domain", id: domain.id() });
        };
        let mut edit = Edit::new();
        let slot = edit.slot(&seat.domain);
        for (found, area) in self.space().areas.overlapping(span) {
            let Some(part) = found.intersect(span) else { continue };
            let _held = area.backing().lock(area.page_span());
            let table = domain.table();
            let mut whole = true;
            if clear && part != found {
                let Some(pages) = area.pages_of(part) else { continue };
                let sizes = tables::leaf_sizes(domain, area.pages.neighbour_sizes(area, pages));
                // A rule that ties leaves to the secure world's sizes does not offer smaller ones.
                let may = sizes.smallest().is_some_and(|least| part.is_aligned(least.0)) && sync::fail::step("ioas.dirty_cut").is_ok();
                whole = tables::crossing(table, part) == [None; 2] || may && domain.cut(part, sizes, &mut slot.stock).is_ok();
            }
            if whole {
                table.read_dirty(part, clear, &mut slot.gather, |leaf| leaf.intersect(part).into_iter().for_each(&mut sink));
                continue;
            }
            // No table: what sticks out is reported and keeps its bit, what lies inside is read as asked.
            let mut nothing = Gather::new();
            let mut inner = Some(part);
            for leaf in tables::crossing(table, part).into_iter().flatten() {
                table.read_dirty(Span::one(leaf.iova.max(part.start())), false, &mut nothing, |leaf| {
                    leaf.intersect(part).into_iter().for_each(&mut sink);
                });
                inner = inner.and_then(|inner| inner.without(leaf.span()).into_iter().flatten().next());
            }
            if let Some(inner) = inner {
                table.read_dirty(inner, clear, &mut slot.gather, &mut sink);
            }
        }
        drop(domains);
        edit.flush();
        Ok(())
    }
}
