//! `lockstep iommufd -- PROGRAM`: runs a program that finds /dev/iommu, and on request VFIO devices, on a machine that has neither.

use crate::args::IommufdArgs;
use interpose::{Charged, Knob, Namespace, Node, Program, RemoteCaller};
use iommufd::watch::{FailRule, Options, Watcher};
use iommufd::{Answer, File, Host, HostConfig, Knobs, Refusal};
use rustix::io::Errno;
use std::process::ExitCode;
use std::sync::Arc;
use vfio::{Entry, Fleet};

/// Of /dev/iommu as a device: misc, and a minor that the kernel hands out at will.
const IOMMU_NUMBERS: (u32, u32) = (10, 127);

/// The status of a launcher that could not run the program, as `env` and shells have it.
const CANNOT_RUN: u8 = 125;

pub(crate) fn main(args: &IommufdArgs) -> ExitCode {
    match run(args) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lockstep iommufd: {error}");
            ExitCode::from(CANNOT_RUN)
        }
    }
}

fn run(args: &IommufdArgs) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let [name, arguments @ ..] = &*args.program else { return Err("no program was given".into()) };
    let watcher = watcher(args)?;
    let config = HostConfig {
        policy: args.policy,
        test_ops: args.test_devices,
        observer: watcher.clone().map(|watcher| watcher as _),
        ..HostConfig::default()
    };
    let host = Host::new(config)?;
    watcher.iter().for_each(|watcher| watcher.watch(&host));
    let fleet = Arc::new(Fleet::new(args.devices, &host));
    let namespace = namespace(&host, &fleet);
    let program = Program { name: name.clone(), arguments: arguments.to_vec() };
    let events: Arc<dyn interpose::Observer> = Arc::new(Events(watcher.clone()));
    // Who looks for a VFIO device looks into sysfs first; who opens /dev/iommu mostly just opens it.
    let options = interpose::Options { gives_up_stdio: true, serves_looks: !fleet.is_empty(), ..Default::default() };
    let status = interpose::run(&program, namespace, &options, events)?;
    watcher.iter().for_each(|watcher| watcher.finish());
    Ok(ExitCode::from(u8::try_from(status.code()).unwrap_or(u8::MAX)))
}

fn watcher(args: &IommufdArgs) -> Result<Option<Arc<Watcher>>, Box<dyn std::error::Error>> {
    let fail: Vec<FailRule> = args.fail.iter().map(|rule| rule.parse()).collect::<Result<_, _>>()?;
    let output = args.output.as_deref().map(Options::output_file).transpose()?;
    let (trace, explain, summary, json) = (args.trace, args.explain, args.summary, args.json);
    let options = Options { trace, explain, summary, json, fail, output };
    let names = iommufd::TABLE.iter().map(|entry| entry.name).chain(vfio::TABLE.iter().map(|entry| entry.name));
    options.check_names(names)?;
    Ok((!options.is_idle()).then(|| options.watcher()))
}

/// Every path that the program finds changed.
fn namespace(host: &Arc<Host>, fleet: &Arc<Fleet>) -> Namespace {
    let mut namespace = Namespace::new();
    let own = Arc::clone(host);
    namespace.add("/dev/iommu", Node::file(move |_, _| Ok(own.open() as Arc<dyn File>))).number("/dev/iommu", IOMMU_NUMBERS);
    let own = Arc::clone(host);
    namespace.add_status(move |space| {
        let (pinned, locked) = own.accounts().of_space(space);
        Charged { pinned_kib: pinned * 4, locked_kib: locked * 4 }
    });
    for (index, path) in (0..).zip(fleet.paths()) {
        let own = Arc::clone(fleet);
        namespace.add(&path, Node::file(move |_, _| own.open(index))).number(&path, (vfio::MAJOR, index));
    }
    if !fleet.is_empty() {
        for (path, entry) in fleet.entries() {
            let node = match entry {
                Entry::Text(text) => Node::text(text),
                Entry::Link(target) => Node::link(target),
                Entry::Dir => Node::Directory,
                bytes => Node::file(move |_, _| bytes.open().ok_or_else(|| Refusal::of(Errno::NOENT, "there is no such file"))),
            };
            namespace.add(&path, node);
        }
    }
    if host.config().test_ops {
        namespace.add(Knobs::DIRECTORY, Node::Directory);
        for path in Knobs::paths() {
            namespace.add(&format!("{}/{path}", Knobs::DIRECTORY), Node::knob(Arc::new(Tunable { host: Arc::clone(host), path })));
        }
        for path in Knobs::FAIL_NTH {
            let own = Arc::clone(host);
            let open = move |_: &RemoteCaller, opening: &interpose::Opening| {
                let thread = opening.path.rsplit('/').nth(1).and_then(|name| name.parse().ok()).unwrap_or(0);
                Ok(Arc::new(FailNth { host: Arc::clone(&own), thread }) as Arc<dyn Knob>)
            };
            namespace.add(path, Node::Knob(Arc::new(open)));
        }
    }
    namespace
}

/// A file of the kernel's fault injection.
struct Tunable {
    host: Arc<Host>,
    path: &'static str,
}

impl Knob for Tunable {
    fn read(&self, _: &RemoteCaller) -> Answer<String> {
        Ok(self.host.knobs().read(self.path).unwrap_or_default())
    }

    fn write(&self, _: &RemoteCaller, text: &[u8]) -> Answer {
        self.host.knobs().write(self.path, text)
    }
}

/// A thread's `fail-nth`.
struct FailNth {
    host: Arc<Host>,
    thread: i32,
}

impl Knob for FailNth {
    fn read(&self, _: &RemoteCaller) -> Answer<String> {
        Ok(self.host.knobs().fail_nth(self.thread))
    }

    fn write(&self, _: &RemoteCaller, text: &[u8]) -> Answer {
        self.host.knobs().set_fail_nth(self.thread, text)
    }
}

/// Hands what the front tells to whoever watches.
struct Events(Option<Arc<Watcher>>);

impl interpose::Observer for Events {
    fn process_started(&self, pid: i32) {
        self.0.iter().for_each(|watcher| watcher.process_started(pid));
    }

    fn process_ended(&self, pid: i32) {
        self.0.iter().for_each(|watcher| watcher.process_ended(pid));
    }

    fn opened(&self, pid: i32, fd: i32, path: Option<&str>, file: &dyn File) {
        self.0.iter().for_each(|watcher| watcher.opened(pid, fd, path, file.kind()));
    }

    fn closed(&self, file: &dyn File) {
        self.0.iter().for_each(|watcher| watcher.closed(file.kind()));
    }

    fn revoked(&self, pid: i32, offset: u64, len: u64) {
        self.0.iter().for_each(|watcher| watcher.revoked(pid, offset, len));
    }

    fn warning(&self, words: &str) {
        match &self.0 {
            Some(watcher) => watcher.warning(words),
            None => eprintln!("lockstep iommufd: {words}"),
        }
    }
}
