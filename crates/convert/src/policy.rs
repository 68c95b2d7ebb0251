//! What devices may have mapped, chosen per IOAS (design D-7). The other two policies of that section, *unmap-first* and *keep*, belong to
//! secure worlds that are not modelled yet.

use addr::{Lg2, Page, SizeSet, Span};
use backing::{Backing, PageState};
use ioas::LeafRule;
use iommu::SystemRmp;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// A policy by name.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Policy {
    /// SEV-SNP with SEV-TIO: private and shared pages are mapped; private leaves are as large as their RMP entries, 4 KiB or 2 MiB.
    #[default]
    Mirror,
    /// Shared pages alone are mapped: what VMMs do for devices that a guest does not trust.
    SharedOnly,
}

impl Policy {
    /// Every policy, for help texts.
    pub const ALL: [Self; 2] = [Self::Mirror, Self::SharedOnly];
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Mirror => "mirror",
            Self::SharedOnly => "shared-only",
        })
    }
}

impl FromStr for Policy {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|policy| policy.to_string() == name)
            .ok_or_else(|| format!("no policy is named '{name}'; there are mirror and shared-only"))
    }
}

/// Where the change of a page's owner must show: a question about the hardware that its documents leave open (linux-arch, February 2025, on mapping from a
/// guest_memfd).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Borders {
    /// In the IO page table, too: its leaves end wherever the owner changes, and a device's access is judged by its whole leaf. The stricter
    /// reading: right under either.
    #[default]
    Table,
    /// In the RMP only: leaves stay as they are across the change, an access is judged by the pages that it touches. A conversion then
    /// has devices forget the pages after the owner has changed, and touches no leaf.
    Rmp,
}

impl Borders {
    /// Both, for help texts.
    pub const ALL: [Self; 2] = [Self::Table, Self::Rmp];
}

impl fmt::Display for Borders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Table => "table",
            Self::Rmp => "rmp",
        })
    }
}

impl FromStr for Borders {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let known = Self::ALL.into_iter().find(|borders| borders.to_string() == name);
        known.ok_or_else(|| format!("borders are in the table or in the rmp, not in '{name}'"))
    }
}

/// How the two open questions about the hardware are answered. The default is what is known to work on the CPU's side, and the stricter one where nothing
/// is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Reading {
    /// Leaves above 2 MiB over shared memory are refused, so none are made. Otherwise they are judged as the CPU's: by their pages, whatever
    /// their size.
    pub strict: bool,
    /// Where the change of an owner must show.
    pub borders: Borders,
}

/// A policy as an IOAS asks it: per run of pages, the leaf sizes that are allowed.
#[derive(Clone, Debug)]
pub struct PolicyRule {
    policy: Policy,
    reading: Reading,
    rmp: Arc<SystemRmp>,
}

impl PolicyRule {
    /// `policy`, with private leaves sized by the entries of `rmp`.
    pub fn new(policy: Policy, rmp: &Arc<SystemRmp>) -> Arc<Self> {
        Arc::new(Self { policy, reading: Reading::default(), rmp: Arc::clone(rmp) })
    }

    /// The same under a certain reading of the hardware. `rmp` is told as well: it judges accesses accordingly.
    pub fn with_reading(policy: Policy, reading: Reading, rmp: &Arc<SystemRmp>) -> Arc<Self> {
        rmp.set_strict(reading.strict);
        rmp.set_by_page(reading.borders == Borders::Rmp);
        Arc::new(Self { policy, reading, rmp: Arc::clone(rmp) })
    }

    /// Whether a conversion leaves the leaves alone: private and shared pages have the same.
    pub fn keeps_leaves(&self) -> bool {
        self.policy == Policy::Mirror && self.reading.borders == Borders::Rmp
    }

    fn shared_sizes(&self) -> SizeSet {
        if self.reading.strict { SizeSet::ALL.up_to(Lg2::M2) } else { SizeSet::ALL }
    }

    /// Which policy.
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// The pages from the start of `run` whose RMP entries have one size, and that size.
    fn entry_size(&self, backing: &Backing, run: Span<Page>) -> (Span<Page>, SizeSet) {
        const PAGES_LG2: u8 = 9;
        // Entries change size at 2 MiB borders only, and windows begin on one.
        let block = Span::block(run.start(), PAGES_LG2);
        let prefix = block.intersect(run).unwrap_or(run);
        if prefix == block && self.rmp.size_at(backing.oa(block.start())) == secure::RmpSize::M2 {
            return (prefix, SizeSet::only(Lg2::M2));
        }
        // Small ones up to where a large one begins: looked at block by block, answered in one go.
        let mut last = prefix.last();
        while last < run.last() {
            let next = Span::block(Page::new(last.get() + 1), PAGES_LG2);
            let whole = run.covers(next);
            if whole && self.rmp.size_at(backing.oa(next.start())) == secure::RmpSize::M2 {
                break;
            }
            last = next.last().min(run.last());
        }
        (Span::of(run.start(), last), SizeSet::only(Lg2::K4))
    }
}

impl LeafRule for PolicyRule {
    fn leaf(&self, backing: &Backing, run: Span<Page>, state: PageState) -> (Span<Page>, Option<SizeSet>) {
        match (state, self.policy) {
            (PageState::Shared, _) => (run, Some(self.shared_sizes())),
            (PageState::Private, _) if self.keeps_leaves() => (run, Some(self.shared_sizes())),
            (PageState::Private, Policy::Mirror) => {
                let (prefix, sizes) = self.entry_size(backing, run);
                (prefix, Some(sizes))
            }
            (PageState::Private | PageState::Absent, _) => (run, None),
        }
    }
}
