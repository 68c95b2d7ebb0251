//! What a descriptor of ours can do. A front gives descriptors to its clients and calls these; everything that is not answered here is the
//! front's business: dup, fork, passing over sockets, and when the last one is closed.

use crate::{Answer, Caller, Refusal};
use rustix::io::Errno;
use std::any::Any;
use std::fmt;
use std::sync::{Mutex, PoisonError};

/// A mmap that a client asks for.
#[derive(Clone, Copy, Debug)]
pub struct Mmap {
    /// Bytes.
    pub len: u64,
    /// PROT_ bits.
    pub prot: u32,
    /// MAP_ bits.
    pub flags: u32,
    /// Byte of the file.
    pub offset: u64,
}

/// An open file of ours. Any thread may call.
pub trait File: Any + Send + Sync + fmt::Debug {
    /// What it is, for traces: "iommufd", "fault queue".
    fn kind(&self) -> &'static str;

    /// An ioctl. `arg` is whatever the client passed, mostly an address of its own.
    ///
    /// # Errors
    /// `ENOTTY` for what it does not know, and each command's own.
    fn ioctl(&self, caller: &dyn Caller, command: u32, arg: u64) -> Answer<i64> {
        let _ = (caller, arg);
        Err(Refusal::new(Errno::NOTTY, format!("{} has no ioctl {command:#x}", self.kind())))
    }

    /// read, or with `at` pread. Never blocks.
    ///
    /// # Errors
    /// `EINVAL` for what cannot be read, and each file's own.
    fn read(&self, caller: &dyn Caller, count: usize, at: Option<u64>) -> Answer<Vec<u8>> {
        let _ = (caller, count, at);
        Err(Refusal::new(Errno::INVAL, format!("{} cannot be read", self.kind())))
    }

    /// write, or with `at` pwrite. Answers how much was taken.
    ///
    /// # Errors
    /// `EINVAL` for what cannot be written, and each file's own.
    fn write(&self, caller: &dyn Caller, data: &[u8], at: Option<u64>) -> Answer<usize> {
        let _ = (caller, data, at);
        Err(Refusal::new(Errno::INVAL, format!("{} cannot be written", self.kind())))
    }

    /// Whether the client may map this much of it. When it may, the mapping shows the memory of [`Caller::shared`].
    ///
    /// # Errors
    /// `ENODEV` for what cannot be mapped, and each file's own.
    fn mmap(&self, caller: &dyn Caller, wanted: &Mmap) -> Answer {
        let _ = (caller, wanted);
        Err(Refusal::new(Errno::NODEV, format!("{} cannot be mapped", self.kind())))
    }

    /// What poll waits for, for files that are polled.
    fn ready(&self) -> Option<&Ready> {
        None
    }

    /// The last descriptor is gone, in every process; no more calls come. Cannot fail.
    fn released(&self) {}
}

impl dyn File {
    /// The file as what it is.
    pub fn downcast<T: File>(&self) -> Option<&T> {
        (self as &dyn Any).downcast_ref()
    }
}

type Tell = Box<dyn FnMut(bool) + Send>;

/// Whether there is something to read. The front learns of each change, so that its clients' poll wakes up.
#[derive(Default)]
pub struct Ready(Mutex<(bool, Option<Tell>)>);

impl Ready {
    /// Notes whether something can be read now; tells the front when that is new.
    pub fn set(&self, readable: bool) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (now, tell) = &mut *state;
        if std::mem::replace(now, readable) != readable
            && let Some(tell) = tell
        {
            tell(readable);
        }
    }

    /// Whether something can be read.
    pub fn get(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    /// `tell` is called with the present state, and then with each new one, under a lock: it must not call back.
    pub fn connect(&self, mut tell: impl FnMut(bool) + Send + 'static) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tell(state.0);
        state.1 = Some(Box::new(tell));
    }
}

impl fmt::Debug for Ready {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ready({})", self.get())
    }
}
