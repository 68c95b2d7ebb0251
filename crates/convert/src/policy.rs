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

/// A policy as an IOAS asks it: per run of pages, the leaf sizes that are allowed.
#[derive(Clone, Debug)]
pub struct PolicyRule {
    policy: Policy,
    rmp: Arc<SystemRmp>,
}

impl PolicyRule {
    /// `policy`, with private leaves sized by the entries of `rmp`.
    pub fn new(policy: Policy, rmp: &Arc<SystemRmp>) -> Arc<Self> {
        Arc::new(Self { policy, rmp: Arc::clone(rmp) })
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
            (PageState::Shared, _) => (run, Some(SizeSet::ALL)),
            (PageState::Private, Policy::Mirror) => {
                let (prefix, sizes) = self.entry_size(backing, run);
                (prefix, Some(sizes))
            }
            (PageState::Private | PageState::Absent, _) => (run, None),
        }
    }
}
