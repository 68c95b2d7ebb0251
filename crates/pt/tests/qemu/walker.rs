//! What the tests ask of an IOMMU model: to take a page table, to forget translations, to say what it refused. And what must be known of a
//! model to hold it against the tables: what of the architecture it leaves out.

use crate::board::Board;
use crate::qtest::Qtest;
use addr::{Iova, Oa, Span};
use lockstep_pt::{Leaf, Perm};

/// An access that the model says it refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Fault {
    /// Its address; some models round it down to a page.
    pub(crate) iova: Iova,
    /// Whether it was a write.
    pub(crate) write: bool,
}

/// How far an invalidation reaches in a model.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Invalidates {
    /// What it names, so that a span which is too small is seen.
    TheSpan,
    /// Everything of the domain.
    TheDomain,
}

/// An IOMMU model of QEMU in one way of use.
pub(crate) trait Walker {
    /// The machine that it is in.
    const BOARD: &'static Board;
    /// Bus 0, device and function of the edu device.
    const DEVFN: u8 = 0x10;
    /// IOVAs that the machine keeps for something else.
    const ASIDE: Option<(u64, u64)> = None;
    /// Whether it refuses what is above the width of the tables.
    const REFUSES_ABOVE: bool = true;
    /// Whether it records what a walk refuses. What a cached translation does not allow is refused without a record in all of them.
    const RECORDS: bool = true;
    const INVALIDATES: Invalidates;

    /// What QEMU is told about the machine and the IOMMU.
    fn args(&self) -> Vec<String>;

    /// How many address bits it has, where that is fewer than the format's.
    fn input_lg2(&self) -> u8 {
        64
    }

    /// Gives the device the tree below `root`, whose top table is of `level`, and turns translation on.
    fn start(&mut self, qtest: &mut Qtest, root: Oa, level: u8);

    /// The tree has a new top.
    fn set_root(&mut self, _qtest: &mut Qtest, root: Oa, level: u8) {
        panic!("the top moves to {root}, level {level}, in a format whose trees do not grow");
    }

    /// Forgets cached translations of `span`.
    fn invalidate(&mut self, qtest: &mut Qtest, span: Span<Iova>);

    /// What was refused since the last call.
    fn faults(&mut self, qtest: &mut Qtest) -> Vec<Fault>;

    /// What it allows through a leaf.
    fn allows(&self, leaf: &Leaf) -> Perm {
        leaf.perm
    }
}

/// The power-of-two blocks, of at least 4 KiB and at most `1 << most_lg2` bytes, that make up the pages of `span`; `None` when they are more
/// than `limit`.
pub(crate) fn blocks(span: Span<Iova>, most_lg2: u8, limit: usize) -> Option<Vec<(u64, u8)>> {
    let (mut at, last) = (span.start().get() >> 12 << 12, span.last().get());
    let mut found = Vec::new();
    loop {
        if found.len() == limit {
            return None;
        }
        let fits = |lg2: u8| at.trailing_zeros() >= u32::from(lg2) && at.checked_add((1 << lg2) - 1).is_some_and(|end| end <= last | 0xfff);
        let lg2 = (12..=most_lg2).rev().find(|lg2| fits(*lg2)).unwrap_or(12);
        found.push((at, lg2));
        match at.checked_add(1 << lg2) {
            Some(next) if next <= last => at = next,
            _ => return Some(found),
        }
    }
}
