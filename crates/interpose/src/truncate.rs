//! fallocate and ftruncate: when a file that somebody has mapped for a device loses pages, the device loses them first (D-8).

use crate::calls::Outcome;
use crate::files::Inode;
use crate::server::Server;
use crate::shared_files;
use crate::sys::Notification;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Serves one of these calls. The kernel does them itself for files that nobody has mapped with us.
pub(crate) fn handle(server: &Arc<Server>, call: &Notification) -> Outcome {
    let thread = match server.thread(call.id, call.tid) {
        Ok(thread) => thread,
        Err(errno) => return errno.into(),
    };
    let file = match thread.fetch(call.args[0] as i32) {
        Ok(file) => file,
        Err(errno) => return errno.into(),
    };
    let Ok(stat) = rustix::fs::fstat(&file) else { return Outcome::GoOn };
    let (size, inode) = (stat.st_size as u64, Inode::from(stat));
    if server.files.find(inode).is_some() {
        // The memory behind a descriptor of ours is not the client's to cut.
        return Outcome::Refuse(Errno::INVAL);
    }
    if !server.shared_files.is_used(inode) {
        return Outcome::GoOn;
    }
    let pid = thread.process.pid;
    if call.number == libc::SYS_ftruncate {
        let len = call.args[1];
        if len.cast_signed() < 0 || len >= size {
            return Outcome::GoOn;
        }
        return take(server, pid, inode, (len, u64::MAX - len), || rustix::fs::ftruncate(&file, len));
    }
    let [_, mode, offset, len, ..] = call.args;
    let mode = FallocateFlags::from_bits_retain(mode as u32);
    let removes = FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE | FallocateFlags::COLLAPSE_RANGE | FallocateFlags::INSERT_RANGE;
    if offset.cast_signed() < 0 || len.cast_signed() <= 0 {
        return Outcome::GoOn;
    }
    if mode.contains(FallocateFlags::PUNCH_HOLE) {
        take(server, pid, inode, (offset, len), || rustix::fs::fallocate(&file, mode, offset, len))
    } else if mode.intersects(removes) {
        // No file of this kind can do these; one that can one day moves everything behind.
        take(server, pid, inode, (offset, u64::MAX - offset), || rustix::fs::fallocate(&file, mode, offset, len))
    } else {
        give(server, &file, inode, mode, (offset, len))
    }
}

/// The pages leave our tables, then the file.
fn take(server: &Server, pid: i32, inode: Inode, (offset, len): (u64, u64), take: impl FnOnce() -> Result<(), Errno>) -> Outcome {
    let revoked = server.shared_files.revoke(inode, offset, len);
    if !revoked.is_empty() {
        server.observer.revoked(pid, offset, len);
    }
    match take() {
        Ok(()) => Outcome::Value(0),
        Err(errno) => {
            for (backing, span) in revoked {
                shared_files::restore(&backing, span);
            }
            Outcome::Refuse(errno)
        }
    }
}

/// The file gets pages, then our tables.
fn give(server: &Server, file: &OwnedFd, inode: Inode, mode: FallocateFlags, (offset, len): (u64, u64)) -> Outcome {
    match rustix::fs::fallocate(file, mode, offset, len) {
        Ok(()) => {
            server.shared_files.restore(inode, offset, len);
            Outcome::Value(0)
        }
        Err(errno) => Outcome::Refuse(errno),
    }
}
