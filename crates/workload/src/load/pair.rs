//! One thread, then two of them, with the same work on disjoint spans: how far the second one helps.
//!
//! Both begin when both are awake, so the time of waking a thread is not in the figure. Samples of one thread and of two take turns, so
//! that what else the host does meets both alike, and the figure is the median of the ratios.

use super::processors::{Apart, Processor};
use crate::{Error, Further, Work, timed};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Does its operation so many times.
pub(super) type Task = Box<dyn FnMut(u64) + Send>;

/// What two threads are to reach, of one thread's rate (design, section 5).
const GOAL: f64 = 1.8;

pub(super) struct Pair {
    own: Task,
    other: Other,
    /// Of the last number of operations that was asked for, which is the one that is measured.
    times: u64,
    alone_ns: Vec<f64>,
    ratios: Vec<f64>,
    /// Whether the goal holds for it, or it says what the machine can do.
    is_ceiling: bool,
    _apart: Apart,
}

impl Pair {
    pub(super) fn work([own, other]: [Task; 2], is_ceiling: bool) -> Result<Box<dyn Work>, Error> {
        let (apart, processor) = Apart::new()?;
        let other = Other::new(other, processor)?;
        Ok(Box::new(Self { own, other, times: 0, alone_ns: Vec::new(), ratios: Vec::new(), is_ceiling, _apart: apart }))
    }
}

impl Work for Pair {
    /// The time that two threads take for so many operations together.
    fn run(&mut self, times: u64) -> Duration {
        if self.times != times {
            self.times = times;
            self.alone_ns.clear();
            self.ratios.clear();
        }
        let alone = timed(|| (self.own)(times));
        let half = times.div_ceil(2);
        let both = self.other.beside(half, &mut self.own);
        let (alone, both) = (alone.as_nanos() as f64 / times as f64, both.as_nanos() as f64 / (2 * half) as f64);
        self.alone_ns.push(alone);
        self.ratios.push(alone / both.max(0.001));
        Duration::from_nanos((both * times as f64) as u64)
    }

    fn figures(&self) -> Vec<Further> {
        let mut figures = vec![Further::new("one_thread_ns", median(&self.alone_ns)), Further::new("ratio", median(&self.ratios))];
        if !self.is_ceiling {
            figures.push(Further::new("goal_ratio", GOAL));
        }
        figures
    }
}

/// Two threads that write to one word in turns, and do nothing else: what passing a cache line to another processor takes on the machine. What
/// threads share costs them this, each time.
pub(super) struct Handover {
    own: Task,
    other: Other,
    _apart: Apart,
}

impl Handover {
    pub(super) fn work() -> Result<Box<dyn Work>, Error> {
        let word = Arc::new(AtomicU64::new(0));
        let [own, other] = [0, 1].map(|parity| -> Task {
            let word = Arc::clone(&word);
            Box::new(move |times| {
                for _ in 0..times {
                    while word.load(Ordering::Acquire) % 2 != parity {
                        std::hint::spin_loop();
                    }
                    word.fetch_add(1, Ordering::Release);
                }
            })
        });
        let (apart, processor) = Apart::new()?;
        Ok(Box::new(Self { own, other: Other::new(other, processor)?, _apart: apart }))
    }
}

impl Work for Handover {
    fn run(&mut self, times: u64) -> Duration {
        let half = times.div_ceil(2);
        self.other.beside(half, &mut self.own).mul_f64(times as f64 / (2 * half) as f64)
    }
}

fn median(samples: &[f64]) -> f64 {
    let mut samples = samples.to_vec();
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The second thread. It sleeps until it is asked; it ends when this is dropped.
struct Other {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    /// Operations to do; 0 while there is nothing to do.
    asked: AtomicU64,
    awake: AtomicBool,
    go: AtomicBool,
    done: AtomicBool,
    stop: AtomicBool,
}

impl Other {
    fn new(mut task: Task, processor: Processor) -> Result<Self, Error> {
        let shared = Arc::new(Shared::default());
        let own = Arc::clone(&shared);
        let work = move || {
            let placed = processor.stay();
            assert!(placed.is_ok(), "{placed:?}");
            while !own.stop.load(Ordering::Acquire) {
                let times = own.asked.swap(0, Ordering::Acquire);
                if times == 0 {
                    std::thread::park();
                    continue;
                }
                own.awake.store(true, Ordering::Release);
                spin(|| own.go.swap(false, Ordering::Acquire));
                task(times);
                own.done.store(true, Ordering::Release);
            }
        };
        Ok(Self { shared, thread: Some(std::thread::Builder::new().name("second".into()).spawn(work)?) })
    }

    /// Runs `own` here and the task there, `times` times each, at once. Answers the time until both are done.
    fn beside(&self, times: u64, own: &mut Task) -> Duration {
        self.shared.asked.store(times, Ordering::Release);
        self.thread.iter().for_each(|thread| thread.thread().unpark());
        self.wait_for(&self.shared.awake);
        timed(|| {
            self.shared.go.store(true, Ordering::Release);
            own(times);
            self.wait_for(&self.shared.done);
        })
    }

    fn wait_for(&self, flag: &AtomicBool) {
        spin(|| {
            let gone = self.thread.as_ref().is_none_or(JoinHandle::is_finished);
            assert!(!gone, "the second thread failed");
            flag.swap(false, Ordering::Acquire)
        });
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // What it panicked about is on stderr already.
            let _ = thread.join();
        }
    }
}

/// Waits, with the processor kept, unless the other thread needs it.
fn spin(mut is_there: impl FnMut() -> bool) {
    let since = Instant::now();
    while !is_there() {
        if since.elapsed() < Duration::from_millis(1) { std::hint::spin_loop() } else { std::thread::yield_now() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_threads_do_what_they_are_told() {
        let done = Arc::new(AtomicU64::new(0));
        let task = || -> Task {
            let done = Arc::clone(&done);
            Box::new(move |times| _ = done.fetch_add(times, Ordering::Relaxed))
        };
        let mut pair = Pair::work([task(), task()], false).unwrap();
        for _ in 0..20 {
            pair.run(100);
        }
        // One alone, and both together, each time.
        assert_eq!(done.load(Ordering::Relaxed), 20 * 200);
        assert_eq!(pair.figures().len(), 3);
    }
}
