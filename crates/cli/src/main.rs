//! The `lockstep` command.

mod args;
mod bench;
mod iommufd;
mod run;
mod scale;
mod soak;

use args::{Args, Command};
use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    match Args::parse().command {
        Command::Run(options) => run::main(&options),
        Command::Soak(options) => soak::main(&options),
        Command::Iommufd(options) => iommufd::main(&options),
        Command::Bench(options) => bench::main(&options),
    }
}
