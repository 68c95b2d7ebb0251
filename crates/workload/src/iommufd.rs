//! Calls of the uAPI: what one ioctl costs in process, through the dispatcher, and for an unmodified program through the seccomp front.
//!
//! The kernel's figures beside them: 701 ns for a map and 520 ns for an unmap of 4 KiB, a domain attached.

use crate::front::{self, Front};
use crate::{Error, Row, Unit, Work, batches};
use backing::{Backing, Frames, UserRegion};
use iommufd::uapi::{IoasAlloc, IoasCopy, IoasMap, IoasMapFile, IoasUnmap, Struct, io};
use iommufd::{Context, Host, HostConfig, Local};
use pt::FormatKind;
use rustix::fs::MemfdFlags;
use std::hint::black_box;
use std::sync::Arc;

const K4: u64 = 4 << 10;
const G1: u64 = 1 << 30;
/// Where rows map; aligned to all they map.
const AT: u64 = 1 << 40;
/// Calls of 4 KiB between two looks at the clock.
const BATCH: u64 = 128;
/// Map, copy: at the given IOVA, readable and writable.
const FIXED_RW: u32 = 7;

const ALLOC: u32 = io(0x81);
const COPY: u32 = io(0x83);
const MAP: u32 = io(0x85);
const UNMAP: u32 = io(0x86);
const MAP_FILE: u32 = io(0x8f);

macro_rules! row {
    ($name:literal, $format:literal, $make:expr) => {
        Row { name: $name, format: $format, unit: Unit::Call, kind: FormatKind::AmdV1, make: $make }
    };
}

/// Its rows. Those through the front are there when this is the `lockstep` command itself, which serves them, on a host with a C compiler, which makes
/// their client.
pub fn rows() -> Vec<Row> {
    let mut rows = vec![
        row!("ioctl_unmap_nothing", "-", |_| unmap_nothing()),
        row!("ioctl_map_4k", "amdv1", |_| map_4k()),
        row!("ioctl_unmap_4k", "amdv1", |_| unmap_4k()),
        row!("ioctl_map_4k_no_domain", "-", |_| map_4k_alone()),
        row!("ioctl_copy_4k", "amdv1", |_| copy_4k()),
        row!("ioctl_map_file_1g", "amdv1", |_| map_file_1g()),
        row!("ioctl_unmap_file_1g", "amdv1", |_| unmap_file_1g()),
    ];
    if front::is_possible() {
        rows.extend([
            row!("front_getpid", "-", |_| front("getpid")),
            row!("front_unmap_nothing", "-", |_| front("unmap_nothing")),
            row!("front_map_4k", "-", |_| front("map_4k")),
            row!("front_unmap_4k", "-", |_| front("unmap_4k")),
            row!("front_map_file_1g", "-", |_| front("map_file_1g")),
            row!("front_unmap_file_1g", "-", |_| front("unmap_file_1g")),
        ]);
    }
    rows
}

/// A program of this process: one IOAS, mostly with a page table, and memory.
struct Program {
    local: Local,
    context: Arc<Context>,
    ioas: u32,
    va: u64,
    fd: i32,
}

impl Program {
    fn new(attached: bool) -> Result<Self, Error> {
        let host = Host::new(HostConfig::default())?;
        let (local, context) = (Local::new(), host.open());
        let va = local.add(&Backing::user(UserRegion::new(BATCH * K4)?, Frames::Contiguous)?)?;
        let file = rustix::fs::memfd_create("bench", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&file, G1)?;
        let fd = local.give(file)?;
        let mut alloc = IoasAlloc { size: 12, ..IoasAlloc::default() };
        local.ioctl(&*context, ALLOC, &mut alloc)?;
        let ioas = alloc.out_ioas_id;
        if attached {
            context.ioas(ioas)?.ioas().attach(&host.iommu().domain()?)?;
        }
        Ok(Self { local, context, ioas, va, fd })
    }

    fn call<S: Struct>(&self, command: u32, mut arg: S) {
        let done = self.local.ioctl(&*self.context, command, black_box(&mut arg));
        assert!(done.is_ok(), "{done:?}");
    }

    fn map(&self, page: u64) {
        let (ioas_id, user_va, iova) = (self.ioas, self.va + page * K4, AT + page * K4);
        self.call(MAP, IoasMap { size: 40, flags: FIXED_RW, ioas_id, user_va, length: K4, iova, ..IoasMap::default() });
    }

    fn unmap(&self, iova: u64, length: u64) {
        self.call(UNMAP, IoasUnmap { size: 24, ioas_id: self.ioas, iova, length });
    }

    fn map_pages(&mut self, count: u64) {
        (0..count).for_each(|page| self.map(page));
    }

    fn unmap_pages(&mut self, count: u64) {
        (0..count).for_each(|page| self.unmap(AT + page * K4, K4));
    }

    fn copy_pages(&mut self, count: u64) {
        for page in 0..count {
            let (src_iova, dst_iova) = (AT, AT + G1 + page * K4);
            let arg =
                IoasCopy { size: 40, flags: FIXED_RW, dst_ioas_id: self.ioas, src_ioas_id: self.ioas, length: K4, dst_iova, src_iova };
            self.call(COPY, arg);
        }
    }

    fn map_file(&mut self, _: u64) {
        let arg = IoasMapFile { size: 40, flags: FIXED_RW, ioas_id: self.ioas, fd: self.fd, start: 0, length: G1, iova: AT };
        self.call(MAP_FILE, arg);
    }

    fn unmap_file(&mut self, _: u64) {
        self.unmap(AT, G1);
    }
}

/// Everything of an address space that has nothing.
fn unmap_nothing() -> Result<Box<dyn Work>, Error> {
    let mut program = Program::new(true)?;
    let all = |program: &mut Program, count| (0..count).for_each(|_| program.unmap(0, u64::MAX));
    Ok(Box::new(move |times| batches(&mut program, times, BATCH, |_, _| {}, all, |_, _| {})))
}

fn map_4k() -> Result<Box<dyn Work>, Error> {
    let mut program = Program::new(true)?;
    Ok(Box::new(move |times| batches(&mut program, times, BATCH, |_, _| {}, Program::map_pages, Program::unmap_pages)))
}

fn unmap_4k() -> Result<Box<dyn Work>, Error> {
    let mut program = Program::new(true)?;
    Ok(Box::new(move |times| batches(&mut program, times, BATCH, Program::map_pages, Program::unmap_pages, |_, _| {})))
}

fn map_4k_alone() -> Result<Box<dyn Work>, Error> {
    let mut program = Program::new(false)?;
    Ok(Box::new(move |times| batches(&mut program, times, BATCH, |_, _| {}, Program::map_pages, Program::unmap_pages)))
}

fn copy_4k() -> Result<Box<dyn Work>, Error> {
    let mut program = Program::new(true)?;
    program.map(0);
    let undo = |program: &mut Program, count: u64| (0..count).for_each(|page| program.unmap(AT + G1 + page * K4, K4));
    Ok(Box::new(move |times| batches(&mut program, times, BATCH, |_, _| {}, Program::copy_pages, undo)))
}

fn map_file_1g() -> Result<Box<dyn Work>, Error> {
    let mut program = Program::new(true)?;
    Ok(Box::new(move |times| batches(&mut program, times, 1, |_, _| {}, Program::map_file, Program::unmap_file)))
}

fn unmap_file_1g() -> Result<Box<dyn Work>, Error> {
    let mut program = Program::new(true)?;
    Ok(Box::new(move |times| batches(&mut program, times, 1, Program::map_file, Program::unmap_file, |_, _| {})))
}

fn front(what: &'static str) -> Result<Box<dyn Work>, Error> {
    let mut front = Front::start()?;
    Ok(Box::new(move |times| front.run(what, times)))
}
