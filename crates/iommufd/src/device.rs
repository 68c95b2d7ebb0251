//! Devices: bound to a context by whoever drives them, until that unbinds them again (rules 3, 10).

mod attach;

use crate::driver::Driver;
use crate::group::Group;
use crate::hwpt::Hwpt;
use crate::object::{Head, Held, Object};
use crate::vdevice::VdeviceObject;
use crate::{Answer, Context, Refusal};
use iommu::Device;
use rustix::io::Errno;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// What makes a device object.
#[derive(Debug)]
pub struct NewDevice {
    /// The IOMMU in front of it.
    pub driver: Arc<dyn Driver>,
    /// What makes its DMA.
    pub device: Arc<Device>,
    /// The devices that it cannot be told apart from; `None` when it is alone.
    pub group: Option<Arc<Group>>,
}

/// A device with an id, the kernel's iommufd_device. It is there until whoever bound it unbinds it: DESTROY answers `EBUSY`.
pub struct DeviceObject {
    head: Head,
    context: Weak<Context>,
    driver: Arc<dyn Driver>,
    device: Arc<Device>,
    pub(crate) group: Arc<Group>,
    /// What makes DESTROY answer `EBUSY`.
    binding: Mutex<Option<Held<DeviceObject>>>,
    pub(crate) numbered: Mutex<Numbered>,
    /// Page requests whose last part has not come yet.
    pub(crate) partial: Mutex<Vec<crate::fault::PageFault>>,
}

/// Whether a device has a number in a virtual IOMMU.
#[derive(Default)]
pub(crate) struct Numbered {
    /// It is being unbound and gets none any more.
    pub(crate) leaving: bool,
    pub(crate) vdevice: Option<Arc<VdeviceObject>>,
}

/// A device as a whole has no PASID.
pub(crate) const WHOLE: u32 = 0;

impl Context {
    /// Makes a device object for a device that belongs to the caller. Whoever binds a device to a context that others opened keeps the context
    /// open ([`Context::hold`]), and unbinds before letting go.
    ///
    /// # Errors
    /// `ENOSPC`.
    pub fn bind_device(&self, new: NewDevice) -> Answer<Arc<DeviceObject>> {
        let NewDevice { driver, device, group } = new;
        let object = Arc::new(DeviceObject {
            head: Head::default(),
            context: Arc::downgrade(&self.arc()),
            driver,
            device,
            group: group.unwrap_or_default(),
            binding: Mutex::default(),
            numbered: Mutex::default(),
            partial: Mutex::default(),
        });
        self.enroll(&*object)?;
        *lock(&object.binding) = Some(Held::new(&object)?);
        self.publish(Arc::clone(&object) as _);
        Ok(object)
    }

    /// The device `id`.
    ///
    /// # Errors
    /// `ENOENT`.
    pub fn device(&self, id: u32) -> Answer<Arc<DeviceObject>> {
        self.get(id, "device")
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Object for DeviceObject {
    fn head(&self) -> &Head {
        &self.head
    }

    fn kind(&self) -> &'static str {
        "device"
    }

    /// [`DeviceObject::unbind`] has done everything: before it, the device was in use.
    fn destroy(&self, _: &Context) {}
}

/// PASID 0 is the device as a whole.
fn key(pasid: Option<u32>) -> u32 {
    pasid.unwrap_or(WHOLE)
}

fn pasid_of(key: u32) -> Option<u32> {
    (key != WHOLE).then_some(key)
}

impl DeviceObject {
    /// Its id.
    pub fn id(&self) -> u32 {
        self.head.id()
    }

    /// The IOMMU in front of it.
    pub fn driver(&self) -> &Arc<dyn Driver> {
        &self.driver
    }

    /// What makes its DMA.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// The page table that it, or one PASID of it, is attached to.
    pub fn hwpt(&self, pasid: Option<u32>) -> Option<Arc<Hwpt>> {
        let places = self.group.places();
        let place = places.get(&key(pasid)).filter(|place| place.seat_of(self).is_some())?;
        Some(Arc::clone(&place.table))
    }

    pub(crate) fn context(&self) -> Answer<Arc<Context>> {
        self.context.upgrade().ok_or(Refusal::of(Errno::NODEV, "the iommufd that the device was bound to is closed"))
    }

    /// The end of it: detaches everything; a number in a virtual IOMMU becomes unusable (rule 10). Cannot fail.
    pub fn unbind(self: &Arc<Self>) {
        let context = self.context().ok();
        let attaching = context.as_deref().map(Context::lock_attaching);
        let all: Vec<u32> = self.group.places().keys().rev().copied().collect();
        for pasid in all {
            self.detach_held(context.as_deref(), pasid);
        }
        let vdevice = {
            let mut numbered = lock(&self.numbered);
            numbered.leaving = true;
            numbered.vdevice.clone()
        };
        drop(attaching);
        let binding = lock(&self.binding).take();
        drop(binding);
        if let Some(context) = context {
            if let Some(vdevice) = vdevice {
                context.destroy_this(&(vdevice as _), true);
            }
            context.destroy_this(&(Arc::clone(self) as _), false);
        }
    }
}

impl fmt::Debug for DeviceObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceObject")
            .field("id", &self.id())
            .field("driver", &self.driver)
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}
