//! What serving threads share: the tables, and what happens between calls.

use crate::clients::{self, Clients, Process, Thread, lock};
use crate::directories::Directories;
use crate::files::{Files, Inode, What};
use crate::shared_files::SharedFiles;
use crate::sys::{Limit, Listener};
use crate::watch::{Token, Watch};
use crate::{Namespace, Observer};
use backing::Backing;
use iommufd::File;
use rustix::io::Errno;
use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock};

/// One program's server.
pub(crate) struct Server {
    pub(crate) listener: Listener,
    pub(crate) namespace: Namespace,
    pub(crate) observer: Arc<dyn Observer>,
    /// Numbers of our descriptors begin here.
    pub(crate) base: u32,
    /// Calls that we have received are not interrupted.
    pub(crate) killable_only: bool,
    pub(crate) watch: Watch,
    pub(crate) files: Files,
    pub(crate) clients: Clients,
    pub(crate) shared_files: SharedFiles,
    pub(crate) directories: Directories,
    /// Held while news are worked off, so that a call begins only when all of those before it are.
    draining: Mutex<Vec<Token>>,
    warned: Mutex<HashSet<String>>,
    user_namespace: OnceLock<Option<Inode>>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("files", &self.files).finish_non_exhaustive()
    }
}

/// Descriptor numbers looked at for a free one, at most.
const MOST_NUMBERS: u64 = 1 << 16;

impl Server {
    pub(crate) fn new(
        listener: Listener,
        namespace: Namespace,
        observer: Arc<dyn Observer>,
        base: u32,
        killable_only: bool,
    ) -> Result<Self, Errno> {
        let watch = Watch::new()?;
        Ok(Self {
            listener,
            namespace,
            observer,
            base,
            killable_only,
            files: Files::new(&watch)?,
            watch,
            clients: Clients::default(),
            shared_files: SharedFiles::default(),
            directories: Directories::default(),
            draining: Mutex::default(),
            warned: Mutex::default(),
            user_namespace: OnceLock::new(),
        })
    }

    /// Says something once.
    pub(crate) fn warn(&self, words: &str) {
        if lock(&self.warned).insert(words.to_owned()) {
            self.observer.warning(words);
        }
    }

    /// Works off what happened since the last time: files that nobody has any more, processes that have ended.
    pub(crate) fn drain(&self) {
        let mut tokens = lock(&self.draining);
        loop {
            self.watch.look(&mut tokens);
            if tokens.is_empty() {
                return;
            }
            for token in tokens.drain(..) {
                let released = |file: &dyn File| self.observer.closed(file);
                match token {
                    Token::Inotify => self.files.drain_inotify(released),
                    Token::Event(number) => self.files.drain_event(number, released),
                    Token::Thread(tid) => self.clients.thread_ended(tid),
                    Token::Process(pid) => {
                        if let Some(process) = self.clients.process_ended(pid) {
                            self.process_ended(&process);
                        }
                    }
                }
            }
        }
    }

    fn process_ended(&self, process: &Process) {
        for memory in lock(&process.guest_memory).drain(..) {
            if !self.clients.has_owner(&memory)
                && let Some(backing) = memory.upgrade()
            {
                backing.close();
            }
        }
        self.observer.process_ended(process.pid);
    }

    /// The process answers for this guest memory: when it is gone, the memory is let go.
    pub(crate) fn keep_guest_memory(&self, process: &Process, backing: &Arc<Backing>) {
        let memory = Arc::downgrade(backing);
        let mut kept = lock(&process.guest_memory);
        kept.retain(|kept| kept.strong_count() != 0);
        if !kept.iter().any(|kept| kept.ptr_eq(&memory)) {
            kept.push(memory);
        }
    }

    /// The thread that waits in the call.
    pub(crate) fn thread(&self, call: u64, tid: i32) -> Result<Arc<Thread>, Errno> {
        self.clients.thread(tid, &self.watch, || self.listener.is_waiting(call), |pid| self.observer.process_started(pid))
    }

    /// The client's descriptor, and what it stands for when it is ours.
    ///
    /// # Errors
    /// The thread is gone, there is no such descriptor, or there are too few of our own.
    pub(crate) fn look_up(&self, call: u64, tid: i32, fd: i32) -> Result<Option<(Arc<Thread>, OwnedFd, What)>, Errno> {
        let known = self.clients.known_thread(tid).map(|thread| (thread.fetch(fd), thread));
        let (fetched, thread) = match known {
            Some((fetched, thread)) if !matches!(fetched, Err(Errno::SRCH)) => (fetched, thread),
            // Not known, or another one by now.
            _ => {
                let thread = self.thread(call, tid)?;
                (thread.fetch(fd), thread)
            }
        };
        match fetched {
            Ok(file) => {
                let entry = self.files.find(Inode::of(&file)?);
                Ok(entry.map(|entry| (thread, file, entry.what.clone())))
            }
            Err(errno) => {
                if errno == Errno::PERM {
                    self.warn(
                        "descriptors of a client cannot be looked at (it is another user's, or not dumpable): \
                         what it does with ours is not served",
                    );
                }
                Err(errno)
            }
        }
    }

    /// A free descriptor number of the client at or above the base and `least`. It is the caller's until taken out of
    /// [`Process::promised`].
    pub(crate) fn promise_number(&self, thread: &Thread, least: u32) -> Result<u32, Errno> {
        let limit = clients::soft_limit(thread.tid, Limit::Files)?;
        let first = self.base.max(least);
        let end = u32::try_from(limit.min(u64::from(first) + MOST_NUMBERS)).unwrap_or(0);
        // Low ones first; a process with very many goes on where the last one was found.
        let near = first.saturating_add(32).min(end);
        let hint = thread.process.next_number.load(Ordering::Relaxed).clamp(near, end.max(near));
        let mut promised = lock(&thread.process.promised);
        for number in (first..near).chain(hint..end).chain(near..hint.min(end)) {
            if promised.contains(&number) {
                continue;
            }
            match thread.fetch(number.cast_signed()) {
                Ok(_) => {}
                Err(Errno::BADF) => {
                    promised.insert(number);
                    thread.process.next_number.store(number + 1, Ordering::Relaxed);
                    return Ok(number);
                }
                Err(errno) => return Err(errno),
            }
        }
        Err(Errno::MFILE)
    }

    /// Whether the client's limit of open files leaves no number at or above the base.
    pub(crate) fn has_no_high_numbers(&self, thread: &Thread) -> bool {
        clients::soft_limit(thread.tid, Limit::Files).is_ok_and(|limit| limit <= u64::from(self.base))
    }

    /// Gives the client a descriptor at a promised number.
    pub(crate) fn keep_promise(
        &self,
        call: u64,
        thread: &Thread,
        number: u32,
        file: &OwnedFd,
        cloexec: bool,
        answer: bool,
    ) -> Result<i32, Errno> {
        let given = self.listener.give(call, std::os::fd::AsFd::as_fd(file), Some(number), cloexec, answer);
        lock(&thread.process.promised).remove(&number);
        // The limit was lowered in between.
        given.map_err(|errno| if errno == Errno::BADF { Errno::MFILE } else { errno })
    }

    /// Whether a client is in our user namespace.
    pub(crate) fn is_own_user_namespace(&self, tid: i32) -> bool {
        let namespace = |of: &str| Some(Inode::from(rustix::fs::stat(format!("/proc/{of}/ns/user")).ok()?));
        *self.user_namespace.get_or_init(|| namespace("self")) == namespace(&tid.to_string())
    }
}
