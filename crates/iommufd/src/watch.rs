//! Lets people see why: each call decoded with its answer, each refusal in words, failures on request, and a summary at the end.
//!
//! One [`Watcher`] watches everything that goes through [`crate::table::run`], whichever file it is made on, and what a front tells it beyond
//! that. What it has to say goes where its options say, a whole line with one write, so that lines of several threads never mix.
//!
//! ```
//! use lockstep_iommufd::watch::{FailRule, Options};
//! use lockstep_iommufd::{Host, HostConfig, Local, uapi};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let rule: FailRule = "ioas_alloc:2=ENOMEM".parse()?;
//! let watcher = Options { fail: vec![rule], ..Options::default() }.watcher();
//! let host = Host::new(HostConfig { observer: Some(watcher), ..HostConfig::default() })?;
//! let (context, local) = (host.open(), Local::new());
//! let mut arg = uapi::IoasAlloc { size: 12, ..Default::default() };
//! local.ioctl(&*context, uapi::io(0x81), &mut arg)?;
//! assert!(local.ioctl(&*context, uapi::io(0x81), &mut arg).is_err());
//! # Ok(())
//! # }
//! ```

mod errno;
mod fail;
mod show;
mod summary;

pub use errno::errno_name;
pub use fail::{FailRule, RuleError};

use crate::{Host, Observer, Refusal, Seen};
use rustix::io::Errno;
use serde_json::{Value, json};
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;
use summary::Counts;

/// Where lines go.
pub type Output = Box<dyn Write + Send>;

/// What to watch, as command lines ask for it.
#[derive(Default)]
pub struct Options {
    /// A line for each call, and for what the front tells.
    pub trace: bool,
    /// A line for each refusal, with its reason. A trace has them anyway.
    pub explain: bool,
    /// Which calls fail.
    pub fail: Vec<FailRule>,
    /// Counts calls, pages and faults for [`Watcher::finish`].
    pub summary: bool,
    /// JSON, one object a line, in the place of text.
    pub json: bool,
    /// Where to; `None` is stderr.
    pub output: Option<Output>,
}

impl Options {
    /// A file to write to, made anew.
    ///
    /// # Errors
    /// What open answers, with the path.
    pub fn output_file(path: &Path) -> io::Result<Output> {
        let file = File::create(path).map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
        Ok(Box::new(file))
    }

    /// Whether there is anything to watch. Without a watcher, calls are not even timed.
    pub fn is_idle(&self) -> bool {
        !(self.trace || self.explain || self.summary) && self.fail.is_empty()
    }

    /// The first rule whose name is none of these ioctls, in words.
    ///
    /// # Errors
    /// [`RuleError`], with the name that comes nearest.
    pub fn check_names<'a>(&self, names: impl IntoIterator<Item = &'a str> + Clone) -> Result<(), RuleError> {
        self.fail.iter().try_for_each(|rule| rule.check_name(names.clone()))
    }

    /// Begins to watch.
    pub fn watcher(self) -> Arc<Watcher> {
        let Self { trace, explain, fail, summary, json, output } = self;
        let output = Mutex::new(output.unwrap_or_else(|| Box::new(io::stderr())));
        Arc::new(Watcher { trace, explain, fail, json, counts: summary.then(Counts::default), output, host: OnceLock::new() })
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Options");
        out.field("trace", &self.trace).field("explain", &self.explain).field("fail", &self.fail);
        out.field("summary", &self.summary).field("json", &self.json).finish_non_exhaustive()
    }
}

/// Whoever watches the calls of a host. See [`Options`].
pub struct Watcher {
    trace: bool,
    explain: bool,
    fail: Vec<FailRule>,
    json: bool,
    counts: Option<Counts>,
    output: Mutex<Output>,
    host: OnceLock<Weak<Host>>,
}

impl Watcher {
    /// Says whose pinned pages and faults are counted.
    pub fn watch(&self, host: &Arc<Host>) {
        let _ = self.host.set(Arc::downgrade(host));
    }

    /// Prints the summary, if it was asked for.
    pub fn finish(&self) {
        let Some(counts) = &self.counts else { return };
        let host = self.host.get().and_then(Weak::upgrade);
        if self.json {
            self.line(&format!("{}\n", counts.json(host.as_deref())));
        } else {
            self.line(&counts.text(host.as_deref()));
        }
    }

    /// A process made its first call.
    pub fn process_started(&self, pid: i32) {
        self.event(Some(pid), "start", |_| "is here".to_owned(), json!({}));
    }

    /// A process is gone.
    pub fn process_ended(&self, pid: i32) {
        self.event(Some(pid), "end", |_| "is gone".to_owned(), json!({}));
    }

    /// A process got a descriptor: by opening a path, or as the answer of a call.
    pub fn opened(&self, pid: i32, fd: i32, path: Option<&str>, file: &str) {
        let text = |_: &Value| match path {
            Some(path) => format!("open({path:?}) = {fd} ({file})"),
            None => format!("was given descriptor {fd} ({file})"),
        };
        self.event(Some(pid), "open", text, json!({ "fd": fd, "path": path, "file": file }));
    }

    /// The last descriptor of a file is gone.
    pub fn closed(&self, file: &str) {
        self.event(None, "close", |_| format!("the last descriptor of an open {file} is closed"), json!({ "file": file }));
    }

    /// Pages were taken out of a file that devices had mapped.
    pub fn revoked(&self, pid: i32, offset: u64, len: u64) {
        if let Some(counts) = &self.counts {
            counts.revoked(len);
        }
        let text = |_: &Value| format!("took {len:#x} bytes from {offset:#x} on out of a file that is mapped for devices");
        self.event(Some(pid), "revoke", text, json!({ "offset": offset, "length": len }));
    }

    /// Something does not work as it should. Printed whatever is watched.
    pub fn warning(&self, words: &str) {
        if self.json {
            self.line(&format!("{}\n", json!({ "event": "warning", "words": words })));
        } else {
            self.line(&format!("lockstep: {words}\n"));
        }
    }

    fn event(&self, pid: Option<i32>, name: &str, text: impl FnOnce(&Value) -> String, mut fields: Value) {
        if !self.trace {
            return;
        }
        if self.json {
            fields["event"] = name.into();
            fields["pid"] = pid.into();
            self.line(&format!("{fields}\n"));
        } else {
            let text = text(&fields);
            self.line(&format!("{}{text}\n", show::prefix(pid.map(|pid| (pid, pid)))));
        }
    }

    /// One write; whoever reads the other end may be gone, which is no reason to stop.
    fn line(&self, line: &str) {
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = output.write_all(line.as_bytes()).and_then(|()| output.flush());
    }
}

impl Observer for Watcher {
    fn before(&self, call: &Seen<'_>) -> Option<Errno> {
        // Every rule counts every call of its name.
        self.fail.iter().fold(None, |found, rule| rule.hit(call.name).or(found))
    }

    fn after(&self, call: &Seen<'_>, answer: Result<i64, &Refusal>, took: Duration) {
        if let Some(counts) = &self.counts {
            let host = self.host.get().and_then(Weak::upgrade);
            counts.add(call, answer.map_err(|refusal| refusal.errno), took, host.as_deref());
        }
        if self.trace || self.explain && answer.is_err() {
            let line = if self.json { show::json(call, answer, took) } else { show::text(call, answer) };
            self.line(&line);
        }
    }
}

impl fmt::Debug for Watcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watcher")
            .field("trace", &self.trace)
            .field("explain", &self.explain)
            .field("fail", &self.fail)
            .finish_non_exhaustive()
    }
}
