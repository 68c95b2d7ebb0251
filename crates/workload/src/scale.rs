//! What operations cost as memory and areas grow: up to 1 TiB mapped in large leaves and in 4 KiB ones, and up to a million areas in one address
//! space. None of this needs that much memory: windows are simulated, and only page tables, records and the RMP's entries are real.
//!
//! - *study*: one thing that grows, set up at several sizes ([`Study`]); it measures every operation that is of interest there.
//! - *point*: one operation at one size ([`Point`]).
//! - *series*: the points of one operation, by size; a [`Verdict`] says whether it grows faster than a logarithm, by the rule stated there.

mod areas;
mod guests;
mod meter;
mod space;
mod tables;
mod verdict;

pub use meter::{Access, available_bytes};
pub use verdict::{NOISE, PLACES, Verdict, verdicts};

use crate::Error;
use ::pt::FormatKind;
use meter::Meter;
use serde::{Deserialize, Serialize};

/// What grows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Axis {
    /// Bytes that an IO page table maps.
    #[serde(rename = "mapped bytes")]
    Mapped,
    /// Areas in an IO address space.
    #[serde(rename = "areas")]
    Areas,
    /// 4 KiB pages of a guest that are private, each apart from the others.
    #[serde(rename = "private pages")]
    Private,
}

impl Axis {
    /// How many things of its kind a size is: what the logarithm is taken of. Bytes are counted in pages.
    pub fn things(self, size: u64) -> f64 {
        (if self == Self::Mapped { size >> addr::PAGE_LG2 } else { size }) as f64
    }

    /// A size in words.
    pub fn words(self, size: u64) -> String {
        const UNITS: [&str; 6] = ["", "Ki", "Mi", "Gi", "Ti", "Pi"];
        if self != Self::Mapped {
            return size.to_string();
        }
        let step = (size.max(1).ilog2() / 10) as usize;
        let (whole, unit) = (size >> (10 * step), UNITS[step]);
        format!("{whole} {unit}B")
    }
}

/// How far studies go.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The most mapped bytes.
    pub mapped: u64,
    /// The most areas, and private pages.
    pub count: u64,
}

impl Default for Limits {
    /// 1 TiB and a million.
    fn default() -> Self {
        Self { mapped: 1 << 40, count: 1_000_000 }
    }
}

/// What a figure is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Unit {
    /// Time of one call.
    #[serde(rename = "ns/call")]
    NsPerCall,
    /// Time of a call that is about many pages, for each of them.
    #[serde(rename = "ns/page")]
    NsPerPage,
    /// Time of a call that is about many leaves, for each of them.
    #[serde(rename = "ns/leaf")]
    NsPerLeaf,
    /// Time of a call that is about much memory, for each GiB.
    #[serde(rename = "ns/GiB")]
    NsPerGib,
    /// Time of a call that is about many areas, for each of them.
    #[serde(rename = "ns/area")]
    NsPerArea,
    /// Memory for each mapped GiB.
    #[serde(rename = "bytes/GiB")]
    BytesPerGib,
    /// Memory for each area.
    #[serde(rename = "bytes/area")]
    BytesPerArea,
    /// Memory for each private page.
    #[serde(rename = "bytes/page")]
    BytesPerPage,
}

impl Unit {
    /// As it is printed.
    pub fn name(self) -> &'static str {
        match self {
            Self::NsPerCall => "ns/call",
            Self::NsPerPage => "ns/page",
            Self::NsPerLeaf => "ns/leaf",
            Self::NsPerGib => "ns/GiB",
            Self::NsPerArea => "ns/area",
            Self::BytesPerGib => "bytes/GiB",
            Self::BytesPerArea => "bytes/area",
            Self::BytesPerPage => "bytes/page",
        }
    }

    /// Whether it is about time.
    pub fn is_time(self) -> bool {
        !matches!(self, Self::BytesPerGib | Self::BytesPerArea | Self::BytesPerPage)
    }
}

/// One operation at one size.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Point {
    /// Study and operation.
    pub name: String,
    /// What grows.
    pub axis: Axis,
    /// How far it has grown.
    pub size: u64,
    /// What the figures are.
    pub unit: Unit,
    /// The best sample: the cost undisturbed.
    pub best: f64,
    /// The sample in the middle.
    pub median: f64,
    /// How many samples there were.
    pub samples: usize,
    /// Memory that the process has more than when the study began: what the operation looks at.
    #[serde(rename = "resident_bytes")]
    pub resident: u64,
}

/// One thing that grows.
#[derive(Clone, Copy, Debug)]
pub struct Study {
    /// How the names of its points begin.
    pub name: &'static str,
    /// What grows.
    pub axis: Axis,
    /// The smallest size, and how often each goes into the next.
    sizes: (u64, u64),
    /// Roughly the memory that it takes at a size.
    needs: fn(u64) -> u64,
    run: fn(FormatKind, u64, &mut Meter) -> Result<(), Error>,
}

/// All studies, in the order in which they are shown.
pub fn studies() -> Vec<Study> {
    [tables::studies(), space::studies(), areas::studies(), guests::studies()].concat()
}

impl Study {
    /// Its sizes within `limits`, ascending.
    pub fn sizes(&self, limits: &Limits) -> Vec<u64> {
        let most = if self.axis == Axis::Mapped { limits.mapped } else { limits.count };
        let (least, step) = self.sizes;
        std::iter::successors(Some(least), |size| size.checked_mul(step)).take_while(|size| *size <= most).collect()
    }

    /// Why it cannot run at this size; `None` when it can.
    pub fn obstacle(&self, format: FormatKind, size: u64) -> Option<String> {
        let reach = format.aperture().last_offset();
        if self.axis == Axis::Mapped && size - 1 > reach {
            return Some(format!("{format} translates {} only", Axis::Mapped.words(reach + 1)));
        }
        let (needs, there) = ((self.needs)(size) + MARGIN, available_bytes()?);
        (needs > there)
            .then(|| format!("it needs {} of memory, and {} are available", Axis::Mapped.words(needs), Axis::Mapped.words(there)))
    }

    /// Measures all its operations at one size, each for about `patience`. Run in a process of its own, it sees what memory it takes; otherwise what it
    /// gets out of an earlier one's heap is missing.
    ///
    /// # Errors
    /// What the host refused.
    pub fn run(&self, format: FormatKind, size: u64, patience: std::time::Duration) -> Result<Vec<Point>, Error> {
        let mut meter = Meter::new(self, size, patience);
        (self.run)(format, size, &mut meter)?;
        Ok(meter.into_points())
    }
}

/// Sizes of what is mapped in small leaves.
const SMALL_LEAVES: (u64, u64) = (1 << 20, 16);
/// Sizes of what is mapped in large ones: in steps of a whole level of the tables, so that leaves take equally many slots at each size. A cut or a merge
/// costs more the more slots there are, up to half a table, and then begins anew one level higher.
const LARGE_LEAVES: (u64, u64) = (4 << 20, 512);
const COUNTS: (u64, u64) = (100, 10);

/// Memory that is left to others.
const MARGIN: u64 = 512 << 20;

const K4: u64 = 4 << 10;
const G1: u64 = 1 << 30;
/// Operations between two looks at the clock.
const BATCH: u64 = 256;

/// Bytes of page tables that 4 KiB leaves for `mapped` bytes take.
fn small_leaf_tables(mapped: u64) -> u64 {
    mapped / 512 + (64 << 10)
}

/// Up to `count` different numbers below `below`, in no order.
fn some(random: &mut fastrand::Rng, count: u64, below: u64) -> Vec<u64> {
    let mut all: Vec<u64> = (0..count.min(below / 4).max(1)).map(|_| random.u64(..below)).collect();
    all.sort_unstable();
    all.dedup();
    random.shuffle(&mut all);
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// Every operation, at sizes that take no time: each series has all its points, and each figure is one.
    #[test]
    fn every_study_runs() {
        let limits = Limits { mapped: 64 << 20, count: 1000 };
        for study in studies() {
            let sizes = study.sizes(&limits);
            assert!(sizes.len() > 1 || study.axis == Axis::Mapped, "{}: {sizes:?}", study.name);
            let mut names: Vec<Vec<String>> = Vec::new();
            for size in sizes {
                let points = study.run(FormatKind::AmdV1, size, Duration::ZERO).unwrap_or_else(|error| panic!("{}: {error}", study.name));
                assert!(points.iter().all(|point| point.size == size && point.name.starts_with(study.name)));
                // Memory may round to nothing; time never does.
                assert!(points.iter().all(|point| point.best >= 0.0 && (point.best > 0.0 || !point.unit.is_time())), "{points:?}");
                names.push(points.into_iter().map(|point| point.name).collect());
            }
            assert!(names.windows(2).all(|pair| pair[0] == pair[1]), "{names:?}");
        }
    }

    #[test]
    fn all_go_to_the_limits() {
        for study in studies() {
            let sizes = study.sizes(&Limits::default());
            assert!(sizes.len() >= 3 && [1 << 40, 1_000_000].contains(&sizes[sizes.len() - 1]), "{}: {sizes:?}", study.name);
        }
    }

    #[test]
    fn sizes_in_words() {
        assert_eq!([1 << 40, 1 << 20, 1 << 36].map(|size| Axis::Mapped.words(size)), ["1 TiB", "1 MiB", "64 GiB"]);
    }
}
