//! QEMU's SMMUv3, stage 2. Register and structure figures: Arm System Memory Management Unit Architecture Specification version 3, IHI 0070,
//! chapters 4 (commands), 5.2 (stream table entry), 6 (registers) and 7.3 (event records).

use crate::board::{ARM, Board};
use crate::qtest::Qtest;
use crate::walker::{Fault, Invalidates, Walker, blocks};
use addr::{Iova, Oa, Span};
use lockstep_pt::{Leaf, Perm};

const REGISTERS: u64 = 0x0905_0000;
const IDR5: u64 = REGISTERS + 0x14;
const CR0: u64 = REGISTERS + 0x20;
const CR0ACK: u64 = REGISTERS + 0x24;
const STREAM_TABLE: u64 = REGISTERS + 0x80;
const STREAM_TABLE_CONFIG: u64 = REGISTERS + 0x88;
const COMMAND_BASE: u64 = REGISTERS + 0x90;
const COMMAND_PRODUCED: u64 = REGISTERS + 0x98;
const COMMAND_CONSUMED: u64 = REGISTERS + 0x9c;
const EVENT_BASE: u64 = REGISTERS + 0xa0;
const EVENT_PRODUCED: u64 = REGISTERS + 0x1_00a8;
const EVENT_CONSUMED: u64 = REGISTERS + 0x1_00ac;

/// 256 streams.
const STREAMS_LG2: u64 = 8;
/// 128 commands and events; an index has one bit more, which tells a full queue from an empty one.
const QUEUE_LG2: u64 = 7;
const INDICES: u32 = 2 << QUEUE_LG2;
const MACHINE: u64 = 7;
/// IDR5.OAS: 44 bits, of input addresses as well.
const OAS: u32 = 4;
const INPUT_LG2: u8 = 44;
const TRANSLATION: u64 = 0x10;
const PERMISSION: u64 = 0x13;
/// The largest range of one TLBI, and how many are worth it.
const MOST_LG2: u8 = 39;
const MOST_BLOCKS: usize = 16;

#[derive(Debug, Default)]
pub(crate) struct Smmu {
    produced: u32,
    consumed: u32,
}

impl Smmu {
    fn commands() -> u64 {
        ARM.structures() + 0x8000
    }

    fn events() -> u64 {
        ARM.structures() + 0x9000
    }

    fn submit(&mut self, qtest: &mut Qtest, command: [u64; 2]) {
        let slot = u64::from(self.produced) & ((1 << QUEUE_LG2) - 1);
        qtest.write_words(Self::commands() + slot * 16, &command);
        self.produced = (self.produced + 1) % INDICES;
        qtest.write32(COMMAND_PRODUCED, self.produced);
    }
}

impl Walker for Smmu {
    const BOARD: &'static Board = &ARM;
    const INVALIDATES: Invalidates = Invalidates::TheSpan;

    fn args(&self) -> Vec<String> {
        let stage = "arm-smmuv3.stage=2";
        ["-machine", "virt,iommu=smmuv3", "-cpu", "cortex-a57", "-global", stage].map(str::to_owned).to_vec()
    }

    fn input_lg2(&self) -> u8 {
        INPUT_LG2
    }

    fn start(&mut self, qtest: &mut Qtest, root: Oa, level: u8) {
        assert_eq!(qtest.read32(IDR5) & 7, OAS, "the SMMU's addresses have another width than this test thinks");
        let input_lg2 = (12 + 9 * (u64::from(level) + 1)).min(u64::from(INPUT_LG2));
        // S2SL0 1 begins with three levels, 2 with four; S2PS as OAS; S2AA64 and S2R.
        let stage_two = (64 - input_lg2) | (u64::from(level) - 1) << 6 | u64::from(OAS) << 16 | 1 << 19 | 1 << 26;
        let mut entry = [0; 8];
        // Valid, stage 2 alone.
        entry[0] = 6 << 1 | 1;
        entry[2] = stage_two << 32 | MACHINE;
        entry[3] = root.get();
        qtest.write_words(ARM.structures() + u64::from(Self::DEVFN) * 64, &entry);
        qtest.write64(STREAM_TABLE, ARM.structures());
        qtest.write32(STREAM_TABLE_CONFIG, STREAMS_LG2 as u32);
        qtest.write64(COMMAND_BASE, Self::commands() | QUEUE_LG2);
        qtest.write64(EVENT_BASE, Self::events() | QUEUE_LG2);
        // Command queue, event queue, translation.
        let on = 1 << 3 | 1 << 2 | 1;
        qtest.write32(CR0, on);
        assert_eq!(qtest.read32(CR0ACK), on, "the SMMU is not on");
    }

    fn invalidate(&mut self, qtest: &mut Qtest, span: Span<Iova>) {
        match blocks(span, MOST_LG2, MOST_BLOCKS) {
            // TLBI_S2_IPA of 2^SCALE pages of 4 KiB.
            Some(blocks) => blocks.iter().for_each(|(at, lg2)| {
                let scale = u64::from(lg2 - 12);
                self.submit(qtest, [0x2a | scale << 20 | MACHINE << 32, at | 1 << 10]);
            }),
            // TLBI_S12_VMALL.
            None => self.submit(qtest, [0x28 | MACHINE << 32, 0]),
        }
        // SYNC.
        self.submit(qtest, [0x46, 0]);
        let consumed = qtest.read32(COMMAND_CONSUMED);
        assert_eq!(consumed, self.produced, "the SMMU has not taken every command");
    }

    fn faults(&mut self, qtest: &mut Qtest) -> Vec<Fault> {
        let produced = qtest.read32(EVENT_PRODUCED);
        let mut faults = Vec::new();
        while self.consumed != produced {
            let slot = u64::from(self.consumed) & ((1 << QUEUE_LG2) - 1);
            let record = Self::events() + slot * 32;
            let (head, flags, iova) = (qtest.read64(record), qtest.read64(record + 8), qtest.read64(record + 16));
            assert_eq!(head >> 32, u64::from(Self::DEVFN), "the SMMU records an event of another stream: {head:#x}");
            let kind = head & 0xff;
            assert!([TRANSLATION, PERMISSION].contains(&kind), "the SMMU records an event of type {kind:#x} at {iova:#x}");
            faults.push(Fault { iova: Iova::new(iova), write: flags >> 35 & 1 == 0 });
            self.consumed = (self.consumed + 1) % INDICES;
        }
        qtest.write32(EVENT_CONSUMED, self.consumed);
        faults
    }

    /// The model does not set dirty bits. A leaf that is clean is one that may not be written.
    fn allows(&self, leaf: &Leaf) -> Perm {
        if leaf.dirty { leaf.perm } else { leaf.perm.and(Perm::READ) }
    }
}
