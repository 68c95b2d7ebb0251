//! The machines: where their RAM is, which parts of it the tests use for what, and how their PCI configuration space is reached.
//!
//! A machine has 4 GiB of RAM, of which only what is touched takes memory of the host. Leaves lead to a few windows of it, at the ends
//! and in the middle, so that a leaf of 1 GiB has its first, last and middle bytes in one.

use crate::qtest::Qtest;
use addr::{Oa, Span};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// RAM of every machine, as QEMU is told.
pub(crate) const RAM: &str = "4G";

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const WINDOW: u64 = 16 * MIB;

/// How configuration space is reached.
#[derive(Clone, Copy, Debug)]
enum ConfigSpace {
    /// Address and data ports of a PC.
    Ports,
    /// Memory, 4 KiB for each function.
    Memory(u64),
}

/// A machine type.
#[derive(Debug)]
pub(crate) struct Board {
    /// The program that emulates it.
    pub(crate) program: &'static str,
    /// The instruction with which its CPU goes to sleep; no interrupt is enabled yet that would wake it.
    sleep: u32,
    /// First address of RAM.
    ram: u64,
    config: ConfigSpace,
    /// Where devices' registers may be put; 16 MiB and more.
    bars: u64,
    /// Where leaves lead to.
    windows: [u64; 5],
}

/// How QEMU is asked for it. Timers that tick for nobody are left out, since time would not get past them so fast.
pub(crate) const PC_MACHINE: &str = "q35,pit=off,hpet=off";

/// A PC with the Q35 chipset. Its RAM is in two parts, 2 GiB each, from 0 and from 4 GiB.
pub(crate) const PC: Board = Board {
    program: "qemu-system-x86_64",
    // HLT, four times.
    sleep: 0xf4f4_f4f4,
    ram: 0,
    config: ConfigSpace::Ports,
    bars: 0xe000_0000,
    windows: [128 * MIB, GIB, 2 * GIB - WINDOW, 4 * GIB, 6 * GIB - WINDOW],
};

/// QEMU's RISC-V machine.
pub(crate) const RISCV: Board = Board {
    program: "qemu-system-riscv64",
    // WFI.
    sleep: 0x1050_0073,
    ram: 2 * GIB,
    config: ConfigSpace::Memory(0x3000_0000),
    bars: 0x4000_0000,
    windows: [2 * GIB + 128 * MIB, 3 * GIB - WINDOW, 4 * GIB, 5 * GIB, 6 * GIB - WINDOW],
};

/// QEMU's 64-bit Arm machine.
pub(crate) const ARM: Board = Board {
    program: "qemu-system-aarch64",
    // WFI.
    sleep: 0xd503_207f,
    ram: GIB,
    config: ConfigSpace::Memory(0x40_1000_0000),
    bars: 0x1000_0000,
    windows: [GIB + 128 * MIB, 2 * GIB - WINDOW, 3 * GIB, 4 * GIB, 5 * GIB - WINDOW],
};

impl Board {
    /// A firmware for QEMU's `-bios`: wherever the CPU begins, it goes to sleep.
    pub(crate) fn firmware(&self) -> io::Result<PathBuf> {
        static WRITERS: AtomicU32 = AtomicU32::new(0);
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("sleeps-{}", self.program));
        // Under another name first: other tests use the same file, perhaps now.
        let own = path.with_extension(format!("{}-{}", std::process::id(), WRITERS.fetch_add(1, Ordering::Relaxed)));
        std::fs::write(&own, self.sleep.to_le_bytes().repeat(16 * KIB as usize))?;
        std::fs::rename(&own, &path)?;
        Ok(path)
    }

    /// Where the structures lie that tell the IOMMU what to do: 16 MiB.
    pub(crate) fn structures(&self) -> u64 {
        self.ram + 16 * MIB
    }

    /// Where the page tables lie: 16 MiB.
    pub(crate) fn tables(&self) -> Oa {
        Oa::new(self.ram + 64 * MIB)
    }

    /// A page that bytes are handed to the device in, and the one after it, in which they come back.
    pub(crate) fn mailbox(&self) -> Oa {
        Oa::new(self.ram + 96 * MIB)
    }

    /// Where leaves lead to.
    pub(crate) fn windows(&self) -> impl Iterator<Item = Span<Oa>> {
        self.windows.iter().map(|start| Span::of(Oa::new(*start), Oa::new(start + WINDOW - 1)))
    }

    /// Whether all of `span` is in one window.
    pub(crate) fn has(&self, span: Span<Oa>) -> bool {
        self.windows().any(|window| window.covers(span))
    }

    fn config32(&self, qtest: &mut Qtest, devfn: u8, register: u16, value: u32) {
        match self.config {
            ConfigSpace::Ports => {
                qtest.out32(0xcf8, 1 << 31 | u32::from(devfn) << 8 | u32::from(register));
                qtest.out32(0xcfc, value);
            }
            ConfigSpace::Memory(base) => qtest.write32(base + u64::from(devfn) * 4 * KIB + u64::from(register), value),
        }
    }

    /// Puts the first 1 MiB of registers of a device on bus 0 somewhere, and lets it be seen and use memory; answers where.
    pub(crate) fn enable(&self, qtest: &mut Qtest, devfn: u8) -> u64 {
        let bar = self.bars + u64::from(devfn) * MIB;
        self.config32(qtest, devfn, 0x10, bar as u32);
        // Memory space and bus master.
        self.config32(qtest, devfn, 0x04, 1 << 1 | 1 << 2);
        bar
    }
}
