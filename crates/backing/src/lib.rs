//! Where pages come from, and the simulated physical space they are seen in.
//!
//! - *backing*: one object that has pages: a guest_memfd, a memfd, a stretch of this process's memory, memory of
//!   somebody else (foreign), or nothing at all (simulated).
//! - *page*: 4 KiB of it, by index.
//! - *window*: the span of output addresses (OA) that a backing occupies; see [`OA_BASE`]. User space has no physical addresses, so these are ours.
//! - *frame*: 4 KiB of a window. Pages lie in frames in a row, or scattered ([`Frames`]).
//! - *state*: whether a page is shared, private, or absent ([`PageState`]). Changed only by who holds the page ([`Backing::lock`]).
//! - *pair*: a backing of two files: a page lies in one while it is shared, in the other while it is private ([`Backing::pair`]).
//! - *owner*: who has the pages of a *foreign* backing, and keeps them in place while they are pinned ([`Owner`]).
//! - *listener*: who has mapped pages and must let go of them when they leave ([`Listener`]).
//! - *punch*: pages go back to the host. *Populate*: they come back, zeroed.
//!
//! ```
//! use lockstep_backing::{Backing, Frames, PageState, Windows};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let backing = Backing::memfd(4 << 20, Frames::Contiguous)?;
//! let page = backing.pages().start();
//! let oa = backing.oa(page);
//! let host = Windows::find(oa).and_then(|found| found.host(oa, 4096)).ok_or("mapped")?;
//! host.write(16, b"hello")?;
//! backing.punch(addr::Span::one(page))?;
//! assert_eq!(backing.state(page), PageState::Absent);
//! # Ok(())
//! # }
//! ```

mod backing;
mod error;
mod file;
mod frames;
mod guard;
mod name;
mod owner;
mod pair;
mod raw;
mod recheck;
mod reservation;
mod revoke;
mod slots;
mod states;
mod user;
mod window;

pub use backing::{Backing, BackingId, HostSpace, Kind};
pub use error::{Error, RestoreError};
pub use file::{file_kind, file_words};
pub use frames::{Frames, Layout};
pub use guard::SpanGuard;
pub use name::PageName;
pub use owner::{Owner, PinError};
pub use raw::{CopyFault, HostAddr, Words};
pub use recheck::Recheck;
pub use revoke::Listener;
pub use states::{PageState, Runs};
pub use user::UserRegion;
pub use window::{OA_BASE, OA_LAST, Windows};

// Offsets in bytes become pointers' offsets all over this crate.
const _: () = assert!(usize::BITS == 64);
