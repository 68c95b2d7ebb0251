//! A virtual CPU, and the page that it shares with the kernel.

use super::exit::{self, Awaiting};
use super::kick::Shared;
use super::memory::Mapping;
use super::vm::Inner;
use super::{Exit, ExitCounts, Kick, KvmError};
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::AtomicU8;
/// A virtual CPU. It runs in whatever thread calls [`Vcpu::run`].
pub struct Vcpu {
    fd: VcpuFd,
    shared: Arc<Shared>,
    awaiting: Awaiting,
    counts: ExitCounts,
    kicked: bool,
    _vm: Arc<Inner>,
}

impl Vcpu {
    pub(super) fn new(fd: VcpuFd, run: RunPage, vm: Arc<Inner>) -> Self {
        let shared = Arc::new(Shared::new(run));
        Self { fd, shared, awaiting: Awaiting::Nothing, counts: ExitCounts::default(), kicked: false, _vm: vm }
    }

    /// Runs the guest until it wants something.
    ///
    /// A read or hypercall that was not answered is answered with all ones, or "no such call".
    ///
    /// # Errors
    /// What the kernel says; being interrupted and memory faults are exits.
    pub fn run(&mut self) -> Result<Exit, KvmError> {
        self.awaiting = Awaiting::Nothing;
        self.kicked = false;
        let inside = self.shared.enter();
        let result = self.fd.run();
        drop(inside);
        let mut exit = match result {
            Ok(exit) => {
                let (exit, awaiting) = exit::decode(exit);
                self.awaiting = awaiting;
                exit
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Exit::Interrupted,
            Err(error) => return Err(KvmError::at("running a vCPU", error)),
        };
        match &mut exit {
            Exit::Interrupted => self.kicked = self.shared.take_request(),
            Exit::Other { reason } => *reason = self.fd.get_kvm_run().exit_reason,
            _ => {}
        }
        self.counts.count(&exit);
        Ok(exit)
    }

    /// Answers the [`Exit::MmioRead`] that [`Vcpu::run`] returned last; after any other exit it does nothing.
    pub fn answer_mmio(&mut self, value: u64) {
        if let Awaiting::Mmio { len_bytes } = self.awaiting {
            let len = usize::from(len_bytes).min(8);
            // SAFETY: the exit was an MMIO exit, so that is the union's live field; it is plain bytes.
            let data = unsafe { &mut self.fd.get_kvm_run().__bindgen_anon_1.mmio.data };
            data[..len].copy_from_slice(&value.to_le_bytes()[..len]);
        }
    }

    /// Answers the [`Exit::MapGpaRange`] or [`Exit::Hypercall`] that [`Vcpu::run`] returned last; after any other exit it does nothing.
    pub fn answer_hypercall(&mut self, result: u64) {
        if self.awaiting == Awaiting::Hypercall {
            self.fd.get_kvm_run().__bindgen_anon_1.hypercall.ret = result;
        }
    }

    /// Completes what the guest is waiting for, without running it on: KVM finishes a register access only at the next run, and would write
    /// over registers that were set before.
    pub(super) fn settle(&mut self) {
        self.awaiting = Awaiting::Nothing;
        let fd = &mut self.fd;
        // A wide access may take several rounds, each of which is an exit.
        self.shared.at_once(|| while fd.run().is_ok_and(|exit| matches!(exit, VcpuExit::MmioRead(..) | VcpuExit::MmioWrite(..))) {});
    }

    /// A handle that makes this vCPU come back from [`Vcpu::run`], now or the next time, from any thread.
    ///
    /// # Errors
    /// `NoSignal` when the process has a handler on every real-time signal.
    pub fn kick(&self) -> Result<Kick, KvmError> {
        Kick::new(self.shared.clone())
    }

    /// Whether the last exit was [`Exit::Interrupted`] by a [`Kick`], and not by a signal of the process.
    pub fn was_kicked(&self) -> bool {
        self.kicked
    }

    /// How often it came back, by kind.
    pub fn exits(&self) -> ExitCounts {
        self.counts
    }

    /// The file descriptor, for registers and ioctls that the link does not know.
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.shared.close();
    }
}

/// A second mapping of a vCPU's run page. kvm-ioctls holds `&mut` references to the first one while the vCPU runs; through this one
/// another thread can set `immediate_exit` without reaching under them.
pub(super) struct RunPage(Mapping);

impl RunPage {
    pub(super) fn new(vcpu: BorrowedFd<'_>) -> io::Result<Self> {
        Mapping::new(vcpu, 0, addr::PAGE_BYTES).map(Self)
    }

    pub(super) fn immediate_exit(&self) -> &AtomicU8 {
        let run = ptr::with_exposed_provenance_mut::<kvm_bindings::kvm_run>(self.0.base);
        // SAFETY: mapped as long as `self`; a byte that the kernel and other threads read and write, and this process by atomics only.
        unsafe { AtomicU8::from_ptr(&raw mut (*run).immediate_exit) }
    }
}
