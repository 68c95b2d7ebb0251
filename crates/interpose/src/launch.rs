//! Starts the program: the child installs the filter itself, sends us its listener, and reports where it failed when it does.

use crate::sys::{self, Image, KILLABLE_ONLY, Listener, NO_NEW_PRIVS, Signals, Step};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType, recvmsg, socketpair};
use rustix::process::{Pid, WaitOptions, waitpid};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

/// A program that runs, and waits for us with its first call.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) pid: i32,
    pub(crate) listener: Listener,
    /// New privileges had to be given up to install the filter.
    pub(crate) no_new_privs: bool,
    /// Calls that we have received can be interrupted by fatal signals only.
    pub(crate) killable_only: bool,
}

/// Starts the program in a child, under its filter.
///
/// # Errors
/// Where it failed, and why; there is no child then.
pub(crate) fn start(image: &Image, signals: &Signals) -> Result<Started, (Step, Errno)> {
    let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let (ours, theirs) = pair.map_err(|errno| (Step::Send, errno))?;
    let pid = sys::fork(image, signals, theirs.as_fd()).map_err(|errno| (Step::Exec, errno))?;
    drop(theirs);
    let reports = listen(&ours);
    if let Reports { listener: Some(listener), flags, failed: None } = reports {
        let (no_new_privs, killable_only) = (flags & NO_NEW_PRIVS != 0, flags & KILLABLE_ONLY != 0);
        return Ok(Started { pid, listener: Listener(listener), no_new_privs, killable_only });
    }
    while let Err(Errno::INTR) = waitpid(Pid::from_raw(pid), WaitOptions::empty()) {}
    // Without a word and without a listener it was killed.
    Err(reports.failed.unwrap_or((Step::Exec, Errno::INTR)))
}

/// What a child said.
#[derive(Default)]
struct Reports {
    listener: Option<OwnedFd>,
    flags: u32,
    failed: Option<(Step, Errno)>,
}

/// Hears the child out: until it is the program, which closes its end, or has failed.
fn listen(ours: &OwnedFd) -> Reports {
    let mut reports = Reports::default();
    loop {
        let mut words = [0u8; 8];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let message = recvmsg(ours, &mut [std::io::IoSliceMut::new(&mut words)], &mut ancillary, RecvFlags::CMSG_CLOEXEC);
        let count = match message {
            Err(Errno::INTR) => continue,
            Err(errno) => {
                reports.failed = Some((Step::Send, errno));
                return reports;
            }
            Ok(message) => message.bytes,
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(files) = message {
                reports.listener = files.last();
            }
        }
        let [a, b, c, d, e, f, g, h] = words;
        let (step, word) = (u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]));
        match (count, step) {
            (0, _) => return reports,
            (8, 0) => reports.flags = word,
            (_, step) => {
                let step = [Step::Filter, Step::Send, Step::Exec].into_iter().find(|known| *known as u32 == step).unwrap_or(Step::Send);
                reports.failed = Some((step, Errno::from_raw_os_error(word.cast_signed())));
                return reports;
            }
        }
    }
}
