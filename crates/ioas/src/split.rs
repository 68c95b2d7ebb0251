//! Split: one area becomes two that say the same, while devices go on using both halves. What VFIO's first type of container does before it
//! unmaps a part of a mapping.

use crate::area::{Area, AreaState, Part};
use crate::edit::Edit;
use crate::{Error, Ioas, tables};
use addr::{Iova, PAGE_BYTES, Span, SpanError};
use iommu::Domain;
use pt::Leaf;
use std::sync::Arc;
use sync::fail;

impl Ioas {
    /// Makes `at` the first byte of an area: the area around it becomes two, which share its source. Leaves that cross are cut, so DMA to either
    /// half never misses. Nothing happens when an area begins at `at` already.
    ///
    /// # Errors
    /// `NotMapped`; `Busy` for an area in the making, going, or locked; `DeviceMemory`; `Span` when `at` does not keep to the alignment;
    /// `Pinned`; `Uncuttable` when the rule ties the leaf's size to something else; no table, no memory.
    pub fn split(&self, at: Iova) -> Result<(), Error> {
        let domains = self.read_domains();
        let mut space = self.space_mut();
        let Some(area) = space.areas.get(at).map(|(_, area)| Arc::clone(area)) else {
            return Err(Error::NotMapped { at: Span::one(at) });
        };
        let whole = area.span();
        if whole.start() == at {
            return Ok(());
        }
        if area.state() != AreaState::Live || area.locks() > 0 || area.is_shut() {
            return Err(Error::Busy { area: whole });
        }
        if area.is_device() {
            return Err(Error::DeviceMemory { area: whole });
        }
        let align = space.align();
        if !at.get().is_multiple_of(align) || !area.byte_of(at).is_multiple_of(align.min(PAGE_BYTES)) {
            let align_lg2 = align.trailing_zeros() as u8;
            return Err(SpanError::Misaligned { start: at.get(), len: whole.last().get() - at.get(), align_lg2 }.into());
        }
        if area.pins() > 0 {
            return Err(Error::Pinned { area: whole });
        }
        let low = Span::of(whole.start(), Iova::new(at.get() - 1));
        let high = Span::of(at, whole.last());
        fail::step("ioas.split")?;
        space.areas.reserve(1)?;
        let [low, high] = [low, high].map(|span| {
            let part = Part {
                pages: Arc::clone(&area.pages),
                source: area.source.clone(),
                offset: area.byte_of(span.start()),
                len: span.len(),
                writable: area.writable,
            };
            let half = Arc::new(Area::new(span, part, area.perm, &self.policy, Arc::clone(&self.no_seats)));
            half.publish();
            half
        });
        let holds = [low.page_span(), high.page_span()];
        let source = area.source().filter(|_| domains.show());
        source.map_or(Ok(()), |source| source.split_hold(area.page_span(), holds))?;
        if let Err(error) = replace(&area, [&low, &high]) {
            source.into_iter().for_each(|source| source.join_hold(holds, area.page_span()));
            return Err(error);
        }
        space.areas.remove(whole.start());
        for half in [low, high] {
            let inserted = space.areas.insert(half.span(), half);
            debug_assert!(inserted.is_ok(), "{inserted:?} in the place of the whole");
        }
        // Whoever found the whole before looks again.
        area.abandon(self.ticket());
        Ok(())
    }
}

/// Lists the halves and cuts the leaves, while the pages are held.
fn replace(area: &Area, halves: [&Arc<Area>; 2]) -> Result<(), Error> {
    let _held = area.backing().lock(area.page_span());
    let seats = area.seats();
    let low = halves[0].span();
    let Some(pages) = area.pages_of(low) else { return Ok(()) };
    let rule = area.pages.neighbour_sizes(area, pages);
    let mut edit = Edit::new();
    // All that may fail comes first.
    for seat in seats.iter() {
        let Some(leaf) = crossed(&seat.domain, low) else { continue };
        let at = halves[1].span().start();
        let smallest = tables::leaf_sizes(&seat.domain, rule).smallest();
        if !smallest.is_some_and(|least| at.get().is_multiple_of(least.bytes())) {
            return Err(Error::Uncuttable { at, leaf: leaf.span() });
        }
        edit.prepare(&seat.domain)?.reserve(seat.domain.table().tables_for_cut())?;
    }
    halves.iter().for_each(|half| half.set_seats(Arc::clone(&seats)));
    area.pages.replace(area, halves)?;
    for seat in seats.iter().filter(|seat| crossed(&seat.domain, low).is_some()) {
        let slot = edit.slot(&seat.domain);
        let done = slot.domain.cut(low, tables::leaf_sizes(&seat.domain, rule), &mut slot.stock);
        debug_assert!(done.is_ok(), "{done:?} with tables in stock");
    }
    Ok(())
}

/// The leaf that answers on both sides of the border of `low`. An area's leaves never cross its own borders, so there is one at most.
fn crossed(domain: &Domain, low: Span<Iova>) -> Option<Leaf> {
    tables::crossing(domain.table(), low).into_iter().flatten().next()
}
