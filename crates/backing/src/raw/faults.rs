//! The handler of SIGSEGV and SIGBUS: a fault in one of our copies ends the copy, every other goes where it would have gone without us.

use super::machine;
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Once, OnceLock};

/// The handlers that were there before ours: of SIGSEGV, of SIGBUS.
static BEFORE: OnceLock<[libc::sigaction; 2]> = OnceLock::new();
/// Which of them asked to be called once only (SA_RESETHAND) and has been: bit 0, bit 1.
static SPENT: AtomicU8 = AtomicU8::new(0);
const SIGNALS: [libc::c_int; 2] = [libc::SIGSEGV, libc::SIGBUS];

/// Puts our handler in front of the present ones. A handler installed later must pass on what it does not know, as ours does; a thread that
/// blocks these signals is killed by the kernel when it faults.
pub(super) fn install_handlers() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        machine::prepare();
        if !cfg!(target_arch = "x86_64") {
            return;
        }
        // What a fault must be passed on to has to be known before the first one can arrive.
        let before = BEFORE.get_or_init(|| {
            SIGNALS.map(|signal| {
                // SAFETY: all zeroes is a valid sigaction, and sigaction fills it in.
                unsafe {
                    let mut before: libc::sigaction = std::mem::zeroed();
                    libc::sigaction(signal, ptr::null(), &mut before);
                    before
                }
            })
        });
        for (signal, before) in SIGNALS.into_iter().zip(before) {
            // SAFETY: as above; `on_fault` has the signature that SA_SIGINFO asks for. Neither call can fail for these signals.
            unsafe {
                let mut ours: libc::sigaction = std::mem::zeroed();
                ours.sa_sigaction = on_fault as *const () as usize;
                // On the alternate stack where the thread has one: a stack overflow must still reach whoever reports it.
                ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | (before.sa_flags & libc::SA_RESTART);
                libc::sigemptyset(&mut ours.sa_mask);
                libc::sigaction(signal, &ours, ptr::null_mut());
            }
        }
    });
}

extern "C" fn on_fault(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a handler with SA_SIGINFO a valid siginfo and context.
    let code = unsafe { (*info).si_code };
    // Only what the processor found at this very instruction has a context that says what faulted: not kill(), whose codes are not
    // positive, nor news of broken memory somewhere else.
    let sent = code <= 0 || (signal == libc::SIGBUS && code == libc::BUS_MCEERR_AO);
    // SAFETY: as above, and the fault was synchronous.
    if !sent && unsafe { machine::abandon(context.cast()) } {
        return;
    }
    pass_on(signal, info, context, sent);
}

/// Does what the kernel would have done, had our handler not been there.
#[cold]
fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void, sent: bool) {
    let slot = usize::from(signal == libc::SIGBUS);
    let Some(before) = BEFORE.get().map(|before| &before[slot]) else { return };
    let spent = 1 << slot;
    let handler = if SPENT.load(Ordering::Relaxed) & spent == 0 { before.sa_sigaction } else { libc::SIG_DFL };
    // SAFETY: only functions that are safe in a signal handler are called; a handler that was installed is a function of the kind its
    // flags say.
    unsafe {
        match handler {
            // The kernel does not let a process ignore its own faults.
            libc::SIG_IGN if sent => {}
            libc::SIG_DFL | libc::SIG_IGN => {
                let mut default: libc::sigaction = std::mem::zeroed();
                default.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(signal, &default, ptr::null_mut());
                // A fault happens again when we return, and kills with the right address; a sent signal has to be sent again.
                if sent {
                    libc::raise(signal);
                }
            }
            handler => {
                if before.sa_flags & libc::SA_RESETHAND != 0 {
                    SPENT.fetch_or(spent, Ordering::Relaxed);
                }
                // What was blocked before comes back when our handler returns.
                libc::pthread_sigmask(libc::SIG_BLOCK, &before.sa_mask, ptr::null_mut());
                if before.sa_flags & libc::SA_NODEFER != 0 {
                    let mut own: libc::sigset_t = std::mem::zeroed();
                    libc::sigaddset(&mut own, signal);
                    libc::pthread_sigmask(libc::SIG_UNBLOCK, &own, ptr::null_mut());
                }
                if before.sa_flags & libc::SA_SIGINFO != 0 {
                    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = std::mem::transmute(handler);
                    handler(signal, info, context);
                } else {
                    let handler: extern "C" fn(libc::c_int) = std::mem::transmute(handler);
                    handler(signal);
                }
            }
        }
    }
}
