//! stat, access and readlink on paths of ours, and fstat on descriptors of ours: for clients that look before they open. Held up only when
//! [`crate::Options::serves_looks`] asks for it.

use crate::RemoteCaller;
use crate::calls::Outcome;
use crate::files::What;
use crate::filter::LOOKS;
use crate::namespace::Node;
use crate::server::Server;
use crate::sys::Notification;
use crate::{Opening, paths};
use iommufd::{Answer, Caller};
use rustix::io::Errno;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

/// Whether a call is one of these.
pub(crate) fn is_look(number: i64) -> bool {
    LOOKS.contains(&number)
}

/// A look, taken apart.
struct Look {
    directory: i32,
    /// Address of the path.
    path: u64,
    follow: bool,
    wanted: Wanted,
}

#[derive(Clone, Copy)]
enum Wanted {
    /// To this address, in the old form or that of statx.
    Stat {
        at: u64,
        extended: bool,
    },
    Access {
        mode: u32,
    },
    Link {
        at: u64,
        len: u64,
    },
}

/// Serves one of these calls.
pub(crate) fn handle(server: &Arc<Server>, call: &Notification) -> Outcome {
    let args = call.args;
    let flags = match call.number {
        libc::SYS_newfstatat => args[3],
        libc::SYS_statx => args[2],
        libc::SYS_fstat => libc::AT_EMPTY_PATH as u64,
        _ => 0,
    };
    if flags & libc::AT_EMPTY_PATH as u64 != 0 {
        return descriptor(server, call);
    }
    let look = take_apart(call, flags);
    let Some(path) = paths::read(server, call.tid, look.path) else { return Outcome::GoOn };
    let thread = match server.thread(call.id, call.tid) {
        Ok(thread) => thread,
        Err(errno) => return errno.into(),
    };
    let caller = RemoteCaller::new(server, thread, Some(call.id), None);
    let Some(path) = paths::absolute(server, caller.thread(), look.directory, &path) else { return Outcome::GoOn };
    let (path, node) = match paths::find(server, path, look.follow) {
        Ok(Some(found)) => found,
        Ok(None) => return Outcome::GoOn,
        Err(errno) => return Outcome::Refuse(errno),
    };
    // These are really there.
    let is_real = matches!(node, Node::Rewrite(_)) || matches!(node, Node::Directory) && std::fs::metadata(&path).is_ok();
    if is_real {
        return Outcome::GoOn;
    }
    let answer = answer(server, &caller, &look, path, &node);
    answer.map_or_else(|refusal| Outcome::Refuse(refusal.errno), Outcome::Value)
}

fn take_apart(call: &Notification, flags: u64) -> Look {
    let args = call.args;
    let here = libc::AT_FDCWD;
    let no_follow = flags & libc::AT_SYMLINK_NOFOLLOW as u64 != 0;
    let look = |directory, path, follow, wanted| Look { directory, path, follow, wanted };
    match call.number {
        libc::SYS_newfstatat => look(args[0] as i32, args[1], !no_follow, Wanted::Stat { at: args[2], extended: false }),
        libc::SYS_statx => look(args[0] as i32, args[1], !no_follow, Wanted::Stat { at: args[4], extended: true }),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_stat => look(here, args[0], true, Wanted::Stat { at: args[1], extended: false }),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_lstat => look(here, args[0], false, Wanted::Stat { at: args[1], extended: false }),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_access => look(here, args[0], true, Wanted::Access { mode: args[1] as u32 }),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_readlink => look(here, args[0], false, Wanted::Link { at: args[1], len: args[2] }),
        libc::SYS_readlinkat => look(args[0] as i32, args[1], false, Wanted::Link { at: args[2], len: args[3] }),
        _ => look(args[0] as i32, args[1], true, Wanted::Access { mode: args[2] as u32 }),
    }
}

fn answer(server: &Server, caller: &RemoteCaller, look: &Look, path: String, node: &Node) -> Answer<i64> {
    let refuse = |errno, why| Err(iommufd::Refusal::of(errno, why));
    match look.wanted {
        Wanted::Access { mode } => {
            let denied = match node {
                Node::Text(_) => 3,
                Node::Directory => 2,
                _ => 1,
            };
            if mode & denied == 0 { Ok(0) } else { refuse(Errno::ACCESS, "not for this access") }
        }
        Wanted::Link { at, len } => {
            let Node::Link(target) = node else { return refuse(Errno::INVAL, "no link") };
            let Some(len) = usize::try_from(len).ok().filter(|len| *len != 0) else { return refuse(Errno::INVAL, "no room") };
            let part = &target.as_bytes()[..target.len().min(len)];
            caller.write(at, part)?;
            Ok(part.len() as i64)
        }
        Wanted::Stat { at, extended } => {
            let device = server.namespace.device_of(&path);
            let (mode, size) = match node {
                Node::File(_) => (mode_of(device), 0),
                Node::Text(text) => {
                    let opening = Opening { path: path.clone(), flags: libc::O_RDONLY };
                    (libc::S_IFREG | 0o444, text(caller, &opening)?.len() as u64)
                }
                Node::Link(target) => (libc::S_IFLNK | 0o777, target.len() as u64),
                Node::Knob(_) | Node::Rewrite(_) => (libc::S_IFREG | 0o644, 0),
                Node::Directory => (libc::S_IFDIR | 0o755, 0),
            };
            let mut hasher = DefaultHasher::new();
            path.hash(&mut hasher);
            let status = Status { inode: hasher.finish() >> 16, mode, size, device };
            status.write(caller, at, extended)
        }
    }
}

/// fstat in all its forms: a descriptor of ours is a device.
fn descriptor(server: &Arc<Server>, call: &Notification) -> Outcome {
    let (thread, file, what) = match server.look_up(call.id, call.tid, call.args[0] as i32) {
        Ok(Some(found)) => found,
        Ok(None) => return Outcome::GoOn,
        Err(errno) => return errno.into(),
    };
    let inode = match crate::files::Inode::of(&file) {
        Ok(inode) => inode,
        Err(errno) => return Outcome::Refuse(errno),
    };
    let device = server.files.find(inode).map(|entry| entry.device).unwrap_or_default();
    let mode = match what {
        What::File(_) => mode_of(device),
        What::Knob(_) => libc::S_IFREG | 0o644,
    };
    let (at, extended) = match call.number {
        libc::SYS_fstat => (call.args[1], false),
        libc::SYS_newfstatat => (call.args[2], false),
        _ => (call.args[4], true),
    };
    // An empty path, or none; anything else is relative to a descriptor that is no directory.
    let caller = RemoteCaller::new(server, thread, Some(call.id), None);
    let mut first = [0];
    if call.number != libc::SYS_fstat && call.args[1] != 0 && caller.read(call.args[1], &mut first).is_ok() && first[0] != 0 {
        return Outcome::GoOn;
    }
    let written = Status { inode: inode.number, mode, size: 0, device }.write(&caller, at, extended);
    written.map_or_else(|refusal| Outcome::Refuse(refusal.errno), Outcome::Value)
}

/// A file with numbers is a device.
fn mode_of(device: (u32, u32)) -> u32 {
    if device == (0, 0) { libc::S_IFREG | 0o600 } else { libc::S_IFCHR | 0o600 }
}

/// What there is to say about a file of ours.
struct Status {
    inode: u64,
    mode: u32,
    size: u64,
    device: (u32, u32),
}

/// The device that all of ours seem to be on: one without a number of its own, as the kernel's pseudo file systems are.
const DEVICE: (u32, u32) = (0, 0xfff);
const BLOCK: u32 = 4096;

impl Status {
    fn write(&self, caller: &RemoteCaller, at: u64, extended: bool) -> Answer<i64> {
        if extended {
            caller.write(at, &self.extended())?
        } else {
            caller.write(at, &self.plain())?
        }
        Ok(0)
    }

    /// As `struct statx` has it.
    fn extended(&self) -> [u8; 256] {
        const BASIC: u32 = 0x7ff;
        let mut bytes = [0; 256];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &BASIC.to_ne_bytes());
        put(4, &BLOCK.to_ne_bytes());
        put(16, &1u32.to_ne_bytes());
        put(28, &(self.mode as u16).to_ne_bytes());
        put(32, &self.inode.to_ne_bytes());
        put(40, &self.size.to_ne_bytes());
        put(128, &self.device.0.to_ne_bytes());
        put(132, &self.device.1.to_ne_bytes());
        put(136, &DEVICE.0.to_ne_bytes());
        put(140, &DEVICE.1.to_ne_bytes());
        bytes
    }

    /// As `struct stat` has it.
    fn plain(&self) -> [u8; size_of::<libc::stat>()] {
        use std::mem::offset_of;
        let mut bytes = [0; size_of::<libc::stat>()];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(offset_of!(libc::stat, st_dev), &rustix::fs::makedev(DEVICE.0, DEVICE.1).to_ne_bytes());
        put(offset_of!(libc::stat, st_ino), &self.inode.to_ne_bytes());
        put(offset_of!(libc::stat, st_nlink), &1u32.to_ne_bytes());
        put(offset_of!(libc::stat, st_mode), &self.mode.to_ne_bytes());
        put(offset_of!(libc::stat, st_rdev), &rustix::fs::makedev(self.device.0, self.device.1).to_ne_bytes());
        put(offset_of!(libc::stat, st_size), &self.size.to_ne_bytes());
        put(offset_of!(libc::stat, st_blksize), &BLOCK.to_ne_bytes());
        bytes
    }
}
