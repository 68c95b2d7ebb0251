//! System calls as a C program makes them, for clients.
#![expect(unsafe_code, reason = "a client is a program that knows nothing of us: it makes bare system calls")]

use std::ffi::CString;
use std::os::fd::RawFd;
use std::ptr;

pub(crate) fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

fn result(value: i64) -> Result<i64, i32> {
    if value < 0 { Err(errno()) } else { Ok(value) }
}

pub(crate) fn open(path: &str, flags: i32) -> Result<RawFd, i32> {
    let path = CString::new(path).unwrap();
    // SAFETY: the path ends in NUL.
    result(unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC) }.into()).map(|fd| fd as RawFd)
}

pub(crate) fn openat(directory: RawFd, path: &str, flags: i32) -> Result<RawFd, i32> {
    let path = CString::new(path).unwrap();
    // SAFETY: the path ends in NUL.
    result(unsafe { libc::openat(directory, path.as_ptr(), flags, 0o600) }.into()).map(|fd| fd as RawFd)
}

pub(crate) fn openat2(path: &str, flags: i32) -> Result<RawFd, i32> {
    let path = CString::new(path).unwrap();
    let how = [flags as u64, 0, 0];
    // SAFETY: the path ends in NUL; `how` is an open_how.
    result(unsafe { libc::syscall(libc::SYS_openat2, libc::AT_FDCWD, path.as_ptr(), how.as_ptr(), 24) }).map(|fd| fd as RawFd)
}

/// The system call itself, which libc no longer makes.
pub(crate) fn old_open(path: &str, flags: i32) -> Result<RawFd, i32> {
    let path = CString::new(path).unwrap();
    // SAFETY: the path ends in NUL.
    result(unsafe { libc::syscall(libc::SYS_open, path.as_ptr(), flags, 0) }).map(|fd| fd as RawFd)
}

pub(crate) fn close(fd: RawFd) {
    // SAFETY: numbers only.
    unsafe { libc::close(fd) };
}

pub(crate) fn ioctl(fd: RawFd, command: u32, words: &mut [u64]) -> Result<i64, i32> {
    ioctl_at(fd, command, words.as_mut_ptr() as u64)
}

pub(crate) fn ioctl_at(fd: RawFd, command: u32, at: u64) -> Result<i64, i32> {
    // SAFETY: the server checks the address.
    result(unsafe { libc::ioctl(fd, command.into(), at) }.into())
}

pub(crate) fn read(fd: RawFd, into: &mut [u8]) -> Result<usize, i32> {
    // SAFETY: into the slice.
    result(unsafe { libc::read(fd, into.as_mut_ptr().cast(), into.len()) } as i64).map(|count| count as usize)
}

pub(crate) fn pread(fd: RawFd, into: &mut [u8], at: i64) -> Result<usize, i32> {
    // SAFETY: into the slice.
    result(unsafe { libc::pread(fd, into.as_mut_ptr().cast(), into.len(), at) } as i64).map(|count| count as usize)
}

pub(crate) fn readv(fd: RawFd, into: &mut [&mut [u8]]) -> Result<usize, i32> {
    let parts: Vec<_> = into.iter_mut().map(|part| libc::iovec { iov_base: part.as_mut_ptr().cast(), iov_len: part.len() }).collect();
    // SAFETY: into the slices.
    result(unsafe { libc::readv(fd, parts.as_ptr(), parts.len() as i32) } as i64).map(|count| count as usize)
}

pub(crate) fn write(fd: RawFd, from: &[u8]) -> Result<usize, i32> {
    // SAFETY: from the slice.
    result(unsafe { libc::write(fd, from.as_ptr().cast(), from.len()) } as i64).map(|count| count as usize)
}

pub(crate) fn writev(fd: RawFd, from: &[&[u8]]) -> Result<usize, i32> {
    let parts: Vec<_> = from.iter().map(|part| libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() }).collect();
    // SAFETY: from the slices.
    result(unsafe { libc::writev(fd, parts.as_ptr(), parts.len() as i32) } as i64).map(|count| count as usize)
}

/// Bad on purpose.
pub(crate) fn read_to(fd: RawFd, at: u64, len: usize) -> Result<i64, i32> {
    // SAFETY: whoever reads checks the address.
    result(unsafe { libc::syscall(libc::SYS_read, fd, at, len) })
}

pub(crate) fn dup(fd: RawFd) -> Result<RawFd, i32> {
    // SAFETY: numbers only.
    result(unsafe { libc::dup(fd) }.into()).map(|fd| fd as RawFd)
}

pub(crate) fn dup2(fd: RawFd, to: RawFd) -> Result<RawFd, i32> {
    // SAFETY: numbers only.
    result(unsafe { libc::dup2(fd, to) }.into()).map(|fd| fd as RawFd)
}

pub(crate) fn fcntl(fd: RawFd, command: i32, argument: i32) -> Result<i64, i32> {
    // SAFETY: numbers only.
    result(unsafe { libc::fcntl(fd, command, argument) }.into())
}

pub(crate) fn mmap(len: usize, prot: i32, flags: i32, fd: RawFd, offset: i64) -> Result<u64, i32> {
    // SAFETY: a new mapping.
    let at = unsafe { libc::mmap(ptr::null_mut(), len, prot, flags, fd, offset) };
    if at == libc::MAP_FAILED { Err(errno()) } else { Ok(at as u64) }
}

pub(crate) fn munmap(at: u64, len: usize) {
    // SAFETY: nothing refers to what the tests map.
    unsafe { libc::munmap(at as *mut _, len) };
}

pub(crate) fn poke(at: u64, value: u8) {
    // SAFETY: mapped by the test.
    unsafe { ptr::write_volatile(at as *mut u8, value) };
}

pub(crate) fn peek(at: u64) -> u8 {
    // SAFETY: mapped by the test.
    unsafe { ptr::read_volatile(at as *const u8) }
}

pub(crate) fn memfd(len: i64) -> RawFd {
    // SAFETY: a constant name.
    let fd = unsafe { libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    // SAFETY: numbers only.
    unsafe { libc::ftruncate(fd, len) };
    fd
}

pub(crate) fn ftruncate(fd: RawFd, len: i64) -> Result<i64, i32> {
    // SAFETY: numbers only.
    result(unsafe { libc::ftruncate(fd, len) }.into())
}

pub(crate) fn fallocate(fd: RawFd, mode: i32, at: i64, len: i64) -> Result<i64, i32> {
    // SAFETY: numbers only.
    result(unsafe { libc::fallocate(fd, mode, at, len) }.into())
}

/// Runs `child` in a child; answers its number.
pub(crate) fn fork(child: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the clients fork while they have one thread, or make only system calls in the child.
    match unsafe { libc::fork() } {
        0 => {
            let code = child();
            // SAFETY: ends the child.
            unsafe { libc::_exit(code) }
        }
        pid => pid,
    }
}

/// Waits for a child: its exit status, or 128 and the signal.
pub(crate) fn wait(pid: i32) -> i32 {
    let mut status = 0;
    // SAFETY: a local.
    unsafe { libc::waitpid(pid, &mut status, 0) };
    if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { 128 + libc::WTERMSIG(status) }
}

pub(crate) fn kill(pid: i32, signal: i32) {
    // SAFETY: numbers only.
    unsafe { libc::kill(pid, signal) };
}

/// Whether poll finds `wanted` within some milliseconds.
pub(crate) fn poll(fd: RawFd, wanted: i16, milliseconds: i32) -> i16 {
    let mut polled = libc::pollfd { fd, events: wanted, revents: 0 };
    // SAFETY: a local.
    unsafe { libc::poll(&mut polled, 1, milliseconds) };
    polled.revents
}

pub(crate) fn socketpair() -> (RawFd, RawFd) {
    let mut pair = [0; 2];
    // SAFETY: a local.
    unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, pair.as_mut_ptr()) };
    (pair[0], pair[1])
}

#[repr(C, align(8))]
struct Control([u8; 24]);

/// Sends a descriptor.
pub(crate) fn send_fd(socket: RawFd, fd: RawFd) {
    let mut byte = 1u8;
    let mut control = Control([0; 24]);
    let mut part = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    // SAFETY: one part and one control message, all locals.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = (&raw mut control).cast();
        message.msg_controllen = libc::CMSG_SPACE(4) as _;
        let header = libc::CMSG_FIRSTHDR(&message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(4) as _;
        libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(fd);
        libc::sendmsg(socket, &message, 0);
    }
}

/// Receives a descriptor.
pub(crate) fn receive_fd(socket: RawFd) -> RawFd {
    let mut byte = 0u8;
    let mut control = Control([0; 24]);
    let mut part = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    // SAFETY: one part and one control message, all locals.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = (&raw mut control).cast();
        message.msg_controllen = 24;
        libc::recvmsg(socket, &mut message, 0);
        let header = libc::CMSG_FIRSTHDR(&message);
        libc::CMSG_DATA(header).cast::<RawFd>().read_unaligned()
    }
}

pub(crate) fn set_limit(resource: u32, soft: u64) {
    // SAFETY: locals.
    unsafe {
        let mut limit: libc::rlimit = std::mem::zeroed();
        libc::getrlimit(resource, &mut limit);
        limit.rlim_cur = soft;
        libc::setrlimit(resource, &limit);
    }
}

pub(crate) fn own_tid() -> i32 {
    // SAFETY: no arguments.
    unsafe { libc::gettid() }
}

pub(crate) fn mmap_fixed(at: u64, len: usize, flags: i32) -> u64 {
    // SAFETY: over memory that only the tests use.
    unsafe { libc::mmap(at as *mut _, len, libc::PROT_READ | libc::PROT_WRITE, flags | libc::MAP_FIXED, -1, 0) as u64 }
}

/// Any system call.
pub(crate) fn call(number: i64, args: [u64; 4]) -> Result<i64, i32> {
    // SAFETY: used with calls that write nowhere but where the kernel and the server are asked to, at addresses that are bad or the test's.
    result(unsafe { libc::syscall(number, args[0], args[1], args[2], args[3]) })
}

pub(crate) fn pin_to_first_cpu() {
    // SAFETY: a local.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(0, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
    }
}
