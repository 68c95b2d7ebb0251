//! IO page tables, under criterion: see `workload::pt` for what each row does.

mod common;

use pt::FormatKind;

fn main() {
    common::main(workload::Group::Pt, &[FormatKind::VtdSs4, FormatKind::X86Levels4]);
}
