//! Runs a program and serves its calls until it, and everything it started, is gone.
//!
//! The calling thread oversees: it sees to signals, to what closes while nobody calls, and to calls that take long.

use crate::crew::Crew;
use crate::launch::{self, Started};
use crate::server::Server;
use crate::sys::{self, Image, Signal, Signals, Step};
use crate::{Error, Namespace, Observer, Program, filter};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Resource, Rlimit, WaitId, WaitIdOptions, getrlimit, pidfd_open, setrlimit, waitid};
use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How to serve.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Descriptors of ours get numbers from here on. When absent: 768, so that select can watch the first ones, or three quarters of
    /// the limit of open files when that is lower.
    pub fd_base: Option<u32>,
    /// Most threads that serve at once; 16 when absent.
    pub threads: Option<usize>,
    /// Hold up stat, access and readlink, too: clients look at paths of ours before they open them. Each such call, whatever its path, then costs
    /// as much as an open.
    pub serves_looks: bool,
    /// Give up this process's standard input and output once the program has them, so that whoever is at their other ends sees when the program
    /// closes them.
    pub gives_up_stdio: bool,
}

/// How the program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It exited with this status.
    Exited(i32),
    /// This signal ended it.
    Signaled(i32),
}

impl Status {
    /// What a shell would report: 128 and the signal's number for one that was killed.
    pub fn code(self) -> i32 {
        match self {
            Self::Exited(code) => code,
            Self::Signaled(signal) => 128 + signal,
        }
    }
}

/// Runs the program, with the paths of `namespace` in its view. Returns when it and all its descendants are gone: they would meet errors
/// with each open if nobody served them any more.
///
/// The program has our standard descriptors, environment, directory, process group and terminal. Signals that a terminal sends reach it
/// without us; those that somebody sends to this process are passed on.
///
/// # Errors
/// When it could not be started.
pub fn run(program: &Program, namespace: Namespace, options: &Options, observer: Arc<dyn Observer>) -> Result<Status, Error> {
    let files = getrlimit(Resource::Nofile);
    let base = base(options, files)?;
    let image = image(program, filter::assemble(base, options.serves_looks))?;
    let (signals, incoming) = Signals::take().map_err(Error::os("signalfd"))?;
    let started = launch::start(&image, &signals).map_err(|(step, errno)| not_started(program, step, errno))?;
    // One descriptor for each thread and process of the clients; a child must not inherit that, so it comes after.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: files.maximum, maximum: files.maximum });
    if options.gives_up_stdio
        && let Ok(null) = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
    {
        let _ = rustix::stdio::dup2_stdin(&null);
        let _ = rustix::stdio::dup2_stdout(&null);
    }
    let root = Root { pid: started.pid, ended: false };
    if started.no_new_privs {
        observer.warning(
            "without CAP_SYS_ADMIN, programs started from here cannot gain privileges (no_new_privs): set-user-ID programs run as you",
        );
    }
    let result = serve(root, started, namespace, options, base, observer, &incoming);
    let _ = setrlimit(Resource::Nofile, files);
    drop(signals);
    result
}

/// The program's process; killed when nobody will serve it.
struct Root {
    pid: i32,
    ended: bool,
}

impl Drop for Root {
    fn drop(&mut self) {
        if !self.ended {
            sys::kill(self.pid, libc::SIGKILL);
        }
    }
}

const LISTENER: u64 = 0;
const SIGNALS: u64 = 1;
const ROOT: u64 = 2;
const NEWS: u64 = 3;
const BELL: u64 = 4;

/// How often the overseer looks after calls that take long, while there are calls.
const TICK: Duration = Duration::from_millis(1);
/// It sleeps after so many ticks without a call.
const QUIET_TICKS: u32 = 20;
/// How long after the last client the kernel may take to close its descriptors.
const CLOSING: Duration = Duration::from_secs(2);

fn serve(
    mut root: Root,
    started: Started,
    namespace: Namespace,
    options: &Options,
    base: u32,
    observer: Arc<dyn Observer>,
    incoming: &OwnedFd,
) -> Result<Status, Error> {
    let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(Error::os("epoll_create1"))?;
    let pid = Pid::from_raw(root.pid).ok_or(Errno::SRCH).map_err(Error::os("fork"))?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(Error::os("pidfd_open"))?;
    let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(Error::os("eventfd"))?;
    // Before Linux 6.6 it is slower.
    let _ = started.listener.wake_on_same_cpu();
    let server = Server::new(started.listener, namespace, Arc::clone(&observer), base, started.killable_only);
    let server = Arc::new(server.map_err(Error::os("inotify_init1"))?);
    let crew = Crew::new(Arc::clone(&server), bell, options.threads.unwrap_or(16));
    let add = |fd: std::os::fd::BorrowedFd<'_>, token, wanted| {
        epoll::add(&epoll, fd, EventData::new_u64(token), wanted).map_err(Error::os("epoll_ctl"))
    };
    // Only its end: calls are the crew's.
    add(server.listener.0.as_fd(), LISTENER, EventFlags::empty())?;
    add(incoming.as_fd(), SIGNALS, EventFlags::IN)?;
    add(pidfd.as_fd(), ROOT, EventFlags::IN)?;
    add(server.watch.0.as_fd(), NEWS, EventFlags::IN)?;
    add(crew.bell().as_fd(), BELL, EventFlags::IN)?;
    crew.relieve();

    let mut status = None;
    let mut all_gone = false;
    // The program has ended and somebody wants us to end, too: what it started is served no more.
    let mut return_early = false;
    let mut before = crew.state();
    let mut quiet = 0;
    while (!all_gone || status.is_none()) && !return_early {
        let sleeps = quiet >= QUIET_TICKS && crew.going_to_sleep(before);
        let timeout = Timespec { tv_sec: 0, tv_nsec: TICK.as_nanos() as i64 };
        let mut events = Vec::with_capacity(8);
        let waited = epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), (!sleeps).then_some(&timeout));
        crew.awake();
        if !matches!(waited, Ok(_) | Err(Errno::INTR)) {
            waited.map_err(Error::os("epoll_wait"))?;
        }
        for event in events.iter().map(|event: &epoll::Event| { event.data }.u64()) {
            match event {
                LISTENER => {
                    all_gone = true;
                    let _ = epoll::delete(&epoll, &server.listener.0);
                }
                SIGNALS if status.is_some() => return_early = true,
                SIGNALS => pass_on(root.pid, incoming),
                ROOT if status.is_none() => {
                    status = ended(pid);
                    root.ended = status.is_some();
                    if root.ended {
                        let _ = epoll::delete(&epoll, &pidfd);
                    }
                }
                NEWS => server.drain(),
                _ => {}
            }
        }
        let now = crew.state();
        if now == before {
            if now.is_serving() {
                crew.relieve();
                before = crew.state();
                quiet = 0;
                continue;
            }
            quiet = quiet.saturating_add(1);
        } else {
            quiet = 0;
        }
        before = now;
    }
    if return_early {
        server.files.release_all(|file| server.observer.closed(file));
        return Ok(status.unwrap_or(Status::Exited(0)));
    }
    crew.end();
    close(&server);
    Ok(status.unwrap_or(Status::Exited(0)))
}

/// The last client is gone, and the kernel is about to close what it had. What is open after that is in the hands of strangers.
fn close(server: &Server) {
    let deadline = Instant::now() + CLOSING;
    loop {
        server.drain();
        // Descriptors are closed before a process has ended.
        if server.files.len() == 0 || server.clients.processes() == 0 || Instant::now() > deadline {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    server.drain();
    server.files.release_all(|file| server.observer.closed(file));
}

/// Collects the program's process.
fn ended(pid: Pid) -> Option<Status> {
    let status = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOHANG).ok()??;
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => Some(Status::Exited(code)),
        (_, Some(signal)) => Some(Status::Signaled(signal)),
        _ => Some(Status::Exited(0)),
    }
}

/// Signals that were meant for the program. What a terminal sends has reached it already, and what somebody of our own process group sends
/// has mostly gone to the whole group.
fn pass_on(root: i32, incoming: &OwnedFd) {
    while let Some(Signal { number, by_process, sender }) = Signals::next(incoming.as_fd()) {
        let same_group = sys::group_of(sender) == sys::group_of(0) && sys::group_of(root) == sys::group_of(0);
        if by_process && !same_group {
            sys::kill(root, number);
        }
    }
}

fn base(options: &Options, files: Rlimit) -> Result<u32, Error> {
    let limit = files.current.unwrap_or(u64::from(u32::MAX >> 1)).min(u64::from(u32::MAX >> 1));
    let base = u64::from(options.fd_base.unwrap_or(768)).min(limit / 4 * 3);
    if limit < 64 { Err(Error::FewFiles { limit }) } else { Ok(base as u32) }
}

/// Everything that the child needs: it can do no more than system calls.
fn image(program: &Program, filter: Vec<sys::Instruction>) -> Result<Image, Error> {
    let c = |text: &OsStr| CString::new(text.as_bytes()).map_err(|_| Error::Nul);
    let name = program.name.as_os_str();
    let paths = if name.as_bytes().contains(&b'/') {
        vec![c(name)?]
    } else {
        let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/bin:/usr/bin".into());
        let folders = std::env::split_paths(&path).map(|folder| if folder == Path::new("") { ".".into() } else { folder });
        folders.map(|folder| c(folder.join(name).as_os_str())).collect::<Result<_, _>>()?
    };
    let arguments = std::iter::once(name).chain(program.arguments.iter().map(AsRef::as_ref)).map(c).collect::<Result<_, _>>()?;
    let pair = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
        CString::new([name.as_bytes(), b"=", value.as_bytes()].concat()).map_err(|_| Error::Nul)
    };
    let environment = std::env::vars_os().map(pair).collect::<Result<_, _>>()?;
    Ok(Image { paths, arguments, environment, filter })
}

fn not_started(program: &Program, step: Step, errno: Errno) -> Error {
    let source = errno.into();
    match step {
        Step::Exec => Error::Exec { program: program.name.clone(), source },
        Step::Filter if errno == Errno::BUSY => Error::NoNotification { what: "another server listens to this process already", source },
        Step::Filter => Error::NoNotification { what: "seccomp with a new listener", source },
        Step::Send => Error::Os { what: "handing the listener over", source },
    }
}
