//! A command in an emulated machine, under a kernel of the user's: for tests that need what this machine's kernel does not have, KVM's memory
//! attributes for example. QEMU emulates the processor, virtualization included, so neither root nor /dev/kvm is needed.
//!
//! The machine's whole file system is an image in memory: this program as its first process, the command, and the shared objects that
//! the two name. It has two serial ports, the console and one for the exit status, so that nothing the command prints can look like one.

mod image;
pub(crate) mod init;

use crate::root;
use clap::Args;
use image::Image;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    /// The kernel to boot, monolithic, as QEMU takes it [default: ../shared/vm/bzImage beside the project]
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,
    /// Build this integration test and run it; the command is then its arguments
    #[arg(long, value_name = "NAME")]
    test: Option<String>,
    /// Whose test
    #[arg(long, value_name = "NAME", default_value = "lockstep-iommu")]
    package: String,
    /// The emulator
    #[arg(long, value_name = "PATH", default_value = "qemu-system-x86_64")]
    qemu: PathBuf,
    /// Memory of the machine
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    memory: u32,
    /// Processors of the machine
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// How long it may take
    #[arg(long, value_name = "SECONDS", default_value_t = 240)]
    limit: u64,
    /// A variable of the command's environment
    #[arg(long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// More for the kernel's command line
    #[arg(long, value_name = "WORDS", default_value = "quiet")]
    append: String,
    /// A program of this machine, which is packed, and its arguments
    #[arg(last = true, required_unless_present = "test")]
    command: Vec<String>,
}

/// Where the command lies in the machine, and what to run.
const COMMAND_FILE: &str = "/etc/command";
const ENVIRONMENT_FILE: &str = "/etc/environment";
/// In the environment of the command: it runs where everything that it can ask for is there, and has to fail where it would otherwise skip.
const INSIDE: &str = "LOCKSTEP_VM=1";

pub(crate) fn main(options: &Options) -> Result<(), String> {
    let kernel = kernel(options)?;
    let version = Command::new(&options.qemu).arg("--version").output();
    if !version.is_ok_and(|output| output.status.success()) {
        return Err(format!("{} is not there; it emulates the machine (Debian: apt-get install qemu-system-x86)", options.qemu.display()));
    }
    let mut command = options.command.clone();
    if let Some(test) = &options.test {
        command.insert(0, build_test(&options.package, test)?);
    }
    let scratch = Scratch::new()?;
    let initrd = scratch.0.join("initrd");
    pack(&command, &options.env)?.write(&initrd).map_err(|error| format!("{}: {error}", initrd.display()))?;
    let began = Instant::now();
    let status = run(options, &kernel, &initrd, &scratch.0.join("status"))?;
    eprintln!("xtask: exit status {status} after {:.1} s in the machine", began.elapsed().as_secs_f64());
    if status == 0 { Ok(()) } else { Err(format!("{} ended with {status} in the machine", command[0])) }
}

fn kernel(options: &Options) -> Result<PathBuf, String> {
    let beside = || root().join("../shared/vm/bzImage");
    let kernel = options.kernel.clone().unwrap_or_else(beside);
    match kernel.canonicalize() {
        Ok(kernel) => Ok(kernel),
        Err(error) => Err(format!(
            "no kernel to boot: {}: {error}; give one with --kernel (KVM, guest_memfd and SW_PROTECTED VMs built in)",
            kernel.display()
        )),
    }
}

/// Builds an integration test and answers where it is.
fn build_test(package: &str, test: &str) -> Result<String, String> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(root()).args(["test", "--no-run", "--message-format=json", "-p", package, "--test", test]);
    let output = cargo.stderr(Stdio::inherit()).output().map_err(|error| format!("cargo: {error}"))?;
    if !output.status.success() {
        return Err(format!("the test {test} of {package} could not be built"));
    }
    let messages = serde_json::Deserializer::from_slice(&output.stdout).into_iter::<serde_json::Value>();
    let mut artifacts = messages.map_while(Result::ok).filter(|message| message["target"]["name"] == test);
    let program = artifacts.find_map(|artifact| artifact["executable"].as_str().map(str::to_owned));
    program.ok_or_else(|| format!("cargo built no program for the test {test} of {package}"))
}

/// This program as /init, the command, and what both need.
fn pack(command: &[String], env: &[String]) -> Result<Image, String> {
    let mut image = Image::default();
    let own = std::env::current_exe().map_err(|error| format!("this program's own file: {error}"))?;
    let program = find(&command[0])?;
    let name = program.file_name().map_or_else(|| "program".into(), |name| name.to_string_lossy().into_owned());
    let inside = format!("/bin/{name}");
    image.program(&own, "/init")?;
    image.program(&program, &inside)?;
    let words: Vec<&str> = std::iter::once(inside.as_str()).chain(command[1..].iter().map(String::as_str)).collect();
    image.file(COMMAND_FILE, 0o644, words.join("\0").into_bytes());
    let variables: Vec<&str> = env.iter().map(String::as_str).chain([INSIDE, "RUST_BACKTRACE=1", "PATH=/bin", "TMPDIR=/tmp"]).collect();
    image.file(ENVIRONMENT_FILE, 0o644, variables.join("\0").into_bytes());
    image.console();
    init::MOUNTS.iter().for_each(|(_, folder)| image.folder(folder));
    Ok(image)
}

fn find(program: &str) -> Result<PathBuf, String> {
    let path = Path::new(program);
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let found = if path.components().count() > 1 {
        Some(path.to_path_buf())
    } else {
        std::env::split_paths(&folders).map(|folder| folder.join(program)).find(|candidate| candidate.is_file())
    };
    let found = found.ok_or_else(|| format!("{program} is not in PATH"))?;
    found.canonicalize().map_err(|error| format!("{program}: {error}"))
}

/// Boots, shows the console, and answers the status of the command.
fn run(options: &Options, kernel: &Path, initrd: &Path, status: &Path) -> Result<i32, String> {
    let mut qemu = Command::new(&options.qemu);
    qemu.args([
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-machine",
        "q35",
        "-accel",
        "tcg,thread=multi",
        "-cpu",
        "max",
    ]);
    qemu.arg("-m").arg(options.memory.to_string()).arg("-smp").arg(options.cpus.to_string());
    qemu.args(["-serial", "stdio", "-serial"]).arg(format!("file:{}", status.display()));
    qemu.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
    // What stands behind the two dashes are the first process's arguments.
    qemu.arg("-append").arg(format!("console=ttyS0 panic=-1 {} -- {}", options.append, init::ARGUMENT));
    let mut machine = Machine(qemu.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().map_err(|error| format!("QEMU: {error}"))?);
    let console = machine.0.stdout.take().ok_or("no console")?;
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        let mut console = BufReader::new(console);
        let mut line = Vec::new();
        while console.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) && sender.send(std::mem::take(&mut line)).is_ok() {}
    });
    let until = Instant::now() + Duration::from_secs(options.limit);
    loop {
        match lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(line) => println!("{}", String::from_utf8_lossy(&line).trim_end()),
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => return Err(format!("the machine took longer than {} s; --limit allows more", options.limit)),
        }
    }
    let ended = machine.0.wait().map_err(|error| format!("QEMU: {error}"))?;
    let said = fs::read_to_string(status).unwrap_or_default();
    let said = said.trim().parse();
    said.map_err(|_| format!("the machine ended without an exit status (QEMU {ended}): the kernel stopped, or has no serial ports"))
}

/// Stops when it is dropped.
struct Machine(std::process::Child);

impl Drop for Machine {
    fn drop(&mut self) {
        // After an orderly end there is nothing to stop.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A folder that goes away again.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self, String> {
        let folder = std::env::temp_dir().join(format!("lockstep-vm-{}", std::process::id()));
        fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        Ok(Self(folder))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
