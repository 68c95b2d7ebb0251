//! The kernel's own test program of /dev/iommu, built from a user's kernel tree, run under our front. Neither its source nor the program is part of this
//! project.

use crate::root;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// A kernel tree of version 7.3 or near it, which stays as it is
    #[arg(long, value_name = "TREE", required_unless_present = "program")]
    linux: Option<PathBuf>,
    /// A program that has been built already
    #[arg(long, conflicts_with = "linux")]
    program: Option<PathBuf>,
    /// The `lockstep` command to run it under; built here when it is not given
    #[arg(long)]
    lockstep: Option<PathBuf>,
    /// Passes and skips that must come out, as in 241+5; otherwise only failures count
    #[arg(long, value_name = "PASS+SKIP")]
    expect: Option<String>,
    /// Options of the test program itself: -l lists, -f FIXTURE -v VARIANT -t TEST choose
    #[arg(last = true)]
    own: Vec<String>,
}

pub(crate) fn main(options: &Options) -> Result<(), String> {
    for missing in missing() {
        eprintln!("xtask: {missing}");
    }
    let scratch = Scratch::new()?;
    let program = match (&options.program, &options.linux) {
        (Some(program), _) => program.clone(),
        (None, Some(tree)) => build(tree, &scratch.0)?,
        (None, None) => return Err("give --linux TREE or --program PATH".to_owned()),
    };
    let program = program.canonicalize().map_err(|error| format!("{}: {error}", program.display()))?;
    let lockstep = match &options.lockstep {
        Some(lockstep) => lockstep.clone(),
        None => build_lockstep()?,
    };
    run(&lockstep, &program, options)
}

/// A folder that goes away again.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self, String> {
        let folder = std::env::temp_dir().join(format!("lockstep-conformance-{}", std::process::id()));
        fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        Ok(Self(folder))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What the program wants of the machine that is not there, in words. It runs all the same, with fewer passes.
fn missing() -> Vec<String> {
    let mut list = Vec::new();
    if !rustix::process::geteuid().is_root() {
        list.push("not root: tests of limits and accounting will fail (CAP_IPC_LOCK, CAP_SYS_RESOURCE); run with sudo -E".to_owned());
    }
    let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    let free: u64 = fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    if free < 64 {
        list.push(format!("{free} huge pages of 2 MiB are free and 64 are needed: 24 tests will fail; echo 64 >/proc/sys/vm/nr_hugepages"));
    }
    list
}

/// Builds the test in a folder of its own: headers first, since the test is written against those of its own kernel.
fn build(tree: &Path, scratch: &Path) -> Result<PathBuf, String> {
    let tree = tree.canonicalize().map_err(|error| format!("{}: {error}", tree.display()))?;
    let tests = tree.join("tools/testing/selftests");
    if !tests.join("iommu/iommufd.c").is_file() {
        return Err(format!("{} has no tools/testing/selftests/iommu/iommufd.c; give the top of a kernel tree", tree.display()));
    }
    for tool in ["make", "cc"] {
        if Command::new(tool).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
            return Err(format!("{tool} is not there; install it (Debian: build-essential)"));
        }
    }
    if !compiles("#include <sys/capability.h>\nint main(void) { return 0; }\n", scratch) {
        return Err("the headers of libcap are not there (sys/capability.h); install libcap-dev or libcap-devel".to_owned());
    }
    let output = format!("O={}", scratch.display());
    make(Command::new("make").arg("-s").arg("-C").arg(&tree).arg(&output).arg("headers"))?;
    make(Command::new("make").arg("-s").arg("-C").arg(&tests).arg(&output).args(["TARGETS=iommu", "FORCE_TARGETS=1"]))?;
    Ok(scratch.join("kselftest/iommu/iommufd"))
}

fn make(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|error| format!("make: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    Err(format!("{command:?} failed:\n{words}"))
}

fn compiles(text: &str, scratch: &Path) -> bool {
    let source = scratch.join("probe.c");
    if fs::write(&source, text).is_err() {
        return false;
    }
    let status = Command::new("cc").arg("-fsyntax-only").arg(&source).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

/// The command, as released, with the test devices.
pub(crate) fn build_lockstep() -> Result<PathBuf, String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = Command::new(cargo).current_dir(root()).args(["build", "--release", "-p", "lockstep-cli"]).status();
    if !built.is_ok_and(|status| status.success()) {
        return Err("the lockstep command could not be built".to_owned());
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |folder| root().join(folder));
    Ok(target.join("release/lockstep"))
}

fn run(lockstep: &Path, program: &Path, options: &Options) -> Result<(), String> {
    let mut command = Command::new(lockstep);
    command.args(["iommufd", "--test-devices", "--"]).arg(program).args(&options.own).stdout(Stdio::piped());
    let mut child = command.spawn().map_err(|error| format!("{}: {error}", lockstep.display()))?;
    let mut counts = Counts::default();
    let output = child.stdout.take().ok_or("no output")?;
    for line in BufReader::new(output).lines() {
        let line = line.map_err(|error| error.to_string())?;
        println!("{line}");
        counts.add(&line);
    }
    let status = child.wait().map_err(|error| error.to_string())?;
    println!("{counts}");
    counts.failed.iter().for_each(|name| println!("  failed: {name}"));
    if counts.passed + counts.skipped + counts.failed.len() == 0 && !options.own.is_empty() {
        return if status.success() { Ok(()) } else { Err(format!("the test program ended with {status}")) };
    }
    match &options.expect {
        Some(expected) if *expected != format!("{}+{}", counts.passed, counts.skipped) => Err(format!("expected {expected}")),
        _ if !counts.failed.is_empty() || !status.success() => Err(format!("the test program ended with {status}")),
        _ => Ok(()),
    }
}

/// Results as the kernel's harness prints them: `ok 1 name`, `not ok 2 name`, `ok 3 # SKIP why` or `ok 3 name # SKIP why`.
#[derive(Debug, Default)]
struct Counts {
    passed: usize,
    skipped: usize,
    failed: Vec<String>,
}

impl Counts {
    fn add(&mut self, line: &str) {
        // The harness indents nothing of its own; tests of tests would.
        if let Some(name) = line.strip_prefix("not ok ") {
            self.failed.push(name.to_owned());
        } else if line.starts_with("ok ") {
            if line.contains("# SKIP") { self.skipped += 1 } else { self.passed += 1 }
        }
    }
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "conformance: {} passed, {} skipped, {} failed", self.passed, self.skipped, self.failed.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted_as_the_harness_prints_them() {
        let mut counts = Counts::default();
        for line in [
            "TAP version 13",
            "1..4",
            "# Starting 4 tests from 2 test cases.",
            "#  RUN           iommufd.simple_close ...",
            "ok 1 iommufd.simple_close",
            "not ok 2 iommufd.cmd_fail",
            "ok 3 iommufd_viommu.no_viommu.hw_queue # SKIP Skipping test for variant no_viommu",
            "ok 4 iommufd.cmd_length",
            "# Totals: pass:2 fail:1 xfail:0 xpass:0 skip:1 error:0",
        ] {
            counts.add(line);
        }
        assert_eq!(counts.to_string(), "conformance: 2 passed, 1 skipped, 1 failed");
        assert_eq!(counts.failed, ["2 iommufd.cmd_fail"]);
    }
}
