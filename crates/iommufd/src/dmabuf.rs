//! Buffers of devices, as files that can be mapped (rule 23). Only mock ones exist: the test operations make them.

use crate::{Answer, File, Memory, Refusal};
use backing::{Backing, Frames};
use rustix::io::Errno;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A device's buffer.
#[derive(Debug)]
pub struct DmaBuf {
    state: Mutex<State>,
    len: u64,
}

#[derive(Debug)]
struct State {
    /// Another one after each revocation: mappings of the old one never come back.
    backing: Arc<Backing>,
    revoked: bool,
}

impl DmaBuf {
    /// A buffer of whole pages.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn new(len_bytes: u64) -> Answer<Arc<Self>> {
        let backing = Backing::simulated(len_bytes, Frames::Contiguous)?;
        Ok(Arc::new(Self { state: Mutex::new(State { backing, revoked: false }), len: len_bytes }))
    }

    /// Takes the buffer away, or allows new mappings again. Mappings that there are lose their leaves either way, for good.
    ///
    /// # Errors
    /// `ENOMEM`; nothing has changed then.
    pub fn set_revoked(&self, revoked: bool) -> Answer {
        let fresh = Backing::simulated(self.len, Frames::Contiguous)?;
        let old = {
            let mut state = self.lock();
            state.revoked = revoked;
            std::mem::replace(&mut state.backing, fresh)
        };
        old.close();
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl File for DmaBuf {
    fn kind(&self) -> &'static str {
        "dma-buf"
    }
}

/// What of our own files can be mapped.
pub(crate) fn memory(file: &dyn File, start: u64, len: u64) -> Answer<Memory> {
    let Some(buffer) = file.downcast::<DmaBuf>() else {
        return Err(Refusal::new(Errno::INVAL, format!("{} has no memory that could be mapped", file.kind())));
    };
    if start.checked_add(len).is_none_or(|end| end > buffer.len) {
        return Err(Refusal::new(Errno::INVAL, format!("the buffer is {:#x} bytes long", buffer.len)));
    }
    let state = buffer.lock();
    if state.revoked {
        return Err(Refusal::of(Errno::NODEV, "the device has taken the buffer away"));
    }
    Ok(Memory { backing: Arc::clone(&state.backing), offset: start })
}
