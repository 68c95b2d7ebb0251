//! What a watcher prints, line by line, and the failures that it makes.

use backing::{Backing, Frames, UserRegion};
use iommufd::uapi::{self, Struct, io};
use iommufd::watch::{Options, Output};
use iommufd::{Caller, Context, Host, HostConfig, Local, Touch};
use lockstep_iommufd as iommufd;
use rustix::io::Errno;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};

/// What was written, and how often.
#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<String>>>);

impl Sink {
    fn output(&self) -> Option<Output> {
        Some(Box::new(self.clone()))
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().push(String::from_utf8(bytes.to_vec()).unwrap());
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Bench {
    sink: Sink,
    local: Local,
    context: Arc<Context>,
    watcher: Arc<iommufd::watch::Watcher>,
}

impl Bench {
    fn new(options: Options) -> Self {
        let sink = Sink::default();
        let watcher = Options { output: sink.output(), ..options }.watcher();
        let host = Host::new(HostConfig { observer: Some(Arc::clone(&watcher) as _), ..HostConfig::default() }).unwrap();
        watcher.watch(&host);
        let local = Local::new();
        let memory = Backing::user(UserRegion::new(16 << 12).unwrap(), Frames::Contiguous).unwrap();
        local.add_at(&memory, 0x40_0000, Touch::Always).unwrap();
        Self { sink, local, context: host.open(), watcher }
    }

    fn call<S: Struct>(&self, nr: u32, mut arg: S) -> Result<S, Errno> {
        self.local.ioctl(&*self.context, io(nr), &mut arg).map(|_| arg).map_err(|refusal| refusal.errno)
    }

    fn ioas(&self) -> u32 {
        self.call(0x81, uapi::IoasAlloc { size: 12, ..Default::default() }).unwrap().out_ioas_id
    }

    fn map(&self, ioas_id: u32, flags: u32, iova: u64, length: u64) -> Result<u64, Errno> {
        let arg = uapi::IoasMap { size: 40, flags, ioas_id, user_va: 0x40_0000, length, iova, ..Default::default() };
        self.call(0x85, arg).map(|arg| arg.iova)
    }

    fn lines(&self) -> String {
        let lines = self.sink.take();
        assert!(lines.iter().all(|line| line.ends_with('\n')), "a line is one write: {lines:?}");
        lines.concat()
    }
}

#[test]
fn a_trace_shows_structures_and_answers() {
    let bench = Bench::new(Options { trace: true, ..Options::default() });
    let ioas = bench.ioas();
    bench.map(ioas, 7, 0x10000, 0x2000).unwrap();
    bench.map(ioas, 6, 0, 0x1000).unwrap();
    bench.map(ioas, 7, 0x11000, 0x1000).unwrap_err();
    bench.map(ioas, 0x47, 0x11000, 0x1000).unwrap_err();
    let unmap = |iova, length| bench.call(0x86, uapi::IoasUnmap { size: 24, ioas_id: ioas, iova, length });
    unmap(0x10000, 0x1000).unwrap_err();
    unmap(0, u64::MAX).unwrap();
    bench.local.call(&*bench.context, io(0x65), 3).unwrap();
    bench.local.call(&*bench.context, io(0xfe), 0x7f00_0000).unwrap_err();
    bench.local.call(&*bench.context, io(0x81), 0x7f00_0000).unwrap_err();
    let expected = "\
IOMMU_IOAS_ALLOC({flags=0x0, out_ioas_id=0} => {out_ioas_id=1}) = 0
IOMMU_IOAS_MAP({flags=FIXED_IOVA|WRITEABLE|READABLE, ioas_id=1, user_va=0x400000, length=0x2000, iova=0x10000}) = 0
IOMMU_IOAS_MAP({flags=WRITEABLE|READABLE, ioas_id=1, user_va=0x400000, length=0x1000, iova=0x0} => {iova=0x1000}) = 0
IOMMU_IOAS_MAP({flags=FIXED_IOVA|WRITEABLE|READABLE, ioas_id=1, user_va=0x400000, length=0x1000, iova=0x11000}) = -1 EEXIST (IOVA 0x11000..=0x11fff meets the area at IOVA 0x10000..=0x11fff; unmap that first, or choose another place)
IOMMU_IOAS_MAP({flags=FIXED_IOVA|WRITEABLE|READABLE|0x40, ioas_id=1, user_va=0x400000, length=0x1000, iova=0x11000}) = -1 EOPNOTSUPP (a flag is set that this version does not know: 0x40)
IOMMU_IOAS_UNMAP({ioas_id=1, iova=0x10000, length=0x1000}) = -1 ENOENT (unmapping IOVA 0x10000..=0x10fff would cut the area at IOVA 0x10000..=0x11fff; unmap whole areas)
IOMMU_IOAS_UNMAP({ioas_id=1, iova=0x0, length=0xffffffffffffffff} => {length=0x3000}) = 0
VFIO_CHECK_EXTENSION(3) = 1
ioctl 0x3bfe(0x7f000000) = -1 ENOTTY (/dev/iommu has no ioctl 0x3bfe)
IOMMU_IOAS_ALLOC(0x7f000000) = -1 EFAULT (there is no memory at 0x7f000000, or not for this access)
";
    pretty(&bench.lines(), expected);
}

/// Line by line, so that a difference is readable.
fn pretty(lines: &str, expected: &str) {
    for (line, wanted) in lines.lines().zip(expected.lines()) {
        assert_eq!(line, wanted);
    }
    assert_eq!(lines.lines().count(), expected.lines().count(), "{lines}");
}

#[test]
fn lists_that_structures_point_to_are_shown() {
    let bench = Bench::new(Options { trace: true, ..Options::default() });
    let ioas = bench.ioas();
    bench.lines();
    let list = bench.local.put(&[0u64, 0xffff, 0x20000, 0x2ffff]);
    let allow = uapi::IoasAllowIovas { size: 24, ioas_id: ioas, num_iovas: 2, allowed_iovas: list, ..Default::default() };
    bench.call(0x82, allow).unwrap();
    let ranges = uapi::IoasIovaRanges { size: 32, ioas_id: ioas, num_iovas: 4, allowed_iovas: list, ..Default::default() };
    bench.call(0x84, ranges).unwrap();
    let expected = format!(
        "IOMMU_IOAS_ALLOW_IOVAS({{ioas_id=1, num_iovas=2, allowed_iovas={list:#x}}} [0x0..=0xffff, 0x20000..=0x2ffff]) = 0\n\
         IOMMU_IOAS_IOVA_RANGES({{ioas_id=1, num_iovas=4, allowed_iovas={list:#x}, out_iova_alignment=0x0}} => \
         {{num_iovas=1, out_iova_alignment=0x1}} [0x0..=0xffffffffffffffff]) = 0\n"
    );
    pretty(&bench.lines(), &expected);
}

#[test]
fn explain_prints_refusals_only() {
    let bench = Bench::new(Options { explain: true, ..Options::default() });
    let ioas = bench.ioas();
    bench.map(ioas, 7, 0x10000, 0x2000).unwrap();
    bench.map(77, 7, 0x10000, 0x2000).unwrap_err();
    let expected = "IOMMU_IOAS_MAP({flags=FIXED_IOVA|WRITEABLE|READABLE, ioas_id=77, user_va=0x400000, length=0x2000, iova=0x10000}) = \
                    -1 ENOENT (there is no IOAS with id 77; has it been destroyed?)\n";
    pretty(&bench.lines(), expected);
}

/// The words name what is in the way: a reserved range, the type of a file, the kind of an object.
#[test]
fn words_name_what_is_in_the_way() {
    let bench = Bench::new(Options { explain: true, ..Options::default() });
    let ioas = bench.ioas();
    let object = bench.context.ioas(ioas).unwrap();
    object.ioas().attach(&bench.context.host().iommu().domain().unwrap()).unwrap();
    object.ioas().reserve(addr::Span::of(addr::Iova::new(0xfee0_0000), addr::Iova::new(0xfeef_ffff))).unwrap();
    assert_eq!(bench.map(ioas, 7, 0xfee0_0000, 0x1000), Err(Errno::INVAL));
    let (pipe, _other) = rustix::pipe::pipe().unwrap();
    let fd = bench.local.give(pipe).unwrap();
    let arg = uapi::IoasMapFile { size: 40, flags: 6, ioas_id: ioas, fd, length: 0x1000, ..Default::default() };
    assert_eq!(bench.call(0x8f, arg).map(|arg| arg.iova), Err(Errno::INVAL));
    assert_eq!(bench.map(ioas, 7, 0x10000, 0x11000), Err(Errno::FAULT));
    let fault = bench.call(0x8e, uapi::FaultAlloc { size: 16, ..Default::default() }).unwrap().out_fault_id;
    assert_eq!(bench.map(fault, 7, 0x10000, 0x1000), Err(Errno::NOENT));
    assert_eq!(
        bench.call(0x87, uapi::Option { size: 24, option_id: 1, object_id: ioas, val64: 2, ..Default::default() }).map(|_| ()),
        Err(Errno::INVAL)
    );
    let words: Vec<_> = bench.lines().lines().map(|line| line.split_once("= -1 ").unwrap().1.to_owned()).collect();
    let expected = [
        "EINVAL (IOVA 0xfee00000..=0xfee00fff meets the reserved range IOVA 0xfee00000..=0xfeefffff; choose another place)",
        "EINVAL (page 0x0..=0x0 belong to a pipe, which is no memory; give a memfd, a guest_memfd, a tmpfs or a hugetlbfs file)",
        "EFAULT (page 0x10 cannot be touched: nothing is mapped there, or not for this access)",
        "ENOENT (object 2 is another kind of object than IOAS: fault queue)",
        "EINVAL (2 is neither 0 nor 1)",
    ];
    assert_eq!(words, expected);
}

#[test]
fn a_size_that_is_not_the_known_one_is_shown() {
    let bench = Bench::new(Options { trace: true, ..Options::default() });
    let mut bytes = [0u8; 40];
    bytes[0] = 40;
    bytes[24] = 9;
    let at = bench.local.put(&bytes);
    bench.local.call(&*bench.context, io(0x81), at).unwrap_err();
    bytes[24] = 0;
    let other = bench.local.put(&bytes);
    bench.local.call(&*bench.context, io(0x81), other).unwrap();
    let expected = format!(
        "IOMMU_IOAS_ALLOC({at:#x}) = -1 E2BIG (the structure of IOMMU_IOAS_ALLOC has bytes set that this version does not know)\n\
         IOMMU_IOAS_ALLOC({{size=40, flags=0x0, out_ioas_id=0}} => {{out_ioas_id=1}}) = 0\n"
    );
    pretty(&bench.lines(), &expected);
}

#[test]
fn an_injected_error_has_no_effect_and_hits_once() {
    let fail = ["IOMMU_IOAS_ALLOC:2=EIO", "ioas_map:1=ENOMEM"].map(|rule| rule.parse().unwrap()).into();
    let bench = Bench::new(Options { fail, explain: true, ..Options::default() });
    assert_eq!(bench.ioas(), 1);
    assert_eq!(bench.call(0x81, uapi::IoasAlloc { size: 12, ..Default::default() }), Err(Errno::IO));
    assert_eq!(bench.ioas(), 2);
    assert_eq!(bench.map(1, 7, 0x1000, 0x1000), Err(Errno::NOMEM));
    assert_eq!(bench.map(1, 7, 0x1000, 0x1000), Ok(0x1000));
    assert!(bench.lines().contains("-1 EIO (this failure was asked for)"));
}

#[test]
fn json_lines_carry_the_same() {
    let bench = Bench::new(Options { trace: true, json: true, ..Options::default() });
    let ioas = bench.ioas();
    bench.map(ioas, 7, 0x10000, 0x2000).unwrap();
    bench.map(ioas, 7, 0x10000, 0x2000).unwrap_err();
    bench.watcher.opened(12, 1000, Some("/dev/iommu"), "iommufd");
    let lines: Vec<serde_json::Value> = bench.lines().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(
        (&lines[0]["name"], &lines[0]["changed"]["out_ioas_id"], &lines[0]["answer"]),
        (&"IOMMU_IOAS_ALLOC".into(), &1.into(), &0.into())
    );
    assert_eq!((&lines[1]["given"]["flags"], &lines[1]["given"]["size"]), (&7.into(), &40.into()));
    assert_eq!(lines[2]["errno"], "EEXIST");
    assert!(lines[2]["why"].as_str().unwrap().contains("0x10000..=0x11fff"));
    assert!(lines[2]["nanoseconds"].is_u64() && lines[2].get("answer").is_none());
    assert_eq!((&lines[3]["event"], &lines[3]["fd"], &lines[3]["path"]), (&"open".into(), &1000.into(), &"/dev/iommu".into()));
}

#[test]
fn a_summary_counts() {
    for json in [false, true] {
        let bench = Bench::new(Options { summary: true, json, ..Options::default() });
        let ioas = bench.ioas();
        let domain = bench.context.host().iommu().domain().unwrap();
        bench.context.ioas(ioas).unwrap().ioas().attach(&domain).unwrap();
        bench.map(ioas, 7, 0x10000, 0x3000).unwrap();
        bench.map(ioas, 7, 0x10000, 0x3000).unwrap_err();
        bench.map(ioas, 7, 0, 0x1800).unwrap_err();
        let unmap = uapi::IoasUnmap { size: 24, ioas_id: ioas, iova: 0, length: u64::MAX };
        assert_eq!(bench.call(0x86, unmap).unwrap().length, 0x3000);
        bench.watcher.revoked(7, 0, 0x2000);
        assert_eq!(bench.lines(), "");
        bench.watcher.finish();
        let text = bench.lines();
        if json {
            let all: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert_eq!(all["calls"]["IOMMU_IOAS_MAP"]["errors"], serde_json::json!({ "EEXIST": 1, "EINVAL": 1 }));
            assert_eq!((&all["pages_mapped"], &all["pages_unmapped"], &all["most_pages_pinned"]), (&3.into(), &3.into(), &3.into()));
            assert_eq!((&all["pages_pinned"], &all["pages_revoked"]), (&0.into(), &2.into()));
        } else {
            let map = text.lines().find(|line| line.contains("IOMMU_IOAS_MAP")).unwrap();
            assert!(map.split_whitespace().take(2).eq(["3", "2"]) && map.ends_with("IOMMU_IOAS_MAP: EEXIST 1, EINVAL 1"), "{map}");
            assert!(
                text.contains("pages: 3 mapped, 3 unmapped by calls\npinned: at most 3 pages after a call, 0 now\nDMA faults: none\n"),
                "{text}"
            );
            assert!(text.ends_with("revocations: 1 (2 pages)\n"), "{text}");
        }
    }
}

#[test]
fn events_of_the_front_are_lines_too() {
    let bench = Bench::new(Options { trace: true, ..Options::default() });
    bench.watcher.process_started(12);
    bench.watcher.opened(12, 1000, Some("/dev/iommu"), "iommufd");
    bench.watcher.opened(12, 1001, None, "fault queue");
    bench.watcher.revoked(12, 0x1000, 0x2000);
    bench.watcher.closed("fault queue");
    bench.watcher.process_ended(12);
    bench.watcher.warning("no CAP_SYS_PTRACE: memory of other users' processes is out of reach");
    let expected = "\
[pid 12] is here
[pid 12] open(\"/dev/iommu\") = 1000 (iommufd)
[pid 12] was given descriptor 1001 (fault queue)
[pid 12] took 0x2000 bytes from 0x1000 on out of a file that is mapped for devices
the last descriptor of an open fault queue is closed
[pid 12] is gone
lockstep: no CAP_SYS_PTRACE: memory of other users' processes is out of reach
";
    pretty(&bench.lines(), expected);
}

/// Whoever calls through a front is named.
#[test]
fn threads_of_other_processes_are_named() {
    #[derive(Debug)]
    struct Remote(Local);
    impl Caller for Remote {
        fn read(&self, at: u64, into: &mut [u8]) -> iommufd::Answer {
            self.0.read(at, into)
        }
        fn write(&self, at: u64, from: &[u8]) -> iommufd::Answer {
            self.0.write(at, from)
        }
        fn process(&self) -> iommufd::Answer<iommufd::Process> {
            self.0.process()
        }
        fn memory(&self, va: u64, len: u64) -> iommufd::Answer<iommufd::Memory> {
            self.0.memory(va, len)
        }
        fn file_memory(&self, fd: i32, start: u64, len: u64) -> iommufd::Answer<iommufd::Memory> {
            self.0.file_memory(fd, start, len)
        }
        fn file(&self, fd: i32) -> iommufd::Answer<iommufd::Opened> {
            self.0.file(fd)
        }
        fn install(&self, file: Arc<dyn iommufd::File>) -> iommufd::Answer<i32> {
            self.0.install(file)
        }
        fn shared(&self) -> iommufd::Answer<std::os::fd::OwnedFd> {
            self.0.shared()
        }
        fn is_mapped(&self, _: u64, _: u64) -> bool {
            false
        }
        fn page_name(&self, va: u64) -> iommufd::Answer<backing::PageName> {
            self.0.page_name(va)
        }
        fn ids(&self) -> Option<(i32, i32)> {
            Some((40, 41))
        }
        fn as_any(&self) -> &dyn std::any::Any {
            self
        }
    }
    let bench = Bench::new(Options { trace: true, ..Options::default() });
    let remote = Remote(Local::new());
    iommufd::File::ioctl(&*bench.context, &remote, io(0x64), 0).unwrap();
    pretty(&bench.lines(), "[pid 40 thread 41] VFIO_GET_API_VERSION(0) = 0\n");
}
