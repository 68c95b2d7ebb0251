//! Making a vCPU come back from another thread: `immediate_exit` for a run that has not begun, a signal for one that has.
//!
//! The signal is a real-time one on which the process had no handler; the process' own handlers stay as they are.
#![forbid(unsafe_code)]

use super::signal::{claim_signal, signal_thread, unblock_signal};
use super::vcpu::RunPage;
use super::{KvmError, lock};
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

/// The process' kick signal, once somebody wanted one.
static SIGNAL: OnceLock<Option<i32>> = OnceLock::new();

/// What a vCPU and its kicks share.
pub(super) struct Shared {
    /// `None` when the vCPU is gone.
    page: Mutex<Option<RunPage>>,
    /// The thread inside KVM_RUN, 0 = none.
    thread: AtomicI32,
    requested: AtomicBool,
}

/// The calling thread is inside KVM_RUN while this lives.
pub(super) struct Inside<'a>(&'a Shared);

impl Shared {
    pub(super) fn new(page: RunPage) -> Self {
        Self { page: Mutex::new(Some(page)), thread: AtomicI32::new(0), requested: AtomicBool::new(false) }
    }

    /// The thread is named before the kernel reads `immediate_exit`, and a kick sets that before it looks for a thread (both
    /// sequentially consistent): one of the two sees the other, so no kick is lost.
    pub(super) fn enter(&self) -> Inside<'_> {
        thread_local! {
            static THREAD: i32 = rustix::thread::gettid().as_raw_nonzero().get();
            static UNBLOCKED: Cell<bool> = const { Cell::new(false) };
        }
        if let Some(Some(signal)) = SIGNAL.get()
            && !UNBLOCKED.replace(true)
        {
            unblock_signal(*signal);
        }
        self.thread.store(THREAD.with(|id| *id), Ordering::SeqCst);
        Inside(self)
    }

    /// Whether a kick is what made the vCPU come back; and the next run may begin.
    pub(super) fn take_request(&self) -> bool {
        let page = lock(&self.page);
        if let Some(page) = &*page {
            page.immediate_exit().store(0, Ordering::SeqCst);
        }
        self.requested.swap(false, Ordering::SeqCst)
    }

    /// Runs `run` with `immediate_exit` set, and leaves it set only if somebody kicked.
    pub(super) fn at_once(&self, run: impl FnOnce()) {
        let page = lock(&self.page);
        let Some(page) = &*page else { return };
        page.immediate_exit().store(1, Ordering::SeqCst);
        run();
        page.immediate_exit().store(self.requested.load(Ordering::SeqCst).into(), Ordering::SeqCst);
    }

    pub(super) fn close(&self) {
        *lock(&self.page) = None;
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.thread.store(0, Ordering::SeqCst);
    }
}

/// Makes a vCPU come back with [`Exit::Interrupted`](super::Exit::Interrupted). Clones kick the same vCPU.
#[derive(Clone)]
pub struct Kick {
    shared: Arc<Shared>,
    signal: i32,
}

impl Kick {
    pub(super) fn new(shared: Arc<Shared>) -> Result<Self, KvmError> {
        let signal = SIGNAL.get_or_init(claim_signal).ok_or(KvmError::NoSignal)?;
        Ok(Self { shared, signal })
    }

    /// Now, or as soon as it runs the next time. Kicks that it has not seen yet count as one; after the vCPU is gone nothing happens.
    pub fn kick(&self) {
        let page = lock(&self.shared.page);
        let Some(page) = &*page else { return };
        self.shared.requested.store(true, Ordering::SeqCst);
        page.immediate_exit().store(1, Ordering::SeqCst);
        let thread = self.shared.thread.load(Ordering::SeqCst);
        if thread != 0 {
            signal_thread(thread, self.signal);
        }
    }

    /// The signal it uses; a thread that runs the vCPU must not block it.
    pub fn signal(&self) -> i32 {
        self.signal
    }
}
