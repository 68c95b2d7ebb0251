//! QEMU's VT-d. Register and structure figures: Intel Virtualization Technology for Directed I/O, Architecture Specification, D51397, chapters
//! 9 and 11; descriptors of the invalidation queue: section 6.5.2.

use crate::board::{Board, PC, PC_MACHINE};
use crate::qtest::Qtest;
use crate::walker::{Fault, Invalidates, Walker, blocks};
use addr::{Iova, Oa, Span};

const REGISTERS: u64 = 0xfed9_0000;
const GLOBAL_COMMAND: u64 = REGISTERS + 0x18;
const GLOBAL_STATUS: u64 = REGISTERS + 0x1c;
const ROOT_TABLE: u64 = REGISTERS + 0x20;
const FAULT_STATUS: u64 = REGISTERS + 0x34;
const QUEUE_HEAD: u64 = REGISTERS + 0x80;
const QUEUE_TAIL: u64 = REGISTERS + 0x88;
const QUEUE_ADDRESS: u64 = REGISTERS + 0x90;
/// Where CAP_REG and ECAP_REG of the model say that these are.
const INVALIDATE_ADDRESS: u64 = REGISTERS + 0xf0;
const IOTLB: u64 = REGISTERS + 0xf8;
const FAULT_RECORD: u64 = REGISTERS + 0x220;

const TRANSLATE: u32 = 1 << 31;
const SET_ROOT: u32 = 1 << 30;
const QUEUED: u32 = 1 << 26;
const PRESENT: u64 = 1;
const DOMAIN: u64 = 7;
const PASID: u64 = 0;
/// Entries of the invalidation queue in the smallest size, of 16 or of 32 bytes.
const QUEUE_BYTES: u64 = 4096;
/// The largest page-selective invalidation, CAP_REG.MAMV, and how many are worth it.
const MOST_LG2: u8 = 30;
const MOST_BLOCKS: usize = 16;

/// A way to use it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mode {
    /// Second stage, from a context entry. Invalidation by registers.
    Legacy,
    /// Second stage, from a PASID entry. Invalidation by the queue.
    ScalableSecond,
    /// First stage, from a PASID entry; the queue has descriptors of 32 bytes.
    ScalableFirst,
}

#[derive(Debug)]
pub(crate) struct Vtd {
    mode: Mode,
    host_bits: u8,
    tail: u64,
}

impl Vtd {
    /// A model whose addresses have `host_bits`, 39 or 48.
    pub(crate) fn new(mode: Mode, host_bits: u8) -> Self {
        Self { mode, host_bits, tail: 0 }
    }

    fn queue_base() -> u64 {
        PC.structures() + 0x8000
    }

    fn submit(&mut self, qtest: &mut Qtest, descriptor: [u64; 2]) {
        let bytes = if self.mode == Mode::ScalableFirst { 32 } else { 16 };
        qtest.write_words(Self::queue_base() + self.tail, &[descriptor[0], descriptor[1], 0, 0][..bytes as usize / 8]);
        self.tail = (self.tail + bytes) % QUEUE_BYTES;
        qtest.write64(QUEUE_TAIL, self.tail);
    }

    /// The context entry of a device, and for scalable mode what it leads to.
    fn write_structures(&self, qtest: &mut Qtest, root: u64, address_width: u64) {
        let base = PC.structures();
        let [context, directory, entries] = [1, 2, 3].map(|page| base + page * 0x1000);
        qtest.write_words(base, &[context | PRESENT, 0]);
        let devfn = u64::from(Self::DEVFN);
        match self.mode {
            Mode::Legacy => qtest.write_words(context + devfn * 16, &[root | PRESENT, address_width | DOMAIN << 8]),
            Mode::ScalableSecond | Mode::ScalableFirst => {
                qtest.write_words(context + devfn * 32, &[directory | PRESENT, PASID, 0, 0]);
                qtest.write_words(directory, &[entries | PRESENT]);
                let entry = if self.mode == Mode::ScalableSecond {
                    [root | 2 << 6 | address_width << 2 | PRESENT, DOMAIN, 0]
                } else {
                    // Of four levels: FSPM 0.
                    [1 << 6 | address_width << 2 | PRESENT, DOMAIN, root]
                };
                qtest.write_words(entries, &entry);
            }
        }
    }
}

impl Walker for Vtd {
    const BOARD: &'static Board = &PC;
    const ASIDE: Option<(u64, u64)> = Some((0xfee0_0000, 0xfeef_ffff));
    const INVALIDATES: Invalidates = Invalidates::TheSpan;

    fn args(&self) -> Vec<String> {
        let Self { mode, host_bits, .. } = self;
        let mode = match mode {
            Mode::Legacy => "snoop-control=on",
            Mode::ScalableSecond => "snoop-control=on,x-scalable-mode=on",
            Mode::ScalableFirst => "x-scalable-mode=on,x-flts=on",
        };
        let device = format!("intel-iommu,aw-bits={host_bits},{mode}");
        ["-machine", PC_MACHINE, "-device", &device].map(str::to_owned).to_vec()
    }

    fn start(&mut self, qtest: &mut Qtest, root: Oa, level: u8) {
        self.write_structures(qtest, root.get(), u64::from(level) - 1);
        let scalable = if self.mode == Mode::Legacy { 0 } else { 1 << 10 };
        qtest.write64(ROOT_TABLE, PC.structures() | scalable);
        qtest.write32(GLOBAL_COMMAND, SET_ROOT);
        let mut command = TRANSLATE;
        if self.mode != Mode::Legacy {
            let wide = if self.mode == Mode::ScalableFirst { 1 << 11 } else { 0 };
            qtest.write64(QUEUE_ADDRESS, Self::queue_base() | wide);
            command |= QUEUED;
        }
        qtest.write32(GLOBAL_COMMAND, command);
        let status = qtest.read32(GLOBAL_STATUS);
        assert_eq!(status & command, command, "VT-d's status is {status:#x}");
    }

    fn invalidate(&mut self, qtest: &mut Qtest, span: Span<Iova>) {
        let blocks = blocks(span, MOST_LG2, MOST_BLOCKS);
        let whole = [(0, 0)];
        let granularity = if blocks.is_some() { 3 } else { 2 };
        for (at, lg2) in blocks.as_deref().unwrap_or(&whole) {
            let address = at | u64::from(lg2.saturating_sub(12));
            match self.mode {
                Mode::Legacy => {
                    qtest.write64(INVALIDATE_ADDRESS, address);
                    qtest.write64(IOTLB, 1 << 63 | granularity << 60 | DOMAIN << 32);
                }
                Mode::ScalableSecond => self.submit(qtest, [2 | granularity << 4 | DOMAIN << 16, address]),
                Mode::ScalableFirst => self.submit(qtest, [6 | granularity << 4 | DOMAIN << 16 | PASID << 32, address]),
            }
        }
        if self.mode == Mode::Legacy {
            let done = qtest.read64(IOTLB);
            assert_eq!(done >> 63, 0, "VT-d has not invalidated: {done:#x}");
        } else {
            let head = qtest.read64(QUEUE_HEAD);
            assert_eq!(head, self.tail, "VT-d has not taken every descriptor");
        }
    }

    fn faults(&mut self, qtest: &mut Qtest) -> Vec<Fault> {
        let high = qtest.read64(FAULT_RECORD + 8);
        if high >> 63 == 0 {
            return Vec::new();
        }
        let low = qtest.read64(FAULT_RECORD);
        // Written back, it is cleared; so is the overflow flag.
        qtest.write64(FAULT_RECORD + 8, high);
        qtest.write32(FAULT_STATUS, 1);
        assert_eq!(high & 0xffff, u64::from(Self::DEVFN), "VT-d records a fault of another device: {high:#x}");
        vec![Fault { iova: Iova::new(low), write: high >> 62 & 1 == 0 }]
    }
}
