//! The device behind the IOMMU, and how it is seen what it did: bytes are handed to it in one page of a mailbox and come back in another.
//! Both are mapped for good, and nothing else leads there.

use crate::edu::Edu;
use crate::qtest::Qtest;
use crate::walker::Walker;
use addr::{Address, Iova, Oa, Span};

/// Low enough for the smallest tree.
pub(crate) const MAILBOX: Iova = Iova::new(0x1f_e000);
pub(crate) const MAILBOX_BYTES: u64 = 0x2000;
const BACK: u64 = 0x1000;
/// In the device's buffer where a read has brought nothing.
const UNTOUCHED: u8 = 0xa5;
/// In the mailbox where nothing came back.
const LOST: u8 = 0xee;

pub(crate) struct Device<W> {
    pub(crate) qtest: Qtest,
    pub(crate) walker: W,
    edu: Edu,
}

impl<W: Walker> Device<W> {
    /// Starts a machine in which the walker has the tree below `root`.
    pub(crate) fn start(mut walker: W, root: Oa, level: u8) -> Self {
        let mut args = walker.args();
        let firmware = W::BOARD.firmware().unwrap();
        args.extend(["-m", crate::board::RAM, "-bios"].map(str::to_owned));
        args.push(firmware.display().to_string());
        args.extend(Edu::args(W::DEVFN));
        let mut qtest = Qtest::start(W::BOARD.program, &args);
        let edu = Edu::enable(&mut qtest, W::BOARD, W::DEVFN);
        walker.start(&mut qtest, root, level);
        Self { qtest, walker, edu }
    }

    /// What the device reads from `iova` on.
    pub(crate) fn read(&mut self, iova: Iova, len: usize) -> Vec<u8> {
        let (handed, back) = (W::BOARD.mailbox(), W::BOARD.mailbox().plus(BACK));
        self.qtest.write(handed.get(), &vec![UNTOUCHED; len]);
        self.qtest.write(back.get(), &vec![LOST; len]);
        self.edu.read(&mut self.qtest, MAILBOX.get(), len);
        self.edu.read(&mut self.qtest, iova.get(), len);
        self.edu.write(&mut self.qtest, MAILBOX.plus(BACK).get(), len);
        let bytes = self.qtest.read(back.get(), len);
        assert!(bytes != vec![LOST; len], "nothing came through the mailbox at {MAILBOX}; read of {iova}");
        bytes
    }

    /// The device writes `bytes` from `iova` on.
    pub(crate) fn write(&mut self, iova: Iova, bytes: &[u8]) {
        self.qtest.write(W::BOARD.mailbox().get(), bytes);
        self.edu.read(&mut self.qtest, MAILBOX.get(), bytes.len());
        self.edu.write(&mut self.qtest, iova.get(), bytes.len());
    }

    /// Invalidates.
    pub(crate) fn forget(&mut self, span: Span<Iova>) {
        self.walker.invalidate(&mut self.qtest, span);
    }
}

/// Whether bytes that the device read are none of memory's: as they were in its buffer, or the zeroes that QEMU answers a refused read with.
pub(crate) fn is_nothing(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == UNTOUCHED) || bytes.iter().all(|byte| *byte == 0)
}
