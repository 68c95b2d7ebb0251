//! A small tree with its readers, for loom.
#![allow(dead_code, reason = "each test file uses its own part of this module")]
#![allow(unreachable_pub, reason = "a module shared by test binaries")]

use addr::{Iova, Oa, SizeSet, Span};
use lockstep_pt::{Arena, AtomicU64, Format, Gather, Perm, Stock, Table};
use loom::sync::Arc as LoomArc;
use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64 as Counter, Ordering};
use sync::Readers;

pub type Words = Box<[AtomicU64]>;

pub const GRANULE: u64 = 1 << 11;
pub const ITEM1: u64 = 4 * GRANULE;
pub const FRAMES: u64 = 1 << 40;
pub const OTHER_FRAMES: u64 = 2 << 40;
pub const DOMAIN: u32 = 1;

pub struct Rig<F: Format> {
    pub table: Table<F, Words>,
    pub arena: Arc<Arena<Words>>,
    pub readers: Arc<Readers>,
}

impl<F: Format> Rig<F> {
    pub fn new() -> LoomArc<Self> {
        let words = (0..6 * 5).map(|_| AtomicU64::new(0)).collect::<Words>();
        let arena = Arena::new(words, Oa::new(1 << 20), 2);
        LoomArc::new(Self { table: Table::new(Arc::clone(&arena)).unwrap(), arena, readers: Arc::new(Readers::new()) })
    }

    pub fn stock(&self, tables: u32) -> Stock<Words> {
        let mut stock = Stock::new(&self.arena);
        stock.reserve(tables).unwrap();
        stock
    }

    pub fn map(&self, start: u64, len: u64, oa: u64, stock: &mut Stock<Words>) {
        let mut gather = Gather::new();
        self.table.map(span(start, len), Oa::new(oa), Perm::RW, SizeSet::ALL, stock, &mut gather).unwrap();
        self.finish(gather);
    }

    pub fn unmap(&self, start: u64, len: u64) {
        let mut gather = Gather::new();
        assert!(self.table.unmap(span(start, len), &mut gather).is_none());
        self.finish(gather);
    }

    /// Cuts with a grace period where the format asks for it.
    pub fn cut(&self, start: u64, len: u64, stock: &mut Stock<Words>) -> u32 {
        self.table.cut(span(start, len), SizeSet::ALL, stock, |_| self.readers.grace(DOMAIN)).unwrap()
    }

    /// Whether a walk of `granule` may answer this: what was mapped from [`FRAMES`] on, or nothing while a leaf is broken.
    pub fn is_true(&self, granule: u64, seen: Option<u64>) -> bool {
        seen == Some(FRAMES + granule * GRANULE) || seen.is_none() && !F::HITLESS.is_allowed()
    }

    /// Whether the leaf that answers for `iova` is dirty, in any of its slots.
    pub fn is_dirty(&self, iova: u64) -> bool {
        let mut dirty = false;
        self.table.leaves(span(iova, GRANULE), |leaf| dirty |= leaf.dirty);
        dirty
    }

    pub fn finish(&self, gather: Gather) {
        gather.finish(&self.arena, |_| self.readers.grace(DOMAIN));
    }

    pub fn oa(&self, iova: u64) -> Option<u64> {
        self.table.walk(Iova::new(iova)).map(|leaf| leaf.oa_of(Iova::new(iova)).get())
    }

    /// What one guarded walk answers.
    pub fn guarded(&self, slot: &mut sync::Slot, iova: u64) -> Option<u64> {
        let _guard = slot.guard(DOMAIN);
        self.oa(iova)
    }
}

pub fn span(start: u64, len: u64) -> Span<Iova> {
    Span::from_len(Iova::new(start), len).unwrap()
}

/// Explores a scenario. Readers are threads that begin last ([`beside`], [`reader`]): loom has a load answer with every store that it may see, but does
/// not try a load again after a store that came later in its first order. A reader that went first would see one order of many.
pub fn explore(test: impl Fn() + Sync + Send + 'static) {
    enough(explore_up_to(4, test));
}

fn enough(orders: u64) {
    assert!(orders > 5, "only {orders} orders were tried");
}

/// A reader beside the editors that were spawned before.
pub fn reader<F: Format, R: 'static>(
    rig: &LoomArc<Rig<F>>,
    findings: &Findings,
    read: impl FnOnce(&Rig<F>, &Findings) -> R + Send + 'static,
) -> loom::thread::JoinHandle<R> {
    let (rig, findings) = (LoomArc::clone(rig), findings.clone());
    loom::thread::spawn(move || read(&rig, &findings))
}

/// Reads in a thread of its own while this one edits.
pub fn beside<R: 'static, T>(read: impl FnOnce() -> R + Send + 'static, edit: impl FnOnce() -> T) -> (R, T) {
    let reader = loom::thread::spawn(read);
    let done = edit();
    (reader.join().unwrap(), done)
}

/// Says, and answers, how many orders it tried.
fn explore_up_to(preemptions: usize, test: impl Fn() + Sync + Send + 'static) -> u64 {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 20_000;
    let orders = Arc::new(Counter::new(0));
    let counted = Arc::clone(&orders);
    builder.check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        test();
    });
    let orders = orders.load(Ordering::Relaxed);
    println!("{orders} orders");
    orders
}

/// What a scenario looks at. Where nothing is wrong by design, the first wrong thing ends the test; where a fault was planted it ends the
/// exploration, and there must be one.
#[derive(Clone)]
pub struct Findings {
    pub planted: bool,
    wrong: Arc<Counter>,
}

impl Findings {
    pub fn check(&self, fine: bool, what: impl Display) {
        assert!(fine || self.planted, "{what}");
        self.wrong.fetch_add(u64::from(!fine), Ordering::Relaxed);
    }
}

/// Explores a scenario as it should be.
pub fn holds(preemptions: usize, scenario: fn(Findings)) {
    look(preemptions, false, scenario);
}

/// Explores it with its fault planted.
pub fn finds(preemptions: usize, scenario: fn(Findings)) {
    assert!(look(preemptions, true, scenario) > 0, "no interleaving shows the planted fault");
}

fn look(preemptions: usize, planted: bool, scenario: fn(Findings)) -> u64 {
    let findings = Findings { planted, wrong: Arc::default() };
    let wrong = Arc::clone(&findings.wrong);
    let explored = std::panic::catch_unwind(move || {
        explore_up_to(preemptions, move || {
            scenario(findings.clone());
            if findings.wrong.load(Ordering::Relaxed) > 0 {
                // Enough seen.
                std::panic::resume_unwind(Box::new(Found));
            }
        })
    });
    match explored {
        Err(why) if !why.is::<Found>() => std::panic::resume_unwind(why),
        Ok(orders) => enough(orders),
        Err(_) => {}
    }
    wrong.load(Ordering::Relaxed)
}

/// Ends an exploration.
struct Found;
