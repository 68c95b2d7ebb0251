//! Paths that clients name: read from their memory, made absolute, and looked up among ours.
//!
//! Nearly all are not ours: the last component, compared with the few that we have, tells. That costs one copy from the client; the rest is
//! looked at only when the path may be ours.

use crate::clients::Thread;
use crate::namespace::{Found, Node, join};
use crate::server::Server;
use crate::sys;
use rustix::io::Errno;

const PATH_MAX: usize = 4096;
/// Read at first: most paths are shorter.
const CHUNK: u64 = 256;
const MOST_LINKS: usize = 40;

/// The path at an address of the client, if it may be ours; `None` too when it has no end, or the kernel will say `EFAULT`.
pub(crate) fn read(server: &Server, tid: i32, at: u64) -> Option<Vec<u8>> {
    let path = read_all(tid, at)?;
    let len = path.iter().rposition(|byte| *byte != b'/').map_or(0, |last| last + 1);
    let name = path[..len].rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    server.namespace.may_end_in(name).then_some(path)
}

fn read_all(tid: i32, at: u64) -> Option<Vec<u8>> {
    let mut path: Vec<u8> = Vec::with_capacity(CHUNK as usize);
    while path.len() < PATH_MAX {
        let from = at.checked_add(path.len() as u64)?;
        // Never across the end of a page: what is behind may not be there, and need not.
        let count = (4096 - from % 4096).min(CHUNK) as usize;
        let start = path.len();
        path.resize(start + count, 0);
        let copied = sys::read_memory(tid, from, &mut path[start..]).ok()?;
        path.truncate(start + copied);
        if let Some(end) = path[start..].iter().position(|byte| *byte == 0) {
            path.truncate(start + end);
            return Some(path);
        }
        if copied == 0 {
            return None;
        }
    }
    None
}

/// The path as the client means it: absolute, without `.`, `..` and `self`.
pub(crate) fn absolute(server: &Server, thread: &Thread, directory: i32, path: &[u8]) -> Option<String> {
    let path = std::str::from_utf8(path).ok().filter(|path| !path.is_empty())?;
    let base = if path.starts_with('/') { "/".to_owned() } else { directory_path(server, thread, directory)? };
    let joined = join(&base, path);
    let (pid, tid) = (thread.process.pid, thread.tid);
    Some(match joined.strip_prefix("/proc/") {
        Some("self") => format!("/proc/{pid}"),
        Some("thread-self") => format!("/proc/{pid}/task/{tid}"),
        Some(rest) => match rest.split_once('/') {
            Some(("self", rest)) => format!("/proc/{pid}/{rest}"),
            Some(("thread-self", rest)) => format!("/proc/{pid}/task/{tid}/{rest}"),
            _ => joined,
        },
        None => joined,
    })
}

/// Where a relative path begins.
fn directory_path(server: &Server, thread: &Thread, directory: i32) -> Option<String> {
    let link = match directory {
        libc::AT_FDCWD => format!("/proc/{}/cwd", thread.tid),
        directory => format!("/proc/{}/fd/{directory}", thread.tid),
    };
    let ours = rustix::fs::stat(&link).ok().and_then(|stat| server.directories.path_of(stat.into()));
    ours.or_else(|| Some(std::fs::read_link(link).ok()?.to_str()?.to_owned()))
}

/// What is at an absolute path, and the path where it really is; `None` when that is not ours. With `follow` the last component is no link.
///
/// # Errors
/// `ELOOP`.
pub(crate) fn find(server: &Server, mut path: String, follow: bool) -> Result<Option<(String, Node)>, Errno> {
    for _ in 0..MOST_LINKS {
        match server.namespace.find(&path) {
            None => return Ok(None),
            Some(Found::Elsewhere(other)) => path = join("/", &other),
            // What arises from our paths only matters where the machine has nothing.
            Some(Found::Inner) if std::fs::metadata(&path).is_ok_and(|there| there.is_dir()) => return Ok(None),
            Some(Found::Inner) => return Ok(Some((path, Node::Directory))),
            Some(Found::Node(Node::Link(target))) if follow => {
                path = join(path.rsplit_once('/').map_or("/", |(parent, _)| parent), &target);
            }
            Some(Found::Node(node)) => return Ok(Some((path, node))),
        }
    }
    Err(Errno::LOOP)
}
