//! Faults that are not ours reach the handler that was there before. Each case is a process of its own (this binary, told by an
//! environment variable which), because signal handlers belong to a process and some of the cases end with its death.
#![expect(unsafe_code, reason = "foreign signal handlers and faults on purpose")]

mod common;

use common::*;
use lockstep_backing::{Backing, Frames};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

static CALLS: AtomicU32 = AtomicU32::new(0);
static PAGE: AtomicPtr<libc::c_void> = AtomicPtr::new(std::ptr::null_mut());

/// Runs `case` below in a process of its own.
fn child(case: &str) -> Output {
    let me = std::env::current_exe().expect("own path");
    Command::new(me)
        .args(["--exact", "child_process", "--nocapture", "--test-threads=1"])
        .env("HANDLERS_CASE", case)
        .output()
        .expect("runs")
}

fn assert_fine(output: &Output) {
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("case is through"), "{output:?}");
}

#[test]
fn child_process() {
    let Ok(case) = std::env::var("HANDLERS_CASE") else { return };
    let handled = foreign as *const () as usize;
    match case.as_str() {
        "siginfo" => foreign_handler(libc::SIGSEGV, handled, libc::SA_SIGINFO),
        "plain" => foreign_handler(libc::SIGSEGV, plain as *const () as usize, 0),
        "nodefer" => foreign_handler(libc::SIGSEGV, handled, libc::SA_SIGINFO | libc::SA_NODEFER),
        "altstack" => foreign_handler(libc::SIGSEGV, handled, libc::SA_SIGINFO | libc::SA_ONSTACK),
        "once" => {
            // The second foreign fault finds the default again and kills.
            foreign_handler(libc::SIGSEGV, handled, libc::SA_SIGINFO | libc::SA_RESETHAND);
            fault_once();
        }
        "default" => {
            install(libc::SIGSEGV, libc::SIG_DFL, 0);
            use_a_vanished_page();
            fault_once();
        }
        "default bus" => {
            install(libc::SIGBUS, libc::SIG_DFL, 0);
            use_a_vanished_page();
            // SAFETY: sends a signal that kills.
            unsafe { libc::raise(libc::SIGBUS) };
        }
        "ignored" => {
            install(libc::SIGBUS, libc::SIG_IGN, 0);
            use_a_vanished_page();
            // SAFETY: sends a signal that is ignored.
            unsafe { libc::raise(libc::SIGBUS) };
            use_a_vanished_page();
        }
        "ignored fault" => {
            install(libc::SIGSEGV, libc::SIG_IGN, 0);
            use_a_vanished_page();
            fault_once();
        }
        "sent" => {
            install(libc::SIGBUS, handled, libc::SA_SIGINFO);
            use_a_vanished_page();
            // SAFETY: sends a signal that the handler above takes.
            unsafe { libc::raise(libc::SIGBUS) };
            assert_eq!(CALLS.load(Ordering::Relaxed), 1);
        }
        "overflow" => {
            use_a_vanished_page();
            println!("{}", overflow(1));
        }
        other => panic!("no case {other}"),
    }
    println!("case is through");
}

/// The foreign handler gets its own fault, before and after ours gets one of its own.
fn foreign_handler(signal: libc::c_int, handler: usize, flags: libc::c_int) {
    install(signal, handler, flags);
    use_a_vanished_page();
    assert_eq!(CALLS.load(Ordering::Relaxed), 0, "the foreign handler got a fault of ours");
    fault_once();
    assert_eq!(CALLS.load(Ordering::Relaxed), 1, "the foreign handler did not get its fault");
    use_a_vanished_page();
    assert_eq!(CALLS.load(Ordering::Relaxed), 1);
}

fn install(signal: libc::c_int, handler: usize, flags: libc::c_int) {
    // SAFETY: a zeroed sigaction is valid; the handler has the signature its flags say.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler;
        action.sa_flags = flags;
        libc::sigaddset(&mut action.sa_mask, libc::SIGUSR1);
        assert_eq!(libc::sigaction(signal, &action, std::ptr::null_mut()), 0);
    }
}

/// Two faults of ours: a SIGBUS behind the end of the file, a SIGSEGV in a closed window.
fn use_a_vanished_page() {
    let backing = Backing::memfd(M2, Frames::Contiguous).unwrap();
    let at = host(&backing);
    rustix::fs::ftruncate(other_fd(&backing), 0).unwrap();
    assert!(at.read(0, &mut [0; 64]).is_err());
    assert!(at.load_u64(0).is_err());
    drop(backing);
    assert!(at.write(0, &[0; 5000]).is_err());
    assert!(at.store_u64(0, 0).is_err());
}

/// Reads a page that may not be read; the foreign handler makes it readable.
fn fault_once() {
    // SAFETY: a new mapping, which nobody else knows; the handler changes its protection.
    unsafe {
        let page = libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
        assert_ne!(page, libc::MAP_FAILED);
        PAGE.store(page, Ordering::Relaxed);
        assert_eq!(page.cast::<u8>().read_volatile(), 0);
    }
}

extern "C" fn foreign(signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: called with a valid siginfo; only functions safe in a signal handler are called.
    unsafe {
        let mut mask: libc::sigset_t = std::mem::zeroed();
        libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &mut mask);
        assert_eq!(libc::sigismember(&mask, libc::SIGUSR1), 1, "what this handler wants blocked is blocked");
        let nodefer = std::env::var_os("HANDLERS_CASE").is_some_and(|case| case == "nodefer");
        assert_eq!(libc::sigismember(&mask, signal) == 0, nodefer);
        if (*info).si_code > 0 {
            assert_eq!((*info).si_addr(), PAGE.load(Ordering::Relaxed));
        }
    }
    plain(signal);
}

extern "C" fn plain(_signal: libc::c_int) {
    CALLS.fetch_add(1, Ordering::Relaxed);
    let page = PAGE.load(Ordering::Relaxed);
    if !page.is_null() {
        // SAFETY: our own page.
        unsafe { libc::mprotect(page, 4096, libc::PROT_READ) };
    }
}

#[expect(unconditional_recursion, reason = "that is the point")]
fn overflow(depth: u64) -> u64 {
    let room = std::hint::black_box([depth; 512]);
    overflow(depth + 1) + room[(depth % 512) as usize]
}

#[test]
fn handlers_with_and_without_siginfo() {
    for case in ["siginfo", "plain", "nodefer", "altstack"] {
        assert_fine(&child(case));
    }
}

#[test]
fn sent_signals_are_passed_on() {
    assert_fine(&child("sent"));
    assert_fine(&child("ignored"));
    assert_eq!(child("default bus").status.signal(), Some(libc::SIGBUS));
}

#[test]
fn the_default_still_kills() {
    for case in ["default", "once", "ignored fault"] {
        let output = child(case);
        assert_eq!(output.status.signal(), Some(libc::SIGSEGV), "{case}: {output:?}");
    }
}

#[test]
fn a_stack_overflow_is_still_reported() {
    let output = child("overflow");
    assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("has overflowed its stack"), "{output:?}");
}
