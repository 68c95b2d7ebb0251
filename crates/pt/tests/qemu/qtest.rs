//! A QEMU without a guest, spoken to by its qtest protocol: one command a line, one answer a line. The test is the CPU; the machine's own
//! sleeps from its first instruction on.
//!
//! Distributions leave out the accelerator named qtest, which lets a test step the clock. So the machine is a plain emulated one, told
//! (`-icount sleep=off`) that time jumps to the next timer as soon as nobody computes: a device that takes 100 ms is done at once.
//!
//! Commands that ask nothing are only queued, and go out together with the next that does; a device's transfer of several registers is
//! then one exchange.

use std::fmt;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread::JoinHandle;

/// More than this is not kept back, so that neither side's pipe fills up while the other waits.
const QUEUED: usize = 256;

pub(crate) struct Qtest {
    child: Child,
    input: ChildStdin,
    answers: BufReader<ChildStdout>,
    complaints: Option<JoinHandle<String>>,
    queue: Vec<String>,
}

impl Qtest {
    /// Starts `program` with what every machine here has, and `args`.
    pub(crate) fn start(program: &str, args: &[String]) -> Self {
        let mut command = Command::new(program);
        command.args(["-accel", "tcg", "-icount", "shift=0,sleep=off", "-nodefaults", "-display", "none"]);
        command.args(["-qtest", "stdio", "-qtest-log", "none"]).args(args);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let (Some(input), Some(output), Some(mut errors)) = (child.stdin.take(), child.stdout.take(), child.stderr.take()) else {
            panic!("{command:?} has no pipes");
        };
        let complaints = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = errors.read_to_string(&mut text);
            text
        });
        Self { child, input, answers: BufReader::new(output), complaints: Some(complaints), queue: Vec::new() }
    }

    fn queue(&mut self, line: fmt::Arguments<'_>) {
        self.queue.push(line.to_string());
        if self.queue.len() == QUEUED {
            self.settle();
        }
    }

    fn ask(&mut self, line: fmt::Arguments<'_>) -> String {
        self.queue.push(line.to_string());
        self.settle()
    }

    /// Sends what is queued, and waits for the answers; the last one is the result.
    fn settle(&mut self) -> String {
        let queue = std::mem::take(&mut self.queue);
        let mut text = queue.join("\n");
        text.push('\n');
        if let Err(error) = self.input.write_all(text.as_bytes()).and_then(|()| self.input.flush()) {
            self.lost(&format!("{error}"));
        }
        let mut last = String::new();
        for line in &queue {
            last.clear();
            match self.answers.read_line(&mut last) {
                Ok(0) => self.lost(&format!("after '{line}'")),
                Ok(_) => assert!(last.starts_with("OK"), "QEMU answers '{line}' with '{}'", last.trim_end()),
                Err(error) => self.lost(&format!("{error} after '{line}'")),
            }
        }
        last
    }

    fn lost(&mut self, how: &str) -> ! {
        let _ = self.child.kill();
        let said = self.complaints.take().and_then(|complaints| complaints.join().ok()).unwrap_or_default();
        panic!("QEMU is gone ({how}); it said: {said}");
    }

    /// Writes a port of a PC.
    pub(crate) fn out32(&mut self, port: u16, value: u32) {
        self.queue(format_args!("outl {port:#x} {value:#x}"));
    }

    pub(crate) fn write32(&mut self, at: u64, value: u32) {
        self.queue(format_args!("writel {at:#x} {value:#x}"));
    }

    pub(crate) fn write64(&mut self, at: u64, value: u64) {
        self.queue(format_args!("writeq {at:#x} {value:#x}"));
    }

    pub(crate) fn read32(&mut self, at: u64) -> u32 {
        let answer = self.ask(format_args!("readl {at:#x}"));
        number(&answer) as u32
    }

    pub(crate) fn read64(&mut self, at: u64) -> u64 {
        let answer = self.ask(format_args!("readq {at:#x}"));
        number(&answer)
    }

    /// Writes RAM.
    pub(crate) fn write(&mut self, at: u64, bytes: &[u8]) {
        let hex = bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        self.queue(format_args!("write {at:#x} {:#x} 0x{hex}", bytes.len()));
    }

    /// Reads RAM.
    pub(crate) fn read(&mut self, at: u64, len: usize) -> Vec<u8> {
        let answer = self.ask(format_args!("read {at:#x} {len:#x}"));
        let hex = value(&answer).trim_start_matches("0x").as_bytes();
        let digit = |at: usize| (hex[at] as char).to_digit(16).unwrap_or_else(|| panic!("QEMU answers '{answer}' to a read")) as u8;
        assert_eq!(hex.len(), 2 * len, "QEMU answers '{answer}' to a read of {len} bytes");
        (0..len).map(|byte| digit(2 * byte) << 4 | digit(2 * byte + 1)).collect()
    }

    /// Writes words of RAM; every machine here is a little-endian one.
    pub(crate) fn write_words(&mut self, at: u64, words: &[u64]) {
        self.write(at, &words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>());
    }
}

impl Drop for Qtest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn value(answer: &str) -> &str {
    answer.trim_end().trim_start_matches("OK").trim_start()
}

fn number(answer: &str) -> u64 {
    let hex = value(answer).trim_start_matches("0x");
    u64::from_str_radix(hex, 16).unwrap_or_else(|error| panic!("QEMU answers '{answer}': {error}"))
}

/// The first line of `program --version`, when the program is there.
pub(crate) fn version(program: &str) -> Option<String> {
    let output = Command::new(program).arg("--version").output().ok().filter(|output| output.status.success())?;
    String::from_utf8_lossy(&output.stdout).lines().next().map(str::to_owned)
}

/// Whether `program` has a device with that property; without a property, whether it has the device.
pub(crate) fn has(program: &str, device: &str, property: Option<&str>) -> bool {
    let Ok(output) = Command::new(program).args(["-device", &format!("{device},help")]).output() else { return false };
    let help = String::from_utf8_lossy(&output.stdout);
    let line = property.map_or_else(|| format!("{device} options"), |property| format!("{property}="));
    help.lines().any(|own| own.trim_start().starts_with(&line))
}
