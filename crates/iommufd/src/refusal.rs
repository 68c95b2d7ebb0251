//! An errno, and the reason in words for whoever asks (`--explain`). Made on hot paths, so words are put together only when shown.

use rustix::io::Errno;
use std::fmt;

/// What a call answers.
pub type Answer<T = ()> = Result<T, Refusal>;

/// Why a call was refused.
#[derive(Debug)]
pub struct Refusal {
    /// What the client gets.
    pub errno: Errno,
    /// Whether the structure is written back all the same: some calls report how far they came.
    pub(crate) writes_back: bool,
    why: Why,
}

#[derive(Debug)]
enum Why {
    Static(&'static str),
    Text(Box<str>),
    Ioas(Box<ioas::Error>),
    Backing(Box<backing::Error>),
}

impl Refusal {
    /// With words made for this case.
    #[cold]
    pub fn new(errno: Errno, why: String) -> Self {
        Self { errno, writes_back: false, why: Why::Text(why.into()) }
    }

    /// With words that are always the same.
    pub const fn of(errno: Errno, why: &'static str) -> Self {
        Self { errno, writes_back: false, why: Why::Static(why) }
    }

    /// The structure goes back to the client with what was done so far.
    pub(crate) fn and_write_back(mut self) -> Self {
        self.writes_back = true;
        self
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.why {
            Why::Static(text) => f.write_str(text),
            Why::Text(text) => f.write_str(text),
            Why::Ioas(error) => error.fmt(f),
            Why::Backing(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for Refusal {}

impl From<ioas::Error> for Refusal {
    fn from(error: ioas::Error) -> Self {
        Self { errno: errno_of(&error), writes_back: false, why: Why::Ioas(Box::new(error)) }
    }
}

impl From<backing::Error> for Refusal {
    fn from(error: backing::Error) -> Self {
        let errno = match &error {
            backing::Error::Os { source, .. } => Errno::from_io_error(source).unwrap_or(Errno::IO),
            backing::Error::NoOutputAddresses { .. } | backing::Error::OutOfMemory(_) | backing::Error::Injected(_) => Errno::NOMEM,
            _ => Errno::INVAL,
        };
        Self { errno, writes_back: false, why: Why::Backing(Box::new(error)) }
    }
}

impl From<iommu::Error> for Refusal {
    fn from(error: iommu::Error) -> Self {
        ioas::Error::from(error).into()
    }
}

impl From<addr::OutOfMemory> for Refusal {
    fn from(_: addr::OutOfMemory) -> Self {
        Self::of(Errno::NOMEM, "no memory")
    }
}

impl From<sync::fail::Injected> for Refusal {
    fn from(_: sync::fail::Injected) -> Self {
        Self::of(Errno::NOMEM, "a fault that was asked for")
    }
}

/// The kernel's errno for what an IOAS refuses. This is the only place where they are chosen.
fn errno_of(error: &ioas::Error) -> Errno {
    use addr::SpanError;
    use backing::PinError;
    use ioas::Error;
    match error {
        Error::Span(SpanError::Wraps { .. }) | Error::TooLong { .. } => Errno::OVERFLOW,
        Error::NotMapped { .. } | Error::CutsArea { .. } | Error::Homeless => Errno::NOENT,
        Error::Occupied { .. } => Errno::EXIST,
        Error::NoRoom { .. } => Errno::NOSPC,
        Error::ReadOnlyPages { .. } | Error::Denied { .. } | Error::NotShared { .. } => Errno::PERM,
        Error::Busy { .. } | Error::Attached { .. } | Error::HeldByCaller { .. } => Errno::BUSY,
        Error::InUse { .. } => Errno::ADDRINUSE,
        Error::Deadlock { .. } => Errno::DEADLK,
        Error::Fault { .. } | Error::NoSuchHva { .. } | Error::Pin(PinError::Fault { .. }) => Errno::FAULT,
        Error::Pin(PinError::NoMemory { .. } | PinError::Limit { .. } | PinError::Injected(_)) => Errno::NOMEM,
        Error::Leaf(pt::MapError::Perm { .. }) => Errno::OPNOTSUPP,
        Error::Leaf(_) | Error::Iommu(_) | Error::OutOfMemory(_) | Error::Injected(_) => Errno::NOMEM,
        _ => Errno::INVAL,
    }
}
