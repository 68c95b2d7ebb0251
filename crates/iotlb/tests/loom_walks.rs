//! Walks from cached tables against whoever takes those tables out and uses them for something else, in every interleaving: the real table, log, view
//! and guards, with a format of four entries to a table.
//!
//! A reader may find what stands now or, while its guard is open, what stood before: never what its table holds in the next life (I-1). Each
//! scenario has a fault that can be planted, and loom finding it shows that the check can fail.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p lockstep-iotlb --test loom_walks --release`; without the flag this file is empty.
#![cfg(loom)]

use addr::{Address, Iova, Oa, SizeSet, Span};
use lockstep_iotlb::{Identity, Log, Logged, Source, View};
use loom::thread;
use pt::{Arena, AtomicU64, Gather, Perm, Stock, Table, Toy};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use sync::{Readers, Slot};

const GRANULE: u64 = 1 << 11;
/// What one table of granules serves.
const REGION: u64 = 4 * GRANULE;
const FRAMES: u64 = 1 << 40;
const OTHER_FRAMES: u64 = 2 << 40;
const DOMAIN: u32 = 1;

type Words = Box<[AtomicU64]>;

/// What the writer forgets.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    None,
    /// The log has the leaves and not the tables.
    Regions,
    /// Tables go back to the arena while guards are open.
    Grace,
    /// The log comes after the grace period.
    Late,
}

struct Domain {
    table: Table<Toy, Words>,
    log: Log,
    readers: Arc<Readers>,
    fault: Fault,
}

impl Logged for Domain {
    fn id(&self) -> u32 {
        DOMAIN
    }

    fn log(&self) -> &Log {
        &self.log
    }
}

/// What a context follows: always the same domain.
struct Always(Arc<Domain>);

impl Source for Always {
    type Identity = Only;

    fn generation(&self) -> u64 {
        0
    }

    fn identity(&self) -> Only {
        Only(Some(Arc::clone(&self.0)))
    }
}

struct Only(Option<Arc<Domain>>);

impl Identity for Only {
    type Domain = Domain;

    fn generation(&self) -> u64 {
        0
    }

    fn domain(&self) -> Option<&Arc<Domain>> {
        self.0.as_ref()
    }
}

fn span(start: u64, len: u64) -> Span<Iova> {
    Span::from_len(Iova::new(start), len).unwrap()
}

impl Domain {
    /// The first region in granules, and so few tables that the next one to be taken is the last that was given back.
    fn new(fault: Fault) -> Arc<Self> {
        let words = (0..3 * 5).map(|_| AtomicU64::new(0)).collect::<Words>();
        let arena = Arena::new(words, Oa::new(1 << 20), 2);
        let table = Table::with_start(arena, 1).unwrap();
        let domain = Arc::new(Self { table, log: Log::new(), readers: Arc::new(Readers::new()), fault });
        domain.map(0, FRAMES);
        domain
    }

    /// A region, granule by granule.
    fn map(&self, start: u64, frames: u64) {
        let (mut stock, mut gather) = (Stock::new(self.table.arena()), Gather::new());
        let granules = SizeSet(1 << 11);
        self.table.map(span(start, REGION), Oa::new(frames), Perm::RW, granules, &mut stock, &mut gather).unwrap();
        self.finish(gather);
    }

    fn merge(&self) {
        let mut gather = Gather::new();
        assert_eq!(self.table.merge(span(0, REGION), SizeSet::ALL, &mut gather, |_| {}), 1);
        self.finish(gather);
    }

    fn unmap(&self) {
        let mut gather = Gather::new();
        assert!(self.table.unmap(span(0, REGION), &mut gather).is_none());
        self.finish(gather);
    }

    fn finish(&self, gather: Gather) {
        gather.finish(self.table.arena(), |gather| {
            let log = || match self.fault {
                Fault::Regions => self.log.append(gather.spans()),
                _ => self.log.append_with_tables(gather.spans(), gather.tables()),
            };
            if self.fault == Fault::Late {
                self.readers.grace(DOMAIN);
                log();
            } else {
                log();
                if self.fault != Fault::Grace {
                    self.readers.grace(DOMAIN);
                }
            }
        });
    }
}

struct Context {
    slot: Slot,
    view: View<Always, Oa>,
}

impl Context {
    fn new(domain: &Arc<Domain>) -> Self {
        Self { slot: domain.readers.slot(), view: View::new(Always(Arc::clone(domain)), 16, 2) }
    }

    /// One access: the IOTLB, or a walk that begins as low as it can.
    fn find(&mut self, granule: u64) -> Option<u64> {
        let at = Iova::new(granule * GRANULE);
        assert!(self.view.enter(&mut self.slot));
        let found = match self.view.iotlb_mut().lookup(at) {
            Some(hit) => Some(hit.value.get() + at.offset_from(hit.start)),
            None => self.walk(at),
        };
        self.slot.leave();
        found
    }

    fn walk(&mut self, at: Iova) -> Option<u64> {
        let from = self.view.walks_mut().lookup(at);
        let mut kept = None;
        let leaf = self.view.identity().domain()?.table.walk_from(from, at, |table| kept = Some(table))?;
        if let Some(table) = kept {
            self.view.walks_mut().fill(at, table);
        }
        self.view.iotlb_mut().fill(leaf.iova, leaf.size, leaf.perm, leaf.oa);
        Some(leaf.oa_of(at).get())
    }
}

/// Explores a scenario up to the first wrong thing; answers whether a reader met anything that it must not.
fn explore(preemptions: usize, fault: Fault, scenario: fn(&Arc<Domain>, &Arc<AtomicBool>)) -> bool {
    let wrong = Arc::new(AtomicBool::new(false));
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 20_000;
    let seen = Arc::clone(&wrong);
    let explored = std::panic::catch_unwind(move || {
        builder.check(move || {
            scenario(&Domain::new(fault), &seen);
            if seen.load(Ordering::Relaxed) {
                // Enough seen.
                std::panic::resume_unwind(Box::new(Found));
            }
        })
    });
    match explored {
        Err(why) if !why.is::<Found>() => std::panic::resume_unwind(why),
        _ => wrong.load(Ordering::Relaxed),
    }
}

struct Found;

/// A reader in a thread of its own beside a writer in this one. That way round: loom tries few orders of a spawned writer and a main thread that
/// reads. Afterwards the context comes back, and has to find what is in the other region.
fn beside(
    domain: &Arc<Domain>,
    granules: [u64; 2],
    mut context: Context,
    wrong: &Arc<AtomicBool>,
    fine: fn(Option<u64>, u64) -> bool,
    write: impl Fn(&Domain),
) -> Context {
    let seen = Arc::clone(wrong);
    let reader = thread::spawn(move || {
        for granule in granules {
            seen.fetch_or(!fine(context.find(granule), granule), Ordering::Relaxed);
        }
        context
    });
    write(domain);
    domain.map(REGION, OTHER_FRAMES);
    let mut context = reader.join().unwrap();
    let other = context.find(5);
    wrong.fetch_or(other != Some(OTHER_FRAMES + GRANULE), Ordering::Relaxed);
    context
}

/// What the reader of a merge may find: the translation does not change.
fn same(found: Option<u64>, granule: u64) -> bool {
    found == Some(FRAMES + granule * GRANULE)
}

/// The context knows the table. It is merged away and serves another region from then on.
fn merge_and_use_again(domain: &Arc<Domain>, wrong: &Arc<AtomicBool>) {
    let mut context = Context::new(domain);
    assert!(same(context.find(0), 0));
    let mut context = beside(domain, [1, 2], context, wrong, same, Domain::merge);
    wrong.fetch_or(!same(context.find(3), 3), Ordering::Relaxed);
}

/// The context learns of the table while that is being merged away: the walk may come before, and what it keeps after.
fn merge_beside_the_first_walk(domain: &Arc<Domain>, wrong: &Arc<AtomicBool>) {
    let mut context = beside(domain, [0, 1], Context::new(domain), wrong, same, Domain::merge);
    wrong.fetch_or(!same(context.find(3), 3), Ordering::Relaxed);
}

/// The same with an unmap: afterwards nothing is there, whatever the table says by then.
fn unmap_and_use_again(domain: &Arc<Domain>, wrong: &Arc<AtomicBool>) {
    let mut context = Context::new(domain);
    assert!(same(context.find(0), 0));
    let fine = |found: Option<u64>, granule| found.is_none() || same(found, granule);
    let mut context = beside(domain, [1, 2], context, wrong, fine, Domain::unmap);
    wrong.fetch_or(context.find(3).is_some(), Ordering::Relaxed);
}

#[test]
fn a_merged_table_in_use_again() {
    assert!(!explore(4, Fault::None, merge_and_use_again));
}

#[test]
fn a_merge_that_forgets_walkers_is_found() {
    assert!(explore(3, Fault::Regions, merge_and_use_again));
}

#[test]
fn a_table_that_is_used_again_too_early_is_found() {
    assert!(explore(3, Fault::Grace, merge_and_use_again));
}

#[test]
fn a_log_after_the_grace_period_is_found() {
    assert!(explore(3, Fault::Late, merge_and_use_again));
}

#[test]
fn a_merge_beside_the_first_walk() {
    assert!(!explore(4, Fault::None, merge_beside_the_first_walk));
}

#[test]
fn an_unmapped_table_in_use_again() {
    assert!(!explore(4, Fault::None, unmap_and_use_again));
}

#[test]
fn an_unmap_that_forgets_walkers_is_found() {
    assert!(explore(3, Fault::Regions, unmap_and_use_again));
}
