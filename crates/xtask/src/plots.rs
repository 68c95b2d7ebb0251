//! docs/plots: time per operation against size, one picture for each study or pair of studies, drawn from the JSON of `lockstep bench scale`.
//!
//! Both axes are logarithmic. A logarithm is nearly level there, and what grows with its size climbs as fast as the grey line.

use crate::conformance::build_lockstep;
use crate::root;
use plotters::coord::ranged1d::{KeyPointHint, Ranged};
use plotters::prelude::*;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::PathBuf;
use std::process::{Command, Stdio};

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Draw what a run has printed already; several files are put together. Without it, the measurement is made now and takes some minutes
    #[arg(long, value_name = "FILE")]
    from: Vec<PathBuf>,
    /// Where the pictures go; docs/plots if not given
    #[arg(long, value_name = "FOLDER")]
    to: Option<PathBuf>,
    /// Format of the page tables, for a measurement that is made now
    #[arg(long, default_value = "amdv1", conflicts_with = "from")]
    format: String,
}

/// What is drawn of a report.
#[derive(Deserialize)]
struct Report {
    format: String,
    points: Vec<Point>,
}

#[derive(Deserialize)]
struct Point {
    name: String,
    axis: String,
    size: u64,
    unit: String,
    median: f64,
}

/// One picture.
struct Picture {
    file: &'static str,
    title: &'static str,
    /// Names of points begin like this.
    studies: &'static [&'static str],
    /// Units begin like this.
    unit: &'static str,
}

const PICTURES: [Picture; 8] = [
    Picture { file: "page-table-4k.svg", title: "One page table, 4 KiB leaves", studies: &["pt_scattered"], unit: "ns" },
    Picture { file: "page-table-large.svg", title: "One page table, the largest leaves", studies: &["pt_contiguous"], unit: "ns" },
    Picture { file: "address-space.svg", title: "One area over all of a backing", studies: &["ioas_"], unit: "ns" },
    Picture {
        file: "areas.svg",
        title: "Areas of an address space, each over its own page",
        studies: &["areas_fixed", "areas_auto"],
        unit: "ns",
    },
    Picture { file: "areas-shared.svg", title: "Areas that share pages", studies: &["areas_one_page", "areas_copies"], unit: "ns" },
    Picture { file: "guests.svg", title: "Conversions and translations of a guest", studies: &["guest_"], unit: "ns" },
    Picture { file: "private-pages.svg", title: "Conversions among private pages", studies: &["private_pages"], unit: "ns" },
    Picture { file: "memory.svg", title: "Memory for each mapped GiB", studies: &["pt_", "ioas_", "guest_"], unit: "bytes/GiB" },
];

pub(crate) fn main(options: &Options) -> Result<(), String> {
    let texts = if options.from.is_empty() {
        vec![measure(&options.format)?]
    } else {
        let read = |path: &PathBuf| fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()));
        options.from.iter().map(read).collect::<Result<_, _>>()?
    };
    let report = join(&texts)?;
    let folder = options.to.clone().unwrap_or_else(|| root().join("docs/plots"));
    fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    for picture in &PICTURES {
        let Some(svg) = draw(picture, &report)? else {
            eprintln!("xtask: {} is left as it is: there are no points for it", picture.file);
            continue;
        };
        let path = folder.join(picture.file);
        fs::write(&path, svg).map_err(|error| format!("{}: {error}", path.display()))?;
        println!("{}", path.display());
    }
    Ok(())
}

/// Runs the measurement. What it judges does not matter here.
fn measure(format: &str) -> Result<String, String> {
    let lockstep = build_lockstep()?;
    let mut command = Command::new(lockstep);
    command.args(["bench", "scale", "--json", "--format", format]).stderr(Stdio::inherit());
    let output = command.output().map_err(|error| format!("lockstep bench scale: {error}"))?;
    if output.status.code().is_none_or(|code| code > 1) {
        return Err(format!("lockstep bench scale ended with {}", output.status));
    }
    String::from_utf8(output.stdout).map_err(|error| error.to_string())
}

fn join(texts: &[String]) -> Result<Report, String> {
    let mut all: Option<Report> = None;
    for text in texts {
        let report: Report = serde_json::from_str(text).map_err(|error| format!("no report of `lockstep bench scale --json`: {error}"))?;
        match &mut all {
            Some(all) if all.format != report.format => {
                return Err(format!("reports of two formats: {} and {}", all.format, report.format));
            }
            Some(all) => all.points.extend(report.points),
            None => all = Some(report),
        }
    }
    all.ok_or_else(|| "no report".to_owned())
}

/// The lines of a picture: by operation, size and figure.
fn series<'a>(picture: &Picture, report: &'a Report) -> BTreeMap<&'a str, Vec<&'a Point>> {
    let mut lines: BTreeMap<&str, Vec<&Point>> = BTreeMap::new();
    let wanted = |point: &&Point| picture.studies.iter().any(|study| point.name.starts_with(study));
    for point in report.points.iter().filter(wanted).filter(|point| point.unit.starts_with(picture.unit) && point.median > 0.0) {
        lines.entry(&point.name).or_default().push(point);
    }
    lines.values_mut().for_each(|points| points.sort_by_key(|point| point.size));
    lines
}

/// A logarithmic axis whose marks are the caller's.
struct Axis {
    /// Logarithms of the ends.
    lg: Range<f64>,
    marks: Vec<f64>,
}

impl Axis {
    /// One that holds all `values`, with a mark at each power of `step` that `first` is a power of, too.
    fn over(values: impl Iterator<Item = f64>, step: f64) -> Self {
        let (low, high) = values.fold((f64::MAX, f64::MIN_POSITIVE), |(low, high), value| (low.min(value), high.max(value)));
        let (first, last) = (low.log(step).floor() as i32, high.log(step).ceil() as i32);
        let marks: Vec<f64> = (first..=last.max(first + 1)).map(|power| step.powi(power)).collect();
        Self { lg: marks[0].ln()..marks[marks.len() - 1].ln(), marks }
    }
}

impl Ranged for Axis {
    type FormatOption = plotters::coord::ranged1d::NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let share = (value.max(f64::MIN_POSITIVE).ln() - self.lg.start) / (self.lg.end - self.lg.start);
        limit.0 + (share * f64::from(limit.1 - limit.0)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _hint: Hint) -> Vec<f64> {
        self.marks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.lg.start.exp()..self.lg.end.exp()
    }
}

impl plotters::coord::ranged1d::ValueFormatter<f64> for Axis {
    fn format_ext(&self, value: &f64) -> String {
        value.to_string()
    }
}

/// Colours and strokes that can be told apart, also in print.
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 90, 181),
    RGBColor(220, 50, 32),
    RGBColor(0, 130, 90),
    RGBColor(150, 80, 180),
    RGBColor(190, 120, 0),
    RGBColor(30, 30, 30),
    RGBColor(0, 150, 190),
    RGBColor(170, 40, 110),
];
const GREY: RGBColor = RGBColor(150, 150, 150);

/// The picture as SVG; `None` without points.
fn draw(picture: &Picture, report: &Report) -> Result<Option<String>, String> {
    let lines = series(picture, report);
    let Some(any) = lines.values().flatten().next() else { return Ok(None) };
    let is_bytes = any.axis.ends_with("bytes");
    let points = || lines.values().flatten();
    let across = Axis::over(points().map(|point| point.size as f64), if is_bytes { 16.0 } else { 10.0 });
    let up = Axis::over(points().map(|point| point.median), 10.0);
    let steepest = linear(&across, &up);
    let mut text = String::new();
    let fail = |error: &dyn std::fmt::Display| format!("{}: {error}", picture.file);
    {
        let height = 560.max(120 + 19 * lines.len() as u32);
        let area = SVGBackend::with_string(&mut text, (1080, height)).into_drawing_area();
        area.fill(&WHITE).map_err(|error| fail(&error))?;
        let (plot, legend) = area.split_horizontally(730);
        let title = format!("{} ({})", picture.title, report.format);
        area.draw_text(&title, &("sans-serif", 20).into_text_style(&area), (24, 12)).map_err(|error| fail(&error))?;
        let source = "cargo xtask plots: medians of lockstep bench scale";
        area.draw_text(source, &("sans-serif", 13).into_text_style(&area).color(&GREY), (24, 38)).map_err(|error| fail(&error))?;
        let mut chart = ChartBuilder::on(&plot)
            .margin_top(64)
            .margin_left(12)
            .margin_bottom(12)
            .set_label_area_size(LabelAreaPosition::Left, 70)
            .set_label_area_size(LabelAreaPosition::Bottom, 46)
            .build_cartesian_2d(across, up)
            .map_err(|error| fail(&error))?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .x_desc(any.axis.clone())
            .y_desc(if picture.unit == "ns" { "nanoseconds" } else { "bytes" })
            .x_label_formatter(&|size| words(*size, is_bytes))
            .y_label_formatter(&|value| words(*value, false))
            .label_style(("sans-serif", 13))
            .draw()
            .map_err(|error| fail(&error))?;
        chart.draw_series(LineSeries::new(steepest, GREY.stroke_width(1))).map_err(|error| fail(&error))?;
        let note = |at: i32, text: &str, colour: &RGBColor| -> Result<(), String> {
            let style = ("sans-serif", 13).into_text_style(&legend).color(colour);
            legend.draw(&Rectangle::new([(6, at + 5), (26, at + 8)], colour.filled())).map_err(|error| fail(&error))?;
            legend.draw_text(text, &style, (34, at)).map_err(|error| fail(&error))
        };
        note(64, "grows with the size", &GREY)?;
        for (index, (name, points)) in lines.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let places = || points.iter().map(|point| (point.size as f64, point.median));
            // Past the last colour they begin again, with hollow marks.
            let filled = index < COLOURS.len();
            chart.draw_series(LineSeries::new(places(), colour.stroke_width(2))).map_err(|error| fail(&error))?;
            let mark = |place| Circle::new(place, 4, if filled { colour.filled() } else { colour.stroke_width(1) });
            chart.draw_series(places().map(mark)).map_err(|error| fail(&error))?;
            let unit = points.first().map_or("", |point| point.unit.as_str());
            let hollow = if filled { "" } else { " (hollow)" };
            note(64 + 19 * (index as i32 + 1), &format!("{name}, {unit}{hollow}"), &colour)?;
        }
        area.present().map_err(|error| fail(&error))?;
    }
    Ok(Some(text))
}

/// From the lower left corner on, what a cost does that grows with the size.
fn linear(across: &Axis, up: &Axis) -> [(f64, f64); 2] {
    let (from, to) = (across.range(), up.range());
    let growth = (from.end / from.start).min(to.end / to.start);
    [(from.start, to.start), (from.start * growth, to.start * growth)]
}

/// A number on an axis.
fn words(value: f64, is_bytes: bool) -> String {
    let (step, units): (f64, [&str; 5]) =
        if is_bytes { (1024.0, ["B", "KiB", "MiB", "GiB", "TiB"]) } else { (1000.0, ["", "k", "M", "G", "T"]) };
    let mut value = value;
    let mut unit = 0;
    // Powers come out of logarithms, a little off.
    while value >= step * 0.999 && unit + 1 < units.len() {
        value /= step;
        unit += 1;
    }
    let number = if value < 0.99 { format!("{value:.3}").trim_end_matches('0').to_owned() } else { format!("{value:.0}") };
    if units[unit].len() > 1 { format!("{number} {}", units[unit]) } else { format!("{number}{}", units[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> String {
        let points: Vec<String> = (0..3)
            .map(|step| {
                let (size, ns) = (1u64 << (20 + 4 * step), 10 + step);
                format!(
                    r#"{{"name":"pt_scattered_walk","axis":"mapped bytes","size":{size},"unit":"ns/call","best":1,"median":{ns},"samples":7,"resident_bytes":0}}"#
                )
            })
            .collect();
        format!(r#"{{"format":"amdv1","points":[{}],"verdicts":[],"skipped":[],"access":[]}}"#, points.join(","))
    }

    #[test]
    fn a_picture_shows_what_there_is_and_no_more() {
        let report = join(&[report()]).unwrap();
        let svg = draw(&PICTURES[0], &report).unwrap().unwrap();
        for wanted in
            ["One page table, 4 KiB leaves (amdv1)", "pt_scattered_walk, ns/call", "1 MiB", "256 MiB", "mapped bytes", "cargo xtask plots"]
        {
            assert!(svg.contains(wanted), "no '{wanted}' in {svg}");
        }
        assert_eq!(svg.matches("<circle").count(), 3);
        assert!(svg.len() < 100 << 10);
        assert!(draw(&PICTURES[3], &report).unwrap().is_none());
    }

    #[test]
    fn reports_of_one_format_are_put_together() {
        assert_eq!(join(&[report(), report()]).unwrap().points.len(), 6);
        assert!(join(&[report(), report().replace("amdv1", "vtdss")]).is_err());
        assert!(join(&[]).is_err() && join(&["{}".to_owned()]).is_err());
    }

    #[test]
    fn numbers_on_axes() {
        let sizes: Vec<String> = [1048576.0, 16777216.0, 1.0995e12].map(|size| words(size, true)).into();
        assert_eq!(sizes, ["1 MiB", "16 MiB", "1 TiB"]);
        let counts: Vec<String> = [0.01, 1.0, 100.0, 1e6].map(|count| words(count, false)).into();
        assert_eq!(counts, ["0.01", "1", "100", "1M"]);
        let axis = Axis::over([3.0, 4000.0].into_iter(), 10.0);
        assert_eq!(axis.marks, [1.0, 10.0, 100.0, 1000.0, 10_000.0]);
        assert_eq!((axis.map(&1.0, (0, 400)), axis.map(&100.0, (0, 400))), (0, 200));
    }
}
