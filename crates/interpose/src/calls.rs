//! One call of a client: what it is, and the answer.

use crate::RemoteCaller;
use crate::clients::{Thread, lock};
use crate::files::{What, reopen};
use crate::server::Server;
use crate::sys::Notification;
use crate::{look, open, transfer, truncate};
use iommufd::{Answer, Caller, Mmap};
use rustix::io::Errno;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The kernel does it, as if we were not there.
    GoOn,
    Value(i64),
    Refuse(Errno),
    /// It has its answer.
    Answered,
}

impl From<Errno> for Outcome {
    fn from(errno: Errno) -> Self {
        // A thread that has ended needs no answer; one that we may not look at, or without that descriptor, gets the kernel's.
        if matches!(errno, Errno::SRCH | Errno::PERM | Errno::ACCESS | Errno::BADF) { Self::GoOn } else { Self::Refuse(errno) }
    }
}

/// What a call on a descriptor of ours needs.
pub(crate) struct Through<'a> {
    pub(crate) server: &'a Arc<Server>,
    pub(crate) call: &'a Notification,
    pub(crate) thread: Arc<Thread>,
    pub(crate) fd: OwnedFd,
}

impl Through<'_> {
    /// The caller, for a handler, through this descriptor.
    pub(crate) fn caller(self) -> RemoteCaller {
        RemoteCaller::new(self.server, self.thread, Some(self.call.id), Some(self.fd))
    }
}

/// Does what a client asks for. Whatever is held of the client's is given back when this returns.
pub(crate) fn handle(server: &Arc<Server>, call: &Notification) -> Outcome {
    match call.number {
        libc::SYS_openat | libc::SYS_openat2 => return open::handle(server, call),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_open | libc::SYS_creat => return open::handle(server, call),
        number if look::is_look(number) => return look::handle(server, call),
        libc::SYS_ftruncate | libc::SYS_fallocate => return truncate::handle(server, call),
        _ => {}
    }
    let which = if call.number == libc::SYS_mmap { 4 } else { 0 };
    let fd = call.args[which] as i32;
    let (thread, file, what) = match server.look_up(call.id, call.tid, fd) {
        Ok(Some(found)) => found,
        Ok(None) => return Outcome::GoOn,
        Err(errno) => return errno.into(),
    };
    let through = Through { server, call, thread, fd: file };
    match (call.number, what) {
        (libc::SYS_ioctl, What::File(file)) => {
            let caller = through.caller();
            // The kernel's command is an unsigned int.
            let answer = file.ioctl(&caller, call.args[1] as u32, call.args[2]);
            finish(server, call, &caller, answer)
        }
        (libc::SYS_ioctl, What::Knob(_)) => Outcome::Refuse(Errno::NOTTY),
        (libc::SYS_mmap, What::File(file)) => {
            let [_, len, prot, flags, _, offset] = call.args;
            let wanted = Mmap { len, prot: prot as u32, flags: flags as u32, offset };
            match file.mmap(&through.caller(), &wanted) {
                Ok(()) => Outcome::GoOn,
                Err(refusal) => Outcome::Refuse(refusal.errno),
            }
        }
        (libc::SYS_mmap, What::Knob(_)) => Outcome::Refuse(Errno::NODEV),
        (libc::SYS_dup | libc::SYS_dup3 | libc::SYS_fcntl, what) => duplicate(through, &what),
        #[cfg(target_arch = "x86_64")]
        (libc::SYS_dup2, what) => duplicate(through, &what),
        (_, what) => transfer::handle(through, &what),
    }
}

/// The answer of a handler, with the descriptors that it promised.
fn finish(server: &Server, call: &Notification, caller: &RemoteCaller, answer: Answer<i64>) -> Outcome {
    let value = match answer {
        Ok(value) => value,
        Err(refusal) => return Outcome::Refuse(refusal.errno),
    };
    let mut failed = None;
    for install in caller.take_installs() {
        let (thread, number) = (caller.thread(), install.number);
        let made = server.files.make(Arc::clone(&install.file), libc::O_RDWR, (0, 0), &server.watch);
        let given = made.inspect_err(|_| {
            // It was never open.
            install.file.released();
            lock(&thread.process.promised).remove(&number);
        });
        match given.and_then(|file| server.keep_promise(call.id, thread, number, &file, true, false)) {
            Ok(_) => server.observer.opened(caller.pid(), number.cast_signed(), None, &*install.file),
            Err(errno) => failed = Some(errno),
        }
    }
    failed.map_or(Outcome::Value(value), Outcome::Refuse)
}

/// dup, dup2, dup3 and F_DUPFD, of a descriptor of ours: the new one is at or above the base too, so that what is done with it is held up.
///
/// A number below the base that was asked for is given. There, ioctls are served as ever; but read, write and mmap reach the kernel, which must
/// not pretend: the descriptor that lies there can do neither.
fn duplicate(through: Through<'_>, what: &What) -> Outcome {
    let Through { server, call, thread, fd } = through;
    let (old, second) = (call.args[0] as i32, call.args[1] as u32);
    let (least, cloexec) = match call.number {
        libc::SYS_dup => (0, false),
        libc::SYS_fcntl => (call.args[2] as u32, second == libc::F_DUPFD_CLOEXEC as u32),
        number => {
            let cloexec = number == libc::SYS_dup3 && call.args[2] & libc::O_CLOEXEC as u64 != 0;
            let strange = number == libc::SYS_dup3 && (call.args[2] & !(libc::O_CLOEXEC as u64) != 0 || old.cast_unsigned() == second);
            if strange || old.cast_unsigned() == second || second >= server.base {
                return Outcome::GoOn;
            }
            return duplicate_low(server, call, &fd, what, cloexec);
        }
    };
    if u64::from(least) != call.args[2] && call.number == libc::SYS_fcntl {
        return Outcome::GoOn;
    }
    let number = match server.promise_number(&thread, least) {
        Ok(number) => number,
        // The kernel knows what to say about a number beyond the limit.
        Err(Errno::MFILE) if u64::from(least) >= u64::from(server.base) => return Outcome::GoOn,
        Err(errno) => return errno.into(),
    };
    match server.keep_promise(call.id, &thread, number, &fd, cloexec, false) {
        Ok(_) => Outcome::Value(number.into()),
        Err(errno) => Outcome::Refuse(errno),
    }
}

fn duplicate_low(server: &Server, call: &Notification, fd: &OwnedFd, what: &What, cloexec: bool) -> Outcome {
    let opened = match what {
        What::Knob(knob) => {
            knob.goes_low();
            return Outcome::GoOn;
        }
        What::File(file) if file.ready().is_some() => {
            server.warn(&format!(
                "a {} cannot be duplicated onto a number below {}, where reading it would not be served: let dup choose the number",
                file.kind(),
                server.base
            ));
            return Outcome::Refuse(Errno::INVAL);
        }
        // The fourth access mode: neither reading nor writing nor mapping, ioctls only.
        What::File(_) => reopen(fd.as_fd(), libc::O_ACCMODE),
    };
    let number = call.args[1] as u32;
    match opened.and_then(|opened| server.listener.give(call.id, opened.as_fd(), Some(number), cloexec, false)) {
        Ok(_) => Outcome::Value(number.into()),
        Err(errno) => Outcome::Refuse(errno),
    }
}

/// 64-bit words of the client.
pub(crate) fn read_words<const N: usize>(caller: &RemoteCaller, at: u64) -> Answer<[u64; N]> {
    let mut bytes = vec![0u8; N * 8];
    caller.read(at, &mut bytes)?;
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_ne_bytes(bytes.try_into().unwrap_or_default());
    }
    Ok(words)
}
