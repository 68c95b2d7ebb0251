//! One stretch of IOVA that stands for a stretch of one backing.

use crate::placement::Reservation;
use crate::{LeafRule, Pages, Source};
use addr::{Address, Handle, Iova, Lg2, Oa, PAGE_BYTES, PAGE_LG2, Page, SizeSet, Span};
use backing::Backing;
use iommu::Domain;
use pt::Perm;
use std::fmt;
use std::sync::{Arc, OnceLock, PoisonError};
use sync::prim::{
    Mutex,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

/// Where an area is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AreaState {
    /// Its IOVA is taken, its leaves are being installed.
    Building,
    /// In use.
    Live,
    /// Its leaves are going; nothing maps them again.
    Closing,
}

/// What the areas of one IOAS share: how leaves are chosen.
#[derive(Debug)]
pub(crate) struct Policy {
    pub(crate) rule: Arc<dyn LeafRule>,
    /// Every leaf is exactly one page (rule 34).
    pub(crate) small_only: AtomicBool,
}

impl Policy {
    pub(crate) fn sizes(&self) -> SizeSet {
        if self.small_only.load(Ordering::Relaxed) { SizeSet::only(Lg2::K4) } else { SizeSet::ALL }
    }
}

/// A domain's place in an IOAS.
#[derive(Debug)]
pub(crate) struct Seat {
    pub(crate) domain: Arc<Domain>,
    /// A detach has been here: the area's leaves are out of the domain, and none is installed any more, so one flush at the end is enough.
    pub(crate) leaving: bool,
    /// What it cannot translate.
    pub(crate) outside: Vec<Reservation>,
}

impl Seat {
    /// Whether a detach has taken the area's leaves out. The table may go away at any moment, whoever holds the area's pages.
    pub(crate) fn is_leaving(&self) -> bool {
        self.leaving
    }
}

/// A seat list is replaced, never changed, so that whoever works on an area has one list from beginning to end.
pub(crate) type Seats = Arc<[Arc<Seat>]>;

/// One stretch of IOVA that stands for a stretch of one backing.
pub struct Area {
    pub(crate) span: Span<Iova>,
    pub(crate) pages: Arc<Pages>,
    pub(crate) source: Option<Arc<Source>>,
    /// Byte of the backing that the first IOVA stands for.
    pub(crate) offset: u64,
    pub(crate) perm: Perm,
    /// Whether the pages were mapped for writing when they first were; copies inherit it (rule 18).
    pub(crate) writable: bool,
    pub(crate) policy: Arc<Policy>,
    /// 0 building, 1 live, else the ticket of the unmap that closes it.
    state: AtomicU64,
    /// Pins, locks, and whether new ones are refused.
    claims: AtomicU64,
    /// Where it stands among those over the same backing, once it is not the only one.
    listed: OnceLock<Handle>,
    /// In which domains its leaves are. Changed only under the span lock of its pages.
    seats: Mutex<Seats>,
}

/// What makes an area, before it has a place.
#[derive(Clone)]
pub(crate) struct Part {
    pub(crate) pages: Arc<Pages>,
    pub(crate) source: Option<Arc<Source>>,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) writable: bool,
}

const BUILDING: u64 = 0;
const LIVE: u64 = 1;

/// In [`Area::claims`]: one pin, one lock, and that neither is given any more.
const PIN: u64 = 1;
const LOCK: u64 = 1 << 32;
const SHUT: u64 = 1 << 63;

impl Area {
    pub(crate) fn new(span: Span<Iova>, part: Part, perm: Perm, policy: &Arc<Policy>, seats: Seats) -> Self {
        Self {
            span,
            pages: part.pages,
            source: part.source,
            offset: part.offset,
            perm,
            writable: part.writable,
            policy: Arc::clone(policy),
            state: AtomicU64::new(BUILDING),
            claims: AtomicU64::new(0),
            listed: OnceLock::new(),
            seats: Mutex::new(seats),
        }
    }

    /// Its IOVAs.
    pub fn span(&self) -> Span<Iova> {
        self.span
    }

    /// Whose pages they stand for.
    pub fn backing(&self) -> &Arc<Backing> {
        self.pages.backing()
    }

    /// The byte of the backing that the first IOVA stands for.
    pub fn offset_bytes(&self) -> u64 {
        self.offset
    }

    /// The pages it touches; without a domain, the first and last may be touched in part.
    pub fn page_span(&self) -> Span<Page> {
        Span::of(Page::new(self.offset), Page::new(self.offset + self.span.last_offset())).index(PAGE_LG2)
    }

    /// What devices may do through it.
    pub fn perm(&self) -> Perm {
        self.perm
    }

    /// Where it is in its life.
    pub fn state(&self) -> AreaState {
        match self.state.load(Ordering::Acquire) {
            BUILDING => AreaState::Building,
            LIVE => AreaState::Live,
            _ => AreaState::Closing,
        }
    }

    /// The domains that show it.
    pub fn domains(&self) -> Vec<Arc<Domain>> {
        self.seats().iter().filter(|seat| !seat.is_leaving()).map(|seat| Arc::clone(&seat.domain)).collect()
    }

    /// The byte of the backing behind `iova`, which lies in the area.
    pub(crate) fn byte_of(&self, iova: Iova) -> u64 {
        self.offset + iova.offset_from(self.span.start())
    }

    /// Where pages of it are seen, clipped to it. Whole pages once a domain is attached (rule 33).
    pub(crate) fn iova_of(&self, pages: Span<Page>) -> Option<Span<Iova>> {
        let bytes: Span<Page> = pages.unindex(PAGE_LG2);
        let own = Span::of(Page::new(self.offset), Page::new(self.offset + self.span.last_offset()));
        Some(self.span.project(own, bytes.intersect(own)?))
    }

    /// The pages behind a part of it.
    pub(crate) fn pages_of(&self, part: Span<Iova>) -> Option<Span<Page>> {
        let part = part.intersect(self.span)?;
        Some(Span::of(Page::new(self.byte_of(part.start())), Page::new(self.byte_of(part.last()))).index(PAGE_LG2))
    }

    /// Calls `run` for each contiguous run of `pages` that may have leaves, with the sizes they may have.
    pub(crate) fn each_run<E>(&self, pages: Span<Page>, mut run: impl FnMut(Span<Iova>, Oa, SizeSet) -> Result<(), E>) -> Result<(), E> {
        let Some(part) = pages.intersect(self.page_span()) else { return Ok(()) };
        let limit = self.policy.sizes();
        let backing = self.backing();
        for (states, state) in backing.states(part) {
            let mut rest = Some(states);
            while let Some(todo) = rest {
                let (answered, sizes) = self.policy.rule.leaf(backing, todo, state);
                let piece = Span::of(todo.start(), answered.last().clamp(todo.start(), todo.last()));
                rest = piece.last().checked_add(1).and_then(|next| Span::new(next, todo.last()));
                let Some(sizes) = sizes.map(|sizes| sizes.and(limit)) else { continue };
                for (pages, oa) in backing.extents(piece) {
                    if let Some(iova) = self.iova_of(pages) {
                        run(iova, oa.plus(self.byte_of(iova.start()) % PAGE_BYTES), sizes)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The leaves that `pages` should have now, for an audit: contiguous runs, each with its first output address and the sizes that its leaves may
    /// have. What lies between has no leaf. Stable only while the caller holds the pages.
    pub fn expected(&self, pages: Span<Page>, mut run: impl FnMut(Span<Iova>, Oa, SizeSet)) {
        let all = self.each_run(pages, |iova, oa, sizes| {
            run(iova, oa, sizes);
            Ok::<_, std::convert::Infallible>(())
        });
        match all {
            Ok(()) => {}
        }
    }

    pub(crate) fn publish(&self) {
        self.state.store(LIVE, Ordering::Release);
    }

    /// From live to closing; `false` when it was not live.
    pub(crate) fn close(&self, ticket: u64) -> bool {
        self.state.compare_exchange(LIVE, ticket, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Ends an area that never came to life.
    pub(crate) fn abandon(&self, ticket: u64) {
        self.state.store(ticket, Ordering::Release);
    }

    pub(crate) fn is_closed_by(&self, ticket: u64) -> bool {
        self.state.load(Ordering::Acquire) == ticket
    }

    /// One more pin; refused when the area is shut.
    pub(crate) fn claim_pin(&self) -> Result<(), u64> {
        self.claim(PIN)
    }

    /// One more lock; refused when the area is shut.
    pub(crate) fn claim_lock(&self) -> Result<(), u64> {
        self.claim(LOCK)
    }

    fn claim(&self, what: u64) -> Result<(), u64> {
        let open = |claims: u64| if claims & SHUT == 0 { claims.checked_add(what) } else { None };
        self.claims.fetch_update(Ordering::AcqRel, Ordering::Acquire, open).map(drop)
    }

    pub(crate) fn drop_pin(&self) {
        self.claims.fetch_sub(PIN, Ordering::AcqRel);
    }

    pub(crate) fn drop_lock(&self) {
        self.claims.fetch_sub(LOCK, Ordering::AcqRel);
    }

    pub(crate) fn pins(&self) -> u64 {
        self.claims.load(Ordering::Acquire) & (LOCK - 1)
    }

    pub(crate) fn locks(&self) -> u64 {
        (self.claims.load(Ordering::Acquire) & !SHUT) / LOCK
    }

    pub(crate) fn is_shut(&self) -> bool {
        self.claims.load(Ordering::Acquire) & SHUT != 0
    }

    /// Refuses pins and locks from now on, for good. Answers how many pins there are still; `None`, and nothing has changed, when it is locked.
    pub(crate) fn shut(&self) -> Option<u64> {
        let unlocked = |claims: u64| (claims & !SHUT < LOCK).then_some(claims | SHUT);
        let before = self.claims.fetch_update(Ordering::AcqRel, Ordering::Acquire, unlocked).ok()?;
        Some(before & (LOCK - 1))
    }

    /// Whether it is another device's memory.
    pub(crate) fn is_device(&self) -> bool {
        self.source.as_ref().is_some_and(|source| source.is_device())
    }

    /// Its place in the listing of its pages, for [`crate::listing`] alone.
    pub(crate) fn listed(&self) -> Option<Handle> {
        self.listed.get().copied()
    }

    pub(crate) fn set_listed(&self, handle: Handle) {
        let fresh = self.listed.set(handle);
        debug_assert!(fresh.is_ok(), "an area is listed once in its life");
    }

    pub(crate) fn seats(&self) -> Seats {
        Arc::clone(&self.seats.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The caller holds the span lock of the area's pages.
    pub(crate) fn set_seats(&self, seats: Seats) {
        *self.seats.lock().unwrap_or_else(PoisonError::into_inner) = seats;
    }
}

impl fmt::Debug for Area {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Area");
        out.field("span", &self.span).field("backing", &self.backing().id()).field("offset", &self.offset);
        out.field("perm", &self.perm).field("state", &self.state()).finish_non_exhaustive()
    }
}
