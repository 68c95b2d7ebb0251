//! The one step that changes the owner: RMPUPDATE and PSMASH over runs of pages, in the largest entries that fit.

use crate::Owner;
use crate::plan::Piece;
use addr::{Address, Gpa, Lg2, Oa, PAGE_LG2, Page, Span};
use backing::{Backing, PageState};
use ioas::{Area, Pages};
use iommu::SystemRmp;
use secure::{Code, RmpSize, RmpState};
use std::time::{Duration, Instant};

const GROUP_LG2: u8 = 9;
/// How often an instruction is executed again before the processor goes to somebody else in between.
const TRIES: u32 = 64;
/// How long one agent may keep an entry from everybody else.
const PATIENCE: Duration = Duration::from_secs(1);

/// Where a switch stopped.
#[derive(Debug)]
pub(crate) struct Failed {
    /// Pages before it that have the new owner.
    pub(crate) done: u64,
    /// The pages that were refused.
    pub(crate) bad: Span<Page>,
    pub(crate) oa: Oa,
    pub(crate) code: Code,
}

/// Blocks of 2 MiB whose entry is that large and of which `pages` has only a part.
pub(crate) fn partial_blocks<'a>(rmp: &'a SystemRmp, backing: &'a Backing, pages: Span<Page>) -> impl Iterator<Item = Span<Page>> + 'a {
    let first = Span::block(pages.start(), GROUP_LG2);
    let last = Span::block(pages.last(), GROUP_LG2);
    let ends = [Some(first), (last != first).then_some(last)];
    ends.into_iter()
        .flatten()
        .filter(move |block| !pages.covers(*block) && backing.pages().covers(*block) && is_large(rmp, backing, *block))
}

fn is_large(rmp: &SystemRmp, backing: &Backing, block: Span<Page>) -> bool {
    rmp.size_at(backing.oa_as(block.start(), PageState::Private)) == RmpSize::M2
}

/// PSMASH. An entry that is small already needs none.
pub(crate) fn smash(rmp: &SystemRmp, oa: Oa) -> Result<(), Code> {
    retry(Code::FailInUse, || rmp.psmash(oa))
}

/// Gives every page of the piece its new owner; `None` when all of it was done.
pub(crate) fn switch(rmp: &SystemRmp, pages: &Pages, piece: &Piece, asid: u32) -> Option<Failed> {
    let backing = pages.backing();
    let areas = if piece.to == Owner::Private { pages.areas_over(piece.pages) } else { Vec::new() };
    // Only where they are private do pages have an entry, whichever way they go.
    for (run, oa) in backing.extents_as(piece.pages, PageState::Private) {
        let gpa = piece.gpa.start().plus(run.start().offset_from(piece.pages.start()) << PAGE_LG2);
        let mut at = 0;
        while at < run.len() {
            let (oa, gpa, left) = (oa.plus(at << PAGE_LG2), gpa.plus(at << PAGE_LG2), run.len() - at);
            let block = Span::block(run.start().plus(at), GROUP_LG2);
            let large = left >= 1 << GROUP_LG2 && oa.is_aligned(Lg2::M2.0) && gpa.is_aligned(Lg2::M2.0) && large_fits(rmp, oa, piece.to);
            let large = large && areas.iter().all(|area| shows_whole(area, block));
            let (size, pages) = if large { (RmpSize::M2, 1 << GROUP_LG2) } else { (RmpSize::K4, 1) };
            if let Err(code) = update(rmp, oa, gpa, size, piece.to, asid) {
                let bad = Span::of(run.start().plus(at), run.start().plus(at + pages - 1));
                return Some(Failed { done: bad.start().offset_from(piece.pages.start()), bad, oa, code });
            }
            at += pages;
        }
    }
    None
}

/// Small entries are given back one by one; large ones and free ground are taken in one go.
fn large_fits(rmp: &SystemRmp, oa: Oa, to: Owner) -> bool {
    match to {
        Owner::Private => rmp.summary_2m(oa) == 0,
        Owner::Shared => rmp.size_at(oa) == RmpSize::M2,
    }
}

/// Whether all that show the block through this area can do so with one leaf: with a large entry they could show it in no other way.
fn shows_whole(area: &Area, block: Span<Page>) -> bool {
    if !area.page_span().overlaps(block) {
        return true;
    }
    let bytes: Span<Page> = block.unindex(PAGE_LG2);
    let own = Span::of(Page::new(area.offset_bytes()), Page::new(area.offset_bytes() + area.span().last_offset()));
    let aligned = own.covers(bytes) && area.span().project(own, bytes).is_aligned(Lg2::M2.0);
    let mut allowed = aligned && area.domains().iter().all(|domain| domain.sizes().has(Lg2::M2));
    area.expected(block, |_, _, sizes| allowed &= sizes.has(Lg2::M2));
    allowed
}

fn update(rmp: &SystemRmp, oa: Oa, gpa: Gpa, size: RmpSize, to: Owner, asid: u32) -> Result<(), Code> {
    let state = match to {
        Owner::Private => RmpState::private(gpa, size, asid),
        Owner::Shared => RmpState::shared(size),
    };
    // Firmware may have the range for a moment.
    retry(Code::FailOverlap, || rmp.rmpupdate(oa, state))
}

/// Again and again while another agent has the entry, as hosts do. Whoever that is may wait for a processor, so after a few tries it gets ours; a page
/// is given up only when nothing has moved for [`PATIENCE`].
pub(crate) fn retry<T, E: PartialEq>(busy: E, mut attempt: impl FnMut() -> Result<T, E>) -> Result<T, E> {
    for _ in 0..TRIES {
        match attempt() {
            Err(code) if code == busy => std::hint::spin_loop(),
            done => return done,
        }
    }
    let started = Instant::now();
    loop {
        std::thread::yield_now();
        match attempt() {
            Err(code) if code == busy && started.elapsed() < PATIENCE => {}
            done => return done,
        }
    }
}

/// Takes pages out of use for good.
pub(crate) fn leak(rmp: &SystemRmp, backing: &Backing, pages: Span<Page>) {
    for (run, oa) in backing.extents_as(pages, PageState::Private) {
        for page in 0..run.len() {
            rmp.leak(oa.plus(page << PAGE_LG2));
        }
    }
}
