//! Attaching: a device as a whole, or one PASID of it, to a page table, to another one, to none (rules 7 to 9, 50 to 52).
//!
//! A device that is attached as a whole really goes through the table's domain. What a PASID is attached to is on record here, and known to the
//! driver: no device that this library models sends PASIDs with its DMA.

use super::{DeviceObject, WHOLE, key, lock, pasid_of};
use crate::group::{Place, Reserved, Seat};
use crate::hwpt::{Hwpt, PagingWanted};
use crate::object::Held;
use crate::{Answer, Context, IoasObject, Refusal};
use rustix::io::Errno;
use std::any::Any;
use std::sync::Arc;

/// Attach, or replace.
#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    Attach,
    Replace,
}

impl DeviceObject {
    /// Attaches the device, or one PASID of it, to the page table `pt_id`, or to a page table of the IOAS `pt_id`. Answers the page table's id.
    ///
    /// # Errors
    /// `ENOENT` no such id; `EBUSY` it is attached already; `EINVAL` the id is neither, or device and table do not go together; `EADDRINUSE`
    /// mappings are where the device has something of its own, or do not fit its page tables; `ENOMEM`; what the driver says. Everything is as it was then.
    pub fn attach(self: &Arc<Self>, pasid: Option<u32>, pt_id: u32) -> Answer<u32> {
        self.change(key(pasid), pt_id, How::Attach)
    }

    /// As [`DeviceObject::attach`], from one page table to another without a moment in between.
    ///
    /// # Errors
    /// As there, and `EINVAL` when it is not attached.
    pub fn replace(self: &Arc<Self>, pasid: Option<u32>, pt_id: u32) -> Answer<u32> {
        self.change(key(pasid), pt_id, How::Replace)
    }

    /// Detaches the device, or one PASID of it. Nothing happens when it is not attached.
    pub fn detach(&self, pasid: Option<u32>) {
        let context = self.context().ok();
        let _attaching = context.as_deref().map(Context::lock_attaching);
        self.detach_held(context.as_deref(), key(pasid));
    }

    fn change(self: &Arc<Self>, pasid: u32, pt_id: u32, how: How) -> Answer<u32> {
        let context = self.context()?;
        let _attaching = context.lock_attaching();
        let object = context.any(pt_id)? as Arc<dyn Any + Send + Sync>;
        let object = match object.downcast::<Hwpt>() {
            Ok(table) => {
                let old = self.put(pasid, &table, how)?;
                let_go(&context, old);
                return Ok(table.id());
            }
            Err(object) => object,
        };
        match object.downcast::<IoasObject>() {
            Ok(ioas) => self.change_auto(&context, pasid, &ioas, how),
            Err(_) => {
                let text = format!("object {pt_id} is neither an IOAS nor a page table; a device attaches to one of those");
                Err(Refusal::new(Errno::INVAL, text))
            }
        }
    }

    /// To an IOAS: on the first of the page tables made here before that goes with the device, or on a new one (rule 8).
    fn change_auto(self: &Arc<Self>, context: &Context, pasid: u32, ioas: &Arc<IoasObject>, how: How) -> Answer<u32> {
        for table in context.auto_tables(ioas) {
            match self.put(pasid, &table, how) {
                Err(refusal) if refusal.errno == Errno::INVAL => {}
                Err(refusal) => return Err(refusal),
                Ok(old) => {
                    let_go(context, old);
                    return Ok(table.id());
                }
            }
        }
        // A first attach comes before the table shows anything, a replace after (rule 51).
        let first = how == How::Attach;
        let wanted = PagingWanted { ioas, device: self, flags: 0, data: None, auto: true };
        let attach = |table: &Arc<Hwpt>| if first { self.put_first(pasid, table) } else { Ok(()) };
        let undo = || {
            if first {
                self.detach_held(None, pasid)
            }
        };
        let table = context.make_paging(&wanted, attach, undo)?;
        let old = if first { Ok(None) } else { self.put_other(pasid, &table) };
        let old = old.inspect_err(|_| context.discard(&table))?;
        context.publish(Arc::clone(&table) as _);
        let_go(context, old);
        Ok(table.id())
    }

    /// Attaches to, or moves to, this table. Answers the one before, which may be nobody's any more.
    fn put(self: &Arc<Self>, pasid: u32, table: &Arc<Hwpt>, how: How) -> Answer<Option<Arc<Hwpt>>> {
        match how {
            How::Attach => self.put_first(pasid, table).map(|()| None),
            How::Replace => self.put_other(pasid, table),
        }
    }

    fn put_first(self: &Arc<Self>, pasid: u32, table: &Arc<Hwpt>) -> Answer {
        if let Some(place) = self.group.places().get(&pasid) {
            if place.seat_of(self).is_some() {
                return Err(Refusal::of(Errno::BUSY, "it is attached already; detach it first, or replace"));
            }
            if !Arc::ptr_eq(&place.table, table) {
                return Err(Refusal::new(
                    Errno::INVAL,
                    format!("its group is attached to page table {}; all of a group share one", place.table.id()),
                ));
            }
        }
        let (held, own) = (Held::new(table)?, Held::new(self)?);
        let reserved = if pasid == WHOLE { Some(Reserved::take(table, &*self.driver)?) } else { None };
        self.group.check_pasid(pasid, table)?;
        self.set(pasid, table)?;
        let mut places = self.group.places();
        let place = places.entry(pasid).or_insert_with(|| Place { table: Arc::clone(table), seats: Vec::new() });
        place.seats.push(Seat::new(own, held, reserved));
        Ok(())
    }

    /// A group moves as one.
    fn put_other(&self, pasid: u32, table: &Arc<Hwpt>) -> Answer<Option<Arc<Hwpt>>> {
        let detached = || Refusal::of(Errno::INVAL, "it is not attached, so nothing can be replaced");
        let (before, members) = {
            let places = self.group.places();
            let place = places.get(&pasid).filter(|place| place.seat_of(self).is_some()).ok_or_else(detached)?;
            let members: Vec<Arc<Self>> = place.seats.iter().map(|seat| Arc::clone(&seat.device)).collect();
            (Arc::clone(&place.table), members)
        };
        if Arc::ptr_eq(&before, table) {
            return Ok(None);
        }
        let moves_reserved = pasid == WHOLE && !Arc::ptr_eq(before.ioas(), table.ioas());
        let mut ready = Vec::new();
        for member in &members {
            let reserved = if moves_reserved { Some(Reserved::take(table, &*member.driver)?) } else { None };
            ready.push((Held::new(table)?, reserved));
        }
        self.group.check_pasid(pasid, table)?;
        for (done, member) in members.iter().enumerate() {
            if let Err(refusal) = member.set(pasid, table) {
                // They were on it a moment ago.
                members[..done].iter().for_each(|member| _ = member.set(pasid, &before));
                return Err(refusal);
            }
        }
        let mut gone = Vec::new();
        {
            let mut places = self.group.places();
            let place = places.get_mut(&pasid).ok_or_else(detached)?;
            place.table = Arc::clone(table);
            for (seat, (held, reserved)) in place.seats.iter_mut().zip(ready) {
                gone.push(seat.move_to(held, reserved));
            }
        }
        before.answer_faults(gone.iter().map(|seat| seat.handle));
        Ok(Some(before))
    }

    /// Makes driver and DMA use the table.
    fn set(&self, pasid: u32, table: &Arc<Hwpt>) -> Answer {
        if table.unit() != self.driver.unit() {
            return Err(Refusal::new(
                Errno::INVAL,
                format!("page table {} belongs to another IOMMU than device {}", table.id(), self.id()),
            ));
        }
        let bits = u32::from(self.driver.pasid_bits());
        if pasid.checked_shr(bits).unwrap_or(0) != 0 {
            return Err(Refusal::new(Errno::INVAL, format!("PASID {pasid} has more than the {bits} bits that device {} sends", self.id())));
        }
        if table.notes_dirty() && !self.driver.tracks_dirty() {
            return Err(Refusal::new(
                Errno::INVAL,
                format!("page table {} tracks dirty pages, and device {} cannot", table.id(), self.id()),
            ));
        }
        if let Some(viommu) = table.viommu()
            && !lock(&self.numbered).vdevice.as_ref().is_some_and(|vdevice| Arc::ptr_eq(vdevice.viommu(), viommu))
        {
            let text = format!("device {} has no number in virtual IOMMU {}; make a vdevice first", self.id(), viommu.id());
            return Err(Refusal::new(Errno::NOENT, text));
        }
        let before = self.hwpt(pasid_of(pasid));
        self.driver.attach(pasid_of(pasid), table)?;
        if pasid != WHOLE {
            return Ok(());
        }
        // Tables of users are the driver's business; DMA of the models stops at them.
        let done = table.domain().map_or_else(|| self.device.detach(), |domain| self.device.attach(domain));
        done.map_err(|error| {
            match before {
                Some(before) => _ = self.driver.attach(None, &before),
                None => self.driver.detach(None),
            }
            error.into()
        })
    }

    pub(super) fn detach_held(&self, context: Option<&Context>, pasid: u32) {
        let (table, seat) = {
            let mut places = self.group.places();
            let Some(place) = places.get_mut(&pasid) else { return };
            let Some(at) = place.seat_of(self) else { return };
            let (table, seat) = (Arc::clone(&place.table), place.seats.swap_remove(at));
            if place.seats.is_empty() {
                places.remove(&pasid);
            }
            (table, seat)
        };
        if pasid == WHOLE {
            // Refused only by a test's fail point, which strikes once, or when this thread is in the middle of a DMA.
            let _ = self.device.detach().or_else(|_| self.device.detach());
        }
        self.driver.detach(pasid_of(pasid));
        table.answer_faults(std::iter::once(seat.handle()));
        drop(seat);
        if let Some(context) = context {
            let_go(context, Some(table));
        }
    }
}

/// A table that was made for an attachment goes with the last of them (rule 7).
fn let_go(context: &Context, table: Option<Arc<Hwpt>>) {
    if let Some(table) = table.filter(|table| table.is_auto()) {
        context.destroy_this(&(table as _), false);
    }
}
