//! Where a mapping may go: areas, reserved ranges, allowed ranges, alignment. The observable rules are those of the kernel's
//! iommufd (`io_pagetable.c`), so that a program sees no difference.

use crate::{Area, Error};
use addr::{Address, Handle, IntervalTree, Iova, PAGE_BYTES, Span, SpanError, SpanMap};
use std::sync::Arc;

/// Where a mapping shall go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Exactly here. The allowed ranges do not matter.
    Fixed(Iova),
    /// At the lowest free place inside the allowed ranges. After many holes that are long enough and not aligned, at the lowest that is long enough
    /// wherever it begins, so that a search costs no more where there are many holes.
    Auto,
}

/// A reserved range, as long as it is kept; give it back with [`crate::Ioas::release`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Reservation(Handle);

/// The most that automatic placement aligns to: the size of a transparent huge page.
const MOST_ALIGN: u64 = 2 << 20;

/// Holes that are long enough, and where nothing fits for want of alignment, that a search looks at before it asks for more room.
const MISFITS: u32 = 32;

/// Who is where.
#[derive(Debug)]
pub(crate) struct Space {
    pub(crate) areas: SpanMap<Iova, Arc<Area>>,
    reserved: IntervalTree<Iova, ()>,
    allowed: SpanMap<Iova, ()>,
    /// What IOVA, length and source offset must be multiples of: 1 without a domain.
    align: u64,
}

impl Space {
    pub(crate) fn new() -> Self {
        Self { areas: SpanMap::new(), reserved: IntervalTree::new(), allowed: SpanMap::new(), align: 1 }
    }

    pub(crate) fn align(&self) -> u64 {
        self.align
    }

    /// Finds the span for `len` bytes whose source lies at `source`: a user address, or an offset in a file.
    pub(crate) fn place(&self, place: Place, len: u64, source: u64) -> Result<Span<Iova>, Error> {
        if len == 0 || !len.is_multiple_of(self.align) {
            let start = if let Place::Fixed(at) = place { at.get() } else { 0 };
            return Err(match len {
                0 => SpanError::Empty { start },
                _ => self.misaligned(start, len),
            }
            .into());
        }
        let span = match place {
            Place::Fixed(at) => self.check(at, len)?,
            Place::Auto => self.search(len, source)?,
        };
        Ok(span)
    }

    fn misaligned(&self, start: u64, len: u64) -> SpanError {
        SpanError::Misaligned { start, len, align_lg2: self.align.trailing_zeros() as u8 }
    }

    fn check(&self, at: Iova, len: u64) -> Result<Span<Iova>, Error> {
        if !at.get().is_multiple_of(self.align) {
            return Err(self.misaligned(at.get(), len).into());
        }
        let span = Span::from_len(at, len)?;
        if let Some((reserved, ())) = self.reserved.overlapping(span).next() {
            return Err(Error::Reserved { span, reserved });
        }
        match self.areas.overlapping(span).next() {
            Some((area, _)) => Err(Error::Occupied { span, area }),
            None => Ok(span),
        }
    }

    fn search(&self, len: u64, source: u64) -> Result<Span<Iova>, Error> {
        if len >= u64::MAX / 2 {
            return Err(Error::TooLong { len });
        }
        let lowest_bit = if source == 0 { u64::MAX } else { 1 << source.trailing_zeros() };
        let align = len.next_power_of_two().min(lowest_bit).min(MOST_ALIGN);
        if align < self.align {
            return Err(Error::SourceMisaligned { offset: source, align: self.align });
        }
        let in_page = source % PAGE_BYTES;
        let fits = |gap: Span<Iova>| {
            self.holes(gap).find_map(|hole| {
                let start = hole.start().get().checked_next_multiple_of(align)? | in_page;
                let room = hole.last().get().checked_sub(start).filter(|room| *room > 0)?;
                (room >= len - 1).then(|| Iova::new(start))
            })
        };
        // Here something fits wherever the hole begins.
        let ample = len + (align - 1) + in_page;
        let find = |within: Span<Iova>| first_fit(&self.areas, within, [len, ample], fits);
        let anywhere = Span::of(Iova::new(PAGE_BYTES), Iova::new(u64::MAX - PAGE_BYTES));
        let start = if self.allowed.is_empty() {
            find(anywhere)
        } else {
            self.allowed.iter().filter_map(|(allowed, ())| allowed.intersect(anywhere)).find_map(find)
        };
        Ok(Span::from_len(start.ok_or(Error::NoRoom { len, align })?, len)?)
    }

    /// What of `span` is not reserved, ascending.
    fn holes(&self, span: Span<Iova>) -> impl Iterator<Item = Span<Iova>> + '_ {
        let mut reserved = self.reserved.overlapping(span);
        let mut next = Some(span.start());
        std::iter::from_fn(move || {
            loop {
                let from = next?;
                match reserved.next() {
                    // Reserved ranges may overlap; those that begin below `from` only push it up.
                    Some((found, ())) => {
                        next = found.last().checked_add(1).map(|after| after.max(from)).filter(|after| *after <= span.last());
                        if found.start() > from {
                            return Some(Span::of(from, Iova::new(found.start().get() - 1)));
                        }
                    }
                    None => {
                        next = None;
                        return Some(Span::of(from, span.last()));
                    }
                }
            }
        })
    }

    /// Everything that is not reserved, ascending; areas do not matter (rule 29).
    pub(crate) fn ranges(&self) -> Vec<Span<Iova>> {
        self.holes(Span::whole()).collect()
    }

    /// Keeps automatic placement to `list`, or with an empty list to nothing (rule 30).
    pub(crate) fn allow(&mut self, list: &[Span<Iova>]) -> Result<(), Error> {
        let mut allowed = SpanMap::new();
        for &span in list {
            allowed.insert(span, ()).map_err(|error| match error {
                addr::OverlapError::Overlaps { span, .. } => Error::AllowedOverlap { span },
                addr::OverlapError::OutOfMemory(error) => error.into(),
            })?;
        }
        if let Some((reserved, ())) = list.iter().find_map(|span| self.reserved.overlapping(*span).next()) {
            return Err(Error::InUse { what: "the allowed range", span: reserved });
        }
        self.allowed = allowed;
        Ok(())
    }

    /// Keeps mappings out of `span` (rule 31).
    pub(crate) fn reserve(&mut self, span: Span<Iova>) -> Result<Reservation, Error> {
        let area = self.areas.overlapping(span).next().map(|(found, _)| found);
        let taken = area.or_else(|| self.allowed.overlapping(span).next().map(|(found, ())| found));
        match taken {
            Some(span) => Err(Error::InUse { what: "the reserved range", span }),
            None => Ok(Reservation(self.reserved.insert(span, ())?)),
        }
    }

    pub(crate) fn release(&mut self, reservation: Reservation) {
        self.reserved.remove(reservation.0);
    }

    /// Raises or lowers the alignment. Raising it needs every area to fit (rule 33).
    pub(crate) fn set_align(&mut self, align: u64) -> Result<(), Error> {
        if align > self.align {
            let fits = |area: &Area| {
                area.span().is_aligned(align.trailing_zeros() as u8) && (area.offset_bytes() % PAGE_BYTES).is_multiple_of(align)
            };
            if let Some((span, _)) = self.areas.iter().find(|(_, area)| !fits(area)) {
                return Err(Error::InUse { what: "the new alignment", span });
            }
        }
        self.align = align;
        Ok(())
    }
}

/// Where `fits` answers: in the lowest gap of at least `len` or, when it has refused [`MISFITS`] of these, of at least `ample`. Only where no gap is ample are
/// all looked at.
fn first_fit<V>(
    areas: &SpanMap<Iova, V>,
    within: Span<Iova>,
    [len, ample]: [u64; 2],
    fits: impl Fn(Span<Iova>) -> Option<Iova>,
) -> Option<Iova> {
    let (mut misfits, mut found) = (0, None);
    areas.first_gap(within, len, |gap| {
        found = fits(gap);
        misfits += 1;
        // Any answer ends the search.
        found.or((misfits >= MISFITS).then_some(gap.start()))
    });
    if found.is_some() || misfits < MISFITS {
        return found;
    }
    areas.first_gap(within, ample, &fits).or_else(|| areas.first_gap(within, len, &fits))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    fn span(start: u64, last: u64) -> Span<Iova> {
        Span::of(Iova::new(start), Iova::new(last))
    }

    #[test]
    fn holes_between_overlapping_reservations() {
        let mut space = Space::new();
        for (start, last) in [(0, 9), (5, 7), (20, 29), (25, 39), (100, u64::MAX)] {
            space.reserve(span(start, last)).unwrap();
        }
        assert_eq!(space.ranges(), [span(10, 19), span(40, 99)]);
        assert_eq!(space.holes(span(15, 45)).collect::<Vec<_>>(), [span(15, 19), span(40, 45)]);
        assert_eq!(space.holes(span(100, 200)).count(), 0);
    }

    #[test]
    fn automatic_places_follow_the_source() {
        let mut space = Space::new();
        let auto = |space: &Space, len, source| space.place(Place::Auto, len, source).map(|found| found.start().get());
        assert_eq!(auto(&space, 0x1000, 0).unwrap(), 0x1000, "IOVA 0 is never chosen");
        assert_eq!(auto(&space, 4 << 20, 0).unwrap(), 2 << 20);
        assert_eq!(auto(&space, 4 << 20, 0x8000).unwrap(), 0x8000);
        assert_eq!(auto(&space, 0x10, 0x7654_3218).unwrap(), 0x1218, "the source's place in its page is kept");
        space.reserve(span(0x1000, 0x8fff)).unwrap();
        assert_eq!(auto(&space, 0x1000, 0).unwrap(), 0x9000);
        space.allow(&[span(0xa000, 0xafff), span(0x2_0000, 0x2_ffff)]).unwrap();
        assert_eq!(auto(&space, 0x2000, 0).unwrap(), 0x2_0000);
        assert!(matches!(auto(&space, 0x2_0000, 0), Err(Error::NoRoom { .. })));
        assert!(matches!(auto(&space, u64::MAX / 2, 0), Err(Error::TooLong { .. })));
        space.set_align(0x1000).unwrap();
        assert!(matches!(auto(&space, 0x1000, 0x800), Err(Error::SourceMisaligned { .. })));
    }

    /// Areas that leave holes of 8 KiB, none of which begins on 8 KiB: room for 8 KiB is found without a look at all of them.
    #[test]
    fn holes_that_do_not_fit_are_not_all_looked_at() {
        const K4: u64 = 4096;
        let looks = Cell::new(0);
        let fits = |gap: Span<Iova>| {
            looks.set(looks.get() + 1);
            let start = gap.start().get().checked_next_multiple_of(2 * K4)?;
            (gap.last().get().checked_sub(start)? >= 2 * K4 - 1).then(|| Iova::new(start))
        };
        let mut areas = SpanMap::new();
        let mut last = 0;
        for count in [10, 100_000] {
            for index in areas.len() as u64..count {
                last = (4 * index + 5) * K4 - 1;
                areas.insert(span((4 * index + 3) * K4, last), ()).unwrap();
            }
            let search = |within| {
                looks.set(0);
                let found = first_fit(&areas, within, [2 * K4, 3 * K4 - 1], fits);
                (found.map(Iova::get), looks.get())
            };
            let behind = (last + 1).next_multiple_of(2 * K4);
            let (found, looks) = search(span(K4, u64::MAX));
            assert_eq!(found, Some(behind), "{count} areas");
            assert!(looks <= MISFITS + 4, "{looks} looks among {count} areas");
            // Nothing fits at all, which takes a look at all that is long enough to be sure.
            assert_eq!(search(span(K4, last)), (None, if count > 10 { MISFITS + count as u32 } else { count as u32 }));
            // What fits below the first misfits is still the lowest.
            assert_eq!(search(span(0, u64::MAX)).0, Some(0));
        }
    }
}
