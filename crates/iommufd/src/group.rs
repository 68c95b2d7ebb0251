//! Who of a group of devices is attached to what. Devices that an IOMMU cannot tell apart share each page table; most groups have one device.

use crate::device::{DeviceObject, WHOLE, lock};
use crate::driver::Driver;
use crate::hwpt::Hwpt;
use crate::object::Held;
use crate::{Answer, Refusal};
use ioas::{Ioas, Reservation};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// Devices that share their page tables.
#[derive(Default)]
pub struct Group(Mutex<BTreeMap<u32, Place>>);

impl Group {
    /// Attachments by PASID; 0 is the devices as a whole. Changed with the context's `attaching` held, read without; nothing else is locked
    /// under it but fault queues.
    pub(crate) fn places(&self) -> MutexGuard<'_, BTreeMap<u32, Place>> {
        lock(&self.0)
    }

    /// PASIDs go with tables that were made for them, on devices whose own table was, too (rule 51).
    pub(crate) fn check_pasid(&self, pasid: u32, table: &Hwpt) -> Answer {
        let places = self.places();
        let refused = |text| Err(Refusal::of(Errno::INVAL, text));
        if pasid == WHOLE {
            if !table.takes_pasids() && places.keys().any(|other| *other != WHOLE) {
                return refused("PASIDs are attached, so the device's own page table needs the PASID flag");
            }
            return Ok(());
        }
        if !table.takes_pasids() {
            return refused("a PASID attaches to a page table that was made with the PASID flag");
        }
        if places.get(&WHOLE).is_some_and(|own| !own.table.takes_pasids()) {
            return refused("the device's own page table was made without the PASID flag");
        }
        Ok(())
    }
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.places().iter().map(|(pasid, place)| (*pasid, place.table.id()))).finish()
    }
}

/// What one PASID is attached to.
pub(crate) struct Place {
    pub(crate) table: Arc<Hwpt>,
    pub(crate) seats: Vec<Seat>,
}

impl Place {
    pub(crate) fn seat_of(&self, device: &DeviceObject) -> Option<usize> {
        self.seats.iter().position(|seat| std::ptr::eq(Arc::as_ptr(&seat.device), device))
    }
}

/// One device's attachment.
pub(crate) struct Seat {
    pub(crate) device: Held<DeviceObject>,
    table: Held<Hwpt>,
    reserved: Option<Reserved>,
    handle: u64,
}

/// What a seat had before it moved. Dropping it lets go.
pub(crate) struct Moved {
    pub(crate) handle: u64,
    _table: Held<Hwpt>,
    _reserved: Option<Reserved>,
}

static HANDLES: AtomicU64 = AtomicU64::new(1);

impl Seat {
    pub(crate) fn new(device: Held<DeviceObject>, table: Held<Hwpt>, reserved: Option<Reserved>) -> Self {
        Self { device, table, reserved, handle: HANDLES.fetch_add(1, Ordering::Relaxed) }
    }

    /// Names this attachment in fault queues.
    pub(crate) fn handle(&self) -> u64 {
        self.handle
    }

    /// To another table; with the reservations of another IOAS if it has another.
    pub(crate) fn move_to(&mut self, table: Held<Hwpt>, reserved: Option<Reserved>) -> Moved {
        let handle = std::mem::replace(&mut self.handle, HANDLES.fetch_add(1, Ordering::Relaxed));
        let reserved = reserved.and_then(|reserved| self.reserved.replace(reserved));
        Moved { handle, _table: std::mem::replace(&mut self.table, table), _reserved: reserved }
    }
}

/// What a device keeps areas away from, as long as this lives.
pub(crate) struct Reserved {
    ioas: Arc<Ioas>,
    ranges: Vec<Reservation>,
}

impl Reserved {
    /// # Errors
    /// `EADDRINUSE`, `ENOMEM`. Nothing is reserved then.
    pub(crate) fn take(table: &Hwpt, driver: &dyn Driver) -> Answer<Self> {
        sync::fail::step("iommufd.reserved")?;
        let mut own = Self { ioas: Arc::clone(table.ioas().ioas()), ranges: Vec::new() };
        for span in driver.reserved() {
            own.ranges.push(own.ioas.reserve(span)?);
        }
        Ok(own)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.ranges.drain(..).for_each(|range| self.ioas.release(range));
    }
}
