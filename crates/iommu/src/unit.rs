//! One IOMMU: the memory of its page tables, the secure world's table that it asks, its readers and its fault log.

use crate::{Device, Domain, FaultLog, IoArena, SystemRmp};
use addr::Oa;
use backing::Words;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use sync::Readers;
use thiserror::Error;

/// Table memory begins here: below the output addresses of any window, so that a table is never a DMA target.
const TABLES_AT: Oa = Oa::new(1 << 32);
/// Entries of an AMDv1 table, as a logarithm.
const TABLE_WORDS_LG2: u8 = 9;

/// Why a call failed. Nothing was changed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// Memory for tables could not be had from the host.
    #[error("{bytes:#x} bytes of address space for page tables: {source}; ask for less")]
    TableMemory {
        /// How much was asked for.
        bytes: u64,
        /// What the host said.
        source: std::io::Error,
    },
    /// No table left in the arena.
    #[error(transparent)]
    NoTable(#[from] pt::NoTable),
    /// The domain belongs to another IOMMU.
    #[error("domain {domain} belongs to another IOMMU than device '{device}'")]
    ForeignDomain {
        /// The domain.
        domain: u32,
        /// The device.
        device: Box<str>,
    },
    /// The calling thread holds a zero-copy slice of the domain, and what it asks for would wait until the slice is gone.
    #[error("this thread holds a DMA slice of domain {domain}; drop it first")]
    HeldByCaller {
        /// The domain.
        domain: u32,
    },
    /// A test made this step fail.
    #[error(transparent)]
    Injected(#[from] sync::fail::Injected),
}

/// How an [`Iommu`] is made.
#[derive(Clone, Debug)]
pub struct Config {
    /// Address space for page tables; only what is used takes memory.
    pub table_bytes: u64,
    /// Translations that each DMA context can cache, 32 bytes each.
    pub iotlb_entries: usize,
    /// Fault records that are kept.
    pub fault_records: usize,
}

impl Default for Config {
    /// 16 GiB of address space for tables: enough to map 8 TiB in 4 KiB leaves.
    fn default() -> Self {
        Self { table_bytes: 16 << 30, iotlb_entries: 16_384, fault_records: 1024 }
    }
}

/// An IOMMU that devices go through.
pub struct Iommu {
    arena: Arc<IoArena>,
    rmp: Arc<SystemRmp>,
    readers: Arc<Readers>,
    faults: FaultLog,
    iotlb_entries: usize,
    next_domain: AtomicU32,
    next_device: AtomicU32,
}

impl Iommu {
    /// An IOMMU that checks what it translates against `rmp`.
    ///
    /// # Errors
    /// [`Error::TableMemory`].
    pub fn new(config: &Config, rmp: Arc<SystemRmp>) -> Result<Arc<Self>, Error> {
        let words = usize::try_from(config.table_bytes / 8).unwrap_or(usize::MAX);
        let words = Words::new(words).map_err(|source| Error::TableMemory { bytes: config.table_bytes, source })?;
        Ok(Arc::new(Self {
            arena: IoArena::new(words, TABLES_AT, TABLE_WORDS_LG2),
            rmp,
            readers: Arc::default(),
            faults: FaultLog::new(config.fault_records),
            iotlb_entries: config.iotlb_entries,
            next_domain: AtomicU32::new(1),
            next_device: AtomicU32::new(1),
        }))
    }

    /// A new, empty domain. A fallible step, named `iommu.domain`.
    ///
    /// # Errors
    /// [`Error::NoTable`].
    pub fn domain(&self) -> Result<Arc<Domain>, Error> {
        sync::fail::step("iommu.domain")?;
        let id = self.next_domain.fetch_add(1, Ordering::Relaxed);
        Ok(Arc::new(Domain::new(id, &self.arena, &self.readers)?))
    }

    /// A new device, attached to nothing, untrusted.
    pub fn device(self: &Arc<Self>, name: &str) -> Arc<Device> {
        Arc::new(Device::new(self.next_device.fetch_add(1, Ordering::Relaxed), name, Arc::clone(self)))
    }

    /// Where page tables live.
    pub fn arena(&self) -> &Arc<IoArena> {
        &self.arena
    }

    /// The secure world's table.
    pub fn rmp(&self) -> &Arc<SystemRmp> {
        &self.rmp
    }

    /// Everyone that a grace period waits for.
    pub fn readers(&self) -> &Arc<Readers> {
        &self.readers
    }

    /// Refused accesses.
    pub fn faults(&self) -> &FaultLog {
        &self.faults
    }

    pub(crate) fn iotlb_entries(&self) -> usize {
        self.iotlb_entries
    }
}

impl fmt::Debug for Iommu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Iommu").field("arena", &self.arena).field("readers", &self.readers).finish_non_exhaustive()
    }
}
