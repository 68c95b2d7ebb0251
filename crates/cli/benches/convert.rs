//! Page state changes, under criterion: see `workload::convert` for what each row does.

mod common;

fn main() {
    common::main(workload::Group::Convert, &[]);
}
