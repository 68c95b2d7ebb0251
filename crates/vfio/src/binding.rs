//! A device under an iommufd: what BIND makes, and what attach and detach act on.

use crate::fleet::Place;
use iommufd::{Answer, Caller, Context, DeviceObject, EngineDriver, NewDevice, Open, Opened, Refusal};
use rustix::io::Errno;
use std::sync::Arc;

/// Ends when it is dropped.
pub(crate) struct Binding {
    device: Arc<DeviceObject>,
    /// The iommufd stays open as long as a device is bound to it. Let go of last.
    _open: Open,
}

impl Binding {
    /// The iommufd behind a client's descriptor.
    ///
    /// # Errors
    /// `EBADF`; `EBADFD` for what is no iommufd.
    pub(crate) fn context(caller: &dyn Caller, fd: i32, place: &Place) -> Answer<Open> {
        if let Opened::Ours(file) = caller.file(fd)?
            && let Some(context) = file.downcast::<Context>()
        {
            if Arc::ptr_eq(context.host(), place.host()) {
                return Ok(context.hold());
            }
            return Err(Refusal::of(Errno::INVAL, "the iommufd belongs to another host than the device"));
        }
        Err(Refusal::new(Errno::BADFD, format!("descriptor {fd} is no iommufd; open /dev/iommu")))
    }

    /// Puts the device under an iommufd.
    ///
    /// # Errors
    /// As [`Context::bind_device`].
    pub(crate) fn new(open: Open, place: &Place) -> Answer<Self> {
        let driver = EngineDriver::new(place.host());
        let device = open.context().bind_device(NewDevice { driver, device: Arc::clone(place.device()), group: None })?;
        Ok(Self { device, _open: open })
    }

    /// The device's id in the iommufd.
    pub(crate) fn id(&self) -> u32 {
        self.device.id()
    }

    /// Attaches the device, or a PASID of it, in place of what it was attached to. Answers the page table's id.
    ///
    /// # Errors
    /// As [`DeviceObject::attach`] and [`DeviceObject::replace`].
    pub(crate) fn attach(&self, pasid: Option<u32>, pt_id: u32) -> Answer<u32> {
        match self.device.hwpt(pasid) {
            Some(_) => self.device.replace(pasid, pt_id),
            None => self.device.attach(pasid, pt_id),
        }
    }

    /// Detaches the device, or a PASID of it. Nothing happens when it is not attached.
    pub(crate) fn detach(&self, pasid: Option<u32>) {
        self.device.detach(pasid);
    }
}

impl Drop for Binding {
    fn drop(&mut self) {
        self.device.unbind();
    }
}
