//! Several at once: what a reader notices of a writer, and what two writers on disjoint spans reach together.
//!
//! - Rows named `walk` and `translate` are readers. Each is measured alone and, in turns of the same run, beside a thread that edits: at full
//!   speed, or, where the name says `paced`, nine edits every 100 microseconds. The figures are percentiles, and what an edit took.
//! - The others are writers, one and then two of them in turns of the same run; the figures are time per operation of both together, and how
//!   many times one thread's rate that is. Rows named `apart` share nothing at all: what two threads can reach on the machine.

mod edits;
mod latency;
mod pair;
mod processors;
mod spaces;

use crate::{Row, Unit};
use latency::{Beside, Reads, Where};
use pt::FormatKind;

macro_rules! row {
    ($name:literal, $make:expr) => {
        Row { name: $name, format: "amdv1", unit: Unit::Call, kind: FormatKind::AmdV1, make: $make }
    };
}

/// Its rows.
pub fn rows() -> Vec<Row> {
    use edits::{Edits, apart, one_tree};
    vec![
        row!("walk_beside_nothing", |format| Beside::work(format, Reads::Walks, Where::Nowhere)),
        row!("walk_beside_edits", |format| Beside::work(format, Reads::Walks, Where::Elsewhere)),
        row!("walk_beside_paced_edits", |format| Beside::work(format, Reads::Walks, Where::ElsewherePaced)),
        row!("walk_under_edits", |format| Beside::work(format, Reads::Walks, Where::SameLeaf)),
        row!("translate_beside_nothing", |format| Beside::work(format, Reads::Translations, Where::Nowhere)),
        row!("translate_beside_edits", |format| Beside::work(format, Reads::Translations, Where::Elsewhere)),
        row!("translate_beside_paced_edits", |format| Beside::work(format, Reads::Translations, Where::ElsewherePaced)),
        row!("translate_under_edits", |format| Beside::work(format, Reads::Translations, Where::SameLeaf)),
        Row { format: "-", ..row!("cache_line_handed_over", |_| pair::Handover::work()) },
        row!("apart_map_unmap_4k", |format| apart(format, Edits::K4)),
        row!("tree_map_unmap_4k", |format| one_tree(format, Edits::K4)),
        row!("apart_map_unmap_2m", |format| apart(format, Edits::M2)),
        row!("tree_map_unmap_2m", |format| one_tree(format, Edits::M2)),
        row!("apart_cut_merge", |format| apart(format, Edits::CutMerge)),
        row!("tree_cut_merge", |format| one_tree(format, Edits::CutMerge)),
        row!("apart_ioas_map_unmap_4k", |format| spaces::apart(format, Edits::K4)),
        row!("ioas_map_unmap_4k", |format| spaces::one_space(format, Edits::K4)),
        row!("apart_ioas_map_unmap_2m", |format| spaces::apart(format, Edits::M2)),
        row!("ioas_map_unmap_2m", |format| spaces::one_space(format, Edits::M2)),
        row!("apart_ioas_cut_merge", |format| spaces::apart(format, Edits::CutMerge)),
        row!("ioas_cut_merge", |format| spaces::one_space(format, Edits::CutMerge)),
    ]
}
