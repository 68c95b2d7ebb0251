//! The pages' side: for one backing, every area of every IOAS that lies over it. Revocation and conversion come from here, hold the
//! span lock of the pages and no lock of any IOAS (D-3, I-12).
//!
//! A change to a batch of pages, possibly of several backings, is a sequence of plain calls that share one [`Edit`]; the caller holds the
//! pages from the first to the last:
//!
//! 1. [`Pages::reserve`]: all tables that the later steps need. May fail; nothing has changed.
//! 2. [`Pages::clear`]: cuts leaves that cross a border, then takes the leaves out. Cannot fail.
//! 3. [`Edit::flush`]: once for the batch. When it returns no device reaches the pages (I-4).
//! 4. whatever the change is about: page states, owner, content.
//! 5. [`Pages::fill`]: maps what each IOAS's rule allows now. Cannot fail after a sufficient reserve.
//! 6. [`Pages::merge`], over a span that may be wider and is held as well, and [`Edit::flush`] again.

use crate::area::{Area, AreaState};
use crate::edit::Slot;
use crate::listing::Listing;
use crate::tables::Need;
use crate::{Edit, Error, tables};
use addr::{Address, Lg2, PAGE_BYTES, Page, SizeSet, Span};
use backing::{Backing, Listener, RestoreError, SpanGuard};
use iommu::Domain;
use std::fmt;
use std::sync::{Arc, PoisonError, Weak};
use sync::prim::{
    RwLock, RwLockReadGuard,
    atomic::{AtomicU64, Ordering},
};

/// Every area over the pages of one backing.
///
/// As the backing's listener it panics when a thread that holds a zero-copy slice of one of the domains punches the pages itself: it would
/// wait for itself.
pub struct Pages {
    backing: Arc<Backing>,
    areas: RwLock<Listing>,
    shed: AtomicU64,
}

impl Pages {
    /// Those of `backing`, which lists them as a listener from then on. All IOASes of the process share them.
    pub fn of(backing: &Arc<Backing>) -> Arc<Self> {
        backing.companion(|| {
            let pages = Arc::new(Self { backing: Arc::clone(backing), areas: RwLock::default(), shed: AtomicU64::new(0) });
            let listener: Weak<Self> = Arc::downgrade(&pages);
            backing.add_listener(listener);
            pages
        })
    }

    /// Whose pages.
    pub fn backing(&self) -> &Arc<Backing> {
        &self.backing
    }

    /// The areas over `pages`, of all IOASes, by ascending first page.
    pub fn areas_over(&self, pages: Span<Page>) -> Vec<Arc<Area>> {
        self.read().overlapping(pages).map(|(_, area)| Arc::clone(area)).collect()
    }

    /// Whether an area is over these pages still. Until it is not, nobody else has its IOVAs.
    pub fn lists(&self, area: &Area) -> bool {
        self.read().overlapping(area.page_span()).any(|(_, own)| std::ptr::eq(Arc::as_ptr(own), area))
    }

    /// How many leaves were taken out whole because no table could be had to cut them (D-5). Their other pages have lost
    /// their translation in that domain until they are mapped anew.
    pub fn leaves_shed(&self) -> u64 {
        self.shed.load(Ordering::Relaxed)
    }

    /// Puts the tables into `edit` that [`Pages::clear`] and [`Pages::fill`] over `pages` can need, in every domain. Leaves of
    /// `finest` and below are reckoned with: give 4 KiB unless larger leaves are sure to be used wherever they fit.
    ///
    /// # Errors
    /// No table, no memory. What was reserved stays in the edit.
    pub fn reserve(&self, pages: Span<Page>, finest: Lg2, edit: &mut Edit) -> Result<(), Error> {
        for (part, area) in self.read().overlapping(pages) {
            let Some(part) = part.intersect(pages) else { continue };
            for seat in area.seats().iter().filter(|seat| !seat.is_leaving()) {
                let slot = edit.prepare(&seat.domain)?;
                let needed = tables_for(&seat.domain, area, part, finest);
                slot.reserve(needed)?;
            }
        }
        Ok(())
    }

    /// Takes every leaf over `pages` out, in all domains, and nothing else: leaves that stick out are cut first. Cannot fail: where no table can
    /// be had for the cut, the whole leaf goes (D-5, [`Pages::leaves_shed`]). Old translations may be in use until [`Edit::flush`].
    pub fn clear(&self, pages: Span<Page>, edit: &mut Edit) {
        for (part, area) in self.read().overlapping(pages) {
            let Some(part) = part.intersect(pages) else { continue };
            for seat in area.seats().iter() {
                let slot = edit.slot(&seat.domain);
                if !seat.is_leaving() {
                    self.clear_part(area, part, slot);
                } else if let Some(iova) = area.iova_of(part) {
                    // The detach has taken the leaves out; its flush may be still to come, and ours must not depend on it.
                    slot.gather.add(iova);
                }
            }
        }
    }

    /// Has devices forget what they have cached of `pages`, in all domains; the leaves stay. When [`Edit::flush`] has returned, every access
    /// begins anew.
    pub fn invalidate(&self, pages: Span<Page>, edit: &mut Edit) {
        for (part, area) in self.read().overlapping(pages) {
            let Some(iova) = part.intersect(pages).and_then(|part| area.iova_of(part)) else { continue };
            for seat in area.seats().iter() {
                edit.slot(&seat.domain).gather.add(iova);
            }
        }
    }

    /// [`Pages::clear`] for one area in one domain.
    pub(crate) fn clear_part(&self, area: &Area, part: Span<Page>, slot: &mut Slot) {
        let Some(iova) = area.iova_of(part) else { return };
        let table = slot.domain.table();
        // Leaves never cross two areas, so only a part has borders to cut.
        if iova != area.span() && tables::crossing(table, iova).iter().any(Option::is_some) {
            let sizes = tables::leaf_sizes(&slot.domain, self.neighbour_sizes(area, part));
            if slot.domain.cut(iova, sizes, &mut slot.stock).is_err() {
                for leaf in tables::crossing(table, iova).into_iter().flatten() {
                    let at = leaf.iova.max(iova.start());
                    if table.shed(at, &mut slot.gather).is_some() {
                        self.shed.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
        }
        let crossing = table.unmap(iova, &mut slot.gather);
        debug_assert!(crossing.is_none(), "{crossing:?} crosses the borders of {iova} after the cut");
    }

    /// The leaf sizes that what is left of a leaf may have, left and right of `part`: its pages are in the state they were mapped in.
    pub(crate) fn neighbour_sizes(&self, area: &Area, part: Span<Page>) -> SizeSet {
        let all = area.page_span();
        let before = part.start().get().checked_sub(1).map(Page::new);
        let after = part.last().checked_add(1);
        [before, after].into_iter().flatten().filter(|page| all.contains(*page)).fold(area.policy.sizes(), |sizes, page| {
            let answer = area.policy.rule.leaf(&self.backing, Span::one(page), self.backing.state(page)).1;
            answer.map_or(sizes, |own| sizes.and(own))
        })
    }

    /// Cuts the leaves that answer for the borders of `pages`, and the one that is all of `pages`, into leaves of `sizes`. Hitless, but
    /// in a domain whose format needs break-before-make ([`Domain::cut`]); nothing is left to be flushed. Tables come from the edit's reserve.
    ///
    /// # Errors
    /// No table. Every translation is as before.
    pub fn cut(&self, pages: Span<Page>, sizes: SizeSet, edit: &mut Edit) -> Result<(), Error> {
        for (part, area) in self.read().overlapping(pages) {
            let Some(iova) = part.intersect(pages).and_then(|part| area.iova_of(part)) else { continue };
            for seat in area.seats().iter().filter(|seat| !seat.is_leaving()) {
                let slot = edit.slot(&seat.domain);
                slot.domain.cut(iova, tables::leaf_sizes(&slot.domain, sizes), &mut slot.stock)?;
            }
        }
        Ok(())
    }

    /// Maps what each IOAS's rule allows for `pages`, which have no leaves, in their present states.
    ///
    /// # Errors
    /// No table. Then all of `pages` has no leaf again; flush before the pages change hands.
    pub fn fill(&self, pages: Span<Page>, edit: &mut Edit) -> Result<(), Error> {
        let filled = self.read().overlapping(pages).try_for_each(|(part, area)| {
            let Some(part) = part.intersect(pages) else { return Ok(()) };
            if area.state() == AreaState::Closing {
                return Ok(());
            }
            let seats = area.seats();
            let mut staying = seats.iter().filter(|seat| !seat.is_leaving());
            staying.try_for_each(|seat| fill_part(area, part, edit.slot(&seat.domain)))
        });
        filled.map_err(|failure| {
            self.clear(pages, edit);
            failure.error
        })
    }

    /// Joins leaves over `pages` into larger ones, where pages are in a row, in one state, and the rule allows it. Hitless; a
    /// domain whose format cannot do that keeps its leaves ([`Domain::merge`]). The caller holds all of `pages` until it has called [`Edit::flush`].
    pub fn merge(&self, pages: Span<Page>, edit: &mut Edit) {
        for (part, area) in self.read().overlapping(pages) {
            let Some(part) = part.intersect(pages) else { continue };
            for seat in area.seats().iter().filter(|seat| !seat.is_leaving()) {
                let slot = edit.slot(&seat.domain);
                let merged = area.each_run(part, |iova, _, sizes| {
                    slot.domain.merge(iova, tables::leaf_sizes(&slot.domain, sizes), &mut slot.gather);
                    Ok::<_, std::convert::Infallible>(())
                });
                match merged {
                    Ok(()) => {}
                }
            }
        }
    }

    /// Adds an area. As long as it has no seat, nobody touches a leaf for it.
    pub(crate) fn register(&self, area: &Arc<Area>) -> Result<(), Error> {
        sync::fail::step("ioas.register")?;
        let mut areas = self.areas.write().unwrap_or_else(PoisonError::into_inner);
        areas.insert(area)?;
        Ok(())
    }

    /// Takes an area out whose leaves are gone and flushed.
    pub(crate) fn unregister(&self, area: &Area) {
        let mut areas = self.areas.write().unwrap_or_else(PoisonError::into_inner);
        let gone = areas.remove(area);
        drop(areas);
        drop(gone);
    }

    /// Puts two areas in the place of one that they make up. The caller holds the pages.
    pub(crate) fn replace(&self, whole: &Area, halves: [&Arc<Area>; 2]) -> Result<(), Error> {
        sync::fail::step("ioas.register")?;
        let mut areas = self.areas.write().unwrap_or_else(PoisonError::into_inner);
        areas.reserve(halves.len())?;
        for half in halves {
            areas.insert(half)?;
        }
        let gone = areas.remove(whole);
        drop(areas);
        drop(gone);
        Ok(())
    }

    fn read(&self) -> RwLockReadGuard<'_, Listing> {
        self.areas.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The tables that clearing and filling a part of an area in one domain can need.
fn tables_for(domain: &Domain, area: &Area, part: Span<Page>, finest: Lg2) -> u32 {
    let Some(iova) = area.iova_of(part) else { return 0 };
    let (table, format) = (domain.table(), domain.format());
    let crosses = tables::crossing(table, iova).iter().any(Option::is_some);
    let cut = if crosses { table.tables_for_cut() } else { 0 };
    // What one table of smallest leaves serves.
    let block = Span::block(iova.start(), format.item_lg2(1));
    if block.covers(iova) && block != iova {
        // The table that a cut makes, or that is here already, stays when the leaves go: nobody else holds all that it serves.
        return cut + if crosses { 0 } else { tables::missing(table, iova.start()) };
    }
    let mut need = Need::new(domain, iova);
    let sizes = SizeSet::ALL.up_to(finest);
    for (run, oa) in area.backing().extents(part) {
        if let Some(at) = area.iova_of(run) {
            need.add(at, oa.plus(area.byte_of(at.start()) % PAGE_BYTES), sizes);
        }
        if need.is_full() {
            break;
        }
    }
    cut + need.tables()
}

/// Why a part could not be filled.
pub(crate) struct Unfilled {
    pub(crate) error: Error,
    /// Runs that went in before: 0 means that there is nothing to take out.
    pub(crate) runs_before: u64,
}

/// Installs the leaves of a part of an area in one domain.
pub(crate) fn fill_part(area: &Area, part: Span<Page>, slot: &mut Slot) -> Result<(), Unfilled> {
    let mut runs_before = 0;
    area.each_run(part, |iova, oa, sizes| {
        slot.domain.table().map(iova, oa, area.perm(), tables::leaf_sizes(&slot.domain, sizes), &mut slot.stock, &mut slot.gather)?;
        runs_before += 1;
        Ok(())
    })
    .map_err(|error: pt::MapError| Unfilled { error: error.into(), runs_before })
}

impl Listener for Pages {
    fn revoke(&self, pages: Span<Page>, held: &SpanGuard<'_>) {
        debug_assert!(held.covers(pages));
        let mut edit = Edit::new();
        self.clear(pages, &mut edit);
        edit.flush();
    }

    fn restore(&self, pages: Span<Page>, held: &SpanGuard<'_>) -> Result<(), RestoreError> {
        debug_assert!(held.covers(pages));
        let mut edit = Edit::new();
        let filled = self.reserve(pages, Lg2::G1, &mut edit).and_then(|()| self.fill(pages, &mut edit));
        edit.flush();
        Ok(filled?)
    }
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pages").field("backing", &self.backing.id()).field("areas", &self.read().len()).finish_non_exhaustive()
    }
}
