//! Read guards and grace periods: how a reader can use page tables and frames without a lock, and how a writer learns that nobody
//! uses what it unlinked.
//!
//! Every reader owns a word: `domain << 32 | counter << 1 | inside`. Entering writes the word and is a full fence; leaving is a
//! release store. A writer unlinks, then fences, then looks at each word once. For each guard one of two things holds. The reader's fence came
//! first: the writer finds that guard's word, or a later one, and waits for the first. Or the writer's fence came first: the guard sees everything
//! the writer did before its grace began. No reader ever waits, and a writer waits only for guards of its own domain.
//!
//! An exchange followed by nothing is a full fence on x86-64 only; elsewhere, and under loom, the fence is spelled out. (A
//! handshake by read-modify-writes alone does not do: the release store of `leave` ends the writer's release sequence, and a reader
//! that leaves and enters again at the wrong moment would have acquired nothing.)

use crate::shard::Sharded;
use crate::sys::{self, AtomicU64, Mutex, MutexGuard, Ordering, fence};
use crossbeam_utils::CachePadded;
use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::{Duration, Instant};

const INSIDE: u64 = 1;

/// One reader's word, alone on its cache line, and who it is.
struct Word {
    word: CachePadded<AtomicU64>,
    /// Which thread holds a long guard, by [`thread_token`]; 0 when none.
    holder: AtomicU64,
    name: Box<str>,
}

/// All readers that a writer has to wait for.
///
/// ```
/// use std::sync::Arc;
/// let readers = Arc::new(lockstep_sync::Readers::new());
/// let mut slot = readers.slot();
/// {
///     let _guard = slot.guard(7);
///     readers.grace(8); // another domain: nobody to wait for
/// }
/// readers.grace(7);
/// ```
pub struct Readers {
    /// The same list in every shard, so that writers who look through it do not meet. Replaced as a whole when a reader comes or goes, so
    /// that a grace period holds no lock while it waits.
    lists: Sharded<Mutex<List>>,
    /// Held while the list is replaced.
    changes: Mutex<()>,
    stall: Mutex<StallWatch>,
    stalls: AtomicU64,
}

type List = Arc<Vec<Arc<Word>>>;
type Hook = dyn Fn(&Stall) + Send + Sync;

struct StallWatch {
    after: Duration,
    hook: Option<Arc<Hook>>,
    latest: Option<Stall>,
}

/// A guard that kept a writer waiting longer than it should.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stall {
    /// The name its slot was made with.
    pub slot: Box<str>,
    /// The domain it was inside.
    pub domain: u32,
    /// How long the writer had waited when this was noted, in milliseconds.
    pub waited_ms: u64,
}

impl Default for Readers {
    fn default() -> Self {
        Self::new()
    }
}

impl Readers {
    /// Nobody yet. A guard is reported when a writer has waited a second for it.
    pub fn new() -> Self {
        let watch = StallWatch { after: Duration::from_secs(1), hook: None, latest: None };
        let lists = Sharded::new(|| Mutex::new(List::default()));
        Self { lists, changes: Mutex::new(()), stall: Mutex::new(watch), stalls: AtomicU64::new(0) }
    }

    /// A place for one more reader; it is given back when the slot is dropped.
    pub fn slot(self: &Arc<Self>) -> Slot {
        self.slot_named("reader")
    }

    /// As [`Readers::slot`], with the name that a [`Stall`] shows.
    pub fn slot_named(self: &Arc<Self>, name: &str) -> Slot {
        let shared = Arc::new(Word { word: CachePadded::new(AtomicU64::new(0)), holder: AtomicU64::new(0), name: name.into() });
        self.change(|list| {
            let mut longer = Vec::with_capacity(list.len() + 1);
            longer.extend(list.iter().cloned());
            longer.push(Arc::clone(&shared));
            longer
        });
        Slot { shared, readers: Arc::clone(self), word: 0, not_sync: PhantomData }
    }

    fn remove(&self, shared: &Arc<Word>) {
        self.change(|list| list.iter().filter(|other| !Arc::ptr_eq(other, shared)).cloned().collect());
    }

    fn change(&self, change: impl FnOnce(&[Arc<Word>]) -> Vec<Arc<Word>>) {
        let _changes = sys::lock(&self.changes);
        let list = Arc::clone(&self.list());
        let changed = List::new(change(&list));
        for list in self.lists.all() {
            *sys::lock(list) = Arc::clone(&changed);
        }
    }

    fn list(&self) -> MutexGuard<'_, List> {
        sys::lock(self.lists.mine())
    }

    /// Waits until every guard of `domain` that was open when this was called has been left. Does not allocate unless a
    /// guard has to be reported.
    ///
    /// What the caller unlinked or logged before is seen by every guard entered after this returns, and by no guard entered
    /// before. A reader that registers meanwhile takes the lock of this list after this did, so it sees it too.
    ///
    /// # Panics
    /// When the calling thread itself holds a long guard of `domain`: it would wait for ever. Ask [`Readers::held_by_caller`] before anything
    /// is changed.
    pub fn grace(&self, domain: u32) {
        let list = self.list();
        fence(Ordering::SeqCst);
        let is_open = |reader: &Arc<Word>| {
            let seen = reader.word.load(Ordering::Acquire);
            inside(seen, domain).then_some(seen)
        };
        let Some((at, seen)) = list.iter().enumerate().find_map(|(at, reader)| Some((at, is_open(reader)?))) else { return };
        let waits_for = Arc::clone(&list);
        drop(list);
        self.wait_for(&waits_for[at], seen);
        // Each word is looked at once: a guard that is entered from here on is none of this caller's business.
        for reader in &waits_for[at + 1..] {
            if let Some(seen) = is_open(reader) {
                self.wait_for(reader, seen);
            }
        }
    }

    #[cold]
    fn wait_for(&self, reader: &Word, seen: u64) {
        let own = reader.holder.load(Ordering::Relaxed) == thread_token();
        assert!(!own, "a grace period of domain {} would wait for a guard of its own thread, '{}'", seen >> 32, reader.name);
        let mut pause = Pause::default();
        while reader.word.load(Ordering::Acquire) == seen {
            if let Some(waited) = pause.next() {
                self.note_stall(reader, seen, waited, &mut pause);
            }
        }
    }

    #[cold]
    fn note_stall(&self, reader: &Word, seen: u64, waited: Duration, pause: &mut Pause) {
        let mut watch = sys::lock(&self.stall);
        if pause.reported || waited < watch.after {
            return;
        }
        pause.reported = true;
        let stall = Stall { slot: reader.name.clone(), domain: (seen >> 32) as u32, waited_ms: waited.as_millis() as u64 };
        watch.latest = Some(stall.clone());
        let hook = watch.hook.clone();
        drop(watch);
        self.stalls.fetch_add(1, Ordering::Relaxed);
        if let Some(hook) = hook {
            hook(&stall);
        }
    }

    /// From now on a guard that a writer has waited for this long is counted, kept as [`Readers::latest_stall`], and given to `hook`, once.
    pub fn on_stall(&self, after: Duration, hook: impl Fn(&Stall) + Send + Sync + 'static) {
        let mut watch = sys::lock(&self.stall);
        watch.after = after;
        watch.hook = Some(Arc::new(hook));
    }

    /// How many guards were held too long so far.
    pub fn stalls(&self) -> u64 {
        self.stalls.load(Ordering::Relaxed)
    }

    /// The last guard that was held too long.
    pub fn latest_stall(&self) -> Option<Stall> {
        sys::lock(&self.stall).latest.clone()
    }

    /// Whether this thread holds a long guard ([`Slot::hold`]) of `domain`, so that a grace period would wait for its own caller.
    pub fn held_by_caller(&self, domain: u32) -> bool {
        let me = thread_token();
        self.list().iter().any(|reader| reader.holder.load(Ordering::Relaxed) == me && inside(reader.word.load(Ordering::Relaxed), domain))
    }

    /// How many readers are registered.
    pub fn len(&self) -> usize {
        self.list().len()
    }

    /// Whether no reader is registered.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl fmt::Debug for Readers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Readers").field("slots", &self.len()).field("stalls", &self.stalls()).finish()
    }
}

/// One reader's place. It may move to another thread, but two threads cannot use it at once.
pub struct Slot {
    shared: Arc<Word>,
    readers: Arc<Readers>,
    /// What was last written to the shared word: only this slot writes it.
    word: u64,
    not_sync: PhantomData<Cell<()>>,
}

impl Slot {
    /// Opens a guard of `domain`. Never waits. Must be followed by [`Slot::leave`] before the next `enter`.
    #[inline]
    pub fn enter(&mut self, domain: u32) {
        debug_assert!(self.word & INSIDE == 0, "slot '{}' entered twice", self.shared.name);
        // Counter in bits 31..1: adding two steps it, and the mask keeps the carry out of the domain.
        self.word = u64::from(domain) << 32 | (self.word.wrapping_add(2) & 0xffff_fffe) | INSIDE;
        self.shared.word.swap(self.word, Ordering::SeqCst);
        #[cfg(any(loom, not(target_arch = "x86_64")))]
        fence(Ordering::SeqCst);
    }

    /// Closes the guard: nothing read under it may be used any more.
    #[inline]
    pub fn leave(&mut self) {
        self.word &= !INSIDE;
        self.shared.word.store(self.word, Ordering::Release);
    }

    /// [`Slot::enter`], left when the guard is dropped. For short use: a thread must not start a grace period while it holds one.
    #[inline]
    pub fn guard(&mut self, domain: u32) -> Guard<'_> {
        self.enter(domain);
        Guard { slot: self, long: false, not_send: PhantomData }
    }

    /// A guard that the caller keeps for a while (a zero-copy slice): the thread is noted, so that [`Readers::held_by_caller`] can
    /// turn what would be a deadlock into an error.
    pub fn hold(&mut self, domain: u32) -> Guard<'_> {
        self.enter(domain);
        self.keep()
    }

    /// Makes a long guard, as [`Slot::hold`] does, of the one that [`Slot::enter`] opened.
    ///
    /// # Panics
    /// When none is open.
    pub fn keep(&mut self) -> Guard<'_> {
        assert!(self.is_inside(), "slot '{}' has no guard to keep", self.shared.name);
        self.shared.holder.store(thread_token(), Ordering::Relaxed);
        Guard { slot: self, long: true, not_send: PhantomData }
    }

    /// Whether a guard is open.
    #[inline]
    pub fn is_inside(&self) -> bool {
        self.word & INSIDE != 0
    }

    /// The readers this slot belongs to.
    pub fn readers(&self) -> &Arc<Readers> {
        &self.readers
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // A guard that was forgotten ends here at the latest; a writer may hold a snapshot with this word in it.
        self.leave();
        self.readers.remove(&self.shared);
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot").field("name", &self.shared.name).field("inside", &self.is_inside()).finish()
    }
}

/// An open guard. Dropping it leaves.
#[must_use]
#[derive(Debug)]
pub struct Guard<'a> {
    slot: &'a mut Slot,
    long: bool,
    /// The thread that may not wait for it is the thread that holds it.
    not_send: PhantomData<*const ()>,
}

impl Drop for Guard<'_> {
    #[inline]
    fn drop(&mut self) {
        self.slot.leave();
        if self.long {
            self.slot.shared.holder.store(0, Ordering::Relaxed);
        }
    }
}

#[inline]
fn inside(word: u64, domain: u32) -> bool {
    word & INSIDE != 0 && (word >> 32) as u32 == domain
}

/// A number that no two living threads share, and never 0: the address of a thread-local.
#[cfg(not(shuttle))]
fn thread_token() -> u64 {
    thread_local!(static HERE: u8 = const { 0 });
    HERE.with(|here| std::ptr::from_ref(here).addr() as u64)
}

/// Threads of a shuttle run share one of the system's.
#[cfg(shuttle)]
fn thread_token() -> u64 {
    usize::from(shuttle::current::me()) as u64 + 1
}

/// How a writer waits: spin as long as a 64 KiB copy takes, then give the processor away, then sleep.
#[derive(Default)]
struct Pause {
    rounds: u32,
    since: Option<Instant>,
    reported: bool,
}

impl Pause {
    const SPINS: u32 = 256;
    const YIELDS: u32 = 1024;

    /// One wait. Answers how long all of them took, once that is worth looking at.
    fn next(&mut self) -> Option<Duration> {
        if cfg!(any(loom, shuttle)) {
            #[cfg(loom)]
            loom::thread::yield_now();
            #[cfg(shuttle)]
            sys::thread::yield_now();
            return None;
        }
        self.rounds = self.rounds.saturating_add(1);
        if self.rounds < Self::SPINS {
            std::hint::spin_loop();
            return None;
        }
        let since = *self.since.get_or_insert_with(Instant::now);
        if self.rounds < Self::YIELDS {
            std::thread::yield_now();
        } else {
            std::thread::sleep(Duration::from_micros(50));
        }
        Some(since.elapsed())
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::thread;

    #[test]
    fn grace_waits_for_its_domain_only() {
        let readers = Arc::new(Readers::new());
        let mut slot = readers.slot();
        slot.enter(3);
        readers.grace(4);
        let done = Arc::new(AtomicBool::new(false));
        let writer = thread::spawn({
            let (readers, done) = (Arc::clone(&readers), Arc::clone(&done));
            move || {
                readers.grace(3);
                done.store(true, Ordering::SeqCst);
            }
        });
        thread::sleep(Duration::from_millis(30));
        assert!(!done.load(Ordering::SeqCst));
        slot.leave();
        slot.enter(3); // a new guard of the same domain is none of that writer's business
        writer.join().unwrap();
        slot.leave();
    }

    #[test]
    fn the_callers_own_guard_is_known() {
        let readers = Arc::new(Readers::new());
        let mut slot = readers.slot();
        assert!(!readers.held_by_caller(1));
        let guard = slot.hold(1);
        assert!(readers.held_by_caller(1));
        assert!(!readers.held_by_caller(2));
        assert!(!thread::scope(|scope| scope.spawn(|| readers.held_by_caller(1)).join().unwrap()));
        drop(guard);
        assert!(!readers.held_by_caller(1));
    }

    #[test]
    #[should_panic(expected = "its own thread, 'mine'")]
    fn waiting_for_oneself_is_no_deadlock() {
        let readers = Arc::new(Readers::new());
        let mut slot = readers.slot_named("mine");
        let _guard = slot.hold(1);
        readers.grace(1);
    }

    #[test]
    fn slots_come_and_go() {
        let readers = Arc::new(Readers::new());
        let slots: Vec<_> = (0..5).map(|_| readers.slot()).collect();
        assert_eq!(readers.len(), 5);
        drop(slots);
        assert!(readers.is_empty());
        readers.grace(0);
    }

    #[test]
    fn a_guard_held_too_long_is_reported_once() {
        let readers = Arc::new(Readers::new());
        let told = Arc::new(AtomicU64::new(0));
        readers.on_stall(Duration::from_millis(5), {
            let told = Arc::clone(&told);
            move |_| {
                told.fetch_add(1, Ordering::SeqCst);
            }
        });
        let mut slot = readers.slot_named("slow");
        slot.enter(9);
        thread::scope(|scope| {
            scope.spawn(|| readers.grace(9));
            while readers.stalls() == 0 {
                thread::yield_now();
            }
            slot.leave();
        });
        let stall = readers.latest_stall().unwrap();
        assert_eq!((&*stall.slot, stall.domain), ("slow", 9));
        assert!(stall.waited_ms >= 5);
        assert_eq!(told.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn the_counter_never_reaches_the_domain() {
        let readers = Arc::new(Readers::new());
        let mut slot = readers.slot();
        slot.word = u64::from(u32::MAX - 1);
        slot.enter(5);
        assert_eq!(slot.word, 5 << 32 | 1);
        slot.leave();
    }
}
