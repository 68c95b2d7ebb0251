//! Programs that know nothing of the server. Each is one promise of the front; what they assert is what a program could see.

mod descriptors;
mod load;
mod memory;

use crate::echo::*;
use crate::raw::*;
use descriptors::*;
use load::*;
use memory::*;

pub(crate) use descriptors::executed;

const RW: i32 = libc::O_RDWR;
const SHARED: i32 = libc::MAP_SHARED;
const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
const ANON: i32 = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
const PROT: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Every scenario, by name.
pub(crate) const ALL: &[(&str, fn())] = &[
    ("opens", opens),
    ("ioctls", ioctls),
    ("transfers", transfers),
    ("maps", maps),
    ("events", events),
    ("duplicates", duplicates),
    ("inherits", inherits),
    ("passes", passes),
    ("threads", threads),
    ("executes", executes),
    ("memory", memory),
    ("memory_of_files", memory_of_files),
    ("outlives", outlives),
    ("takes_away", takes_away),
    ("identity", identity),
    ("status", status),
    ("knobs", knobs),
    ("directories", directories),
    ("slow", slow),
    ("many", many),
    ("garbage", garbage),
    ("panics", panics),
    ("process", process),
    ("closes_in_threads", closes_in_threads),
    ("victims", victims),
    ("stdio", stdio),
    ("exits", exits),
    ("aborts", aborts),
    ("waits_for_signal", waits_for_signal),
    ("leaves_a_child", leaves_a_child),
    ("forks_much", forks_much),
    ("looks", looks),
    ("limited", limited),
    ("guest_memory", guest_memory),
    ("cost", cost),
];

fn echo() -> i32 {
    open("/dev/echo", RW).expect("/dev/echo")
}

fn add(fd: i32, value: u64) -> Result<u64, i32> {
    let mut word = [value];
    ioctl(fd, ADD, &mut word).map(|_| word[0])
}

fn event(fd: i32) -> i32 {
    let mut word = [0];
    ioctl(fd, EVENT, &mut word).expect("an event file");
    word[0] as i32
}

/// Open, ever made, released.
fn counts(fd: i32) -> [u64; 3] {
    let mut words = [0; 3];
    ioctl(fd, COUNTS, &mut words).expect("counts");
    words
}

fn sum(fd: i32, va: u64, len: u64) -> Result<u64, i32> {
    let mut words = [va, len, 0];
    ioctl(fd, SUM, &mut words).map(|_| words[2])
}

fn bump(fd: i32, offset: u64) -> Result<u64, i32> {
    let mut words = [offset, 0];
    ioctl(fd, BUMP, &mut words).map(|_| words[1])
}

fn is_absent(fd: i32, page: u64) -> bool {
    let mut words = [page, 7];
    ioctl(fd, STATE, &mut words).expect("state");
    words[1] == 1
}

fn name(fd: i32, va: u64) -> Result<(bool, u64), i32> {
    let mut words = [va, 0, 0];
    ioctl(fd, NAME, &mut words).map(|_| (words[1] == 1, words[2]))
}
