//! The device behind the IOMMU, and how it is seen what it did: bytes are handed to it in one page of a mailbox and come back in another.
//! Both are mapped for good, and nothing else leads there.

use crate::edu::Edu;
use crate::qtest::Qtest;
use crate::walker::{Fault, Walker};
use addr::{Address, Iova, Oa, Span};

/// Bytes of one access.
pub(crate) const LEN: usize = 64;
/// Accesses that go through the mailbox together.
pub(crate) const TOGETHER: usize = 32;
/// Low enough for the smallest tree.
pub(crate) const MAILBOX: Iova = Iova::new(0x1f_e000);
pub(crate) const MAILBOX_BYTES: u64 = 0x2000;
const BACK: u64 = 0x1000;
/// In the device's buffer where a read has brought nothing.
const UNTOUCHED: u8 = 0xa5;
/// In the mailbox where nothing came back.
const LOST: u8 = 0xee;

pub(crate) struct Device<W> {
    name: String,
    pub(crate) qtest: Qtest,
    pub(crate) walker: W,
    edu: Edu,
}

impl<W: Walker> Device<W> {
    /// Starts a machine in which the walker has the tree below `root`.
    pub(crate) fn start(name: &str, mut walker: W, root: Oa, level: u8) -> Self {
        let mut args = walker.args();
        let firmware = W::BOARD.firmware().unwrap();
        args.extend(["-m", crate::board::RAM, "-bios"].map(str::to_owned));
        args.push(firmware.display().to_string());
        args.extend(Edu::args(W::DEVFN));
        let mut qtest = Qtest::start(W::BOARD.program, &args);
        let edu = Edu::enable(&mut qtest, W::BOARD, W::DEVFN);
        walker.start(&mut qtest, root, level);
        Self { name: name.to_owned(), qtest, walker, edu }
    }

    /// What the device reads at each of up to [`TOGETHER`] places, and what the model has to say to it.
    pub(crate) fn read(&mut self, places: &[Iova]) -> Vec<([u8; LEN], Vec<Fault>)> {
        let (handed, back) = (W::BOARD.mailbox(), W::BOARD.mailbox().plus(BACK));
        let all = places.len() * LEN;
        self.qtest.write(handed.get(), &vec![UNTOUCHED; all]);
        self.qtest.write(back.get(), &vec![LOST; all]);
        self.edu.read(&mut self.qtest, MAILBOX.get(), 0, all);
        let mut faults = Vec::new();
        for (index, iova) in places.iter().enumerate() {
            self.edu.read(&mut self.qtest, iova.get(), index * LEN, LEN);
            faults.push(self.walker.faults(&mut self.qtest));
        }
        self.edu.write(&mut self.qtest, MAILBOX.plus(BACK).get(), 0, all);
        let bytes = self.qtest.read(back.get(), all);
        if bytes == vec![LOST; all] {
            let faults = self.walker.faults(&mut self.qtest);
            panic!("{}: nothing comes through the mailbox at {MAILBOX}; the model records {faults:x?}", self.name);
        }
        bytes.as_chunks().0.iter().copied().zip(faults).collect()
    }

    /// The device writes to each of up to [`TOGETHER`] places; what the model has to say to it.
    pub(crate) fn write(&mut self, places: &[(Iova, [u8; LEN])]) -> Vec<Vec<Fault>> {
        let bytes = places.iter().flat_map(|(_, bytes)| *bytes).collect::<Vec<_>>();
        self.qtest.write(W::BOARD.mailbox().get(), &bytes);
        self.edu.read(&mut self.qtest, MAILBOX.get(), 0, bytes.len());
        let mut faults = Vec::new();
        for (index, (iova, _)) in places.iter().enumerate() {
            self.edu.write(&mut self.qtest, iova.get(), index * LEN, LEN);
            faults.push(self.walker.faults(&mut self.qtest));
        }
        faults
    }

    /// Invalidates.
    pub(crate) fn forget(&mut self, span: Span<Iova>) {
        self.walker.invalidate(&mut self.qtest, span);
    }
}

/// Bytes, for reports.
pub(crate) fn said(bytes: &[u8]) -> String {
    match bytes.first() {
        Some(first) if bytes.iter().all(|byte| byte == first) => format!("{} bytes of {first:#04x}", bytes.len()),
        _ if bytes.len().is_multiple_of(8) => {
            let words = bytes.as_chunks().0.iter().map(|word| format!("{:#x}", u64::from_le_bytes(*word)));
            format!("the words {}", words.collect::<Vec<_>>().join(" "))
        }
        _ => format!("the bytes {bytes:02x?}"),
    }
}

/// Whether bytes that the device read are none of memory's: as they were in its buffer, or the zeroes that QEMU answers a refused read with.
pub(crate) fn is_nothing(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == UNTOUCHED) || bytes.iter().all(|byte| *byte == 0)
}
