//! QEMU's IOMMU models walk the page tables that this crate writes: somebody else's reading of the manuals, held against ours.
//!
//! No guest runs. A test speaks QEMU's qtest protocol (`qtest`): it copies the words of the arena into the machine's RAM (`mirror`), programs the
//! IOMMU (`vtd`, `amdvi`, `riscv`, `smmu`), and has the DMA engine of a PCI device (`edu`, `device`) read and write at IOVAs: first, last and
//! middle bytes of leaves of every size, across their borders, and where nothing is mapped. Each access must do what
//! [`Table::walk`](lockstep_pt::Table::walk) says (`probe`). Then come cuts, merges and unmaps (`drive`), after which the model forgets what
//! the edit's [`Gather`](lockstep_pt::Gather) names, and no more. Nothing is compared with our own `decode` alone: a format that is wrong both
//! in writing and in reading fails here.
//!
//! What the models do not do, and so is not shown here; tried with QEMU 10.0.2, or read in its source:
//!
//! - None keeps pointers to tables in a cache, so none can tell whether an edit invalidates those.
//! - None sets a dirty bit: VT-d's first stage only where accessed is clear, which our leaves never have; the RISC-V IOMMU takes SADE for "need
//!   not be set"; AMD-Vi ignores it. The SMMU refuses a write through a clean leaf, so its leaves are marked dirty by
//!   [`Table::mark_dirty`](lockstep_pt::Table::mark_dirty) before they are written through.
//! - None records an access that a cached translation does not allow; of AMD-Vi no event ever comes into the log.
//! - VT-d: three levels and four, not five; first stage with four. SNP is a reserved bit in its second stage without `snoop-control=on`. A leaf
//!   that has 0xfee00000 in its output is refused.
//! - AMD-Vi lets all DMA through without `pt=off`. It drops a whole domain where a range is to be invalidated, so a range that is too small is
//!   not noticed. An IOVA above the width of the tables wraps around. Leaves of 512 GiB work, other than in hardware. FC is not looked at.
//! - RISC-V: no Svnapot; a leaf of 64 KiB faults. U is not looked at. A larger leaf is cached page by page, and an invalidation by address drops
//!   one page. The second stage is no format of ours.
//! - SMMUv3: 44 address bits, and no record of what is above. The contiguous bit is ignored, which a hint allows: the slots of such a leaf are
//!   walked one by one. It says BBML 2.
#![cfg(not(loom))]

mod amdvi;
mod board;
mod device;
mod drive;
mod edu;
mod mirror;
mod probe;
mod qtest;
mod rig;
mod riscv;
mod smmu;
mod vtd;
mod walker;

use amdvi::AmdVi;
use drive::{grow, run};
use lockstep_pt::{AmdV1, AmdV1Coherent, Armv8S2, Config, Format, RiscV, VtdSs, X86_64};
use riscv::RiscVIommu;
use smmu::Smmu;
use std::io::Write;
use vtd::{Mode, Vtd};

/// Set to anything but 0 by whoever wants every test of this file to run: what is missing is a failure then.
const REQUIRE: &str = "LOCKSTEP_REQUIRE_QEMU";

/// Whether `program` is there and has what a test needs; when not, says so where it is seen also of tests that pass.
fn found(test: &str, program: &str, device: &str, property: Option<&str>) -> bool {
    let missing = match qtest::version(program) {
        None => format!("{program} is not here"),
        Some(version) if qtest::has(program, device, property) => {
            println!("{test}: {device} of {version}");
            return true;
        }
        Some(version) => format!("{version} has no {device}{}", property.map(|name| format!(" with {name}")).unwrap_or_default()),
    };
    assert!(std::env::var_os(REQUIRE).is_none_or(|value| value == "0"), "{test}: {missing}, and {REQUIRE} is set");
    // Past the test harness, which keeps what passing tests print.
    let _ = std::io::stderr().write_all(format!("not run: {test}: {missing}\n").as_bytes());
    false
}

/// The configuration with the most leaf sizes.
fn largest<F: Format>() -> Config {
    F::CONFIGS[0]
}

fn without_svnapot<F: Format>() -> Config {
    F::CONFIGS[1]
}

#[test]
fn vtd_legacy() {
    if found("vtd_legacy", board::PC.program, "intel-iommu", Some("snoop-control")) {
        for config in VtdSs::<4>::CONFIGS {
            run::<VtdSs<4>, _>(Vtd::new(Mode::Legacy, 48), "legacy mode", *config);
        }
        run::<VtdSs<3>, _>(Vtd::new(Mode::Legacy, 48), "legacy mode", largest::<VtdSs<3>>());
        run::<VtdSs<3>, _>(Vtd::new(Mode::Legacy, 39), "legacy mode, 39 bits", largest::<VtdSs<3>>());
    }
}

#[test]
fn vtd_scalable() {
    if found("vtd_scalable", board::PC.program, "intel-iommu", Some("x-scalable-mode")) {
        run::<VtdSs<4>, _>(Vtd::new(Mode::ScalableSecond, 48), "scalable mode", largest::<VtdSs<4>>());
        run::<VtdSs<3>, _>(Vtd::new(Mode::ScalableSecond, 48), "scalable mode", largest::<VtdSs<3>>());
    }
}

#[test]
fn vtd_first_stage() {
    if found("vtd_first_stage", board::PC.program, "intel-iommu", Some("x-flts")) {
        for config in X86_64::<4>::CONFIGS {
            run::<X86_64<4>, _>(Vtd::new(Mode::ScalableFirst, 48), "VT-d first stage", *config);
        }
    }
}

#[test]
fn amdvi() {
    if found("amdvi", board::PC.program, "amd-iommu", Some("pt")) {
        for config in AmdV1::CONFIGS {
            run::<AmdV1, _>(AmdVi::default(), "AMD-Vi", *config);
        }
        run::<AmdV1Coherent, _>(AmdVi::default(), "AMD-Vi", largest::<AmdV1Coherent>());
    }
}

#[test]
fn amdvi_grows() {
    if found("amdvi_grows", board::PC.program, "amd-iommu", Some("pt")) {
        grow::<AmdV1, _>(AmdVi::default(), "AMD-Vi");
    }
}

#[test]
fn riscv() {
    if found("riscv", board::RISCV.program, "riscv-iommu-pci", None) {
        run::<RiscV<3>, _>(RiscVIommu::default(), "RISC-V IOMMU", without_svnapot::<RiscV<3>>());
        run::<RiscV<4>, _>(RiscVIommu::default(), "RISC-V IOMMU", without_svnapot::<RiscV<4>>());
        run::<RiscV<5>, _>(RiscVIommu::default(), "RISC-V IOMMU", without_svnapot::<RiscV<5>>());
    }
}

#[test]
fn smmu_with_breaks() {
    if found("smmu_with_breaks", board::ARM.program, "arm-smmuv3", Some("stage")) {
        for config in Armv8S2::<4, false>::CONFIGS {
            run::<Armv8S2<4, false>, _>(Smmu::default(), "SMMUv3", *config);
        }
        run::<Armv8S2<3, false>, _>(Smmu::default(), "SMMUv3", largest::<Armv8S2<3, false>>());
    }
}

#[test]
fn smmu_in_place() {
    if found("smmu_in_place", board::ARM.program, "arm-smmuv3", Some("stage")) {
        run::<Armv8S2<4, true>, _>(Smmu::default(), "SMMUv3", largest::<Armv8S2<4, true>>());
        run::<Armv8S2<3, true>, _>(Smmu::default(), "SMMUv3", largest::<Armv8S2<3, true>>());
    }
}
