//! How the command samples a row: short samples, many of them. On a host that does other things as well, the median of short samples says
//! more than one long run, and the best one says what the work costs undisturbed.

use crate::{Row, Work};
use std::time::{Duration, Instant};

/// A sample lasts about this long on the clock.
const SAMPLE: Duration = Duration::from_millis(2);
/// Sampling a row goes on for this long, with [`LEAST`] samples in any case.
const ROW: Duration = Duration::from_millis(400);
const LEAST: usize = 15;
const MOST: usize = 101;

/// What a row came to, in nanoseconds per unit.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Figure {
    /// The quickest sample.
    pub best_ns: f64,
    /// The one in the middle.
    pub median_ns: f64,
    /// How many there were.
    pub samples: usize,
}

/// Samples `work`, the work of `row`.
pub fn measure(row: &Row, work: &mut dyn Work) -> Figure {
    let times = settle(work);
    let units = (times * row.unit.per_operation()) as f64;
    let started = Instant::now();
    let mut samples = Vec::with_capacity(MOST);
    while samples.len() < LEAST || (samples.len() < MOST && started.elapsed() < ROW) {
        samples.push(work.run(times).as_nanos() as f64 / units);
    }
    samples.sort_by(f64::total_cmp);
    Figure { best_ns: samples[0], median_ns: samples[samples.len() / 2], samples: samples.len() }
}

/// Warms up, and finds how many operations fill a sample.
fn settle(work: &mut dyn Work) -> u64 {
    let mut times = 1;
    loop {
        let took = work.run(times).max(Duration::from_nanos(20));
        if took >= SAMPLE / 2 {
            return times;
        }
        times = (times as f64 * (SAMPLE.as_secs_f64() / took.as_secs_f64()).clamp(1.5, 64.0)).ceil() as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Group, Unit};
    use ::pt::FormatKind;

    #[test]
    fn a_known_cost_is_found() {
        let row = Row { name: "known", format: "-", unit: Unit::Page(10), kind: FormatKind::AmdV1, make: |_| Err("not made".into()) };
        let mut work = |times: u64| Duration::from_nanos(500 * times);
        let figure = measure(&row, &mut work);
        assert_eq!((figure.best_ns, figure.median_ns), (50.0, 50.0));
        assert!(figure.samples >= LEAST);
    }

    #[test]
    fn names_are_unique() {
        let groups = [Group::Pt, Group::Dma, Group::Ioas, Group::Convert, Group::Iommufd, Group::Load];
        let mut names: Vec<_> = groups.into_iter().flat_map(|group| group.rows(FormatKind::AmdV1)).map(|row| row.name).collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
    }
}
