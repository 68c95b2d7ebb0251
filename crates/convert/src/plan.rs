//! The first part of a conversion: what it is about, in pages, and holding those pages.

use crate::{Change, ConvertError, Owner, Space};
use addr::{Address, Gpa, PAGE_LG2, Page, Span};
use backing::{Backing, PageState, SpanGuard};
use ioas::Pages;
use secure::RmpSize;
use std::sync::Arc;

/// Pages of one memslot on their way to one owner.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub(crate) gpa: Span<Gpa>,
    pub(crate) pages: Span<Page>,
    pub(crate) to: Owner,
    /// Its backing, by place in the list of held ones.
    pub(crate) held: usize,
    pub(crate) from: PageState,
    /// Its leaves stay, in a space that keeps leaves: there are some, unless the pages have been given back, and they lead to the same memory
    /// afterwards, unless it is a pair's.
    pub(crate) keeps_leaf: bool,
    pub(crate) fate: Fate,
}

/// What became of a piece.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fate {
    /// Not yet changed; stays as it was when the conversion ends like this.
    Kept,
    /// Has its new owner.
    Switched,
    /// Has its new owner, stage 2 knows.
    Committed,
    /// The secure world kept it.
    Leaked,
}

/// A request, translated to pages; nothing is held yet.
#[derive(Debug)]
pub(crate) struct Plan {
    pieces: Vec<Piece>,
    backings: Vec<Arc<Pages>>,
}

/// A backing and those of its pages that a conversion holds.
#[derive(Debug)]
pub(crate) struct Held<'a> {
    pub(crate) pages: &'a Arc<Pages>,
    pub(crate) guard: SpanGuard<'a>,
}

/// Pages of one RMP group; conversions of one group take turns, since they may have to split its entry.
const GROUP_LG2: u8 = 9;

impl Plan {
    pub(crate) fn new(space: &Space, changes: &[Change]) -> Result<Self, ConvertError> {
        let mut plan = Self { pieces: Vec::with_capacity(changes.len()), backings: Vec::with_capacity(1) };
        for change in changes {
            change.span.check_aligned(PAGE_LG2)?;
            let missing = space.parts(change.span, |gpa, pages, span| {
                let known = plan.backings.iter().position(|known| Arc::ptr_eq(known, pages));
                let held = known.unwrap_or_else(|| {
                    plan.backings.push(Arc::clone(pages));
                    plan.backings.len() - 1
                });
                plan.pieces.push(Piece {
                    gpa,
                    pages: span,
                    to: change.to,
                    held,
                    from: PageState::Absent,
                    keeps_leaf: false,
                    fate: Fate::Kept,
                });
            });
            if let Some(at) = missing {
                return Err(ConvertError::NoMemory { span: change.span, at });
            }
        }
        plan.sort();
        let meets = |pair: &[Piece]| pair[0].held == pair[1].held && pair[0].pages.overlaps(pair[1].pages);
        if let Some(pair) = plan.pieces.windows(2).find(|pair| meets(pair)) {
            return Err(ConvertError::Twice { span: pair[1].gpa });
        }
        plan.pieces.dedup_by(|next, piece| piece.join(next));
        Ok(plan)
    }

    /// Backings by ascending id, the order in which they are held (I-12); pieces by backing and page.
    fn sort(&mut self) {
        if self.backings.len() > 1 {
            let mut order: Vec<usize> = (0..self.backings.len()).collect();
            order.sort_by_key(|index| self.backings[*index].backing().id());
            let place = |old: usize| order.iter().position(|index| *index == old).unwrap_or(old);
            for piece in &mut self.pieces {
                piece.held = place(piece.held);
            }
            self.backings.sort_by_key(|pages| pages.backing().id());
        }
        self.pieces.sort_unstable_by_key(|piece| (piece.held, piece.pages.start()));
    }

    /// Waits for the pages and holds them, whole groups of them.
    pub(crate) fn hold(&self) -> Vec<Held<'_>> {
        let mut spans: Vec<Span<Page>> = Vec::with_capacity(self.pieces.len());
        let hold = |(held, pages): (usize, &'_ Arc<Pages>), spans: &mut Vec<Span<Page>>| {
            spans.clear();
            let all = pages.backing().pages();
            for piece in self.pieces.iter().filter(|piece| piece.held == held) {
                let group = piece.pages.widen(GROUP_LG2).intersect(all).unwrap_or(piece.pages);
                match spans.last_mut() {
                    Some(last) if last.overlaps(group) || last.touches(group) => {
                        *last = Span::of(last.start(), last.last().max(group.last()))
                    }
                    _ => spans.push(group),
                }
            }
        };
        let mut all = Vec::with_capacity(self.backings.len());
        for (index, pages) in self.backings.iter().enumerate() {
            hold((index, pages), &mut spans);
            all.push(Held { pages, guard: pages.backing().lock_many(&spans) });
        }
        all
    }

    /// The pieces that are not what they are to become, now that nobody else can change them.
    ///
    /// # Errors
    /// `NotOurs`.
    pub(crate) fn todo(&self, space: &Space, held: &[Held<'_>]) -> Result<Vec<Piece>, ConvertError> {
        let mut todo = Vec::with_capacity(self.pieces.len());
        for piece in &self.pieces {
            let backing = held[piece.held].pages.backing();
            let gpa_of = |run: Span<Page>| piece.gpa.project(piece.pages.unindex(PAGE_LG2), run.unindex::<Page>(PAGE_LG2));
            let mut add = |run: Span<Page>, from: PageState| {
                let gpa = gpa_of(run);
                let keeps_leaf = space.keeps_leaves() && from != PageState::Absent && backing.private_file().is_none();
                if from != PageState::from(piece.to) {
                    todo.push(Piece { gpa, pages: run, from, keeps_leaf, ..*piece });
                    return;
                }
                // Also what stage 2 did not take the last time is done again.
                let untold = space.stage2.runs(gpa).into_iter().filter(|(_, private)| *private != (piece.to == Owner::Private));
                todo.extend(untold.map(|(part, _)| Piece { from, keeps_leaf, ..piece.part(part) }));
            };
            for (run, state) in backing.states(piece.pages) {
                if state != PageState::Private {
                    add(run, state);
                    continue;
                }
                for (part, owner) in owners(space, backing, run) {
                    match owner {
                        // A file whose pages nobody can touch begins private, and nobody's.
                        None => add(part, PageState::Shared),
                        Some(asid) if asid == space.asid => add(part, state),
                        Some(asid) => return Err(ConvertError::NotOurs { span: gpa_of(part), oa: backing.oa(part.start()), asid }),
                    }
                }
            }
        }
        Ok(todo)
    }
}

/// Runs of private pages by whose they are in the secure world's table; `None` where it knows of nobody.
fn owners(space: &Space, backing: &Backing, run: Span<Page>) -> Vec<(Span<Page>, Option<u32>)> {
    let mut runs: Vec<(Span<Page>, Option<u32>)> = Vec::with_capacity(1);
    let mut next = Some(run);
    while let Some(rest) = next {
        let entry = space.rmp.entry(backing.oa(rest.start()));
        // A large entry speaks for what is left of its group, which lies in a row.
        let lg2 = if entry.size() == RmpSize::M2 { GROUP_LG2 } else { 0 };
        let part = Span::block(rest.start(), lg2).intersect(rest).unwrap_or(rest);
        let owner = entry.assigned().then(|| entry.asid());
        match runs.last_mut() {
            Some((last, known)) if *known == owner => *last = Span::of(last.start(), part.last()),
            _ => runs.push((part, owner)),
        }
        next = part.last().checked_add(1).and_then(|after| Span::new(after, run.last()));
    }
    runs
}

impl Plan {
    /// The pieces in one held backing.
    pub(crate) fn pages_of(&self, held: &Held<'_>) -> impl Iterator<Item = (Span<Gpa>, Span<Page>)> {
        let of = |piece: &&Piece| Arc::ptr_eq(&self.backings[piece.held], held.pages);
        self.pieces.iter().filter(of).map(|piece| (piece.gpa, piece.pages)).collect::<Vec<_>>().into_iter()
    }
}

impl Piece {
    /// Takes `next` in, where it goes on with what this is about: guests ask page by page for what lies in a row.
    fn join(&mut self, next: &Self) -> bool {
        let goes_on = (self.held, self.to) == (next.held, next.to) && self.pages.touches(next.pages) && self.gpa.touches(next.gpa);
        if goes_on {
            self.gpa = Span::of(self.gpa.start(), next.gpa.last());
            self.pages = Span::of(self.pages.start(), next.pages.last());
        }
        goes_on
    }

    /// What of it is at `gpa`.
    pub(crate) fn part(&self, gpa: Span<Gpa>) -> Self {
        let pages = self.pages.unindex::<Page>(PAGE_LG2).project(self.gpa, gpa).index(PAGE_LG2);
        Self { gpa, pages, ..*self }
    }

    /// The pages that were done, those that failed, those that were not tried.
    pub(crate) fn split(&self, done: u64, bad: Span<Page>) -> (Option<Self>, Self, Option<Self>) {
        let part = |pages: Span<Page>| Self {
            gpa: self.gpa.project(self.pages.unindex(PAGE_LG2), pages.unindex::<Page>(PAGE_LG2)),
            pages,
            ..*self
        };
        let done = (done > 0).then(|| part(Span::of(self.pages.start(), self.pages.start().plus(done - 1))));
        let rest = bad.last().checked_add(1).and_then(|next| Span::new(next, self.pages.last())).map(part);
        (done, part(bad), rest)
    }
}
