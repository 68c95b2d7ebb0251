//! Chores that need the project's own code or a user's kernel tree, kept out of the command that people install.

mod conformance;
mod coverage;
mod instructions;
mod plots;
mod vm;

use clap::{Parser, Subcommand};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Chores of the project.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", max_term_width = 110)]
struct Args {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Debug, Subcommand)]
enum Chore {
    /// Write docs/coverage.md: every ioctl, its flags and its tests
    Coverage {
        /// Write nothing; fail when the file is not what would be written
        #[arg(long)]
        check: bool,
    },
    /// Run the kernel's own test program of /dev/iommu under `lockstep iommufd`
    Conformance(conformance::Options),
    /// Count the instructions of page-table calls, with callgrind
    Instructions(instructions::Options),
    /// Run a program in an emulated machine, under a kernel that has what this machine's has not
    Vm(vm::Options),
    #[command(hide = true, name = vm::init::ARGUMENT)]
    FirstProcess,
    /// Draw docs/plots/*.svg: what operations cost against size, as `lockstep bench scale` measures it
    Plots(plots::Options),
}

fn main() -> ExitCode {
    let done = match Args::parse().chore {
        Chore::Coverage { check } => coverage::main(check),
        Chore::Conformance(options) => conformance::main(&options),
        Chore::Instructions(options) => instructions::main(&options),
        Chore::Vm(options) => vm::main(&options),
        Chore::FirstProcess => vm::init::main(),
        Chore::Plots(options) => plots::main(&options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(words) => {
            eprintln!("xtask: {words}");
            ExitCode::FAILURE
        }
    }
}

/// The workspace.
fn root() -> PathBuf {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR"));
    crates.ancestors().nth(2).unwrap_or(crates).to_path_buf()
}
