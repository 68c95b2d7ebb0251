//! Pages that leave and come back: everyone who has mapped them hears of it before the memory goes (D-8).
//!
//! The order of a punch is the order of I-4: the state says absent, so nobody maps anew; listeners clear their leaves and wait until no
//! device is on the pages; only then the kernel gets them.

use crate::{Backing, Error, Kind, PageState, RestoreError, SpanGuard};
use addr::{Page, Span};
use std::sync::{Arc, PoisonError, Weak};
use sync::fail;
use sync::prim::RwLock;

/// Whoever has mapped pages of a backing.
pub trait Listener: Send + Sync {
    /// The pages leave. When this returns, no device reaches them through this listener, and none is on its way. It cannot fail and
    /// does not allocate (I-9). `held` holds the pages; their state is the new one already.
    fn revoke(&self, pages: Span<Page>, held: &SpanGuard<'_>);

    /// The pages are there (again): map what may be mapped.
    ///
    /// # Errors
    /// Why the listener could not; it has mapped none of `pages` then.
    fn restore(&self, pages: Span<Page>, held: &SpanGuard<'_>) -> Result<(), RestoreError>;
}

/// In the order in which they came. A place of one that is gone is used again, never removed, so that places stay put while the
/// list is gone through without a lock. Most backings have one.
#[derive(Default)]
pub(crate) struct Listeners(RwLock<Places>);

#[derive(Default)]
struct Places {
    first: Option<Weak<dyn Listener>>,
    more: Vec<Weak<dyn Listener>>,
}

impl std::fmt::Debug for Listeners {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} listeners", self.each().count())
    }
}

impl Listeners {
    fn add(&self, listener: Weak<dyn Listener>) {
        let mut places = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let Places { first, more } = &mut *places;
        if first.is_none() {
            *first = Some(listener);
        } else if let Some(place) = first.iter_mut().chain(more.iter_mut()).find(|place| place.strong_count() == 0) {
            *place = listener;
        } else {
            more.push(listener);
        }
    }

    /// Nothing is locked while the caller has one in hand, and nothing allocated.
    fn each(&self) -> impl Iterator<Item = Arc<dyn Listener>> + '_ {
        let at = |index: usize| {
            let places = self.0.read().unwrap_or_else(PoisonError::into_inner);
            let place = index.checked_sub(1).map_or(places.first.as_ref(), |index| places.more.get(index));
            place.cloned()
        };
        (0..).map_while(at).filter_map(|listener| listener.upgrade())
    }
}

impl Backing {
    /// Whoever is added hears of every revocation that begins afterwards. What it must not miss it looks up itself, holding the pages.
    pub fn add_listener(&self, listener: Weak<dyn Listener>) {
        self.listeners.add(listener);
    }

    /// Gives pages back to the host: nothing maps them when this returns, and they read as zero should they come back.
    ///
    /// # Errors
    /// Bad spans, no memory, and what fallocate or madvise answer. Then everything is put back as it was, mappings included; should
    /// a listener be unable to do that, the error is `Restore`.
    pub fn punch(&self, span: Span<Page>) -> Result<(), Error> {
        self.check(span)?;
        let held = self.lock(span);
        self.punch_held(&held, span)
    }

    /// As [`Backing::punch`], for a caller who holds the pages.
    ///
    /// # Errors
    /// As [`Backing::punch`], and `NotHeld`.
    pub fn punch_held(&self, held: &SpanGuard<'_>, span: Span<Page>) -> Result<(), Error> {
        self.check_held(held, span)?;
        self.check_ours("be punched")?;
        if fail::planted("backing.ignore_punch") {
            return self.discard(span);
        }
        if let Some(source) = &self.memory.file {
            span.unindex::<Page>(addr::PAGE_LG2).check_aligned(source.granule_lg2)?;
        }
        let mut before = Vec::new();
        for run in self.states(span) {
            before.try_reserve(1).map_err(|_| addr::OutOfMemory)?;
            before.push(run);
        }
        let mark = held.reserved();
        held.reserve(before.len() + 1)?;
        // Should the punch fail, the next recheck learns these pages anew.
        self.known_forget(span)?;
        self.revoke_held(held, span)?;
        let Err(error) = self.discard(span) else {
            held.unreserve(mark);
            return Ok(());
        };
        for &(run, state) in &before {
            self.set_state(held, run, state)?;
        }
        for (run, _) in before.into_iter().filter(|(_, state)| *state != PageState::Absent) {
            self.restore_held(held, run)?;
        }
        Err(error)
    }

    /// Brings absent pages back, zeroed, in `state`, and allocates memory for all of `span`, so that no first touch is left. Pages that
    /// are there already keep state and content. Listeners map what they may.
    ///
    /// # Errors
    /// Bad spans, `Unsupported` for the state absent, no memory, what fallocate or madvise answer: no state was changed. `Restore`: the
    /// states were.
    pub fn populate(&self, span: Span<Page>, state: PageState) -> Result<(), Error> {
        self.check(span)?;
        let held = self.lock(span);
        self.populate_held(&held, span, state)
    }

    /// As [`Backing::populate`], for a caller who holds the pages.
    ///
    /// # Errors
    /// As [`Backing::populate`], and `NotHeld`.
    pub fn populate_held(&self, held: &SpanGuard<'_>, span: Span<Page>, state: PageState) -> Result<(), Error> {
        self.check_held(held, span)?;
        self.check_ours("be populated")?;
        if state == PageState::Absent {
            return Err(Error::Unsupported { kind: self.kind(), what: "be populated with absent pages" });
        }
        held.reserve(self.states(span).filter(|(_, state)| *state == PageState::Absent).count())?;
        self.allocate(span, state)?;
        self.know_residents(span, state)?;
        let mut failed = Ok(());
        for (run, old) in self.states(span) {
            if old == PageState::Absent {
                self.set_state(held, run, state)?;
                failed = failed.and(self.restore_held(held, run));
            }
        }
        failed
    }

    /// Takes every page away from everyone who has mapped it, for good: what the owner does when it closes the file. The memory stays
    /// until the last [`Arc`] is gone. Cannot fail (I-9).
    pub fn close(&self) {
        let held = self.lock(self.pages());
        self.states.set_all(PageState::Absent);
        self.revoke_listeners(&held, self.pages());
    }

    /// Makes the pages absent and has every listener let go of them.
    ///
    /// # Errors
    /// As [`Backing::set_state`]; listeners have let go all the same.
    pub fn revoke_held(&self, held: &SpanGuard<'_>, span: Span<Page>) -> Result<(), Error> {
        let set = self.set_state(held, span, PageState::Absent);
        self.revoke_listeners(held, span);
        set
    }

    fn revoke_listeners(&self, held: &SpanGuard<'_>, span: Span<Page>) {
        self.listeners.each().for_each(|listener| listener.revoke(span, held));
    }

    /// Asks every listener, also when one fails; answers the first failure.
    pub fn restore_held(&self, held: &SpanGuard<'_>, span: Span<Page>) -> Result<(), Error> {
        self.listeners
            .each()
            .map(|listener| listener.restore(span, held).map_err(|source| Error::Restore { span, source }))
            .fold(Ok(()), Result::and)
    }

    /// Memory of somebody else comes and goes as its owner likes.
    fn check_ours(&self, what: &'static str) -> Result<(), Error> {
        if self.kind() == Kind::Foreign { Err(Error::Unsupported { kind: Kind::Foreign, what }) } else { Ok(()) }
    }

    /// The system call of a punch, and nothing else. Of a pair both sides go.
    fn discard(&self, span: Span<Page>) -> Result<(), Error> {
        fail::step("backing.punch")?;
        let (at, len) = (span.start().bytes(), span.len() << addr::PAGE_LG2);
        if let Some(hidden) = &self.memory.hidden {
            hidden.file.punch(span)?;
        }
        match (&self.memory.file, &self.memory.mapping) {
            (Some(source), _) => source.punch(span),
            (None, Some(mapping)) => mapping.discard(at, len).map_err(Error::os("madvise(REMOVE)", at, len)),
            (None, None) => Ok(()),
        }
    }

    /// The system calls of a populate: each page gets memory where it lies, absent ones where they lie in `state`.
    fn allocate(&self, span: Span<Page>, state: PageState) -> Result<(), Error> {
        let Some(hidden) = &self.memory.hidden else { return self.allocate_side(span) };
        self.states(span).try_for_each(|(run, old)| match if old == PageState::Absent { state } else { old } {
            PageState::Private => hidden.file.allocate(run),
            _ => self.allocate_side(run),
        })
    }

    fn allocate_side(&self, span: Span<Page>) -> Result<(), Error> {
        fail::step("backing.populate")?;
        let (at, len) = (span.start().bytes(), span.len() << addr::PAGE_LG2);
        if let Some(source) = &self.memory.file {
            source.allocate(span)?;
        }
        match (&self.memory.mapping, self.kind()) {
            (Some(mapping), Kind::User) => mapping.populate(at, len).map_err(Error::os("madvise(POPULATE_WRITE)", at, len)),
            // The file has the memory now; entering it in this process's page table only saves the first touch, and may be refused.
            (Some(mapping), _) => {
                let _ = mapping.populate(at, len);
                Ok(())
            }
            (None, _) => Ok(()),
        }
    }
}
