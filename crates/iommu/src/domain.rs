//! A domain: one IO page table, and what makes an unmap from it a promise.
//!
//! The order is always the same: clear the entries, log their spans, wait for the grace period, release tables and pages (D-2, I-4). The
//! caller does the first, [`Domain::flush`] the rest.

use crate::ats::{Members, Port};
use crate::{DomainConfig, Error, IoArena, IoTable};
use addr::{Iova, Lg2, Oa, SizeSet, Span};
use backing::Words;
use iotlb::{Log, Logged};
use pt::{FormatKind, Gather, NoTable, Stock};
use std::fmt;
use std::sync::Arc;
use sync::prim::atomic::{AtomicBool, AtomicU64, Ordering};
use sync::shard::Sharded;
use sync::{Readers, fail};

/// An IO page table that devices can be attached to.
pub struct Domain {
    id: u32,
    table: IoTable,
    format: FormatKind,
    sizes: SizeSet,
    smallest: Lg2,
    aperture: Span<Iova>,
    can_track_dirty: bool,
    log: Log,
    /// Translation caches in devices.
    ports: Members,
    readers: Arc<Readers>,
    dirty: AtomicBool,
    /// Grace periods that were waited for.
    graces: Sharded<AtomicU64>,
}

/// What a domain's edits cost its readers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlushStats {
    /// Spans that were logged for invalidation, of leaves and of tables.
    pub spans: u64,
    /// Grace periods that were waited for.
    pub graces: u64,
}

impl Domain {
    pub(crate) fn new(id: u32, config: &DomainConfig, arena: &Arc<IoArena>, readers: &Arc<Readers>) -> Result<Self, Error> {
        let format = config.format;
        let (sizes, aperture) = config.limits()?;
        Ok(Self {
            id,
            table: IoTable::new(format, Arc::clone(arena))?,
            format,
            sizes,
            smallest: sizes.smallest().unwrap_or(format.granule()),
            aperture,
            can_track_dirty: config.tracks_dirty && format.dirty_bit() != 0,
            log: Log::new(),
            ports: Members::default(),
            readers: Arc::clone(readers),
            dirty: AtomicBool::new(false),
            graces: Sharded::default(),
        })
    }

    /// Its number, unique in the IOMMU and never used again.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The page table.
    #[inline]
    pub fn table(&self) -> &IoTable {
        &self.table
    }

    /// The format of its page table.
    #[inline]
    pub fn format(&self) -> FormatKind {
        self.format
    }

    /// The leaf sizes that may be used: the format's, as far as the domain was made with them. Whoever maps, cuts or merges keeps to them.
    #[inline]
    pub fn sizes(&self) -> SizeSet {
        self.sizes
    }

    /// The smallest of them: what mappings are multiples of.
    #[inline]
    pub fn smallest(&self) -> Lg2 {
        self.smallest
    }

    /// The IOVAs that it translates. Whoever maps keeps to them.
    pub fn aperture(&self) -> Span<Iova> {
        self.aperture
    }

    /// Whether [`Domain::track_dirty`] has an effect.
    pub fn can_track_dirty(&self) -> bool {
        self.can_track_dirty
    }

    /// Ends an edit: logs what was cleared, waits until nobody uses it any more, frees the tables. When this returns no DMA through
    /// the old mappings is in flight, and none will be. Does not allocate and cannot fail (I-9).
    ///
    /// # Panics
    /// When the calling thread holds a zero-copy slice of this domain; ask [`Domain::held_by_caller`] before clearing anything.
    pub fn flush(&self, gather: Gather) {
        gather.finish(self.table.arena(), |gather| {
            self.invalidate(gather);
            self.wait();
        });
    }

    /// The first half of [`Domain::flush`], for an edit over several domains: log in all of them, then wait in all of them. Contexts forget what they
    /// have cached of leaves and tables that went; devices with caches of their own are told of the leaves.
    pub fn invalidate(&self, gather: &Gather) {
        // Most edits take no table out, and pay for none.
        if gather.retires_tables() {
            self.tell(|log| log.append_with_tables(gather.spans(), gather.tables()));
        } else {
            self.tell(|log| log.append(gather.spans()));
        }
    }

    #[inline(always)]
    fn tell(&self, append: impl FnOnce(&Log) -> u64) {
        if fail::planted("iommu.skip_invalidate") {
            return;
        }
        append(&self.log);
        if !self.ports.is_empty() {
            self.ports.send(&self.log);
        }
    }

    /// The second half of [`Domain::flush`]: until every guard that was open is left, and every device with a translation cache has answered or is
    /// quarantined. Then finish the gather with a closure that does nothing.
    ///
    /// # Panics
    /// As [`Domain::flush`].
    pub fn wait(&self) {
        if fail::planted("iommu.skip_grace") {
            return;
        }
        self.readers.grace(self.id);
        self.graces.mine().fetch_add(1, Ordering::Relaxed);
        if !self.ports.is_empty() {
            self.ports.settle(self.id, &self.log);
        }
    }

    /// Cuts leaves so that `span`, which the caller holds, has borders of its own: [`pt::Table::cut`]. Where the format needs break-before-make
    /// each cut is a flush: DMA to all of a leaf that is cut faults for that moment, and [`pt::Table::breaks`] counts.
    ///
    /// # Errors
    /// No table. Every translation is as before.
    ///
    /// # Panics
    /// As [`Domain::flush`], in such a format.
    pub fn cut(&self, span: Span<Iova>, sizes: SizeSet, stock: &mut Stock<Words>) -> Result<u32, NoTable> {
        self.table.cut(span, sizes, stock, |broken| self.flush_now(broken, None))
    }

    /// Joins leaves inside `span`, all of which the caller holds until it has flushed `gather`: [`pt::Table::merge`]. Where the format needs
    /// break-before-make nothing is joined: a larger leaf is not worth the DMA that would fault meanwhile.
    pub fn merge(&self, span: Span<Iova>, sizes: SizeSet, gather: &mut Gather) -> u32 {
        if self.format.hitless().is_allowed() {
            self.table.merge(span, sizes, gather, |broken| self.flush_now(broken, Some(broken)))
        } else {
            0
        }
    }

    fn flush_now(&self, span: Span<Iova>, tables: Option<Span<Iova>>) {
        self.tell(|log| log.append_with_tables(std::iter::once(span), tables.into_iter()));
        self.wait();
    }

    /// Whether the calling thread holds a zero-copy slice of this domain, so that unmapping would wait for itself.
    pub fn held_by_caller(&self) -> bool {
        self.readers.held_by_caller(self.id)
    }

    /// From now on writes mark their leaves dirty, or no longer do. A domain that cannot ([`Domain::can_track_dirty`]) never does.
    pub fn track_dirty(&self, on: bool) {
        self.dirty.store(on && self.can_track_dirty, Ordering::Release);
        // After the grace period every write is one that knows. Devices that translated for a write before have to ask again.
        self.readers.grace(self.id);
        if !self.ports.is_empty() {
            self.flush_now(Span::whole(), None);
        }
    }

    /// Whether writes mark their leaves dirty.
    #[inline]
    pub fn tracks_dirty(&self) -> bool {
        self.dirty.load(Ordering::Acquire)
    }

    /// Spans logged and grace periods waited for so far.
    pub fn flush_stats(&self) -> FlushStats {
        FlushStats { spans: self.log.head(), graces: self.graces.all().map(|graces| graces.load(Ordering::Relaxed)).sum() }
    }

    /// Shows what devices have translated of `span` in caches of their own and may still use: the device's number, the part, and where it leads.
    /// For audits; waits for transactions that are under way.
    pub fn each_cached_by_devices(&self, span: Span<Iova>, show: impl FnMut(u32, Span<Iova>, Oa)) {
        if !self.ports.is_empty() {
            self.ports.each_cached(span, show);
        }
    }

    pub(crate) fn join(&self, port: &Arc<Port>) {
        self.ports.join(port, &self.log);
    }

    pub(crate) fn leave(&self, port: &Arc<Port>) {
        self.ports.leave(port);
    }

    pub(crate) fn belongs_to(&self, readers: &Arc<Readers>) -> bool {
        Arc::ptr_eq(&self.readers, readers)
    }
}

impl Logged for Domain {
    #[inline]
    fn id(&self) -> u32 {
        self.id
    }

    #[inline]
    fn log(&self) -> &Log {
        &self.log
    }
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Domain")
            .field("id", &self.id)
            .field("format", &self.format)
            .field("flushes", &self.flush_stats())
            .finish_non_exhaustive()
    }
}
