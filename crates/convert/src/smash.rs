//! Splitting 2 MiB entries ahead of a use that cannot show them whole: an area that begins inside of one, or shows it at an address of another
//! alignment.

use crate::switch;
use addr::{Lg2, Page, SizeSet, Span};
use backing::{Backing, PageState};
use ioas::{Edit, Pages};
use iommu::SystemRmp;
use secure::{Code, RmpSize};
use std::sync::Arc;
use thiserror::Error;

/// Pages of one 2 MiB entry.
const GROUP_LG2: u8 = 9;

/// Why an entry stayed as it was. Those before it are split.
#[derive(Debug, Error)]
pub enum SmashError {
    /// No tables for the smaller leaves.
    #[error("cannot split the 2 MiB entry of {pages}: {source}")]
    Leaf {
        /// Its pages.
        pages: Span<Page>,
        /// What could not be had.
        source: ioas::Error,
    },
    /// The secure world refused.
    #[error("the secure world does not split the 2 MiB entry of {pages}: {code}")]
    Refused {
        /// Its pages.
        pages: Span<Page>,
        /// The instruction's code.
        code: Code,
    },
}

/// Makes small entries of every 2 MiB entry that `pages` of `backing` meet, whichever guest's they are, with the leaves that show them.
/// Devices do not notice.
///
/// # Errors
/// See [`SmashError`].
pub fn smash(rmp: &SystemRmp, backing: &Arc<Backing>, pages: Span<Page>) -> Result<(), SmashError> {
    let Some(pages) = pages.intersect(backing.pages()) else { return Ok(()) };
    for (run, state) in backing.states(pages) {
        if state != PageState::Private {
            continue;
        }
        for part in run.blocks(GROUP_LG2) {
            let Some(group) = Span::block(part.start(), GROUP_LG2).intersect(backing.pages()) else { continue };
            let _held = backing.lock(group);
            if rmp.size_at(backing.oa(part.start())) == RmpSize::M2 {
                smash_held(rmp, backing, group)?;
            }
        }
    }
    Ok(())
}

/// Splits the 2 MiB entry of `group`, which the caller holds, and its leaves, as one event for devices (design D-6).
pub(crate) fn smash_held(rmp: &SystemRmp, backing: &Arc<Backing>, group: Span<Page>) -> Result<(), SmashError> {
    let leaf = |source| SmashError::Leaf { pages: group, source };
    let pages = Pages::of(backing);
    let mut edit = Edit::new();
    pages.reserve(group, Lg2::K4, &mut edit).map_err(leaf)?;
    let oa = backing.oa(group.start());
    rmp.smash_begin(oa);
    let smashed = switch::smash(rmp, oa)
        .map_err(|code| SmashError::Refused { pages: group, code })
        .and_then(|()| pages.cut(group, SizeSet::only(Lg2::K4), &mut edit).map_err(leaf));
    rmp.smash_end(oa);
    smashed
}
