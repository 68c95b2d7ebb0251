//! The file that these tests serve: each ioctl shows one thing that a handler can do.

use backing::{Backing, PageName, PageState};
use iommufd::{Answer, Caller, File, Mmap, Opened, Ready, Refusal};
use lockstep_interpose::{Knob, Namespace, Node, RemoteCaller};
use rustix::io::Errno;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// Adds one to a word.
pub(crate) const ADD: u32 = 0x3b80;
/// Makes an event file; its number goes into the word.
pub(crate) const EVENT: u32 = 0x3b81;
/// Promises an event file and fails.
pub(crate) const FAIL: u32 = 0x3b82;
/// Sums bytes: address, length, sum.
pub(crate) const SUM: u32 = 0x3b83;
/// Sums bytes of a file: descriptor, offset, length, sum.
pub(crate) const SUM_FILE: u32 = 0x3b84;
/// Writes a byte at offset 4096 of the memory behind the descriptor.
pub(crate) const SHARE: u32 = 0x3b85;
/// Whether that page is mapped.
pub(crate) const MAPPED: u32 = 0x3b86;
/// Names the page at an address: address, kind, hash.
pub(crate) const NAME: u32 = 0x3b87;
/// Takes so many milliseconds.
pub(crate) const SLEEP: u32 = 0x3b88;
/// How many files are open, how many were ever, and how often one was released.
pub(crate) const COUNTS: u32 = 0x3b89;
/// The process: space, user, whether it may lock memory, limit.
pub(crate) const PROCESS: u32 = 0x3b8a;
/// Makes the event files readable (1) or not (0).
pub(crate) const READY: u32 = 0x3b8b;
/// Pins memory and keeps it: address, length.
pub(crate) const KEEP: u32 = 0x3b8c;
/// Adds one to a byte of what is kept: offset, old value.
pub(crate) const BUMP: u32 = 0x3b8d;
/// Whether a descriptor is ours.
pub(crate) const OURS: u32 = 0x3b8e;
/// The state of a page of what is kept: page, state.
pub(crate) const STATE: u32 = 0x3b8f;
/// A handler's bug.
pub(crate) const PANIC: u32 = 0x3b90;
/// Pins a file's memory and keeps it: descriptor, offset, length.
pub(crate) const KEEP_FILE: u32 = 0x3b91;
/// Gives up what is kept.
pub(crate) const DROP: u32 = 0x3b92;

#[derive(Debug, Default)]
pub(crate) struct World {
    made: AtomicUsize,
    released: AtomicUsize,
    events: Mutex<Vec<Arc<Event>>>,
    kept: Mutex<Option<(Arc<Backing>, u64)>>,
    knob: Mutex<String>,
}

impl World {
    fn counts(&self) -> (usize, usize) {
        (self.made.load(Ordering::SeqCst), self.released.load(Ordering::SeqCst))
    }

    /// What the launcher reports at the end.
    pub(crate) fn report(&self) -> String {
        let (made, released) = self.counts();
        format!("made {made} released {released}")
    }
}

#[derive(Debug)]
struct Echo {
    world: Arc<World>,
    content: Mutex<Vec<u8>>,
}

#[derive(Debug)]
struct Event {
    world: Arc<World>,
    ready: Ready,
}

impl File for Event {
    fn kind(&self) -> &'static str {
        "event"
    }
    fn read(&self, _: &dyn Caller, count: usize, _: Option<u64>) -> Answer<Vec<u8>> {
        if !count.is_multiple_of(4) {
            return Err(Refusal::of(Errno::SPIPE, "not whole"));
        }
        if !self.ready.get() {
            return Ok(Vec::new());
        }
        self.ready.set(false);
        Ok(b"news"[..count.min(4)].to_vec())
    }
    fn write(&self, _: &dyn Caller, data: &[u8], _: Option<u64>) -> Answer<usize> {
        self.ready.set(true);
        Ok(data.len())
    }
    fn ready(&self) -> Option<&Ready> {
        Some(&self.ready)
    }
    fn released(&self) {
        self.world.released.fetch_add(1, Ordering::SeqCst);
        self.world.events.lock().unwrap().retain(|event| !std::ptr::eq(&**event, self));
    }
}

fn words<const N: usize>(caller: &dyn Caller, at: u64) -> Answer<[u64; N]> {
    let mut words = [0; N];
    for (index, word) in words.iter_mut().enumerate() {
        let mut bytes = [0; 8];
        caller.read(at + 8 * index as u64, &mut bytes)?;
        *word = u64::from_ne_bytes(bytes);
    }
    Ok(words)
}

fn put(caller: &dyn Caller, at: u64, index: u64, word: u64) -> Answer<i64> {
    caller.write(at + 8 * index, &word.to_ne_bytes())?;
    Ok(0)
}

/// The sum of bytes that are pinned for it.
fn sum(backing: &Backing, offset: u64, len: u64) -> Answer<u64> {
    let pages = backing.pages_at(offset & !4095, (offset % 4096 + len).next_multiple_of(4096))?;
    backing.pin(pages, true).map_err(|why| Refusal::new(Errno::FAULT, why.to_string()))?;
    let mut sum = 0;
    let mut at = offset;
    while at < offset + len {
        let mut bytes = [0; 4096];
        let part = &mut bytes[..(4096 - at % 4096).min(offset + len - at) as usize];
        copy(backing, at, part, false)?;
        sum += part.iter().map(|byte| u64::from(*byte)).sum::<u64>();
        at += part.len() as u64;
    }
    backing.unpin(pages);
    Ok(sum)
}

/// Reads, or writes back, bytes within one page.
fn copy(backing: &Backing, at: u64, bytes: &mut [u8], back: bool) -> Answer {
    let gone = |fault| Refusal::new(Errno::IO, format!("{fault}"));
    let page = addr::Page::new(at >> 12);
    let oa = addr::Address::plus(backing.oa(page), at % 4096);
    match (backing.host(oa, bytes.len() as u64), backing.owner()) {
        (Some(host), _) => if back { host.write(0, bytes) } else { host.read(0, bytes) }.map_err(gone),
        (None, Some(owner)) => if back { owner.write(at, bytes) } else { owner.read(at, bytes) }.map_err(gone),
        (None, None) => Err(Refusal::of(Errno::IO, "nowhere")),
    }
}

impl Echo {
    fn event(&self) -> Arc<Event> {
        self.world.made.fetch_add(1, Ordering::SeqCst);
        let event = Arc::new(Event { world: Arc::clone(&self.world), ready: Ready::default() });
        self.world.events.lock().unwrap().push(Arc::clone(&event));
        event
    }

    fn keep(&self, backing: Arc<Backing>, offset: u64, len: u64) -> Answer<i64> {
        let pages = backing.pages_at(offset & !4095, (offset % 4096 + len).next_multiple_of(4096))?;
        backing.pin(pages, true).map_err(|why| Refusal::new(Errno::FAULT, why.to_string()))?;
        *self.world.kept.lock().unwrap() = Some((backing, offset));
        Ok(0)
    }
}

impl File for Echo {
    fn kind(&self) -> &'static str {
        "echo"
    }

    fn ioctl(&self, caller: &dyn Caller, command: u32, arg: u64) -> Answer<i64> {
        let kept = || self.world.kept.lock().unwrap().clone().ok_or(Refusal::of(Errno::NOENT, "nothing kept"));
        match command {
            ADD => {
                let [value] = words(caller, arg)?;
                put(caller, arg, 0, value.wrapping_add(1))
            }
            EVENT | FAIL => {
                let event = self.event();
                let file: Arc<dyn File> = Arc::<Event>::clone(&event);
                let mut answer = caller.install(file).and_then(|number| put(caller, arg, 0, number as u64));
                if command == FAIL {
                    answer = Err(Refusal::of(Errno::DOM, "as asked"));
                }
                // What is not installed is the handler's to clean up.
                answer.inspect_err(|_| event.released())
            }
            SUM => {
                let [va, len] = words(caller, arg)?;
                let memory = caller.memory(va, len)?;
                put(caller, arg, 2, sum(&memory.backing, memory.offset, len)?)
            }
            SUM_FILE => {
                let [fd, start, len] = words(caller, arg)?;
                let memory = caller.file_memory(fd as i32, start, len)?;
                put(caller, arg, 3, sum(&memory.backing, memory.offset, len)?)
            }
            SHARE => {
                let memory = caller.shared()?;
                rustix::fs::ftruncate(&memory, 8192).map_err(|errno| Refusal::of(errno, "ftruncate"))?;
                rustix::io::pwrite(&memory, &[arg as u8], 4096).map_err(|errno| Refusal::of(errno, "pwrite"))?;
                Ok(0)
            }
            MAPPED => Ok(caller.is_mapped(4096, 4096).into()),
            NAME => {
                let [va] = words(caller, arg)?;
                let name = caller.page_name(va)?;
                let mut hasher = DefaultHasher::new();
                name.hash(&mut hasher);
                put(caller, arg, 1, matches!(name, PageName::File { .. }).into())?;
                put(caller, arg, 2, hasher.finish())
            }
            SLEEP => {
                std::thread::sleep(std::time::Duration::from_millis(arg));
                Ok(0)
            }
            COUNTS => {
                let (made, released) = self.world.counts();
                put(caller, arg, 0, (made - released) as u64)?;
                put(caller, arg, 1, made as u64)?;
                put(caller, arg, 2, released as u64)
            }
            PROCESS => {
                let process = caller.process()?;
                put(caller, arg, 0, process.space.0)?;
                put(caller, arg, 1, process.uid.into())?;
                put(caller, arg, 2, process.ipc_lock.into())?;
                put(caller, arg, 3, process.memlock_bytes)
            }
            READY => {
                let events = self.world.events.lock().unwrap().clone();
                events.iter().for_each(|event| event.ready.set(arg != 0));
                Ok(0)
            }
            KEEP => {
                let [va, len] = words(caller, arg)?;
                let memory = caller.memory(va, len)?;
                self.keep(memory.backing, memory.offset, len)
            }
            KEEP_FILE => {
                let [fd, start, len] = words(caller, arg)?;
                let memory = caller.file_memory(fd as i32, start, len)?;
                self.keep(memory.backing, memory.offset, len)
            }
            BUMP => {
                let [offset] = words(caller, arg)?;
                let (backing, first) = kept()?;
                let mut byte = [0];
                copy(&backing, first + offset, &mut byte, false)?;
                put(caller, arg, 1, byte[0].into())?;
                byte[0] = byte[0].wrapping_add(1);
                copy(&backing, first + offset, &mut byte, true)?;
                Ok(0)
            }
            STATE => {
                let [page] = words(caller, arg)?;
                let (backing, first) = kept()?;
                let state = backing.state(addr::Page::new((first >> 12) + page));
                put(caller, arg, 1, (state == PageState::Absent).into())
            }
            DROP => {
                *self.world.kept.lock().unwrap() = None;
                Ok(0)
            }
            OURS => Ok(matches!(caller.file(arg as i32)?, Opened::Ours(_)).into()),
            PANIC => panic!("as asked"),
            _ => Err(Refusal::of(Errno::NOTTY, "no such ioctl")),
        }
    }

    fn read(&self, _: &dyn Caller, count: usize, at: Option<u64>) -> Answer<Vec<u8>> {
        let content = self.content.lock().unwrap();
        let from = (at.unwrap_or(0) as usize).min(content.len());
        Ok(content[from..content.len().min(from.saturating_add(count))].to_vec())
    }

    fn write(&self, _: &dyn Caller, data: &[u8], at: Option<u64>) -> Answer<usize> {
        let mut content = self.content.lock().unwrap();
        let at = at.unwrap_or(0) as usize;
        let len = content.len().max(at + data.len());
        content.resize(len, 0);
        content[at..at + data.len()].copy_from_slice(data);
        Ok(data.len())
    }

    fn mmap(&self, _: &dyn Caller, wanted: &Mmap) -> Answer {
        if wanted.offset == 4096 && wanted.len == 4096 { Ok(()) } else { Err(Refusal::of(Errno::NXIO, "not this part")) }
    }

    fn released(&self) {
        self.world.released.fetch_add(1, Ordering::SeqCst);
    }
}

struct Held(Arc<World>);

impl Knob for Held {
    fn read(&self, _: &RemoteCaller) -> Answer<String> {
        Ok(self.0.knob.lock().unwrap().clone())
    }
    fn write(&self, _: &RemoteCaller, text: &[u8]) -> Answer {
        let text = std::str::from_utf8(text).map_err(|_| Refusal::of(Errno::INVAL, "no text"))?;
        let value: u32 = text.trim().parse().map_err(|_| Refusal::of(Errno::INVAL, "no number"))?;
        *self.0.knob.lock().unwrap() = format!("{value}\n");
        Ok(())
    }
}

/// What clients find.
pub(crate) fn namespace(world: &Arc<World>) -> Namespace {
    let mut namespace = Namespace::new();
    let at = Arc::clone(world);
    let open = Node::file(move |_, _| {
        at.made.fetch_add(1, Ordering::SeqCst);
        Ok(Arc::new(Echo { world: Arc::clone(&at), content: Mutex::default() }) as Arc<dyn File>)
    });
    *world.knob.lock().unwrap() = "0\n".into();
    namespace.add("/dev/echo", open.clone()).add("/dev/echo-dir/devices/echo0", open);
    namespace.add("/dev/refused", Node::file(|_, _| Err(Refusal::of(Errno::BUSY, "never"))));
    namespace.add("/dev/echo-dir/class/first", Node::link("../devices/echo0"));
    namespace.add("/dev/echo-dir/name", Node::text("the name\n"));
    namespace.add("/proc/*/task/*/fail-nth", Node::knob(Arc::new(Held(Arc::clone(world)))));
    namespace.add("/dev/echo-dir/knob", Node::knob(Arc::new(Held(Arc::clone(world)))));
    namespace.add("/sys/kernel/echo", Node::Directory).add("/sys/kernel", Node::Directory);
    namespace.number("/dev/echo", (511, 7)).number("/dev/echo-dir/devices/echo0", (511, 8));
    namespace.add_status(|_| lockstep_interpose::Charged { pinned_kib: 128, locked_kib: 4 });
    namespace
}
