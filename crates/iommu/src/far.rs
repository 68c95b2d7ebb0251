//! Copies from and to memory that this process sees nowhere: a foreign backing's owner makes them. Not the fast path, and kept out of it.

use crate::FaultKind;
use crate::context::Place;
use backing::{CopyFault, HostAddr, Owner};

/// A caller's buffer, either to be filled or to be written from. `at` is an offset in it.
pub(crate) trait Buffer {
    fn near(&mut self, host: HostAddr, at: usize, len: usize) -> Result<(), CopyFault>;
    fn far(&mut self, owner: &dyn Owner, offset: u64, at: usize, len: usize) -> Result<(), CopyFault>;
}

/// Filled by a read.
pub(crate) struct Into<'a>(pub(crate) &'a mut [u8]);

impl Buffer for Into<'_> {
    #[inline(always)]
    fn near(&mut self, host: HostAddr, at: usize, len: usize) -> Result<(), CopyFault> {
        host.read(0, &mut self.0[at..at + len])
    }

    fn far(&mut self, owner: &dyn Owner, offset: u64, at: usize, len: usize) -> Result<(), CopyFault> {
        owner.read(offset, &mut self.0[at..at + len])
    }
}

/// Written from.
pub(crate) struct From<'a>(pub(crate) &'a [u8]);

impl Buffer for From<'_> {
    #[inline(always)]
    fn near(&mut self, host: HostAddr, at: usize, len: usize) -> Result<(), CopyFault> {
        host.write(0, &self.0[at..at + len])
    }

    fn far(&mut self, owner: &dyn Owner, offset: u64, at: usize, len: usize) -> Result<(), CopyFault> {
        owner.write(offset, &self.0[at..at + len])
    }
}

/// Copies `now` bytes at a place, as far as they go, between the owner and the buffer from `done` on. Otherwise how far it came, and why.
#[cold]
pub(crate) fn transfer(place: &Place, now: u64, done: u64, buffer: &mut impl Buffer) -> Result<u64, (u64, FaultKind)> {
    let (owner, offset) = place.owner(now).ok_or((0, FaultKind::NoHostMemory))?;
    match buffer.far(&*owner, offset, done as usize, now as usize) {
        Ok(()) => Ok(now),
        Err(CopyFault { done }) => Err((stop(done, now), FaultKind::HostMemoryGone)),
    }
}

/// Why [`copy`] stopped.
pub(crate) struct Stop {
    pub(crate) done: u64,
    /// At the source, or at the target.
    pub(crate) reading: bool,
    pub(crate) kind: FaultKind,
}

/// What goes through a buffer of ours at a time.
const PIECE_BYTES: u64 = 4096;

/// Copies from one place to another, at least one of which is far; answers how many of the `limit` bytes.
#[cold]
pub(crate) fn copy(source: &Place, target: &Place, limit: u64) -> Result<u64, Stop> {
    let now = limit.min(PIECE_BYTES);
    let mut bytes = [0; PIECE_BYTES as usize];
    let bytes = &mut bytes[..now as usize];
    let read = move_bytes(source, now, &mut Into(bytes));
    let readable = match &read {
        Ok(()) => now,
        Err((done, _)) => *done,
    };
    if readable > 0 {
        move_bytes(target, readable, &mut From(&bytes[..readable as usize])).map_err(|(done, kind)| Stop { done, reading: false, kind })?;
    }
    match read {
        Ok(()) => Ok(now),
        Err((done, kind)) => Err(Stop { done, reading: true, kind }),
    }
}

fn move_bytes(place: &Place, len: u64, buffer: &mut impl Buffer) -> Result<(), (u64, FaultKind)> {
    let Some(host) = place.host(len) else { return transfer(place, len, 0, buffer).map(drop) };
    buffer.near(host, 0, len as usize).map_err(|fault| (stop(fault.done, len), FaultKind::HostMemoryGone))
}

/// An owner's word on how far it came, kept inside what was asked for: the byte it stopped at is one of those.
fn stop(done: usize, len: u64) -> u64 {
    (done as u64).min(len - 1)
}
