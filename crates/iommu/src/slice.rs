//! Zero-copy access: host memory of a device's buffer, for as long as a guard is held.
//!
//! No Rust reference to that memory exists: a guest or another process may write it at any time, and a truncation may take it away. Every
//! access is a copy that survives that (D-1).

use crate::context::{Context, Refused};
use crate::{Access, Fault, FaultKind};
use addr::{Address, Iova};
use backing::{CopyFault, HostAddr};
use sync::Guard;

/// A stretch of one leaf, or of leaves whose host memory lies in a row.
#[derive(Clone, Copy, Debug)]
struct Piece {
    /// Offset in the slice of the first byte behind this piece.
    end: u64,
    host: HostAddr,
    len: u64,
}

/// Memory of a device, in place. Dropping it lets writers go on.
#[derive(Debug)]
#[must_use]
pub struct DmaSlice<'a> {
    pieces: Vec<Piece>,
    access: Access,
    _guard: Guard<'a>,
}

/// Why an access to a [`DmaSlice`] did not happen, or not all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SliceError {
    /// Bytes that the slice does not have.
    #[error("{len:#x} bytes at offset {at:#x} are not in a slice of {slice_len:#x} bytes")]
    Outside {
        /// Offset in the slice.
        at: u64,
        /// Bytes.
        len: u64,
        /// How many it has.
        slice_len: u64,
    },
    /// A write to a slice that was made for reading.
    #[error("the slice was made for reading")]
    ReadOnly,
    /// A word that is not aligned in host memory, or lies in two pieces.
    #[error("the word at offset {at:#x} is not aligned")]
    Misaligned {
        /// Offset in the slice.
        at: u64,
    },
    /// The memory behind it vanished.
    #[error("host memory vanished after {done} bytes or somewhat more")]
    Gone {
        /// At least this many bytes were transferred before.
        done: u64,
    },
}

impl<'a> DmaSlice<'a> {
    /// Translates all of it under the guard.
    pub(crate) fn new(guard: Guard<'a>, context: &mut Context, iova: Iova, len: u64, access: Access) -> Result<Self, Fault> {
        let mut pieces: Vec<Piece> = Vec::new();
        let mut done = 0;
        while done < len {
            let at = iova.plus(done);
            let place = context.resolve(at, access).map_err(|refused| context.fault(at, access, done, refused))?;
            let now = (len - done).min(place.rest.saturating_add(1));
            let nowhere = Refused::by(FaultKind::NoHostMemory, Some(place.oa));
            let host = place.host(now).ok_or_else(|| context.fault(at, access, done, nowhere))?;
            done += now;
            match pieces.last_mut() {
                Some(last) if last.host.plus(last.len) == host => (last.len, last.end) = (last.len + now, done),
                _ => pieces.push(Piece { end: done, host, len: now }),
            }
        }
        Ok(Self { pieces, access, _guard: guard })
    }

    /// Its length in bytes, never 0.
    #[expect(clippy::len_without_is_empty, reason = "a slice is never empty")]
    pub fn len(&self) -> u64 {
        self.pieces.last().map_or(0, |piece| piece.end)
    }

    /// Copies out of the slice.
    ///
    /// # Errors
    /// [`SliceError`].
    pub fn read(&self, at: u64, into: &mut [u8]) -> Result<(), SliceError> {
        self.each(at, into.len() as u64, |host, off, range| host.read(off, &mut into[range]))
    }

    /// Copies into the slice.
    ///
    /// # Errors
    /// [`SliceError`].
    pub fn write(&self, at: u64, from: &[u8]) -> Result<(), SliceError> {
        self.check_writable()?;
        self.each(at, from.len() as u64, |host, off, range| host.write(off, &from[range]))
    }

    /// One 64-bit word, atomically, with acquire: a ring's index, a status word.
    ///
    /// # Errors
    /// [`SliceError`]; the word must be aligned.
    pub fn load_u64(&self, at: u64) -> Result<u64, SliceError> {
        let (host, off) = self.word(at)?;
        host.load_u64(off).map_err(|_| SliceError::Gone { done: 0 })
    }

    /// One 64-bit word, atomically, with release.
    ///
    /// # Errors
    /// [`SliceError`]; the word must be aligned.
    pub fn store_u64(&self, at: u64, value: u64) -> Result<(), SliceError> {
        self.check_writable()?;
        let (host, off) = self.word(at)?;
        host.store_u64(off, value).map_err(|_| SliceError::Gone { done: 0 })
    }

    fn check_writable(&self) -> Result<(), SliceError> {
        if self.access == Access::Write { Ok(()) } else { Err(SliceError::ReadOnly) }
    }

    fn word(&self, at: u64) -> Result<(HostAddr, u64), SliceError> {
        let (first, _) = self.check_inside(at, 8)?;
        let piece = self.pieces[first];
        let off = at - (piece.end - piece.len);
        let aligned = piece.host.plus(off).hva().is_aligned(3) && piece.len - off >= 8;
        if aligned { Ok((piece.host, off)) } else { Err(SliceError::Misaligned { at }) }
    }

    /// The piece that holds offset `at`, and the offset behind the access.
    fn check_inside(&self, at: u64, len: u64) -> Result<(usize, u64), SliceError> {
        match at.checked_add(len) {
            Some(end) if end <= self.len() => Ok((self.pieces.partition_point(|piece| piece.end <= at), end)),
            _ => Err(SliceError::Outside { at, len, slice_len: self.len() }),
        }
    }

    fn each(
        &self,
        at: u64,
        len: u64,
        mut access: impl FnMut(HostAddr, u64, std::ops::Range<usize>) -> Result<(), CopyFault>,
    ) -> Result<(), SliceError> {
        let (first, end) = self.check_inside(at, len)?;
        let mut now = at;
        for piece in &self.pieces[first..] {
            if now == end {
                break;
            }
            let stop = piece.end.min(end);
            let (from, to) = ((now - at) as usize, (stop - at) as usize);
            let off = now - (piece.end - piece.len);
            access(piece.host, off, from..to).map_err(|fault| SliceError::Gone { done: from as u64 + fault.done as u64 })?;
            now = stop;
        }
        Ok(())
    }
}
