//! What an address space offers and how it is tuned: ranges, alignment, leaf sizes.

use crate::placement::Reservation;
use crate::{Error, Ioas, Place};
use addr::{Iova, Span, SpanError};
use std::sync::atomic::Ordering;

impl Ioas {
    /// Everything that is not reserved, ascending; mapped or not does not matter.
    pub fn ranges(&self) -> Vec<Span<Iova>> {
        self.space().ranges()
    }

    /// What IOVA, length and source offset of a mapping must be multiples of: 1 without a domain, the smallest leaf with one.
    pub fn alignment(&self) -> u64 {
        self.space().align()
    }

    /// Where `len` bytes whose source lies at `source`, a user address or an offset in a file, would go now.
    ///
    /// # Errors
    /// Those of placement: see [`Ioas::map_file`].
    pub fn room(&self, place: Place, len: u64, source: u64) -> Result<Span<Iova>, Error> {
        self.space().place(place, len, source)
    }

    /// Keeps automatic placement to these ranges, in place of those before; an empty list lifts the limit. Fixed places are not limited.
    ///
    /// # Errors
    /// `Span` for a range of one address, `AllowedOverlap`, `InUse` for a reserved range. The old list stays.
    pub fn allow(&self, list: &[Span<Iova>]) -> Result<(), Error> {
        if let Some(short) = list.iter().find(|span| span.last_offset() == 0) {
            return Err(SpanError::Empty { start: short.start().get() }.into());
        }
        self.space_mut().allow(list)
    }

    /// Keeps all mappings out of `span`, for example a device's interrupt window. May overlap what is reserved already.
    ///
    /// # Errors
    /// `InUse` when an area or an allowed range is there; no memory.
    pub fn reserve(&self, span: Span<Iova>) -> Result<Reservation, Error> {
        self.space_mut().reserve(span)
    }

    /// Gives a reserved range back.
    pub fn release(&self, reservation: Reservation) {
        self.space_mut().release(reservation);
    }

    /// Whether leaves may be larger than 4 KiB. They may at first.
    pub fn large_leaves(&self) -> bool {
        !self.policy.small_only.load(Ordering::Relaxed)
    }

    /// Allows or forbids leaves larger than 4 KiB. What is mapped keeps its leaves when they are allowed again.
    ///
    /// # Errors
    /// When forbidding: `LargeLeavesInUse` with areas in a domain, `InUse` when an area does not keep to whole pages.
    pub fn set_large_leaves(&self, on: bool) -> Result<(), Error> {
        // Excludes whoever reads the option while installing leaves.
        let domains = self.write_domains();
        if on == self.large_leaves() {
            return Ok(());
        }
        let mut space = self.space_mut();
        if !on && !domains.seats.is_empty() && !space.areas.is_empty() {
            return Err(Error::LargeLeavesInUse { areas: space.areas.len() });
        }
        space.set_align(self.align_for(&domains, on))?;
        self.policy.small_only.store(!on, Ordering::Relaxed);
        Ok(())
    }
}
