//! read and write in all their forms, on descriptors of ours.

use crate::RemoteCaller;
use crate::calls::{Outcome, Through};
use crate::files::What;
use iommufd::{Answer, Caller, File, Refusal};
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd};

/// Bytes taken from a client in one write at most; more is a short write.
const MOST: usize = 1 << 20;
/// As many parts as the kernel takes.
const MOST_PARTS: u64 = 1024;

/// Serves one of these calls.
pub(crate) fn handle(through: Through<'_>, what: &What) -> Outcome {
    let (number, args) = (through.call.number, through.call.args);
    let (writes, vectored, positioned) = match number {
        libc::SYS_read => (false, false, false),
        libc::SYS_write => (true, false, false),
        libc::SYS_pread64 => (false, false, true),
        libc::SYS_pwrite64 => (true, false, true),
        libc::SYS_readv => (false, true, false),
        libc::SYS_writev => (true, true, false),
        libc::SYS_preadv => (false, true, true),
        libc::SYS_pwritev => (true, true, true),
        // These take -1 for the position that the descriptor is at.
        libc::SYS_preadv2 => (false, true, args[3] != u64::MAX),
        libc::SYS_pwritev2 => (true, true, args[3] != u64::MAX),
        _ => return Outcome::GoOn,
    };
    let mode = match rustix::fs::fcntl_getfl(&through.fd) {
        Ok(mode) => mode.bits().cast_signed() & libc::O_ACCMODE,
        Err(errno) => return Outcome::Refuse(errno),
    };
    let fits = if writes { matches!(mode, libc::O_WRONLY | libc::O_RDWR) } else { matches!(mode, libc::O_RDONLY | libc::O_RDWR) };
    if !fits {
        return Outcome::Refuse(Errno::BADF);
    }
    let at = positioned.then_some(args[3]);
    if at.is_some_and(|at| at.cast_signed() < 0) {
        return Outcome::Refuse(Errno::INVAL);
    }
    let Ok(fd) = rustix::io::dup(&through.fd) else { return Outcome::Refuse(Errno::NOMEM) };
    let caller = through.caller();
    let parts = if vectored { parts(&caller, args[1], args[2]) } else { Ok(vec![(args[1], args[2])]) };
    let moved = parts
        .and_then(|parts| if writes { write(&caller, what, fd.as_fd(), &parts, at) } else { read(&caller, what, fd.as_fd(), &parts, at) });
    match moved {
        Ok(count) => Outcome::Value(count as i64),
        Err(refusal) => Outcome::Refuse(refusal.errno),
    }
}

/// The list of parts: address and length.
fn parts(caller: &RemoteCaller, at: u64, count: u64) -> Answer<Vec<(u64, u64)>> {
    if count > MOST_PARTS {
        return Err(Refusal::of(Errno::INVAL, "more parts than a call can have"));
    }
    let mut bytes = vec![0u8; count as usize * 16];
    caller.read(at, &mut bytes)?;
    let word = |bytes: &[u8]| bytes.try_into().map(u64::from_ne_bytes).unwrap_or_default();
    let parts: Vec<(u64, u64)> = bytes.chunks_exact(16).map(|part| (word(&part[..8]), word(&part[8..]))).collect();
    if parts.iter().any(|part| part.1.cast_signed() < 0) {
        return Err(Refusal::of(Errno::INVAL, "a part has a negative length"));
    }
    Ok(parts)
}

fn read(caller: &RemoteCaller, what: &What, fd: BorrowedFd<'_>, parts: &[(u64, u64)], at: Option<u64>) -> Answer<usize> {
    let wanted = parts.iter().fold(0u64, |sum, part| sum.saturating_add(part.1)).min(i32::MAX as u64) as usize;
    let data = match what {
        What::File(file) => File::read(&**file, caller, wanted, at)?,
        What::Knob(opened) => {
            let text = opened.knob.read(caller)?;
            let from = at.unwrap_or_else(|| position(fd)).min(text.len() as u64) as usize;
            let rest = &text.as_bytes()[from..];
            let data = rest[..rest.len().min(wanted)].to_vec();
            if at.is_none() {
                advance(fd, data.len());
            }
            data
        }
    };
    let mut rest = data.as_slice();
    for &(to, len) in parts {
        let (part, left) = rest.split_at(rest.len().min(usize::try_from(len).unwrap_or(usize::MAX)));
        caller.write(to, part)?;
        rest = left;
    }
    Ok(data.len())
}

fn write(caller: &RemoteCaller, what: &What, fd: BorrowedFd<'_>, parts: &[(u64, u64)], at: Option<u64>) -> Answer<usize> {
    let mut data = Vec::new();
    for &(from, len) in parts {
        let count = usize::try_from(len).unwrap_or(usize::MAX).min(MOST - data.len());
        let start = data.len();
        data.resize(start + count, 0);
        caller.read(from, &mut data[start..])?;
    }
    match what {
        What::File(file) => File::write(&**file, caller, &data, at),
        What::Knob(opened) => {
            opened.knob.write(caller, &data)?;
            if at.is_none() {
                advance(fd, data.len());
            }
            Ok(data.len())
        }
    }
}

/// Where the descriptor is: the kernel keeps that, and lseek is its own.
fn position(fd: BorrowedFd<'_>) -> u64 {
    rustix::fs::seek(fd, SeekFrom::Current(0)).unwrap_or(0)
}

fn advance(fd: BorrowedFd<'_>, bytes: usize) {
    let _ = rustix::fs::seek(fd, SeekFrom::Current(bytes as i64));
}
