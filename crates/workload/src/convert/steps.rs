//! What each step of the transaction costs in a batch: a whole conversion runs, and the clock of one step alone counts. Looking at the clock
//! is part of the figure, and noted.

use super::{BATCH, Machine, changes};
use crate::{Error, Work};
use lockstep::{Change, Owner, Step};
use pt::FormatKind;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Conversions in one sample. Short steps are a small part of one, and enough of them to fill a sample would take minutes; what these took
/// stands for the rest.
const MOST: u64 = 100;

fn place(step: Step) -> usize {
    Step::ALL.iter().position(|other| *other == step).unwrap_or(0)
}

/// Nanoseconds of each step, summed up.
struct Clocks {
    latest: Mutex<Instant>,
    took: [AtomicU64; Step::ALL.len()],
}

impl Clocks {
    fn is_over(&self, step: Step) {
        let now = Instant::now();
        let before = std::mem::replace(&mut *self.latest.lock().unwrap_or_else(PoisonError::into_inner), now);
        self.took[place(step)].fetch_add(now.duration_since(before).as_nanos() as u64, Ordering::Relaxed);
    }
}

struct Stopwatch {
    machine: Machine,
    clocks: Arc<Clocks>,
    step: Step,
    there: Vec<Change>,
    back: Vec<Change>,
}

/// One step of a batch that becomes private. The way back is off the clock.
pub(super) fn step(format: FormatKind, step: Step, pages: Vec<u64>) -> Result<Box<dyn Work>, Error> {
    let machine = Machine::new(format)?;
    let clocks = Arc::new(Clocks { latest: Mutex::new(Instant::now()), took: Default::default() });
    let watching = Arc::clone(&clocks);
    machine.guest.space().on_transition(move |transition| watching.is_over(transition.step()));
    Ok(Box::new(Stopwatch { machine, clocks, step, there: changes(&pages, Owner::Private), back: changes(&pages, Owner::Shared) }))
}

impl Work for Stopwatch {
    fn run(&mut self, times: u64) -> Duration {
        let took = &self.clocks.took[place(self.step)];
        let mut sum = 0;
        let now = times.min(MOST);
        for _ in 0..now {
            let before = took.load(Ordering::Relaxed);
            self.machine.convert(&self.there);
            sum += took.load(Ordering::Relaxed) - before;
            self.machine.convert(&self.back);
        }
        Duration::from_nanos(sum).mul_f64(times as f64 / now.max(1) as f64)
    }

    fn note(&self) -> Option<String> {
        let looks = 1000;
        let start = Instant::now();
        (0..looks).for_each(|_| _ = std::hint::black_box(Instant::now()));
        Some(format!("of a batch of {BATCH}; {} ns of it are the clock", start.elapsed().as_nanos() / looks))
    }
}
