//! Page tables of devices: over an IOAS, made by HWPT_ALLOC or by an attachment, and users' own on top of those.

mod alloc;

pub(crate) use alloc::{PagingWanted, alloc};

use crate::device::lock;
use crate::driver::Nested;
use crate::fault::FaultQueue;
use crate::object::{Head, Held, Object, no_such};
use crate::viommu::ViommuObject;
use crate::{Answer, Context, IoasObject};
use iommu::Domain;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// A page table with an id.
pub struct Hwpt {
    head: Head,
    /// The order in which they were made; ids are used again.
    number: u64,
    unit: u32,
    takes_pasids: bool,
    table: Table,
    fault: Mutex<Option<Held<FaultQueue>>>,
}

enum Table {
    Paging(Paging),
    Nested(OnTop),
}

/// Shows an IOAS.
struct Paging {
    ioas: Arc<IoasObject>,
    keeps: Mutex<Option<Held<IoasObject>>>,
    domain: Arc<Domain>,
    nest_parent: bool,
    notes_dirty: bool,
    auto: bool,
}

/// The user's own.
struct OnTop {
    table: Arc<dyn Nested>,
    parent: Arc<Hwpt>,
    viommu: Option<Arc<ViommuObject>>,
    keeps: Mutex<Option<Below>>,
}

/// What a nested table needs for long.
#[expect(dead_code, reason = "held, not read")]
enum Below {
    Table(Held<Hwpt>),
    Viommu(Held<ViommuObject>),
}

static NUMBERS: AtomicU64 = AtomicU64::new(0);

impl Hwpt {
    fn new(unit: u32, takes_pasids: bool, table: Table) -> Arc<Self> {
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        Arc::new(Self { head: Head::default(), number, unit, takes_pasids, table, fault: Mutex::default() })
    }

    /// Its id.
    pub fn id(&self) -> u32 {
        self.head.id()
    }

    /// The IOMMU that it belongs to.
    pub fn unit(&self) -> u32 {
        self.unit
    }

    /// The domain that shows its IOAS to devices; `None` when it is a user's own.
    pub fn domain(&self) -> Option<&Arc<Domain>> {
        self.paging().map(|paging| &paging.domain)
    }

    /// The user's own table, if it is one.
    pub fn nested(&self) -> Option<&Arc<dyn Nested>> {
        match &self.table {
            Table::Paging(_) => None,
            Table::Nested(own) => Some(&own.table),
        }
    }

    /// The virtual IOMMU that it was made on.
    pub fn viommu(&self) -> Option<&Arc<ViommuObject>> {
        match &self.table {
            Table::Paging(_) => None,
            Table::Nested(own) => own.viommu.as_ref(),
        }
    }

    /// The IOAS that it shows, or that its parent shows.
    pub fn ioas(&self) -> &Arc<IoasObject> {
        match &self.table {
            Table::Paging(paging) => &paging.ioas,
            Table::Nested(own) => own.parent.ioas(),
        }
    }

    /// Whether it can be a parent.
    pub fn is_nest_parent(&self) -> bool {
        self.paging().is_some_and(|paging| paging.nest_parent)
    }

    /// Whether it was made to track dirty pages.
    pub fn notes_dirty(&self) -> bool {
        self.paging().is_some_and(|paging| paging.notes_dirty)
    }

    /// Whether it was made for PASIDs.
    pub fn takes_pasids(&self) -> bool {
        self.takes_pasids
    }

    /// Whether an attachment made it, so that it goes with the last one.
    pub fn is_auto(&self) -> bool {
        self.paging().is_some_and(|paging| paging.auto)
    }

    /// Where page requests of devices on it go.
    pub fn fault_queue(&self) -> Option<Arc<FaultQueue>> {
        lock(&self.fault).as_deref().map(Arc::clone)
    }

    /// Nobody is there any more who could do something with an answer.
    pub(crate) fn answer_faults(&self, handles: impl Iterator<Item = u64>) {
        if let Some(queue) = self.fault_queue() {
            handles.for_each(|handle| queue.forget(handle));
        }
    }

    fn paging(&self) -> Option<&Paging> {
        match &self.table {
            Table::Paging(paging) => Some(paging),
            Table::Nested(_) => None,
        }
    }
}

impl Object for Hwpt {
    fn head(&self) -> &Head {
        &self.head
    }

    fn kind(&self) -> &'static str {
        "page table"
    }

    fn destroy(&self, _: &Context) {
        match &self.table {
            Table::Paging(paging) => {
                // Refused only when it is not there, or when this thread is in the middle of a DMA.
                let _ = paging.ioas.ioas().detach(&paging.domain);
                drop(lock(&paging.keeps).take());
            }
            Table::Nested(own) => drop(lock(&own.keeps).take()),
        }
        drop(lock(&self.fault).take());
    }
}

impl fmt::Debug for Hwpt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hwpt")
            .field("id", &self.id())
            .field("domain", &self.domain())
            .field("nested", &self.nested())
            .finish_non_exhaustive()
    }
}

impl Context {
    /// The object `id`, whatever it is.
    ///
    /// # Errors
    /// `ENOENT`.
    pub(crate) fn any(&self, id: u32) -> Answer<Arc<dyn Object>> {
        sync::fail::step("iommufd.lookup")?;
        self.find(id).ok_or_else(|| no_such(id, "object"))
    }

    /// The page table `id`, whatever its kind.
    ///
    /// # Errors
    /// `ENOENT`.
    pub fn hwpt(&self, id: u32) -> Answer<Arc<Hwpt>> {
        self.get(id, "page table")
    }

    /// The page table `id` and its domain, if it shows an IOAS.
    ///
    /// # Errors
    /// `ENOENT`.
    pub(crate) fn paging(&self, id: u32) -> Answer<(Arc<Hwpt>, Arc<Domain>)> {
        let table = self.hwpt(id)?;
        let domain = table.domain().map(Arc::clone).ok_or_else(|| no_such(id, "page table of an IOAS"))?;
        Ok((table, domain))
    }

    /// The tables that attachments have made for an IOAS, oldest first (rule 8).
    pub(crate) fn auto_tables(&self, ioas: &Arc<IoasObject>) -> Vec<Arc<Hwpt>> {
        let mut tables = self.all::<Hwpt>();
        tables.retain(|table| table.is_auto() && Arc::ptr_eq(table.ioas(), ioas));
        tables.sort_by_key(|table| table.number);
        tables
    }
}
