//! The devices of a host.

use crate::device::Cdev;
use crate::sysfs::{self, Entry, MOST};
use iommu::Device;
use iommufd::{Answer, Driver, EngineDriver, File, Host, Observer, Refusal};
use rustix::io::Errno;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// One device, whoever has it open.
pub(crate) struct Place {
    index: u32,
    host: Arc<Host>,
    device: Arc<Device>,
    /// Some open of it is bound.
    taken: AtomicBool,
}

impl Place {
    pub(crate) fn host(&self) -> &Arc<Host> {
        &self.host
    }

    /// As whom it accesses memory.
    pub(crate) fn device(&self) -> &Arc<Device> {
        &self.device
    }

    pub(crate) fn bars(&self) -> [u64; 2] {
        sysfs::bars(self.index)
    }

    pub(crate) fn observer(&self) -> Option<&dyn Observer> {
        self.host.config().observer.as_deref()
    }

    /// Becomes the one open that uses the device.
    ///
    /// # Errors
    /// `EINVAL` when another one does.
    pub(crate) fn take(&self) -> Answer {
        if self.taken.swap(true, Ordering::AcqRel) {
            let text = format!("{} is bound through another open of {}; close that first", self.device.name(), sysfs::path(self.index));
            return Err(Refusal::new(Errno::INVAL, text));
        }
        Ok(())
    }

    pub(crate) fn give_back(&self) {
        self.taken.store(false, Ordering::Release);
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.device.name())
    }
}

/// VFIO devices of a host, each alone in its group.
#[derive(Debug)]
pub struct Fleet(Vec<Arc<Place>>);

impl Fleet {
    /// `count` devices, at most [`MOST`].
    pub fn new(count: u32, host: &Arc<Host>) -> Self {
        let place = |index| {
            let device = host.iommu().device(&format!("vfio{index}"));
            Arc::new(Place { index, host: Arc::clone(host), device, taken: AtomicBool::new(false) })
        };
        Self((0..count.min(MOST)).map(place).collect())
    }

    /// How many there are.
    pub fn len(&self) -> u32 {
        self.0.len() as u32
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Opens a device. As in the kernel any number of opens is fine, and one of them can be bound.
    ///
    /// # Errors
    /// `ENOENT` when there is no such device.
    pub fn open(&self, index: u32) -> Answer<Arc<dyn File>> {
        let place = self.0.get(index as usize);
        let place =
            place.ok_or_else(|| Refusal::new(Errno::NOENT, format!("there are {} VFIO devices, and no vfio{index}", self.len())))?;
        Ok(Cdev::new(place))
    }

    /// Paths of the device files, in order.
    pub fn paths(&self) -> Vec<String> {
        (0..self.len()).map(sysfs::path).collect()
    }

    /// PCI addresses of the devices, in order.
    pub fn addresses(&self) -> Vec<String> {
        (0..self.len()).map(sysfs::address).collect()
    }

    /// What a host shows of them besides the device files: path and entry.
    pub fn entries(&self) -> Vec<(String, Entry)> {
        let reserved = self.0.first().map_or_else(Vec::new, |place| EngineDriver::new(place.host()).reserved());
        sysfs::entries(self.len(), &reserved)
    }

    /// The device behind a file, for reports: as whom it accesses memory.
    pub fn device(&self, index: u32) -> Option<&Arc<Device>> {
        self.0.get(index as usize).map(|place| place.device())
    }
}
