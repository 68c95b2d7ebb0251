//! A client in this process: memory of its own, descriptors, and calls through the same trait as any front's.
#![allow(dead_code, unused_imports, reason = "each test uses its part")]

use backing::{Backing, Frames, PageName};
use iommufd::uapi::{self, Struct, io};
use iommufd::{Answer, Caller, File, Host, HostConfig, Memory, Mmap, Opened, Process, Refusal, SpaceId};
use lockstep_vfio::uapi::{AttachPt, BindIommufd, DetachPt, IrqSet, SET_DATA_EVENTFD, SET_TRIGGER};
use lockstep_vfio::{Fleet, uapi as vfio};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use std::any::Any;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use zerocopy::{FromBytes, IntoBytes};

pub(crate) use iommu::engine::{cmd, reg as engine, status};

/// Where the client's memory begins in its own addresses.
pub(crate) const VA: u64 = 0x7000_0000_0000;
/// Bytes of it. The first page holds structures of calls.
pub(crate) const BYTES: u64 = 64 << 20;
/// From here on the client may read its memory only.
pub(crate) const READ_ONLY: u64 = BYTES - 0x1000;
/// Where tests map memory.
pub(crate) const IOVA: u64 = 0x4000_0000;
/// Offset of BAR0's, the buffer's, configuration space's first byte in the file.
pub(crate) const BAR0: u64 = 0;
pub(crate) const BUFFER: u64 = 2 << 40;
pub(crate) const CONFIG: u64 = 7 << 40;

enum Descriptor {
    Ours(Arc<dyn File>, Option<OwnedFd>),
    Native(OwnedFd),
}

/// A host, its devices and one client.
pub(crate) struct Client {
    pub(crate) host: Arc<Host>,
    pub(crate) fleet: Fleet,
    pub(crate) memory: Arc<Backing>,
    descriptors: Mutex<BTreeMap<i32, Descriptor>>,
    /// Serialises use of the page for structures.
    page: Mutex<()>,
    /// Whether descriptors have memory.
    sharing: bool,
}

/// One call of it.
struct Calling<'a>(&'a Client, i32);

impl Client {
    pub(crate) fn new(devices: u32) -> Self {
        Self::with(devices, true)
    }

    pub(crate) fn with(devices: u32, sharing: bool) -> Self {
        let host = Host::new(HostConfig::default()).unwrap();
        let fleet = Fleet::new(devices, &host);
        let memory = Backing::memfd(BYTES, Frames::Contiguous).unwrap();
        Self { host, fleet, memory, descriptors: Mutex::default(), page: Mutex::default(), sharing }
    }

    fn add(&self, descriptor: Descriptor) -> i32 {
        let mut descriptors = self.descriptors.lock().unwrap();
        let fd = descriptors.last_key_value().map_or(3, |(last, _)| last + 1);
        descriptors.insert(fd, descriptor);
        fd
    }

    pub(crate) fn install(&self, file: Arc<dyn File>) -> i32 {
        let shared = self.sharing.then(|| memfd_create("descriptor", MemfdFlags::CLOEXEC).unwrap());
        self.add(Descriptor::Ours(file, shared))
    }

    pub(crate) fn open_iommufd(&self) -> i32 {
        self.install(self.host.open())
    }

    pub(crate) fn open_device(&self, index: u32) -> i32 {
        self.install(self.fleet.open(index).unwrap())
    }

    pub(crate) fn eventfd(&self) -> i32 {
        self.add(Descriptor::Native(eventfd(0, EventfdFlags::NONBLOCK).unwrap()))
    }

    pub(crate) fn native(&self, fd: OwnedFd) -> i32 {
        self.add(Descriptor::Native(fd))
    }

    /// What an eventfd counted; 0 when it was not signalled.
    pub(crate) fn count(&self, fd: i32) -> u64 {
        let descriptors = self.descriptors.lock().unwrap();
        let Some(Descriptor::Native(fd)) = descriptors.get(&fd) else { panic!("no eventfd") };
        let mut count = [0; 8];
        rustix::io::read(fd, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
    }

    pub(crate) fn close(&self, fd: i32) {
        let gone = self.descriptors.lock().unwrap().remove(&fd);
        if let Some(Descriptor::Ours(file, _)) = gone {
            file.released();
        }
    }

    fn file(&self, fd: i32) -> Arc<dyn File> {
        match self.descriptors.lock().unwrap().get(&fd) {
            Some(Descriptor::Ours(file, _)) => Arc::clone(file),
            _ => panic!("{fd} is none of ours"),
        }
    }

    /// An ioctl with raw bytes at the start of the page for structures; answers what the bytes are then.
    pub(crate) fn ioctl_bytes(&self, fd: i32, command: u32, bytes: &[u8]) -> (Result<i64, Errno>, Vec<u8>) {
        let _page = self.page.lock().unwrap();
        self.poke(0, bytes);
        let answer = self.file(fd).ioctl(&Calling(self, fd), command, VA).map_err(|refusal| {
            assert!(!refusal.to_string().is_empty());
            refusal.errno
        });
        (answer, self.peek(0, bytes.len()))
    }

    /// An ioctl at any address.
    pub(crate) fn ioctl_at(&self, fd: i32, command: u32, at: u64) -> Result<i64, Errno> {
        self.file(fd).ioctl(&Calling(self, fd), command, at).map_err(|refusal| refusal.errno)
    }

    pub(crate) fn ioctl<S: Struct>(&self, fd: i32, nr: u32, value: &mut S) -> Result<i64, Errno> {
        let (answer, back) = self.ioctl_bytes(fd, io(nr), value.as_bytes());
        *value = S::read_from_bytes(&back).unwrap();
        answer
    }

    pub(crate) fn bind(&self, device: i32, iommufd: i32) -> Result<u32, Errno> {
        let mut bind = BindIommufd { argsz: BindIommufd::SIZE as u32, iommufd, ..Default::default() };
        self.ioctl(device, vfio::BIND_IOMMUFD, &mut bind).map(|_| bind.out_devid)
    }

    pub(crate) fn ioas(&self, iommufd: i32) -> u32 {
        let mut alloc = uapi::IoasAlloc { size: uapi::IoasAlloc::SIZE as u32, ..Default::default() };
        self.ioctl(iommufd, 0x81, &mut alloc).unwrap();
        alloc.out_ioas_id
    }

    pub(crate) fn map(&self, iommufd: i32, ioas: u32, offset: u64, len: u64, iova: u64) -> Result<(), Errno> {
        let mut map = uapi::IoasMap {
            size: uapi::IoasMap::SIZE as u32,
            flags: uapi::MAP_FIXED_IOVA | uapi::MAP_READABLE | uapi::MAP_WRITEABLE,
            ioas_id: ioas,
            user_va: VA + offset,
            length: len,
            iova,
            ..Default::default()
        };
        self.ioctl(iommufd, 0x85, &mut map).map(|_| ())
    }

    pub(crate) fn unmap(&self, iommufd: i32, ioas: u32, iova: u64, length: u64) -> Result<u64, Errno> {
        let mut unmap = uapi::IoasUnmap { size: uapi::IoasUnmap::SIZE as u32, ioas_id: ioas, iova, length };
        self.ioctl(iommufd, 0x86, &mut unmap).map(|_| unmap.length)
    }

    pub(crate) fn attach(&self, device: i32, pt_id: u32) -> Result<u32, Errno> {
        let mut attach = AttachPt { argsz: AttachPt::SIZE as u32, pt_id, ..Default::default() };
        self.ioctl(device, vfio::ATTACH_IOMMUFD_PT, &mut attach).map(|_| attach.pt_id)
    }

    pub(crate) fn detach(&self, device: i32) -> Result<(), Errno> {
        let mut detach = DetachPt { argsz: DetachPt::SIZE as u32, ..Default::default() };
        self.ioctl(device, vfio::DETACH_IOMMUFD_PT, &mut detach).map(|_| ())
    }

    /// A bound device with memory attached: device, iommufd, IOAS. The client's memory but its first MiB is mapped at [`IOVA`].
    pub(crate) fn ready(&self, index: u32) -> (i32, i32, u32) {
        let (device, iommufd) = (self.open_device(index), self.open_iommufd());
        self.bind(device, iommufd).unwrap();
        let ioas = self.ioas(iommufd);
        self.map(iommufd, ioas, 1 << 20, BYTES - (1 << 20), IOVA).unwrap();
        self.attach(device, ioas).unwrap();
        self.make_master(device);
        (device, iommufd, ioas)
    }

    pub(crate) fn make_master(&self, device: i32) {
        self.pwrite(device, CONFIG + 4, &6u16.to_le_bytes()).unwrap();
    }

    pub(crate) fn read(&self, fd: i32, count: usize, at: Option<u64>) -> Result<Vec<u8>, Errno> {
        self.file(fd).read(&Calling(self, fd), count, at).map_err(|refusal| refusal.errno)
    }

    pub(crate) fn write(&self, fd: i32, data: &[u8], at: Option<u64>) -> Result<usize, Errno> {
        self.file(fd).write(&Calling(self, fd), data, at).map_err(|refusal| refusal.errno)
    }

    pub(crate) fn pread(&self, fd: i32, at: u64, count: usize) -> Result<Vec<u8>, Errno> {
        self.read(fd, count, Some(at))
    }

    pub(crate) fn pwrite(&self, fd: i32, at: u64, data: &[u8]) -> Result<usize, Errno> {
        self.write(fd, data, Some(at))
    }

    pub(crate) fn mmap(&self, fd: i32, wanted: Mmap) -> Result<(), Errno> {
        self.file(fd).mmap(&Calling(self, fd), &wanted).map_err(|refusal| refusal.errno)
    }

    /// The memory behind a descriptor, as a mapping of it would show it.
    pub(crate) fn shared(&self, fd: i32) -> OwnedFd {
        Calling(self, fd).shared().unwrap()
    }

    pub(crate) fn register(&self, device: i32, register: u64) -> u64 {
        u64::from_le_bytes(self.pread(device, BAR0 + register, 8).unwrap().try_into().unwrap())
    }

    pub(crate) fn set_register(&self, device: i32, register: u64, value: u64) {
        assert_eq!(self.pwrite(device, BAR0 + register, &value.to_le_bytes()), Ok(8));
    }

    /// Runs a command; answers STATUS.
    pub(crate) fn command(&self, device: i32, src: u64, dst: u64, len: u64, command: u64) -> u64 {
        for (register, value) in [(engine::SRC, src), (engine::DST, dst), (engine::LEN, len), (engine::CMD, command)] {
            self.set_register(device, register, value);
        }
        self.register(device, engine::STATUS)
    }

    /// FAULT_IOVA, FAULT_CODE and DONE.
    pub(crate) fn fault(&self, device: i32) -> [u64; 3] {
        [engine::FAULT_IOVA, engine::FAULT_CODE, engine::DONE].map(|register| self.register(device, register))
    }

    /// SET_IRQS with data.
    pub(crate) fn irqs(&self, device: i32, index: u32, flags: u32, start: u32, count: u32, data: &[u8]) -> Result<(), Errno> {
        let head = IrqSet { argsz: (IrqSet::SIZE + data.len()) as u32, flags, index, start, count };
        let bytes = [head.as_bytes(), data].concat();
        self.ioctl_bytes(device, io(vfio::SET_IRQS), &bytes).0.map(|_| ())
    }

    /// Sends vectors from `start` on to eventfds.
    pub(crate) fn signal(&self, device: i32, index: u32, start: u32, fds: &[i32]) -> Result<(), Errno> {
        let data: Vec<u8> = fds.iter().flat_map(|fd| fd.to_ne_bytes()).collect();
        self.irqs(device, index, SET_DATA_EVENTFD | SET_TRIGGER, start, fds.len() as u32, &data)
    }

    /// Writes into the client's memory.
    pub(crate) fn poke(&self, offset: u64, bytes: &[u8]) {
        let host = self.memory.host(addr::Address::plus(self.memory.window().start(), offset), bytes.len() as u64);
        if !bytes.is_empty() {
            host.unwrap().write(0, bytes).unwrap();
        }
    }

    pub(crate) fn peek(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        if len > 0 {
            let host = self.memory.host(addr::Address::plus(self.memory.window().start(), offset), len as u64);
            host.unwrap().read(0, &mut bytes).unwrap();
        }
        bytes
    }
}

fn own(at: u64, len: u64) -> Answer<u64> {
    let bad = Refusal::of(Errno::FAULT, "not in the client's memory");
    match at.checked_sub(VA) {
        Some(offset) if offset.checked_add(len).is_some_and(|end| end <= BYTES) => Ok(offset),
        _ => Err(bad),
    }
}

impl Caller for Calling<'_> {
    fn read(&self, at: u64, into: &mut [u8]) -> Answer {
        let offset = own(at, into.len() as u64)?;
        into.copy_from_slice(&self.0.peek(offset, into.len()));
        Ok(())
    }

    fn write(&self, at: u64, from: &[u8]) -> Answer {
        let offset = own(at, from.len() as u64)?;
        if offset + from.len() as u64 > READ_ONLY {
            return Err(Refusal::of(Errno::FAULT, "the client may not write there"));
        }
        self.0.poke(offset, from);
        Ok(())
    }

    fn process(&self) -> Answer<Process> {
        let limit = 1 << 40;
        Ok(Process { space: SpaceId(1), uid: 1000, ipc_lock: true, sys_resource: false, sys_rawio: false, memlock_bytes: limit })
    }

    fn memory(&self, va: u64, len: u64) -> Answer<Memory> {
        Ok(Memory { backing: Arc::clone(&self.0.memory), offset: own(va, len)? })
    }

    fn file_memory(&self, _: i32, _: u64, _: u64) -> Answer<Memory> {
        Err(Refusal::of(Errno::BADF, "no files here"))
    }

    fn file(&self, fd: i32) -> Answer<Opened> {
        match self.0.descriptors.lock().unwrap().get(&fd) {
            Some(Descriptor::Ours(file, _)) => Ok(Opened::Ours(Arc::clone(file))),
            Some(Descriptor::Native(_)) => Ok(Opened::Other),
            None => Err(Refusal::of(Errno::BADF, "no such descriptor")),
        }
    }

    fn descriptor(&self, fd: i32) -> Answer<OwnedFd> {
        match self.0.descriptors.lock().unwrap().get(&fd) {
            Some(Descriptor::Native(native)) => Ok(native.try_clone().unwrap()),
            Some(Descriptor::Ours(_, Some(shared))) => Ok(shared.try_clone().unwrap()),
            _ => Err(Refusal::of(Errno::BADF, "no such descriptor")),
        }
    }

    fn install(&self, file: Arc<dyn File>) -> Answer<i32> {
        Ok(self.0.install(file))
    }

    fn shared(&self) -> Answer<OwnedFd> {
        match self.0.descriptors.lock().unwrap().get(&self.1) {
            Some(Descriptor::Ours(_, Some(shared))) => Ok(shared.try_clone().unwrap()),
            _ => Err(Refusal::of(Errno::NODEV, "no memory behind it")),
        }
    }

    fn is_mapped(&self, _: u64, _: u64) -> bool {
        false
    }

    fn page_name(&self, _: u64) -> Answer<PageName> {
        Err(Refusal::of(Errno::FAULT, "not here"))
    }

    fn as_any(&self) -> &dyn Any {
        unreachable!("no front wants its caller back here")
    }
}
