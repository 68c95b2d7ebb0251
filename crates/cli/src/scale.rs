//! `lockstep bench scale`: what operations cost as memory and areas grow, and whether any grows faster than a logarithm.

use crate::args::BenchArgs;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::process::{Command, ExitCode, Stdio};
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
    points: Vec<Point>,
    verdicts: Vec<Verdict>,
    /// Sizes that were left out, and why.
    skipped: Vec<Skipped>,
    /// Bytes, and what one random access into as much costs here, in nanoseconds.
    access: Vec<(u64, f64)>,
}

#[derive(Serialize)]
struct Skipped {
    study: &'static str,
    size: u64,
    why: String,
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
    if let Some(size) = options.one_size {
        return one(options, size);
    }
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
        return Err("nothing is that small: --memory begins at 1M, or at 16M for guests, and --areas at 100".into());
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
            let more = apart(options, &study, size).map_err(|error| format!("{} at {at}: {error}", study.name))?;
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
        let report = Report { format: options.format.name(), points, verdicts, skipped, access: access.points().to_vec() };
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print_verdicts(&verdicts, &access, broken);
    }
    Ok(broken == 0)
}

/// One study at one size, for the process that has started this one.
fn one(options: &BenchArgs, size: u64) -> Result<bool, workload::Error> {
    let study = studies().into_iter().find(|study| study.name == options.only).ok_or("no such study")?;
    println!("{}", serde_json::to_string(&study.run(options.format, size, PATIENCE)?)?);
    Ok(true)
}

/// The same, in a process of its own: what it takes of memory can be seen, and nothing is left over from the one before.
fn apart(options: &BenchArgs, study: &Study, size: u64) -> Result<Vec<Point>, workload::Error> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["bench", "scale", "--only", study.name, "--format", options.format.name(), "--one-size", &size.to_string()]);
    let output = command.stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        return Err(format!("its process ended with {}", output.status).into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
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
