//! Guest memory for device DMA, private and shared, kept in lockstep: what a VMM that assigns devices to confidential guests links.
//!
//! [`GuestDma`] takes memslots, devices and conversions. Behind it an IOMMU in user space maps `{guest_memfd, offset}` into IO page tables in a
//! real hardware format, and one transaction changes KVM, the RMP and every IO page table in the only safe order. [`kvm`] is the link to
//! `/dev/kvm`.
//!
//! What is real and what is modelled: KVM, guest_memfd, the bytes, the page-table format and the order are real; system physical addresses,
//! the RMP and trusted DMA are modelled, because no user program can have them.

mod guest_dma;
pub mod kvm;
mod merger;
mod requests;
mod stage2;
mod tio;

pub use convert::{AuditReport, Borders, Change, ConvertError, Difference, Owner, Policy, Reading, RecordedStage2, Stage2, Step};
pub use guest_dma::{Config, Error, GuestDma};
pub use iommu::{AtsDma, AtsStats, Device, Dma, EngineDevice, Fault, Nonce, Sdte, SdteStatus, Tdisp, Trust};
pub use merger::{Merger, MergerStats, Pace};
pub use requests::NO_UPDATE;
pub use stage2::KvmStage2;
pub use tio::{SDTE_WRITE_BYTES, SDTE_WRITTEN_BYTES};
