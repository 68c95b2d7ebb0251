//! `lockstep-model check`: every interleaving of the transaction's model, or the first that a planted fault breaks.

use clap::{Parser, Subcommand};
use lockstep_model::{Fault, Outcome, Scene, check};
use std::process::ExitCode;

/// Checks the model of the lockstep transaction (design D-6).
#[derive(Parser)]
#[command(name = "lockstep-model", version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Searches every state. Exit status 0: no property breaks, or, with `--break`, the planted fault is found.
    Check {
        /// Plant a fault first; `list` shows them, `all` plants each in turn.
        #[arg(long = "break", value_name = "FAULT")]
        plant: Option<String>,
        /// Only this scene: device, devices, hosts, stage-2, ats, trust.
        #[arg(long)]
        scene: Option<String>,
        /// One JSON object a line.
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    let Command::Check { plant, scene, json } = Args::parse().command;
    let faults = match plant.as_deref() {
        None => Vec::new(),
        Some("list") => {
            for fault in Fault::ALL {
                println!("{:<26} {}  [{}]", fault.name(), fault.what(), fault.breaks().name());
            }
            return ExitCode::SUCCESS;
        }
        Some("all") => Fault::ALL.to_vec(),
        Some(name) => match Fault::of(name) {
            Some(fault) => vec![fault],
            None => {
                eprintln!("error: no fault is named '{name}'; `--break list` shows them");
                return ExitCode::from(2);
            }
        },
    };
    let scenes: Vec<Scene> = Scene::ALL.into_iter().filter(|known| scene.as_deref().is_none_or(|name| name == known.name())).collect();
    if scenes.is_empty() {
        eprintln!("error: no such scene; there are device, devices, hosts, stage-2, ats, trust");
        return ExitCode::from(2);
    }
    let good = if plant.is_none() {
        scenes.into_iter().map(|scene| show(check(scene, None), json)).fold(true, |all, outcome| all & outcome.broken.is_empty())
    } else {
        let found = |fault: Fault| show(check(fault.scene(), Some(fault)), json).breaks(fault.breaks());
        faults.into_iter().map(found).fold(true, |all, found| all & found)
    };
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn show(outcome: Outcome, json: bool) -> Outcome {
    if json {
        // Strings, numbers and lists of them: serializing cannot fail.
        println!("{}", serde_json::to_string(&outcome).unwrap_or_default());
        return outcome;
    }
    let Outcome { scene, fault, states, unique_states, depth, seconds, broken } = &outcome;
    let planted = fault.map_or(String::new(), |name| format!(", {name} planted"));
    println!("{}{planted}: {states} states, {unique_states} unique, depth {depth}, {seconds:.2} s", scene.name());
    for found in broken {
        println!("  broken after {} steps: {}", found.steps.len(), found.law);
    }
    if let Some(found) = broken.first() {
        found.steps.iter().for_each(|step| println!("    {step}"));
    }
    if broken.is_empty() {
        println!("  every property holds in every state");
    }
    outcome
}
