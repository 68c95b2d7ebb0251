//! A host with a device whose driver does what a test wants, and calls in short form.
#![allow(dead_code, reason = "each test uses some of it")]

use addr::{Iova, Span};
use iommu::{Domain, DomainConfig};
use iommufd::uapi::{self, Struct, io};
use iommufd::{
    Answer, Context, DeviceObject, Driver, Entries, Host, HostConfig, HwInfo, Hwpt, Local, Nested, NewDevice, PageFault, QueueMemory,
    Refusal, UserData, Viommu, ViommuObject, ViommuSetup,
};
use lockstep_iommufd as iommufd;
use rustix::io::Errno;
use std::sync::{Arc, Mutex};

/// The type of this driver's data.
pub(crate) const KIND: u32 = 0xf00d;

/// What the driver of a device does.
#[derive(Debug)]
pub(crate) struct Fake {
    host: Arc<Host>,
    pub(crate) unit: u32,
    pub(crate) capabilities: u64,
    pub(crate) bits: u8,
    pub(crate) reserved: Vec<Span<Iova>>,
    pub(crate) config: DomainConfig,
    /// What the next attaches answer.
    pub(crate) refuses: Mutex<Vec<Errno>>,
    /// What happened.
    pub(crate) log: Arc<Mutex<Vec<String>>>,
}

impl Fake {
    pub(crate) fn new(host: &Arc<Host>) -> Self {
        Self {
            host: Arc::clone(host),
            unit: 7,
            capabilities: uapi::HW_CAP_DIRTY_TRACKING,
            bits: 20,
            reserved: Vec::new(),
            config: DomainConfig::default(),
            refuses: Mutex::default(),
            log: Arc::default(),
        }
    }

    fn note(&self, text: String) {
        self.log.lock().unwrap().push(text);
    }
}

impl Driver for Fake {
    fn unit(&self) -> u32 {
        self.unit
    }

    fn hw_info(&self, wanted: Option<u32>) -> Answer<HwInfo> {
        match wanted {
            None | Some(0 | KIND) => Ok(HwInfo { kind: KIND, bytes: vec![1, 2, 3, 4, 5, 6, 7, 8] }),
            Some(_) => Err(Refusal::of(Errno::OPNOTSUPP, "another type")),
        }
    }

    fn capabilities(&self) -> u64 {
        self.capabilities
    }

    fn pasid_bits(&self) -> u8 {
        self.bits
    }

    fn reserved(&self) -> Vec<Span<Iova>> {
        self.reserved.clone()
    }

    fn paging(&self, _: u32, data: Option<&UserData<'_>>) -> Answer<Arc<Domain>> {
        data.map(|data| data.read::<u64>(KIND, 4)).transpose()?;
        Ok(self.host.iommu().domain_with(&self.config)?)
    }

    fn nested(&self, _: &Arc<Hwpt>, _: u32, data: &UserData<'_>) -> Answer<Arc<dyn Nested>> {
        Ok(Arc::new(FakeNested(Mutex::new(data.read(KIND, 4)?))))
    }

    fn attach(&self, pasid: Option<u32>, table: &Hwpt) -> Answer {
        if let Some(errno) = self.refuses.lock().unwrap().pop() {
            return Err(Refusal::of(errno, "the test wants it so"));
        }
        self.note(format!("attach {} {}", pasid.unwrap_or_default(), table.id()));
        Ok(())
    }

    fn detach(&self, pasid: Option<u32>) {
        self.note(format!("detach {}", pasid.unwrap_or_default()));
    }

    fn respond(&self, fault: &PageFault, success: bool) {
        self.note(format!("respond {} {success}", fault.group));
    }

    fn has_viommu(&self, kind: u32) -> bool {
        kind == KIND
    }

    fn viommu(&self, setup: &mut ViommuSetup<'_>) -> Answer<Arc<dyn Viommu>> {
        if let Some(wanted) = setup.data().map(|data| data.read::<[u64; 2]>(KIND, 8)).transpose()? {
            let at = setup.share(4096, &wanted[0].to_le_bytes())?;
            setup.data().map_or(Ok(()), |data| data.write(KIND, 8, &[wanted[0] + 1, at]))?;
        }
        Ok(Arc::new(FakeViommu(Arc::clone(&self.log))))
    }
}

/// A user's table: the last value that was invalidated.
#[derive(Debug)]
pub(crate) struct FakeNested(Mutex<u64>);

impl Nested for FakeNested {
    fn invalidate(&self, entries: &Entries<'_>, done: &mut u32) -> Answer {
        if entries.kind() != KIND {
            return Err(Refusal::of(Errno::INVAL, "another type"));
        }
        for index in 0..entries.count() {
            let value = entries.read::<u64>(index)?;
            if value == u64::MAX {
                return Err(Refusal::of(Errno::OPNOTSUPP, "an entry that is refused"));
            }
            *self.0.lock().unwrap() = value;
            *done += 1;
        }
        Ok(())
    }
}

#[derive(Debug)]
pub(crate) struct FakeViommu(Arc<Mutex<Vec<String>>>);

impl Viommu for FakeViommu {
    fn nested(&self, _: u32, data: &UserData<'_>) -> Answer<Arc<dyn Nested>> {
        Ok(Arc::new(FakeNested(Mutex::new(data.read(KIND, 4)?))))
    }

    fn invalidate(&self, owner: &ViommuObject, entries: &Entries<'_>, done: &mut u32) -> Answer {
        for index in 0..entries.count() {
            let virt_id = entries.read::<u64>(index)?;
            let device = owner.find_device(virt_id).ok_or(Refusal::of(Errno::INVAL, "no such device"))?;
            self.0.lock().unwrap().push(format!("invalidate {}", device.id()));
            *done += 1;
        }
        Ok(())
    }

    fn add_vdevice(&self, _: &DeviceObject, virt_id: u64) -> Answer {
        if virt_id == 666 { Err(Refusal::of(Errno::IO, "an unlucky number")) } else { Ok(()) }
    }

    fn remove_vdevice(&self, device: &DeviceObject, virt_id: u64) {
        self.0.lock().unwrap().push(format!("remove {virt_id} of {}", device.id()));
    }

    fn has_queues(&self, kind: u32) -> bool {
        kind == KIND
    }

    fn add_queue(&self, queue: &QueueMemory, exists: &dyn Fn(u32) -> bool) -> Answer<Option<u32>> {
        match queue.index {
            2.. => Err(Refusal::of(Errno::INVAL, "two queues")),
            index if exists(index) => Err(Refusal::of(Errno::EXIST, "there")),
            1 if !exists(0) => Err(Refusal::of(Errno::IO, "the first comes first")),
            index => Ok(index.checked_sub(1)),
        }
    }
}

/// A process with /dev/iommu open.
pub(crate) struct Desk {
    pub(crate) host: Arc<Host>,
    pub(crate) local: Local,
    pub(crate) context: Arc<Context>,
}

impl Desk {
    pub(crate) fn new() -> Self {
        let host = Host::new(HostConfig::default()).unwrap();
        let context = host.open();
        Self { host, local: Local::new(), context }
    }

    pub(crate) fn fake(&self) -> Fake {
        Fake::new(&self.host)
    }

    pub(crate) fn bind(&self, driver: impl Driver) -> Arc<DeviceObject> {
        let device = self.host.iommu().device("fake");
        self.context.bind_device(NewDevice { driver: Arc::new(driver), device, group: None }).unwrap()
    }

    /// Two devices that share one group.
    pub(crate) fn bind_pair(&self, one: impl Driver, two: impl Driver) -> [Arc<DeviceObject>; 2] {
        let group: Arc<iommufd::Group> = Arc::default();
        let drivers: [Arc<dyn Driver>; 2] = [Arc::new(one), Arc::new(two)];
        drivers.map(|driver| {
            let device = self.host.iommu().device("pair");
            self.context.bind_device(NewDevice { driver, device, group: Some(Arc::clone(&group)) }).unwrap()
        })
    }

    pub(crate) fn call<S: Struct>(&self, nr: u32, arg: &mut S) -> Result<i64, Errno> {
        self.local.ioctl(&*self.context, io(nr), arg).map_err(|refusal| refusal.errno)
    }

    pub(crate) fn ioas(&self) -> u32 {
        self.context.new_ioas().unwrap().id()
    }

    pub(crate) fn destroy(&self, id: u32) -> Result<i64, Errno> {
        self.call(0x80, &mut uapi::Destroy { size: 8, id })
    }

    pub(crate) fn hwpt(&self, device: &DeviceObject, pt_id: u32, flags: u32) -> Result<u32, Errno> {
        let mut arg = hwpt_alloc(device.id(), pt_id);
        arg.flags = flags;
        self.call(0x89, &mut arg).map(|_| arg.out_hwpt_id)
    }

    pub(crate) fn nested(&self, device: &DeviceObject, pt_id: u32) -> Result<u32, Errno> {
        self.nested_with(device, pt_id, 0, 0)
    }

    pub(crate) fn nested_with(&self, device: &DeviceObject, pt_id: u32, flags: u32, fault_id: u32) -> Result<u32, Errno> {
        let mut arg = hwpt_alloc(device.id(), pt_id);
        (arg.flags, arg.fault_id) = (flags, fault_id);
        (arg.data_type, arg.data_len, arg.data_uptr) = (KIND, 8, self.local.put(&0x1234u64));
        self.call(0x89, &mut arg).map(|_| arg.out_hwpt_id)
    }
}

pub(crate) fn hwpt_alloc(dev_id: u32, pt_id: u32) -> uapi::HwptAlloc {
    uapi::HwptAlloc { size: 48, dev_id, pt_id, ..Default::default() }
}

pub(crate) fn errno<T>(answer: Answer<T>) -> Result<T, Errno> {
    answer.map_err(|refusal| refusal.errno)
}
