//! QEMU's `edu` device: a DMA engine with a buffer of 4 KiB that the CPU cannot see. Register figures are those of QEMU's docs/specs/edu.

use crate::board::Board;
use crate::qtest::Qtest;

const SOURCE: u64 = 0x80;
const DESTINATION: u64 = 0x88;
const COUNT: u64 = 0x90;
const COMMAND: u64 = 0x98;
const START: u64 = 1;
const TO_MEMORY: u64 = 2;
const BUFFER: u64 = 0x4_0000;
/// A transfer takes a few looks; more than this and the machine's time stands still.
const LOOKS: usize = 100_000;

pub(crate) struct Edu {
    registers: u64,
}

impl Edu {
    /// What QEMU is told.
    pub(crate) fn args(devfn: u8) -> [String; 2] {
        let (slot, function) = (devfn >> 3, devfn & 7);
        ["-device".to_owned(), format!("edu,addr={slot:#x}.{function},dma_mask=0xffffffffffffffff")]
    }

    pub(crate) fn enable(qtest: &mut Qtest, board: &Board, devfn: u8) -> Self {
        let registers = board.enable(qtest, devfn);
        // The identification that the device's specification gives: its type, and a version in the upper half.
        let identification = qtest.read32(registers);
        assert_eq!(identification & 0xffff, 0x00ed, "no edu device at {registers:#x}: it reads {identification:#x}");
        Self { registers }
    }

    /// The device reads memory to `place` in its buffer.
    pub(crate) fn read(&self, qtest: &mut Qtest, from: u64, place: usize, len: usize) {
        self.transfer(qtest, from, BUFFER + place as u64, len, START);
    }

    /// The device writes to memory what is at `place` in its buffer.
    pub(crate) fn write(&self, qtest: &mut Qtest, to: u64, place: usize, len: usize) {
        self.transfer(qtest, BUFFER + place as u64, to, len, START | TO_MEMORY);
    }

    fn transfer(&self, qtest: &mut Qtest, from: u64, to: u64, len: usize, command: u64) {
        qtest.write64(self.registers + SOURCE, from);
        qtest.write64(self.registers + DESTINATION, to);
        qtest.write64(self.registers + COUNT, len as u64);
        qtest.write64(self.registers + COMMAND, command);
        let done = (0..LOOKS).any(|_| qtest.read64(self.registers + COMMAND) & START == 0);
        assert!(done, "a transfer from {from:#x} to {to:#x} does not end");
    }
}
