//! The filter that decides which calls of a client are held up for us. It sees numbers only, no memory: so every open is held up, and what
//! follows is told apart by the number of the descriptor.
//!
//! Calls that are not listed here are let through by number alone, for which the kernel keeps a bitmap: they do not even run the filter.

use crate::sys::Instruction;

/// When a listed call is held up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    Always,
    /// Its argument of this index is a descriptor of ours: at or above the base.
    Descriptor(u32),
    /// Its command has the type of the IOMMU's and VFIO's ioctls.
    OurIoctl,
    /// A descriptor at or above the base is duplicated.
    Duplicates,
    /// A path is looked at; or, when the flags in its argument of this index say that there is none, a descriptor of ours.
    Looks(u32),
}

#[cfg(target_arch = "x86_64")]
const ARCH: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCH: u32 = 0xc000_00b7;

/// `;`, the type of all ioctls of IOMMUFD and VFIO.
const IOCTL_TYPE: u32 = b';' as u32;

/// Every call that may be held up.
const LISTED: &[(i64, When)] = &[
    (libc::SYS_openat, When::Always),
    (libc::SYS_openat2, When::Always),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_open, When::Always),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_creat, When::Always),
    (libc::SYS_ftruncate, When::Always),
    (libc::SYS_fallocate, When::Always),
    (libc::SYS_ioctl, When::OurIoctl),
    (libc::SYS_read, When::Descriptor(0)),
    (libc::SYS_write, When::Descriptor(0)),
    (libc::SYS_pread64, When::Descriptor(0)),
    (libc::SYS_pwrite64, When::Descriptor(0)),
    (libc::SYS_readv, When::Descriptor(0)),
    (libc::SYS_writev, When::Descriptor(0)),
    (libc::SYS_preadv, When::Descriptor(0)),
    (libc::SYS_pwritev, When::Descriptor(0)),
    (libc::SYS_preadv2, When::Descriptor(0)),
    (libc::SYS_pwritev2, When::Descriptor(0)),
    (libc::SYS_mmap, When::Descriptor(4)),
    (libc::SYS_dup, When::Descriptor(0)),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_dup2, When::Descriptor(0)),
    (libc::SYS_dup3, When::Descriptor(0)),
    (libc::SYS_fcntl, When::Duplicates),
];

/// What may be held up besides, for clients that look before they open.
pub(crate) const LOOKS: &[i64] = &[
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_stat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lstat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_access,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
];

fn look(number: i64) -> When {
    match number {
        libc::SYS_fstat => When::Descriptor(0),
        libc::SYS_newfstatat => When::Looks(3),
        libc::SYS_statx => When::Looks(2),
        _ => When::Always,
    }
}

const LOAD: u16 = 0x20;
const SHIFT_RIGHT: u16 = 0x74;
const AND: u16 = 0x54;
const IF_EQUAL: u16 = 0x15;
const IF_AT_LEAST: u16 = 0x35;
const IF_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;

const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
/// The lower half of an argument.
const fn argument(index: u32) -> u32 {
    16 + 8 * index
}

/// Descriptors are positive: -1, which mmap gets without a file, is none.
const SIGN: u32 = 1 << 31;

fn plain(code: u16, k: u32) -> Instruction {
    Instruction { code, jt: 0, jf: 0, k }
}

fn jump(code: u16, k: u32, jt: usize, jf: usize) -> Instruction {
    Instruction { code, jt: jt as u8, jf: jf as u8, k }
}

/// The filter for descriptors from `base` on, with or without what is in [`LOOKS`].
///
/// Calls of other architectures pass: a 32-bit program runs as if we were not there.
pub(crate) fn assemble(base: u32, looks: bool) -> Vec<Instruction> {
    let looks = LOOKS.iter().filter(|_| looks).map(|&number| (number, look(number)));
    let mut listed: Vec<(u32, When)> = LISTED.iter().copied().chain(looks).map(|(number, when)| (number as u32, when)).collect();
    listed.sort_by_key(|&(number, _)| number);
    let mut code = vec![plain(LOAD, ARCHITECTURE), jump(IF_EQUAL, ARCH, 1, 0), plain(RETURN, libc::SECCOMP_RET_ALLOW), plain(LOAD, NUMBER)];
    search(&listed, base, &mut code);
    code
}

/// Appends a binary search over `listed`: its smaller half, then its larger one.
fn search(listed: &[(u32, When)], base: u32, code: &mut Vec<Instruction>) {
    if let [(number, when)] = listed {
        code.push(jump(IF_EQUAL, *number, 1, 0));
        code.push(plain(RETURN, libc::SECCOMP_RET_ALLOW));
        decide(*when, base, code);
        return;
    }
    let (low, high) = listed.split_at(listed.len() / 2);
    let (mut below, mut above) = (Vec::new(), Vec::new());
    search(low, base, &mut below);
    search(high, base, &mut above);
    code.push(jump(IF_AT_LEAST, high[0].0, below.len(), 0));
    debug_assert!(below.len() <= usize::from(u8::MAX), "a jump reaches 255 instructions");
    code.append(&mut below);
    code.append(&mut above);
}

/// Appends what is left to ask of a listed call.
fn decide(when: When, base: u32, code: &mut Vec<Instruction>) {
    match when {
        When::Always => {}
        When::Descriptor(index) => {
            code.push(plain(LOAD, argument(index)));
            code.push(jump(IF_ANY_BIT, SIGN, 1, 0));
            code.push(jump(IF_AT_LEAST, base, 1, 0));
            code.push(plain(RETURN, libc::SECCOMP_RET_ALLOW));
        }
        When::OurIoctl => {
            code.push(plain(LOAD, argument(1)));
            code.push(plain(SHIFT_RIGHT, 8));
            code.push(plain(AND, 0xff));
            code.push(jump(IF_EQUAL, IOCTL_TYPE, 1, 0));
            code.push(plain(RETURN, libc::SECCOMP_RET_ALLOW));
        }
        When::Duplicates => {
            code.push(plain(LOAD, argument(1)));
            code.push(jump(IF_EQUAL, libc::F_DUPFD as u32, 2, 0));
            code.push(jump(IF_EQUAL, libc::F_DUPFD_CLOEXEC as u32, 1, 0));
            code.push(plain(RETURN, libc::SECCOMP_RET_ALLOW));
            return decide(When::Descriptor(0), base, code);
        }
        When::Looks(flags) => {
            code.push(plain(LOAD, argument(flags)));
            code.push(jump(IF_ANY_BIT, libc::AT_EMPTY_PATH as u32, 1, 0));
            code.push(plain(RETURN, libc::SECCOMP_RET_USER_NOTIF));
            return decide(When::Descriptor(0), base, code);
        }
    }
    code.push(plain(RETURN, libc::SECCOMP_RET_USER_NOTIF));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the filter answers, by the rules of classic BPF.
    fn run(code: &[Instruction], arch: u32, number: i64, args: [u64; 6]) -> bool {
        let word = |at: u32| match at {
            NUMBER => number as u32,
            ARCHITECTURE => arch,
            at => (args[(at as usize - 16) / 8] >> (8 * (at % 8))) as u32,
        };
        let (mut at, mut a) = (0, 0);
        loop {
            let i = code[at];
            at += 1;
            let truth = match i.code {
                LOAD => {
                    a = word(i.k);
                    continue;
                }
                SHIFT_RIGHT => {
                    a >>= i.k;
                    continue;
                }
                AND => {
                    a &= i.k;
                    continue;
                }
                RETURN => return i.k == libc::SECCOMP_RET_USER_NOTIF,
                IF_EQUAL => a == i.k,
                IF_AT_LEAST => a >= i.k,
                IF_ANY_BIT => a & i.k != 0,
                code => panic!("no such instruction {code:#x}"),
            };
            at += usize::from(if truth { i.jt } else { i.jf });
        }
    }

    #[test]
    fn exactly_what_is_listed_is_held_up() {
        let code = assemble(512, false);
        let held = |number, args| run(&code, ARCH, number, args);
        let first = |fd: u64| [fd, 0, 0, 0, 0, 0];
        for number in 0..600 {
            let listed = LISTED.iter().find(|(known, _)| *known == number).map(|(_, when)| *when);
            assert_eq!(held(number, first(5)), listed == Some(When::Always), "call {number} on a low descriptor");
            let expected = matches!(listed, Some(When::Always | When::Descriptor(0) | When::Duplicates));
            assert_eq!(held(number, first(512)), expected, "call {number} on a descriptor of ours");
        }
        let mmap = |fd: u64| held(libc::SYS_mmap, [0, 4096, 3, 1, fd, 0]);
        assert!(mmap(512) && !mmap(511) && !mmap(u64::MAX) && !mmap(u64::from(u32::MAX)));
        let ioctl = |command: u64| held(libc::SYS_ioctl, [3, command, 0, 0, 0, 0]);
        assert!(ioctl(0x3b85) && ioctl(0xffff_3b64) && !ioctl(0x5401) && !ioctl(0x3b));
        let fcntl = |fd: u64, command: i32| held(libc::SYS_fcntl, [fd, command as u64, 0, 0, 0, 0]);
        assert!(fcntl(512, libc::F_DUPFD_CLOEXEC) && !fcntl(512, libc::F_GETFL) && !fcntl(3, libc::F_DUPFD));
        assert!(!run(&code, 0x4000_0003, libc::SYS_openat, first(600)), "other architectures pass");
        assert!(!held(0x4000_0000 | 2, first(600)), "and so does x32");
        let code = assemble(512, true);
        let held = |number, args| run(&code, ARCH, number, args);
        let empty = libc::AT_EMPTY_PATH as u64;
        for (number, flags) in [(libc::SYS_newfstatat, 3), (libc::SYS_statx, 2)] {
            let with = |fd: u64, value: u64| {
                let mut args = first(fd);
                args[flags] = value;
                held(number, args)
            };
            assert!(with(3, 0) && with(512, empty) && !with(3, empty));
        }
        assert!(held(libc::SYS_access, first(0)) && held(libc::SYS_fstat, first(512)) && !held(libc::SYS_fstat, first(3)));
        assert!(held(libc::SYS_openat, first(0)) && !held(libc::SYS_getpid, first(600)));
    }
}
