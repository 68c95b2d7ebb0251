//! open, in all its forms: what a client gets at a path of ours.

use crate::calls::{Outcome, read_words};
use crate::files::{new_memfd, reopen};
use crate::namespace::Node;
use crate::paths;
use crate::server::Server;
use crate::sys::Notification;
use crate::{Opening, RemoteCaller, Rewriting};
use iommufd::{File, Refusal};
use rustix::io::Errno;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// An open, taken apart.
struct Call {
    directory: i32,
    path: Vec<u8>,
    flags: i32,
}

/// Serves one of these calls.
pub(crate) fn handle(server: &Arc<Server>, call: &Notification) -> Outcome {
    let at = match call.number {
        libc::SYS_openat | libc::SYS_openat2 => call.args[1],
        _ => call.args[0],
    };
    let Some(path) = paths::read(server, call.tid, at) else { return Outcome::GoOn };
    let thread = match server.thread(call.id, call.tid) {
        Ok(thread) => thread,
        Err(errno) => return errno.into(),
    };
    let caller = RemoteCaller::new(server, thread, Some(call.id), None);
    let Some(open) = take_apart(call, &caller, path) else { return Outcome::GoOn };
    serve(server, call, &caller, &open).unwrap_or(Outcome::GoOn)
}

fn take_apart(call: &Notification, caller: &RemoteCaller, path: Vec<u8>) -> Option<Call> {
    let args = call.args;
    let (directory, flags) = match call.number {
        libc::SYS_openat => (args[0] as i32, args[2] as i32),
        libc::SYS_openat2 => {
            const BENEATH: u64 = 8;
            const IN_ROOT: u64 = 16;
            if args[3] < 24 {
                return None;
            }
            let [flags, _, resolve] = read_words::<3>(caller, args[2]).ok()?;
            // Under these a path means something else.
            if resolve & (BENEATH | IN_ROOT) != 0 {
                return None;
            }
            (args[0] as i32, i32::try_from(flags).ok()?)
        }
        #[cfg(target_arch = "x86_64")]
        libc::SYS_creat => (libc::AT_FDCWD, libc::O_CREAT | libc::O_WRONLY | libc::O_TRUNC),
        _ => (libc::AT_FDCWD, args[1] as i32),
    };
    (flags & libc::O_PATH == 0).then_some(Call { directory, path, flags })
}

fn serve(server: &Arc<Server>, call: &Notification, caller: &RemoteCaller, open: &Call) -> Option<Outcome> {
    let path = paths::absolute(server, caller.thread(), open.directory, &open.path)?;
    let (path, node) = match paths::find(server, path, open.flags & libc::O_NOFOLLOW == 0) {
        Ok(found) => found?,
        Err(errno) => return Some(Outcome::Refuse(errno)),
    };
    let opening = Opening { path, flags: open.flags };
    Some(open_node(server, call, caller, node, &opening).unwrap_or_else(|refusal| Outcome::Refuse(refusal.errno)))
}

fn os(what: &'static str) -> impl FnOnce(Errno) -> Refusal {
    move |errno| Refusal::of(errno, what)
}

fn open_node(server: &Arc<Server>, call: &Notification, caller: &RemoteCaller, node: Node, opening: &Opening) -> Result<Outcome, Refusal> {
    let flags = opening.flags;
    if flags & libc::O_CREAT != 0 && flags & libc::O_EXCL != 0 {
        return Err(Refusal::of(Errno::EXIST, "it is there already"));
    }
    if flags & libc::O_DIRECTORY != 0 && !matches!(node, Node::Directory) {
        return Err(Refusal::of(Errno::NOTDIR, "not a directory"));
    }
    let read_only = || if opening.writes() { Err(Refusal::of(Errno::ACCESS, "it can only be read")) } else { Ok(()) };
    match node {
        Node::File(open) => {
            let file = open(caller, opening)?;
            let device = server.namespace.device_of(&opening.path);
            let made = server.files.make(Arc::clone(&file), flags, device, &server.watch);
            let made = made.inspect_err(|_| file.released()).map_err(os("no descriptor can be made"))?;
            let number = give_high(server, call, caller, made, flags)?;
            server.observer.opened(caller.pid(), number, Some(&opening.path), &*file as &dyn File);
            Ok(answer(server, number))
        }
        Node::Knob(find) => {
            let knob = find(caller, opening)?;
            let text = if flags & libc::O_TRUNC == 0 { knob.read(caller).unwrap_or_default() } else { String::new() };
            let keeper = RemoteCaller::new(server, Arc::clone(caller.thread()), None, None);
            let made = server.files.make_knob(knob, keeper, &text, flags).map_err(os("no descriptor can be made"))?;
            let number = give_high(server, call, caller, made, flags)?;
            Ok(answer(server, number))
        }
        Node::Text(text) => {
            read_only()?;
            give_text(server, call, &text(caller, opening)?, flags)
        }
        Node::Rewrite(rewrite) => {
            if opening.writes() {
                return Ok(Outcome::GoOn);
            }
            // What cannot be read is the kernel's to refuse.
            let Ok(content) = std::fs::read_to_string(&opening.path) else { return Ok(Outcome::GoOn) };
            let pid = opening.path.strip_prefix("/proc/").and_then(|rest| rest.split('/').next()?.parse().ok());
            let space = pid.and_then(|pid| server.clients.space(&*server.clients.known(pid)?).ok()).map(|space| space.id);
            let changed = rewrite(&Rewriting { caller, path: &opening.path, space }, content.clone());
            if changed == content { Ok(Outcome::GoOn) } else { give_text(server, call, &changed, flags) }
        }
        Node::Directory => {
            if opening.writes() || flags & libc::O_CREAT != 0 {
                return Err(Refusal::of(Errno::ISDIR, "it is a directory"));
            }
            let directory = server.directories.open(&server.namespace, caller, &opening.path).map_err(os("no directory can be made"))?;
            give_low(server, call, &directory, flags)
        }
        Node::Link(_) => Err(Refusal::of(Errno::LOOP, "a link")),
    }
}

/// A descriptor of ours: at or above the base.
fn give_high(server: &Server, call: &Notification, caller: &RemoteCaller, made: OwnedFd, flags: i32) -> Result<i32, Refusal> {
    let number = match server.promise_number(caller.thread(), 0) {
        Ok(number) => number,
        Err(Errno::MFILE) if server.has_no_high_numbers(caller.thread()) => return give_limited(server, call, &made, flags),
        Err(errno) => return Err(Refusal::of(errno, "no free descriptor number for a file of ours: raise the limit of open files")),
    };
    // When the answer comes with it, the client may close it before we do, and then look for what closing does. So it comes after, unless
    // the client might not live to see it.
    let together = !server.killable_only;
    let given = server.keep_promise(call.id, caller.thread(), number, &made, flags & libc::O_CLOEXEC != 0, together);
    given.map_err(os("the descriptor could not be given"))?;
    Ok(number.cast_signed())
}

/// A descriptor of ours where the client may have no high numbers: it can do ioctls, and nothing else that would have to be served.
fn give_limited(server: &Server, call: &Notification, made: &OwnedFd, flags: i32) -> Result<i32, Refusal> {
    server.warn(&format!(
        "a client limits its open files to fewer than {}: there it has descriptors of ours that know ioctls only, no read, write or mmap",
        server.base
    ));
    let limited = reopen(made.as_fd(), libc::O_ACCMODE).map_err(os("it is no use without high descriptor numbers"))?;
    let given = server.listener.give(call.id, limited.as_fd(), None, flags & libc::O_CLOEXEC != 0, !server.killable_only);
    given.map_err(os("the descriptor could not be given"))
}

fn answer(server: &Server, number: i32) -> Outcome {
    if server.killable_only { Outcome::Value(number.into()) } else { Outcome::Answered }
}

/// A file with this text, which is the client's own from then on.
fn give_text(server: &Server, call: &Notification, text: &str, flags: i32) -> Result<Outcome, Refusal> {
    let memory = new_memfd("text").map_err(os("no memory for a text"))?;
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        let count = rustix::io::write(&memory, rest).map_err(os("no memory for a text"))?;
        rest = &rest[count.min(rest.len())..];
    }
    let opened = reopen(memory.as_fd(), flags & libc::O_NONBLOCK).map_err(os("no memory for a text"))?;
    give_low(server, call, &opened, flags)
}

/// A descriptor that is none of ours any more: wherever the client's next one comes.
fn give_low(server: &Server, call: &Notification, file: &OwnedFd, flags: i32) -> Result<Outcome, Refusal> {
    let given = server.listener.give(call.id, file.as_fd(), None, flags & libc::O_CLOEXEC != 0, true);
    given.map(|_| Outcome::Answered).map_err(os("the descriptor could not be given"))
}
