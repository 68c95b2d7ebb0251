//! Virtual devices: the number by which a guest knows a device at its virtual IOMMU (rules 10, 66).

use crate::device::{DeviceObject, lock};
use crate::object::{Head, Held, Object};
use crate::table::{Call, Reply};
use crate::uapi;
use crate::viommu::ViommuObject;
use crate::{Answer, Context, Refusal};
use rustix::io::Errno;
use std::sync::{Arc, Mutex};

/// A device's number, as an object.
pub struct VdeviceObject {
    head: Head,
    virt_id: u64,
    device: Arc<DeviceObject>,
    viommu: Arc<ViommuObject>,
    keeps: Mutex<Option<Held<ViommuObject>>>,
}

impl VdeviceObject {
    /// The device.
    pub fn device(&self) -> &Arc<DeviceObject> {
        &self.device
    }

    /// Where it has the number.
    pub fn viommu(&self) -> &Arc<ViommuObject> {
        &self.viommu
    }

    /// The number.
    pub fn virt_id(&self) -> u64 {
        self.virt_id
    }
}

impl Object for VdeviceObject {
    fn head(&self) -> &Head {
        &self.head
    }

    fn kind(&self) -> &'static str {
        "virtual device"
    }

    fn destroy(&self, _: &Context) {
        lock(&self.device.numbered).vdevice = None;
        self.viommu.own().remove_vdevice(&self.device, self.virt_id);
        self.viommu.remove_device(self.virt_id);
        drop(lock(&self.keeps).take());
    }
}

pub(crate) fn alloc(call: &Call<'_, Context>, arg: &mut uapi::VdeviceAlloc) -> Answer<Reply> {
    let context = call.target;
    let viommu = context.viommu(arg.viommu_id)?;
    let device = context.device(arg.dev_id)?;
    if viommu.unit() != device.driver().unit() {
        return Err(Refusal::of(Errno::INVAL, "the device is behind another IOMMU"));
    }
    let _attaching = context.lock_attaching();
    let mut numbered = lock(&device.numbered);
    if numbered.leaving {
        return Err(Refusal::of(Errno::NOENT, "the device is being unbound"));
    }
    if numbered.vdevice.is_some() {
        return Err(Refusal::of(Errno::EXIST, "the device has a number already"));
    }
    let keeps = Mutex::new(Some(Held::new(&viommu)?));
    let vdevice = Arc::new(VdeviceObject {
        head: Head::default(),
        virt_id: arg.virt_id,
        device: Arc::clone(&device),
        viommu: Arc::clone(&viommu),
        keeps,
    });
    arg.out_vdevice_id = context.enroll(&*vdevice)?;
    let added = viommu
        .add_device(arg.virt_id, &vdevice)
        .and_then(|()| viommu.own().add_vdevice(&device, arg.virt_id).inspect_err(|_| viommu.remove_device(arg.virt_id)));
    added.inspect_err(|_| context.abandon(&*vdevice))?;
    numbered.vdevice = Some(Arc::clone(&vdevice));
    drop(numbered);
    context.publish(vdevice);
    Ok(Reply::New(arg.out_vdevice_id))
}
