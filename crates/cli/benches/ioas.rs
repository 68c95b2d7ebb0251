//! IO address spaces, under criterion: see `workload::ioas` for what each row does.

mod common;

fn main() {
    common::main(workload::Group::Ioas, &[]);
}
