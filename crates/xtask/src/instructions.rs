//! How many instructions an operation takes, counted by callgrind: figures that no other program on the host can disturb.
//!
//! Rows of `lockstep bench` are run for a number of operations and for twice as many; the difference, divided, is one operation. Counting
//! is on inside the measured function alone, which is never inlined, so what prepares and undoes the work does not count.

use clap::Args;
use std::path::Path;
use std::process::Command;

/// Rows whose measured function undoes nothing, with that function, and the operations of the shorter run.
const ROWS: [(&str, &str, u64); 14] = [
    ("map_4k", "map", 1024),
    ("map_16x4k", "map", 512),
    ("map_256x4k", "map", 256),
    ("map_256x4k_sized", "map", 256),
    ("map_2m", "map", 1024),
    ("map_1g", "map", 512),
    ("unmap_4k", "unmap", 1024),
    ("unmap_256x4k", "unmap", 256),
    ("unmap_2m", "unmap", 1024),
    ("unmap_1g", "unmap", 512),
    ("walk_hot_4k", "walk", 4096),
    ("map_4k_typed", "map", 1024),
    ("unmap_4k_typed", "unmap", 1024),
    ("walk_hot_4k_typed", "walk", 4096),
];

#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Formats of the page tables
    #[arg(long, value_delimiter = ',', default_value = "amdv1,vtd-ss-4,x86_64-4,sv48")]
    formats: Vec<String>,
    /// Only rows whose name contains this
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
}

pub(crate) fn main(options: &Options) -> Result<(), String> {
    let valgrind = Command::new("valgrind").arg("--version").output().is_ok_and(|output| output.status.success());
    if !valgrind {
        return Err("valgrind is not installed; it does the counting (Debian: apt-get install valgrind)".into());
    }
    let built = Command::new(env!("CARGO")).args(["build", "--release", "-p", "lockstep-cli"]).current_dir(crate::root()).status();
    if !built.is_ok_and(|status| status.success()) {
        return Err("cargo build --release -p lockstep-cli failed".into());
    }
    let rows: Vec<_> = ROWS.iter().filter(|(name, ..)| name.contains(&options.only)).collect();
    if rows.is_empty() {
        return Err(format!("no counted row's name contains '{}'", options.only));
    }
    println!("{:<22} {}", "instructions per call", options.formats.iter().map(|format| format!("{format:>12}")).collect::<String>());
    for (row, function, times) in rows {
        let mut line = format!("{row:<22} ");
        for format in &options.formats {
            let [once, twice] = [*times, times * 2].map(|times| count(row, format, function, times));
            line += &format!("{:>12.1}", (twice? - once?) as f64 / *times as f64);
        }
        println!("{line}");
    }
    Ok(())
}

/// Instructions in `function` while the row's work is done `times` times.
fn count(row: &str, format: &str, function: &str, times: u64) -> Result<u64, String> {
    let program = crate::root().join("target/release/lockstep");
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(format!("--toggle-collect=*TreeOf*::{function}"))
        .arg(&program)
        .args(["bench", "pt", "--exact", "--only", row, "--format", format, "--times", &times.to_string()])
        .output()
        .map_err(|error| format!("valgrind: {error}"))?;
    let words = String::from_utf8_lossy(&output.stderr);
    let collected = words.lines().find_map(|line| line.split("Collected : ").nth(1)).and_then(|count| count.trim().parse().ok());
    match collected {
        Some(collected) if output.status.success() && collected > 0 => Ok(collected),
        _ => Err(format!("{} {row} {format}: nothing was counted: {words}", Path::new(&program).display())),
    }
}
