//! The threads and processes that make calls, each by a pidfd, which never means another process later. Everything kept by number
//! here is checked against its pidfd when it is used.

use crate::space::Space;
use crate::sys::{self, Limit};
use crate::watch::{Token, Watch};
use backing::Backing;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use std::collections::{BTreeSet, HashMap};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// A lock whose holder may have panicked: what it protects is whole at any time.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A thread of a client.
#[derive(Debug)]
pub(crate) struct Thread {
    pub(crate) tid: i32,
    pidfd: OwnedFd,
    pub(crate) process: Arc<Process>,
}

/// A process of a client.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    pidfd: OwnedFd,
    space: Mutex<Option<Arc<Space>>>,
    /// Numbers promised by calls in progress.
    pub(crate) promised: Mutex<BTreeSet<u32>>,
    /// Behind the last number that was promised.
    pub(crate) next_number: AtomicU32,
    /// Guest memory that it named: let go when its last owner is gone.
    pub(crate) guest_memory: Mutex<Vec<Weak<Backing>>>,
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct Clients {
    threads: Mutex<HashMap<i32, Arc<Thread>>>,
    processes: Mutex<HashMap<i32, Arc<Process>>>,
}

/// Threads remembered at most; what is forgotten is looked up again.
const MOST_THREADS: usize = 4096;

impl Clients {
    /// The thread as it was known last: it may have ended, which [`Thread::fetch`] tells.
    pub(crate) fn known_thread(&self, tid: i32) -> Option<Arc<Thread>> {
        lock(&self.threads).get(&tid).cloned()
    }

    /// The thread that waits in a call now, which `still_waits` tells. `is_new` is told when its process is seen for the first time.
    pub(crate) fn thread(
        &self,
        tid: i32,
        watch: &Watch,
        still_waits: impl FnOnce() -> bool,
        is_new: impl FnOnce(i32),
    ) -> Result<Arc<Thread>, Errno> {
        if let Some(known) = lock(&self.threads).get(&tid).filter(|known| !has_ended(known.pidfd.as_fd())) {
            return Ok(Arc::clone(known));
        }
        let pidfd = open_thread(tid)?;
        // Otherwise the number may mean another thread already.
        if !still_waits() {
            return Err(Errno::SRCH);
        }
        let tgid = sys::pidfd_info(pidfd.as_fd()).map(|info| info.tgid).or_else(|| status_number(tid, "Tgid:"));
        let process = self.process(tgid.ok_or(Errno::SRCH)?, watch, is_new)?;
        let thread = Arc::new(Thread { tid, pidfd, process });
        let mut threads = lock(&self.threads);
        if threads.len() >= MOST_THREADS {
            threads.clear();
        }
        // Without a watch it stays until its process ends.
        let _ = watch.add(thread.pidfd.as_fd(), Token::Thread(tid));
        threads.insert(tid, Arc::clone(&thread));
        Ok(thread)
    }

    fn process(&self, pid: i32, watch: &Watch, is_new: impl FnOnce(i32)) -> Result<Arc<Process>, Errno> {
        let mut processes = lock(&self.processes);
        if let Some(known) = processes.get(&pid).filter(|known| !has_ended(known.pidfd.as_fd())) {
            return Ok(Arc::clone(known));
        }
        let pidfd = pidfd_open(Pid::from_raw(pid).ok_or(Errno::SRCH)?, PidfdFlags::empty())?;
        let process = Arc::new(Process {
            pid,
            pidfd,
            space: Mutex::default(),
            promised: Mutex::default(),
            next_number: AtomicU32::new(0),
            guest_memory: Mutex::default(),
        });
        watch.add(process.pidfd.as_fd(), Token::Process(pid))?;
        processes.insert(pid, Arc::clone(&process));
        drop(processes);
        is_new(pid);
        Ok(process)
    }

    /// The watch says that a thread has ended.
    pub(crate) fn thread_ended(&self, tid: i32) {
        let mut threads = lock(&self.threads);
        if threads.get(&tid).is_some_and(|thread| has_ended(thread.pidfd.as_fd())) {
            threads.remove(&tid);
        }
    }

    /// The watch says that a process has ended; answers it when that is so.
    pub(crate) fn process_ended(&self, pid: i32) -> Option<Arc<Process>> {
        let mut processes = lock(&self.processes);
        processes.get(&pid).filter(|process| has_ended(process.pidfd.as_fd()))?;
        let process = processes.remove(&pid);
        drop(processes);
        lock(&self.threads).retain(|_, thread| thread.process.pid != pid);
        process
    }

    /// Whether another living process named this guest memory, too.
    pub(crate) fn has_owner(&self, memory: &Weak<Backing>) -> bool {
        let processes = lock(&self.processes);
        processes.values().any(|process| lock(&process.guest_memory).iter().any(|other| other.ptr_eq(memory)))
    }

    /// How many processes are known and alive.
    pub(crate) fn processes(&self) -> usize {
        lock(&self.processes).len()
    }

    /// The process of this number, when it is a client.
    pub(crate) fn known(&self, pid: i32) -> Option<Arc<Process>> {
        lock(&self.processes).get(&pid).filter(|process| !has_ended(process.pidfd.as_fd())).cloned()
    }

    /// The address space that a process has now. Processes that share one, as after vfork, have the same.
    pub(crate) fn space(&self, process: &Process) -> Result<Arc<Space>, Errno> {
        let mut place = lock(&process.space);
        if let Some(space) = place.as_ref()
            && space.is_alive()
            && (space.pid == process.pid || sys::same_space(process.pid, space.pid))
        {
            return Ok(Arc::clone(space));
        }
        let others: Vec<Arc<Process>> = lock(&self.processes).values().filter(|other| !std::ptr::eq(&***other, process)).cloned().collect();
        // Nobody waits for two of these locks: a space that somebody else is just looking for cannot be shared with a child of vfork,
        // whose parent stands still.
        let shared = others.iter().filter_map(|other| other.space.try_lock().ok()?.clone());
        let shared = shared.into_iter().find(|space| sys::same_space(process.pid, space.pid) && space.is_alive());
        let space = match shared {
            Some(space) => space,
            None => Arc::new(Space::of(process.pid)?),
        };
        *place = Some(Arc::clone(&space));
        Ok(space)
    }
}

impl Thread {
    /// A descriptor of the thread, as one of ours. `ESRCH` when the thread has ended, so that its number may mean another one now.
    pub(crate) fn fetch(&self, fd: i32) -> Result<OwnedFd, Errno> {
        if fd < 0 {
            return Err(Errno::BADF);
        }
        pidfd_getfd(&self.pidfd, fd, PidfdGetfdFlags::empty())
    }

    /// The real user.
    pub(crate) fn user(&self) -> Result<u32, Errno> {
        let told = sys::pidfd_info(self.pidfd.as_fd()).map(|info| info.ruid);
        told.or_else(|| status_number(self.tid, "Uid:").map(i32::cast_unsigned)).ok_or(Errno::SRCH)
    }
}

/// A pidfd of one thread; of its whole process before Linux 6.9.
fn open_thread(tid: i32) -> Result<OwnedFd, Errno> {
    let thread = PidfdFlags::from_bits_retain(libc::O_EXCL.cast_unsigned());
    match pidfd_open(Pid::from_raw(tid).ok_or(Errno::SRCH)?, thread) {
        Err(Errno::INVAL) => {
            let tgid = status_number(tid, "Tgid:").and_then(Pid::from_raw).ok_or(Errno::SRCH)?;
            pidfd_open(tgid, PidfdFlags::empty())
        }
        opened => opened,
    }
}

/// A soft limit of a thread. What the system call does not tell about another user's process, a file does.
pub(crate) fn soft_limit(tid: i32, limit: Limit) -> Result<u64, Errno> {
    let name = match limit {
        Limit::Files => "Max open files",
        Limit::LockedBytes => "Max locked memory",
    };
    sys::soft_limit(tid, limit).or_else(|_| {
        let text = std::fs::read_to_string(format!("/proc/{tid}/limits")).map_err(|_| Errno::SRCH)?;
        let soft = text.lines().find_map(|line| line.strip_prefix(name)?.split_ascii_whitespace().next());
        match soft.ok_or(Errno::SRCH)? {
            "unlimited" => Ok(u64::MAX),
            number => number.parse().map_err(|_| Errno::SRCH),
        }
    })
}

/// The first number of a line of a thread's status.
fn status_number(tid: i32, name: &str) -> Option<i32> {
    let status = std::fs::read_to_string(format!("/proc/{tid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix(name))?.split_ascii_whitespace().next()?.parse().ok()
}

pub(crate) fn has_ended(pidfd: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::from_borrowed_fd(pidfd, PollFlags::IN)];
    poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|count| count != 0)
}
