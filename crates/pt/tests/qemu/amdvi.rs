//! QEMU's AMD-Vi. Register and structure figures: AMD I/O Virtualization Technology (IOMMU) Specification, 48882, sections 2.2.2 (device table
//! entry), 2.4 (commands) and 3.4 (registers).

use crate::board::{Board, PC, PC_MACHINE};
use crate::qtest::Qtest;
use crate::walker::{Fault, Invalidates, Walker};
use addr::{Iova, Oa, Span};

const REGISTERS: u64 = 0xfed8_0000;
const DEVICE_TABLE: u64 = REGISTERS;
const COMMAND_BASE: u64 = REGISTERS + 0x08;
const EVENT_BASE: u64 = REGISTERS + 0x10;
const CONTROL: u64 = REGISTERS + 0x18;
const COMMAND_HEAD: u64 = REGISTERS + 0x2000;
const COMMAND_TAIL: u64 = REGISTERS + 0x2008;
const EVENT_TAIL: u64 = REGISTERS + 0x2018;

/// Entries of the command buffer and of the event log: 256, of 16 bytes.
const RING_LENGTH: u64 = 8 << 56;
const RING_BYTES: u64 = 4096;
const DOMAIN: u64 = 7;

#[derive(Debug, Default)]
pub(crate) struct AmdVi {
    tail: u64,
    completed: u64,
}

impl AmdVi {
    fn commands() -> u64 {
        PC.structures() + 0x8000
    }

    fn completion() -> u64 {
        PC.structures() + 0xa000
    }

    fn submit(&mut self, qtest: &mut Qtest, command: [u64; 2]) {
        qtest.write_words(Self::commands() + self.tail, &command);
        self.tail = (self.tail + 16) % RING_BYTES;
        qtest.write64(COMMAND_TAIL, self.tail);
    }

    /// COMPLETION_WAIT with a store, and a look whether it came.
    fn complete(&mut self, qtest: &mut Qtest) {
        self.completed += 1;
        self.submit(qtest, [1 << 60 | Self::completion() | 1, self.completed]);
        let head = qtest.read64(COMMAND_HEAD) % RING_BYTES;
        assert_eq!(head, self.tail, "AMD-Vi has not taken every command");
        let done = qtest.read64(Self::completion());
        assert_eq!(done, self.completed, "AMD-Vi has not stored what it was told to");
    }

    fn write_device_entry(qtest: &mut Qtest, root: Oa, level: u8) {
        // V, TV, IR and IW; the mode counts levels from one.
        let entry = root.get() | u64::from(level + 1) << 9 | 3 << 61 | 3;
        qtest.write_words(PC.structures() + u64::from(Self::DEVFN) * 32, &[entry, DOMAIN, 0, 0]);
    }

    /// The address field of INVALIDATE_IOMMU_PAGES for the smallest power of two that holds the span: ones below the bit that it ends with,
    /// and S.
    fn range(span: Span<Iova>) -> u64 {
        let (start, last) = (span.start().get(), span.last().get());
        match 64 - (start ^ last).leading_zeros() {
            0..=12 => start & !0xfff,
            13..=52 => ((start | ((1 << (64 - (start ^ last).leading_zeros() - 1)) - 1)) & !0xfff) | 1,
            _ => 0x7fff_ffff_ffff_f001,
        }
    }
}

impl Walker for AmdVi {
    const BOARD: &'static Board = &PC;
    const DEVFN: u8 = 0x80;
    const ASIDE: Option<(u64, u64)> = Some((0xfee0_0000, 0xfeef_ffff));
    const REFUSES_ABOVE: bool = false;
    const RECORDS: bool = false;
    const INVALIDATES: Invalidates = Invalidates::TheDomain;

    fn args(&self) -> Vec<String> {
        // Without pt=off the model lets all DMA through.
        ["-machine", PC_MACHINE, "-device", "amd-iommu,pt=off"].map(str::to_owned).to_vec()
    }

    fn start(&mut self, qtest: &mut Qtest, root: Oa, level: u8) {
        Self::write_device_entry(qtest, root, level);
        // 8 KiB of device table.
        qtest.write64(DEVICE_TABLE, PC.structures() | 1);
        qtest.write64(COMMAND_BASE, Self::commands() | RING_LENGTH);
        qtest.write64(EVENT_BASE, (Self::commands() + RING_BYTES) | RING_LENGTH);
        // IOMMU, event log and command buffer on.
        qtest.write64(CONTROL, 1 | 1 << 2 | 1 << 12);
        self.complete(qtest);
    }

    fn set_root(&mut self, qtest: &mut Qtest, root: Oa, level: u8) {
        Self::write_device_entry(qtest, root, level);
        self.submit(qtest, [2 << 60 | u64::from(Self::DEVFN), 0]);
        self.invalidate(qtest, Span::whole());
    }

    fn invalidate(&mut self, qtest: &mut Qtest, span: Span<Iova>) {
        self.submit(qtest, [3 << 60 | DOMAIN << 32, Self::range(span)]);
        self.complete(qtest);
    }

    /// Should a model log one day, this fails, and the log is to be read.
    fn faults(&mut self, qtest: &mut Qtest) -> Vec<Fault> {
        let tail = qtest.read64(EVENT_TAIL);
        assert_eq!(tail, 0, "AMD-Vi logs events now");
        Vec::new()
    }
}
