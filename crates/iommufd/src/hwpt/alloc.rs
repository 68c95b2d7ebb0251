//! IOMMU_HWPT_ALLOC, and making a page table for a device that attaches to an IOAS (rules 46 to 49).

use super::{Below, Hwpt, OnTop, Paging, Table};
use crate::device::{DeviceObject, lock};
use crate::fault::FaultQueue;
use crate::ioas_ops::{FLAGS, RESERVED, check_clear, unsupported};
use crate::object::{Held, Object};
use crate::table::{Call, Reply};
use crate::uapi::{self, HWPT_DIRTY_TRACKING, HWPT_FAULT_ID_VALID, HWPT_NEST_PARENT, HWPT_PASID};
use crate::user::UserData;
use crate::viommu::ViommuObject;
use crate::{Answer, Context, IoasObject, Refusal};
use rustix::io::Errno;
use std::any::Any;
use std::sync::{Arc, Mutex};

/// What a paging table is made from.
pub(crate) struct PagingWanted<'a> {
    pub(crate) ioas: &'a Arc<IoasObject>,
    pub(crate) device: &'a DeviceObject,
    pub(crate) flags: u32,
    pub(crate) data: Option<&'a UserData<'a>>,
    pub(crate) auto: bool,
}

impl Context {
    /// A page table over an IOAS, with an id that nobody finds yet. `attach` puts a device on it before it shows the IOAS, `undo` takes it off when
    /// that then fails. The caller serialises.
    pub(crate) fn make_paging(
        &self,
        wanted: &PagingWanted<'_>,
        attach: impl FnOnce(&Arc<Hwpt>) -> Answer,
        undo: impl FnOnce(),
    ) -> Answer<Arc<Hwpt>> {
        let (flags, driver) = (wanted.flags, wanted.device.driver());
        check_clear(u64::from(flags & !(HWPT_NEST_PARENT | HWPT_DIRTY_TRACKING | HWPT_FAULT_ID_VALID | HWPT_PASID)), FLAGS)?;
        let notes_dirty = flags & HWPT_DIRTY_TRACKING != 0;
        if notes_dirty && !driver.tracks_dirty() {
            return Err(unsupported("this device cannot track dirty pages"));
        }
        if flags & HWPT_FAULT_ID_VALID != 0 && flags & HWPT_NEST_PARENT != 0 {
            return Err(unsupported("a parent of nested page tables has no fault queue"));
        }
        let keeps = Mutex::new(Some(Held::new(wanted.ioas)?));
        let domain = driver.paging(flags & !HWPT_FAULT_ID_VALID, wanted.data)?;
        let paging = Paging {
            ioas: Arc::clone(wanted.ioas),
            keeps,
            domain: Arc::clone(&domain),
            nest_parent: flags & HWPT_NEST_PARENT != 0,
            notes_dirty,
            auto: wanted.auto,
        };
        let table = Hwpt::new(driver.unit(), flags & HWPT_PASID != 0, Table::Paging(paging));
        self.enroll(&*table)?;
        let attached = attach(&table).and_then(|()| {
            wanted.ioas.ioas().attach(&domain).map_err(|error| {
                undo();
                error.into()
            })
        });
        match attached {
            Ok(()) => Ok(table),
            Err(refusal) => {
                self.discard(&table);
                Err(refusal)
            }
        }
    }

    /// The end of a table that nobody has found yet.
    pub(crate) fn discard(&self, table: &Arc<Hwpt>) {
        table.destroy(self);
        self.abandon(&**table);
    }

    fn make_nested(&self, unit: u32, flags: u32, own: OnTop) -> Answer<Arc<Hwpt>> {
        let table = Hwpt::new(unit, flags & HWPT_PASID != 0, Table::Nested(own));
        self.enroll(&*table)?;
        Ok(table)
    }

    /// A user's page table on a parent.
    fn make_on_parent(&self, parent: &Arc<Hwpt>, device: &DeviceObject, flags: u32, data: Option<&UserData<'_>>) -> Answer<Arc<Hwpt>> {
        let data = check_nested(flags, data)?;
        if !parent.is_nest_parent() || parent.unit != device.driver().unit() {
            return Err(Refusal::of(Errno::INVAL, "the parent must be made with NEST_PARENT for a device behind the same IOMMU"));
        }
        let keeps = Mutex::new(Some(Below::Table(Held::new(parent)?)));
        let table = device.driver().nested(parent, flags & !HWPT_FAULT_ID_VALID, data)?;
        self.make_nested(parent.unit, flags, OnTop { table, parent: Arc::clone(parent), viommu: None, keeps })
    }

    /// A guest's page table on a virtual IOMMU.
    fn make_on_viommu(
        &self,
        viommu: &Arc<ViommuObject>,
        device: &DeviceObject,
        flags: u32,
        data: Option<&UserData<'_>>,
    ) -> Answer<Arc<Hwpt>> {
        if viommu.unit() != device.driver().unit() {
            return Err(Refusal::of(Errno::INVAL, "the device is behind another IOMMU"));
        }
        let data = check_nested(flags, data)?;
        let keeps = Mutex::new(Some(Below::Viommu(Held::new(viommu)?)));
        let table = viommu.own().nested(flags & !HWPT_FAULT_ID_VALID, data)?;
        let parent = Arc::clone(viommu.parent());
        self.make_nested(viommu.unit(), flags, OnTop { table, parent, viommu: Some(Arc::clone(viommu)), keeps })
    }
}

fn check_nested<'a, 'b>(flags: u32, data: Option<&'a UserData<'b>>) -> Answer<&'a UserData<'b>> {
    check_clear(u64::from(flags & !(HWPT_FAULT_ID_VALID | HWPT_PASID)), "a nested page table has only the flags FAULT_ID_VALID and PASID")?;
    data.ok_or(unsupported("a nested page table needs data that says where it is"))
}

pub(crate) fn alloc(call: &Call<'_, Context>, arg: &mut uapi::HwptAlloc) -> Answer<Reply> {
    check_clear(arg.__reserved.into(), RESERVED)?;
    if (arg.data_type == 0) != (arg.data_len == 0) {
        return Err(Refusal::of(Errno::INVAL, "a data type and a length are given both, or neither"));
    }
    let context = call.target;
    let device = context.device(arg.dev_id)?;
    let data = UserData::new(call.caller, arg.data_type, arg.data_len, arg.data_uptr);
    let data = (arg.data_len != 0).then_some(&data);
    let unusable = || {
        let text = format!("object {} is no IOAS, no page table that can be a parent, and no virtual IOMMU", arg.pt_id);
        Refusal::new(Errno::INVAL, text)
    };
    let object: Arc<dyn Any + Send + Sync> = context.any(arg.pt_id).map_err(|missing| match missing.errno {
        Errno::NOENT => unusable(),
        _ => missing,
    })?;
    let _attaching = context.lock_attaching();
    let table = match Which::of(object).ok_or_else(unusable)? {
        Which::Ioas(ioas) => {
            context.make_paging(&PagingWanted { ioas: &ioas, device: &device, flags: arg.flags, data, auto: false }, |_| Ok(()), || ())?
        }
        Which::Parent(parent) => context.make_on_parent(&parent, &device, arg.flags, data)?,
        Which::Viommu(viommu) => context.make_on_viommu(&viommu, &device, arg.flags, data)?,
    };
    if arg.flags & HWPT_FAULT_ID_VALID != 0 {
        let held = context.get::<FaultQueue>(arg.fault_id, "fault queue").and_then(|queue| Held::new(&queue));
        match held {
            Ok(held) => *lock(&table.fault) = Some(held),
            Err(refusal) => {
                context.discard(&table);
                return Err(refusal);
            }
        }
    }
    arg.out_hwpt_id = table.id();
    context.publish(table);
    Ok(Reply::New(arg.out_hwpt_id))
}

/// What HWPT_ALLOC makes a table on.
enum Which {
    Ioas(Arc<IoasObject>),
    Parent(Arc<Hwpt>),
    Viommu(Arc<ViommuObject>),
}

impl Which {
    fn of(object: Arc<dyn Any + Send + Sync>) -> Option<Self> {
        let object = match object.downcast() {
            Ok(ioas) => return Some(Self::Ioas(ioas)),
            Err(object) => object,
        };
        match object.downcast::<Hwpt>() {
            // Nothing goes on top of a user's own table.
            Ok(table) => table.domain().is_some().then(|| Self::Parent(table)),
            Err(object) => object.downcast().ok().map(Self::Viommu),
        }
    }
}
