//! BAR0: the DMA engine's registers ([`iommu::engine`]), and what a PCI device needs besides: interrupts, and commands for the buffer in BAR2.
//!
//! | offset | name | | |
//! |---|---|---|---|
//! | 0x000 | the engine | | SRC, DST, LEN, CMD, STATUS and so on, as documented there |
//! | 0x100 | IRQ_STATUS | rw | what happened: bit 0 a command is done, bit 1 a command faulted; writing a 1 clears it |
//! | 0x108 | IRQ_ENABLE | rw | what of it raises an interrupt, 3 at first; bit 2: a fault also raises VFIO's error interrupt |
//! | 0x110 | IRQ_VECTORS | rw | bits 0 to 7 the MSI or MSI-X vector for done, bits 8 to 15 for a fault; 0 at first |
//! | 0x118 | BUFFER | r | bytes of the buffer in BAR2 |
//! | 0x120 | RAISED | r | interrupts that were raised |
//! | 0x800 | MSI-X table | | reads as ones, takes no writes: vectors are set up by VFIO_DEVICE_SET_IRQS |
//! | 0xc00 | MSI-X pending | | the same |
//!
//! Besides the engine's two commands, CMD takes 3: copy LEN bytes of memory at SRC to offset DST of the buffer, and 4: copy LEN bytes from offset SRC
//! of the buffer to memory at DST. FAULT_CODE then is a [`FaultKind`] by number, or one of [`fault`]. No command runs before the client has made the
//! device bus master in its configuration space, as with hardware.

use crate::buffer::Memory;
use crate::config::{MSIX_PENDING, MSIX_TABLE, VECTORS};
use crate::interrupts::{Interrupts, Mode};
use crate::regions::BUFFER_BYTES;
use addr::Iova;
use iommu::engine::{MAX_LEN, reg as engine_reg, status};
use iommu::{CHUNK_BYTES, Device, Dma, EngineDevice, Error, FaultKind};
use std::sync::Arc;

/// Register offsets, besides the engine's.
pub mod reg {
    /// What happened.
    pub const IRQ_STATUS: u64 = 0x100;
    /// What raises an interrupt.
    pub const IRQ_ENABLE: u64 = 0x108;
    /// Which vectors it raises.
    pub const IRQ_VECTORS: u64 = 0x110;
    /// Bytes of the buffer.
    pub const BUFFER: u64 = 0x118;
    /// Interrupts that were raised.
    pub const RAISED: u64 = 0x120;
}

/// Commands, besides the engine's.
pub mod cmd {
    /// Memory at SRC to the buffer at DST.
    pub const TO_BUFFER: u64 = 3;
    /// The buffer at SRC to memory at DST.
    pub const FROM_BUFFER: u64 = 4;
}

/// Values of FAULT_CODE, besides [`FaultKind`]'s numbers.
pub mod fault {
    /// The device is not bus master.
    pub const NOT_MASTER: u64 = 0x100;
    /// The buffer has no such bytes; FAULT_IOVA is the offset.
    pub const OUTSIDE_BUFFER: u64 = 0x101;
    /// The buffer's memory could not be reached; FAULT_IOVA is the offset.
    pub const BUFFER_GONE: u64 = 0x102;
}

/// Bits of IRQ_STATUS and IRQ_ENABLE.
pub mod event {
    /// A command went well.
    pub const DONE: u64 = 1;
    /// A command was refused.
    pub const FAULT: u64 = 2;
    /// In IRQ_ENABLE: a refused command also raises the error interrupt.
    pub const ERROR: u64 = 4;
}

/// How a command ended that the engine did not run itself.
#[derive(Clone, Copy, Debug)]
struct Outcome {
    done: u64,
    /// Where and why it was refused.
    fault: Option<(u64, u64)>,
}

impl Outcome {
    fn fault(done: u64, at: u64, code: u64) -> Self {
        Self { done, fault: Some((at, code)) }
    }
}

/// The registers of one device.
pub(crate) struct Registers {
    engine: EngineDevice,
    /// For commands of the buffer.
    dma: Dma,
    /// Of the last command, when it was not the engine's.
    own: Option<Outcome>,
    irq_status: u64,
    irq_enable: u64,
    irq_vectors: u64,
    raised: u64,
}

impl Registers {
    /// As after a reset.
    pub(crate) fn new(device: &Arc<Device>) -> Result<Self, Error> {
        Ok(Self {
            engine: EngineDevice::new(device)?,
            dma: Dma::new(device)?,
            own: None,
            irq_status: 0,
            irq_enable: event::DONE | event::FAULT,
            irq_vectors: 0,
            raised: 0,
        })
    }

    /// Whether INTx is asserted.
    pub(crate) fn level(&self) -> bool {
        self.irq_status & self.irq_enable & (event::DONE | event::FAULT) != 0
    }

    /// A read of `len` bytes.
    pub(crate) fn read(&mut self, offset: u64, len: usize) -> u64 {
        if is_msix(offset) {
            return u64::MAX;
        }
        let Some((register, shift, mask)) = own_register(offset, len) else { return self.engine.mmio_read(offset, len) };
        let value = match (register, self.own) {
            (reg::IRQ_STATUS, _) => self.irq_status,
            (reg::IRQ_ENABLE, _) => self.irq_enable,
            (reg::IRQ_VECTORS, _) => self.irq_vectors,
            (reg::BUFFER, _) => BUFFER_BYTES,
            (reg::RAISED, _) => self.raised,
            (engine_reg::DONE, Some(own)) => own.done,
            (engine_reg::STATUS, Some(own)) => {
                if own.fault.is_some() {
                    status::FAULTED
                } else {
                    status::IDLE
                }
            }
            (engine_reg::FAULT_IOVA, Some(own)) => own.fault.map_or(0, |fault| fault.0),
            (engine_reg::FAULT_CODE, Some(own)) => own.fault.map_or(0, |fault| fault.1),
            _ => return self.engine.mmio_read(offset, len),
        };
        value >> shift & mask
    }

    /// A write of `len` bytes. Writing CMD runs the command.
    pub(crate) fn write<'a>(
        &mut self,
        (offset, len): (u64, usize),
        value: u64,
        master: bool,
        buffer: impl FnOnce() -> Memory<'a>,
        interrupts: &mut Interrupts,
    ) {
        if is_msix(offset) {
            return;
        }
        let Some((register, shift, mask)) = own_register(offset, len) else { return self.engine.mmio_write(offset, len, value) };
        let merged = |old: u64| old & !(mask << shift) | (value & mask) << shift;
        match register {
            reg::IRQ_STATUS => self.irq_status &= !((value & mask) << shift),
            reg::IRQ_ENABLE => self.irq_enable = merged(self.irq_enable) & (event::DONE | event::FAULT | event::ERROR),
            reg::IRQ_VECTORS => self.irq_vectors = merged(self.irq_vectors) & 0xffff,
            engine_reg::CMD if shift == 0 => {
                self.run(value & mask, len, master, buffer);
                self.report(interrupts);
            }
            _ => self.engine.mmio_write(offset, len, value),
        }
    }

    fn run<'a>(&mut self, command: u64, len: usize, master: bool, buffer: impl FnOnce() -> Memory<'a>) {
        let [src, dst, bytes] = [engine_reg::SRC, engine_reg::DST, engine_reg::LEN].map(|register| self.engine.mmio_read(register, 8));
        self.own = match command {
            _ if !master => Some(Outcome::fault(0, dst, fault::NOT_MASTER)),
            cmd::TO_BUFFER | cmd::FROM_BUFFER if bytes > MAX_LEN => Some(Outcome::fault(0, dst, FaultKind::BadLength as u64)),
            cmd::TO_BUFFER => Some(self.transfer(src, dst, bytes, &buffer(), true)),
            cmd::FROM_BUFFER => Some(self.transfer(dst, src, bytes, &buffer(), false)),
            _ => {
                self.engine.mmio_write(engine_reg::CMD, len, command);
                None
            }
        };
    }

    /// Between memory at `iova` and the buffer at `at`.
    fn transfer(&mut self, iova: u64, at: u64, len: u64, buffer: &Memory<'_>, into_buffer: bool) -> Outcome {
        if at.checked_add(len).is_none_or(|end| end > BUFFER_BYTES) {
            return Outcome::fault(0, at, fault::OUTSIDE_BUFFER);
        }
        let mut chunk = vec![0; len.min(CHUNK_BYTES) as usize];
        let mut done = 0;
        while done < len {
            let part = &mut chunk[..(len - done).min(CHUNK_BYTES) as usize];
            let Some(from) = iova.checked_add(done) else { return Outcome::fault(done, u64::MAX, FaultKind::Wraps as u64) };
            let (memory, gone) = (Iova::new(from), Outcome::fault(done, at + done, fault::BUFFER_GONE));
            let moved = if into_buffer {
                let moved = self.dma.read(memory, part);
                let arrived = moved.as_ref().map_or_else(|fault| fault.done as usize, |()| part.len());
                if buffer.write(at + done, &part[..arrived]).is_err() {
                    return gone;
                }
                moved
            } else {
                if buffer.read(at + done, part).is_err() {
                    return gone;
                }
                self.dma.write(memory, part)
            };
            match moved {
                Ok(()) => done += part.len() as u64,
                Err(fault) => return Outcome::fault(done + fault.done, fault.iova.get(), fault.reason as u64),
            }
        }
        Outcome { done, fault: None }
    }

    /// Raises what the end of a command raises.
    fn report(&mut self, interrupts: &mut Interrupts) {
        let happened = if self.read(engine_reg::STATUS, 8) == status::FAULTED { event::FAULT } else { event::DONE };
        self.irq_status |= happened;
        if happened == event::FAULT && self.irq_enable & event::ERROR != 0 {
            interrupts.raise_error();
        }
        if self.irq_enable & happened != 0 {
            self.raised = self.raised.wrapping_add(1);
            if interrupts.mode() != Mode::Intx {
                let shift = if happened == event::FAULT { 8 } else { 0 };
                interrupts.raise((self.irq_vectors >> shift & 0xff) as usize);
            }
        }
    }
}

fn is_msix(offset: u64) -> bool {
    (MSIX_TABLE..MSIX_TABLE + 16 * u64::from(VECTORS)).contains(&offset) || (MSIX_PENDING..MSIX_PENDING + 8).contains(&offset)
}

/// The register of an access, by how many bits its value is shifted there, and the access's mask. As with the engine, 4 and 8 aligned bytes.
fn own_register(offset: u64, len: usize) -> Option<(u64, u32, u64)> {
    match len {
        8 if offset.is_multiple_of(8) => Some((offset, 0, u64::MAX)),
        4 if offset.is_multiple_of(4) => Some((offset & !7, (offset & 4) as u32 * 8, u64::from(u32::MAX))),
        _ => None,
    }
}
