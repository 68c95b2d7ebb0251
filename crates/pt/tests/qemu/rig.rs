//! A tree, the machine that walks it, and edits as a driver makes them: change the words, invalidate what the [`Gather`] says, give the
//! tables back.

use crate::device::{Device, LEN, MAILBOX, MAILBOX_BYTES, is_nothing, said};
use crate::mirror::{Mirror, Words};
use crate::walker::Walker;
use addr::{Iova, Oa, SizeSet, Span};
use lockstep_pt::{Arena, Format, Gather, Leaf, Perm, Stock, Table};
use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

const TABLES: usize = 256;

/// What was covered.
#[derive(Default)]
pub(crate) struct Tally {
    pub(crate) allowed: u64,
    pub(crate) refused: u64,
    /// Accesses that the model has a record of.
    pub(crate) recorded: u64,
    /// Sizes of the leaves that were accessed through.
    pub(crate) sizes: BTreeSet<u8>,
}

impl Tally {
    /// Counts accesses, each with the leaf that lets it through.
    pub(crate) fn count(&mut self, leaves: impl Iterator<Item = Option<Leaf>>) {
        for leaf in leaves {
            match leaf {
                Some(leaf) => {
                    self.allowed += 1;
                    self.sizes.insert(leaf.size.0);
                }
                None => self.refused += 1,
            }
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { allowed, refused, recorded, sizes } = self;
        write!(f, "{allowed} accesses translated, {refused} refused; {recorded} accesses with a fault on record; leaves of 2^{sizes:?}")
    }
}

pub(crate) struct Rig<F: Format, W> {
    pub(crate) name: String,
    pub(crate) device: Device<W>,
    pub(crate) table: Table<F, Words>,
    /// No leaf is of another size.
    pub(crate) sizes: SizeSet,
    pub(crate) random: fastrand::Rng,
    pub(crate) tally: Tally,
    arena: Arc<Arena<Words>>,
    mirror: Mirror,
    stock: Stock<Words>,
    root: (Oa, u8),
}

impl<F: Format, W: Walker> Rig<F, W> {
    /// A tree that begins at `level`, with leaves of those of `sizes` that the format has, and the mailbox mapped.
    pub(crate) fn new(walker: W, name: &str, level: u8, sizes: SizeSet) -> Self {
        let (arena, mirror) = Mirror::new(W::BOARD.tables(), TABLES);
        let table = Table::with_start(Arc::clone(&arena), level).unwrap();
        let root = table.root();
        let name = format!("{}, {name}", F::NAME);
        let device = Device::start(&name, walker, root.0, root.1);
        let stock = Stock::new(&arena);
        let sizes = sizes.and(F::SIZES);
        let (random, tally) = (fastrand::Rng::with_seed(u64::from(level)), Tally::default());
        let mut rig = Self { name, device, table, sizes, random, tally, arena, mirror, stock, root };
        let mailbox = Span::from_len(MAILBOX, MAILBOX_BYTES).unwrap();
        rig.map(mailbox, W::BOARD.mailbox(), Perm::RW, SizeSet::ALL);
        rig.dirty(mailbox.blocks(12).map(Span::start));
        rig
    }

    /// The last IOVA that tree and model both reach.
    pub(crate) fn last(&self) -> Iova {
        let own = F::reach(self.root.1).get();
        let lg2 = self.device.walker.input_lg2();
        Iova::new(if lg2 >= 64 { own } else { own.min((1 << lg2) - 1) })
    }

    pub(crate) fn map(&mut self, span: Span<Iova>, oa: Oa, perm: Perm, sizes: SizeSet) {
        let mut gather = Gather::new();
        let sizes = sizes.and(self.sizes);
        if let Err(error) = self.table.map(span, oa, perm, sizes, &mut self.stock, &mut gather) {
            panic!("{}: {error}", self.name);
        }
        self.finish(gather);
        if self.table.root() != self.root {
            self.root = self.table.root();
            self.device.walker.set_root(&mut self.device.qtest, self.root.0, self.root.1);
        }
    }

    /// Unmaps a span that no leaf crosses the borders of.
    pub(crate) fn unmap(&mut self, span: Span<Iova>) {
        let mut gather = Gather::new();
        let crossing = self.table.unmap(span, &mut gather);
        assert_eq!(crossing, None, "{}: a cut span has no crossing leaf", self.name);
        self.finish(gather);
    }

    /// Unmaps all but the mailbox, and with it gives back tables that earlier unmaps have left empty.
    pub(crate) fn clear(&mut self) {
        let mailbox = Span::from_len(MAILBOX, MAILBOX_BYTES).unwrap();
        for part in Span::of(Iova::new(0), self.last()).without(mailbox).into_iter().flatten() {
            self.unmap(part);
        }
    }

    /// Unmaps without any invalidation, for those who want to see what a model caches.
    pub(crate) fn unmap_and_leave_cached(&mut self, span: Span<Iova>) {
        let mut gather = Gather::new();
        self.table.unmap(span, &mut gather);
        self.mirror.push(&mut self.device.qtest);
        gather.finish(&self.arena, |_| {});
    }

    pub(crate) fn cut(&mut self, span: Span<Iova>) {
        let Self { name, device, table, mirror, stock, sizes, .. } = self;
        let done = table.cut(span, *sizes, stock, |broken| see_it_broken(name, device, mirror, broken));
        done.unwrap();
        self.mirror.push(&mut self.device.qtest);
    }

    pub(crate) fn merge(&mut self, span: Span<Iova>) {
        let mut gather = Gather::new();
        let Self { name, device, table, mirror, sizes, .. } = self;
        table.merge(span, *sizes, &mut gather, |broken| see_it_broken(name, device, mirror, broken));
        self.finish(gather);
    }

    fn finish(&mut self, gather: Gather) {
        let Self { device, mirror, arena, .. } = self;
        mirror.push(&mut device.qtest);
        gather.finish(arena, |gather| gather.spans().chain(gather.tables()).for_each(|span| device.forget(span)));
        mirror.push(&mut device.qtest);
    }

    /// For a model that allows writes through leaves that are dirty already, and those alone: makes the leaves at `places` so. Answers
    /// whether there were any.
    pub(crate) fn dirty(&mut self, places: impl Iterator<Item = Iova>) -> bool {
        let mut any = false;
        for iova in places {
            let Some(leaf) = self.table.walk(iova) else { continue };
            if leaf.perm != self.device.walker.allows(&leaf) && self.table.mark_dirty(iova) {
                self.mirror.push(&mut self.device.qtest);
                // The model may have cached the leaf as read-only.
                self.device.forget(leaf.span());
                any = true;
            }
        }
        any
    }

    /// Nobody but us has changed the tables.
    pub(crate) fn check_tables(&mut self) {
        if let Err(wrong) = self.mirror.check(&mut self.device.qtest, F::DIRTY) {
            panic!("{}: {wrong}", self.name);
        }
    }
}

/// In the middle of a break-before-make: the leaf is hidden from the device, in all of its span, as soon as it is invalidated.
fn see_it_broken<W: Walker>(name: &str, device: &mut Device<W>, mirror: &mut Mirror, broken: Span<Iova>) {
    mirror.push(&mut device.qtest);
    device.forget(broken);
    let places = [broken.start(), Iova::new(broken.last().get() - (LEN as u64 - 1))];
    for (at, (bytes, faults)) in places.iter().zip(device.read(&places)) {
        assert!(is_nothing(&bytes), "{name}: {broken} is broken, and at {at} the device reads {}", said(&bytes));
        assert!(faults.iter().all(|fault| broken.contains(fault.iova)), "{name}: {broken} is broken, and the model records {faults:x?}");
    }
}
