//! `lockstep bench scale`: what operations cost as memory and areas grow, and whether any grows faster than a logarithm.

use crate::args::BenchArgs;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::process::ExitCode;
use std::time::Duration;
use workload::scale::{Access, Limits, Point, Study, Verdict, studies, verdicts};

/// How long each operation is sampled at each size.
const PATIENCE: Duration = Duration::from_millis(100);
/// The most memory whose access is measured.
const ACCESS_BYTES: u64 = 256 << 20;

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    format: &'static str,
    points: Vec<PointOut>,
    verdicts: Vec<VerdictOut>,
    /// Sizes that were left out, and why.
    skipped: Vec<Skipped>,
    /// What one random access costs here, by how much memory is accessed.
    access: Vec<AccessOut>,
}

#[derive(Serialize)]
struct PointOut {
    name: String,
    axis: &'static str,
    size: u64,
    unit: &'static str,
    best: f64,
    median: f64,
    samples: usize,
    resident_bytes: u64,
}

#[derive(Serialize)]
struct VerdictOut {
    name: String,
    axis: &'static str,
    unit: &'static str,
    sizes: [u64; 2],
    costs: [f64; 2],
    growth: f64,
    log_growth: f64,
    /// The largest share of what the rule allows; more than 1 breaks it.
    used: f64,
    is_within: bool,
}

#[derive(Serialize)]
struct Skipped {
    study: &'static str,
    size: u64,
    why: String,
}

#[derive(Serialize)]
struct AccessOut {
    bytes: u64,
    ns: f64,
}

/// The command. Exit status 1 when something grows faster than a logarithm, 2 when it could not be measured.
pub(crate) fn main(options: &BenchArgs) -> ExitCode {
    match run(options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("lockstep: {error}");
            ExitCode::from(2)
        }
    }
}

fn run(options: &BenchArgs) -> Result<bool, workload::Error> {
    let default = Limits::default();
    let limits = Limits { mapped: options.memory.unwrap_or(default.mapped), count: options.areas.unwrap_or(default.count) };
    let all = studies();
    let chosen: Vec<Study> = all.iter().filter(|study| study.name.contains(&options.only)).copied().collect();
    let todo: Vec<(Study, u64)> = chosen.iter().flat_map(|study| study.sizes(&limits).into_iter().map(|size| (*study, size))).collect();
    if chosen.is_empty() {
        let names: Vec<_> = all.iter().map(|study| study.name).collect();
        return Err(format!("no study's name contains '{}'; there are {}", options.only, names.join(", ")).into());
    }
    if todo.is_empty() {
        return Err("nothing is that small: --memory begins at 1M, and at 16M for guests; --areas begins at 100".into());
    }
    // Draws on a terminal only.
    let bar = ProgressBar::new(todo.len() as u64);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len}  {msg}").unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.enable_steady_tick(Duration::from_millis(500));
    let access = Access::measure(ACCESS_BYTES);
    if !options.json {
        bar.suspend(|| println!("{:<36} {:>10} {:>12} {:>12}  {:<10} {:>8}", "operation", "at", "best", "median", "unit", "samples"));
    }
    let (mut points, mut skipped) = (Vec::new(), Vec::new());
    for (study, size) in todo {
        let at = study.axis.words(size);
        bar.set_message(format!("{} at {at}", study.name));
        if let Some(why) = study.obstacle(options.format, size) {
            bar.suspend(|| eprintln!("lockstep: {} at {at} is left out: {why}", study.name));
            skipped.push(Skipped { study: study.name, size, why });
        } else {
            let more = study.run(options.format, size, PATIENCE).map_err(|error| format!("{} at {at}: {error}", study.name))?;
            if !options.json {
                bar.suspend(|| more.iter().for_each(print_point));
            }
            points.extend(more);
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    let verdicts = verdicts(&points, &access);
    let broken = verdicts.iter().filter(|verdict| !verdict.is_within).count();
    if options.json {
        let report = Report {
            format: options.format.name(),
            points: points.into_iter().map(PointOut::from).collect(),
            verdicts: verdicts.into_iter().map(VerdictOut::from).collect(),
            skipped,
            access: access.points().iter().map(|&(bytes, ns)| AccessOut { bytes, ns: round(ns) }).collect(),
        };
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print_verdicts(&verdicts, &access, broken);
    }
    Ok(broken == 0)
}

fn print_point(point: &Point) {
    let (at, unit) = (point.axis.words(point.size), point.unit.name());
    println!("{:<36} {at:>10} {:>12.2} {:>12.2}  {unit:<10} {:>8}", point.name, point.best, point.median, point.samples);
}

fn print_verdicts(verdicts: &[Verdict], access: &Access, broken: usize) {
    let memory: Vec<_> =
        access.points().iter().map(|(bytes, ns)| format!("{} {ns:.1} ns", workload::scale::Axis::Mapped.words(*bytes))).collect();
    println!("\na random access into {}", memory.join(", "));
    println!("{:<36} {:>22} {:>10} {:>10} {:>7}", "operation", "from .. to", "grows", "logarithm", "of rule");
    for verdict in verdicts {
        let [from, to] = [verdict.sizes.0, verdict.sizes.1].map(|size| verdict.axis.words(size));
        let says = if verdict.is_within { "within" } else { "FASTER THAN A LOGARITHM" };
        let (growth, log) = (format!("x {:.2}", verdict.growth), format!("x {:.2}", verdict.log_growth));
        println!("{:<36} {:>22} {growth:>10} {log:>10} {:>6.0}%  {says}", verdict.name, format!("{from} .. {to}"), 100.0 * verdict.used);
    }
    let words =
        if broken == 0 { "none grows faster than a logarithm".to_owned() } else { format!("{broken} grow faster than a logarithm") };
    println!("{} operations: {words}", verdicts.len());
}

impl From<Point> for PointOut {
    fn from(point: Point) -> Self {
        let Point { name, axis, size, unit, best, median, samples, resident } = point;
        let (best, median) = (round(best), round(median));
        Self { name, axis: axis.name(), size, unit: unit.name(), best, median, samples, resident_bytes: resident }
    }
}

impl From<Verdict> for VerdictOut {
    fn from(verdict: Verdict) -> Self {
        let Verdict { name, axis, unit, sizes, costs, growth, log_growth, used, is_within } = verdict;
        let [growth, log_growth, used] = [growth, log_growth, used].map(round);
        let costs = [round(costs.0), round(costs.1)];
        Self { name, axis: axis.name(), unit: unit.name(), sizes: sizes.into(), costs, growth, log_growth, used, is_within }
    }
}

/// Picoseconds are noise.
fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}
