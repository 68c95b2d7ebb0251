//! The kernel's own speed, beside which rows are shown: medians of Linux 7.3.4's drivers/iommu/generic_pt, built for user mode with a
//! benchmark around it, on a two-core AMD EPYC machine. A uniprocessor build, so without locked instructions. Measured apart from any run
//! here, so a ratio says as much as the two machines are alike.

use crate::Row;
use pt::FormatKind;

/// What the kernel takes for the work of a row, and what the row is to reach.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Kernel {
    /// Its median, in the row's unit.
    pub median_ns: f64,
    /// Design, section 5.
    pub goal_ns: f64,
}

const FORMATS: [FormatKind; 4] = [FormatKind::AmdV1, FormatKind::VtdSs4, FormatKind::X86Levels4, FormatKind::Sv48];

const HALF: f64 = 0.5;
const PAR: f64 = 1.0;
/// The format has no such work there.
const NONE: f64 = 0.0;

/// Row, medians in the order of [`FORMATS`], and the goal as a part of them.
const ROWS: [(&str, [f64; 4], f64); 20] = [
    ("map_4k", [26.6, 31.1, 31.3, 31.8], HALF),
    ("unmap_4k", [30.1, 33.1, 33.5, 34.1], HALF),
    ("map_16x4k", [58.2, 59.3, 61.5, 64.8], HALF),
    ("map_256x4k", [491.0, 352.0, 369.0, 453.0], HALF),
    ("unmap_256x4k", [446.0, 242.0, 243.0, 813.0], HALF),
    ("map_256x4k_sized", [342.0, NONE, NONE, NONE], HALF),
    ("unmap_256x4k_sized", [61.0, NONE, NONE, NONE], PAR),
    ("map_list_256", [27.4, 29.5, 30.3, 32.2], HALF),
    ("unmap_list_256", [1.75, 0.95, 0.96, 3.18], HALF),
    ("map_2m", [31.7, 35.3, 36.3, 37.0], HALF),
    ("unmap_2m", [24.5, 28.9, 29.1, 29.4], HALF),
    ("map_1g", [26.6, 29.6, 30.6, 32.9], HALF),
    ("unmap_1g", [21.4, 22.9, 24.6, 25.2], HALF),
    ("walk_hot_4k", [17.4, 18.8, 18.9, 21.4], HALF),
    ("walk_random_4k", [28.9, 31.7, 31.3, 33.8], HALF),
    ("walk_1g_leaf", [13.6, 14.6, 15.0, 16.6], HALF),
    ("map_1g_as_4k", [2.01, 1.43, 1.51, 1.75], HALF),
    ("map_1g_as_4k_present", [1.79, 1.25, 1.31, 1.62], HALF),
    ("unmap_1g_as_4k", [1.70, 0.89, 0.88, 3.06], HALF),
    ("map_1g_scattered", [27.2, 32.3, 31.6, 32.0], HALF),
];

impl Row {
    /// The kernel's figure for the same work in the same format, where there is one.
    pub fn kernel(&self) -> Option<Kernel> {
        let format = FORMATS.iter().position(|kind| kind.name() == self.format)?;
        let (_, medians, part) = ROWS.iter().find(|(name, ..)| *name == self.name)?;
        (medians[format] != NONE).then(|| Kernel { median_ns: medians[format], goal_ns: medians[format] * part })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Group;

    #[test]
    fn every_figure_has_its_row() {
        for (format, kind) in FORMATS.iter().enumerate() {
            let rows = Group::Pt.rows(*kind);
            let found = rows.iter().filter(|row| row.kernel().is_some()).count();
            assert_eq!(found, ROWS.iter().filter(|(_, medians, _)| medians[format] != NONE).count(), "{kind}");
        }
        assert!(Group::Pt.rows(FormatKind::Armv8S2).iter().all(|row| row.kernel().is_none()));
    }
}
