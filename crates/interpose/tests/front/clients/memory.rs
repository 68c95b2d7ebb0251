//! A client's memory as seen from the server: pinned, named, taken away, outlived.

use super::*;

pub(crate) fn memory() {
    let fd = echo();
    let private = mmap(64 << 12, PROT, PRIVATE, -1, 0).unwrap();
    poke(private + 5, 3);
    poke(private + (63 << 12), 4);
    assert_eq!(sum(fd, private, 64 << 12), Ok(7));
    assert_eq!(sum(fd, private + 5, 1), Ok(3));
    let shared = mmap(64 << 12, PROT, ANON, -1, 0).unwrap();
    poke(shared + 4097, 9);
    assert_eq!(sum(fd, shared + 4090, 20), Ok(9));
    // Two kinds beside each other.
    let both = mmap(4 << 12, PROT, PRIVATE, -1, 0).unwrap();
    assert_eq!(mmap_fixed(both + 8192, 4096, ANON), both + 8192);
    (0..4).for_each(|page| poke(both + page * 4096, page as u8 + 1));
    assert_eq!(sum(fd, both, 4 << 12), Ok(10));
    // What cannot be pinned for writing.
    assert_eq!(sum(fd, 4096, 4096), Err(libc::EFAULT));
    let constant = mmap(4096, libc::PROT_READ, PRIVATE, -1, 0).unwrap();
    assert_eq!(sum(fd, constant, 1), Err(libc::EFAULT));
    let none = mmap(4096, libc::PROT_NONE, PRIVATE, -1, 0).unwrap();
    assert_eq!(sum(fd, none, 1), Err(libc::EFAULT));
    munmap(both + 4096, 4096);
    assert_eq!(sum(fd, both, 4 << 12), Err(libc::EFAULT));
    assert_eq!(sum(fd, u64::MAX - 4095, 4096), Err(libc::EOVERFLOW));
    // Behind the end of its file.
    let short = memfd(4096);
    let long = mmap(8192, PROT, SHARED, short, 0).unwrap();
    assert_eq!((sum(fd, long, 4096), sum(fd, long, 8192)), (Ok(0), Err(libc::EFAULT)));
    // Writes arrive.
    for at in [private, shared] {
        ioctl(fd, KEEP, &mut [at + 100, 4096]).unwrap();
        poke(at + 100, 200);
        assert_eq!((bump(fd, 0), peek(at + 100)), (Ok(200), 201));
    }
}

pub(crate) fn memory_of_files() {
    let fd = echo();
    let file = memfd(16 << 12);
    let at = mmap(16 << 12, PROT, SHARED, file, 0).unwrap();
    poke(at + 12345, 77);
    let sum_file = |file: i32, start: u64, len: u64| {
        let mut words = [file as u64, start, len, 0];
        ioctl(fd, SUM_FILE, &mut words).map(|_| words[3])
    };
    assert_eq!(sum_file(file, 0, 16 << 12), Ok(77));
    assert_eq!(sum_file(file, 12345, 1), Ok(77));
    assert_eq!(sum_file(file, 15 << 12, 8192), Err(libc::EFAULT), "behind the end");
    assert_eq!(sum_file(9999, 0, 4096), Err(libc::EBADF));
    assert_eq!(sum_file(open("/etc/passwd", libc::O_RDONLY).unwrap(), 0, 4096), Err(libc::EFAULT), "no memory");
    assert_eq!(sum_file(fd, 0, 4096), Err(libc::EFAULT), "ours");
    // It grew meanwhile, and a descriptor for reading will do.
    ftruncate(file, 32 << 12).unwrap();
    let reader = open(&format!("/proc/self/fd/{file}"), libc::O_RDONLY).unwrap();
    assert_eq!(sum_file(reader, 0, 32 << 12), Ok(77));
    // The server keeps nothing of it.
    let watcher = echo();
    close(fd);
    assert_eq!(counts(watcher)[0], 1);
}

/// What is pinned outlives whoever had it.
pub(crate) fn outlives() {
    let fd = echo();
    let child = fork(|| {
        let at = mmap(4096, PROT, ANON, -1, 0).unwrap();
        poke(at, 50);
        ioctl(fd, KEEP, &mut [at, 4096]).map_or(1, |_| 0)
    });
    assert_eq!(wait(child), 0);
    assert_eq!((bump(fd, 0), bump(fd, 0)), (Ok(50), Ok(51)));
    let child = fork(|| {
        let at = mmap(4096, PROT, PRIVATE, -1, 0).unwrap();
        poke(at, 60);
        ioctl(fd, KEEP, &mut [at, 4096]).map_or(1, |_| i32::from(bump(fd, 0) != Ok(60)))
    });
    assert_eq!((wait(child), bump(fd, 0)), (0, Err(libc::EIO)), "private memory ends with its process");
}

/// Pages that leave a file leave the tables first.
pub(crate) fn takes_away() {
    let fd = echo();
    let file = memfd(16 << 12);
    let at = mmap(16 << 12, PROT, SHARED, file, 0).unwrap();
    let (punch, keep) = (libc::FALLOC_FL_PUNCH_HOLE, libc::FALLOC_FL_KEEP_SIZE);
    for by_address in [false, true] {
        for page in 0..16 {
            poke(at + page * 4096, 1 + page as u8);
        }
        if by_address {
            // From page 4 of the file on.
            ioctl(fd, KEEP, &mut [at + (4 << 12), 12 << 12]).unwrap();
        } else {
            ioctl(fd, KEEP_FILE, &mut [file as u64, 4 << 12, 12 << 12]).unwrap();
        }
        assert_eq!(fallocate(file, punch | keep, (6 << 12) - 1, 8192), Ok(0));
        let absent: Vec<u64> = (0..12).filter(|page| is_absent(fd, *page)).collect();
        assert_eq!(absent, [2], "only whole pages, by address: {by_address}");
        assert_eq!((peek(at + (6 << 12)), peek(at + (7 << 12) - 1), peek(at + (7 << 12))), (0, 0, 0));
        assert_eq!(fallocate(file, 0, 6 << 12, 4096), Ok(0));
        assert!(!is_absent(fd, 2), "it is back");
        assert_eq!(ftruncate(file, 10 << 12), Ok(0));
        let absent: Vec<u64> = (0..12).filter(|page| is_absent(fd, *page)).collect();
        assert_eq!(absent, [6, 7, 8, 9, 10, 11], "by address: {by_address}");
        assert_eq!(ftruncate(file, 16 << 12), Ok(0));
        ioctl_at(fd, DROP, 0).unwrap();
    }
    // What fails takes nothing.
    ioctl(fd, KEEP_FILE, &mut [file as u64, 0, 16 << 12]).unwrap();
    fcntl(file, libc::F_ADD_SEALS, libc::F_SEAL_SHRINK).unwrap();
    assert_eq!((ftruncate(file, 0), is_absent(fd, 3)), (Err(libc::EPERM), false));
    let other = memfd(4096);
    assert_eq!((ftruncate(other, 0), ftruncate(-1, 0), ftruncate(fd, 4)), (Ok(0), Err(libc::EBADF), Err(libc::EINVAL)));
}

pub(crate) fn identity() {
    let fd = echo();
    let file = memfd(8192);
    let (one, two) = (mmap(8192, PROT, SHARED, file, 0).unwrap(), mmap(8192, PROT, SHARED, file, 0).unwrap());
    assert_eq!(name(fd, one), name(fd, two));
    assert_ne!(name(fd, one), name(fd, one + 4096));
    assert!(name(fd, one).unwrap().0);
    let private = mmap(8192, PROT, PRIVATE, -1, 0).unwrap();
    let named = name(fd, private).unwrap();
    poke(private, 1);
    assert_eq!(name(fd, private + 17), Ok(named));
    assert_eq!(name(fd, 4096), Err(libc::EFAULT));
    let shared = mmap(8192, PROT, ANON, -1, 0).unwrap();
    let of_parent = name(fd, shared);
    let child = fork(|| {
        let same = name(fd, shared) == of_parent && name(fd, private) != Ok(named);
        i32::from(!same)
    });
    assert_eq!(wait(child), 0);
}

pub(crate) fn process() {
    let fd = echo();
    let of = |fd: i32| {
        let mut words = [0; 4];
        ioctl(fd, PROCESS, &mut words).unwrap();
        words
    };
    let own = of(fd);
    assert_eq!(own, of(fd));
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(of(fd), own, "threads share their space"));
    });
    let child = fork(|| i32::from(of(fd)[0] == own[0]));
    assert_eq!(wait(child), 0);
    set_limit(libc::RLIMIT_MEMLOCK, 12345);
    assert_eq!(of(fd)[3], 12345);
    if own[1] == 0 {
        assert_eq!(own[2], 1, "root may lock memory");
        assert_eq!(call(libc::SYS_setresuid, [1, 1, 1, 0]), Ok(0));
        let now = of(fd);
        assert_eq!((now[0], now[1], now[2]), (own[0], 1, 0));
    }
}

/// Guest memory is let go with the process that had it, whoever else uses the map.
pub(crate) fn guest_memory() {
    const CREATE_VM: u32 = 0xae01;
    const CREATE_GUEST_MEMFD: u32 = 0xc040_aed4;
    let fd = echo();
    let child = fork(|| {
        let Ok(kvm) = open("/dev/kvm", RW) else { return 77 };
        let Ok(vm) = ioctl_at(kvm, CREATE_VM, 0) else { return 77 };
        let Ok(memory) = ioctl(vm as i32, CREATE_GUEST_MEMFD, &mut [64 << 12, 0, 0, 0, 0, 0, 0, 0]) else { return 77 };
        let kept = ioctl(fd, KEEP_FILE, &mut [memory as u64, 8 << 12, 16 << 12]);
        i32::from(kept.is_err() || is_absent(fd, 3))
    });
    match wait(child) {
        77 => println!("no guest_memfd can be made here: skipped"),
        code => assert_eq!((code, is_absent(fd, 3)), (0, true)),
    }
}
