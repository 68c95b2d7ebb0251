//! Exclusion over spans: whoever changes what a span's leaves say holds that span, and work on disjoint spans runs in parallel (D-3).
//!
//! The lock is a short list of who holds what and who waits for what, under a mutex that is held for a scan of that list only. A
//! request gives way to held spans and to earlier requests that wait, so a wide span is not starved by narrow ones. A batch takes all its spans in one go
//! or waits for all of them, so two batches cannot hold each other up.

use crate::sys::{self, Condvar, Mutex, MutexGuard};
use addr::{Address, Span};
use std::fmt;

/// Mutual exclusion over spans of one space.
///
/// A thread holds one guard of a lock at a time: what it needs together, it asks for together ([`SpanLock::lock_many`]).
///
/// ```
/// use addr::{Page, Span};
/// let lock = lockstep_sync::SpanLock::new();
/// let low = lock.lock(Span::of(Page::new(0), Page::new(9)));
/// assert!(lock.try_lock(Span::of(Page::new(9), Page::new(12))).is_none());
/// assert!(lock.try_lock(Span::of(Page::new(10), Page::new(12))).is_some());
/// drop(low);
/// ```
pub struct SpanLock<A> {
    state: Mutex<State<A>>,
    freed: Condvar,
}

struct State<A> {
    /// Grows to the most spans ever held and waited for at once, and is never given back: locking allocates only on the way there.
    entries: Vec<Entry<A>>,
    next_ticket: u64,
    /// Requests that wait, so that nobody is woken for nothing.
    waiting: usize,
}

struct Entry<A> {
    span: Span<A>,
    /// Which request; lower came earlier.
    ticket: u64,
    held: bool,
    #[cfg(debug_assertions)]
    thread: sys::thread::ThreadId,
}

/// What [`SpanLock::reserve`] could not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no memory for {spans} more spans to lock")]
pub struct NoRoom {
    /// How many spans were asked for.
    pub spans: usize,
}

impl<A: Address> Default for SpanLock<A> {
    fn default() -> Self {
        Self::new()
    }
}

impl<A: Address> SpanLock<A> {
    /// Nothing is held.
    pub fn new() -> Self {
        Self { state: Mutex::new(State { entries: Vec::with_capacity(8), next_ticket: 0, waiting: 0 }), freed: Condvar::new() }
    }

    /// Waits until nothing of `span` is held, nor asked for by an earlier request, and holds it.
    #[inline]
    pub fn lock(&self, span: Span<A>) -> SpanGuard<'_, A> {
        self.lock_many(&[span])
    }

    /// As [`SpanLock::lock`] for several spans at once.
    ///
    /// # Panics
    /// In debug builds, when `spans` are not in ascending order, or overlap, or the calling thread holds one of them already.
    #[inline]
    pub fn lock_many(&self, spans: &[Span<A>]) -> SpanGuard<'_, A> {
        debug_assert!(spans.is_sorted_by(|a, b| a.last() < b.start()), "spans to lock overlap or are out of order");
        let mut state = sys::lock(&self.state);
        let ticket = state.ticket();
        let free = state.free(spans, ticket);
        #[cfg(debug_assertions)]
        if !free {
            state.check_not_mine(spans);
        }
        state.push(spans, ticket, free);
        if !free {
            self.wait(state, spans, ticket);
        }
        SpanGuard { lock: self, ticket, hull: hull(spans), whole: spans.len() == 1 }
    }

    #[cold]
    fn wait(&self, mut state: MutexGuard<'_, State<A>>, spans: &[Span<A>], ticket: u64) {
        state.waiting += 1;
        loop {
            state = sys::wait(&self.freed, state);
            if state.free(spans, ticket) {
                break;
            }
        }
        state.waiting -= 1;
        state.entries.iter_mut().filter(|entry| entry.ticket == ticket).for_each(|entry| entry.held = true);
    }

    /// Holds `span` if nobody does or waits to.
    #[inline]
    pub fn try_lock(&self, span: Span<A>) -> Option<SpanGuard<'_, A>> {
        let mut state = sys::lock(&self.state);
        let ticket = state.ticket();
        if !state.free(&[span], ticket) {
            return None;
        }
        state.push(&[span], ticket, true);
        Some(SpanGuard { lock: self, ticket, hull: Some(span), whole: true })
    }

    /// Makes room, so that locking this many spans on top of what is held now will not allocate.
    ///
    /// # Errors
    /// [`NoRoom`].
    pub fn reserve(&self, spans: usize) -> Result<(), NoRoom> {
        sys::lock(&self.state).entries.try_reserve(spans).map_err(|_| NoRoom { spans })
    }

    /// Whether somebody holds something of `span`. For assertions and reports: it may be over when this returns.
    pub fn is_held(&self, span: Span<A>) -> bool {
        sys::lock(&self.state).entries.iter().any(|entry| entry.held && entry.span.overlaps(span))
    }

    #[inline]
    fn unlock(&self, ticket: u64, one: bool) {
        let mut state = sys::lock(&self.state);
        if one {
            if let Some(at) = state.entries.iter().rposition(|entry| entry.ticket == ticket) {
                state.entries.swap_remove(at);
            }
        } else {
            state.entries.retain(|entry| entry.ticket != ticket);
        }
        let wake = state.waiting > 0;
        drop(state);
        if wake {
            self.freed.notify_all();
        }
    }
}

impl<A: Address> State<A> {
    fn ticket(&mut self) -> u64 {
        self.next_ticket += 1;
        self.next_ticket
    }

    #[inline]
    fn free(&self, spans: &[Span<A>], ticket: u64) -> bool {
        !self.entries.iter().any(|entry| (entry.held || entry.ticket < ticket) && entry.ticket != ticket && meets(spans, entry.span))
    }

    /// A wait for the calling thread's own guard would never end.
    #[cfg(debug_assertions)]
    fn check_not_mine(&self, spans: &[Span<A>]) {
        let me = sys::thread::current().id();
        let mine = self.entries.iter().find(|entry| entry.held && entry.thread == me && !cfg!(loom) && meets(spans, entry.span));
        assert!(mine.is_none(), "this thread holds {:?} already and would wait for itself", mine.map(|entry| entry.span));
    }

    #[inline]
    fn push(&mut self, spans: &[Span<A>], ticket: u64, held: bool) {
        self.entries.extend(spans.iter().map(|&span| Entry {
            span,
            ticket,
            held,
            #[cfg(debug_assertions)]
            thread: sys::thread::current().id(),
        }));
    }
}

/// Whether one of `spans`, ascending and disjoint, overlaps `other`.
#[inline]
fn meets<A: Address>(spans: &[Span<A>], other: Span<A>) -> bool {
    if let [one] = spans {
        return one.overlaps(other);
    }
    let at = spans.partition_point(|span| span.last() < other.start());
    spans.get(at).is_some_and(|span| span.overlaps(other))
}

fn hull<A: Address>(spans: &[Span<A>]) -> Option<Span<A>> {
    match spans {
        [] => None,
        [first, ..] => Some(Span::of(first.start(), spans[spans.len() - 1].last())),
    }
}

impl<A> fmt::Debug for SpanLock<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SpanLock").finish_non_exhaustive()
    }
}

/// Spans that are held; dropping it gives them back.
#[must_use]
pub struct SpanGuard<'a, A: Address> {
    lock: &'a SpanLock<A>,
    ticket: u64,
    hull: Option<Span<A>>,
    /// Whether the hull is all held.
    whole: bool,
}

impl<A: Address> SpanGuard<'_, A> {
    /// From the first to the last address held; with gaps when it was a batch. `None` for a batch of nothing.
    pub fn hull(&self) -> Option<Span<A>> {
        self.hull
    }

    /// Whether all of `span` is held by this guard. Neighbouring spans of a batch count as one.
    pub fn covers(&self, span: Span<A>) -> bool {
        if self.whole {
            return self.hull.is_some_and(|hull| hull.covers(span));
        }
        let state = sys::lock(&self.lock.state);
        let mut rest = Some(span);
        // The entries of a batch may have been moved about by others' unlocks, so look for the one that holds the next address.
        while let Some(left) = rest {
            let Some(entry) = state.entries.iter().find(|entry| entry.ticket == self.ticket && entry.span.contains(left.start())) else {
                return false;
            };
            rest = entry.span.last().checked_add(1).and_then(|next| Span::new(next, left.last()));
        }
        true
    }

    /// Whether this guard belongs to `lock`.
    pub fn is_of(&self, lock: &SpanLock<A>) -> bool {
        std::ptr::eq(self.lock, lock)
    }
}

impl<A: Address> Drop for SpanGuard<'_, A> {
    #[inline]
    fn drop(&mut self) {
        self.lock.unlock(self.ticket, self.whole);
    }
}

impl<A: Address> fmt::Debug for SpanGuard<'_, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SpanGuard").field("hull", &self.hull).finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use addr::Page;
    use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
    use std::thread;

    fn span(start: u64, last: u64) -> Span<Page> {
        Span::of(Page::new(start), Page::new(last))
    }

    #[test]
    fn batches() {
        let lock = SpanLock::new();
        let batch = lock.lock_many(&[span(0, 1), span(2, 3), span(10, 12)]);
        assert!(batch.covers(span(0, 3)) && batch.covers(span(11, 12)));
        assert!(!batch.covers(span(3, 4)) && !batch.covers(span(9, 10)));
        assert_eq!(batch.hull(), Some(span(0, 12)));
        assert!(batch.is_of(&lock) && lock.is_held(span(12, 20)));
        let other = lock.lock(span(5, 9));
        drop(batch);
        assert!(!lock.is_held(span(0, 4)) && other.covers(span(5, 9)));
        assert_eq!(lock.lock_many(&[]).hull(), None);
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "would wait for itself")]
    fn asking_again_is_caught() {
        let lock = SpanLock::new();
        let _first = lock.lock(span(0, 9));
        let _second = lock.lock(span(9, 9));
    }

    #[test]
    fn one_holder_per_page_and_no_lost_wakeup() {
        const PAGES: u64 = 16;
        let lock = SpanLock::new();
        let inside: Vec<AtomicU32> = (0..PAGES).map(|_| AtomicU32::new(0)).collect();
        let taken = AtomicU64::new(0);
        thread::scope(|scope| {
            for thread in 0..4u64 {
                let (lock, inside, taken) = (&lock, &inside, &taken);
                scope.spawn(move || {
                    let mut seed = thread + 1;
                    for _ in 0..5_000 {
                        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                        let start = (seed >> 33) % PAGES;
                        let last = (start + (seed >> 50) % 5).min(PAGES - 1);
                        let spans =
                            if start > 1 && seed >> 63 == 1 { vec![span(0, 0), span(start, last)] } else { vec![span(start, last)] };
                        let guard = lock.lock_many(&spans);
                        let pages = || spans.iter().flat_map(|span| span.start().get()..=span.last().get());
                        for page in pages() {
                            assert_eq!(inside[page as usize].fetch_add(1, Ordering::Relaxed), 0);
                        }
                        for page in pages() {
                            inside[page as usize].fetch_sub(1, Ordering::Relaxed);
                        }
                        taken.fetch_add(1, Ordering::Relaxed);
                        drop(guard);
                    }
                });
            }
        });
        assert_eq!(taken.load(Ordering::Relaxed), 20_000);
        assert!(!lock.is_held(span(0, PAGES)));
    }
}
