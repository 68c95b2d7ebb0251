//! Files of ours, as clients hold them: which descriptor stands for which file, and when the last one is gone.
//!
//! A descriptor's identity is the inode behind it, which stays what it is over dup, fork, exec and a socket. Two kinds:
//!
//! - Most are a memfd each. This process keeps neither a descriptor nor a mapping of it, so that the kernel drops the inode with the client's
//!   last descriptor and mapping, which inotify tells.
//! - Files that are polled are a pipe each, open for both directions. The client has the only reader; this process has a writer, which
//!   learns when that is gone. One byte lies in the pipe while there is something to read, so poll is the kernel's own.
//!
//! Knobs are memfds too. They may end up at low numbers (a shell does that), where writes are not held up: so this process looks into them.

use crate::clients::lock;
use crate::watch::{Token, Watch};
use crate::{Knob, RemoteCaller};
use iommufd::{File, Ready};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::fs::{MemfdFlags, Mode, OFlags, Stat};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use std::collections::HashMap;
use std::fmt;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// Names an inode of this system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Inode {
    pub(crate) device: u64,
    pub(crate) number: u64,
}

impl Inode {
    pub(crate) fn of(fd: impl AsFd) -> Result<Self, Errno> {
        Ok(rustix::fs::fstat(fd)?.into())
    }
}

impl From<Stat> for Inode {
    fn from(stat: Stat) -> Self {
        Self { device: stat.st_dev, number: stat.st_ino }
    }
}

/// A file that clients have open.
pub(crate) struct Entry {
    pub(crate) inode: Inode,
    pub(crate) what: What,
    /// Its numbers as a device.
    pub(crate) device: (u32, u32),
    released: AtomicBool,
}

/// What stands behind the descriptors.
#[derive(Clone)]
pub(crate) enum What {
    File(Arc<dyn File>),
    Knob(Arc<OpenedKnob>),
}

/// A knob that a client has open.
pub(crate) struct OpenedKnob {
    pub(crate) knob: Arc<dyn Knob>,
    /// The memory behind it, to see what was written where writes are not held up.
    memory: OwnedFd,
    /// Who opened it.
    caller: RemoteCaller,
    /// Writes are held up no more.
    low: AtomicBool,
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.what {
            What::File(file) => write!(f, "{:?} {file:?}", self.inode),
            What::Knob(_) => write!(f, "{:?} knob", self.inode),
        }
    }
}

/// All files that clients have open.
#[derive(Debug)]
pub(crate) struct Files {
    entries: RwLock<HashMap<Inode, Arc<Entry>>>,
    inotify: OwnedFd,
    watches: Mutex<HashMap<i32, Inode>>,
    pipes: Mutex<HashMap<u32, (Inode, Arc<OwnedFd>)>>,
    next_pipe: AtomicU32,
}

impl Files {
    pub(crate) fn new(watch: &Watch) -> Result<Self, Errno> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        watch.add(inotify.as_fd(), Token::Inotify)?;
        Ok(Self { entries: RwLock::default(), inotify, watches: Mutex::default(), pipes: Mutex::default(), next_pipe: AtomicU32::new(0) })
    }

    /// What the descriptor stands for, if it is ours.
    pub(crate) fn find(&self, inode: Inode) -> Option<Arc<Entry>> {
        self.entries.read().unwrap_or_else(PoisonError::into_inner).get(&inode).cloned()
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.entries.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// A descriptor for a client, open as `flags` say. The caller must close its copy; when nobody else has one then, the file is released.
    pub(crate) fn make(&self, file: Arc<dyn File>, flags: i32, device: (u32, u32), watch: &Watch) -> Result<OwnedFd, Errno> {
        if file.ready().is_some() {
            return self.make_pipe(file, watch);
        }
        let memory = new_memfd(file.kind())?;
        let inode = Inode::of(&memory)?;
        let opened = if flags & (libc::O_ACCMODE | libc::O_APPEND | libc::O_NONBLOCK) == libc::O_RDWR {
            None
        } else {
            Some(reopen(memory.as_fd(), flags)?)
        };
        // The watch comes last: from then on the end of the inode is the end of the file.
        self.insert(Entry { inode, what: What::File(file), device, released: AtomicBool::new(false) });
        let watched = inotify::add_watch(&self.inotify, own_path(memory.as_fd()), WatchFlags::DELETE_SELF);
        self.watched(watched, inode)?;
        Ok(opened.unwrap_or(memory))
    }

    fn make_pipe(&self, file: Arc<dyn File>, watch: &Watch) -> Result<OwnedFd, Errno> {
        let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let opened = reopen(reader.as_fd(), libc::O_RDWR)?;
        drop(reader);
        let (inode, writer) = (Inode::of(&opened)?, Arc::new(writer));
        let number = self.next_pipe.fetch_add(1, Ordering::Relaxed);
        watch.add(writer.as_fd(), Token::Event(number))?;
        if let Some(ready) = file.ready() {
            connect(ready, &writer);
        }
        lock(&self.pipes).insert(number, (inode, writer));
        self.insert(Entry { inode, what: What::File(file), device: (0, 0), released: AtomicBool::new(false) });
        Ok(opened)
    }

    /// A descriptor of a knob for a client, with its text in it.
    pub(crate) fn make_knob(&self, knob: Arc<dyn Knob>, caller: RemoteCaller, text: &str, flags: i32) -> Result<OwnedFd, Errno> {
        let made = new_memfd("knob")?;
        rustix::io::write(&made, text.as_bytes())?;
        let inode = Inode::of(&made)?;
        let opened = reopen(made.as_fd(), flags)?;
        // Open for reading only, and apart from the client's, whose end is then an event of its own.
        let memory = reopen(made.as_fd(), libc::O_RDONLY)?;
        drop(made);
        let watched = inotify::add_watch(
            &self.inotify,
            own_path(memory.as_fd()),
            WatchFlags::MODIFY | WatchFlags::CLOSE_WRITE | WatchFlags::CLOSE_NOWRITE,
        );
        let what = What::Knob(Arc::new(OpenedKnob { knob, memory, caller, low: AtomicBool::new(false) }));
        self.insert(Entry { inode, what, device: (0, 0), released: AtomicBool::new(false) });
        self.watched(watched, inode)?;
        Ok(opened)
    }

    fn insert(&self, entry: Entry) {
        self.entries.write().unwrap_or_else(PoisonError::into_inner).insert(entry.inode, Arc::new(entry));
    }

    fn watched(&self, watched: Result<i32, Errno>, inode: Inode) -> Result<(), Errno> {
        match watched {
            Ok(watch) => {
                lock(&self.watches).insert(watch, inode);
                Ok(())
            }
            Err(errno) => {
                self.entries.write().unwrap_or_else(PoisonError::into_inner).remove(&inode);
                Err(errno)
            }
        }
    }

    /// The watch has news of files in memory: releases those that are closed.
    pub(crate) fn drain_inotify(&self, mut released: impl FnMut(&dyn File)) {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.inotify, &mut buffer);
        while let Ok(event) = reader.next() {
            if event.events().contains(ReadFlags::QUEUE_OVERFLOW) {
                self.recount(&mut released);
                continue;
            }
            let inode = lock(&self.watches).get(&event.wd()).copied();
            let Some(inode) = inode else { continue };
            let Some(entry) = self.find(inode) else { continue };
            match &entry.what {
                What::Knob(knob) if event.events().contains(ReadFlags::MODIFY) => knob.take_over(),
                What::Knob(_) if event.events().intersects(ReadFlags::CLOSE_WRITE | ReadFlags::CLOSE_NOWRITE) => {
                    let _ = inotify::remove_watch(&self.inotify, event.wd());
                    lock(&self.watches).remove(&event.wd());
                    self.release(inode, &mut released);
                }
                What::Knob(_) => {}
                What::File(_) => {
                    if event.events().intersects(ReadFlags::DELETE_SELF | ReadFlags::IGNORED) {
                        lock(&self.watches).remove(&event.wd());
                        self.release(inode, &mut released);
                    }
                }
            }
        }
    }

    /// Events were lost, because more came than the kernel keeps: its list of living watches tells what is closed.
    fn recount(&self, released: &mut impl FnMut(&dyn File)) {
        let Ok(text) = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", self.inotify.as_raw_fd())) else { return };
        let number = |line: &str| i64::from_str_radix(line.strip_prefix("inotify wd:")?.split(' ').next()?, 16).ok();
        let alive: std::collections::HashSet<i64> = text.lines().filter_map(number).collect();
        let mut gone = Vec::new();
        lock(&self.watches).retain(|&watch, &mut inode| {
            let keep = alive.contains(&watch.into());
            if !keep {
                gone.push(inode);
            }
            keep
        });
        gone.into_iter().for_each(|inode| self.release(inode, &mut *released));
    }

    /// The watch has news of a pipe: its reader is gone.
    pub(crate) fn drain_event(&self, number: u32, mut released: impl FnMut(&dyn File)) {
        let mut pipes = lock(&self.pipes);
        // What was told may have been a reader of our own that came and went.
        let gone = pipes.get(&number).is_some_and(|(_, writer)| has_no_reader(writer.as_fd()));
        let removed = if gone { pipes.remove(&number) } else { None };
        drop(pipes);
        if let Some((inode, _)) = removed {
            self.release(inode, &mut released);
        }
    }

    fn release(&self, inode: Inode, released: &mut impl FnMut(&dyn File)) {
        let entry = self.entries.write().unwrap_or_else(PoisonError::into_inner).remove(&inode);
        let Some(entry) = entry.filter(|entry| !entry.released.swap(true, Ordering::AcqRel)) else { return };
        if let What::File(file) = &entry.what {
            file.released();
            released(&**file);
        }
    }

    /// No client is left: whatever is still open, in hands that we do not know, is released.
    pub(crate) fn release_all(&self, mut released: impl FnMut(&dyn File)) {
        let inodes: Vec<Inode> = self.entries.read().unwrap_or_else(PoisonError::into_inner).keys().copied().collect();
        inodes.into_iter().for_each(|inode| self.release(inode, &mut released));
    }
}

impl OpenedKnob {
    /// From now on somebody may write without our being asked.
    pub(crate) fn goes_low(&self) {
        self.low.store(true, Ordering::Relaxed);
    }

    /// What was written behind our back is the knob's new value.
    fn take_over(&self) {
        let mut text = [0u8; 256];
        if self.low.load(Ordering::Relaxed)
            && let Ok(count) = rustix::io::pread(&self.memory, &mut text, 0)
            && count != 0
        {
            // Nobody waits for an answer.
            let _ = self.knob.write(&self.caller, &text[..count]);
        }
    }
}

/// Has one byte lie in the pipe while there is something to read.
fn connect(ready: &Ready, writer: &Arc<OwnedFd>) {
    let writer = Arc::downgrade(writer);
    ready.connect(move |readable| {
        let Some(writer) = writer.upgrade() else { return };
        if readable {
            let _ = rustix::io::write(&writer, &[1]);
        } else if !has_no_reader(writer.as_fd())
            && let Ok(reader) = reopen(writer.as_fd(), libc::O_RDONLY | libc::O_NONBLOCK)
        {
            while rustix::io::read(&reader, &mut [0u8; 16]).is_ok_and(|count| count != 0) {}
        }
    });
}

fn has_no_reader(writer: BorrowedFd<'_>) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut polled = [PollFd::from_borrowed_fd(writer, PollFlags::empty())];
    poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok() && polled[0].revents().contains(PollFlags::ERR)
}

/// A new file in memory. It cannot be executed, where the kernel knows how to say that.
pub(crate) fn new_memfd(name: &str) -> Result<OwnedFd, Errno> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    rustix::fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL).or_else(|_| rustix::fs::memfd_create(name, flags))
}

/// Opens the inode behind a descriptor once more, in another mode.
pub(crate) fn reopen(fd: BorrowedFd<'_>, flags: i32) -> Result<OwnedFd, Errno> {
    const KEPT: i32 = libc::O_ACCMODE | libc::O_APPEND | libc::O_NONBLOCK;
    let flags = OFlags::from_bits_retain((flags & KEPT | libc::O_CLOEXEC).cast_unsigned());
    rustix::fs::open(own_path(fd), flags, Mode::empty())
}

fn own_path(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}
