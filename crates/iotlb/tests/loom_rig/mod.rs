//! The smallest machine: pages that lead to frames, domains with a log, a device, and contexts that keep what they found.
#![allow(dead_code, reason = "each test file uses its own part of this module")]
#![allow(unreachable_pub, reason = "a module shared by test binaries")]

use addr::{Iova, Lg2, Span};
use lockstep_iotlb::{Identity, Log, Logged, Source, View};
use loom::sync::Mutex;
use loom::sync::atomic::{AtomicU64, Ordering};
use pt::Perm;
use std::sync::Arc;
use std::sync::atomic::AtomicU64 as Counter;
use sync::{Readers, Slot};

/// What a frame holds as long as it belongs to whoever mapped it.
const THEIRS: u64 = 7;

/// An IO page table of one level; page n leads to frame n.
pub struct Domain {
    id: u32,
    log: Log,
    mapped: Vec<AtomicU64>,
    frames: Vec<AtomicU64>,
    pub readers: Arc<Readers>,
}

impl Logged for Domain {
    fn id(&self) -> u32 {
        self.id
    }

    fn log(&self) -> &Log {
        &self.log
    }
}

/// All of a page.
pub fn page(number: u64) -> Span<Iova> {
    Span::block(Iova::new(number << 12), 12)
}

impl Domain {
    pub fn new(id: u32, pages: usize, readers: &Arc<Readers>) -> Arc<Self> {
        let words = |value| (0..pages).map(|_| AtomicU64::new(value)).collect();
        Arc::new(Self { id, log: Log::new(), mapped: words(1), frames: words(THEIRS), readers: Arc::clone(readers) })
    }

    pub fn clear(&self, page: usize) {
        self.mapped[page].store(0, Ordering::Relaxed);
    }

    pub fn invalidate(&self, pages: impl Iterator<Item = usize>) {
        self.log.append(pages.map(|number| page(number as u64)));
    }

    pub fn grace(&self) {
        self.readers.grace(self.id);
    }

    /// The frame goes to somebody else, who writes to it.
    pub fn release(&self, page: usize) {
        self.frames[page].store(0xdead, Ordering::Relaxed);
    }

    /// The order that keeps I-4.
    pub fn unmap(&self, pages: impl Iterator<Item = usize> + Clone) {
        pages.clone().for_each(|page| self.clear(page));
        self.invalidate(pages.clone());
        self.grace();
        pages.for_each(|page| self.release(page));
    }

    fn walk(&self, page: usize) -> bool {
        self.mapped[page].load(Ordering::Acquire) != 0
    }

    fn use_frame(&self, page: usize) {
        assert_eq!(self.frames[page].load(Ordering::Relaxed), THEIRS, "a released frame was used");
    }
}

pub struct Device {
    generation: AtomicU64,
    domain: Mutex<Option<Arc<Domain>>>,
}

/// What a context follows.
pub struct Followed(pub Arc<Device>);

pub struct Copy {
    generation: u64,
    domain: Option<Arc<Domain>>,
}

impl Identity for Copy {
    type Domain = Domain;

    fn generation(&self) -> u64 {
        self.generation
    }

    fn domain(&self) -> Option<&Arc<Domain>> {
        self.domain.as_ref()
    }
}

impl Source for Followed {
    type Identity = Copy;

    fn generation(&self) -> u64 {
        self.0.generation.load(Ordering::Acquire)
    }

    fn identity(&self) -> Copy {
        let generation = self.generation();
        Copy { generation, domain: self.0.domain.lock().unwrap().clone() }
    }
}

impl Device {
    pub fn new(domain: &Arc<Domain>) -> Arc<Self> {
        Arc::new(Self { generation: AtomicU64::new(0), domain: Mutex::new(Some(Arc::clone(domain))) })
    }

    pub fn set(&self, domain: Option<Arc<Domain>>) {
        *self.domain.lock().unwrap() = domain;
    }

    pub fn tell(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
    }

    /// What is attached to another domain is so once nobody works with the one before.
    pub fn attach(&self, old: &Domain, new: Option<Arc<Domain>>) {
        self.set(new);
        self.tell();
        old.grace();
    }
}

/// A context: a reader's place, and its view.
pub struct Context {
    pub slot: Slot,
    pub view: View<Followed, ()>,
}

impl Context {
    pub fn new(device: &Arc<Device>, readers: &Arc<Readers>) -> Self {
        Self { slot: readers.slot(), view: View::new(Followed(Arc::clone(device)), 16, 0) }
    }

    /// One access: a guard, the cache or a walk, the frame.
    pub fn access(&mut self, number: usize) -> bool {
        if !self.view.enter(&mut self.slot) {
            return false;
        }
        let found = self.translate(number);
        if found {
            self.domain().use_frame(number);
        }
        self.slot.leave();
        found
    }

    /// One access that asks its cache before it enters the guard.
    pub fn access_quickly(&mut self, number: usize) -> bool {
        if self.view.iotlb().probe(at(number)).is_some() && self.view.enter_unchanged(&mut self.slot) {
            self.domain().use_frame(number);
            self.slot.leave();
            return true;
        }
        self.access(number)
    }

    pub fn translate(&mut self, number: usize) -> bool {
        if self.view.iotlb_mut().lookup(at(number)).is_some() {
            return true;
        }
        let found = self.domain().walk(number);
        if found {
            self.view.iotlb_mut().fill(at(number), Lg2::K4, Perm::RW, ());
        }
        found
    }

    pub fn domain(&self) -> Arc<Domain> {
        Arc::clone(self.view.identity().domain().expect("inside a guard there is one"))
    }

    pub fn use_frame(&self, number: usize) {
        self.domain().use_frame(number);
    }
}

pub fn at(number: usize) -> Iova {
    page(number as u64).start()
}

/// Explores a scenario, and says how many orders it tried. Readers are threads that begin last: loom has a load answer with every store that it may see,
/// but does not try a load again after a store that came later in its first order.
pub fn explore(preemptions: usize, test: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    let orders = Arc::new(Counter::new(0));
    let counted = Arc::clone(&orders);
    builder.check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        test();
    });
    let orders = orders.load(Ordering::Relaxed);
    println!("{orders} orders");
    assert!(orders > 4, "only {orders} orders were tried");
}
