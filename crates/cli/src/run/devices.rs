//! The guest's side of the devices: its accesses to the doorbell and to the registers of the two DMA engines, wherever it runs.

use crate::run::checks::{Checks, add};
use addr::Gpa;
use guest::Platform;
use guest::registers::{self, bell};
use iommu::engine::{reg, status};
use lockstep::{ConvertError, EngineDevice, GuestDma};
use std::sync::Arc;

/// What guest accesses lead to.
pub(crate) struct Devices {
    dma: Arc<GuestDma>,
    checks: Arc<Checks>,
    trusted: EngineDevice,
    untrusted: EngineDevice,
    psc_result: u64,
    pvalidate_result: u64,
    /// What the guest said when it ended.
    pub(crate) done: Option<u64>,
}

impl Devices {
    pub(crate) fn new(dma: &Arc<GuestDma>, checks: &Arc<Checks>, trusted: EngineDevice, untrusted: EngineDevice) -> Self {
        Self { dma: Arc::clone(dma), checks: Arc::clone(checks), trusted, untrusted, psc_result: 0, pvalidate_result: 0, done: None }
    }

    /// The guest touched memory as private or shared, and it was the other.
    pub(crate) fn implicit(&self, gpa: Gpa, pages: u64, private: bool) -> Result<(), ConvertError> {
        self.dma.map_gpa_range(gpa, pages, private)
    }

    fn engine(&mut self, gpa: Gpa) -> Option<(&mut EngineDevice, u64)> {
        let page = Gpa::new(gpa.get() & !0xfff);
        let engine = match page {
            registers::TRUSTED => &mut self.trusted,
            registers::UNTRUSTED => &mut self.untrusted,
            _ => return None,
        };
        Some((engine, gpa.get() & 0xfff))
    }
}

impl Platform for Devices {
    fn mmio_read(&mut self, gpa: Gpa, len_bytes: u8) -> u64 {
        if let Some((engine, offset)) = self.engine(gpa) {
            return engine.mmio_read(offset, usize::from(len_bytes));
        }
        match gpa.get().wrapping_sub(registers::DOORBELL.get()) {
            bell::PSC_RESULT => self.psc_result,
            bell::PVALIDATE_RESULT => self.pvalidate_result,
            _ => 0,
        }
    }

    fn mmio_write(&mut self, gpa: Gpa, len_bytes: u8, value: u64) {
        if let Some((engine, offset)) = self.engine(gpa) {
            engine.mmio_write(offset, usize::from(len_bytes), value);
            if offset == reg::CMD {
                let (len, ok) = (engine.mmio_read(reg::DONE, 8), engine.mmio_read(reg::STATUS, 8) == status::IDLE);
                add(&self.checks.bytes_moved, if ok { len } else { 0 });
            }
            return;
        }
        match gpa.get().wrapping_sub(registers::DOORBELL.get()) {
            bell::PSC => self.psc_result = self.dma.page_state_change(Gpa::new(value)),
            bell::PVALIDATE => self.pvalidate_result = self.dma.pvalidate_list(Gpa::new(value)),
            bell::DONE => self.done = Some(value),
            _ => {}
        }
    }

    fn hypercall(&mut self, nr: u64, [gpa, pages, flags]: [u64; 3]) -> u64 {
        const ENCRYPTED: u64 = 1 << 4;
        const EINVAL: u64 = (-22i64) as u64;
        if nr != registers::HC_MAP_GPA_RANGE {
            return EINVAL;
        }
        self.dma.map_gpa_range(Gpa::new(gpa), pages, flags & ENCRYPTED != 0).map_or(EINVAL, |()| 0)
    }
}
