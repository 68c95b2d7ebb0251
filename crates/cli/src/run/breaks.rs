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
}

const ALWAYS: u64 = u64::MAX;

/// Every fault.
pub(crate) const BREAKS: [Break; 9] = [
    Break { name: "skip-invalidation", point: "iommu.skip_invalidate", after: 20, times: ALWAYS },
    Break { name: "late-fill", point: "iommu.late_fill", after: 20, times: ALWAYS },
    Break { name: "skip-grace", point: "iommu.skip_grace", after: 20, times: ALWAYS },
    Break { name: "map-before-switch", point: "convert.map_before_switch", after: 20, times: ALWAYS },
    Break { name: "leave-shared-leaf", point: "convert.leave_leaf", after: 20, times: ALWAYS },
    Break { name: "forget-psmash", point: "secure.forget_psmash", after: 0, times: ALWAYS },
    Break { name: "ignore-punch", point: "backing.ignore_punch", after: 4, times: ALWAYS },
    Break { name: "corrupt-leaf", point: "pt.corrupt_leaf", after: 100, times: 1 },
    Break { name: "flip-rmp-bit", point: "secure.flip_bit", after: 100, times: 1 },
];

/// Plants the fault of that name until the guard is dropped.
pub(crate) fn plant(name: &str) -> Option<PlantGuard> {
    let fault = BREAKS.iter().find(|fault| fault.name == name)?;
    Some(fail::plant(fault.point, fault.after, fault.times))
}
