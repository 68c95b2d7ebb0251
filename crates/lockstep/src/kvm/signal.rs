//! The signal of a kick: taken from those that the process does not use.

use std::ptr;

/// Sends `signal` to a thread of this process; one that is gone is no error.
pub(super) fn signal_thread(thread: i32, signal: i32) {
    // SAFETY: tgkill reads no memory; the process id keeps the signal inside this process even if the number was given out again.
    let _gone = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal) };
}

/// Gives the highest real-time signal that nobody has a handler on one that does nothing. Answers its number.
///
/// It stays installed, with SA_RESTART, so that a kick that comes late disturbs no other system call.
pub(super) fn claim_signal() -> Option<i32> {
    extern "C" fn nothing(_signal: i32) {}
    (libc::SIGRTMIN()..=libc::SIGRTMAX()).rev().find(|signal| {
        // SAFETY: sigaction structures are plain data, for which zero is a value; the handler is async-signal-safe, as it does nothing.
        unsafe {
            let mut old: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(*signal, ptr::null(), &raw mut old) != 0 || old.sa_sigaction != libc::SIG_DFL {
                return false;
            }
            let mut new: libc::sigaction = std::mem::zeroed();
            new.sa_sigaction = nothing as extern "C" fn(i32) as usize;
            new.sa_flags = libc::SA_RESTART;
            libc::sigaction(*signal, &raw const new, ptr::null_mut()) == 0
        }
    })
}

/// Lets `signal` through in the calling thread.
pub(super) fn unblock_signal(signal: i32) {
    // SAFETY: a signal set is plain data; only the calling thread's mask changes.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, signal);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, ptr::null_mut());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_keeps_its_signal_handlers() {
        extern "C" fn own(_signal: i32) {}
        let handler = |signal: i32| {
            // SAFETY: only asks.
            unsafe {
                let mut old: libc::sigaction = std::mem::zeroed();
                assert_eq!(libc::sigaction(signal, ptr::null(), &raw mut old), 0);
                old.sa_sigaction
            }
        };
        let taken = (libc::SIGRTMIN()..=libc::SIGRTMAX()).rev().find(|signal| handler(*signal) == libc::SIG_DFL).unwrap();
        let own = own as extern "C" fn(i32) as usize;
        // SAFETY: the handler does nothing.
        unsafe { libc::signal(taken, own) };
        let claimed = claim_signal().unwrap();
        assert_ne!(claimed, taken);
        assert_eq!(handler(taken), own);
        let next = claim_signal().unwrap();
        assert!(next != claimed && next != taken);
    }
}
