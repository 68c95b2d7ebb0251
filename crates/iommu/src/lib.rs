//! A software IOMMU: domains that translate, devices that are attached to them, and DMA that asks both the page table and the secure world.
//!
//! - *domain*: one IO page table and its invalidation log. *Device*: an identity, attached to at most one domain.
//! - *context* ([`Dma`]): one thread's DMA for one device, with an IOTLB of its own. Nothing it does waits for anyone (I-15).
//! - *descriptor*: one call of a context. It enters a read guard, translates, asks the secure world about the whole leaf, copies, leaves; at
//!   most 64 KiB at a time (D-2).
//! - *flush*: log what was cleared, wait for the guards that were open, release. When it returns, nothing stale is in use.
//! - *port* ([`AtsDma`]): a device's own translation cache (PCIe ATS). A flush also waits until it has answered, and a device that does not is
//!   quarantined.
//! - *fault*: a refused access; says which table refused and why.
//!
//! What is modelled: the trust of a device (T=0, T=1) and the secure world's answer. What is real: the page-table format, the bytes, the order
//! of things.

mod ats;
mod config;
mod context;
mod device;
mod dma;
mod domain;
pub mod engine;
mod far;
mod fault;
mod queue;
mod slice;
mod tdisp;
mod unit;

pub use ::iotlb::{Hit, Iotlb, IotlbStats};
pub use ats::{AtsDma, AtsStats};
pub use config::DomainConfig;
pub use device::{Device, Trust};
pub use dma::{CHUNK_BYTES, Dma, DmaStats, Translation};
pub use domain::{Domain, FlushStats};
pub use engine::EngineDevice;
pub use fault::{Access, Fault, FaultKind, FaultLog, KindCounters, RefusedBy};
pub use queue::{Descriptor, OnFault};
pub use slice::{DmaSlice, SliceError};
pub use tdisp::{Nonce, Sdte, SdteStatus, Tdisp};
pub use unit::{Config, Error, Iommu};

/// A domain's page table. Its format is chosen with the domain; AMDv1, what AMD's IOMMU reads for untranslated host memory, is the only one
/// that SNP allows.
pub type IoTable = pt::AnyTable<backing::Words>;
/// The memory of all page tables of an [`Iommu`].
pub type IoArena = pt::Arena<backing::Words>;
/// The reverse map that an [`Iommu`] asks.
pub type SystemRmp = secure::Rmp<backing::Words>;
