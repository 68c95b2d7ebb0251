//! One open of /dev/iommu: a table of objects, and the dispatcher in front of it.

use crate::guests::Guest;
use crate::ioas_ops::IoasObject;
use crate::object::Table;
use crate::table::{self, Ioctl, Reply, Target};
use crate::{Answer, Caller, File, Host, Mmap, Refusal, ioctls, mmap};
use addr::{Iova, Span};
use rustix::io::Errno;
use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};

/// One open of /dev/iommu.
///
/// Locks, in this order: `attaching` (who is attached to what), the locks of the IOASes, `objects` (never held while an object is destroyed).
pub struct Context {
    own: Weak<Self>,
    host: Arc<Host>,
    objects: Mutex<Table>,
    /// Serialises attach, replace, detach and the making of page tables, and whoever must see all of that stand still.
    pub(crate) attaching: Mutex<()>,
    /// Read by maps, written by a change of the process that pays.
    pub(crate) payers: RwLock<()>,
    /// Whether address spaces rather than users are limited (option RLIMIT_MODE).
    pub(crate) by_space: AtomicBool,
    /// The IOAS that VFIO calls use. Not a user of it (rule 68).
    pub(crate) vfio_ioas: Mutex<Weak<IoasObject>>,
    /// Guests whose pages were converted through this context, by ASID.
    pub(crate) guests: Mutex<HashMap<u32, Arc<Guest>>>,
    pub(crate) regions: mmap::Regions,
    /// Descriptors that keep it: its own, and those of fault queues, event queues and accesses.
    opens: AtomicU32,
}

/// Keeps a context from closing: each descriptor that belongs to it has one (rule 11).
pub struct Open(Arc<Context>);

impl Open {
    /// The context.
    pub fn context(&self) -> &Arc<Context> {
        &self.0
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.close_one();
    }
}

impl fmt::Debug for Open {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Context {
    pub(crate) fn new(host: &Arc<Host>) -> Arc<Self> {
        Arc::new_cyclic(|own| Self {
            own: own.clone(),
            host: Arc::clone(host),
            objects: Mutex::default(),
            attaching: Mutex::default(),
            payers: RwLock::default(),
            by_space: AtomicBool::new(false),
            vfio_ioas: Mutex::default(),
            guests: Mutex::default(),
            regions: mmap::Regions::default(),
            opens: AtomicU32::new(1),
        })
    }

    /// Where it was opened.
    pub fn host(&self) -> &Arc<Host> {
        &self.host
    }

    /// Another descriptor that keeps it.
    pub fn hold(&self) -> Open {
        self.opens.fetch_add(1, Ordering::AcqRel);
        Open(self.arc())
    }

    pub(crate) fn arc(&self) -> Arc<Self> {
        self.own.upgrade().unwrap_or_else(|| unreachable!("a context is always in an Arc"))
    }

    fn close_one(&self) {
        if self.opens.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.destroy_all();
            self.end_guests();
        }
    }

    pub(crate) fn table(&self) -> MutexGuard<'_, Table> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn lock_attaching(&self) -> MutexGuard<'_, ()> {
        self.attaching.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The ioctl of this number, if this host has it.
    pub fn find_ioctl(&self, command: u32) -> Option<&'static Ioctl<Self>> {
        let entry = ioctls::find(command)?;
        (self.host.config().test_ops || !ioctls::is_test(entry)).then_some(entry)
    }
}

impl Target for Context {
    fn undo(&self, reply: Reply) {
        match reply {
            Reply::New(id) => _ = self.destroy(id),
            Reply::Mapped { ioas, iova, len } => {
                let span = Span::from_len(Iova::new(iova), len);
                if let (Ok(object), Ok(span)) = (self.ioas(ioas), span) {
                    let _ = object.ioas().unmap(span);
                }
            }
            _ => {}
        }
    }
}

impl File for Context {
    fn kind(&self) -> &'static str {
        "iommufd"
    }

    fn ioctl(&self, caller: &dyn Caller, command: u32, arg: u64) -> Answer<i64> {
        match self.find_ioctl(command) {
            Some(entry) => {
                let thread = caller.ids().map(|(_, thread)| thread);
                self.host.knobs().run(thread, || table::run(entry, self.kind(), &self.arc(), caller, arg, self.host.observer()))
            }
            None => Err(table::unknown(self.kind(), caller, command, arg, ioctls::unknown(command, arg, caller), self.host.observer())),
        }
    }

    fn mmap(&self, _: &dyn Caller, wanted: &Mmap) -> Answer {
        self.regions.check(wanted)
    }

    fn read(&self, _: &dyn Caller, _: usize, _: Option<u64>) -> Answer<Vec<u8>> {
        Err(Refusal::of(Errno::INVAL, "/dev/iommu itself is not read; events come from the descriptors of its queues"))
    }

    fn released(&self) {
        self.close_one();
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("opens", &self.opens).finish_non_exhaustive()
    }
}
