//! Page state change: the one operation that moves pages between guest and host through all three tables, and the audit that proves the
//! tables equal.
//!
//! - *owner*: whose page it is. [`Owner::Private`] is the guest's, [`Owner::Shared`] the host's.
//! - *space*: what one VM's tables have in common: memslots, ASID, RMP, stage 2 ([`Space`]).
//! - *conversion*: a change of owner. The law of its order: remove, observe completion, change owner, add (design D-6).
//! - *stage*: how far a conversion has come; each stage is a type that can only become the next ([`Conversion`]).
//! - *policy*: what devices may have mapped, per IOAS ([`Policy`]).
//! - *audit*: a second walker reads the IO page tables' bytes and the RMP's, and holds them against each other and against what stage 2 was
//!   told ([`Auditor`]).

mod audit;
mod error;
mod ownership;
mod plan;
mod policy;
pub mod psc;
mod raw_walk;
mod report;
mod slots;
mod smash;
mod space;
mod stage2;
mod stages;
mod switch;

pub use audit::Auditor;
pub use error::{ConvertError, Step};
pub use policy::{Borders, Policy, PolicyRule, Reading};
pub use raw_walk::{RawLeaf, RawOddity, RawTree, read_tree};
pub use report::{AuditReport, Difference, Says};
pub use smash::{SmashError, smash};
pub use space::{Counters, Space, SpaceError, Transition};
pub use stage2::{Busy, Evidence, RecordedStage2, Stage2, Stage2Error};
pub use stages::{Conversion, Done};

use addr::{Gpa, Span};

/// Whose page it is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Owner {
    /// The guest's: assigned in the RMP.
    Private,
    /// The host's: unassigned.
    Shared,
}

impl Owner {
    /// Who had it before, or has it after.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Private => Self::Shared,
            Self::Shared => Self::Private,
        }
    }
}

impl From<Owner> for backing::PageState {
    fn from(owner: Owner) -> Self {
        match owner {
            Owner::Private => Self::Private,
            Owner::Shared => Self::Shared,
        }
    }
}

/// One span, and whose it is to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Change {
    /// Whole pages.
    pub span: Span<Gpa>,
    /// The new owner.
    pub to: Owner,
}
