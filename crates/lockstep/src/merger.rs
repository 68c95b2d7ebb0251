//! A background pass that joins leaves again after conversions have cut them: bounded in what it looks at, at a pace of the caller's choice,
//! stopped and started at will, and open to be watched.

use crate::GuestDma;
use addr::Gpa;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// How fast a [`Merger`] goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pace {
    /// Pages that one step looks at. While it does, conversions of these pages wait; blocks of 1 GiB are held one after the other.
    pub pages: u64,
    /// The rest between two steps.
    pub rest: Duration,
}

impl Default for Pace {
    /// 256 MiB of the guest, then 20 milliseconds for others.
    fn default() -> Self {
        Self { pages: 1 << 16, rest: Duration::from_millis(20) }
    }
}

/// How a [`Merger`] fares.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MergerStats {
    /// Steps made.
    pub steps: u64,
    /// Times that it came to the end of the guest's memory.
    pub passes: u64,
    /// Where the next step begins.
    pub next: u64,
    /// Leaves that the guest's tables were merged into so far, by whoever asked.
    pub merges: u64,
    /// Whether it is paused.
    pub paused: bool,
}

#[derive(Debug, Default)]
struct State {
    paused: bool,
    stop: bool,
    /// A step is under way.
    busy: bool,
    stats: MergerStats,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A thread that merges. It ends when this is dropped.
///
/// ```
/// use lockstep_iommu::{Config, GuestDma, Merger, Pace, RecordedStage2};
/// use std::sync::Arc;
/// let dma = Arc::new(GuestDma::new(&Config::default(), Arc::new(RecordedStage2::new()))?);
/// let merger = Merger::start(&dma, Pace::default())?;
/// merger.pause();
/// let steps = merger.stats().steps;
/// // Whatever must not be disturbed.
/// assert_eq!(merger.stats().steps, steps);
/// merger.resume();
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Merger {
    dma: Arc<GuestDma>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Merger {
    /// Begins at the start of the guest's memory, and goes round for as long as this lives.
    ///
    /// # Errors
    /// No thread.
    pub fn start(dma: &Arc<GuestDma>, pace: Pace) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let (own, theirs) = (Arc::clone(dma), Arc::clone(&shared));
        let thread = std::thread::Builder::new().name("merger".into()).spawn(move || go_round(&own, pace, &theirs))?;
        Ok(Self { dma: Arc::clone(dma), shared, thread: Some(thread) })
    }

    /// No step begins from now on, and when this returns none is under way.
    pub fn pause(&self) {
        let mut state = self.shared.lock();
        state.paused = true;
        while state.busy {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Goes on where it was paused.
    pub fn resume(&self) {
        self.shared.lock().paused = false;
        self.shared.changed.notify_all();
    }

    /// How it fares.
    pub fn stats(&self) -> MergerStats {
        let state = self.shared.lock();
        MergerStats { paused: state.paused, merges: self.dma.cuts_and_merges().1, ..state.stats }
    }
}

impl Drop for Merger {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.changed.notify_all();
        // A panic of it has been printed.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn go_round(dma: &GuestDma, pace: Pace, shared: &Shared) {
    let mut next = Gpa::new(0);
    loop {
        let mut state = shared.lock();
        while state.paused && !state.stop {
            state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.stop {
            return;
        }
        state.busy = true;
        drop(state);
        next = dma.merge(next, pace.pages);
        let mut state = shared.lock();
        state.busy = false;
        state.stats.steps += 1;
        state.stats.passes += u64::from(next == Gpa::new(0));
        state.stats.next = next.get();
        shared.changed.notify_all();
        if !state.stop {
            drop(shared.changed.wait_timeout_while(state, pace.rest, |state| !state.stop));
        }
    }
}
