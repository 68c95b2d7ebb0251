//! Two threads on two processors. Left alone, the host may well run both on one, in turns, and then neither a rate nor a delay says anything.

use crate::Error;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Keeps the calling thread on a processor of its own until this is dropped.
pub(super) struct Apart {
    before: CpuSet,
}

/// The other thread's processor.
#[derive(Clone, Copy)]
pub(super) struct Processor(usize);

impl Apart {
    /// # Errors
    /// When the process may use one processor only.
    pub(super) fn new() -> Result<(Self, Processor), Error> {
        let before = sched_getaffinity(None)?;
        let mut allowed = (0..CpuSet::MAX_CPU).filter(|cpu| before.is_set(*cpu));
        let (Some(own), Some(other)) = (allowed.next(), allowed.next()) else {
            return Err("two threads at once need two processors, and this process may use one".into());
        };
        Processor(own).stay()?;
        Ok((Self { before }, Processor(other)))
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        // Where it was before, it may be again; if not, it stays where it is.
        let _ = sched_setaffinity(None, &self.before);
    }
}

impl Processor {
    /// Keeps the calling thread there.
    pub(super) fn stay(self) -> Result<(), Error> {
        let mut only = CpuSet::new();
        only.set(self.0);
        Ok(sched_setaffinity(None, &only)?)
    }
}
