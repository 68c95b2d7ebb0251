//! A client that knows nothing of us: a small C program, compiled here, run under `lockstep iommufd`, told over a pipe what to do how often. It takes its
//! own time.

use crate::Error;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

const SOURCE: &str = include_str!("front_client.c");

/// The client, running.
pub(crate) struct Front {
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    folder: PathBuf,
}

/// Whether this program is the `lockstep` command, and there is a C compiler.
pub(crate) fn is_possible() -> bool {
    let own = std::env::current_exe().ok().and_then(|path| path.file_stem().map(|name| name == "lockstep"));
    own == Some(true) && Command::new("cc").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
}

impl Front {
    pub(crate) fn start() -> Result<Self, Error> {
        let folder = std::env::temp_dir().join(format!("lockstep-bench-{}", std::process::id()));
        fs::create_dir_all(&folder)?;
        let (source, program) = (folder.join("client.c"), folder.join("client"));
        fs::write(&source, SOURCE)?;
        let compiled = Command::new("cc").args(["-O2", "-o"]).arg(&program).arg(&source).output()?;
        if !compiled.status.success() {
            return Err(format!("cc: {}", String::from_utf8_lossy(&compiled.stderr)).into());
        }
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["iommufd", "--test-devices", "--"]).arg(&program).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let (orders, answers) = (child.stdin.take(), child.stdout.take().ok_or("no output")?);
        Ok(Self { child, orders, answers: BufReader::new(answers), folder })
    }

    /// Does it `times` times.
    ///
    /// # Panics
    /// When the client cannot, with its words.
    pub(crate) fn run(&mut self, what: &str, times: u64) -> Duration {
        let mut answer = String::new();
        let orders = self.orders.as_mut().map_or(Ok(()), |orders| writeln!(orders, "{what} {times}"));
        let read = orders.and_then(|()| self.answers.read_line(&mut answer));
        match (read, answer.trim().parse()) {
            (Ok(_), Ok(nanoseconds)) => Duration::from_nanos(nanoseconds),
            (read, _) => panic!("the client under `lockstep iommufd` did not answer a time but '{}' ({read:?})", answer.trim()),
        }
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        // The client ends at the end of its input.
        drop(self.orders.take());
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}
