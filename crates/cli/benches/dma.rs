//! Translation and DMA copies, under criterion: see `workload::dma` for what each row does.

mod common;

fn main() {
    common::main(workload::Group::Dma, &[]);
}
