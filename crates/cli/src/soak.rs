//! `lockstep soak`: scene after scene, each a run with everything else that can happen going on beside it, until time is up or something is found.
//! Policy, page-table format, frames and memory of each scene follow from the seed, so a scene that found something can be had again.

use crate::args::{FramesArg, RunArgs, SoakArgs};
use crate::run::{self, Summary, WeatherCounts};
use lockstep::{Borders, Policy};
use pt::FormatKind;
use serde::Serialize;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// A scene lasts this long.
const SCENE: Duration = Duration::from_secs(10);

/// What all scenes did together, for people and programs.
#[derive(Debug, Default, Serialize)]
struct Totals {
    seed: u64,
    seconds: f64,
    scenes: u64,
    conversions: u64,
    batches: u64,
    cuts: u64,
    merges: u64,
    smashes: u64,
    punches: u64,
    bytes_moved: u64,
    dma_checks: u64,
    untrusted_refused: u64,
    guest_requests: u64,
    audits: u64,
    audited_pages: u64,
    transitions: u64,
    slots_added: u64,
    slots_moved: u64,
    full_batches: u64,
    maps: u64,
    unmaps: u64,
    devices: u64,
    injected_failures: u64,
    leaks: u64,
    failing_guests: u64,
    failing_pair_guests: u64,
    differences: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    failed_scene: Option<String>,
}

/// The command. Exit status 0 when every check of every scene held, 1 when something was found, 2 when a scene could not be played.
pub(crate) fn main(options: &SoakArgs) -> ExitCode {
    let started = Instant::now();
    let mut totals = Totals { seed: options.seed, ..Totals::default() };
    let total = Duration::try_from_secs_f64(options.seconds).unwrap_or(SCENE);
    while started.elapsed() < total {
        let scene = scene(options, totals.scenes, total.saturating_sub(started.elapsed()));
        let words = describe(&scene);
        let (summary, weather) = match run::with_weather(&scene) {
            Ok(played) => played,
            Err(error) => {
                eprintln!("lockstep: scene {}, {words}: {error}", totals.scenes);
                return ExitCode::from(2);
            }
        };
        totals.add(&summary, &weather);
        totals.seconds = started.elapsed().as_secs_f64();
        if !options.json {
            println!(
                "{:>7.1} s  scene {}, {words}: {} pages converted, {} differences",
                totals.seconds, totals.scenes, summary.conversions, summary.differences
            );
        }
        if !summary.is_good() {
            totals.failed_scene = Some(words);
            if !options.json {
                summary.print(false);
            }
            break;
        }
    }
    totals.print(options.json);
    if totals.failed_scene.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// What the seed says of one scene.
fn scene(options: &SoakArgs, number: u64, left: Duration) -> RunArgs {
    let mut random = fastrand::Rng::with_seed(options.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number);
    let formats: Vec<FormatKind> =
        FormatKind::ALL.iter().copied().filter(|kind| kind.hitless().is_allowed() && kind.granule() == addr::Lg2::K4).collect();
    RunArgs {
        memory: [64, 128, 256][random.usize(..3)] << 20,
        // Shorter than this proves nothing.
        seconds: SCENE.min(left.max(Duration::from_secs(2))).as_secs_f64(),
        seed: random.u64(..),
        policy: if random.u8(..3) == 0 { Policy::SharedOnly } else { Policy::Mirror },
        format: formats[random.usize(..formats.len())],
        // In turns: leaves are cut and merged with the first, and RMP groups shared by strangers with the second.
        frames: if number.is_multiple_of(2) { FramesArg::Contiguous } else { FramesArg::Scattered },
        vm: options.vm,
        // The other reading keeps leaves over private pages, which the second address space must not.
        borders: Borders::Table,
        strict: random.u8(..4) == 0,
        ats: (number % 3) as u32,
        // On a busy host a device's thread may wait long for a processor.
        ats_timeout: 20_000,
        json: true,
        plant: None,
    }
}

fn describe(scene: &RunArgs) -> String {
    format!("{} MiB, policy {}, {}, {:?} frames, seed {}", scene.memory >> 20, scene.policy, scene.format, scene.frames, scene.seed)
}

impl Totals {
    fn add(&mut self, summary: &Summary, weather: &WeatherCounts) {
        use crate::run::read;
        self.scenes += 1;
        self.conversions += summary.conversions;
        self.batches += summary.batches;
        self.cuts += summary.cuts;
        self.merges += summary.merges;
        self.smashes += summary.smashes;
        self.punches += summary.punches;
        self.bytes_moved += summary.bytes_moved;
        self.dma_checks += summary.dma_checks;
        self.untrusted_refused += summary.untrusted_faults;
        self.guest_requests += summary.guest_requests;
        self.audits += summary.audits;
        self.audited_pages += summary.audited_pages;
        self.transitions += summary.transitions;
        self.differences += summary.differences;
        self.slots_added += read(&weather.slots_added);
        self.slots_moved += read(&weather.slots_moved);
        self.full_batches += read(&weather.batches);
        self.maps += read(&weather.maps);
        self.unmaps += read(&weather.unmaps);
        self.devices += read(&weather.devices);
        self.injected_failures += read(&weather.failures);
        self.leaks += read(&weather.leaks);
        self.failing_guests += read(&weather.guests);
        self.failing_pair_guests += read(&weather.pair_guests);
    }

    fn print(&self, json: bool) {
        if json {
            match serde_json::to_string_pretty(self) {
                Ok(text) => println!("{text}"),
                Err(error) => eprintln!("lockstep: the totals could not be written: {error}"),
            }
            return;
        }
        println!("soaked {:.1} s in {} scenes, seed {}", self.seconds, self.scenes, self.seed);
        println!(
            "  conversions     {} pages in {} batches, {} of them of 253 changes; {} entries smashed",
            self.conversions, self.batches, self.full_batches, self.smashes
        );
        println!("  leaves          {} cut, {} merged", self.cuts, self.merges);
        println!(
            "  DMA             {} moved, {} checks of what devices got, {} refused to untrusted devices",
            run::bytes(self.bytes_moved),
            self.dma_checks,
            self.untrusted_refused
        );
        println!("  guest           {} page state requests; memory given back {} times under DMA", self.guest_requests, self.punches);
        println!("  memslots        {} added, {} moved", self.slots_added, self.slots_moved);
        println!("  second space    {} areas mapped, {} unmapped", self.maps, self.unmaps);
        println!("  devices         {} plugged in and pulled out", self.devices);
        println!(
            "  failures        {} steps made to fail, each undone or finished; {} pages leaked and counted; {} guests of one file, {} of a pair",
            self.injected_failures, self.leaks, self.failing_guests, self.failing_pair_guests
        );
        println!("  audits          {}, {} pages compared, {} transitions watched", self.audits, self.audited_pages, self.transitions);
        println!("  differences     {}", self.differences);
        match &self.failed_scene {
            None => println!("every check held"),
            Some(scene) => println!("NOT every check held: {scene}"),
        }
    }
}
