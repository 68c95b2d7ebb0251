//! Descriptors of ours: opened, used, duplicated, inherited and passed on; and what a program has besides them.

use super::*;
use std::io::{Read, Write};

/// Each call that opens, and only paths that are ours.
pub(crate) fn opens() {
    let fd = echo();
    assert!(fd >= 700, "descriptors of ours lie high, not at {fd}");
    assert_eq!(add(fd, 41), Ok(42));
    for opened in [old_open("/dev/echo", RW), openat2("/dev/echo", RW), openat(-1, "/dev//./x/../echo", RW)] {
        assert_eq!(add(opened.unwrap(), 1), Ok(2));
    }
    std::env::set_current_dir("/dev").unwrap();
    assert_eq!(add(open("echo", RW).unwrap(), 1), Ok(2));
    let dev = open("/dev", libc::O_DIRECTORY).unwrap();
    assert_eq!(add(openat(dev, "echo", RW).unwrap(), 1), Ok(2));
    assert_eq!(add(openat(dev, "echo-dir/class/first", RW).unwrap(), 1), Ok(2));
    assert_eq!(open("/dev/echo-dir/class/first", RW | libc::O_NOFOLLOW), Err(libc::ELOOP));
    assert_eq!(open("/dev/refused", RW), Err(libc::EBUSY));
    assert_eq!(open("/dev/echo2", RW), Err(libc::ENOENT));
    assert_eq!(open("/tmp/echo", RW), Err(libc::ENOENT));
    assert_eq!(open("/dev/echo", RW | libc::O_DIRECTORY), Err(libc::ENOTDIR));
    assert_eq!(openat(-1, "/dev/echo", RW | libc::O_CREAT | libc::O_EXCL), Err(libc::EEXIST));
    assert_eq!(fcntl(fd, libc::F_GETFD, 0), Ok(1), "close-on-exec as asked for");
    let plain = openat(-1, "/dev/echo", libc::O_RDONLY).unwrap();
    assert_eq!(fcntl(plain, libc::F_GETFD, 0), Ok(0));
    assert_eq!(fcntl(plain, libc::F_GETFL, 0).unwrap() as i32 & libc::O_ACCMODE, libc::O_RDONLY);
    assert!(open("/etc/passwd", libc::O_RDONLY).unwrap() < 100, "other files are where they always are");
    let mut text = String::new();
    std::fs::File::open("/dev/echo-dir/name").unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "the name\n");
    assert_eq!(open("/dev/echo-dir/name", RW), Err(libc::EACCES));
}

pub(crate) fn ioctls() {
    let fd = echo();
    assert_eq!(ioctl_at(fd, 0x3bff, 0), Err(libc::ENOTTY));
    assert_eq!(ioctl_at(fd, ADD, 8), Err(libc::EFAULT));
    // An ioctl of another type is not held up, and the kernel knows none for a file in memory.
    assert_eq!(ioctl_at(fd, 0x5401, 0), Err(libc::ENOTTY));
    let other = memfd(4096);
    assert_eq!(ioctl_at(other, ADD, 0), Err(libc::ENOTTY));
    assert_eq!(ioctl_at(-1, ADD, 0), Err(libc::EBADF));
    assert_eq!(ioctl_at(9999, ADD, 0), Err(libc::EBADF));
    assert_eq!((ioctl_at(fd, OURS, fd as u64), ioctl_at(fd, OURS, other as u64)), (Ok(1), Ok(0)));
    assert_eq!(ioctl_at(fd, OURS, 9999), Err(libc::EBADF));
    // An answer that cannot be written.
    let page = mmap(4096, libc::PROT_READ, PRIVATE, -1, 0).unwrap();
    assert_eq!(ioctl_at(fd, ADD, page), Err(libc::EFAULT));
}

pub(crate) fn transfers() {
    let fd = echo();
    assert_eq!(write(fd, b"hello, world"), Ok(12));
    let mut bytes = [0; 5];
    assert_eq!((pread(fd, &mut bytes, 7), &bytes), (Ok(5), b"world"));
    let (mut first, mut second) = ([0; 3], [0; 9]);
    assert_eq!(readv(fd, &mut [&mut first, &mut second]), Ok(12));
    assert_eq!((&first, &second), (b"hel", b"lo, world"));
    assert_eq!(writev(fd, &[b"HE", b"", b"LLO"]), Ok(5));
    assert_eq!((pread(fd, &mut bytes, 0), &bytes), (Ok(5), b"HELLO"));
    assert_eq!(pread(fd, &mut bytes, -5), Err(libc::EINVAL));
    assert_eq!(read_to(fd, 8, 5), Err(libc::EFAULT));
    assert_eq!(write(open("/dev/echo", libc::O_RDONLY).unwrap(), b"x"), Err(libc::EBADF));
    assert_eq!(ftruncate(fd, 0), Err(libc::EINVAL), "the memory behind a descriptor is not the client's");
    let big = vec![7; 3 << 20];
    assert_eq!(write(fd, &big), Ok(1 << 20), "a large write is cut short");
}

pub(crate) fn maps() {
    let fd = echo();
    ioctl_at(fd, SHARE, 5).unwrap();
    assert_eq!(mmap(4096, PROT, SHARED, fd, 0), Err(libc::ENXIO));
    assert_eq!(ioctl_at(fd, MAPPED, 0), Ok(0));
    let at = mmap(4096, PROT, SHARED, fd, 4096).unwrap();
    assert_eq!((peek(at), ioctl_at(fd, MAPPED, 0)), (5, Ok(1)));
    // A child that never made a call of ours has the mapping, too.
    let (ours, theirs) = socketpair();
    let child = fork(|| {
        let mut byte = [0];
        read(theirs, &mut byte).unwrap();
        0
    });
    munmap(at, 4096);
    assert_eq!(ioctl_at(fd, MAPPED, 0), Ok(1));
    write(ours, b"x").unwrap();
    assert_eq!((wait(child), ioctl_at(fd, MAPPED, 0)), (0, Ok(0)));
    // Memory that nobody serves is not held up.
    assert!(mmap(4096, PROT, PRIVATE, -1, 0).is_ok() && mmap(4096, PROT, SHARED, memfd(4096), 0).is_ok());
    // The file lives as long as it is mapped.
    let watcher = echo();
    let at = mmap(4096, PROT, SHARED, fd, 4096).unwrap();
    close(fd);
    assert_eq!(counts(watcher)[0], 2);
    munmap(at, 4096);
    assert_eq!(counts(watcher)[0], 1);
}

pub(crate) fn events() {
    let fd = echo();
    let event = event(fd);
    let (readable, writable) = (libc::POLLIN, libc::POLLOUT);
    assert!(event >= 700 && fcntl(event, libc::F_GETFD, 0) == Ok(1));
    assert_eq!(poll(event, readable | writable, 0), writable);
    let mut bytes = [0; 4];
    assert_eq!((read(event, &mut bytes), read(event, &mut bytes[..3])), (Ok(0), Err(libc::ESPIPE)));
    ioctl_at(fd, READY, 1).unwrap();
    assert_eq!(poll(event, readable, 0), readable);
    ioctl_at(fd, READY, 0).unwrap();
    assert_eq!(poll(event, readable, 0), 0);
    let waker = fork(|| {
        std::thread::sleep(std::time::Duration::from_millis(50));
        ioctl_at(fd, READY, 1).map_or(1, |_| 0)
    });
    assert_eq!(poll(event, readable, 5000), readable, "poll wakes up");
    assert_eq!((read(event, &mut bytes), &bytes, poll(event, readable, 0)), (Ok(4), b"news", 0));
    assert_eq!((write(event, b"x"), poll(event, readable, 0)), (Ok(1), readable));
    assert_eq!(wait(waker), 0);
    // A call that fails gives nothing.
    let before = counts(fd);
    let mut word = [0];
    assert_eq!(ioctl(fd, FAIL, &mut word), Err(libc::EDOM));
    assert_eq!((fcntl(word[0] as i32, libc::F_GETFD, 0), counts(fd)[0]), (Err(libc::EBADF), before[0]));
    assert_eq!(poll(event, readable, 0), readable);
    close(event);
    assert_eq!(counts(fd)[0], before[0] - 1);
    assert_eq!(mmap(4096, PROT, SHARED, self::event(fd), 0), Err(libc::ENODEV));
}

pub(crate) fn duplicates() {
    let fd = echo();
    let watcher = echo();
    let copies = [dup(fd).unwrap(), fcntl(fd, libc::F_DUPFD, 3).unwrap() as i32, fcntl(fd, libc::F_DUPFD_CLOEXEC, 800).unwrap() as i32];
    for copy in copies {
        assert!(copy >= 700 && copy != fd);
        assert_eq!((add(copy, 1), write(copy, b"x")), (Ok(2), Ok(1)));
    }
    assert!(copies[2] >= 800 && fcntl(copies[2], libc::F_GETFD, 0) == Ok(1) && fcntl(copies[0], libc::F_GETFD, 0) == Ok(0));
    assert_eq!((dup2(fd, 900), add(900, 1), dup2(fd, fd)), (Ok(900), Ok(2), Ok(fd)));
    // Below the base: calls of ours work, and what cannot be served is refused, not pretended.
    assert_eq!((dup2(fd, 9), add(9, 1)), (Ok(9), Ok(2)));
    let mut byte = [0];
    assert_eq!((read(9, &mut byte), write(9, b"x")), (Err(libc::EBADF), Err(libc::EBADF)));
    assert_eq!(mmap(4096, libc::PROT_READ, SHARED, 9, 4096), Err(libc::EACCES));
    let event = event(fd);
    assert_eq!(dup2(event, 10), Err(libc::EINVAL));
    let other = dup(event).unwrap();
    ioctl_at(fd, READY, 1).unwrap();
    assert_eq!(poll(other, libc::POLLIN, 0), libc::POLLIN);
    for copy in [fd, copies[0], copies[1], copies[2], 900] {
        close(copy);
        assert_eq!(counts(watcher)[0], 3, "one is left");
    }
    close(9);
    assert_eq!(counts(watcher)[0], 2);
    assert_eq!(dup(9), Err(libc::EBADF));
    assert_eq!(fcntl(watcher, libc::F_DUPFD, 1 << 30), Err(libc::EINVAL));
}

pub(crate) fn inherits() {
    let fd = echo();
    let child = fork(|| i32::from(add(fd, 1) != Ok(2)));
    assert_eq!(wait(child), 0);
    assert_eq!(counts(fd)[0], 1, "a child's copy is no file of its own");
    let watcher = echo();
    let (ours, theirs) = socketpair();
    let child = fork(|| {
        let mut byte = [0];
        read(theirs, &mut byte).unwrap();
        i32::from(add(fd, 1) != Ok(2))
    });
    close(fd);
    assert_eq!(counts(watcher)[0], 2);
    write(ours, b"x").unwrap();
    assert_eq!((wait(child), counts(watcher)[0]), (0, 1), "the last one was the child's");
    let child = fork(|| {
        echo();
        loop {
            std::thread::sleep(std::time::Duration::from_secs(1));
        }
    });
    while counts(watcher)[0] != 2 {
        std::thread::yield_now();
    }
    kill(child, libc::SIGKILL);
    assert_eq!((wait(child), counts(watcher)[0]), (137, 1), "killing closes");
}

pub(crate) fn passes() {
    let (ours, theirs) = socketpair();
    let child = fork(|| {
        let fd = receive_fd(theirs);
        let served = add(fd, 1) == Ok(2);
        let high = dup2(fd, 950) == Ok(950) && write(950, b"x") == Ok(1);
        i32::from(!(served && high))
    });
    let fd = echo();
    send_fd(ours, fd);
    let watcher = echo();
    close(fd);
    assert_eq!((wait(child), counts(watcher)[0]), (0, 1));
}

pub(crate) fn executes() {
    let fd = echo();
    fcntl(fd, libc::F_SETFD, 0).unwrap();
    // The same process, but another program: another address space.
    let child = fork(|| {
        let mut before = [0; 4];
        ioctl(fd, PROCESS, &mut before).unwrap();
        let own = std::env::current_exe().unwrap();
        let mut command = std::process::Command::new(own);
        command.args(["client", "executed", &fd.to_string(), &before[0].to_string()]);
        drop(std::os::unix::process::CommandExt::exec(&mut command));
        1
    });
    assert_eq!(wait(child), 0);
    // Opened for itself, and closed by the exec.
    let code = std::process::Command::new("/bin/sh").args(["-c", "exec 3<>/dev/echo; exec true"]).status().unwrap();
    assert!(code.success());
    assert_eq!(counts(fd)[0], 1);
}

/// A program that another became: it has the descriptor, in another address space.
pub(crate) fn executed(fd: i32, space: u64) {
    let mut words = [0; 4];
    assert_eq!(add(fd, 1), Ok(2));
    ioctl(fd, PROCESS, &mut words).unwrap();
    assert_ne!(words[0], space);
}

pub(crate) fn status() {
    let line = |text: &str, name: &str| -> u64 {
        text.lines().find_map(|line| line.strip_prefix(name)).unwrap().split_ascii_whitespace().next().unwrap().parse().unwrap()
    };
    let fd = echo();
    let own = std::process::id();
    for path in ["/proc/self/status".to_owned(), format!("/proc/{own}/status"), "/proc/thread-self/status".into()] {
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!((line(&text, "VmPin:"), line(&text, "VmLck:"), line(&text, "Pid:")), (128, 4, own.into()), "{path}");
    }
    let text = std::fs::read_to_string("/proc/1/status").unwrap();
    assert_eq!((line(&text, "Pid:"), line(&text, "VmPin:")), (1, 0), "others are as they are");
    assert_eq!(add(fd, 1), Ok(2));
}

pub(crate) fn knobs() {
    let path = format!("/proc/self/task/{}/fail-nth", own_tid());
    let fd = open(&path, RW).unwrap();
    let mut bytes = [0; 16];
    assert_eq!((pread(fd, &mut bytes, 0), &bytes[..2]), (Ok(2), b"0\n".as_slice()));
    assert_eq!((write(fd, b"12"), pread(fd, &mut bytes, 0), &bytes[..3]), (Ok(2), Ok(3), b"12\n".as_slice()));
    assert_eq!((write(fd, b"3"), pread(fd, &mut bytes, 0), &bytes[..2]), (Ok(1), Ok(2), b"3\n".as_slice()), "a write is a value");
    assert_eq!(write(fd, b"x"), Err(libc::EINVAL));
    assert_eq!(std::fs::read_to_string("/dev/echo-dir/knob").unwrap(), "3\n");
    std::fs::write("/dev/echo-dir/knob", "4").unwrap();
    // A shell moves the descriptor to where its output is.
    let shell = |script: &str| std::process::Command::new("/bin/sh").args(["-c", script]).output().unwrap();
    assert_eq!(shell("cat < /dev/echo-dir/knob").stdout, b"4\n");
    assert!(shell("echo 77 > /dev/echo-dir/knob").status.success());
    assert_eq!((pread(fd, &mut bytes, 0), &bytes[..3]), (Ok(3), b"77\n".as_slice()));
}

pub(crate) fn directories() {
    let list = |path: &str| {
        let mut names: Vec<String> =
            std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    assert_eq!(list("/dev/echo-dir"), ["class", "devices", "knob", "name"]);
    assert_eq!(list("/dev/echo-dir/devices"), ["echo0"]);
    assert!(!list("/dev").contains(&"echo".to_owned()), "a real directory stays as it is");
    // Together with what is there: asked for.
    let kernel = list("/sys/kernel");
    assert!(kernel.contains(&"echo".to_owned()) && kernel.contains(&"mm".to_owned()));
    let directory = open("/dev/echo-dir", libc::O_DIRECTORY).unwrap();
    assert!(directory < 700);
    assert_eq!(add(openat(directory, "devices/echo0", RW).unwrap(), 1), Ok(2));
    let inner = openat(directory, "devices", libc::O_DIRECTORY).unwrap();
    assert_eq!(add(openat(inner, "echo0", RW).unwrap(), 1), Ok(2));
    assert_eq!(add(openat(inner, "../class/first", RW).unwrap(), 1), Ok(2));
    assert_eq!(open("/dev/echo-dir", RW), Err(libc::EISDIR));
    let link = std::fs::read_link(format!("/proc/self/fd/{}/class/first", directory));
    assert_eq!(link.unwrap().to_str(), Some("../devices/echo0"));
}

pub(crate) fn stdio() {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).unwrap();
    print!("out: {text}");
    std::io::stdout().flush().unwrap();
    eprint!("err: {text}");
}

pub(crate) fn exits() {
    std::process::exit(42);
}

pub(crate) fn aborts() {
    echo();
    kill(std::process::id() as i32, libc::SIGABRT);
}

pub(crate) fn waits_for_signal() {
    println!("ready {}", std::process::id());
    std::thread::sleep(std::time::Duration::from_secs(20));
}

/// The program ends before what it started, which is served on.
pub(crate) fn leaves_a_child() {
    fork(|| {
        std::thread::sleep(std::time::Duration::from_millis(300));
        let served = add(echo(), 1) == Ok(2);
        println!("served {served}");
        0
    });
    std::process::exit(7);
}

/// Under a limit that leaves no room for high numbers.
pub(crate) fn limited() {
    let fd = echo();
    assert!(fd < 200);
    let mut byte = [0];
    assert_eq!((add(fd, 1), read(fd, &mut byte)), (Ok(2), Err(libc::EBADF)));
    assert_eq!(ioctl(fd, EVENT, &mut [0]), Err(libc::EMFILE));
}

/// What a descriptor and its path are when somebody looks.
pub(crate) fn looks() {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let file = std::fs::OpenOptions::new().read(true).write(true).open("/dev/echo").unwrap();
    let (by_path, by_descriptor) = (std::fs::metadata("/dev/echo").unwrap(), file.metadata().unwrap());
    for metadata in [by_path, by_descriptor] {
        assert!(metadata.file_type().is_char_device());
        assert_eq!(metadata.rdev(), libc::makedev(511, 7));
    }
    assert_eq!(std::fs::metadata("/dev/echo-dir/name").unwrap().len(), 9);
    assert!(std::fs::symlink_metadata("/dev/echo-dir/class/first").unwrap().is_symlink());
    assert!(std::fs::metadata("/dev/null").unwrap().file_type().is_char_device());
    assert_eq!(std::fs::metadata("/dev/echo9").unwrap_err().kind(), std::io::ErrorKind::NotFound);
}
