//! Memory that goes away under a copy: the copy ends with an error and the process lives.

mod common;

use common::*;
use lockstep_backing::{Backing, Frames, HostAddr, PageState};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

/// A backing whose file ends after `len` bytes, in whole pages.
fn cut_short(len: u64) -> (std::sync::Arc<Backing>, HostAddr) {
    let backing = Backing::memfd(M2, Frames::Contiguous).unwrap();
    backing.populate(backing.pages(), PageState::Shared).unwrap();
    rustix::fs::ftruncate(other_fd(&backing), len).unwrap();
    let at = host(&backing);
    (backing, at)
}

#[test]
fn copies_across_the_end_fail_with_what_they_did() {
    let (backing, at) = cut_short(64 * K4);
    let end = 64 * K4;
    let (whole, whole_at) = {
        let whole = Backing::memfd(M2, Frames::Contiguous).unwrap();
        let at = host(&whole);
        (whole, at)
    };
    for len in
        [1usize, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65, 100, 128, 129, 200, 256, 1000, 2048, 4096, 5000, 8192, 65_536, 200_000]
    {
        for inside in [0, 1, 2, 8, 33, 64, 100, 129, 1000, 4095, 4096, 6000, 100_000].into_iter().filter(|&inside| inside < len) {
            for skew in [0, 8, 40] {
                at.write(0, &vec![0x11; end as usize]).unwrap();
                let start = end - inside as u64;
                let mut heap = vec![0; len + skew];
                let fault = at.read(start, &mut heap[skew..]).unwrap_err();
                assert!(fault.done <= inside, "{len} bytes, {inside} inside: says {}", fault.done);
                assert!(len <= 128 || fault.done + 128 >= inside, "{len} bytes, {inside} inside: only {}", fault.done);
                assert!(heap[skew..skew + fault.done].iter().all(|&byte| byte == 0x11), "{len}, {inside}: not what it said");
                let fault = at.write(start, &vec![0x22; len]).unwrap_err();
                assert!(fault.done <= inside);
                assert!((0..fault.done as u64).all(|off| byte(at, start + off) == 0x22));
                let there = backing.host(addr::Oa::new(backing.window().start().get() + start), len as u64).unwrap();
                assert!(HostAddr::copy(there, whole_at, len).is_err() && HostAddr::copy(whole_at, there, len).is_err());
            }
        }
    }
    assert!(at.load_u64(end).is_err() && at.store_u64(end, 1).is_err());
    assert_eq!(at.load_u64(end - 8), Ok(0x2222_2222_2222_2222));
    drop(whole);
}

#[test]
fn truncation_while_others_copy() {
    let backing = Backing::memfd(8 << 20, Frames::Contiguous).unwrap();
    let scratch = Backing::memfd(8 << 20, Frames::Contiguous).unwrap();
    let (at, to) = (host(&backing), host(&scratch));
    let (stop, file) = (AtomicBool::new(false), other_fd(&backing));
    let faults: usize = thread::scope(|scope| {
        let copy = |index: usize| {
            let (stop, mut faults) = (&stop, 0);
            move || {
                let mut buffer = vec![0u8; 1 << 20];
                while !stop.load(Ordering::Relaxed) {
                    let result = match index % 3 {
                        0 => at.read(7 << 20, &mut buffer),
                        1 => at.write((7 << 20) + 3, &buffer[..1000]),
                        _ => HostAddr::copy(at, to, 8 << 20),
                    };
                    faults += usize::from(result.is_err());
                }
                faults
            }
        };
        let threads: Vec<_> = (0..3).map(|index| scope.spawn(copy(index))).collect();
        for round in 0..400 {
            rustix::fs::ftruncate(&file, if round % 2 == 0 { 1 << 20 } else { 8 << 20 }).unwrap();
            thread::sleep(std::time::Duration::from_micros(300));
        }
        stop.store(true, Ordering::Relaxed);
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert!(faults > 0, "no copy ever met the truncation");
}

#[test]
fn windows_that_close_while_stale_addresses_are_used() {
    let keeper = Backing::memfd(M2, Frames::Contiguous).unwrap();
    let stop = AtomicBool::new(false);
    let latest = std::sync::Mutex::new(host(&keeper));
    thread::scope(|scope| {
        let user = scope.spawn(|| {
            let (mut good, mut bad) = (0u32, 0u32);
            while !stop.load(Ordering::Relaxed) {
                let at = *latest.lock().unwrap();
                match at.write(0, &[5; 4096]) {
                    Ok(()) => good += 1,
                    Err(_) => bad += 1,
                }
            }
            (good, bad)
        });
        for _ in 0..300 {
            let backing = Backing::memfd(M2, Frames::Contiguous).unwrap();
            *latest.lock().unwrap() = host(&backing);
            thread::sleep(std::time::Duration::from_micros(100));
            drop(backing);
            thread::sleep(std::time::Duration::from_micros(100));
        }
        stop.store(true, Ordering::Relaxed);
        let (good, bad) = user.join().unwrap();
        assert!(good > 0 && bad > 0, "{good} good, {bad} bad: one side was never met");
    });
}
