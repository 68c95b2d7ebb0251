//! IO page tables, under criterion: see `workload::pt` for what each row does.

mod common;

fn main() {
    common::main(workload::Group::Pt);
}
