//! A DMA engine as a device model: a guest programs registers, the engine copies or fills memory through the IOMMU.
//!
//! Everything a guest writes is untrusted: a register may hold anything, a bad access is counted and has no effect, and nothing panics.
//!
//! | offset | name | | |
//! |---|---|---|---|
//! | 0x00 | SRC | rw | IOVA to copy from |
//! | 0x08 | DST | rw | IOVA to copy or fill to |
//! | 0x10 | LEN | rw | bytes, at most [`MAX_LEN`] |
//! | 0x18 | CMD | w | 1 copy SRC to DST, 2 fill DST with VALUE; reads 0 |
//! | 0x20 | STATUS | r | 0 idle, the last command went well; 1 busy; 2 the last command faulted |
//! | 0x28 | FAULT_IOVA | r | first IOVA that was refused |
//! | 0x30 | VALUE | rw | 8 bytes to fill with, repeated, little endian |
//! | 0x38 | FAULT_CODE | r | a [`FaultKind`] by number; 0 when there was none |
//! | 0x40 | ID | r | [`ID`] |
//! | 0x48 | DONE | r | bytes of the last command that arrived |
//! | 0x50 | BAD | r | register accesses that had no effect |
//!
//! Registers are 8 bytes, little endian, and take aligned accesses of 4 and 8 bytes. A command runs in the thread that writes CMD and is over when the write
//! returns, so BUSY is seen only from another thread.

use crate::{Access, CHUNK_BYTES, Descriptor, Device, Dma, Error, Fault, FaultKind, OnFault};
use addr::{Address, Iova};
use std::sync::Arc;

/// "LSTEPDMA" and version 1 in the low byte.
pub const ID: u64 = 0x4c53_5445_5044_4d01;
/// The longest transfer of one command: a command occupies the virtual processor that gave it.
pub const MAX_LEN: u64 = 16 << 20;
/// Bytes of the register window.
pub const WINDOW_BYTES: u64 = 0x1000;

/// Register offsets.
pub mod reg {
    /// IOVA to copy from.
    pub const SRC: u64 = 0x00;
    /// IOVA to copy or fill to.
    pub const DST: u64 = 0x08;
    /// Bytes.
    pub const LEN: u64 = 0x10;
    /// Starts a command.
    pub const CMD: u64 = 0x18;
    /// How the last command ended.
    pub const STATUS: u64 = 0x20;
    /// First IOVA that was refused.
    pub const FAULT_IOVA: u64 = 0x28;
    /// What to fill with.
    pub const VALUE: u64 = 0x30;
    /// Why it was refused.
    pub const FAULT_CODE: u64 = 0x38;
    /// Who this is.
    pub const ID: u64 = 0x40;
    /// Bytes that arrived.
    pub const DONE: u64 = 0x48;
    /// Accesses that had no effect.
    pub const BAD: u64 = 0x50;
}

/// Commands.
pub mod cmd {
    /// SRC to DST.
    pub const COPY: u64 = 1;
    /// VALUE to DST.
    pub const FILL: u64 = 2;
}

/// Values of STATUS.
pub mod status {
    /// Nothing runs, the last command went well.
    pub const IDLE: u64 = 0;
    /// A command runs.
    pub const BUSY: u64 = 1;
    /// Nothing runs, the last command was refused.
    pub const FAULTED: u64 = 2;
}

/// How much of the pattern is laid out: what a descriptor of a fill writes.
const FILL_BYTES: usize = 4096;
/// Descriptors that a fill queues at a time.
const QUEUE: usize = CHUNK_BYTES as usize / FILL_BYTES;

/// The engine: registers, and a DMA context of its own.
#[derive(Debug)]
pub struct EngineDevice {
    dma: Dma,
    src: u64,
    dst: u64,
    len: u64,
    value: u64,
    status: u64,
    fault_iova: u64,
    fault_code: u64,
    done: u64,
    bad: u64,
}

impl EngineDevice {
    /// An engine that accesses memory as `device`.
    ///
    /// # Errors
    /// As [`Dma::new`].
    pub fn new(device: &Arc<Device>) -> Result<Self, Error> {
        Ok(Self {
            dma: Dma::new(device)?,
            src: 0,
            dst: 0,
            len: 0,
            value: 0,
            status: status::IDLE,
            fault_iova: 0,
            fault_code: 0,
            done: 0,
            bad: 0,
        })
    }

    /// Its DMA context, for counters.
    pub fn dma(&self) -> &Dma {
        &self.dma
    }

    /// A read of `len` bytes at `offset` of the register window. What is no register reads 0.
    pub fn mmio_read(&mut self, offset: u64, len: usize) -> u64 {
        let Some((register, shift, mask)) = decode(offset, len) else { return self.count_bad() };
        let value = match register {
            reg::SRC => self.src,
            reg::DST => self.dst,
            reg::LEN => self.len,
            reg::CMD => 0,
            reg::STATUS => self.status,
            reg::FAULT_IOVA => self.fault_iova,
            reg::VALUE => self.value,
            reg::FAULT_CODE => self.fault_code,
            reg::ID => ID,
            reg::DONE => self.done,
            reg::BAD => self.bad,
            _ => return self.count_bad(),
        };
        value >> shift & mask
    }

    /// A write of `len` bytes at `offset` of the register window. Writing CMD runs the command.
    pub fn mmio_write(&mut self, offset: u64, len: usize, value: u64) {
        let Some((register, shift, mask)) = decode(offset, len) else {
            self.count_bad();
            return;
        };
        let merged = |old: u64| old & !(mask << shift) | (value & mask) << shift;
        match register {
            reg::SRC => self.src = merged(self.src),
            reg::DST => self.dst = merged(self.dst),
            reg::LEN => self.len = merged(self.len),
            reg::VALUE => self.value = merged(self.value),
            // The low half starts the command, so that a guest without 8-byte accesses can.
            reg::CMD if shift == 0 => self.run(value & mask),
            _ => _ = self.count_bad(),
        }
    }

    fn count_bad(&mut self) -> u64 {
        self.bad = self.bad.wrapping_add(1);
        0
    }

    fn run(&mut self, command: u64) {
        (self.status, self.done, self.fault_code, self.fault_iova) = (status::BUSY, 0, 0, 0);
        let (src, dst) = (Iova::new(self.src), Iova::new(self.dst));
        let outcome = match command {
            cmd::COPY | cmd::FILL if self.len > MAX_LEN => Err(self.refuse(FaultKind::BadLength)),
            cmd::COPY => self.dma.copy(src, dst, self.len),
            cmd::FILL => self.fill(dst),
            _ => Err(self.refuse(FaultKind::BadCommand)),
        };
        match outcome {
            Ok(()) => (self.status, self.done) = (status::IDLE, self.len),
            Err(fault) => {
                (self.status, self.done) = (status::FAULTED, fault.done);
                (self.fault_code, self.fault_iova) = (fault.reason as u64, fault.iova.get());
            }
        }
    }

    fn fill(&mut self, dst: Iova) -> Result<(), Fault> {
        let mut pattern = [0; FILL_BYTES];
        pattern.chunks_exact_mut(8).for_each(|chunk| chunk.copy_from_slice(&self.value.to_le_bytes()));
        if dst.checked_add(self.len.saturating_sub(1)).is_none() {
            return Err(self.refuse(FaultKind::Wraps));
        }
        let mut done = 0;
        while done < self.len {
            // As many descriptors as share a guard; those behind the end are empty.
            let end = self.len.min(done + CHUNK_BYTES);
            let mut queue: [Descriptor<'_>; QUEUE] = std::array::from_fn(|place| {
                let from = end.min(done + (place * FILL_BYTES) as u64);
                let now = (end - from).min(FILL_BYTES as u64);
                Descriptor::write(Iova::new(dst.get().wrapping_add(from)), &pattern[..now as usize])
            });
            let run = self.dma.run(&mut queue, OnFault::Stop);
            if let Some(Err(fault)) = queue[run - 1].result() {
                return Err(Fault { done: done + ((run - 1) * FILL_BYTES) as u64 + fault.done, ..*fault });
            }
            done = end;
        }
        Ok(())
    }

    fn refuse(&mut self, reason: FaultKind) -> Fault {
        let device = self.dma.device();
        let fault = Fault {
            device: device.id(),
            domain: device.domain().map(|domain| domain.id()),
            iova: Iova::new(self.dst),
            access: Access::Write,
            table: reason.refused_by(),
            reason,
            oa: None,
            done: 0,
            refusal: None,
        };
        device.record(fault);
        fault
    }
}

/// The register of an access, by how many bits its value is shifted there, and the access's mask.
fn decode(offset: u64, len: usize) -> Option<(u64, u32, u64)> {
    match len {
        8 if offset.is_multiple_of(8) => Some((offset, 0, u64::MAX)),
        4 if offset.is_multiple_of(4) => Some((offset & !7, (offset & 4) as u32 * 8, u64::from(u32::MAX))),
        _ => None,
    }
}
