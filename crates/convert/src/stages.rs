//! The conversion, stage by stage (design D-6). Each stage is a type that can only become the next, so the order cannot be got wrong:
//!
//! reserve, freeze, detach, settle, switch, commit, discard, attach, thaw.
//!
//! Until the owner has changed every failure puts all back. Afterwards nothing is rolled back, because the guest may have seen it: the
//! error says which pages are done.

use crate::plan::{Fate, Held, Piece, Plan};
use crate::smash::smash_held;
use crate::space::{Transition, Watch};
use crate::switch::{self, Failed};
use crate::{Busy, Change, ConvertError, Owner, Space, Step};
use addr::{Gpa, Lg2, Span};
use backing::PageState;
use ioas::Edit;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use sync::fail;
use sync::prim::atomic::{AtomicU64, Ordering};

/// A conversion that has come as far as stage `S`.
#[must_use = "a conversion that is dropped leaves its pages unmapped"]
#[derive(Debug)]
pub struct Conversion<'a, S> {
    core: Core<'a>,
    stage: PhantomData<S>,
}

/// Everything that later stages need is there; nothing has changed.
#[derive(Debug)]
pub struct Reserved;
/// Stage 2 lets nobody in.
#[derive(Debug)]
pub struct Frozen;
/// No device reaches the pages, and none is on its way.
#[derive(Debug)]
pub struct Detached;
/// Nobody else holds the pages either.
#[derive(Debug)]
pub struct Settled;
/// The pages have their new owner.
#[derive(Debug)]
pub struct Switched;
/// States and stage 2 say so.
#[derive(Debug)]
pub struct Committed;
/// Nothing is left where the pages of a pair were before.
#[derive(Debug)]
pub struct Discarded;
/// Devices see what they may see.
#[derive(Debug)]
pub struct Attached;

/// What a conversion did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Done {
    /// Pages that changed owner.
    pub pages: u64,
}

struct Core<'a> {
    space: &'a Space,
    held: Vec<Held<'a>>,
    pieces: Vec<Piece>,
    edit: Edit,
    frozen: Vec<Span<Gpa>>,
    error: Option<ConvertError>,
    watch: Option<Arc<Watch>>,
    /// A planted fault left leaves where `attach` expects none.
    occupied: bool,
}

impl<'a, S> Conversion<'a, S> {
    fn next<T>(self) -> Conversion<'a, T> {
        Conversion { core: self.core, stage: PhantomData }
    }
}

impl fmt::Debug for Core<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Core").field("pieces", &self.pieces).field("error", &self.error).finish_non_exhaustive()
    }
}

impl Drop for Core<'_> {
    fn drop(&mut self) {
        self.thaw();
    }
}

impl Space {
    /// Gives every page of `changes` the owner that is asked for: all three tables, in the one safe order. Pages that have it already
    /// are left alone. A batch shares one invalidation and one grace period.
    ///
    /// # Errors
    /// See [`ConvertError`]; it says what is done.
    pub fn convert(&self, changes: &[Change]) -> Result<Done, ConvertError> {
        let done = self.convert_counted(changes);
        if done.is_err() {
            self.counters.failed.fetch_add(1, Ordering::Relaxed);
        }
        done
    }

    fn convert_counted(&self, changes: &[Change]) -> Result<Done, ConvertError> {
        let plan = Plan::new(self, changes)?;
        let held = plan.hold();
        let pieces = plan.todo(self, &held)?;
        if pieces.is_empty() {
            return Ok(Done::default());
        }
        Conversion::reserve(self, held, pieces)?.freeze().detach()?.settle()?.switch().commit().discard().attach().thaw()
    }

    /// Maps again what devices may see of `span`, after [`ConvertError::NotMapped`], and gives back what is left on the other side of a pair, after
    /// [`ConvertError::NotDiscarded`].
    ///
    /// # Errors
    /// As that one.
    pub fn restore(&self, span: Span<Gpa>) -> Result<(), ConvertError> {
        let plan = Plan::new(self, &[Change { span, to: Owner::Shared }])?;
        let mut edit = Edit::new();
        for held in plan.hold() {
            for (_, pages) in plan.pages_of(&held) {
                // Of a large entry a part cannot be shown alone (I-5).
                for block in switch::partial_blocks(&self.rmp, held.pages.backing(), pages) {
                    smash_held(&self.rmp, held.pages.backing(), block)
                        .map_err(|error| ConvertError::NotMapped { span, reason: error.to_string() })?;
                }
                let filled = held.pages.reserve(pages, Lg2::K4, &mut edit).and_then(|()| {
                    held.pages.clear(pages, &mut edit);
                    held.pages.fill(pages, &mut edit)
                });
                filled.map_err(|error| ConvertError::NotMapped { span, reason: error.to_string() })?;
                for (run, state) in held.pages.backing().states(pages) {
                    let other = match state {
                        PageState::Shared => PageState::Private,
                        PageState::Private => PageState::Shared,
                        PageState::Absent => continue,
                    };
                    let discarded = held.pages.backing().discard_side(&held.guard, run, other);
                    discarded.map_err(|error| ConvertError::NotDiscarded { span, reason: error.to_string() })?;
                }
            }
        }
        Ok(())
    }
}

impl Space {
    /// Pages that have no leaves will be mapped apart from the rest of a large entry, which their leaf has to equal (I-5). Answers whether they can be.
    fn split_for(&self, backing: &backing::Backing, pages: Span<addr::Page>) -> bool {
        switch::partial_blocks(&self.rmp, backing, pages).all(|block| switch::smash(&self.rmp, backing.oa(block.start())).is_ok())
    }
}

impl<'a> Conversion<'a, Reserved> {
    fn reserve(space: &'a Space, held: Vec<Held<'a>>, pieces: Vec<Piece>) -> Result<Self, ConvertError> {
        let mut core =
            Core { space, held, pieces, edit: Edit::new(), frozen: Vec::new(), error: None, watch: space.watch(), occupied: false };
        core.show(Step::Plan);
        core.reserve()?;
        core.show(Step::Reserve);
        Ok(Self { core, stage: PhantomData })
    }

    /// From here on no vCPU gets a translation of these pages.
    fn freeze(mut self) -> Conversion<'a, Frozen> {
        self.core.frozen.extend(self.core.pieces.iter().map(|piece| piece.gpa));
        self.core.space.stage2.freeze(&self.core.frozen);
        self.core.show(Step::Freeze);
        self.next()
    }
}

impl<'a> Conversion<'a, Frozen> {
    /// Takes the leaves out, splitting large entries and leaves where they reach beyond, and waits until no device is on the pages.
    fn detach(mut self) -> Result<Conversion<'a, Detached>, ConvertError> {
        self.core.smash()?;
        let skip = fail::planted("convert.leave_leaf");
        self.core.occupied = skip;
        let core = &mut self.core;
        for piece in core.pieces.iter().skip(usize::from(skip)).filter(|piece| !piece.keeps_leaf) {
            core.held[piece.held].pages.clear(piece.pages, &mut core.edit);
        }
        core.edit.flush();
        self.core.show(Step::Detach);
        Ok(self.next())
    }
}

impl<'a> Conversion<'a, Detached> {
    /// Asks whether anybody but devices holds on to the pages; if so, all is put back.
    fn settle(mut self) -> Result<Conversion<'a, Settled>, ConvertError> {
        if let Err(Busy { at }) = self.core.space.stage2.settle(&self.core.frozen) {
            // Under the old owner, with tables that were reserved.
            self.core.fill(|piece| !piece.keeps_leaf);
            let span = self.core.frozen.iter().find(|span| span.contains(at)).copied().unwrap_or(Span::one(at));
            return Err(self.core.error.take().unwrap_or(ConvertError::Busy { span, at }));
        }
        self.core.show(Step::Settle);
        Ok(self.next())
    }
}

impl<'a> Conversion<'a, Settled> {
    /// Changes the owner in the secure world's table. A refusal ends the batch: what is done goes on, what is not stays.
    fn switch(mut self) -> Conversion<'a, Switched> {
        if fail::planted("convert.map_before_switch") {
            self.core.set_states(|_| true);
            self.core.fill(|_| true);
            self.core.occupied = true;
        }
        self.core.switch();
        self.core.part_devices();
        self.core.show(Step::Switch);
        self.next()
    }
}

impl<'a> Conversion<'a, Switched> {
    /// Page states, and stage 2's record.
    fn commit(mut self) -> Conversion<'a, Committed> {
        self.core.set_states(|piece| piece.fate == Fate::Switched);
        self.core.commit();
        self.core.show(Step::Commit);
        self.next()
    }
}

impl<'a> Conversion<'a, Committed> {
    /// Gives back what the pages of a pair had on the side that they left: no table leads there any more, and until stage 2 was told a vCPU could
    /// have brought it back.
    fn discard(mut self) -> Conversion<'a, Discarded> {
        self.core.discard();
        self.core.show(Step::Discard);
        self.next()
    }
}

impl<'a> Conversion<'a, Discarded> {
    /// Maps what devices may see now, of the pages that changed and of those that did not.
    fn attach(mut self) -> Conversion<'a, Attached> {
        if !self.core.occupied {
            self.core.fill(|piece| matches!(piece.fate, Fate::Kept | Fate::Committed) && !piece.keeps_leaf);
        }
        self.core.show(Step::Attach);
        self.next()
    }
}

impl Conversion<'_, Attached> {
    /// Lets vCPUs in again, and answers: the acknowledgement comes last.
    fn thaw(mut self) -> Result<Done, ConvertError> {
        self.core.thaw();
        self.core.show(Step::Thaw);
        self.core.count()
    }
}

impl Core<'_> {
    fn reserve(&mut self) -> Result<(), ConvertError> {
        for piece in &self.pieces {
            let held = &self.held[piece.held];
            let failed = |reason: String| ConvertError::Reserve { span: piece.gpa, reason };
            fail::step("convert.reserve").map_err(|error| failed(error.to_string()))?;
            if let Some(oa) = self.space.first_leaked(held.pages.backing(), piece.pages) {
                return Err(ConvertError::Leaked { span: piece.gpa, oa });
            }
            // Private leaves are as small as their entries; shared ones are as large as they get.
            held.pages.reserve(piece.pages, Lg2::K4, &mut self.edit).map_err(|error| failed(error.to_string()))?;
        }
        for (index, held) in self.held.iter().enumerate() {
            // A refusal in the middle of a piece makes three of it.
            let changes = self.pieces.iter().filter(|piece| piece.held == index).count() + 2;
            let span = self.pieces.iter().find(|piece| piece.held == index).map_or(Span::one(Gpa::new(0)), |piece| piece.gpa);
            held.guard.reserve(changes).map_err(|error| ConvertError::Reserve { span, reason: error.to_string() })?;
        }
        self.frozen.reserve(self.pieces.len());
        Ok(())
    }

    /// Splits 2 MiB entries of which only a part is converted: it leaves the guest, or stage 2 did not take it the last time and it is mapped
    /// anew, by smaller leaves than the entry (I-5). Entry and leaf change inside one smash, so a device that meets
    /// them of two sizes looks again instead of faulting.
    fn smash(&mut self) -> Result<(), ConvertError> {
        let mut cleared: Vec<(usize, Span<addr::Page>)> = Vec::new();
        for piece in self.pieces.iter().filter(|piece| piece.from == PageState::Private) {
            let held = &self.held[piece.held];
            let backing = held.pages.backing();
            for block in switch::partial_blocks(&self.space.rmp, backing, piece.pages) {
                let Some(part) = block.intersect(piece.pages) else { continue };
                let oa = backing.oa(block.start());
                self.space.rmp.smash_begin(oa);
                let smashed = switch::smash(&self.space.rmp, oa);
                if smashed.is_ok() {
                    if !self.space.keeps_leaves() {
                        held.pages.clear(part, &mut self.edit);
                        cleared.push((piece.held, part));
                    }
                    self.space.counters.smashed.fetch_add(1, Ordering::Relaxed);
                }
                self.space.rmp.smash_end(oa);
                if let Err(code) = smashed {
                    self.edit.flush();
                    for (held, part) in &cleared {
                        // The tables are there: the cut made them.
                        let refilled = self.held[*held].pages.fill(*part, &mut self.edit);
                        debug_assert!(refilled.is_ok(), "{refilled:?}");
                    }
                    return Err(ConvertError::Refused { step: Step::Smash, span: piece.gpa, oa, code, done_pages: 0 });
                }
            }
        }
        Ok(())
    }

    fn switch(&mut self) {
        let pieces = std::mem::take(&mut self.pieces);
        let mut pieces = pieces.into_iter();
        for mut piece in pieces.by_ref() {
            let backing = self.held[piece.held].pages.backing();
            // A piece that only stage 2 did not take has its owner already.
            let owned = piece.from == piece.to.into();
            let failed = if owned { None } else { switch::switch(&self.space.rmp, self.held[piece.held].pages, &piece, self.space.asid) };
            let Some(Failed { done, bad, oa, code }) = failed else {
                if !owned {
                    self.space.forget_validated(piece.gpa);
                }
                piece.fate = Fate::Switched;
                self.pieces.push(piece);
                continue;
            };
            let (done, bad, rest) = piece.split(done, bad);
            let leaks = piece.to == Owner::Shared && piece.from == PageState::Private;
            // What kept its owner keeps what the guest said about it.
            self.pieces.extend(done.map(|done| {
                self.space.forget_validated(done.gpa);
                Piece { fate: Fate::Switched, ..done }
            }));
            self.pieces.extend(rest);
            let fate = if leaks { Fate::Leaked } else { Fate::Kept };
            self.pieces.push(Piece { fate, ..bad });
            if leaks {
                switch::leak(&self.space.rmp, backing, bad.pages);
                self.space.counters.leaked.fetch_add(bad.pages.len(), Ordering::Relaxed);
            }
            let (span, done_pages) = (bad.gpa, self.pages_with(Fate::Switched));
            self.error = Some(if leaks {
                ConvertError::Leaks { span, oa, code, done_pages }
            } else {
                ConvertError::Refused { step: Step::Switch, span, oa, code, done_pages }
            });
            break;
        }
        self.pieces.extend(pieces);
    }

    /// Where leaves stay, the owner has changed under the devices: whoever was let in before is waited for now, and every access is judged
    /// anew. A page that nobody may have any more loses its leaf all the same.
    fn part_devices(&mut self) {
        for piece in self.pieces.iter().filter(|piece| piece.keeps_leaf) {
            let pages = self.held[piece.held].pages;
            if piece.fate == Fate::Leaked {
                pages.clear(piece.pages, &mut self.edit);
            } else {
                pages.invalidate(piece.pages, &mut self.edit);
            }
        }
        self.edit.flush();
    }

    fn set_states(&mut self, which: impl Fn(&Piece) -> bool) {
        for piece in &self.pieces {
            let Held { pages, guard } = &self.held[piece.held];
            let state = if piece.fate == Fate::Leaked {
                // Nobody's any more: a leaked page is never mapped again.
                PageState::Absent
            } else if which(piece) {
                piece.to.into()
            } else {
                continue;
            };
            let set = pages.backing().set_state(guard, piece.pages, state);
            debug_assert!(set.is_ok(), "room for {:?} was reserved: {set:?}", piece.pages);
        }
    }

    fn commit(&mut self) {
        // One span that is refused does not stop the others: what stage 2 has not been told is all that a retry can find. So what it has already is
        // done, whatever it says.
        let mut parts = Vec::new();
        for piece in self.pieces.iter_mut().filter(|piece| piece.fate == Fate::Switched) {
            let Err(source) = self.space.stage2.commit(piece.gpa, piece.to == Owner::Private) else {
                piece.fate = Fate::Committed;
                continue;
            };
            let whole = *piece;
            let runs = self.space.stage2.runs(whole.gpa);
            for (index, (gpa, private)) in runs.into_iter().enumerate() {
                let part = whole.part(gpa);
                let told = private == (whole.to == Owner::Private);
                let fits = told && self.space.split_for(self.held[whole.held].pages.backing(), part.pages);
                let part = Piece { fate: if fits { Fate::Committed } else { Fate::Switched }, ..part };
                if !fits {
                    self.error.get_or_insert(ConvertError::Stage2 { source: source.clone(), done_pages: 0 });
                }
                if index == 0 { *piece = part } else { parts.push(part) }
            }
        }
        self.pieces.extend(parts);
        let done = self.pages_with(Fate::Committed);
        if let Some(ConvertError::Stage2 { done_pages, .. }) = &mut self.error {
            *done_pages = done;
        }
    }

    fn discard(&mut self) {
        for piece in self.pieces.iter().filter(|piece| piece.fate == Fate::Committed) {
            let Held { pages, guard } = &self.held[piece.held];
            if let Err(error) = pages.backing().discard_side(guard, piece.pages, piece.to.other().into()) {
                self.error.get_or_insert(ConvertError::NotDiscarded { span: piece.gpa, reason: error.to_string() });
            }
        }
    }

    fn show(&self, step: Step) {
        if let Some(watch) = &self.watch {
            watch(&Transition::new(step, &self.pieces, &self.held));
        }
    }

    fn fill(&mut self, which: impl Fn(&Piece) -> bool) {
        for piece in self.pieces.iter().filter(|piece| which(piece)) {
            if let Err(error) = self.held[piece.held].pages.fill(piece.pages, &mut self.edit) {
                self.error.get_or_insert(ConvertError::NotMapped { span: piece.gpa, reason: error.to_string() });
            }
        }
        self.edit.flush();
    }

    fn thaw(&mut self) {
        if !self.frozen.is_empty() {
            self.space.stage2.thaw(&self.frozen);
            self.frozen.clear();
        }
    }

    fn count(&mut self) -> Result<Done, ConvertError> {
        let counters = &self.space.counters;
        let add = |counter: &AtomicU64, to| {
            let pages =
                self.pieces.iter().filter(|piece| piece.fate == Fate::Committed && piece.to == to).map(|piece| piece.pages.len()).sum();
            counter.fetch_add(pages, Ordering::Relaxed);
            pages
        };
        let pages: u64 = add(&counters.to_private, Owner::Private) + add(&counters.to_shared, Owner::Shared);
        counters.batches.fetch_add(u64::from(pages > 0), Ordering::Relaxed);
        self.error.take().map_or(Ok(Done { pages }), Err)
    }

    fn pages_with(&self, fate: Fate) -> u64 {
        self.pieces.iter().filter(|piece| piece.fate == fate).map(|piece| piece.pages.len()).sum()
    }
}
