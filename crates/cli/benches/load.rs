//! Readers and writers at once, under criterion: see `workload::load` for what each row does.

mod common;

fn main() {
    common::main(workload::Group::Load, &[]);
}
