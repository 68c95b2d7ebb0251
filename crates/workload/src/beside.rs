//! Ours and another's answer to one question, in one measurement: they take turns sample by sample, so whatever else the host does meets
//! both alike, and what is kept is how they compare.

use crate::Work;
use std::time::Duration;

/// Work of ours with work of the same kind beside it. Only ours is on the clock that [`Work::run`] answers.
pub(crate) struct Beside<A, B> {
    ours: A,
    other: B,
    /// Whose the other is, and how the ratio is put into words: theirs over ours.
    name: &'static str,
    say: fn(f64) -> String,
    /// Operations of a sample. Samples of another length are the warm-up's.
    times: u64,
    /// What an operation took in each sample, in nanoseconds: ours, the other.
    samples: Vec<(f64, f64)>,
}

impl<A: Work, B: Work> Beside<A, B> {
    pub(crate) fn new(ours: A, other: B, name: &'static str, say: fn(f64) -> String) -> Self {
        Self { ours, other, name, say, times: 0, samples: Vec::new() }
    }
}

impl<A: Work, B: Work> Work for Beside<A, B> {
    fn run(&mut self, times: u64) -> Duration {
        if self.times != times {
            self.times = times;
            self.samples.clear();
        }
        let (took, others) = (self.ours.run(times), self.other.run(times));
        let each = |took: Duration| took.as_nanos() as f64 / times as f64;
        self.samples.push((each(took), each(others)));
        took
    }

    fn note(&self) -> Option<String> {
        let other = median(self.samples.iter().map(|&(_, other)| other))?;
        let ratio = median(self.samples.iter().map(|&(ours, other)| other / ours))?;
        let notes = [Some(format!("{} {other:.1} ns: {}", self.name, (self.say)(ratio))), self.ours.note(), self.other.note()];
        Some(notes.into_iter().flatten().collect::<Vec<_>>().join(", "))
    }
}

/// The same work set up more than once, a sample of each in turn.
pub(crate) struct InTurn<W> {
    works: Vec<W>,
    next: usize,
}

impl<W: Work> InTurn<W> {
    pub(crate) fn new(works: impl IntoIterator<Item = W>) -> Self {
        Self { works: works.into_iter().collect(), next: 0 }
    }
}

impl<W: Work> Work for InTurn<W> {
    fn run(&mut self, times: u64) -> Duration {
        let turn = self.next;
        self.next = (turn + 1) % self.works.len();
        self.works[turn].run(times)
    }
}

fn median(samples: impl Iterator<Item = f64>) -> Option<f64> {
    let mut samples: Vec<f64> = samples.collect();
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_is_of_samples_that_belong_together() {
        // A host that gets slower and slower: each pair says twice, whatever the medians of all samples say.
        let mut slow = 0;
        let ours = move |times: u64| {
            slow += 1;
            Duration::from_nanos(100 * slow * times)
        };
        let mut slow = 0;
        let other = move |times: u64| {
            slow += 1;
            Duration::from_nanos(200 * slow * times)
        };
        let mut work = Beside::new(ours, other, "other", |ratio| format!("{ratio:.1} times"));
        assert_eq!(work.note(), None);
        work.run(7);
        (0..5).for_each(|_| _ = work.run(10));
        assert_eq!(work.note().as_deref(), Some("other 800.0 ns: 2.0 times"), "the sample of 7 was the warm-up's");
    }
}
