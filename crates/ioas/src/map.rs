//! Map: reserve the IOVA, install the leaves in every domain while the pages are held, publish. In between others find the area building.
//!
//! Tables for all areas and domains are in stock before the first leaf goes in, so a map that fails has usually changed nothing yet.

use crate::area::{Area, Part, Seats};
use crate::edit::Edit;
use crate::few::Few;
use crate::ioas::Domains;
use crate::pages::{self, Pages};
use crate::placement::{Place, Space};
use crate::tables::Need;
use crate::{Error, Ioas, Source};
use addr::{Address, Hva, Iova, Page, Span, SpanError};
use backing::{Backing, Kind};
use pt::Perm;
use std::sync::Arc;
use sync::fail;

impl Ioas {
    /// Maps `len` bytes from byte `offset` of a backing on. With no domain attached any byte will do; a domain needs whole pages
    /// (see [`Ioas::alignment`]). Cost grows with physically contiguous runs of equal page state, not with pages.
    ///
    /// # Errors
    /// `NoAccess`, `Span`, `Beyond`; those of placement: `Reserved`, `Occupied`, `NoRoom`, `TooLong`, `SourceMisaligned`; `Leaf` when
    /// tables ran out; no memory. Nothing is mapped then.
    pub fn map_file(&self, backing: &Arc<Backing>, offset: u64, len: u64, place: Place, perm: Perm) -> Result<Iova, Error> {
        let source = backing.file_offset().saturating_add(offset);
        self.map(backing, offset, len, source, place, perm)
    }

    /// Maps `len` bytes of a backing that is this process's memory, by the user address they begin at.
    ///
    /// # Errors
    /// As [`Ioas::map_file`], and `NoSuchHva`.
    pub fn map_user(&self, backing: &Arc<Backing>, hva: Hva, len: u64, place: Place, perm: Perm) -> Result<Iova, Error> {
        let offset = match backing.linear_hva() {
            Some(start) if backing.kind() == Kind::User && start <= hva => hva.offset_from(start),
            _ => return Err(Error::NoSuchHva { hva }),
        };
        self.map(backing, offset, len, hva.get(), place, perm)
    }

    /// Maps all of a source. With a domain attached, its pages are pinned and charged; without, nothing is touched, and what is wrong with them is
    /// found later (rule 16).
    ///
    /// # Errors
    /// As [`Ioas::map_file`]; `ReadOnlyPages` for writing to a source that was brought in for reading; `Pin`. Nothing is mapped then.
    pub fn map_source(&self, source: &Arc<Source>, place: Place, perm: Perm) -> Result<Iova, Error> {
        if perm == Perm::NONE {
            return Err(Error::NoAccess);
        }
        let (offset, len, size) = (source.offset_bytes(), source.len_bytes(), source.backing().len_bytes());
        if source.at().checked_add(len).is_none() {
            return Err(SpanError::Wraps { start: source.at(), len }.into());
        }
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(Error::Beyond { offset, len, size });
        }
        fail::step("ioas.pages")?;
        let pages = Arc::clone(source.pages());
        let part = Part { pages, source: Some(Arc::clone(source)), offset, len, writable: source.is_writable() };
        self.map_parts(Few::One([part]), source.at(), place, perm)
    }

    fn map(&self, backing: &Arc<Backing>, offset: u64, len: u64, source: u64, place: Place, perm: Perm) -> Result<Iova, Error> {
        if perm == Perm::NONE {
            return Err(Error::NoAccess);
        }
        if source.checked_add(len).is_none() {
            return Err(SpanError::Wraps { start: source, len }.into());
        }
        if offset.checked_add(len).is_none_or(|end| end > backing.len_bytes()) {
            return Err(Error::Beyond { offset, len, size: backing.len_bytes() });
        }
        fail::step("ioas.pages")?;
        let part = Part { pages: Pages::of(backing), source: None, offset, len, writable: perm.allows(Perm::WRITE) };
        self.map_parts(Few::One([part]), source, place, perm)
    }

    /// Maps parts one behind the other. All or nothing.
    pub(crate) fn map_parts(&self, parts: Few<Part>, source: u64, place: Place, perm: Perm) -> Result<Iova, Error> {
        let domains = self.read_domains();
        let areas = self.take_room(parts, source, place, perm)?;
        let mut edit = Edit::new();
        let (mut held, mut registered, mut installed) = (0, 0, 0);
        let shown = if domains.show() { &areas[..] } else { &[] };
        let done = (shown.iter().try_for_each(|area| area.hold().map(|()| held += 1)))
            .and_then(|()| reserve(&domains, &areas, &mut edit))
            .and_then(|()| areas.iter().try_for_each(|area| area.pages.register(area).map(|()| registered += 1)))
            .and_then(|()| areas.iter().try_for_each(|area| install(area, &domains.seats, &mut edit).map(|()| installed += 1)));
        if let Err(error) = done {
            let ticket = self.ticket();
            areas.iter().for_each(|area| area.abandon(ticket));
            for area in &areas[..installed] {
                uninstall(area, &mut edit);
            }
            edit.flush();
            for area in &areas[..registered] {
                area.pages.unregister(area);
            }
            areas[..held].iter().for_each(|area| area.release());
            let mut space = self.space_mut();
            for area in &*areas {
                space.areas.remove(area.span().start());
            }
            return Err(error);
        }
        // Where a large leaf replaced an empty table, that waits for its readers.
        edit.flush();
        areas.iter().for_each(|area| area.publish());
        Ok(areas[0].span().start())
    }

    /// Finds room and puts building areas there.
    fn take_room(&self, parts: Few<Part>, source: u64, place: Place, perm: Perm) -> Result<Few<Arc<Area>>, Error> {
        let too_long = Error::TooLong { len: u64::MAX };
        let len = parts.iter().try_fold(0u64, |sum, part| sum.checked_add(part.len)).ok_or(too_long)?;
        fail::step("ioas.room")?;
        let mut space = self.space_mut();
        let room = space.place(place, len, source)?;
        space.areas.reserve(parts.len())?;
        let mut at = room.start();
        let areas = parts.try_map(|part| {
            let span = Span::from_len(at, part.len)?;
            check_part(&space, span, &part, perm)?;
            at = Iova::new(span.last().get().wrapping_add(1));
            Ok::<_, Error>(Arc::new(Area::new(span, part, perm, &self.policy, Arc::clone(&self.no_seats))))
        })?;
        for area in &*areas {
            // The room is free and the tree has reserved its nodes.
            let inserted = space.areas.insert(area.span(), Arc::clone(area));
            debug_assert!(inserted.is_ok(), "{inserted:?} in free room");
        }
        Ok(areas)
    }
}

fn check_part(space: &Space, span: Span<Iova>, part: &Part, perm: Perm) -> Result<(), Error> {
    if perm.allows(Perm::WRITE) && !part.writable {
        return Err(Error::ReadOnlyPages { span });
    }
    let align = space.align();
    if !part.len.is_multiple_of(align) {
        let align_lg2 = align.trailing_zeros() as u8;
        return Err(SpanError::Misaligned { start: span.start().get(), len: part.len, align_lg2 }.into());
    }
    if !part.offset.is_multiple_of(align) {
        return Err(Error::SourceMisaligned { offset: part.offset, align });
    }
    Ok(())
}

/// Tables for all of it, so that nothing is installed when there are too few. One run in one domain does that by itself.
fn reserve(domains: &Domains, areas: &[Arc<Area>], edit: &mut Edit) -> Result<(), Error> {
    let alone = matches!((areas, &*domains.seats), ([area], [_]) if is_one_run(area));
    for seat in domains.seats.iter() {
        let slot = edit.prepare(&seat.domain)?;
        for area in areas.iter().filter(|_| !alone) {
            let mut need = Need::new(&seat.domain, area.span());
            // Runs of scattered frames are as many as pages, so stop where the general bound is the better one.
            let _counted = area.each_run(area.page_span(), |iova, oa, sizes| {
                need.add(iova, oa, sizes);
                if need.is_full() { Err(()) } else { Ok(()) }
            });
            slot.reserve(need.tables())?;
        }
    }
    Ok(())
}

fn is_one_run(area: &Area) -> bool {
    let mut runs = 0;
    let counted = area.each_run(area.page_span(), |_, _, _| {
        runs += 1;
        if runs > 1 { Err(()) } else { Ok(()) }
    });
    counted.is_ok()
}

/// Gives a building area its seats, and installs it there. On an error it is as before.
fn install(area: &Area, seats: &Seats, edit: &mut Edit) -> Result<(), Error> {
    let whole = area.page_span();
    let _held = area.backing().lock(whole);
    for (index, seat) in seats.iter().enumerate() {
        let Err(failure) = pages::fill_part(area, whole, edit.slot(&seat.domain)) else { continue };
        let touched = seats.iter().take(index + usize::from(failure.runs_before > 0));
        touched.for_each(|seat| area.pages.clear_part(area, whole, edit.slot(&seat.domain)));
        // Devices may have found the leaves: they are gone for everyone before the pages are let go.
        edit.flush();
        return Err(failure.error);
    }
    area.set_seats(Arc::clone(seats));
    Ok(())
}

/// Takes an area's leaves out. It stays listed, closed, until the flush: whoever changes its pages before that flushes its domains too.
pub(crate) fn uninstall(area: &Area, edit: &mut Edit) {
    let whole: Span<Page> = area.page_span();
    let _held = area.backing().lock(whole);
    for seat in area.seats().iter() {
        area.pages.clear_part(area, whole, edit.slot(&seat.domain));
    }
}
