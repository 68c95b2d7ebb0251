//! The first process of the emulated machine: mounts what programs expect, runs the one command, says its exit status on the second serial
//! port, and turns the machine off.

use super::{COMMAND_FILE, ENVIRONMENT_FILE};
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot};
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

/// The chore of the first process, in which the kernel starts this program.
pub(crate) const ARGUMENT: &str = "first-process";
/// File systems, and where they belong.
pub(crate) const MOUNTS: [(&str, &str); 5] =
    [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp"), ("tmpfs", "/dev/shm")];
const STATUS_PORT: &str = "/dev/ttyS1";
/// As shells have it: the command could not be started.
const NOT_STARTED: i32 = 127;

/// # Errors
/// Only where it is not the first process of a machine of its own.
pub(crate) fn main() -> Result<(), String> {
    if std::process::id() != 1 {
        return Err("this is the first process of an emulated machine; cargo xtask vm starts it".to_owned());
    }
    for (kind, folder) in MOUNTS {
        let made = fs::create_dir_all(folder).map_err(|error| error.to_string());
        if let Err(error) = made.and_then(|()| mount(kind, folder, kind, MountFlags::empty(), None).map_err(|error| error.to_string())) {
            eprintln!("xtask: {kind} is not mounted on {folder}: {error}");
        }
    }
    let status = run().unwrap_or_else(|words| {
        eprintln!("xtask: {words}");
        NOT_STARTED
    });
    if let Err(error) = fs::write(STATUS_PORT, format!("{status}\n")) {
        eprintln!("xtask: {STATUS_PORT}: {error}");
    }
    reboot(RebootCommand::PowerOff).map_err(|error| format!("the machine is not turned off: {error}"))
}

fn run() -> Result<i32, String> {
    let read = |path: &str| fs::read_to_string(path).map_err(|error| format!("{path}: {error}"));
    let (words, environment) = (read(COMMAND_FILE)?, read(ENVIRONMENT_FILE)?);
    let mut words = words.split('\0');
    let program = words.next().unwrap_or_default();
    let variables = environment.split('\0').filter_map(|variable| variable.split_once('='));
    let status = Command::new(program).args(words).env_clear().envs(variables).stdin(Stdio::null()).status();
    let status = status.map_err(|error| format!("{program}: {error}"))?;
    Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
}
