//! The secure world's tables, as far as software can hold them: the RMP of AMD SEV-SNP, modelled entry by entry.
//!
//! No user program can own a real RMP, so this one is a model. What the documents fix is kept exactly: the 16-byte entry, the checks of
//! each instruction with their order and codes, the page states, the order of the access checks. Where documents are silent or in
//! dispute the stricter reading is taken and the place says so.
//!
//! The words used here:
//!
//! - *assigned*: owned by a guest or by firmware. Everything else is *hypervisor owned*: shared, in the words of the other crates.
//! - *entry*: 16 bytes per 4 KiB page, [`RawEntry`]. A *2 MiB entry* is the entry of a 2 MiB aligned page with its size bit set; it speaks for
//!   all 512 pages, whose own entries then only say "assigned".
//! - *group*: the 512 pages of one 2 MiB block. Writers exclude each other per group; readers never wait.
//! - *segment*: a stretch of output addresses that the table covers. An address outside every segment is hypervisor owned for ever.
//! - *summary*: how many pages of a 2 MiB or 1 GiB block are assigned, so that a large shared leaf is checked in one load.
//! - *smash*: splitting a 2 MiB entry in 512 that say the same (PSMASH).
//! - *whole leaf*: a check is about everything that an IO page table leaf spans, never only about the bytes of one access; unless the table was told to judge
//!   page by page ([`Rmp::set_by_page`]), or the device names output addresses itself ([`Rmp::check_translated`]).
//!
//! ```
//! use addr::{Gpa, Oa, Span};
//! use core::sync::atomic::AtomicU64;
//! use lockstep_secure::{Access, Requester, Rmp, RmpSize, RmpState};
//!
//! let span = Span::from_len(Oa::new(0x4000_0000), 0x40_0000).unwrap();
//! let words: Box<[AtomicU64]> = (0..Rmp::<Box<[AtomicU64]>>::words_for(span)).map(|_| AtomicU64::new(0)).collect();
//! let rmp = Rmp::new();
//! rmp.add_segment(span, words).unwrap();
//!
//! let page = Oa::new(0x4000_3000);
//! let leaf = Span::block(page, 12);
//! assert!(rmp.check_device(Requester::Untrusted, leaf, Gpa::new(0), Access::Write).is_ok());
//! rmp.rmpupdate(page, RmpState::private(Gpa::new(0x8000), RmpSize::K4, 5)).unwrap();
//! assert!(rmp.check_device(Requester::Untrusted, leaf, Gpa::new(0), Access::Write).is_err());
//! ```

#![no_std]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod audit;
mod check;
mod code;
mod directory;
mod entry;
mod firmware;
mod guest;
mod insn;
mod refusal;
mod rmp;
mod segment;
mod shared;
mod state;
mod translated;

pub use audit::SummaryError;
pub use check::{Access, Cpu, Requester};
pub use code::{Attributes, Code, Pvalidate, PvalidateError, RmpState, RmpadjustError, Validated, npf};
pub use directory::{MAX_SEGMENTS, SegmentError};
pub use entry::{Perms, Q1, Q2, RawEntry, RmpRead, RmpSize, Vmpl};
pub use firmware::FirmwareError;
pub use refusal::{Delivery, Reason, Refusal};
pub use rmp::Rmp;
pub use state::{Command, PageState};
