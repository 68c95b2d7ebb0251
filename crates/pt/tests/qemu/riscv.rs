//! QEMU's RISC-V IOMMU, first stage. Register and structure figures: RISC-V IOMMU Architecture Specification 1.0, sections 2.1 (device context),
//! 3.1 (commands), 3.2 (fault records) and 5 (registers).

use crate::board::{Board, RISCV};
use crate::qtest::Qtest;
use crate::walker::{Fault, Invalidates, Walker, blocks};
use addr::{Iova, Oa, PAGE_LG2, Span};

/// The IOMMU is a PCI device itself.
const IOMMU_DEVFN: u8 = 0x08;
const DIRECTORY: u64 = 0x10;
const COMMAND_BASE: u64 = 0x18;
const COMMAND_HEAD: u64 = 0x20;
const COMMAND_TAIL: u64 = 0x24;
const FAULT_BASE: u64 = 0x28;
const FAULT_HEAD: u64 = 0x30;
const FAULT_TAIL: u64 = 0x34;
const COMMAND_STATUS: u64 = 0x48;
const FAULT_STATUS: u64 = 0x4c;
const ON: u32 = 1 << 16;
const ERRORS: u32 = 1 << 8 | 1 << 9 | 1 << 10;

/// Queues of 128 entries: the field is the logarithm less one.
const ENTRIES: u32 = 128;
const LENGTH: u64 = 6;
const FAULT_BYTES: u64 = 32;
const PROCESS: u64 = 7;
const READ_FAULT: u64 = 13;
const WRITE_FAULT: u64 = 15;
/// An invalidation by address is of one page.
const MOST_PAGES: usize = 32;

#[derive(Debug, Default)]
pub(crate) struct RiscVIommu {
    registers: u64,
    tail: u32,
    fault_head: u32,
}

impl RiscVIommu {
    fn commands() -> u64 {
        RISCV.structures() + 0x8000
    }

    fn fault_records() -> u64 {
        RISCV.structures() + 0x9000
    }

    fn submit(&mut self, qtest: &mut Qtest, command: [u64; 2]) {
        qtest.write_words(Self::commands() + u64::from(self.tail) * 16, &command);
        self.tail = (self.tail + 1) % ENTRIES;
        qtest.write32(self.registers + COMMAND_TAIL, self.tail);
    }
}

impl Walker for RiscVIommu {
    const BOARD: &'static Board = &RISCV;
    const INVALIDATES: Invalidates = Invalidates::TheSpan;

    fn args(&self) -> Vec<String> {
        let iommu = format!("riscv-iommu-pci,addr={:#x}", IOMMU_DEVFN >> 3);
        ["-machine", "virt", "-device", &iommu].map(str::to_owned).to_vec()
    }

    fn start(&mut self, qtest: &mut Qtest, root: Oa, level: u8) {
        self.registers = RISCV.enable(qtest, IOMMU_DEVFN);
        // Sv39, Sv48 and Sv57 are 8, 9 and 10.
        let mode = u64::from(level) + 6;
        // V and SADE.
        let context = [1 | 1 << 8, 0, PROCESS << 12, mode << 60 | root.get() >> 12];
        qtest.write_words(RISCV.structures() + u64::from(Self::DEVFN) * 64, &context);
        for (base, at, status) in [(COMMAND_BASE, Self::commands(), COMMAND_STATUS), (FAULT_BASE, Self::fault_records(), FAULT_STATUS)] {
            qtest.write64(self.registers + base, at >> 2 | LENGTH);
            qtest.write32(self.registers + status, 1);
            let now = qtest.read32(self.registers + status);
            assert_eq!(now & (ON | ERRORS), ON, "a queue of the RISC-V IOMMU is not on: {now:#x}");
        }
        // A directory of one level.
        qtest.write64(self.registers + DIRECTORY, RISCV.structures() >> 2 | 2);
    }

    fn invalidate(&mut self, qtest: &mut Qtest, span: Span<Iova>) {
        // IOTINVAL.VMA of an address space, PSCV; with AV, of an address in it.
        let of_process = 1 | PROCESS << 12 | 1 << 32;
        match blocks(span, PAGE_LG2, MOST_PAGES) {
            Some(pages) => pages.iter().for_each(|(at, _)| self.submit(qtest, [of_process | 1 << 10, at >> 2])),
            None => self.submit(qtest, [of_process, 0]),
        }
        let (head, status) = (qtest.read32(self.registers + COMMAND_HEAD), qtest.read32(self.registers + COMMAND_STATUS));
        assert_eq!((head, status & ERRORS), (self.tail, 0), "the RISC-V IOMMU has not taken every command");
    }

    fn faults(&mut self, qtest: &mut Qtest) -> Vec<Fault> {
        let tail = qtest.read32(self.registers + FAULT_TAIL);
        let mut faults = Vec::new();
        while self.fault_head != tail {
            let record = Self::fault_records() + u64::from(self.fault_head) * FAULT_BYTES;
            let (header, iova) = (qtest.read64(record), qtest.read64(record + 16));
            assert_eq!(header >> 40, u64::from(Self::DEVFN), "the RISC-V IOMMU records a fault of another device: {header:#x}");
            let write = match header & 0xfff {
                READ_FAULT => false,
                WRITE_FAULT => true,
                cause => panic!("the RISC-V IOMMU records cause {cause} at {iova:#x}"),
            };
            faults.push(Fault { iova: Iova::new(iova), write });
            self.fault_head = (self.fault_head + 1) % ENTRIES;
        }
        qtest.write32(self.registers + FAULT_HEAD, self.fault_head);
        faults
    }
}
