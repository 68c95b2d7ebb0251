//! How points are taken: short samples of random places, the memory that a study has taken so far, and what a random access into that much memory
//! costs on this machine.

use super::{Axis, Point, Study, Unit};
use std::time::{Duration, Instant};

/// Samples of a point, unless they take more than [`LONG`] together.
const LEAST: usize = 7;
const MOST: usize = 51;
const LONG: Duration = Duration::from_millis(800);

/// Takes the points of one study at one size.
pub(super) struct Meter {
    study: &'static str,
    axis: Axis,
    size: u64,
    patience: Duration,
    before: u64,
    points: Vec<Point>,
}

impl Meter {
    pub(super) fn new(study: &Study, size: u64, patience: Duration) -> Self {
        Self { study: study.name, axis: study.axis, size, patience, before: resident_bytes(), points: Vec::new() }
    }

    pub(super) fn into_points(self) -> Vec<Point> {
        self.points
    }

    /// Something that is done once, `count` times.
    pub(super) fn once(&mut self, name: &str, unit: Unit, count: u64, took: Duration) {
        self.push(name, unit, vec![took.as_nanos() as f64 / count as f64]);
    }

    /// Operations that undo each other, sample by sample: `sample` answers how often each was done and how long that took.
    pub(super) fn sample<const N: usize>(&mut self, names: [(&str, Unit); N], mut sample: impl FnMut() -> (u64, [Duration; N])) {
        let mut samples: [Vec<f64>; N] = [const { Vec::new() }; N];
        let (started, mut taken) = (Instant::now(), 0);
        loop {
            let (count, took) = sample();
            taken += 1;
            for (all, took) in samples.iter_mut().zip(took) {
                all.push(took.as_nanos() as f64 / count as f64);
            }
            let elapsed = started.elapsed();
            if taken >= MOST || elapsed >= LONG || taken >= LEAST && elapsed >= self.patience {
                break;
            }
        }
        for ((name, unit), all) in names.into_iter().zip(samples) {
            self.push(name, unit, all);
        }
    }

    /// A figure that was counted.
    pub(super) fn fact(&mut self, name: &str, unit: Unit, value: f64) {
        self.push(name, unit, vec![value]);
    }

    /// Memory that has come since the study began.
    pub(super) fn resident(&self) -> u64 {
        resident_bytes().saturating_sub(self.before)
    }

    fn push(&mut self, name: &str, unit: Unit, mut samples: Vec<f64>) {
        samples.sort_by(f64::total_cmp);
        self.points.push(Point {
            name: format!("{}_{name}", self.study),
            axis: self.axis,
            size: self.size,
            unit,
            best: samples[0],
            median: samples[samples.len() / 2],
            samples: samples.len(),
            resident: self.resident(),
        });
    }
}

/// What one random access costs on this machine, by how much memory is accessed: each address comes out of the access before, as in a tree.
#[derive(Clone, Debug)]
pub struct Access {
    /// Bytes and nanoseconds, ascending.
    points: Vec<(u64, f64)>,
}

impl Access {
    /// Measures it, up to `most` bytes; beyond that the last figure is taken to hold.
    pub fn measure(most: u64) -> Self {
        let sizes = std::iter::successors(Some(16 << 10), |bytes| Some(bytes * 4)).take_while(|bytes| *bytes <= most.max(16 << 10));
        Self::of(sizes.map(|bytes| (bytes, chase(bytes))).collect())
    }

    /// As known beforehand; by ascending bytes.
    pub fn of(points: Vec<(u64, f64)>) -> Self {
        Self { points }
    }

    /// Bytes and nanoseconds, ascending.
    pub fn points(&self) -> &[(u64, f64)] {
        &self.points
    }

    /// Nanoseconds of an access into `bytes`.
    pub fn ns(&self, bytes: u64) -> f64 {
        // More memory is never quicker, whatever the measurement says.
        self.points.iter().take_while(|(size, _)| *size < 4 * bytes.max(1)).map(|(_, ns)| *ns).fold(0.0, f64::max)
    }
}

/// One line of a cache.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(u32);

/// Follows one cycle through all lines of `bytes`, in no order.
fn chase(bytes: u64) -> f64 {
    const STEPS: u32 = 1 << 16;
    let count = (bytes / 64) as u32;
    let mut lines: Vec<Line> = (0..count).map(Line).collect();
    let mut random = fastrand::Rng::with_seed(1);
    // Sattolo's shuffle makes a single cycle.
    for last in (1..count as usize).rev() {
        lines.swap(last, random.usize(..last));
    }
    let mut at = 0;
    let mut best = f64::MAX;
    for _ in 0..5 {
        let started = Instant::now();
        for _ in 0..STEPS {
            at = lines[at as usize].0;
        }
        best = best.min(started.elapsed().as_nanos() as f64 / f64::from(STEPS));
    }
    std::hint::black_box(at);
    best
}

/// Memory that the host can give without taking it from others; `None` where it does not say.
pub fn available_bytes() -> Option<u64> {
    kib("/proc/meminfo", "MemAvailable:")
}

/// Resident memory of this process, program and files aside; 0 where the host does not say.
fn resident_bytes() -> u64 {
    kib("/proc/self/status", "RssAnon:").unwrap_or(0)
}

/// The bytes of a line that counts KiB.
fn kib(path: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().trim_end_matches(" kB").parse::<u64>().ok().map(|kib| kib << 10)
}
