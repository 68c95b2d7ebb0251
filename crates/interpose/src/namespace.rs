//! Which paths are ours, and what a client finds there. A path that is not here is the kernel's business.
//!
//! Paths are absolute and exact, as the client sees them; a component `*` stands for any one component, so that files of a process can be
//! named ("/proc/*/task/*/fail-nth"). Directories arise from the paths in them.

use crate::RemoteCaller;
use iommufd::{Answer, File, SpaceId};
use std::collections::{BTreeMap, HashSet};
use std::ffi::OsString;
use std::fmt;
use std::sync::Arc;

/// An open that a client asks for.
#[derive(Clone, Debug)]
pub struct Opening {
    /// The path, absolute, without `.`, `..` and `self`.
    pub path: String,
    /// O_ bits.
    pub flags: i32,
}

impl Opening {
    /// Whether the client may write through the descriptor.
    pub fn writes(&self) -> bool {
        matches!(self.flags & libc::O_ACCMODE, libc::O_WRONLY | libc::O_RDWR)
    }
}

/// Makes a file when a client opens its path.
pub type OpenFile = dyn Fn(&RemoteCaller, &Opening) -> Answer<Arc<dyn File>> + Send + Sync;
/// Makes the text of a file when a client opens its path.
pub type OpenText = dyn Fn(&RemoteCaller, &Opening) -> Answer<String> + Send + Sync;
/// Finds the knob that a path names when a client opens it.
pub type OpenKnob = dyn Fn(&RemoteCaller, &Opening) -> Answer<Arc<dyn Knob>> + Send + Sync;
/// Changes what the client reads of a real file.
pub type Rewrite = dyn Fn(&Rewriting<'_>, String) -> String + Send + Sync;

/// What a path leads to.
#[derive(Clone)]
pub enum Node {
    /// A file of ours, new with each open.
    File(Arc<OpenFile>),
    /// A file that can only be read.
    Text(Arc<OpenText>),
    /// A symbolic link.
    Link(String),
    /// A small file of text that is read and written.
    Knob(Arc<OpenKnob>),
    /// A file that exists, with other content.
    Rewrite(Arc<Rewrite>),
    /// A directory, together with what really is in it. Others arise by themselves where the machine has none.
    Directory,
}

impl Node {
    /// A file of ours.
    pub fn file(open: impl Fn(&RemoteCaller, &Opening) -> Answer<Arc<dyn File>> + Send + Sync + 'static) -> Self {
        Self::File(Arc::new(open))
    }

    /// A file whose text never changes.
    pub fn text(text: impl Into<String>) -> Self {
        let text = text.into();
        Self::Text(Arc::new(move |_, _| Ok(text.clone())))
    }

    /// A symbolic link.
    pub fn link(target: impl Into<String>) -> Self {
        Self::Link(target.into())
    }

    /// A knob that is the same for everybody.
    pub fn knob(knob: Arc<dyn Knob>) -> Self {
        Self::Knob(Arc::new(move |_, _| Ok(Arc::clone(&knob))))
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::File(_) => "File",
            Self::Text(_) => "Text",
            Self::Link(target) => return write!(f, "Link({target})"),
            Self::Knob(_) => "Knob",
            Self::Rewrite(_) => "Rewrite",
            Self::Directory => "Directory",
        })
    }
}

/// A small file of text. Each write is one value, whatever the position; a read gives the text of that moment.
pub trait Knob: Send + Sync {
    /// Its text.
    ///
    /// # Errors
    /// What the client's read shall answer.
    fn read(&self, caller: &RemoteCaller) -> Answer<String>;

    /// Takes what was written.
    ///
    /// # Errors
    /// What the client's write shall answer; `EACCES` for one that is only read.
    fn write(&self, caller: &RemoteCaller, text: &[u8]) -> Answer;
}

/// A read of a real file whose content is changed on the way.
#[derive(Debug)]
pub struct Rewriting<'a> {
    /// Who opens it.
    pub caller: &'a RemoteCaller,
    /// The path, as in [`Opening::path`].
    pub path: &'a str,
    /// Of a file under `/proc/PID`: that process's address space, when it is a client.
    pub space: Option<SpaceId>,
}

/// What a process has pinned and locked with us, in addition to what the kernel knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Charged {
    /// For `VmPin`.
    pub pinned_kib: u64,
    /// For `VmLck`.
    pub locked_kib: u64,
}

/// All paths of ours.
#[derive(Clone, Debug, Default)]
pub struct Namespace {
    exact: BTreeMap<String, Node>,
    patterns: Vec<(Vec<String>, Node)>,
    /// Last components of everything that can be opened: what does not end in one of these is not ours.
    names: HashSet<Vec<u8>>,
    /// Numbers of devices, by path.
    devices: BTreeMap<String, (u32, u32)>,
}

/// What a path is to us.
#[derive(Clone, Debug)]
pub(crate) enum Found {
    Node(Node),
    /// Leads through a link: go on with this path.
    Elsewhere(String),
    /// Only a part of paths of ours.
    Inner,
}

impl Namespace {
    /// With nothing in it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `node` at `path`, in place of what was there.
    pub fn add(&mut self, path: &str, node: Node) -> &mut Self {
        let parts: Vec<String> = path.split('/').filter(|part| !part.is_empty()).map(String::from).collect();
        for part in &parts {
            self.names.insert(part.clone().into_bytes());
        }
        if parts.iter().any(|part| part == "*") {
            self.patterns.push((parts, node));
        } else {
            self.exact.insert(format!("/{}", parts.join("/")), node);
        }
        self
    }

    /// Has the file at `path` show as a character device with these numbers, major and minor, where clients' looks are served
    /// ([`crate::Options::serves_looks`]).
    pub fn number(&mut self, path: &str, numbers: (u32, u32)) -> &mut Self {
        self.devices.insert(path.to_owned(), numbers);
        self
    }

    pub(crate) fn device_of(&self, path: &str) -> (u32, u32) {
        self.devices.get(path).copied().unwrap_or_default()
    }

    /// Has `/proc/PID/status` show what `charged` answers in addition, in the lines `VmPin` and `VmLck`.
    pub fn add_status(&mut self, charged: impl Fn(SpaceId) -> Charged + Send + Sync + 'static) -> &mut Self {
        let rewrite: Arc<Rewrite> = Arc::new(move |rewriting, content| {
            let charged = rewriting.space.map(&charged).unwrap_or_default();
            with_charged(&content, charged)
        });
        self.add("/proc/*/status", Node::Rewrite(Arc::clone(&rewrite)));
        self.add("/proc/*/task/*/status", Node::Rewrite(rewrite))
    }

    /// Whether a path that ends in `name` may be ours: asked for each open of a client, so it must be cheap.
    pub(crate) fn may_end_in(&self, name: &[u8]) -> bool {
        self.names.contains(name) || matches!(name, b"" | b"." | b"..")
    }

    /// What is at an absolute path without `.` and `..`.
    pub(crate) fn find(&self, path: &str) -> Option<Found> {
        if let Some(node) = self.exact.get(path) {
            return Some(Found::Node(node.clone()));
        }
        // A link on the way.
        for (at, _) in path.match_indices('/').skip(1) {
            if let Some(Node::Link(target)) = self.exact.get(&path[..at]) {
                return Some(Found::Elsewhere(format!("{}{}", join(parent(&path[..at]), target), &path[at..])));
            }
        }
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        let matches = |pattern: &[String]| pattern.iter().zip(&parts).all(|(pattern, part)| pattern == "*" || pattern == part);
        if let Some((_, node)) = self.patterns.iter().find(|(pattern, _)| pattern.len() == parts.len() && matches(pattern)) {
            return Some(Found::Node(node.clone()));
        }
        let below = format!("{}/", path.trim_end_matches('/'));
        let inner = self.exact.range(below.clone()..).next().is_some_and(|(other, _)| other.starts_with(&below));
        inner.then_some(Found::Inner)
    }

    /// What directly lies in a directory: name, and the node when the path ends there.
    pub(crate) fn children(&self, path: &str) -> Vec<(String, Option<Node>)> {
        let below = format!("{}/", path.trim_end_matches('/'));
        let mut found: BTreeMap<String, Option<Node>> = BTreeMap::new();
        for (other, node) in self.exact.range(below.clone()..).take_while(|(other, _)| other.starts_with(&below)) {
            let rest = &other[below.len()..];
            match rest.split_once('/') {
                None => _ = found.insert(rest.to_owned(), Some(node.clone())),
                Some((name, _)) => _ = found.entry(name.to_owned()).or_default(),
            }
        }
        found.into_iter().collect()
    }
}

fn parent(path: &str) -> &str {
    path.rfind('/').map_or("/", |at| if at == 0 { "/" } else { &path[..at] })
}

/// `path` seen from the directory `base`, without `.` and `..`.
pub(crate) fn join(base: &str, path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    let from = if path.starts_with('/') { "" } else { base };
    for part in from.split('/').chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." => _ = parts.pop(),
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

/// A status text with more in the lines of pinned and locked memory.
fn with_charged(content: &str, charged: Charged) -> String {
    let mut changed = String::with_capacity(content.len() + 16);
    for line in content.split_inclusive('\n') {
        let more = match line.split_once(':') {
            Some(("VmPin", _)) => charged.pinned_kib,
            Some(("VmLck", _)) => charged.locked_kib,
            _ => 0,
        };
        let now = line.split_ascii_whitespace().nth(1).and_then(|number| number.parse::<u64>().ok());
        match (more, now, line.split_once(':')) {
            (1.., Some(now), Some((name, _))) => changed += &format!("{name}:\t{:8} kB\n", now.saturating_add(more)),
            _ => changed += line,
        }
    }
    changed
}

/// A program to run.
#[derive(Clone, Debug)]
pub struct Program {
    /// Looked up in `PATH` when it has no slash.
    pub name: OsString,
    /// Without the name.
    pub arguments: Vec<OsString>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_put_in_order() {
        assert_eq!(join("/a/b", "../c/./d//e"), "/a/c/d/e");
        assert_eq!(join("/a", "/x/../../y"), "/y");
        assert_eq!(join("/", ".."), "/");
    }

    #[test]
    fn finds_nodes_links_patterns_and_directories() {
        let mut space = Namespace::new();
        space.add("/dev/vfio/devices/vfio0", Node::text("x")).add("/sys/class/d0", Node::link("../devices/real"));
        space.add("/proc/*/task/*/fail-nth", Node::text("0\n"));
        assert!(matches!(space.find("/dev/vfio/devices/vfio0"), Some(Found::Node(Node::Text(_)))));
        assert!(matches!(space.find("/dev/vfio/devices"), Some(Found::Inner)) && matches!(space.find("/dev"), Some(Found::Inner)));
        assert!(space.find("/dev/vfio/devices/vfio1").is_none() && space.find("/dev/vf").is_none());
        assert!(matches!(space.find("/sys/class/d0/name"), Some(Found::Elsewhere(path)) if path == "/sys/devices/real/name"));
        assert!(matches!(space.find("/proc/12/task/13/fail-nth"), Some(Found::Node(_))) && space.find("/proc/12/fail-nth").is_none());
        assert!(space.may_end_in(b"fail-nth") && space.may_end_in(b"devices") && !space.may_end_in(b"libc.so.6"));
        let names: Vec<String> = space.children("/dev").into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["vfio"]);
    }

    #[test]
    fn status_lines_grow() {
        let before = "Name:\tx\nVmLck:\t       4 kB\nVmPin:\t       0 kB\nVmHWM:\t       8 kB\n";
        let after = with_charged(before, Charged { pinned_kib: 128, locked_kib: 12 });
        assert_eq!(after, "Name:\tx\nVmLck:\t      16 kB\nVmPin:\t     128 kB\nVmHWM:\t       8 kB\n");
        assert_eq!(with_charged(before, Charged::default()), before);
    }
}
