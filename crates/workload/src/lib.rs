//! What is measured, apart from how: every row of the figures is one piece of work that keeps its own time. `lockstep bench` samples the rows and
//! prints a table; the criterion benches run the very same rows, so the two cannot drift apart. What costs come to as things grow is another matter: see
//! [`scale`].
//!
//! - *row*: a name, what one figure stands for, and how to set the work up ([`Row`]).
//! - *work*: runs an operation so many times, and answers how long the operations took ([`Work`]). Undoing them is off the clock.
//! - *batch*: operations between two looks at the clock; enough of them that the looks cost nothing.

mod beside;
pub mod convert;
pub mod dma;
mod front;
pub mod ioas;
pub mod iommufd;
mod iotlb;
mod kernel;
pub mod load;
mod measure;
pub mod pt;
pub mod scale;
mod tree;

pub use kernel::Kernel;
pub use measure::{Figure, measure};

use ::pt::FormatKind;
use std::time::{Duration, Instant};

/// Why a row could not be set up: the host lacks memory, or address space.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// Rows that belong together: one command, one `cargo bench` target.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Group {
    /// IO page tables alone.
    Pt,
    /// Translation and copies of a device.
    Dma,
    /// IO address spaces: files to leaves.
    Ioas,
    /// Page state changes.
    Convert,
    /// Calls of /dev/iommu.
    Iommufd,
    /// Readers and writers at once.
    Load,
}

impl Group {
    /// Its rows over page tables of `format`, in the order in which they are shown. Calls of /dev/iommu are measured over AMDv1 alone.
    pub fn rows(self, format: FormatKind) -> Vec<Row> {
        let mut rows = match self {
            Self::Pt => pt::rows(),
            Self::Dma => dma::rows(),
            Self::Ioas => ioas::rows(),
            Self::Convert => convert::rows(),
            Self::Iommufd => iommufd::rows(),
            Self::Load => load::rows(),
        };
        for row in rows.iter_mut().filter(|row| self != Self::Iommufd && row.format != "-") {
            (row.format, row.kind) = (format.name(), format);
        }
        rows
    }

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pt => "pt",
            Self::Dma => "dma",
            Self::Ioas => "ioas",
            Self::Convert => "convert",
            Self::Iommufd => "iommufd",
            Self::Load => "load",
        }
    }
}

/// What the nanoseconds of a row are for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unit {
    /// One call.
    Call,
    /// One 4 KiB page, of calls with this many.
    Page(u64),
}

impl Unit {
    /// How many figures one operation makes.
    pub fn per_operation(self) -> u64 {
        match self {
            Self::Call => 1,
            Self::Page(pages) => pages,
        }
    }

    /// As it is printed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Call => "call",
            Self::Page(_) => "page",
        }
    }
}

/// One row of the figures.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// As in the output and in criterion's reports.
    pub name: &'static str,
    /// Format of the page tables; "-" where none takes part.
    pub format: &'static str,
    /// What the figure is for.
    pub unit: Unit,
    kind: FormatKind,
    make: fn(FormatKind) -> Result<Box<dyn Work>, Error>,
}

impl Row {
    /// Sets the work up, memory touched and caches filled as far as the row's name says.
    ///
    /// # Errors
    /// The host's, when it has too little memory or address space.
    pub fn make(&self) -> Result<Box<dyn Work>, Error> {
        (self.make)(self.kind)
    }
}

/// A piece of work, set up.
pub trait Work {
    /// Does the operation `times` times and answers how long that took, without what prepares and undoes it.
    fn run(&mut self, times: u64) -> Duration;

    /// What else there is to say after a measurement, for example a hit rate.
    fn note(&self) -> Option<String> {
        None
    }

    /// Numbers beside the row's own, for example percentiles.
    fn figures(&self) -> Vec<Further> {
        Vec::new()
    }
}

/// A number beside a row's own. Its name ends in its unit, `_ns`, or in `ratio`.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Further {
    /// As in the output.
    pub name: &'static str,
    /// How much.
    pub value: f64,
}

impl Further {
    pub(crate) fn new(name: &'static str, value: f64) -> Self {
        Self { name, value }
    }
}

impl<F: FnMut(u64) -> Duration> Work for F {
    fn run(&mut self, times: u64) -> Duration {
        self(times)
    }
}

/// Operations on a `state` in batches of at most `most`: `before` and `after` each batch are off the clock.
pub(crate) fn batches<S>(
    state: &mut S,
    times: u64,
    most: u64,
    mut before: impl FnMut(&mut S, u64),
    mut timed: impl FnMut(&mut S, u64),
    mut after: impl FnMut(&mut S, u64),
) -> Duration {
    let mut took = Duration::ZERO;
    let mut left = times;
    while left > 0 {
        let now = left.min(most);
        before(state, now);
        let start = Instant::now();
        timed(state, now);
        took += start.elapsed();
        after(state, now);
        left -= now;
    }
    took
}

/// A domain in a format, with all that it offers.
pub(crate) fn in_format(format: FormatKind) -> iommu::DomainConfig {
    iommu::DomainConfig { format, ..iommu::DomainConfig::default() }
}

/// Times `work`, which needs nothing undone.
pub(crate) fn timed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

/// A repeatable sequence of numbers below `below`, to choose addresses by without computing them on the clock.
pub(crate) fn choices(count: usize, below: u64) -> Vec<u64> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    std::iter::repeat_with(next).take(count).collect()
}
