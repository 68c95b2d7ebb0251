//! `lockstep run`: a guest, its devices, host threads under whose hands pages turn private and shared, and the checks that all of it is right.

mod balloon;
mod breaks;
mod checks;
mod devices;
mod load;
mod machine;
mod report;
mod vcpu;
mod weather;

pub(crate) use checks::read;
pub(crate) use report::{Summary, bytes};
pub(crate) use weather::Counts as WeatherCounts;

use crate::args::RunArgs;
use balloon::Balloon;
use checks::{Checks, Detector, add};
use convert::Auditor;
use indicatif::{ProgressBar, ProgressStyle};
use load::{Lane, Region};
use lockstep::{AtsDma, Dma, Merger, Pace};
use machine::{Failure, Machine};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};
use weather::Weather;

/// The command. Exit status 0 only when every check held and everything that should have happened did.
pub(crate) fn main(options: &RunArgs) -> ExitCode {
    let planted = match options.plant.as_deref() {
        Some("list") => {
            breaks::BREAKS.iter().for_each(|fault| println!("{}", fault.name));
            return ExitCode::SUCCESS;
        }
        Some(name) if !breaks::BREAKS.iter().any(|fault| fault.name == name) => {
            eprintln!("lockstep: no fault is named '{name}'; `lockstep run --break list` prints the names");
            return ExitCode::from(2);
        }
        name => name,
    };
    match run(options, planted, None) {
        Ok(summary) => {
            summary.print(options.json);
            if summary.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("lockstep: {error}");
            ExitCode::from(2)
        }
    }
}

/// A run with everything beside it that a soak adds.
pub(crate) fn with_weather(options: &RunArgs) -> Result<(Summary, WeatherCounts), Failure> {
    let counts = WeatherCounts::default();
    let summary = run(options, None, Some(&counts))?;
    Ok((summary, counts))
}

fn run(options: &RunArgs, planted: Option<&str>, weather: Option<&WeatherCounts>) -> Result<Summary, Failure> {
    let checks = Arc::new(Checks::default());
    let options = &RunArgs { ats: options.ats.max(planted.map_or(0, breaks::needs_ats)), ..options.clone() };
    let mut machine = Machine::new(options, &checks)?;
    if !options.json {
        eprintln!("{}", machine.describe());
    }
    // Everything is built right; what is planted happens while it runs.
    let _plant = planted.and_then(breaks::plant);
    let started = Instant::now();
    let refused = AtomicU64::new(0);
    load_and_watch(options, &mut machine, &checks, &refused, started, weather)?;
    let guest = machine.guest_report(&checks)?;
    last_look(&mut machine, &checks);
    Ok(Summary::new(options, &machine, &checks, &guest, started.elapsed()))
}

/// All threads of a run, until time is up or something was found.
fn load_and_watch(
    options: &RunArgs,
    machine: &mut Machine,
    checks: &Arc<Checks>,
    refused: &AtomicU64,
    started: Instant,
    weather: Option<&WeatherCounts>,
) -> Result<(), Failure> {
    let region = Region { dma: Arc::clone(&machine.dma), checks: Arc::clone(checks), span: machine.plan.region };
    let away = (0..balloon::PAGES).map(|_| AtomicU64::new(0)).collect();
    let balloon = Balloon { dma: Arc::clone(&machine.dma), checks: Arc::clone(checks), span: machine.plan.balloon, away };
    let all = machine.plan.memory;
    let [trusted, untrusted] = [&machine.trusted, &machine.untrusted];
    let context = |device| Dma::new(device);
    let (converting, neighbours, probing) = (context(trusted)?, context(trusted)?, context(untrusted)?);
    let (breathing, pressing) = (context(untrusted)?, context(untrusted)?);
    let dma = Arc::clone(&machine.dma);
    let caches = machine.ats.iter().map(|device| Ok((Arc::clone(device), AtsDma::new(device)?)));
    let caches = caches.collect::<Result<Vec<_>, iommu::Error>>()?;
    let lanes = 1 + caches.len() as u64 / 2;
    let seed = options.seed;
    let guest = machine.take_guest(checks)?;
    let _merging = Merger::start(&dma, Pace::default())?;
    let weather = weather.map(|counts| Weather {
        dma: &dma,
        checks,
        counts,
        memory: machine.plan.memory,
        region: machine.plan.region,
        frames: machine.backing.frames(),
    });
    std::thread::scope(|scope| {
        let mut others = Vec::new();
        if let Some(weather) = &weather {
            others.push(scope.spawn(move || weather.slots(seed ^ 6)));
            others.push(scope.spawn(move || weather.second_space(seed ^ 7)));
            others.push(scope.spawn(move || weather.devices(seed ^ 8)));
            others.push(scope.spawn(move || weather::failures(checks, weather.counts, weather.frames, seed ^ 9)));
        }
        scope.spawn(|| region.convert(converting, seed ^ 1));
        scope.spawn(|| region.neighbours(neighbours, Lane { index: 0, of: lanes }, seed ^ 2));
        scope.spawn(|| region.probe(probing, all, refused, seed ^ 3));
        scope.spawn(|| balloon.breathe(breathing, seed ^ 4));
        scope.spawn(|| balloon.press(pressing, seed ^ 5));
        for (index, (device, cache)) in (0..).zip(caches) {
            let (region, dma) = (&region, &dma);
            scope.spawn(move || quarantine(&device, dma, checks));
            let seed = seed ^ (16 + index);
            if index % 2 == 0 {
                scope.spawn(move || region.probe(cache, region.span, refused, seed));
            } else {
                scope.spawn(move || region.neighbours(cache, Lane { index: 1 + index / 2, of: lanes }, seed));
            }
        }
        scope.spawn(|| watch(&dma, checks));
        let vcpu = scope.spawn(|| guest.run(checks));
        progress(options, checks, &dma, started);
        machine::stop_guest(&dma);
        checks.stop();
        let mut all = std::iter::once(vcpu.join()).chain(others.into_iter().map(|other| other.join()));
        all.try_for_each(|done| done.unwrap_or_else(|_| Err("a thread of the run panicked".into())))
    })
}

/// A device that is quarantined is a finding: the run has none that may be.
fn quarantine(device: &lockstep::Device, dma: &lockstep::GuestDma, checks: &Checks) {
    while !checks.stopped() {
        if device.is_quarantined() {
            // Where this begins; everything else in it is as unanswered.
            let at = device.unanswered().map_or(addr::Gpa::new(0), |span| addr::Gpa::new(span.start().get()));
            let name = device.name();
            let what = format!("device '{name}' did not answer an invalidation in time and is quarantined; all else went on");
            checks.find_at(dma, Detector::Quarantine, at, "I-7", &what);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Audits the whole, for ever.
fn watch(dma: &lockstep::GuestDma, checks: &Checks) {
    while !checks.stopped() {
        audit(dma, checks);
        // The tables are looked at all the time; the rest of the run wants the processor as well.
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn audit(dma: &lockstep::GuestDma, checks: &Checks) {
    checks.take(Auditor::new(dma.space()).populated().audit(dma.ioas()));
    add(&checks.audits, 1);
}

/// When everything has come to rest: the whole once more, so that a run of any length ends with an audit.
fn last_look(machine: &mut Machine, checks: &Checks) {
    audit(&machine.dma, checks);
    if let Err(error) = machine.probe(checks) {
        eprintln!("lockstep: stage 2 could not be probed: {error}");
    }
}

/// Shows how it goes, until time is up or something was found.
fn progress(options: &RunArgs, checks: &Checks, dma: &lockstep::GuestDma, started: Instant) {
    let total = options.duration();
    let bar = if options.json { ProgressBar::hidden() } else { ProgressBar::new(total.as_millis() as u64) };
    let style = ProgressStyle::with_template("{bar:30} {percent:>3}%  {msg}").unwrap_or_else(|_| ProgressStyle::default_bar());
    bar.set_style(style);
    while !checks.stopped() && started.elapsed() < total {
        std::thread::sleep(Duration::from_millis(20).min(total.saturating_sub(started.elapsed())));
        let counters = dma.counters();
        bar.set_position(started.elapsed().as_millis() as u64);
        bar.set_message(format!(
            "{} pages converted, {} moved, {} audits",
            counters.to_private + counters.to_shared,
            bytes(read(&checks.bytes_moved)),
            read(&checks.audits)
        ));
    }
    bar.finish_and_clear();
}

/// A guest that stopped with an error of its own is a finding.
fn guest_findings(machine: &Machine, checks: &Checks, report: &guest::Report) {
    if report.is_clean() {
        return;
    }
    let at = if report.mismatches > 0 { addr::Gpa::new(report.mismatch_gpa) } else { machine.plan.memory.start() };
    let what = format!(
        "the guest found {} wrong bytes (expected {:#x}, got {:#x}), {} wrong DMA outcomes, {} wrong answers to requests, {} failed requests, {} errors (last {:#x})",
        report.mismatches,
        report.mismatch_expected,
        report.mismatch_got,
        report.dma_wrong,
        report.psc_wrong_answers,
        report.psc_errors,
        report.errors,
        report.last_error
    );
    checks.find_at(&machine.dma, Detector::Guest, at, "I-5", &what);
}
