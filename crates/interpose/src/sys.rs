//! Every unsafe line of this crate: the system calls that neither the standard library nor rustix has, each behind a function that is
//! safe to call with any argument, and the child between fork and exec.
//!
//! Why that holds:
//!
//! 1. The kernel is given addresses of values that live for the call, with their true sizes: plain integers, arrays of them, and `repr(C)`
//!    structures of which every bit pattern is valid.
//! 2. Addresses of *other* processes are numbers to us. The kernel checks them and answers `EFAULT`.
//! 3. The child between fork and exec runs [`child`] alone: system calls on values made before the fork. It takes no lock and allocates
//!    nothing, whatever other threads did when the process was copied.
#![expect(unsafe_code, reason = "seccomp, process_vm_readv, pidfd and /proc ioctls, fork and exec have no safe interface")]

use rustix::io::Errno;
use std::ffi::CString;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

fn check(result: libc::c_long) -> Result<libc::c_long, Errno> {
    if result >= 0 { Ok(result) } else { Err(last_errno()) }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// An ioctl on a structure of the right size for its command.
///
/// # Safety
/// `T` must be what the kernel takes and fills for `command`: plain data of that size, valid whatever is written to it.
unsafe fn ioctl<T>(fd: BorrowedFd<'_>, command: u64, argument: &mut T) -> Result<i64, Errno> {
    // SAFETY: the caller's promise.
    check(unsafe { libc::syscall(libc::SYS_ioctl, fd.as_raw_fd(), command, ptr::from_mut(argument)) })
}

/// A call that a client waits for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Notification {
    pub(crate) id: u64,
    /// The thread, as numbered for us; 0 when we cannot see it.
    pub(crate) tid: i32,
    pub(crate) number: i64,
    pub(crate) args: [u64; 6],
}

/// Where the calls of the clients arrive.
#[derive(Debug)]
pub(crate) struct Listener(pub(crate) OwnedFd);

impl Listener {
    /// Waits for a call. `ENOENT` when there is none any more, or its client is gone already.
    pub(crate) fn receive(&self) -> Result<Notification, Errno> {
        // SAFETY: all zeros is a notification; the kernel asks for zeros.
        let mut raw: libc::seccomp_notif = unsafe { mem::zeroed() };
        // SAFETY: the structure belongs to the command.
        unsafe { ioctl(self.fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &mut raw) }?;
        Ok(Notification { id: raw.id, tid: raw.pid.cast_signed(), number: raw.data.nr.into(), args: raw.data.args })
    }

    /// Answers with a value.
    pub(crate) fn answer(&self, id: u64, value: i64) -> Result<(), Errno> {
        self.send(libc::seccomp_notif_resp { id, val: value, error: 0, flags: 0 })
    }

    /// Answers with an error.
    pub(crate) fn refuse(&self, id: u64, errno: Errno) -> Result<(), Errno> {
        self.send(libc::seccomp_notif_resp { id, val: 0, error: -errno.raw_os_error(), flags: 0 })
    }

    /// Lets the kernel do what the client asked for.
    pub(crate) fn go_on(&self, id: u64) -> Result<(), Errno> {
        self.send(libc::seccomp_notif_resp { id, val: 0, error: 0, flags: libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32 })
    }

    fn send(&self, mut response: libc::seccomp_notif_resp) -> Result<(), Errno> {
        // SAFETY: the structure belongs to the command.
        unsafe { ioctl(self.fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &mut response) }.map(drop)
    }

    /// Whether the client still waits for this call.
    pub(crate) fn is_waiting(&self, mut id: u64) -> bool {
        // SAFETY: the command takes a u64.
        unsafe { ioctl(self.fd(), libc::SECCOMP_IOCTL_NOTIF_ID_VALID, &mut id) }.is_ok()
    }

    /// Gives the client a descriptor: at `number`, in place of what is there, or at its lowest free one. With `answer` that number is also the
    /// answer of its call, in one step.
    pub(crate) fn give(&self, id: u64, file: BorrowedFd<'_>, number: Option<u32>, cloexec: bool, answer: bool) -> Result<i32, Errno> {
        let set = if number.is_some() { libc::SECCOMP_ADDFD_FLAG_SETFD } else { 0 };
        let send = if answer { libc::SECCOMP_ADDFD_FLAG_SEND } else { 0 };
        let mut raw = libc::seccomp_notif_addfd {
            id,
            flags: (set | send) as u32,
            srcfd: file.as_raw_fd().cast_unsigned(),
            newfd: number.unwrap_or(0),
            newfd_flags: if cloexec { libc::O_CLOEXEC as u32 } else { 0 },
        };
        // SAFETY: the structure belongs to the command.
        unsafe { ioctl(self.fd(), libc::SECCOMP_IOCTL_NOTIF_ADDFD, &mut raw) }.map(|number| number as i32)
    }

    /// Asks the kernel to hand over to this thread, and back, on the client's CPU. Linux 6.6.
    pub(crate) fn wake_on_same_cpu(&self) -> Result<(), Errno> {
        const SYNC_WAKE_UP: u64 = 1;
        // SAFETY: this command takes its flags by value.
        check(unsafe { libc::syscall(libc::SYS_ioctl, self.0.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SET_FLAGS, SYNC_WAKE_UP) }).map(drop)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.0)
    }
}

/// Copies from another process; answers how much.
pub(crate) fn read_memory(tid: i32, at: u64, into: &mut [u8]) -> Result<usize, Errno> {
    let local = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let remote = libc::iovec { iov_base: ptr::without_provenance_mut(at as usize), iov_len: into.len() };
    // SAFETY: the local side is `into`; the remote side is the kernel's to check (point 2).
    check(unsafe { libc::process_vm_readv(tid, &local, 1, &remote, 1, 0) } as libc::c_long).map(|count| count as usize)
}

/// Copies to another process; answers how much.
pub(crate) fn write_memory(tid: i32, at: u64, from: &[u8]) -> Result<usize, Errno> {
    let local = libc::iovec { iov_base: from.as_ptr().cast_mut().cast(), iov_len: from.len() };
    let remote = libc::iovec { iov_base: ptr::without_provenance_mut(at as usize), iov_len: from.len() };
    // SAFETY: the local side is only read; the remote side is the kernel's to check (point 2).
    check(unsafe { libc::process_vm_writev(tid, &local, 1, &remote, 1, 0) } as libc::c_long).map(|count| count as usize)
}

/// Touches pages of another process, one byte each, as a read. Answers how many were there, from the first on.
pub(crate) fn touch_memory(tid: i32, pages: impl ExactSizeIterator<Item = u64>) -> usize {
    const MOST: usize = 1024;
    let mut bytes = [0u8; MOST];
    let mut remote = Vec::with_capacity(pages.len().min(MOST));
    let mut touched = 0;
    let mut pages = pages.peekable();
    while pages.peek().is_some() {
        remote.clear();
        remote.extend(pages.by_ref().take(MOST).map(|at| libc::iovec { iov_base: ptr::without_provenance_mut(at as usize), iov_len: 1 }));
        let local = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: remote.len() };
        // SAFETY: as in `read_memory`; the local side has a byte for each place.
        let count = unsafe { libc::process_vm_readv(tid, &local, 1, remote.as_ptr(), remote.len() as libc::c_ulong, 0) };
        touched += count.max(0) as usize;
        if count != remote.len() as isize {
            break;
        }
    }
    touched
}

/// What a pidfd tells about its process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PidInfo {
    pub(crate) tgid: i32,
    pub(crate) ruid: u32,
}

/// Asks a pidfd. Linux 6.13; `None` before.
pub(crate) fn pidfd_info(pidfd: BorrowedFd<'_>) -> Option<PidInfo> {
    #[repr(C)]
    #[derive(Default)]
    struct Raw {
        mask: u64,
        cgroup: u64,
        pid: u32,
        tgid: u32,
        ppid: u32,
        ruid: u32,
        rest: [u32; 8],
    }
    const GET_INFO: u64 = 0xc040_ff0b;
    const _: () = assert!(size_of::<Raw>() == 64);
    let mut raw = Raw { mask: 3, ..Raw::default() };
    // SAFETY: the structure has the size that the command's number says.
    unsafe { ioctl(pidfd, GET_INFO, &mut raw) }.ok()?;
    (raw.mask & 3 == 3).then(|| PidInfo { tgid: raw.tgid.cast_signed(), ruid: raw.ruid })
}

/// One mapping of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Vma {
    pub(crate) start: u64,
    /// First byte behind it.
    pub(crate) end: u64,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    pub(crate) shared: bool,
    /// Byte of the file.
    pub(crate) offset: u64,
    pub(crate) device: u64,
    /// 0 without a file.
    pub(crate) inode: u64,
}

/// The mapping at or behind `at`, by an open `/proc/PID/maps`. Linux 6.11: `ENOTTY` before. `ENOENT` when there is none, `ESRCH` when
/// the address space is gone.
pub(crate) fn procmap_query(maps: BorrowedFd<'_>, at: u64) -> Result<Vma, Errno> {
    #[repr(C)]
    #[derive(Default)]
    struct Raw {
        size: u64,
        query_flags: u64,
        query_addr: u64,
        vma_start: u64,
        vma_end: u64,
        vma_flags: u64,
        vma_page_size: u64,
        vma_offset: u64,
        inode: u64,
        dev_major: u32,
        dev_minor: u32,
        name_size: u32,
        build_id_size: u32,
        name_addr: u64,
        build_id_addr: u64,
    }
    const QUERY: u64 = 0xc068_6611;
    const COVERING_OR_NEXT: u64 = 0x10;
    const _: () = assert!(size_of::<Raw>() == 104);
    let mut raw = Raw { size: 104, query_flags: COVERING_OR_NEXT, query_addr: at, ..Raw::default() };
    // SAFETY: the structure has the size that the command's number says; it names no buffers.
    unsafe { ioctl(maps, QUERY, &mut raw) }?;
    Ok(Vma {
        start: raw.vma_start,
        end: raw.vma_end,
        readable: raw.vma_flags & 1 != 0,
        writable: raw.vma_flags & 2 != 0,
        shared: raw.vma_flags & 8 != 0,
        offset: raw.vma_offset,
        device: rustix::fs::makedev(raw.dev_major, raw.dev_minor),
        inode: raw.inode,
    })
}

/// A thread's effective capabilities, in the user namespace it is in.
pub(crate) fn capabilities(tid: i32) -> Result<u64, Errno> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    let mut header = Header { version: 0x2008_0522, pid: tid };
    let mut data = [[0u32; 3]; 2];
    // SAFETY: version 3 takes this header and two of these structures.
    check(unsafe { libc::syscall(libc::SYS_capget, ptr::from_mut(&mut header), data.as_mut_ptr()) })?;
    Ok(u64::from(data[1][0]) << 32 | u64::from(data[0][0]))
}

/// Whether two threads have one address space.
pub(crate) fn same_space(one: i32, other: i32) -> bool {
    const KCMP_VM: i32 = 1;
    // SAFETY: integers only.
    unsafe { libc::syscall(libc::SYS_kcmp, one, other, KCMP_VM, 0, 0) == 0 }
}

/// Everything signals did before [`Signals::take`].
#[derive(Debug)]
pub(crate) struct Signals {
    before: libc::sigset_t,
}

/// What a sender of a signal looks like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Signal {
    pub(crate) number: i32,
    /// Sent by a process, and not by the kernel or a terminal.
    pub(crate) by_process: bool,
    pub(crate) sender: i32,
}

impl Signals {
    /// Signals that end a program are held back in this thread, and in those it starts, and can be read from the descriptor instead.
    pub(crate) fn take() -> Result<(Self, OwnedFd), Errno> {
        const TAKEN: [i32; 7] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2, libc::SIGWINCH];
        // SAFETY: sigset_t is plain data, filled by sigemptyset; all pointers are to locals.
        unsafe {
            let mut set: libc::sigset_t = mem::zeroed();
            let mut before: libc::sigset_t = mem::zeroed();
            libc::sigemptyset(&mut set);
            for signal in TAKEN {
                libc::sigaddset(&mut set, signal);
            }
            let fd = check(libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK).into())?;
            let fd = OwnedFd::from_raw_fd(fd as RawFd);
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, &mut before);
            Ok((Self { before }, fd))
        }
    }

    /// The next signal that was held back.
    pub(crate) fn next(fd: BorrowedFd<'_>) -> Option<Signal> {
        let mut raw = [0u8; 128];
        let count = rustix::io::read(fd, &mut raw).ok()?;
        let word = |at: usize| Some(i32::from_ne_bytes(raw.get(at..at + 4)?.try_into().ok()?));
        (count == raw.len()).then_some(())?;
        Some(Signal { number: word(0)?, by_process: word(8)? <= 0, sender: word(12)? })
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // SAFETY: the mask was filled by pthread_sigmask.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.before, ptr::null_mut()) };
    }
}

/// Sends a signal to a process.
pub(crate) fn kill(pid: i32, signal: i32) {
    // SAFETY: integers only.
    unsafe { libc::kill(pid, signal) };
}

/// The process group of a process.
pub(crate) fn group_of(pid: i32) -> i32 {
    // SAFETY: integers only.
    unsafe { libc::getpgid(pid) }
}

/// One instruction of a filter.
pub(crate) type Instruction = libc::sock_filter;

/// A program ready to be executed: everything the child needs, made before the fork.
#[derive(Debug)]
pub(crate) struct Image {
    /// Tried in order.
    pub(crate) paths: Vec<CString>,
    pub(crate) arguments: Vec<CString>,
    pub(crate) environment: Vec<CString>,
    pub(crate) filter: Vec<Instruction>,
}

/// What a child reports before it becomes the program. Its last word is the listener, or where it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Filter = 1,
    Send = 2,
    Exec = 3,
}

/// In the first report of a child: calls that we have received can be interrupted by fatal signals only.
pub(crate) const KILLABLE_ONLY: u32 = 1;
/// In the first report of a child: new privileges had to be given up to install the filter.
pub(crate) const NO_NEW_PRIVS: u32 = 2;

/// Makes a child that becomes the program, under its filter. It reports to `socket`, whose other end must be read to the end.
pub(crate) fn fork(image: &Image, signals: &Signals, socket: BorrowedFd<'_>) -> Result<i32, Errno> {
    let pointers = |strings: &[CString]| strings.iter().map(|text| text.as_ptr()).chain([ptr::null()]).collect::<Vec<_>>();
    let (paths, arguments, environment) = (pointers(&image.paths), pointers(&image.arguments), pointers(&image.environment));
    // For a script without an interpreter's name, as execvp does: the shell, with room for the script's path.
    let mut script = vec![c"/bin/sh".as_ptr(), ptr::null()];
    script.extend(arguments.iter().skip(1));
    let program = libc::sock_fprog { len: image.filter.len() as u16, filter: image.filter.as_ptr().cast_mut() };
    // SAFETY: the child calls `child` and nothing else, with pointers to values that its copy of this stack and heap holds (point 3).
    let pid = unsafe {
        let pid = libc::fork();
        if pid == 0 {
            child(socket.as_raw_fd(), &program, &signals.before, (&paths, &arguments, &environment), &mut script);
        }
        pid
    };
    check(pid.into()).map(|pid| pid as i32)
}

/// The child: installs the filter, hands over its listener, and becomes the program.
///
/// # Safety
/// Only right after a fork, in the child. The lists end in null, and so do the strings; `script` has room for a path in its second place.
unsafe fn child(
    socket: RawFd,
    program: &libc::sock_fprog,
    mask: &libc::sigset_t,
    (paths, arguments, environment): (&[*const libc::c_char], &[*const libc::c_char], &[*const libc::c_char]),
    script: &mut [*const libc::c_char],
) -> ! {
    // SAFETY: system calls on values that outlive them; none of these functions locks or allocates.
    unsafe {
        let errno = || *libc::__errno_location() as u32;
        let say = |step: u32, word: u32| {
            let words = [step, word];
            // Not write, which the filter may hold back when the number is high.
            libc::send(socket, words.as_ptr().cast(), 8, libc::MSG_NOSIGNAL);
        };
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        libc::pthread_sigmask(libc::SIG_SETMASK, mask, ptr::null_mut());
        // Without its server every open would fail: better no program than that.
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let install = |flags: libc::c_ulong| {
            // This is no sandbox: nothing need be slowed down for the sake of what is inside.
            let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW | flags;
            libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, program)
        };
        let mut flags = KILLABLE_ONLY;
        let mut listener = install(libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV);
        if listener < 0 && errno() == libc::EACCES as u32 {
            flags |= NO_NEW_PRIVS;
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            listener = install(libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV);
        }
        if listener < 0 && errno() == libc::EINVAL as u32 {
            flags &= !KILLABLE_ONLY;
            listener = install(0);
        }
        if listener < 0 {
            say(Step::Filter as u32, errno());
            libc::_exit(127);
        }
        if send_listener(socket, flags, listener as RawFd) < 0 {
            say(Step::Send as u32, errno());
            libc::_exit(127);
        }
        let mut reason = libc::ENOENT as u32;
        for &path in paths.iter().take_while(|path| !path.is_null()) {
            libc::execve(path, arguments.as_ptr(), environment.as_ptr());
            if errno() == libc::ENOEXEC as u32 {
                script[1] = path;
                libc::execve(script[0], script.as_ptr(), environment.as_ptr());
            }
            match errno() as i32 {
                libc::ENOENT | libc::ENOTDIR => {}
                other => reason = other as u32,
            }
        }
        say(Step::Exec as u32, reason);
        libc::_exit(127);
    }
}

/// Sends the listener and the flags in one message.
///
/// # Safety
/// As [`child`].
unsafe fn send_listener(socket: RawFd, flags: u32, listener: RawFd) -> isize {
    #[repr(C, align(8))]
    struct Control([u8; 24]);
    let words = [0u32, flags];
    let mut control = Control([0; 24]);
    let mut part = libc::iovec { iov_base: words.as_ptr().cast_mut().cast(), iov_len: 8 };
    // SAFETY: a message header with one part and one control message of one descriptor, for which 24 bytes are enough; all live for the call.
    unsafe {
        let mut message: libc::msghdr = mem::zeroed();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = ptr::from_mut(&mut control).cast();
        message.msg_controllen = libc::CMSG_SPACE(4) as _;
        let header = libc::CMSG_FIRSTHDR(&message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(4) as _;
        libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(listener);
        libc::sendmsg(socket, &message, libc::MSG_NOSIGNAL)
    }
}

/// A soft limit of a process.
pub(crate) fn soft_limit(pid: i32, resource: Limit) -> Result<u64, Errno> {
    let resource = match resource {
        Limit::Files => libc::RLIMIT_NOFILE,
        Limit::LockedBytes => libc::RLIMIT_MEMLOCK,
    };
    let mut limit = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel fills the structure; nothing is set.
    check(unsafe { libc::prlimit64(pid, resource, ptr::null(), &mut limit) }.into())?;
    Ok(limit.rlim_cur)
}

/// Limits that answers depend on.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Limit {
    Files,
    LockedBytes,
}
