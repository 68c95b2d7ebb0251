//! A program with /dev/iommu open, in this process, and page tables attached by hand where no device is needed.
#![allow(dead_code, reason = "each test program uses a part of it")]

use addr::{Iova, Lg2, SizeSet, Span};
use backing::{Backing, Frames};
use ioas::Ioas;
use iommu::{Device, Dma, Domain, DomainConfig};
use lockstep_iommufd::uapi::{self, Struct, io};
use lockstep_iommufd::{Answer, Caller, Context, Host, HostConfig, IoasObject, Local, Process, Refusal, SpaceId, Touch};
use pt::FormatKind;
use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

pub(crate) const PAGE: u64 = 4096;
pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const FIXED: u32 = 1;
pub(crate) const WRITE: u32 = 2;
pub(crate) const READ: u32 = 4;
pub(crate) const RW: u32 = READ | WRITE;

pub(crate) const DESTROY: u32 = 0x80;
pub(crate) const ALLOC: u32 = 0x81;
pub(crate) const ALLOW: u32 = 0x82;
pub(crate) const COPY: u32 = 0x83;
pub(crate) const RANGES: u32 = 0x84;
pub(crate) const MAP: u32 = 0x85;
pub(crate) const UNMAP: u32 = 0x86;
pub(crate) const OPTION: u32 = 0x87;
pub(crate) const VFIO_IOAS: u32 = 0x88;
pub(crate) const MAP_FILE: u32 = 0x8f;
pub(crate) const CHANGE_PROCESS: u32 = 0x92;

/// A program.
pub(crate) struct Program {
    pub(crate) host: Arc<Host>,
    pub(crate) local: Local,
    pub(crate) context: Arc<Context>,
}

/// Rights and limits of a process without any, in an address space of its own.
pub(crate) fn nobody(uid: u32, memlock_bytes: u64) -> Process {
    static SPACES: AtomicU64 = AtomicU64::new(1 << 32);
    let space = SpaceId(SPACES.fetch_add(1, Ordering::Relaxed));
    Process { space, uid, ipc_lock: false, sys_resource: false, sys_rawio: false, memlock_bytes }
}

impl Program {
    pub(crate) fn new() -> Self {
        Self::on(&Host::new(HostConfig::default()).unwrap(), Local::new())
    }

    pub(crate) fn with_policy(policy: convert::Policy) -> Self {
        Self::on(&Host::new(HostConfig { policy, ..HostConfig::default() }).unwrap(), Local::new())
    }

    pub(crate) fn with_rights(process: Process) -> Self {
        Self::on(&Host::new(HostConfig::default()).unwrap(), Local::with_rights(process))
    }

    pub(crate) fn on(host: &Arc<Host>, local: Local) -> Self {
        Self { host: Arc::clone(host), local, context: host.open() }
    }

    /// Another open of the same /dev/iommu by the same process.
    pub(crate) fn again(&self) -> Self {
        Self::on(&self.host, self.local.fork())
    }

    /// An ioctl; the structure's size is filled in.
    pub(crate) fn call<S: Struct>(&self, nr: u32, mut arg: S) -> Answer<S> {
        self.call_in(nr, &mut arg)?;
        Ok(arg)
    }

    /// The same, for what a failing call leaves in the structure.
    pub(crate) fn call_in<S: Struct>(&self, nr: u32, arg: &mut S) -> Answer<i64> {
        arg.as_mut_bytes()[..4].copy_from_slice(&(S::SIZE as u32).to_le_bytes());
        self.local.ioctl(&*self.context, io(nr), arg)
    }

    /// An ioctl whose structure lies in memory that can be read only.
    pub(crate) fn call_read_only<S: Struct>(&self, nr: u32, mut arg: S) -> Answer<i64> {
        arg.as_mut_bytes()[..4].copy_from_slice(&(S::SIZE as u32).to_le_bytes());
        let memory = Backing::memfd(PAGE, Frames::Contiguous).unwrap();
        let at = 0x6660_0000;
        self.local.add_at(&memory, at, Touch::Always).unwrap();
        self.local.write(at, arg.as_bytes()).unwrap();
        self.local.hide(at, PAGE).unwrap();
        self.local.add_at(&memory, at, Touch::ReadOnly).unwrap();
        let answer = self.local.call(&*self.context, io(nr), at);
        self.local.hide(at, PAGE).unwrap();
        answer
    }

    pub(crate) fn alloc(&self) -> u32 {
        self.call(ALLOC, uapi::IoasAlloc::default()).unwrap().out_ioas_id
    }

    pub(crate) fn ioas(&self, id: u32) -> Arc<IoasObject> {
        self.context.ioas(id).unwrap()
    }

    pub(crate) fn destroy(&self, id: u32) -> Answer {
        self.call(DESTROY, uapi::Destroy { id, ..Default::default() }).map(|_| ())
    }

    /// Memory of the program's own. Answers its address.
    pub(crate) fn memory(&self, bytes: u64) -> u64 {
        self.local.add(&Backing::memfd(bytes, Frames::Contiguous).unwrap()).unwrap()
    }

    /// Memory that is looked for when somebody pins it.
    pub(crate) fn memory_at(&self, at: u64, bytes: u64, touch: Touch) {
        self.local.add_at(&Backing::memfd(bytes, Frames::Contiguous).unwrap(), at, touch).unwrap();
    }

    /// A memfd of its own.
    pub(crate) fn file(&self, bytes: u64) -> i32 {
        self.local.give(memfd(bytes)).unwrap()
    }

    pub(crate) fn map(&self, ioas_id: u32, flags: u32, user_va: u64, length: u64, iova: u64) -> Answer<u64> {
        self.call(MAP, uapi::IoasMap { flags, ioas_id, user_va, length, iova, ..Default::default() }).map(|arg| arg.iova)
    }

    pub(crate) fn map_file(&self, ioas_id: u32, flags: u32, fd: i32, start: u64, length: u64, iova: u64) -> Answer<u64> {
        self.call(MAP_FILE, uapi::IoasMapFile { flags, ioas_id, fd, start, length, iova, ..Default::default() }).map(|arg| arg.iova)
    }

    pub(crate) fn copy(
        &self,
        flags: u32,
        (src_ioas_id, src_iova): (u32, u64),
        length: u64,
        (dst_ioas_id, dst_iova): (u32, u64),
    ) -> Answer<u64> {
        let arg = uapi::IoasCopy { flags, dst_ioas_id, src_ioas_id, length, dst_iova, src_iova, ..Default::default() };
        self.call(COPY, arg).map(|arg| arg.dst_iova)
    }

    pub(crate) fn unmap(&self, ioas_id: u32, iova: u64, length: u64) -> Answer<u64> {
        self.call(UNMAP, uapi::IoasUnmap { ioas_id, iova, length, ..Default::default() }).map(|arg| arg.length)
    }

    pub(crate) fn allow(&self, ioas_id: u32, ranges: &[(u64, u64)]) -> Answer {
        let bytes: Vec<u8> = ranges.iter().flat_map(|(start, last)| [start.to_le_bytes(), last.to_le_bytes()].concat()).collect();
        let allowed_iovas = self.local.put(&bytes[..]);
        let arg = uapi::IoasAllowIovas { ioas_id, num_iovas: ranges.len() as u32, allowed_iovas, ..Default::default() };
        self.call(ALLOW, arg).map(|_| ())
    }

    /// What IOVA_RANGES says, and the alignment.
    pub(crate) fn ranges(&self, ioas_id: u32) -> (Vec<(u64, u64)>, u64) {
        let allowed_iovas = self.local.put(&[0u8; 1024]);
        let arg = uapi::IoasIovaRanges { ioas_id, num_iovas: 64, allowed_iovas, ..Default::default() };
        let arg = self.call(RANGES, arg).unwrap();
        let range = |index| self.local.get::<uapi::IovaRange>(allowed_iovas + 16 * u64::from(index));
        ((0..arg.num_iovas).map(range).map(|range| (range.start, range.last)).collect(), arg.out_iova_alignment)
    }

    /// The areas, as first and last IOVA.
    pub(crate) fn areas(&self, ioas_id: u32) -> Vec<(u64, u64)> {
        self.ioas(ioas_id).ioas().areas().iter().map(|area| (area.span().start().get(), area.span().last().get())).collect()
    }

    pub(crate) fn option(&self, option_id: u32, op: u16, object_id: u32, val64: u64) -> Answer<u64> {
        self.call(OPTION, uapi::Option { option_id, op, object_id, val64, ..Default::default() }).map(|arg| arg.val64)
    }

    /// A page table of all addresses and sizes, attached.
    pub(crate) fn attach(&self, ioas_id: u32) -> Arc<Domain> {
        self.attach_with(ioas_id, &DomainConfig::default()).unwrap()
    }

    /// A page table like those of the kernel's mock devices: granules of 2 KiB between 16 MiB and 2 GiB.
    pub(crate) fn attach_mock(&self, ioas_id: u32) -> Arc<Domain> {
        let config = DomainConfig {
            format: FormatKind::AmdV1K2,
            aperture: Some(Span::of(Iova::new(16 * MIB), Iova::new((2 << 30) - 1))),
            ..DomainConfig::default()
        };
        self.attach_with(ioas_id, &config).unwrap()
    }

    pub(crate) fn attach_with(&self, ioas_id: u32, config: &DomainConfig) -> Result<Arc<Domain>, ioas::Error> {
        let domain = self.host.iommu().domain_with(config).unwrap();
        self.ioas(ioas_id).ioas().attach(&domain)?;
        Ok(domain)
    }

    /// A device behind a page table, and a context for its DMA.
    pub(crate) fn device(&self, domain: &Arc<Domain>) -> (Arc<Device>, Dma) {
        let device = self.host.iommu().device("disk");
        device.attach(domain).unwrap();
        let dma = Dma::new(&device).unwrap();
        (device, dma)
    }

    /// The last descriptor goes.
    pub(crate) fn close(self) -> (Arc<Host>, Local) {
        lockstep_iommufd::File::released(&*self.context);
        (self.host, self.local)
    }
}

pub(crate) fn memfd(bytes: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, bytes).unwrap();
    fd
}

/// The sizes of the leaves over a range, ascending.
pub(crate) fn leaves(domain: &Domain, start: u64, len: u64) -> Vec<u64> {
    let mut sizes = Vec::new();
    domain.table().leaves(Span::from_len(Iova::new(start), len).unwrap(), |leaf| sizes.push(leaf.span().len()));
    sizes
}

/// Whether a device finds something there.
pub(crate) fn shown(domain: &Domain, iova: u64) -> bool {
    domain.table().walk(Iova::new(iova)).is_some()
}

pub(crate) fn lg2(lg2: u8) -> SizeSet {
    SizeSet::only(Lg2(lg2))
}

pub(crate) fn pinned(ioas: &Ioas) -> u64 {
    ioas.areas().iter().filter_map(|area| area.source().map(|source| source.pinned_pages())).sum()
}

/// Tells threads that it is over, also when a test fails half way: they would go on for ever.
pub(crate) struct Stop<'a>(pub(crate) &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// The errno of a refused call.
#[track_caller]
pub(crate) fn errno<T: std::fmt::Debug>(answer: Answer<T>) -> Errno {
    let refusal: Refusal = answer.expect_err("this should have been refused");
    assert!(!refusal.to_string().is_empty());
    refusal.errno
}
