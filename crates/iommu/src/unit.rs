//! One IOMMU: the memory of its page tables, the secure world's table that it asks, its readers and its fault log.

use crate::{Device, Domain, DomainConfig, FaultLog, IoArena, SystemRmp};
use addr::Oa;
use backing::Words;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use sync::Readers;
use thiserror::Error;

/// Table memory begins here: below the output addresses of any window, so that a table is never a DMA target.
const TABLES_AT: Oa = Oa::new(1 << 32);
/// Entries of a table, as a logarithm: the same in every format that a domain can have.
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
    /// A request that the device's interface does not take as it stands.
    #[error("{request} is not for an interface in {state}, {}", match .bound { Some(asid) => format!("bound to ASID {asid}"), None => "bound to no guest".into() })]
    Interface {
        /// The request.
        request: &'static str,
        /// Where the interface stands.
        state: crate::Tdisp,
        /// The guest that it is bound to.
        bound: Option<u32>,
    },
    /// START_INTERFACE without the number that LOCK_INTERFACE answered.
    #[error("the nonce is not the one that LOCK_INTERFACE answered")]
    Nonce,
    /// An ASID that no RMP entry can hold for a guest.
    #[error("no guest has ASID {asid:#x}; there are 1 to 0x3fe")]
    Asid {
        /// What was asked for.
        asid: u32,
    },
    /// Firmware does not take a secure device table entry.
    #[error("firmware refuses the secure device table entry: {status:?}")]
    Sdte {
        /// What it answers to the guest.
        status: crate::SdteStatus,
    },
    /// A domain was to have leaf sizes of which its format has none.
    #[error("format {format} has no leaf size in {:#x}; its sizes are {:#x}", .sizes.0, .format.sizes().0)]
    NoSizes {
        /// The format.
        format: pt::FormatKind,
        /// The sizes that were asked for.
        sizes: addr::SizeSet,
    },
    /// A domain was to translate addresses that its format cannot.
    #[error("format {format} translates {} and nothing of {aperture}", .format.aperture())]
    NoAperture {
        /// The format.
        format: pt::FormatKind,
        /// The addresses that were asked for.
        aperture: addr::Span<addr::Iova>,
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
    /// Tables that each DMA context can cache so as to begin walks at them, 16 bytes each: what hardware calls paging-structure caches, page directory
    /// caches or walk caches. None when 0, as by default: the top of a tree is in the processor's own cache, so a walk of three or four
    /// levels costs about as much as looking for its end. A cache makes sense for trees of five levels, and for tests, which see with it what
    /// hardware would do.
    pub walk_cache_entries: usize,
    /// Fault records that are kept.
    pub fault_records: usize,
    /// How long a device may take to answer an invalidation of its translation cache; then it is quarantined.
    pub ats_timeout: Duration,
    /// What a domain is whose maker does not say otherwise ([`Iommu::domain`]).
    pub domain: DomainConfig,
}

impl Default for Config {
    /// 16 GiB of address space for tables: enough to map 8 TiB in 4 KiB leaves.
    fn default() -> Self {
        Self {
            table_bytes: 16 << 30,
            iotlb_entries: 16_384,
            walk_cache_entries: 0,
            fault_records: 1024,
            ats_timeout: Duration::from_millis(100),
            domain: DomainConfig::default(),
        }
    }
}

/// An IOMMU that devices go through.
pub struct Iommu {
    arena: Arc<IoArena>,
    rmp: Arc<SystemRmp>,
    readers: Arc<Readers>,
    faults: FaultLog,
    iotlb_entries: usize,
    walk_cache_entries: usize,
    ats_timeout: Duration,
    domain: DomainConfig,
    /// Of domains, and of everything else that guards are told apart by.
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
            walk_cache_entries: config.walk_cache_entries,
            ats_timeout: config.ats_timeout,
            domain: config.domain,
            next_domain: AtomicU32::new(1),
            next_device: AtomicU32::new(1),
        }))
    }

    /// A new, empty domain as [`Config::domain`] has it: AMDv1, with all that it offers, if that says nothing else. A fallible step, named
    /// `iommu.domain`.
    ///
    /// # Errors
    /// [`Error::NoTable`]; those of [`Iommu::domain_with`] when the configuration's limits leave nothing of its format.
    pub fn domain(&self) -> Result<Arc<Domain>, Error> {
        self.domain_with(&self.domain)
    }

    /// A new, empty domain of a format and with limits of the caller's choice. The same fallible step.
    ///
    /// # Errors
    /// [`Error::NoTable`]; [`Error::NoSizes`], [`Error::NoAperture`] when the limits leave nothing of the format.
    pub fn domain_with(&self, config: &DomainConfig) -> Result<Arc<Domain>, Error> {
        sync::fail::step("iommu.domain")?;
        Ok(Arc::new(Domain::new(self.unique_id(), config, &self.arena, &self.readers)?))
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

    /// A number that no guard was told apart by before.
    pub(crate) fn unique_id(&self) -> u32 {
        self.next_domain.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn ats_timeout(&self) -> Duration {
        self.ats_timeout
    }

    pub(crate) fn walk_cache_entries(&self) -> usize {
        self.walk_cache_entries
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
