//! Devices with a translation cache of their own (PCIe ATS): what a flush must do so that such a cache holds nothing stale either.
//!
//! - *port*: one cache, and the queue of invalidations that it has not answered yet. It belongs to a device and, while that is attached, to its
//!   domain.
//! - *answer*: the device has dropped what an invalidation names and no access that used it is under way. The device answers between two
//!   transactions; an idle one answers at once, in the thread that asks.
//! - *quarantine*: a device that did not answer in time gets no access any more, translated or not, until it is reset.
//!
//! A flush sends its spans when it logs them, waits for its grace period, then for every answer. So the time-outs of an edit over several domains
//! overlap, and when the flush returns each device has either answered or lost all access: nothing stale is usable (I-4, I-7). The queue is a ring;
//! who missed more than it holds forgets everything. Sending, waiting and quarantine do not allocate and cannot fail (I-9).
//!
//! Source: PCIe base specification, address translation services (ATS); AMD IOMMU specification, 2.4.4 INVALIDATE_IOTLB_PAGES and the event
//! IOTLB_INV_TIMEOUT.

mod cache;
mod dma;
mod members;

pub use dma::AtsDma;
pub(crate) use members::Members;

use crate::Device;
use addr::{Iova, Span};
use cache::Cache;
use iotlb::{Log, Missed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError, Weak};
use std::time::{Duration, Instant};
use sync::fail;
use sync::pause::pause;
use sync::prim::atomic::{AtomicBool, AtomicU64, Ordering, fence};

/// What the caches of a device had to forget so far, and how it went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AtsStats {
    /// Caches that exist now.
    pub caches: u64,
    /// Invalidations sent, one for each span and cache.
    pub sent: u64,
    /// Answers; one may be for many invalidations.
    pub answers: u64,
    /// Waits that ended without an answer.
    pub timeouts: u64,
    /// How often the device was quarantined.
    pub quarantines: u64,
}

/// Counters of one device, over all its caches.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) sent: AtomicU64,
    pub(crate) answers: AtomicU64,
    pub(crate) timeouts: AtomicU64,
    pub(crate) quarantines: AtomicU64,
}

/// One cache of a device, and what it was asked to forget.
pub(crate) struct Port {
    device: Weak<Device>,
    counters: Arc<Counters>,
    /// What translated accesses hold as a guard: a number like a domain's, and nobody else's.
    guard: u32,
    timeout: Duration,
    cache: Mutex<Cache>,
    queue: Log,
    /// How much of the queue was answered; `u64::MAX` when the cache is gone.
    answered: AtomicU64,
    /// When the latest invalidation was sent, in nanoseconds since [`now`]'s start.
    sent_at: AtomicU64,
    answers: Mutex<()>,
    answer: Condvar,
    mute: AtomicBool,
}

impl Port {
    fn new(device: &Arc<Device>) -> Arc<Self> {
        Arc::new(Self {
            device: Arc::downgrade(device),
            counters: Arc::clone(device.ats_counters()),
            guard: device.iommu().unique_id(),
            timeout: device.iommu().ats_timeout(),
            cache: Mutex::default(),
            queue: Log::new(),
            answered: AtomicU64::new(0),
            sent_at: AtomicU64::new(0),
            answers: Mutex::default(),
            answer: Condvar::new(),
            mute: AtomicBool::new(false),
        })
    }

    pub(crate) fn guard(&self) -> u32 {
        self.guard
    }

    /// Puts spans into the queue. An idle device looks at them when somebody waits for it, a busy one after its transaction.
    pub(crate) fn send(&self, spans: impl Iterator<Item = Span<Iova>>) {
        // Before the spans can be seen: whoever waits for them gives the device its time from now on.
        self.sent_at.fetch_max(now(), Ordering::Relaxed);
        let sent = self.queue.append(spans);
        self.counters.sent.fetch_add(sent, Ordering::Relaxed);
    }

    /// Everything, for a device that changes its domain or its identity.
    pub(crate) fn send_all(&self) {
        self.send(std::iter::once(Span::whole()));
    }

    /// Waits until the device has answered all that is in the queue now. `false`: it did not, in its time.
    pub(crate) fn wait(&self) -> bool {
        if fail::planted("iommu.ats_ignore_answers") {
            return true;
        }
        let target = self.queue.head();
        let deadline = Duration::from_nanos(self.sent_at.load(Ordering::Relaxed)) + self.timeout;
        let mut rounds = 0;
        loop {
            self.serve();
            if self.has_answered(target) {
                return true;
            }
            pause();
            let left = deadline.saturating_sub(Duration::from_nanos(now()));
            if !self.may_answer() {
                return false;
            }
            if left.is_zero() {
                self.counters.timeouts.fetch_add(1, Ordering::Relaxed);
                return false;
            }
            rounds += 1;
            match rounds {
                0..SPINS => std::hint::spin_loop(),
                SPINS..YIELDS => std::thread::yield_now(),
                _ => self.sleep(target, left),
            }
        }
    }

    /// Until an answer comes, and at most a moment: a device that has become idle in between answers when it is asked again.
    fn sleep(&self, target: u64, left: Duration) {
        let held = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.has_answered(target) {
            drop(self.answer.wait_timeout(held, left.min(MOMENT)));
        }
    }

    fn has_answered(&self, target: u64) -> bool {
        self.answered.load(Ordering::Acquire) >= target
    }

    /// Whether waiting has a point: not for a device that is quarantined already. Decided under the lock of the device's state, so whoever lifts
    /// the quarantine afterwards comes after all that the caller did before.
    fn may_answer(&self) -> bool {
        self.device.upgrade().is_some_and(|device| !device.is_quarantined())
    }

    /// The device's side: answers what is in the queue, unless a transaction is under way. That one's thread does it then.
    pub(crate) fn serve(&self) {
        fence(Ordering::SeqCst);
        if self.has_answered(self.queue.head()) {
            return;
        }
        match self.cache.try_lock() {
            Ok(mut cache) => self.catch_up(&mut cache),
            Err(TryLockError::Poisoned(poisoned)) => self.catch_up(&mut poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => {}
        }
    }

    /// The device's side, with the cache at hand and no transaction under way: forgets, then answers.
    fn catch_up(&self, cache: &mut Cache) {
        let head = self.queue.head();
        if cache.seen == head || self.is_mute() {
            return;
        }
        // The planted fault: a device that answers and forgets nothing.
        if !fail::planted("iommu.ats_false_answer") {
            self.queue.catch_up(cache.seen, head, |missed| match missed {
                Missed::Span(span) => cache.invalidate(span),
                Missed::Tables(_) => {}
                Missed::Everything => cache.clear(),
            });
        }
        cache.seen = head;
        self.answer(head);
    }

    fn answer(&self, upto: u64) {
        self.answered.fetch_max(upto, Ordering::Release);
        self.counters.answers.fetch_add(1, Ordering::Relaxed);
        drop(self.answers.lock().unwrap_or_else(PoisonError::into_inner));
        self.answer.notify_all();
    }

    /// What a reset does to the cache, whether the device answers or not: it is empty, and nothing is outstanding.
    pub(crate) fn reset(&self) {
        let mut cache = self.cache();
        cache.clear();
        cache.seen = self.queue.head();
        self.answer(cache.seen);
    }

    /// The cache is gone, so nobody need wait for it any more.
    fn close(&self) {
        self.answer(u64::MAX);
    }

    /// The outstanding spans in one, for a report.
    pub(crate) fn outstanding(&self) -> Span<Iova> {
        let (since, head) = (self.answered.load(Ordering::Acquire), self.queue.head());
        let mut hull: Option<Span<Iova>> = None;
        self.queue.catch_up(since.min(head), head, |missed| {
            let span = match missed {
                Missed::Span(span) => span,
                Missed::Tables(_) => return,
                Missed::Everything => Span::whole(),
            };
            hull = Some(hull.map_or(span, |hull| Span::of(hull.start().min(span.start()), hull.last().max(span.last()))));
        });
        hull.unwrap_or(Span::whole())
    }

    fn is_mute(&self) -> bool {
        self.mute.load(Ordering::Relaxed) || fail::planted("iommu.ats_never_answers")
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Looks before a waiter gives the processor away, and before it sleeps.
const SPINS: u32 = 64;
const YIELDS: u32 = 128;
/// How long a waiter sleeps before it asks again.
const MOMENT: Duration = Duration::from_millis(1);

/// Nanoseconds since the first call.
fn now() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}
