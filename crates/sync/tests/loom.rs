//! Every interleaving, within loom's memory model, of the small cases that everything else rests on.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p lockstep-sync --test loom --release`
#![cfg(loom)]

use addr::{Page, Span};
use lockstep_sync::{Readers, SpanLock};
use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use std::sync::Arc;

/// An entry that points to a table, and the table: loom notices a read of it that is not ordered before the write that frees it.
struct Memory {
    entry: AtomicU64,
    logged: AtomicU64,
    table: UnsafeCell<u64>,
}

// SAFETY: that every access is ordered is what the tests below prove; loom panics on one that is not.
#[expect(unsafe_code, reason = "the cell is what loom watches")]
unsafe impl Sync for Memory {}

impl Memory {
    fn new() -> Arc<Self> {
        Arc::new(Self { entry: AtomicU64::new(1), logged: AtomicU64::new(0), table: UnsafeCell::new(7) })
    }

    /// What a reader does inside a guard.
    #[expect(unsafe_code, reason = "reads the watched cell")]
    fn walk(&self) -> Option<u64> {
        // SAFETY: inside a guard, and the entry said that the table is linked.
        (self.entry.load(Ordering::Acquire) == 1).then(|| self.table.with(|table| unsafe { *table }))
    }

    #[expect(unsafe_code, reason = "writes the watched cell")]
    fn free(&self) {
        // SAFETY: after a grace period nobody reads it.
        self.table.with_mut(|table| unsafe { *table = 0xdead });
    }
}

/// I-1: with two guards in a row, the second may begin at any moment of the grace period.
#[test]
fn a_reader_in_a_guard_never_sees_freed() {
    loom::model(|| {
        let readers = Arc::new(Readers::new());
        let memory = Memory::new();
        let mut slot = readers.slot();
        let reader = thread::spawn({
            let memory = Arc::clone(&memory);
            move || {
                for _ in 0..2 {
                    let _guard = slot.guard(1);
                    if let Some(value) = memory.walk() {
                        assert_eq!(value, 7);
                    }
                }
            }
        });
        memory.entry.store(0, Ordering::Relaxed);
        readers.grace(1);
        memory.free();
        reader.join().unwrap();
    });
}

/// I-4: a translation kept from an earlier guard is used only if nothing was logged when this guard was entered; then the frame is
/// still there.
#[test]
fn a_cached_translation_dies_with_the_log() {
    loom::model(|| {
        let readers = Arc::new(Readers::new());
        let memory = Memory::new();
        let mut slot = readers.slot();
        let reader = thread::spawn({
            let memory = Arc::clone(&memory);
            move || {
                let mut cached = false;
                for _ in 0..2 {
                    let _guard = slot.guard(1);
                    if memory.logged.load(Ordering::Acquire) != 0 {
                        cached = false;
                    }
                    if !cached {
                        cached = memory.entry.load(Ordering::Acquire) == 1;
                    }
                    if cached {
                        use_frame(&memory);
                    }
                }
            }
        });
        memory.entry.store(0, Ordering::Relaxed);
        memory.logged.store(1, Ordering::Release);
        readers.grace(1);
        memory.free();
        reader.join().unwrap();
    });

    #[expect(unsafe_code, reason = "reads the watched cell")]
    fn use_frame(memory: &Memory) {
        // SAFETY: inside a guard, with a translation that no log entry seen at its entry invalidates.
        assert_eq!(memory.table.with(|table| unsafe { *table }), 7);
    }
}

/// A grace period ends while another domain's guard stays open, and while a reader sits outside.
#[test]
fn grace_does_not_wait_for_outsiders() {
    loom::model(|| {
        let readers = Arc::new(Readers::new());
        let mut elsewhere = readers.slot();
        let mut idle = readers.slot();
        elsewhere.enter(2);
        idle.enter(1);
        idle.leave();
        let writer = thread::spawn({
            let readers = Arc::clone(&readers);
            move || readers.grace(1)
        });
        // A wait for either slot would never end: both stay as they are until the writer is done.
        writer.join().unwrap();
        elsewhere.leave();
    });
}

/// A reader that registers while a grace period runs is not in its list; then it must see what was unlinked.
#[test]
fn a_reader_may_register_meanwhile() {
    loom::model(|| {
        let readers = Arc::new(Readers::new());
        let memory = Memory::new();
        let reader = thread::spawn({
            let (memory, readers) = (Arc::clone(&memory), Arc::clone(&readers));
            move || {
                let mut slot = readers.slot();
                let _guard = slot.guard(1);
                if let Some(value) = memory.walk() {
                    assert_eq!(value, 7);
                }
            }
        });
        memory.entry.store(0, Ordering::Relaxed);
        readers.grace(1);
        memory.free();
        reader.join().unwrap();
    });
}

#[test]
fn a_span_has_one_holder() {
    fn span(start: u64, last: u64) -> Span<Page> {
        Span::of(Page::new(start), Page::new(last))
    }
    loom::model(|| {
        let lock = Arc::new(SpanLock::new());
        let inside = Arc::new(AtomicU64::new(0));
        let other = thread::spawn({
            let (lock, inside) = (Arc::clone(&lock), Arc::clone(&inside));
            move || {
                let guard = lock.lock_many(&[span(0, 1), span(4, 5)]);
                assert_eq!(inside.swap(1, Ordering::Relaxed), 0);
                inside.store(0, Ordering::Relaxed);
                drop(guard);
            }
        });
        for wanted in [span(1, 4), span(5, 9)] {
            let guard = lock.lock(wanted);
            assert_eq!(inside.swap(1, Ordering::Relaxed), 0);
            inside.store(0, Ordering::Relaxed);
            drop(guard);
        }
        other.join().unwrap();
    });
}
