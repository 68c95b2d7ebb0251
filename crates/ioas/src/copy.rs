//! Copy: the same pages once more, in this or another address space.

use crate::area::{Area, AreaState, Part};
use crate::few::Few;
use crate::placement::Place;
use crate::{Error, Ioas};
use addr::{Iova, OutOfMemory, Span};
use backing::Kind;
use pt::Perm;
use std::sync::Arc;

impl Ioas {
    /// Maps here what `src_span` of `src` stands for: one area for each that the span touches, with `perm` of its own. `src` may be
    /// this very address space. The span may begin and end anywhere, without a gap in between.
    ///
    /// # Errors
    /// `NoAccess`; `NotMapped` for a gap, or an area being built or removed; `ReadOnlyPages`; otherwise as [`Ioas::map_file`].
    pub fn copy(&self, src: &Self, src_span: Span<Iova>, place: Place, perm: Perm) -> Result<Iova, Error> {
        if perm == Perm::NONE {
            return Err(Error::NoAccess);
        }
        // Source, range, destination, in this order. The locks of the two address spaces are never held together.
        let (parts, source) = src.parts(src_span)?;
        self.map_parts(Few::Many(parts), source, place, perm)
    }

    /// What the areas in `span` stand for, and where the first byte comes from.
    fn parts(&self, span: Span<Iova>) -> Result<(Vec<Part>, u64), Error> {
        let mut parts = Vec::new();
        let mut source = 0;
        let space = self.space();
        for (piece, area) in space.areas.runs(span) {
            let Some(area) = area.filter(|area| area.state() == AreaState::Live) else { return Err(Error::NotMapped { at: piece }) };
            let offset = area.byte_of(piece.start());
            if parts.is_empty() {
                source = origin(area, offset);
            }
            sync::fail::step("ioas.part")?;
            parts.try_reserve(1).map_err(|_| OutOfMemory)?;
            parts.push(Part {
                pages: Arc::clone(&area.pages),
                source: area.source.clone(),
                offset,
                len: piece.len(),
                writable: area.writable,
            });
        }
        Ok((parts, source))
    }
}

/// Where the mapper has byte `offset` of an area's backing.
fn origin(area: &Area, offset: u64) -> u64 {
    if let Some(source) = area.source() {
        return source.at().wrapping_add(offset - source.offset_bytes());
    }
    let backing = area.backing();
    let base = match backing.linear_hva() {
        Some(hva) if backing.kind() == Kind::User => hva.get(),
        _ => backing.file_offset(),
    };
    base.saturating_add(offset)
}
