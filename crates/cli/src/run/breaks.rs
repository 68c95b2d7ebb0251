//! Faults that `--break` plants: names for users, and the fail point of the layer that then misbehaves. No detector knows them.

use sync::fail::{self, PlantGuard};

/// One fault.
pub(crate) struct Break {
    /// On the command line.
    pub(crate) name: &'static str,
    point: &'static str,
    /// Hits to let pass first, so that the damage is done in the middle of the run.
    after: u64,
    times: u64,
    /// Devices with caches of their own that it needs.
    ats: u32,
}

const ALWAYS: u64 = u64::MAX;

/// Every fault.
pub(crate) const BREAKS: [Break; 12] = [
    Break { name: "skip-invalidation", point: "iommu.skip_invalidate", after: 20, times: ALWAYS, ats: 0 },
    Break { name: "late-fill", point: "iommu.late_fill", after: 20, times: ALWAYS, ats: 0 },
    Break { name: "skip-grace", point: "iommu.skip_grace", after: 20, times: ALWAYS, ats: 0 },
    Break { name: "map-before-switch", point: "convert.map_before_switch", after: 20, times: ALWAYS, ats: 0 },
    Break { name: "leave-shared-leaf", point: "convert.leave_leaf", after: 20, times: ALWAYS, ats: 0 },
    Break { name: "forget-psmash", point: "secure.forget_psmash", after: 0, times: ALWAYS, ats: 0 },
    Break { name: "ignore-punch", point: "backing.ignore_punch", after: 4, times: ALWAYS, ats: 0 },
    Break { name: "corrupt-leaf", point: "pt.corrupt_leaf", after: 100, times: 1, ats: 0 },
    Break { name: "merge-forgets-walk-caches", point: "pt.merge_forgets_walkers", after: 0, times: ALWAYS, ats: 0 },
    Break { name: "flip-rmp-bit", point: "secure.flip_bit", after: 100, times: 1, ats: 0 },
    Break { name: "ats-false-answer", point: "iommu.ats_false_answer", after: 20, times: ALWAYS, ats: 2 },
    Break { name: "ats-never-answers", point: "iommu.ats_never_answers", after: 20, times: ALWAYS, ats: 2 },
];

/// How many devices with caches of their own a run needs for the fault of that name.
pub(crate) fn needs_ats(name: &str) -> u32 {
    BREAKS.iter().find(|fault| fault.name == name).map_or(0, |fault| fault.ats)
}

/// Plants the fault of that name until the guard is dropped.
pub(crate) fn plant(name: &str) -> Option<PlantGuard> {
    let fault = BREAKS.iter().find(|fault| fault.name == name)?;
    Some(fail::plant(fault.point, fault.after, fault.times))
}
