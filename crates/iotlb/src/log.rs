//! The invalidation log of a domain: what contexts must forget before they use their caches again (D-2).
//!
//! A ring of spans under a running number. A context compares one number when it enters a guard; what it missed it reads without a
//! lock, and each slot says whose number it holds, so a slot that was overwritten meanwhile is noticed. Whoever missed more than the
//! ring has forgets everything.
//!
//! One log serves both caches of a context: a span names leaves, or the tables that serve it ([`pt::Gather`]). What is about one leaves the
//! other alone, so a merge costs no cached translation.

use crate::sys::{AtomicU64, Mutex, Ordering, fence};
use addr::{Iova, Span};
use std::sync::PoisonError;

/// Spans that the ring keeps: four batches of the largest size (253). Under loom so few that every test can overrun it.
const SLOTS: u64 = if cfg!(loom) { 2 } else { 1024 };

/// One logged span. `number` is its place in the log counted from 1, twice, and one more when the span is about tables; 0 while the slot is
/// being written. Never on two cache lines.
#[repr(align(32))]
struct Slot {
    number: AtomicU64,
    start: AtomicU64,
    last: AtomicU64,
}

impl Slot {
    fn empty() -> Self {
        let [number, start, last] = std::array::from_fn(|_| AtomicU64::new(0));
        Self { number, start, last }
    }
}

/// In a slot's number: the span is about tables.
const TABLES: u64 = 1;

/// What a context has to forget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missed {
    /// The translations of these addresses.
    Span(Span<Iova>),
    /// The tables that serve any of these addresses. Translations stay.
    Tables(Span<Iova>),
    /// All of it: more was logged than the ring keeps.
    Everything,
}

/// What was cleared in a domain's table.
pub struct Log {
    slots: Box<[Slot]>,
    front: Front,
}

/// What writers pass each other. Alone, so that readers, who look at the head, find what else a domain has where they left it.
#[repr(align(128))]
struct Front {
    /// Spans logged so far.
    head: AtomicU64,
    writer: Mutex<()>,
}

impl Default for Log {
    fn default() -> Self {
        Self::new()
    }
}

impl Log {
    /// Nothing logged yet.
    pub fn new() -> Self {
        let front = Front { head: AtomicU64::new(0), writer: Mutex::new(()) };
        Self { slots: (0..SLOTS).map(|_| Slot::empty()).collect(), front }
    }

    /// How much has been logged: the number a context keeps.
    #[inline]
    pub fn head(&self) -> u64 {
        self.front.head.load(Ordering::Acquire)
    }

    /// Logs spans whose translations go; they become visible together. Does not allocate. Answers how many there were.
    pub fn append(&self, spans: impl Iterator<Item = Span<Iova>>) -> u64 {
        self.append_with_tables(spans, std::iter::empty())
    }

    /// Logs all that an edit took out, as [`pt::Gather`] has it: spans whose translations go, and regions whose tables go. They become visible
    /// together. Does not allocate. Answers how many spans there were.
    pub fn append_with_tables(&self, spans: impl Iterator<Item = Span<Iova>>, regions: impl Iterator<Item = Span<Iova>>) -> u64 {
        let _writer = self.front.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.front.head.load(Ordering::Relaxed);
        let mut head = before;
        for span in spans {
            self.write(&mut head, span, 0);
        }
        let spans = head - before;
        for region in regions {
            self.write(&mut head, region, TABLES);
        }
        self.front.head.store(head, Ordering::Release);
        spans
    }

    #[inline(always)]
    fn write(&self, head: &mut u64, span: Span<Iova>, what: u64) {
        let slot = &self.slots[(*head % SLOTS) as usize];
        *head += 1;
        slot.number.store(0, Ordering::Relaxed);
        // A reader that sees one of the values below sees the number gone, too.
        fence(Ordering::Release);
        slot.start.store(span.start().get(), Ordering::Relaxed);
        slot.last.store(span.last().get(), Ordering::Relaxed);
        slot.number.store(*head << 1 | what, Ordering::Relaxed);
    }

    /// Tells `forget` what was logged after number `since`, up to `head`.
    #[cold]
    pub fn catch_up(&self, since: u64, head: u64, mut forget: impl FnMut(Missed)) {
        if head.wrapping_sub(since) > SLOTS {
            return forget(Missed::Everything);
        }
        for number in since + 1..=head {
            match self.read(number) {
                Some(missed) => forget(missed),
                None => return forget(Missed::Everything),
            }
        }
    }

    /// `number` is at most a head that was read before, so what is read here is that span or one that took its slot since. In that case the number
    /// is gone, and went first.
    fn read(&self, number: u64) -> Option<Missed> {
        let slot = &self.slots[((number - 1) % SLOTS) as usize];
        let (start, last) = (slot.start.load(Ordering::Relaxed), slot.last.load(Ordering::Relaxed));
        fence(Ordering::Acquire);
        let now = slot.number.load(Ordering::Relaxed);
        let span = Span::new(Iova::new(start), Iova::new(last)).filter(|_| now >> 1 == number)?;
        Some(if now & TABLES == 0 { Missed::Span(span) } else { Missed::Tables(span) })
    }
}

impl std::fmt::Debug for Log {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Log").field("head", &self.head()).finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn span(at: u64) -> Span<Iova> {
        Span::of(Iova::new(at), Iova::new(at ^ 0xffff_ffff))
    }

    #[test]
    fn exact_until_the_ring_is_full() {
        let log = Log::new();
        assert_eq!(log.append((0..SLOTS).map(span)), SLOTS);
        let mut seen = Vec::new();
        log.catch_up(0, log.head(), |missed| seen.push(missed));
        assert_eq!(seen, (0..SLOTS).map(|at| Missed::Span(span(at))).collect::<Vec<_>>());
        log.append([span(0)].into_iter());
        for (since, expected) in [(0, Missed::Everything), (SLOTS, Missed::Span(span(0)))] {
            let mut seen = Vec::new();
            log.catch_up(since, log.head(), |missed| seen.push(missed));
            assert_eq!(seen, [expected]);
        }
        assert_eq!(log.append((0..3 * SLOTS).map(span)), 3 * SLOTS);
        let mut seen = Vec::new();
        log.catch_up(SLOTS + 1, log.head(), |missed| seen.push(missed));
        assert_eq!(seen, [Missed::Everything]);
    }

    #[test]
    fn leaves_and_tables_are_told_apart() {
        let log = Log::new();
        assert_eq!(log.append_with_tables([span(1), span(2)].into_iter(), [span(3)].into_iter()), 2);
        assert_eq!(log.append_with_tables([].into_iter(), [span(4)].into_iter()), 0);
        log.append([span(5)].into_iter());
        let mut seen = Vec::new();
        log.catch_up(0, log.head(), |missed| seen.push(missed));
        let expected = [(1, false), (2, false), (3, true), (4, true), (5, false)];
        assert_eq!(seen, expected.map(|(at, tables)| if tables { Missed::Tables(span(at)) } else { Missed::Span(span(at)) }));
    }

    #[test]
    fn what_is_overwritten_while_it_is_read_is_noticed() {
        let log = Log::new();
        log.append((0..10).map(span));
        let mut seen = Vec::new();
        log.catch_up(0, log.head(), |missed| {
            seen.push(missed);
            if seen.len() == 4 {
                log.append((10..10 + SLOTS).map(span));
            }
        });
        let expected: Vec<_> = (0..4).map(|at| Missed::Span(span(at))).chain([Missed::Everything]).collect();
        assert_eq!(seen, expected);
    }

    #[test]
    fn a_reader_never_sees_half_a_span() {
        let log = Log::new();
        let rounds = if cfg!(debug_assertions) { 2_000 } else { 20_000 };
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| (0..rounds).for_each(|round| _ = log.append((0..7).map(|at| span(round * 7 + at)))));
            let (mut since, mut spans, mut overruns) = (0, 0u64, 0u64);
            while !writer.is_finished() || since != log.head() {
                let head = log.head();
                log.catch_up(since, head, |missed| match missed {
                    Missed::Span(seen) => {
                        assert_eq!(seen, span(seen.start().get()));
                        spans += 1;
                    }
                    Missed::Tables(span) => panic!("{span} was logged as one of leaves"),
                    Missed::Everything => overruns += 1,
                });
                since = head;
            }
            assert_eq!(since, rounds * 7);
            assert!(spans + overruns > 0);
        });
    }
}
