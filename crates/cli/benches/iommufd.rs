//! Calls of /dev/iommu in process, under criterion: see `workload::iommufd` for what each row does. `lockstep bench iommufd` has those of a program, too.

mod common;

fn main() {
    common::main(workload::Group::Iommufd, &[]);
}
