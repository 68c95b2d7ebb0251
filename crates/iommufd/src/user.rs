//! What a driver reads of the caller: structures and arrays whose layout only the driver knows, with the rules that all of them share
//! (rule 49).

use crate::{Answer, Caller, Refusal};
use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

/// One structure of a type that the caller named.
pub struct UserData<'a> {
    caller: &'a dyn Caller,
    kind: u32,
    len: u32,
    at: u64,
}

impl<'a> UserData<'a> {
    pub(crate) fn new(caller: &'a dyn Caller, kind: u32, len: u32, at: u64) -> Self {
        Self { caller, kind, len, at }
    }

    /// Its type.
    pub fn kind(&self) -> u32 {
        self.kind
    }

    /// The structure, which must be of type `kind` and at least `min` bytes long. What the caller did not give reads as zero.
    ///
    /// # Errors
    /// `EINVAL` for another type, fewer bytes than `min`, more than the structure has; `EFAULT`.
    pub fn read<S: FromBytes + IntoBytes + Default>(&self, kind: u32, min: usize) -> Answer<S> {
        self.check(kind, min)?;
        if self.len as usize > size_of::<S>() {
            return Err(Refusal::new(Errno::INVAL, format!("the data is {} bytes long, and {} are known", self.len, size_of::<S>())));
        }
        let mut value = S::default();
        self.caller.read(self.at, &mut value.as_mut_bytes()[..self.len as usize])?;
        Ok(value)
    }

    /// Gives the structure back, as much of it as the caller has room for; what is behind is cleared.
    ///
    /// # Errors
    /// As [`UserData::read`].
    pub fn write<S: IntoBytes + zerocopy::Immutable>(&self, kind: u32, min: usize, value: &S) -> Answer {
        self.check(kind, min)?;
        write_padded(self.caller, self.at, self.len, value.as_bytes())
    }

    fn check(&self, kind: u32, min: usize) -> Answer {
        if self.kind != kind {
            return Err(Refusal::new(Errno::INVAL, format!("the data has type {:#x}, and this IOMMU takes {kind:#x}", self.kind)));
        }
        if (self.len as usize) < min {
            return Err(Refusal::new(Errno::INVAL, format!("the data is {} bytes long, and {min} are needed", self.len)));
        }
        Ok(())
    }
}

/// Writes `bytes` to a buffer of `room` bytes: what does not fit is left out, what is left over is cleared.
pub(crate) fn write_padded(caller: &dyn Caller, at: u64, room: u32, bytes: &[u8]) -> Answer {
    let shown = bytes.len().min(room as usize);
    if shown > 0 {
        caller.write(at, &bytes[..shown])?;
    }
    let zeros = [0; 4096];
    let mut done = shown;
    while done < room as usize {
        let now = (room as usize - done).min(zeros.len());
        caller.write(at.wrapping_add(done as u64), &zeros[..now])?;
        done += now;
    }
    Ok(())
}

/// An array of structures of a type that the caller named.
pub struct Entries<'a> {
    caller: &'a dyn Caller,
    kind: u32,
    entry_len: u32,
    count: u32,
    at: u64,
}

impl<'a> Entries<'a> {
    pub(crate) fn new(caller: &'a dyn Caller, kind: u32, entry_len: u32, count: u32, at: u64) -> Self {
        Self { caller, kind, entry_len, count, at }
    }

    /// Type of the entries.
    pub fn kind(&self) -> u32 {
        self.kind
    }

    /// How many there are.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Bytes from one to the next.
    pub fn entry_len(&self) -> u32 {
        self.entry_len
    }

    /// An entry. What the caller did not give reads as zero.
    ///
    /// # Errors
    /// `E2BIG` when it has bytes set that the structure has not; `EFAULT`; `EINVAL` behind the last.
    pub fn read<S: FromBytes + IntoBytes + Default>(&self, index: u32) -> Answer<S> {
        if index >= self.count {
            return Err(Refusal::new(Errno::INVAL, format!("there are {} entries", self.count)));
        }
        let at = self.at.wrapping_add(u64::from(index) * u64::from(self.entry_len));
        let mut value = S::default();
        let given = (self.entry_len as usize).min(size_of::<S>());
        let mut excess = vec![0; self.entry_len as usize - given];
        self.caller.read(at.wrapping_add(given as u64), &mut excess)?;
        if excess.iter().any(|byte| *byte != 0) {
            return Err(Refusal::new(Errno::TOOBIG, format!("entry {index} has bytes set that this IOMMU does not know")));
        }
        self.caller.read(at, &mut value.as_mut_bytes()[..given])?;
        Ok(value)
    }
}
