//! Random streams of calls, made from bytes: what a fuzzer finds and what a seed gives are the same thing. Valid and invalid structures, ids, descriptors,
//! addresses, reads and writes of events, mappings, holes in files and in memory, forks and exits, in process, with the test operations.
//!
//! Whatever the stream did: nothing panics, tables agree with areas, and when everything is closed nothing is left.

use backing::{Backing, Frames, Kind, PageState, UserRegion};
use lockstep_iommufd::table::{Ioctl, Rule};
use lockstep_iommufd::uapi::ours::IoasAudit;
use lockstep_iommufd::uapi::test::{self, TestCmd};
use lockstep_iommufd::uapi::{Field, Show, Struct, io};
use lockstep_iommufd::{Caller, Context, Host, HostConfig, Local, Mmap, Observer, TABLE, Touch};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::collections::HashMap;
use std::sync::{Arc, Weak};
use zerocopy::{Immutable, IntoBytes};

const PAGE: u64 = 4096;
/// What default mock page tables translate.
const APERTURE: (u64, u64) = (16 << 20, (2 << 30) - 1);
const MEMORY_PAGES: u64 = 64;
/// Where memory is shown that can only be read, and memory that comes and goes.
const READ_ONLY: u64 = 0x1000_0000;
const FLEETING: u64 = 0x2000_0000;
const MOST_CALLS: usize = 300;

/// Choices, made from bytes; when there are none left, every choice is the first.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((first, rest)) => {
                self.0 = rest;
                *first
            }
            None => 0,
        }
    }

    fn word(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// A number below `bound`, which is at most 65536.
    fn below(&mut self, bound: u64) -> u64 {
        let number = if bound <= 256 { u64::from(self.byte()) } else { u64::from(self.byte()) << 8 | u64::from(self.byte()) };
        number % bound
    }

    fn one_in(&mut self, times: u64) -> bool {
        // The first choice is the usual one.
        self.below(times) == times - 1
    }

    fn of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }
}

/// A host, its processes and what they have open.
struct Machine<'a> {
    bytes: Bytes<'a>,
    host: Arc<Host>,
    processes: Vec<Local>,
    contexts: Vec<Weak<Context>>,
    memory: Arc<Backing>,
    va: u64,
    fleeting: Arc<Backing>,
    files: Vec<i32>,
    /// Who makes the present call.
    turn: usize,
    /// Ids that were answered, by what they are called in structures.
    ids: HashMap<&'static str, Vec<u32>>,
    /// What was mapped: IOVA and length.
    areas: Vec<(u64, u64)>,
    /// The area that the present call is about, if it is about one.
    picked: Option<(u64, u64)>,
    done: usize,
}

/// Runs a stream to its end and checks what is left. Answers how many steps it had.
pub(crate) fn run(bytes: &[u8], observer: Option<Arc<dyn Observer>>) -> usize {
    let mut machine = Machine::new(bytes, observer);
    while !machine.bytes.0.is_empty() && machine.done < MOST_CALLS {
        machine.step();
        machine.done += 1;
    }
    machine.audit();
    machine.finish()
}

fn memory(pages: u64) -> Arc<Backing> {
    Backing::user(UserRegion::new(pages * PAGE).unwrap(), Frames::Contiguous).unwrap()
}

impl<'a> Machine<'a> {
    fn new(bytes: &'a [u8], observer: Option<Arc<dyn Observer>>) -> Self {
        let host = Host::new(HostConfig { test_ops: true, observer, ..HostConfig::default() }).unwrap();
        let local = Local::new();
        let lasting = memory(MEMORY_PAGES);
        let va = local.add(&lasting).unwrap();
        local.add_at(&memory(4), READ_ONLY, Touch::ReadOnly).unwrap();
        let fleeting = memory(8);
        let memfd = memfd_create("stream", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&memfd, MEMORY_PAGES * PAGE).unwrap();
        let (pipe, _) = rustix::pipe::pipe().unwrap();
        let files = [memfd, pipe].map(|file| local.give(file).unwrap()).to_vec();
        let (processes, contexts) = (vec![local], Vec::new());
        let mut machine = Self {
            bytes: Bytes(bytes),
            host,
            processes,
            contexts,
            memory: lasting,
            va,
            fleeting,
            files,
            turn: 0,
            ids: HashMap::new(),
            areas: Vec::new(),
            picked: None,
            done: 0,
        };
        machine.open();
        // Most streams begin where most programs do.
        let deep = [0x89, 0x89, 0x90, 0x91, 0x89, 0x93, 0x94, 0x8e];
        let more = if machine.bytes.one_in(3) { &deep[..] } else { &[] };
        for entry in [0x81, 0x81, 0xa0, 0xa0, 0x85].iter().chain(more).copied() {
            if machine.bytes.byte() < 240 {
                let entry = TABLE.iter().find(|own| own.nr == entry).unwrap();
                if entry.nr == 0xa0 { machine.make_device() } else { machine.ioctl(entry) }
            }
        }
        machine
    }

    fn open(&mut self) {
        let context = self.host.open();
        self.contexts.push(Arc::downgrade(&context));
        let _ = self.processes[0].install(context);
    }

    fn step(&mut self) {
        self.turn = if self.bytes.one_in(4) { self.process() } else { 0 };
        match self.bytes.byte() {
            0..=119 => self.any_ioctl(),
            120..=199 => self.test_op(),
            200..=209 => self.read(),
            210..=217 => self.write(),
            218..=221 => self.map_a_file(),
            222..=225 => self.close(),
            226..=229 => self.punch(),
            230..=233 => self.truncate(),
            234..=239 => self.come_and_go(),
            240..=242 => self.fork_or_exit(),
            243..=245 if self.contexts.len() < 8 => self.open(),
            246..=248 => self.another_number(),
            _ => self.garbage(),
        }
    }

    fn process(&mut self) -> usize {
        self.bytes.below(self.processes.len() as u64) as usize
    }

    /// A descriptor: mostly one that is open.
    fn fd(&mut self) -> i32 {
        let process = self.process();
        let open = self.processes[process].descriptors();
        if open.is_empty() || self.bytes.one_in(32) { self.bytes.byte().cast_signed().into() } else { self.bytes.of(&open) }
    }

    /// A descriptor of this kind, if there is one.
    fn fd_of(&mut self, kind: &str) -> i32 {
        let local = &self.processes[self.turn];
        let is_it = |fd: &i32| local.opened(*fd).is_ok_and(|file| file.kind() == kind);
        let all: Vec<i32> = local.descriptors().into_iter().filter(is_it).collect();
        if all.is_empty() || self.bytes.one_in(16) { self.fd() } else { self.bytes.of(&all) }
    }

    /// An id that was answered under one of these names, mostly.
    fn id(&mut self, names: &[&'static str]) -> u32 {
        let name = self.bytes.of(names);
        match self.ids.get(name) {
            Some(list) if !self.bytes.one_in(16) => {
                let list = list.clone();
                self.bytes.of(&list)
            }
            _ => self.bytes.below(20) as u32,
        }
    }

    fn learn(&mut self, name: &'static str, id: u32) {
        let list = self.ids.entry(name).or_default();
        if id != 0 && !list.contains(&id) {
            list.push(id);
        }
    }

    /// Makes a call on some file of ours, mostly a context.
    fn call(&mut self, command: u32, arg: u64) -> bool {
        let fd = if self.bytes.one_in(16) { self.fd() } else { 5 };
        let local = &self.processes[self.turn];
        local.opened(fd).is_ok_and(|file| local.call(&*file, command, arg).is_ok())
    }

    fn put<T: IntoBytes + Immutable + ?Sized>(&mut self, value: &T) -> u64 {
        self.processes[self.turn].put(value)
    }

    fn any_ioctl(&mut self) {
        let entry = &TABLE[self.bytes.below(TABLE.len() as u64) as usize];
        if entry.rule == Rule::None {
            let arg = self.bytes.below(16);
            self.call(io(entry.nr), arg);
        } else if entry.nr == 0xa0 {
            self.test_op();
        } else {
            self.ioctl(entry);
        }
    }

    fn ioctl(&mut self, entry: &'static Ioctl<Context>) {
        let maps = matches!(entry.nr, 0x71 | 0x85 | 0x8f);
        self.picked = if maps || self.areas.is_empty() || self.bytes.one_in(4) {
            None
        } else {
            let areas = std::mem::take(&mut self.areas);
            let picked = self.bytes.of(&areas);
            self.areas = areas;
            Some(picked)
        };
        let mut bytes = vec![0; entry.size];
        let (mut typed, mut nested) = (false, false);
        for field in entry.fields {
            // A type and the length of its data go together, mostly.
            let value = match field.name {
                _ if self.bytes.one_in(200) => self.bytes.word(),
                "data_len" if !self.bytes.one_in(8) => match (typed, entry.nr) {
                    (false, _) => 0,
                    (true, 0x90) => 24,
                    (true, _) => 8,
                },
                "data_type" if nested => test::HWPT_DATA.into(),
                "data_type" | "out_data_type" | "type" => {
                    let value = self.kind_of_data(entry.nr);
                    typed = value != 0;
                    value
                }
                "flags" => self.flags(entry.nr, field),
                "hwpt_id" if entry.nr == 0x90 => self.id(&["nest_id"]).into(),
                "hwpt_id" if matches!(entry.nr, 0x8b | 0x8c) => self.id(&["dirty_id", "dirty_id", "hwpt_id"]).into(),
                "hwpt_id" if entry.nr == 0x8d => self.id(&["nested_id", "viommu_id", "hwpt_id"]).into(),
                "pt_id" if self.bytes.one_in(2) => {
                    (nested, typed) = (true, true);
                    self.id(&["nest_id", "viommu_id"]).into()
                }
                "pt_id" => self.id(&["ioas_id", "ioas_id", "hwpt_id"]).into(),
                _ => self.value(field, entry.size),
            };
            let its = &mut bytes[field.offset..field.offset + field.size.min(8)];
            its.copy_from_slice(&value.to_le_bytes()[..its.len()]);
        }
        if self.bytes.one_in(64) {
            bytes.resize(entry.size + 64, self.bytes.byte());
        }
        let at = if self.bytes.one_in(64) { self.address() } else { self.put(&bytes[..]) };
        if self.call(io(entry.nr), at) && self.processes[self.turn].read(at, &mut bytes[..entry.size]).is_ok() {
            for field in entry.fields.iter().filter(|field| field.name.starts_with("out_") && field.name.ends_with("_id")) {
                self.learn(&field.name[4..], field.value(&bytes) as u32);
            }
            if entry.nr == 0x89 {
                let (id, flags) = (u32::from_le_bytes(bytes[16..20].try_into().unwrap()), bytes[4]);
                let names = [(nested, "nested_id"), (flags & 1 != 0, "nest_id"), (flags & 2 != 0, "dirty_id")];
                names.iter().filter(|(is_one, _)| *is_one).for_each(|(_, name)| self.learn(name, id));
            }
            let of = |name: &str| entry.fields.iter().find(|field| field.name == name).map(|field| field.value(&bytes));
            if let (true, Some(iova), Some(len)) = (maps, of("iova"), of("length").or(of("size"))) {
                self.areas.push((iova, len));
            }
        }
    }

    /// What a field is filled with, by its name and how it is shown.
    fn value(&mut self, field: &Field, size: usize) -> u64 {
        match (field.show, field.name) {
            (_, "size" | "argsz") if field.offset == 0 => size as u64,
            (Show::Reserved, _) => u64::from(self.bytes.one_in(128)),
            (Show::Flags(names), _) => names.iter().fold(0, |flags, (bit, _)| flags | if self.bytes.one_in(4) { *bit } else { 0 }),
            (Show::Enum(names), _) => self.bytes.of(names).0,
            (_, name) if name.ends_with("fault_fd") || name.ends_with("veventq_fd") => 0,
            (Show::Fd, "fd") if !self.bytes.one_in(4) => u64::from(self.files[0].cast_unsigned()),
            (Show::Fd, _) => u64::from(self.fd().cast_unsigned()),
            (_, "ioas_id" | "src_ioas_id" | "dst_ioas_id") => self.id(&["ioas_id"]).into(),
            (_, "hwpt_id") => self.id(&["hwpt_id", "hwpt_id", "viommu_id"]).into(),
            (_, "dev_id" | "fault_id" | "viommu_id") => {
                let name = ["dev_id", "fault_id", "viommu_id"].into_iter().find(|name| *name == field.name).unwrap();
                self.id(&[name]).into()
            }
            (_, "object_id") => self.id(&["ioas_id"]).into(),
            (_, name) if name == "id" || name.ends_with("_id") && name != "virt_id" => self.bytes.below(20),
            (_, "user_va" | "vaddr") => self.address(),
            (_, "data" | "data_uptr" | "allowed_iovas") => self.data(),
            (_, "length") => self.length(),
            (_, "size") => self.length(),
            (_, name) if name.ends_with("iova") => self.iova(),
            (_, "start") => self.bytes.below(MEMORY_PAGES + 2) * PAGE,
            (_, "page_size") => self.bytes.of(&[PAGE, 2048, 1 << 21, 0, 0x1800]),
            (_, "data_len") => self.bytes.of(&[8, 0, 4, 24, 256]),
            (_, "entry_len") => self.bytes.of(&[8, 12, 0, 16, 4096]),
            (_, "veventq_depth") => self.bytes.of(&[2, 1, 0, 1 << 19, u64::MAX]),
            (_, "gpa") => self.bytes.below(MEMORY_PAGES) * PAGE,
            _ => self.bytes.below(4),
        }
    }

    /// Flags that go together, mostly.
    fn flags(&mut self, nr: u32, field: &Field) -> u64 {
        if self.bytes.one_in(32) {
            return self.bytes.byte().into();
        }
        match (nr, field.show) {
            (0x83 | 0x85 | 0x8f, _) => self.bytes.of(&[7, 6, 5, 3, 4, 2, 7, 7]),
            (0x89, _) => self.bytes.of(&[0, 1, 2, 4, 8, 9, 10, 12, 3]),
            (0x71, _) => self.bytes.of(&[3, 1, 2, 0]),
            (0x72, _) => self.bytes.of(&[0, 0, 0, 2]),
            (_, Show::Flags(names)) => self.bytes.of(&[0, names[0].0]),
            _ => 0,
        }
    }

    /// A type of data that the call knows, mostly.
    fn kind_of_data(&mut self, nr: u32) -> u64 {
        let usual = match nr {
            0x89 => self.bytes.of(&[0, test::HWPT_DATA]),
            0x8a => self.bytes.of(&[0, test::HW_INFO]),
            0x8d => test::NESTED_INVALIDATE,
            0x90 => test::VIOMMU,
            0x93 => test::VEVENTQ,
            0x94 => test::HW_QUEUE,
            _ => 0,
        };
        u64::from(if self.bytes.one_in(16) { self.bytes.of(&[0, test::HWPT_DATA, test::VEVENTQ, 7]) } else { usual })
    }

    fn address(&mut self) -> u64 {
        let page = self.bytes.below(8) * PAGE;
        match self.bytes.byte() {
            0..=159 => self.va + self.bytes.below(MEMORY_PAGES) * PAGE,
            160..=179 => self.va + self.bytes.below(MEMORY_PAGES * PAGE / 64) * 64,
            180..=209 => FLEETING + page,
            210..=229 => READ_ONLY + page,
            230..=239 => page,
            240..=247 => u64::MAX - page,
            _ => self.bytes.word(),
        }
    }

    /// Where something is that a structure points to.
    fn data(&mut self) -> u64 {
        match self.bytes.byte() {
            0..=99 => {
                let words: [u32; 8] = std::array::from_fn(|_| self.bytes.below(3) as u32);
                self.put(&words)
            }
            100..=159 => {
                let start = self.iova();
                let ranges = [[start, start.wrapping_add(self.length())], [self.iova(), u64::MAX]];
                self.put(&ranges)
            }
            160..=229 => self.put(&[0u8; 4096]),
            _ => self.address(),
        }
    }

    fn length(&mut self) -> u64 {
        if let Some((_, len)) = self.picked.filter(|_| !self.bytes.one_in(4)) {
            return len;
        }
        match self.bytes.byte() {
            0..=149 => (1 + self.bytes.below(8)) * PAGE,
            150..=199 => (1 + self.bytes.below(MEMORY_PAGES)) * PAGE,
            200..=219 => 1 + self.bytes.below(3 * PAGE),
            220..=229 => 2048,
            230..=239 => 0,
            240..=246 => u64::MAX,
            247 => 1 << 36,
            248..=251 => APERTURE.1,
            _ => u64::MAX - self.bytes.below(3 * PAGE),
        }
    }

    fn iova(&mut self) -> u64 {
        if let Some((iova, len)) = self.picked.filter(|_| !self.bytes.one_in(8)) {
            return if self.bytes.one_in(8) { iova.wrapping_add((len / 2) & !(PAGE - 1)) } else { iova };
        }
        match self.bytes.byte() {
            0..=149 => APERTURE.0 + self.bytes.below(32) * PAGE,
            150..=169 => APERTURE.0 + self.bytes.below(64) * 2048,
            170..=199 => APERTURE.0 + (self.bytes.below(4) << 21),
            200..=219 => self.bytes.below(4) * PAGE,
            220..=229 => APERTURE.1 + 1 - self.bytes.below(4) * PAGE,
            230..=239 => u64::MAX - self.bytes.below(2 * PAGE),
            _ => self.bytes.word(),
        }
    }

    fn test_op(&mut self) {
        let areas = std::mem::take(&mut self.areas);
        self.picked = if areas.is_empty() { None } else { Some(self.bytes.of(&areas)) };
        self.areas = areas;
        let op = 1 + self.bytes.below(24) as u32;
        let id = match op {
            1 | 2 | 5 | 12 => self.id(&["ioas_id", "ioas_id", "hwpt_id"]),
            3 | 14 => self.id(&["hwpt_id", "nested_id"]),
            13 => self.id(&["dirty_id"]),
            10 | 18..=21 => self.id(&["stdev_id"]),
            15..=17 => self.id(&["dev_id"]),
            _ => self.bytes.below(20) as u32,
        };
        let mut cmd = TestCmd { size: 72, op, id, ..TestCmd::default() };
        let (pasid, slot) = (self.bytes.of(&[1u32, 2, 0, 1024, u32::MAX]), self.bytes.below(5) as u32);
        let (iova, length, uptr) = (self.iova(), self.length(), self.address());
        match op {
            1 => cmd.set_args(&test::AddReserved { start: iova, length }),
            2 => {}
            12 => cmd.set_args(&test::MockDomain { dev_flags: self.bytes.of(&[4, 1, 5, 0, 8]), ..test::MockDomain::default() }),
            3 => cmd.set_args(&test::CheckMap { iova, length, uptr }),
            4 => cmd.set_args(&test::CheckRefs { length, uptr, refs: self.bytes.below(3) as u32, pad: 0 }),
            5 => cmd.set_args(&test::CreateAccess { flags: self.bytes.of(&[1, 0, 2]), ..test::CreateAccess::default() }),
            6 => (cmd.id, cmd.arg0) = (self.fd_of("access").cast_unsigned(), self.bytes.below(4)),
            7 => {
                cmd.id = self.fd_of("access").cast_unsigned();
                let flags = self.bytes.of(&[1, 0, 1 << 16, 1 << 16 | 1, 2]);
                cmd.set_args(&test::AccessPages {
                    flags,
                    iova,
                    length,
                    uptr: if id & 1 == 0 { 0 } else { uptr },
                    ..test::AccessPages::default()
                });
            }
            8 => {
                cmd.id = self.fd_of("access").cast_unsigned();
                cmd.set_args(&test::AccessRw { iova, length: length % (1 << 20), uptr, flags: self.bytes.below(6) as u32, pad: 0 });
            }
            9 => cmd.set_args(&test::MemoryLimit { limit: self.bytes.of(&[65536, 16, 4, 12]) }),
            10 => cmd.set_args(&test::MockDomainReplace { pt_id: self.id(&["hwpt_id", "ioas_id", "nested_id"]) }),
            11 => (cmd.id, cmd.arg0) = (self.fd_of("access").cast_unsigned(), self.id(&["ioas_id"]).into()),
            13 => {
                let uptr = self.data();
                cmd.set_args(&test::Dirty {
                    iova,
                    length: length % (1 << 24),
                    page_size: self.bytes.of(&[PAGE, 2048, 0]),
                    uptr,
                    ..test::Dirty::default()
                });
            }
            14 => cmd.set_args(&test::CheckIotlb { slot, iotlb: self.bytes.below(3) as u32 }),
            15 => cmd.set_args(&test::TriggerIopf { dev_id: id, pasid, grpid: slot, perm: self.bytes.below(16) as u32, addr: iova }),
            16 => cmd.set_args(&test::CheckCache { slot, cache: test::CACHE_START }),
            17 => cmd.set_args(&test::TriggerVevent { dev_id: id }),
            18 | 19 => cmd.set_args(&test::PasidAttach { pasid, pt_id: self.id(&["hwpt_id", "nested_id"]) }),
            20 => cmd.set_args(&test::PasidDetach { pasid }),
            21 => cmd.set_args(&test::PasidCheck { pasid, hwpt_id: self.id(&["hwpt_id"]) }),
            22 => cmd.set_args(&test::DmabufGet { length: self.bytes.below(520 * 16) as u32 * 256, open_flags: 0 }),
            23 => cmd.set_args(&test::DmabufRevoke { dmabuf_fd: self.fd_of("dma-buf"), revoked: self.bytes.below(2) as u32 }),
            _ => (cmd.arg0, cmd.arg1) = (self.bytes.word(), self.bytes.word()),
        }
        let at = self.put(cmd.as_bytes());
        if self.call(io(0xa0), at) {
            self.learn_device(at);
        }
    }

    fn make_device(&mut self) {
        let mut cmd = TestCmd { size: 72, op: 12, id: self.id(&["ioas_id"]), ..TestCmd::default() };
        cmd.set_args(&test::MockDomain { dev_flags: self.bytes.of(&[4, 0, 1]), ..test::MockDomain::default() });
        let at = self.put(cmd.as_bytes());
        if self.call(io(0xa0), at) {
            self.learn_device(at);
        }
    }

    fn learn_device(&mut self, at: u64) {
        let cmd: TestCmd = self.processes[self.turn].get(at);
        if matches!(cmd.op, 2 | 12) {
            let args: test::MockDomain = cmd.args();
            self.learn("stdev_id", args.out_stdev_id);
            self.learn("dev_id", args.out_idev_id);
            self.learn("hwpt_id", args.out_hwpt_id);
        }
    }

    fn read(&mut self) {
        let (process, fd) = (self.process(), self.fd());
        let (count, at) = (self.bytes.of(&[40usize, 8, 12, 80, 400, 0, 7]), self.bytes.one_in(16).then_some(8));
        if let Ok(file) = self.processes[process].opened(fd) {
            if let Ok(data) = file.read(&self.processes[process], count, at) {
                assert!(data.len() <= count, "read gives more than was asked for");
            }
            file.ready().map(|ready| ready.get());
        }
    }

    fn write(&mut self) {
        let (process, fd) = (self.process(), self.fd());
        let words: [u32; 4] = std::array::from_fn(|_| self.bytes.below(4) as u32);
        let (count, at) = (self.bytes.of(&[8usize, 16, 0, 7]), self.bytes.one_in(16).then_some(8));
        if let Ok(file) = self.processes[process].opened(fd)
            && let Ok(taken) = file.write(&self.processes[process], &words.as_bytes()[..count], at)
        {
            assert!(taken <= count, "write takes more than was given");
        }
    }

    fn map_a_file(&mut self) {
        let (process, fd) = (self.process(), self.fd());
        let wanted = Mmap {
            len: self.bytes.of(&[PAGE, 2 * PAGE, 100, 0]),
            prot: self.bytes.of(&[3, 1, 7]),
            flags: self.bytes.of(&[1, 2, 3]),
            offset: self.bytes.of(&[PAGE, 2 * PAGE, 0, 100, u64::MAX]),
        };
        let local = &self.processes[process];
        if let Ok(file) = local.opened(fd)
            && let Ok(at) = local.mmap(&*file, &wanted)
            && self.bytes.byte() & 1 == 1
        {
            local.munmap(at).unwrap();
        }
    }

    fn close(&mut self) {
        let (process, fd) = (self.process(), self.fd());
        let _ = self.processes[process].close(fd);
    }

    /// Somebody punches a hole into the file, or fills it again.
    fn punch(&mut self) {
        let Ok(found) = self.processes[0].file_memory(self.files[0], 0, PAGE) else { return };
        let first = self.bytes.below(MEMORY_PAGES);
        let len = 1 + self.bytes.below(MEMORY_PAGES - first);
        if found.backing.kind() != Kind::Memfd || first + len > found.backing.pages().len() {
            return;
        }
        let Ok(pages) = found.backing.pages_at(first * PAGE, len * PAGE) else { return };
        if self.bytes.byte() & 1 == 0 {
            let _ = found.backing.punch(pages);
        } else {
            let _ = found.backing.populate(pages, PageState::Shared);
        }
    }

    /// Another descriptor of another memfd, shorter or longer than what it will be mapped as.
    fn truncate(&mut self) {
        let memfd = memfd_create("other", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&memfd, self.bytes.of(&[4 * PAGE, 0, 100, 64 * PAGE])).unwrap();
        let short = memfd.try_clone().unwrap();
        if let Ok(fd) = self.processes[0].give(memfd) {
            let ioas = self.bytes.below(4) as u32;
            let arg = lockstep_iommufd::uapi::IoasMapFile { size: 40, flags: 6, ioas_id: ioas, fd, length: 4 * PAGE, ..Default::default() };
            let at = self.put(arg.as_bytes());
            self.call(io(0x8f), at);
            let _ = self.processes[0].close(fd);
            ftruncate(&short, self.bytes.of(&[0, PAGE])).unwrap();
        }
    }

    /// Memory appears where there was none, or the other way round.
    fn come_and_go(&mut self) {
        let process = self.process();
        let local = &self.processes[process];
        if self.bytes.byte() & 1 == 0 {
            let _ = local.add_at(&self.fleeting, FLEETING, Touch::WhileShown);
        } else {
            let _ = local.hide(FLEETING + self.bytes.below(8) * PAGE, PAGE);
        }
    }

    fn fork_or_exit(&mut self) {
        let process = self.process();
        if self.processes.len() < 4 && self.bytes.byte() & 1 == 0 {
            let child = self.processes[process].fork();
            if self.bytes.byte() & 1 == 0 {
                let limit = self.bytes.below(16) * PAGE;
                child.set_process(|process| (process.uid, process.ipc_lock, process.memlock_bytes) = (1000, false, limit));
            }
            self.processes.push(child);
        } else if process > 0 {
            self.processes.swap_remove(process).exit();
        }
    }

    fn another_number(&mut self) {
        let (process, fd) = (self.process(), self.fd());
        let _ = self.processes[process].dup(fd);
    }

    fn garbage(&mut self) {
        let command = if self.bytes.byte() & 1 == 0 { io(self.bytes.byte().into()) } else { self.bytes.word() as u32 };
        let arg = self.address();
        self.call(command, arg);
    }

    /// Everything that is open agrees with its page tables.
    fn audit(&self) {
        let local = Local::new();
        for context in self.contexts.iter().filter_map(Weak::upgrade) {
            for ioas_id in 1..40 {
                let text = local.put(&[0u8; 4096]);
                let mut audit = IoasAudit { size: 56, ioas_id, data_uptr: text, data_len: 4096, ..IoasAudit::default() };
                if local.ioctl(&*context, io(0xe2), &mut audit).is_ok() && audit.out_differences > 0 {
                    let mut words = vec![0; audit.data_len.min(4096) as usize];
                    local.read(text, &mut words).unwrap();
                    panic!("IOAS {ioas_id} differs from its page tables: {}", String::from_utf8_lossy(&words));
                }
            }
        }
    }

    /// Closes everything. Answers how many calls there were.
    fn finish(self) -> usize {
        let Self { host, processes, contexts, memory, va, done, .. } = self;
        processes.iter().for_each(Local::exit);
        assert_eq!(host.accounts().pinned(), 0, "pages stay pinned when everything is closed");
        assert!(contexts.iter().all(|context| context.upgrade().is_none()), "a context is kept by something that is closed");
        // As the kernel's test does: a fresh open finds no pins.
        let (fresh, local) = (host.open(), Local::new());
        let mut cmd = TestCmd { size: 72, op: 4, ..TestCmd::default() };
        cmd.set_args(&test::CheckRefs { length: MEMORY_PAGES * PAGE, uptr: va, refs: 0, pad: 0 });
        drop(processes);
        local.add(&memory).unwrap();
        local.ioctl(&*fresh, io(0xa0), &mut cmd).unwrap();
        drop(fresh);
        assert_eq!(host.iommu().arena().tables_in_use(), 0, "page tables are left");
        done
    }
}

// The structures that are filled by name are all there are.
const _: () = assert!(TestCmd::SIZE == 72);
