//! `lockstep bench`: the rows that the criterion benches run, sampled here, for users who want their own host's figures without a toolchain.

use crate::args::{BenchArgs, BenchGroup};
use crate::scale;
use indicatif::{ProgressBar, ProgressStyle};
use pt::FormatKind;
use serde::Serialize;
use std::collections::BTreeMap;
use std::process::ExitCode;
use workload::{Figure, Further, Group, Row, measure};

/// One element of the JSON array; `ns` is the median.
#[derive(Serialize)]
struct Element {
    name: &'static str,
    format: &'static str,
    ns: f64,
    best_ns: f64,
    unit: &'static str,
    /// The kernel's median for the same work, and what the row is to reach.
    #[serde(skip_serializing_if = "Option::is_none")]
    kernel_ns: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    goal_ns: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<String>,
    /// What the row has beside its own figure, by name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    figures: BTreeMap<&'static str, f64>,
}

/// The command. Exit status 2 when a row could not be set up or nothing was selected.
pub(crate) fn main(options: &BenchArgs) -> ExitCode {
    let Some(group) = options.group.rows() else { return scale::main(options) };
    match run(options, group) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lockstep: {error}");
            ExitCode::from(2)
        }
    }
}

fn run(options: &BenchArgs, group: Group) -> Result<(), workload::Error> {
    if options.memory.or(options.areas).or(options.one_size).is_some() {
        return Err("--memory and --areas are options of `lockstep bench scale`".into());
    }
    if options.group == BenchGroup::Iommufd && options.format != FormatKind::AmdV1 {
        return Err(format!("calls of /dev/iommu are measured over amdv1 alone, not {}", options.format).into());
    }
    let all = group.rows(options.format);
    let is_chosen = |row: &&Row| if options.exact { row.name == options.only } else { row.name.contains(&options.only) };
    let rows: Vec<&Row> = all.iter().filter(is_chosen).collect();
    if rows.is_empty() {
        let names: Vec<_> = all.iter().map(|row| row.name).collect();
        return Err(format!("no row's name contains '{}'; there are {}", options.only, names.join(", ")).into());
    }
    if let Some(times) = options.times {
        for row in rows {
            row.make().map_err(|error| format!("{}: {error}", row.name))?.run(times);
            println!("{} {} {times}", row.name, row.format);
        }
        return Ok(());
    }
    // Draws on a terminal only.
    let bar = ProgressBar::new(rows.len() as u64);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len}  {msg}").unwrap_or_else(|_| ProgressStyle::default_bar()));
    let mut elements = Vec::with_capacity(rows.len());
    if !options.json {
        bar.suspend(|| {
            println!(
                "{:<40} {:<14} {:>12} {:>12}  {:<4} {:>14} {:>9} {:>8}",
                "name", "format", "best ns", "median ns", "per", "per second", "kernel ns", "goal ns"
            )
        });
    }
    let mut left_out = 0;
    for row in rows {
        bar.set_message(row.name);
        let mut work = match row.make() {
            Ok(work) => work,
            Err(error) => {
                left_out += 1;
                bar.suspend(|| eprintln!("{}: not run: {error}", row.name));
                bar.inc(1);
                continue;
            }
        };
        let figure = measure(row, work.as_mut());
        let (kernel, note, figures) = (row.kernel(), work.note(), work.figures());
        if !options.json {
            bar.suspend(|| print(row, &figure, &figures, note.as_deref()));
        }
        elements.push(Element {
            name: row.name,
            format: row.format,
            ns: round(figure.median_ns),
            best_ns: round(figure.best_ns),
            unit: row.unit.name(),
            kernel_ns: kernel.map(|kernel| kernel.median_ns),
            goal_ns: kernel.map(|kernel| kernel.goal_ns),
            note,
            figures: figures.iter().map(|further| (further.name, round(further.value))).collect(),
        });
        bar.inc(1);
    }
    bar.finish_and_clear();
    if options.json {
        println!("{}", serde_json::to_string_pretty(&elements)?);
    }
    if left_out > 0 { Err(format!("{left_out} rows were not run").into()) } else { Ok(()) }
}

fn print(row: &Row, figure: &Figure, figures: &[Further], note: Option<&str>) {
    let Figure { best_ns, median_ns, .. } = figure;
    let (name, format, unit) = (row.name, row.format, row.unit.name());
    let beside = row.kernel().map_or_else(String::new, |kernel| {
        let verdict = if *median_ns <= kernel.goal_ns { "met" } else { "NOT met" };
        format!("{:>9.2} {:>8.2} {:.2} of the kernel's, {verdict}", kernel.median_ns, kernel.goal_ns, median_ns / kernel.median_ns)
    });
    let line = format!(
        "{name:<40} {format:<14} {best_ns:>12.2} {median_ns:>12.2}  {unit:<4} {:>14.0} {beside} {}",
        1e9 / median_ns,
        note.unwrap_or_default()
    );
    println!("{}", line.trim_end());
    if !figures.is_empty() {
        let all: Vec<_> = figures.iter().map(|further| format!("{} {:.2}", further.name, further.value)).collect();
        println!("{:<40} {}", "", all.join(", "));
    }
}

/// Picoseconds are noise.
fn round(ns: f64) -> f64 {
    (ns * 1000.0).round() / 1000.0
}
