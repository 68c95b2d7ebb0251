//! Faults that can be planted in the model. Those with a name of `lockstep run --break` are the same mistakes; the others are mistakes that the real code
//! has no switch for, because a switch would be the mistake. Each must be found, as the break of a property that it names.

use crate::properties::Law;
use crate::scenes::Scene;

macro_rules! faults {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal, $law:ident, $scene:ident;)+) => {
        /// One mistake.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum Fault {
            $($(#[doc = $doc])+ $name,)+
        }

        impl Fault {
            /// Every one.
            pub const ALL: &[Self] = &[$(Self::$name),+];

            /// As `--break` takes it.
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $text),+ }
            }

            /// What the mistake is.
            pub fn what(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc),+).trim_ascii()),+ }
            }

            /// A property that it breaks, and the first to be found broken.
            pub fn breaks(self) -> Law {
                match self { $(Self::$name => Law::$law),+ }
            }

            /// The smallest scene in which it shows.
            pub fn scene(self) -> Scene {
                match self { $(Self::$name => Scene::$scene),+ }
            }
        }
    };
}

faults! {
    /// What was cleared is not logged, so contexts keep it in their IOTLBs.
    SkipInvalidation = "skip-invalidation", I7, Devices;
    /// A walk's result is cached in the next guard, behind the invalidation that it missed.
    LateFill = "late-fill", I7, Devices;
    /// The owner changes while guards that were open before are still open.
    SkipGrace = "skip-grace", I7, Devices;
    /// New leaves are installed before the secure world's table has changed.
    MapBeforeSwitch = "map-before-switch", I5, Devices;
    /// One leaf of a conversion is not taken out.
    LeaveSharedLeaf = "leave-shared-leaf", I7, Devices;
    /// PSMASH reports success and does nothing.
    ForgetPsmash = "forget-psmash", I5, Device;
    /// Memory is given back without telling those who have mapped it.
    IgnorePunch = "ignore-punch", I4, Device;
    /// A leaf leads to the frame beside the right one.
    CorruptLeaf = "corrupt-leaf", I10, Device;
    /// An entry of the RMP has a bit of its GPA flipped.
    FlipRmpBit = "flip-rmp-bit", I5, Devices;
    /// The grace period is over before the invalidation is logged.
    GraceBeforeLog = "grace-before-log", I7, Devices;
    /// A context applies the log when it leaves a guard, not when it enters.
    CatchUpAfterLookup = "catch-up-after-lookup", I7, Devices;
    /// PSMASH makes the base entry small before the others say anything.
    SmashFlipsBaseFirst = "smash-flips-base-first", Exact, Device;
    /// A split of entry and leaf is not announced, so a device takes a size that differs for a fault.
    SmashWithoutSequence = "smash-without-sequence", I5, Device;
    /// A size that differs counts as a fault without a fresh walk.
    NoFreshWalk = "no-fresh-walk", Exact, Device;
    /// A cut takes the large leaf out first and puts the table in afterwards.
    CutInTwoStores = "cut-in-two-stores", I10, Devices;
    /// The check of a device against the RMP is left out.
    SkipRmpCheck = "skip-rmp-check", I13, Devices;
    /// The guest is told before devices may reach what it asked for.
    AcknowledgeBeforeAttach = "acknowledge-before-attach", Exact, Devices;
    /// A page that the secure world kept is mapped again like one that nothing happened to.
    MapLeaked = "map-leaked", I4, Device;
    /// A conversion that fails after it has frozen never thaws.
    RollbackStaysFrozen = "rollback-stays-frozen", Ends, Device;
    /// A refused switch leaves the pages unmapped, and says that nothing has changed.
    RollbackForgetsLeaves = "rollback-forgets-leaves", I10, Device;
    /// A punch gives the memory back before what it cleared is flushed.
    DiscardBeforeFlush = "discard-before-flush", Released, Device;
    /// A part of a large entry, of which stage 2 had not been told, is told again and mapped small without a split of the entry.
    RetryKeepsLargeEntry = "retry-keeps-large-entry", I5, Device;
    /// A walk waits for whoever holds the pages.
    WalkTakesLock = "walk-takes-lock", I15, Devices;
    /// A context goes on with the identity that it copied.
    StaleIdentity = "stale-identity", I13, Trust;
    /// A change of identity does not wait for guards.
    TrustWithoutGrace = "trust-without-grace", I13, Trust;
    /// Small leaves are joined without holding the pages.
    MergeWithoutLock = "merge-without-lock", I7, Hosts;
    /// A conversion gives the pages back before it has mapped them.
    UnlockBeforeAttach = "unlock-before-attach", I7, Hosts;
    /// A conversion that fails keeps the pages.
    RollbackStaysLocked = "rollback-stays-locked", Ends, Device;
    /// vCPUs are let in before stage 2 is told of the owner.
    ThawBeforeCommit = "thaw-before-commit", I11, Stage2;
    /// Stage 2 is frozen after the owner has changed.
    FreezeLate = "freeze-late", I11, Stage2;
    /// The end of an invalidation does not move the sequence that faults compare.
    ForgetSequence = "forget-sequence", I11, Stage2;
    /// A fault does not look whether an invalidation is going on.
    FaultIgnoresFreeze = "fault-ignores-freeze", I11, Stage2;
    /// A memslot may show a page that another shows.
    AliasSlot = "alias-slot", I8, Stage2;
    /// Device caches are told before the IOTLBs that refill them.
    AtsBeforeGrace = "ats-before-grace", I7, Ats;
    /// A device cache is not told.
    SkipAts = "skip-ats", I7, Ats;
    /// A device that does not answer is left as it is.
    AtsTimeOutIgnored = "ats-time-out-ignored", I7, Ats;
    /// A device that is cut off is not waited for while an access of it is under way.
    AtsQuarantineWithoutDrain = "ats-quarantine-without-drain", I7, Ats;
    /// A device answers an invalidation with accesses of its own still under way.
    AtsAckEarly = "ats-ack-early", I7, Ats;
    /// A device answers an invalidation and forgets nothing.
    AtsFalseAnswer = "ats-false-answer", I7, Ats;
    /// A translation that was on its way to a device when that answered is kept.
    AtsKeepsAnswer = "ats-keeps-answer", I7, Ats;
}

impl Fault {
    /// By name.
    pub fn of(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|fault| fault.name() == name)
    }
}
