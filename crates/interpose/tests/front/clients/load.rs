//! Clients that are many, slow, hostile or dying; and what calls cost.

use super::*;

pub(crate) fn threads() {
    let fd = echo();
    std::thread::scope(|scope| {
        for thread in 0..8 {
            scope.spawn(move || {
                for round in 0..200 {
                    assert_eq!(add(fd, round), Ok(round + 1));
                    if round % 20 == thread {
                        let own = echo();
                        let event = event(own);
                        close(own);
                        close(event);
                    }
                }
            });
        }
    });
    assert_eq!(counts(fd)[0], 1);
}

/// A call that takes long keeps nobody else waiting.
pub(crate) fn slow() {
    let fd = echo();
    let child = fork(|| ioctl_at(fd, SLEEP, 1500).map_or(1, |_| 0));
    std::thread::sleep(std::time::Duration::from_millis(100));
    let start = std::time::Instant::now();
    for round in 0..100 {
        assert_eq!(add(fd, round), Ok(round + 1));
    }
    assert!(start.elapsed().as_millis() < 1000, "calls waited for another process's: {:?}", start.elapsed());
    assert_eq!(wait(child), 0);
    // More of them than threads.
    let children: Vec<i32> = (0..40).map(|_| fork(|| ioctl_at(fd, SLEEP, 20).map_or(1, |_| 0))).collect();
    children.into_iter().for_each(|child| assert_eq!(wait(child), 0));
    assert_eq!(add(fd, 1), Ok(2));
}

pub(crate) fn many() {
    let watcher = echo();
    set_limit(libc::RLIMIT_NOFILE, 1000);
    let mut held = Vec::new();
    let errno = loop {
        match open("/dev/echo", RW) {
            Ok(fd) => held.push(fd),
            Err(errno) => break errno,
        }
    };
    assert_eq!(errno, libc::EMFILE);
    assert!(held.len() > 200, "{}", held.len());
    assert_eq!(ioctl(watcher, EVENT, &mut [0]), Err(libc::EMFILE));
    held.into_iter().for_each(close);
    assert_eq!(counts(watcher)[0], 1);
    for _ in 0..5000 {
        close(echo());
    }
    assert_eq!(counts(watcher)[0], 1);
    // All at once, more than the kernel keeps events for.
    set_limit(libc::RLIMIT_NOFILE, 20000);
    let child = fork(|| {
        for _ in 0..9000 {
            if open("/dev/echo", RW).is_err() {
                return 1;
            }
        }
        0
    });
    assert_eq!((wait(child), counts(watcher)[0]), (0, 1));
}

pub(crate) fn garbage() {
    let fd = echo();
    let mut random = 0x1234_5678_9abc_def1u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    for _ in 0..3000 {
        let at = [0, 1, next(), next() >> 17, u64::MAX, u64::MAX - 7, 0x7fff_ffff_f000][next() as usize % 7];
        let command = [ADD, EVENT, SUM, SUM_FILE, NAME, PROCESS, BUMP, STATE, OURS, 0x3b00 | next() as u32 & 0xff];
        let command = command[next() as usize % command.len()];
        if command != SLEEP && command != PANIC {
            let mut words = [next(), next() >> 30, next(), next()];
            let _ = if next() % 2 == 0 { ioctl_at(fd, command, at) } else { ioctl(fd, command, &mut words) };
        }
        let _ = read_to(fd, at, next() as usize >> 40);
        for number in [libc::SYS_openat, libc::SYS_readv, libc::SYS_writev, libc::SYS_preadv2, libc::SYS_fallocate, libc::SYS_fcntl] {
            let _ = call(number, [fd as u64, at, next() >> 50, next()]);
        }
        let _ = call(libc::SYS_open, [at, next() & 3, 0, 0]);
        let _ = call(libc::SYS_openat2, [next(), at, next(), 24]);
    }
    assert_eq!(add(fd, 1), Ok(2));
}

pub(crate) fn panics() {
    let fd = echo();
    assert_eq!(ioctl_at(fd, PANIC, 0), Err(libc::EIO));
    assert_eq!(add(fd, 1), Ok(2));
}

/// Descriptors vanish under calls that use them.
pub(crate) fn closes_in_threads() {
    let watcher = echo();
    let end = std::time::Instant::now() + std::time::Duration::from_millis(700);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while std::time::Instant::now() < end {
                    let fd = echo();
                    let _ = add(fd, 1);
                    close(fd);
                }
            });
        }
        scope.spawn(|| {
            while std::time::Instant::now() < end {
                for fd in 768..780 {
                    if fd != watcher {
                        let _ = add(fd, 1);
                        let _ = dup(fd).map(close);
                        let _ = write(fd, b"x");
                    }
                }
            }
        });
    });
    assert_eq!(counts(watcher)[0], 1);
}

/// Processes die in the middle of everything.
pub(crate) fn victims() {
    let watcher = echo();
    for round in 0..150u64 {
        let child = fork(|| {
            let fd = echo();
            loop {
                let own = echo();
                let _ = add(own, 1);
                let _ = ioctl(own, EVENT, &mut [0]).is_ok();
                let _ = sum(fd, own as u64, 10);
                close(own);
            }
        });
        std::thread::sleep(std::time::Duration::from_micros(200 + 37 * round));
        kill(child, libc::SIGKILL);
        assert_eq!(wait(child), 137);
        assert_eq!(add(watcher, round), Ok(round + 1));
    }
    assert_eq!(counts(watcher)[0], 1);
}

pub(crate) fn forks_much() {
    let watcher = echo();
    for _ in 0..20 {
        let children: Vec<i32> = (0..30)
            .map(|_| {
                fork(|| {
                    let fd = echo();
                    i32::from(add(fd, 1) != Ok(2))
                })
            })
            .collect();
        children.into_iter().for_each(|child| assert_eq!(wait(child), 0));
    }
    assert_eq!(counts(watcher)[0], 1);
}

/// Prints what calls cost, in nanoseconds.
pub(crate) fn cost() {
    let fd = echo();
    let measure = |rounds: u32, mut call: Box<dyn FnMut() + '_>| {
        let mut best = f64::MAX;
        for _ in 0..5 {
            let start = std::time::Instant::now();
            (0..rounds).for_each(|_| call());
            best = best.min(start.elapsed().as_nanos() as f64 / f64::from(rounds));
        }
        best
    };
    let on_one = std::env::args().nth(3).is_some();
    if on_one {
        pin_to_first_cpu();
    }
    let null = memfd(4096);
    println!("ioctl with two copies {:.0}", measure(4000, Box::new(|| _ = add(fd, 1))));
    println!("ioctl without copies {:.0}", measure(4000, Box::new(|| _ = ioctl_at(fd, SLEEP, 0))));
    println!("open of another file {:.0}", measure(2000, Box::new(|| close(open("/dev/null", RW).unwrap()))));
    println!("open and close of ours {:.0}", measure(1000, Box::new(|| close(echo()))));
    println!("pread of another file {:.0}", measure(100_000, Box::new(|| _ = pread(null, &mut [0], 0))));
    println!("getppid {:.0}", measure(100_000, Box::new(|| _ = call(libc::SYS_getppid, [0; 4]))));
}
