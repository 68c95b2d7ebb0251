//! Virtual IOMMUs: the slice of an IOMMU that belongs to one guest, on top of a parent page table (rule 66).

use crate::device::{DeviceObject, lock};
use crate::driver::Viommu;
use crate::hw_queue::HwQueue;
use crate::hwpt::Hwpt;
use crate::ioas_ops::{FLAGS, check_clear, unsupported};
use crate::object::{Head, Held, Object};
use crate::table::{Call, Reply};
use crate::uapi;
use crate::user::UserData;
use crate::vdevice::VdeviceObject;
use crate::veventq::EventQueue;
use crate::{Answer, Caller, Context, Refusal};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, Weak};

/// A virtual IOMMU with an id.
pub struct ViommuObject {
    head: Head,
    kind: u32,
    unit: u32,
    own: Arc<dyn Viommu>,
    parent: Arc<Hwpt>,
    keeps: Mutex<Option<Held<Hwpt>>>,
    /// Pages that it shares with its user: where, and how long.
    shared: Vec<(u64, u64)>,
    parts: Mutex<Parts>,
}

/// What was made on it.
#[derive(Default)]
struct Parts {
    devices: BTreeMap<u64, Arc<VdeviceObject>>,
    events: BTreeMap<u32, Weak<EventQueue>>,
    queues: BTreeMap<(u32, u32), Arc<HwQueue>>,
}

/// What a driver makes a virtual IOMMU from.
pub struct ViommuSetup<'a> {
    context: &'a Context,
    caller: &'a dyn Caller,
    kind: u32,
    parent: &'a Arc<Hwpt>,
    data: Option<UserData<'a>>,
    shared: Vec<(u64, u64)>,
}

impl ViommuSetup<'_> {
    /// Its type.
    pub fn kind(&self) -> u32 {
        self.kind
    }

    /// The page table that it is on top of.
    pub fn parent(&self) -> &Arc<Hwpt> {
        self.parent
    }

    /// What the caller said, if it said anything.
    pub fn data(&self) -> Option<&UserData<'_>> {
        self.data.as_ref()
    }

    /// Memory of `len` bytes, whole pages, that the caller may map: it begins with `content`. Answers its offset in the iommufd (rule 12). It is there as
    /// long as the virtual IOMMU.
    ///
    /// # Errors
    /// `ENODEV` when the front has no such memory; `ENOMEM`.
    pub fn share(&mut self, len: u64, content: &[u8]) -> Answer<u64> {
        let at = self.context.regions.add(self.caller, len, content)?;
        self.shared.push((at, len));
        Ok(at)
    }
}

impl Drop for ViommuSetup<'_> {
    /// Whoever made a virtual IOMMU has taken the list.
    fn drop(&mut self) {
        self.shared.iter().for_each(|(at, _)| self.context.regions.remove(*at));
    }
}

impl ViommuObject {
    /// Its id.
    pub fn id(&self) -> u32 {
        self.head.id()
    }

    /// Its type.
    pub fn kind(&self) -> u32 {
        self.kind
    }

    /// The IOMMU that it is a slice of.
    pub fn unit(&self) -> u32 {
        self.unit
    }

    /// What the driver made.
    pub fn own(&self) -> &Arc<dyn Viommu> {
        &self.own
    }

    /// The page table that it is on top of.
    pub fn parent(&self) -> &Arc<Hwpt> {
        &self.parent
    }

    /// The device that has this number here.
    pub fn find_device(&self, virt_id: u64) -> Option<Arc<DeviceObject>> {
        lock(&self.parts).devices.get(&virt_id).map(|vdevice| Arc::clone(vdevice.device()))
    }

    /// The number that a device has here.
    pub fn number_of(&self, device: &DeviceObject) -> Option<u64> {
        let parts = lock(&self.parts);
        parts.devices.iter().find(|(_, vdevice)| std::ptr::eq(Arc::as_ptr(vdevice.device()), device)).map(|(virt_id, _)| *virt_id)
    }

    /// An event, for the queue of type `kind`.
    ///
    /// # Errors
    /// `EOPNOTSUPP` without such a queue.
    pub fn report(&self, kind: u32, event: &[u8]) -> Answer {
        let queue = lock(&self.parts).events.get(&kind).and_then(Weak::upgrade);
        queue.ok_or(unsupported("the virtual IOMMU has no event queue of this type"))?.push(event);
        Ok(())
    }

    pub(crate) fn add_device(&self, virt_id: u64, vdevice: &Arc<VdeviceObject>) -> Answer {
        let mut parts = lock(&self.parts);
        if parts.devices.contains_key(&virt_id) {
            return Err(Refusal::new(Errno::EXIST, format!("another device has the number {virt_id:#x} here")));
        }
        parts.devices.insert(virt_id, Arc::clone(vdevice));
        Ok(())
    }

    pub(crate) fn remove_device(&self, virt_id: u64) {
        lock(&self.parts).devices.remove(&virt_id);
    }

    pub(crate) fn add_events(&self, queue: &Arc<EventQueue>) -> Answer {
        let mut parts = lock(&self.parts);
        if parts.events.contains_key(&queue.kind()) {
            return Err(Refusal::of(Errno::EXIST, "there is an event queue of this type already"));
        }
        parts.events.insert(queue.kind(), Arc::downgrade(queue));
        Ok(())
    }

    pub(crate) fn remove_events(&self, queue: &EventQueue) {
        lock(&self.parts).events.remove(&queue.kind());
    }

    pub(crate) fn queue(&self, kind: u32, index: u32) -> Option<Arc<HwQueue>> {
        lock(&self.parts).queues.get(&(kind, index)).cloned()
    }

    pub(crate) fn add_queue(&self, queue: &Arc<HwQueue>) {
        lock(&self.parts).queues.insert(queue.name(), Arc::clone(queue));
    }

    pub(crate) fn remove_queue(&self, name: (u32, u32)) {
        lock(&self.parts).queues.remove(&name);
    }
}

impl Object for ViommuObject {
    fn head(&self) -> &Head {
        &self.head
    }

    fn kind(&self) -> &'static str {
        "virtual IOMMU"
    }

    fn destroy(&self, context: &Context) {
        self.shared.iter().for_each(|(at, _)| context.regions.remove(*at));
        drop(lock(&self.keeps).take());
    }
}

impl fmt::Debug for ViommuObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ViommuObject").field("id", &self.id()).field("kind", &self.kind).field("own", &self.own).finish_non_exhaustive()
    }
}

impl Context {
    /// The virtual IOMMU `id`.
    ///
    /// # Errors
    /// `ENOENT`.
    pub fn viommu(&self, id: u32) -> Answer<Arc<ViommuObject>> {
        self.get(id, "virtual IOMMU")
    }

    /// Whoever maps a page of a virtual IOMMU needs it (rule 12). Mappings are known to the front alone.
    ///
    /// # Errors
    /// `EBUSY`.
    pub(crate) fn check_unmapped(&self, caller: &dyn Caller, id: u32) -> Answer {
        let viommu = match self.viommu(id) {
            Err(missing) if missing.errno == Errno::NOENT => return Ok(()),
            found => found?,
        };
        match viommu.shared.iter().find(|(at, len)| caller.is_mapped(*at, *len)) {
            Some((at, len)) => {
                let text = format!("the {len:#x} bytes at offset {at:#x} that virtual IOMMU {id} shares are mapped; munmap them first");
                Err(Refusal::new(Errno::BUSY, text))
            }
            None => Ok(()),
        }
    }
}

pub(crate) fn alloc(call: &Call<'_, Context>, arg: &mut uapi::ViommuAlloc) -> Answer<Reply> {
    check_clear(arg.flags.into(), FLAGS)?;
    if arg.r#type == 0 {
        return Err(unsupported("a virtual IOMMU has a type"));
    }
    let context = call.target;
    let device = context.device(arg.dev_id)?;
    let driver = device.driver();
    if !driver.has_viommu(arg.r#type) {
        return Err(unsupported("the device's IOMMU has no virtual ones of this type"));
    }
    let (parent, _) = context.paging(arg.hwpt_id)?;
    if !parent.is_nest_parent() {
        return Err(Refusal::new(Errno::INVAL, format!("page table {} was not made with NEST_PARENT", parent.id())));
    }
    let keeps = Mutex::new(Some(Held::new(&parent)?));
    let _attaching = context.lock_attaching();
    let data = (arg.data_len != 0).then(|| UserData::new(call.caller, arg.r#type, arg.data_len, arg.data_uptr));
    let mut setup = ViommuSetup { context, caller: call.caller, kind: arg.r#type, parent: &parent, data, shared: Vec::new() };
    let own = driver.viommu(&mut setup)?;
    let shared = std::mem::take(&mut setup.shared);
    drop(setup);
    let object = Arc::new(ViommuObject {
        head: Head::default(),
        kind: arg.r#type,
        unit: driver.unit(),
        own,
        keeps,
        parent: Arc::clone(&parent),
        shared,
        parts: Mutex::default(),
    });
    let added = context.add(Arc::clone(&object) as _);
    arg.out_viommu_id = added.inspect_err(|_| object.destroy(context))?;
    Ok(Reply::New(arg.out_viommu_id))
}
