//! The command line: one list that parser and help share.

use backing::Frames;
use clap::{Parser, Subcommand, ValueEnum};
use lockstep::{Borders, Policy, Reading};
use pt::FormatKind;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// Guest memory for device DMA, private and shared, kept in lockstep.
#[derive(Debug, Parser)]
#[command(name = "lockstep", version, about, max_term_width = 110)]
pub(crate) struct Args {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a guest whose pages turn private and shared while devices do DMA, and prove the tables equal
    Run(RunArgs),
    /// Run scene after scene, each with everything that can happen going on at once, and check all of it
    Soak(SoakArgs),
    /// Run a program that finds /dev/iommu, on a machine that has none
    Iommufd(IommufdArgs),
    /// Measure this host: page tables, DMA, address spaces, conversions, calls of /dev/iommu, all at once, or how all of these grow
    Bench(BenchArgs),
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct RunArgs {
    /// Guest memory, with a unit: 64M, 1G
    #[arg(long, default_value = "256M", value_parser = parse_bytes)]
    pub(crate) memory: u64,
    /// How long to run
    #[arg(long, default_value_t = 5.0)]
    pub(crate) seconds: f64,
    /// Where all random choices start
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// What devices may have mapped: mirror or shared-only
    #[arg(long, default_value_t = Policy::Mirror)]
    pub(crate) policy: Policy,
    /// Where the change of a page's owner must show: in the IO page table's leaves (table), or in the RMP only, with accesses judged page by page (rmp)
    #[arg(long, default_value_t = Borders::Table)]
    pub(crate) borders: Borders,
    /// Take it that the IOMMU refuses leaves above 2 MiB over shared memory, and make none
    #[arg(long)]
    pub(crate) strict: bool,
    /// Format of the devices' page tables
    #[arg(long, default_value_t = FormatKind::AmdV1)]
    pub(crate) format: FormatKind,
    /// How pages lie in the simulated physical space
    #[arg(long, value_enum, default_value_t = FramesArg::Contiguous)]
    pub(crate) frames: FramesArg,
    /// Where the guest runs: the best there is, or one in particular
    #[arg(long, value_enum, default_value_t = VmArg::Auto)]
    pub(crate) vm: VmArg,
    /// Add so many devices with translation caches of their own (PCIe ATS), untrusted and trusted in turns
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=8))]
    pub(crate) ats: u32,
    /// How long such a device may take to answer an invalidation, in milliseconds; then it is quarantined
    #[arg(long, value_name = "MS", default_value_t = 1000)]
    pub(crate) ats_timeout: u64,
    /// Print one JSON object instead of text
    #[arg(long)]
    pub(crate) json: bool,
    /// Plant a fault, which must be found; `list` prints their names
    #[arg(long = "break", value_name = "WHAT")]
    pub(crate) plant: Option<String>,
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct SoakArgs {
    /// How long
    #[arg(long, default_value_t = 60.0)]
    pub(crate) seconds: f64,
    /// Where all random choices start, those of the scenes among them
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Where the guests run: the best there is, or one in particular
    #[arg(long, value_enum, default_value_t = VmArg::Auto)]
    pub(crate) vm: VmArg,
    /// Print one JSON object at the end instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct IommufdArgs {
    /// Offer the kernel's test operations and mock devices, which its own test program uses
    #[arg(long)]
    pub(crate) test_devices: bool,
    /// Offer so many VFIO devices at /dev/vfio/devices/vfio0 and on, each with a DMA engine behind BAR0
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=i64::from(vfio::MOST)))]
    pub(crate) devices: u32,
    /// What devices may have mapped of a guest's memory: mirror or shared-only
    #[arg(long, default_value_t = Policy::Mirror)]
    pub(crate) policy: Policy,
    /// Print each call with its structure and its answer
    #[arg(long)]
    pub(crate) trace: bool,
    /// Print in words why a call was refused
    #[arg(long)]
    pub(crate) explain: bool,
    /// Make the Nth call of a name fail: map:2=ENOMEM; may be given several times
    #[arg(long, value_name = "NAME:N=ERRNO")]
    pub(crate) fail: Vec<String>,
    /// Print counts of calls, pages and faults at the end
    #[arg(long)]
    pub(crate) summary: bool,
    /// Print JSON, one object a line, instead of text
    #[arg(long)]
    pub(crate) json: bool,
    /// Write all this to a file instead of stderr
    #[arg(long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// The program and its arguments
    #[arg(last = true, required = true, value_name = "PROGRAM ARGS")]
    pub(crate) program: Vec<OsString>,
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct BenchArgs {
    /// What to measure
    #[arg(value_enum)]
    pub(crate) group: BenchGroup,
    /// Format of the page tables
    #[arg(long, default_value_t = FormatKind::AmdV1)]
    pub(crate) format: FormatKind,
    /// Print JSON instead of a table: an array of medians, or for scale an object with points and verdicts
    #[arg(long)]
    pub(crate) json: bool,
    /// Only rows whose name contains this
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub(crate) only: String,
    /// Take the text of --only for a whole name
    #[arg(long, requires = "only")]
    pub(crate) exact: bool,
    /// Do the work of each row exactly this often, once, and take no time: for tools that count instructions
    #[arg(long, value_name = "N", conflicts_with = "json")]
    pub(crate) times: Option<u64>,
    /// scale: the most mapped memory, with a unit; 1T if not given. None of it is real: 1T takes up to 5 GiB for tables
    #[arg(long, value_parser = parse_bytes)]
    pub(crate) memory: Option<u64>,
    /// scale: the most areas, and private pages; 1000000 if not given
    #[arg(long, value_name = "N")]
    pub(crate) areas: Option<u64>,
    /// scale: the study that --only names at this size, without judging it
    #[arg(long, hide = true)]
    pub(crate) one_size: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BenchGroup {
    /// IO page tables: map, unmap, walk, cut, merge
    Pt,
    /// Translation and copies beside a plain memcpy
    Dma,
    /// Mapping files and attaching domains
    Ioas,
    /// Page state changes
    Convert,
    /// Calls of /dev/iommu, in process and by a program
    Iommufd,
    /// Readers beside writers, and two writers at once
    Load,
    /// All of these against size: up to 1 TiB mapped and a million areas. Status 1 when one grows faster than a logarithm: when it costs more at a size N
    /// than each smaller size n allows, which is 1.5 log N / log n of the cost there, and 4 log N times what a random access to memory costs more
    Scale,
}

impl BenchGroup {
    /// Its rows; `None` for what has no rows of one size.
    pub(crate) fn rows(self) -> Option<workload::Group> {
        match self {
            Self::Pt => Some(workload::Group::Pt),
            Self::Dma => Some(workload::Group::Dma),
            Self::Ioas => Some(workload::Group::Ioas),
            Self::Convert => Some(workload::Group::Convert),
            Self::Iommufd => Some(workload::Group::Iommufd),
            Self::Load => Some(workload::Group::Load),
            Self::Scale => None,
        }
    }
}

impl RunArgs {
    pub(crate) fn duration(&self) -> Duration {
        Duration::try_from_secs_f64(self.seconds).unwrap_or(Duration::from_secs(5))
    }

    pub(crate) fn reading(&self) -> Reading {
        Reading { strict: self.strict, borders: self.borders }
    }

    pub(crate) fn layout(&self) -> Frames {
        match self.frames {
            FramesArg::Contiguous => Frames::Contiguous,
            FramesArg::Scattered => Frames::Scattered { seed: self.seed },
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FramesArg {
    /// In a row: large leaves
    Contiguous,
    /// In a seeded random order: 4 KiB leaves, as guest_memfd has them today
    Scattered,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum VmArg {
    /// KVM where /dev/kvm works, a thread elsewhere
    Auto,
    /// KVM, or an error
    Kvm,
    /// A thread of this process
    Thread,
}

/// A number of bytes with an optional unit of 1024s.
fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].trim_end_matches("iB").trim_end_matches(['b', 'B']) {
        "" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        unit => return Err(format!("unknown unit '{unit}': use K, M, G or T")),
    };
    let number: u64 = digits.parse().map_err(|_| format!("'{text}' is no number of bytes: write 64M or 1G"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text} is more than any memory"))
}

#[cfg(test)]
mod tests {
    use super::parse_bytes;

    #[test]
    fn sizes() {
        assert_eq!(parse_bytes("64M"), Ok(64 << 20));
        assert_eq!(parse_bytes("1GiB"), Ok(1 << 30));
        assert_eq!(parse_bytes("4096"), Ok(4096));
        assert!(parse_bytes("12X").is_err() && parse_bytes("M").is_err() && parse_bytes("99999999T").is_err());
    }
}
