//! Sources: the pages that one map call brought in, shared by every copy of it, pinned when somebody first needs them and paid for once.
//!
//! A page of a source is pinned exactly while an area of the source that covers it is shown in a domain, in whatever address space, or
//! a software pin covers it. So the spans of those areas and pins *are* the reference counts: what a new span adds to their union is
//! pinned and charged, what a span that goes leaves uncovered is given back. Nothing is kept per page.

use crate::holds::Holds;
use crate::{Area, Error, Pages};
use addr::{Page, Span};
use backing::{Backing, PinError};
use std::any::Any;
use std::fmt::{self, Debug};
use std::sync::{Arc, PoisonError};
use sync::fail;
use sync::prim::{Mutex, MutexGuard};
use sync::rank::{self, Rank, RankGuard};

/// Who pays for pinned pages: a user's limit on locked memory, a process's counters.
///
/// Called while the source is locked; it must not call back into this crate.
pub trait Charge: Send + Sync + Debug {
    /// Takes `pages` more on the account. Asked after they have been pinned.
    ///
    /// # Errors
    /// `Limit`, `NoMemory`: the account is as before, and the pages are given back.
    fn charge(&self, pages: u64) -> Result<(), PinError>;

    /// Takes `pages` off the account.
    fn uncharge(&self, pages: u64);

    /// For an upper layer that wants its own type back.
    fn as_any(&self) -> &dyn Any;
}

/// What software may do with a source, and what its pages cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Nature {
    /// Pinned while used.
    Memory,
    /// Another device's memory: never pinned, never paid for, out of reach for software.
    Device,
}

/// Pages that one map call brought in.
pub struct Source {
    pages: Arc<Pages>,
    offset: u64,
    len: u64,
    at: u64,
    writable: bool,
    nature: Nature,
    state: Mutex<State>,
}

struct State {
    holds: Holds,
    /// How many pages are pinned, and charged.
    pinned: u64,
    charge: Option<Arc<dyn Charge>>,
}

/// The lock of a source: after the area trees, before the pages of any backing.
struct Locked<'a> {
    state: MutexGuard<'a, State>,
    _rank: RankGuard,
}

impl Source {
    /// `len` bytes from byte `offset` of a backing on. `at` is where the mapper has them, a user address or an offset in a file: automatic
    /// placement keeps to it. Nothing is pinned before a domain or a pin needs it; then for writing too if `writable`.
    pub fn new(backing: &Arc<Backing>, offset: u64, len: u64, at: u64, writable: bool, charge: Option<Arc<dyn Charge>>) -> Arc<Self> {
        Self::of(backing, offset, len, at, writable, charge, Nature::Memory)
    }

    /// Memory of another device, a dma-buf for example: domains show it, software cannot reach it, and it is neither pinned nor paid for.
    /// Revoke it with [`Backing::close`].
    pub fn device(backing: &Arc<Backing>, offset: u64, len: u64, at: u64, writable: bool) -> Arc<Self> {
        Self::of(backing, offset, len, at, writable, None, Nature::Device)
    }

    fn of(
        backing: &Arc<Backing>,
        offset: u64,
        len: u64,
        at: u64,
        writable: bool,
        charge: Option<Arc<dyn Charge>>,
        nature: Nature,
    ) -> Arc<Self> {
        let state = Mutex::new(State { holds: Holds::new(), pinned: 0, charge });
        Arc::new(Self { pages: Pages::of(backing), offset, len, at, writable, nature, state })
    }

    /// Whose pages.
    pub fn backing(&self) -> &Arc<Backing> {
        self.pages.backing()
    }

    /// Every area over the same backing.
    pub fn pages(&self) -> &Arc<Pages> {
        &self.pages
    }

    /// The byte of the backing that it begins with.
    pub fn offset_bytes(&self) -> u64 {
        self.offset
    }

    /// Its length; 0 and more than the backing has are refused when it is mapped.
    pub fn len_bytes(&self) -> u64 {
        self.len
    }

    /// Where the mapper has it: a user address, or an offset in a file.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// Whether it was brought in for writing. Copies may write only then.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Whether it is another device's memory.
    pub fn is_device(&self) -> bool {
        self.nature == Nature::Device
    }

    /// The pages of the backing that are pinned now, ascending.
    pub fn pinned(&self) -> Vec<Span<Page>> {
        let mut spans: Vec<Span<Page>> = Vec::new();
        self.lock().state.holds.each_covered(|span| match spans.last_mut() {
            Some(last) if last.overlaps(span) || last.touches(span) => *last = Span::of(last.start(), last.last().max(span.last())),
            _ => spans.push(span),
        });
        spans
    }

    /// How many pages are pinned, and charged, now.
    pub fn pinned_pages(&self) -> u64 {
        self.lock().state.pinned
    }

    /// Who pays.
    pub fn charge_ref(&self) -> Option<Arc<dyn Charge>> {
        self.lock().state.charge.clone()
    }

    /// Puts somebody else in charge. Answers who was, and how many pages are on that account: settling it is up to the caller.
    pub fn replace_charge(&self, charge: Option<Arc<dyn Charge>>) -> (Option<Arc<dyn Charge>>, u64) {
        let mut locked = self.lock();
        let before = std::mem::replace(&mut locked.state.charge, charge);
        (before, locked.state.pinned)
    }

    /// Whether every page of `span` is pinned now.
    pub(crate) fn covers(&self, span: Span<Page>) -> bool {
        self.lock().state.holds.each_gap(span, |_| Err(())).is_ok()
    }

    /// One more reason for the pages of `span` to stay pinned.
    ///
    /// # Errors
    /// What the owner or the account says. Everything is as before then.
    pub(crate) fn hold(&self, span: Span<Page>) -> Result<(), Error> {
        if self.nature == Nature::Device {
            return Ok(());
        }
        fail::step("ioas.pin")?;
        let mut locked = self.lock();
        let State { holds, pinned, charge } = &mut *locked.state;
        holds.reserve().map_err(|_| PinError::NoMemory { pages: span })?;
        let (mut runs, mut fresh) = (0u64, 0);
        let done = holds.each_gap(span, |gap| {
            if runs > 0 {
                fail::step("ioas.pin_next")?;
            }
            self.backing().pin(gap, self.writable)?;
            (runs, fresh) = (runs + 1, fresh + gap.len());
            Ok::<_, PinError>(())
        });
        let done = done.and_then(|()| if fresh > 0 { pay(charge.as_deref(), fresh) } else { Ok(()) });
        if let Err(error) = done {
            self.undo(holds, span, runs);
            return Err(error.into());
        }
        holds.add(span);
        *pinned += fresh;
        Ok(())
    }

    /// Gives the first `runs` uncovered runs of `span` back.
    #[cold]
    fn undo(&self, holds: &Holds, span: Span<Page>, mut runs: u64) {
        let _all = holds.each_gap(span, |gap| {
            runs = runs.checked_sub(1).ok_or(())?;
            self.backing().unpin(gap);
            Ok::<_, ()>(())
        });
    }

    /// One reason less. What nobody else needs is taken off the account and unpinned.
    pub(crate) fn release(&self, span: Span<Page>) {
        if self.nature == Nature::Device {
            return;
        }
        let mut locked = self.lock();
        let State { holds, pinned, charge } = &mut *locked.state;
        let was_there = holds.remove(span);
        debug_assert!(was_there, "{span} was not held");
        let mut gone = 0;
        let each = |then: &mut dyn FnMut(Span<Page>)| {
            let _all = holds.each_gap(span, |gap| {
                then(gap);
                Ok::<_, std::convert::Infallible>(())
            });
        };
        each(&mut |gap| gone += gap.len());
        if gone == 0 {
            return;
        }
        if let Some(charge) = charge {
            charge.uncharge(gone);
        }
        each(&mut |gap| self.backing().unpin(gap));
        *pinned -= gone;
    }

    /// Two reasons in the place of one that they make up.
    ///
    /// # Errors
    /// No memory; nothing has changed.
    pub(crate) fn split_hold(&self, whole: Span<Page>, parts: [Span<Page>; 2]) -> Result<(), Error> {
        if self.nature == Nature::Device {
            return Ok(());
        }
        fail::step("ioas.split_hold")?;
        let mut locked = self.lock();
        let holds = &mut locked.state.holds;
        holds.reserve_two()?;
        let was_there = holds.remove(whole);
        debug_assert!(was_there, "{whole} was not held");
        parts.into_iter().for_each(|part| holds.add(part));
        Ok(())
    }

    /// Undoes [`Source::split_hold`].
    pub(crate) fn join_hold(&self, parts: [Span<Page>; 2], whole: Span<Page>) {
        if self.nature == Nature::Device {
            return;
        }
        let mut locked = self.lock();
        let holds = &mut locked.state.holds;
        for part in parts {
            let was_there = holds.remove(part);
            debug_assert!(was_there, "{part} was not held");
        }
        // Two places have become free.
        holds.add(whole);
    }

    fn lock(&self) -> Locked<'_> {
        // Ids of backings begin at 1.
        let rank = rank::enter_ordered(Rank::PagesSpan, 0);
        Locked { state: self.state.lock().unwrap_or_else(PoisonError::into_inner), _rank: rank }
    }
}

fn pay(charge: Option<&dyn Charge>, pages: u64) -> Result<(), PinError> {
    fail::step("ioas.charge")?;
    charge.map_or(Ok(()), |charge| charge.charge(pages))
}

impl Area {
    /// The pages that it shares with its copies; `None` when it was mapped as a backing, without anybody who pins or pays.
    pub fn source(&self) -> Option<&Arc<Source>> {
        self.source.as_ref()
    }

    /// Pins what the area needs while a domain shows it.
    pub(crate) fn hold(&self) -> Result<(), Error> {
        self.source.as_ref().map_or(Ok(()), |source| source.hold(self.page_span()))
    }

    /// Undoes [`Area::hold`], after the flush (I-4).
    pub(crate) fn release(&self) {
        if let Some(source) = &self.source {
            source.release(self.page_span());
        }
    }
}

impl Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Source");
        out.field("backing", &self.backing().id()).field("offset", &self.offset).field("len", &self.len);
        out.field("pinned", &self.pinned()).finish_non_exhaustive()
    }
}
