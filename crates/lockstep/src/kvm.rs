//! The link to KVM: guest memory files, memory slots, attributes, vCPUs, and the probe of stage 2. The crate's one file with unsafe code.
//!
//! A [`Vm`] keeps the memory of every slot mapped until the slot is gone (its [`Memory`] has an owner), refuses spans that cannot be
//! right before the kernel is asked, and keeps the private/shared attribute itself where KVM has none. A [`Vcpu`] comes back with an
//! [`Exit`] that is decoded and checked; a [`Kick`] makes it come back. The files in `kvm/` are the safe parts.
//!
//! Structures and their meaning: Linux `Documentation/virt/kvm/api.rst` (4.35, 4.126, 4.140 to 4.142, 5).
#![expect(unsafe_code, reason = "KVM reaches guest memory by address, and kvm_run is shared with the kernel")]

mod attributes;
mod boot;
mod caps;
mod copier;
mod error;
mod exit;
mod hypercall;
mod kick;
mod probe;
mod slots;

pub use attributes::Applied;
pub use boot::{Start, Writer, identity_tables, identity_tables_bytes};
pub use caps::{ATTRIBUTE_PRIVATE, Caps, MemfdFlags};
pub use copier::{Copier, CopierAt};
pub use error::KvmError;
pub use exit::{Exit, ExitCounts, HC_MAP_GPA_RANGE, MapGpaRange};
pub use hypercall::{HypercallInstruction, hypercall_instruction};
pub use kick::Kick;
pub use probe::{ProbeAt, Probed, Prober};

use addr::{Gpa, Hva, Span};
use attributes::Attributes;
use exit::Awaiting;
use kick::Shared;
use kvm_bindings::{
    KVM_CAP_EXIT_HYPERCALL, KVM_MAX_CPUID_ENTRIES, KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_create_guest_memfd,
    kvm_enable_cap, kvm_memory_attributes, kvm_userspace_memory_region, kvm_userspace_memory_region2,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use rustix::mm::{MapFlags, ProtFlags};
use slots::{Slots, Wanted};
use std::any::Any;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::AtomicU8;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Memory that a slot may give to a guest: a part of this process, and an owner that keeps it what it is.
///
/// KVM and the guest read and write it at any time, so it is never a Rust reference. Clones are handles of the same memory.
#[derive(Clone, Debug)]
pub struct Memory {
    hva: Hva,
    len_bytes: u64,
    _owner: Arc<dyn Any + Send + Sync>,
}

impl Memory {
    /// Memory of somebody else.
    ///
    /// The constructor is unsafe and not a trait, so that whoever owns mappings (in Lockstep: `backing`, bridged in this file) makes the
    /// promise in one place and all others pass the handle on.
    ///
    /// # Safety
    /// As long as a clone of `owner` lives, `len_bytes` from `hva` are either mapped as memory meant for a guest, or not accessible;
    /// nothing else is ever mapped there, and no Rust reference to any of it exists.
    pub unsafe fn new(hva: Hva, len_bytes: u64, owner: Arc<dyn Any + Send + Sync>) -> Self {
        Self { hva, len_bytes, _owner: owner }
    }

    /// A shared mapping of a file, of its own: a memfd, or a guest_memfd made with [`MemfdFlags::MMAP`].
    ///
    /// # Errors
    /// When the span is not whole pages, or the kernel will not map it.
    pub fn of_file(file: BorrowedFd<'_>, offset: u64, len_bytes: u64) -> Result<Self, KvmError> {
        let part = slots::aligned("a mapping of a file", addr::Page::new(offset), len_bytes)?;
        let mapping =
            Mapping::new(file, part.start().get(), len_bytes).map_err(|error| KvmError::os("mapping a guest's memory file", error))?;
        Ok(Self { hva: Hva::new(mapping.base as u64), len_bytes, _owner: Arc::new(mapping) })
    }

    /// Where this process sees it.
    pub fn hva(&self) -> Hva {
        self.hva
    }

    /// How much it is.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }
}

/// How a slot is made.
#[derive(Clone, Copy, Debug, Default)]
pub struct SlotOptions<'a> {
    /// The guest_memfd behind the memory, and where in it the slot begins. The memory must be a mapping of that part, where it can be
    /// mapped. `None`: the memory alone.
    pub guest_memfd: Option<(BorrowedFd<'a>, u64)>,
    /// The guest may only read; a write comes back as a register write.
    pub read_only: bool,
    /// KVM notes which pages the guest writes.
    pub log_dirty: bool,
}

/// A virtual machine.
///
/// ```no_run
/// use addr::Gpa;
/// use lockstep_iommu::kvm::{Memory, SlotOptions, Vm};
/// use std::os::fd::AsFd;
/// # use lockstep_iommu as lockstep;
/// let vm = Vm::new()?;
/// let (file, flags) = vm.best_guest_memfd(64 << 20)?;
/// println!("guest memory: guest_memfd, flags {flags:?}");
/// let memory = Memory::of_file(file.as_fd(), 0, 64 << 20)?;
/// vm.set_memslot(0, Gpa::new(0), memory, SlotOptions { guest_memfd: Some((file.as_fd(), 0)), ..Default::default() })?;
/// # Ok::<(), lockstep::kvm::KvmError>(())
/// ```
pub struct Vm {
    kvm: Kvm,
    inner: Arc<Inner>,
}

/// What a VM and its vCPUs hold together: the kernel keeps a VM alive for its vCPUs, so they keep its memory.
struct Inner {
    // Declared first, closed first: before the owners in `slots` let go.
    fd: VmFd,
    caps: Caps,
    slots: Mutex<Slots>,
    attributes: Mutex<Attributes>,
}

impl Vm {
    /// A VM of the default type, in which memory is private by the link's own account only.
    ///
    /// # Errors
    /// When there is no usable /dev/kvm: the message says what to do.
    pub fn new() -> Result<Self, KvmError> {
        Self::of_type(0)
    }

    /// A VM of a `KVM_X86_*_VM` type, as `KVM_CREATE_VM` takes it: 1 is KVM_X86_SW_PROTECTED_VM, which keeps private memory apart.
    ///
    /// # Errors
    /// When there is no usable /dev/kvm, or it knows no such type.
    pub fn of_type(vm_type: u64) -> Result<Self, KvmError> {
        let kvm = Kvm::new().map_err(|error| KvmError::at(error::OPEN, error))?;
        if kvm.get_api_version() != 12 {
            return Err(KvmError::Missing { what: "API version 12", hint: "this is no KVM that anybody has used since 2007" });
        }
        let fd = kvm.create_vm_with_type(vm_type).map_err(|error| KvmError::at("creating a VM", error))?;
        let caps = Caps::of(&fd);
        let inner = Inner { fd, caps, slots: Mutex::new(Slots::new()), attributes: Mutex::new(Attributes::new()) };
        let vm = Self { kvm, inner: Arc::new(inner) };
        if caps.exit_hypercall >> HC_MAP_GPA_RANGE & 1 == 1 {
            let mut wanted = kvm_enable_cap { cap: KVM_CAP_EXIT_HYPERCALL, ..Default::default() };
            wanted.args[0] = 1 << HC_MAP_GPA_RANGE;
            vm.inner.fd.enable_cap(&wanted).map_err(|error| KvmError::at("asking for hypercall exits", error))?;
        }
        Ok(vm)
    }

    /// What this VM can do.
    pub fn caps(&self) -> &Caps {
        &self.inner.caps
    }

    /// A guest_memfd of `len_bytes`, bound to this VM.
    ///
    /// # Errors
    /// `Span` when it is not whole pages, `Missing` when KVM has none or not with these flags, and what the kernel says.
    pub fn create_guest_memfd(&self, len_bytes: u64, flags: MemfdFlags) -> Result<OwnedFd, KvmError> {
        slots::aligned("a guest_memfd", addr::Page::new(0), len_bytes)?;
        if !self.caps().guest_memfd {
            return Err(KvmError::Missing { what: "guest_memfd", hint: "Linux 6.8 and later have it; use a memfd" });
        }
        if !self.caps().memfd_flags.has(flags) {
            return Err(KvmError::Missing {
                what: "a guest_memfd with these flags",
                hint: "MMAP and INIT_SHARED came with Linux 6.18; use a memfd",
            });
        }
        let wanted = kvm_create_guest_memfd { size: len_bytes, flags: flags.bits(), ..Default::default() };
        let fd = self.inner.fd.create_guest_memfd(wanted).map_err(|error| KvmError::at("creating a guest_memfd", error))?;
        // SAFETY: a descriptor that the kernel just made for us.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// The most useful guest_memfd this VM can have: mappable and shared from the start, so that guest, host and devices reach the same
    /// bytes; where there is no such thing, one that cannot be mapped. Answers which it is.
    ///
    /// # Errors
    /// As [`Vm::create_guest_memfd`].
    pub fn best_guest_memfd(&self, len_bytes: u64) -> Result<(OwnedFd, MemfdFlags), KvmError> {
        let best = MemfdFlags::MMAP | MemfdFlags::INIT_SHARED;
        let flags = if self.caps().memfd_flags.has(best) { best } else { MemfdFlags::NONE };
        Ok((self.create_guest_memfd(len_bytes, flags)?, flags))
    }

    /// Gives the guest `memory` at `gpa`. KVM may reach it from now on until the slot is removed, or the VM and its vCPUs are gone; so
    /// long it stays mapped.
    ///
    /// # Errors
    /// Spans that are empty, wrap, are misaligned, lie over another slot or past the file's end, and slot numbers in use or too large,
    /// are refused before the kernel is asked; and what the kernel says.
    pub fn set_memslot(&self, slot: u32, gpa: Gpa, memory: Memory, options: SlotOptions<'_>) -> Result<Span<Gpa>, KvmError> {
        let mut slots = lock(&self.inner.slots);
        let file = match options.guest_memfd {
            Some((fd, offset)) => {
                let stat = rustix::fs::fstat(fd).map_err(|error| KvmError::os("asking for a guest_memfd's length", error.into()))?;
                Some((offset, stat.st_size.cast_unsigned()))
            }
            None => None,
        };
        let wanted = Wanted { number: slot, gpa, len_bytes: memory.len_bytes, memory: &memory, file };
        let span = slots.check(&wanted, self.caps().slots)?;
        self.set_region(slot, span.start(), Some(&memory), options)?;
        slots.add(slot, span, memory)?;
        Ok(span)
    }

    /// Takes a slot's memory away from the guest. When this returns, KVM does not reach it any more.
    ///
    /// # Errors
    /// `NoSlot`, and what the kernel says; the slot is there still, then.
    pub fn remove_memslot(&self, slot: u32) -> Result<Span<Gpa>, KvmError> {
        let mut slots = lock(&self.inner.slots);
        let span = slots.find(slot)?;
        self.set_region(slot, span.start(), None, SlotOptions::default())?;
        slots.remove(span);
        Ok(span)
    }

    /// The slots as they were given to KVM, by address.
    pub fn memslots(&self) -> Vec<(u32, Span<Gpa>)> {
        lock(&self.inner.slots).list()
    }

    /// `memory: None` removes the slot.
    fn set_region(&self, slot: u32, gpa: Gpa, memory: Option<&Memory>, options: SlotOptions<'_>) -> Result<(), KvmError> {
        let step = if memory.is_some() { "setting a memory slot" } else { "removing a memory slot" };
        let flag = |on: bool, bit: u32| if on { bit } else { 0 };
        let flags = flag(options.read_only, KVM_MEM_READONLY) | flag(options.log_dirty, KVM_MEM_LOG_DIRTY_PAGES);
        let (memory_size, userspace_addr) = memory.map_or((0, 0), |memory| (memory.len_bytes, memory.hva.get()));
        let fd = &self.inner.fd;
        let result = match options.guest_memfd {
            Some(_) if !self.caps().user_memory2 => {
                return Err(KvmError::Missing { what: "slots with a guest_memfd", hint: "Linux 6.8 and later have them; use a memfd" });
            }
            Some((file, guest_memfd_offset)) => {
                let region = kvm_userspace_memory_region2 {
                    slot,
                    flags: flags | KVM_MEM_GUEST_MEMFD,
                    guest_phys_addr: gpa.get(),
                    memory_size,
                    userspace_addr,
                    guest_memfd_offset,
                    guest_memfd: file.as_raw_fd().cast_unsigned(),
                    ..Default::default()
                };
                // SAFETY: the caller keeps the memory's owner until the slot is removed, so the addresses mean guest memory for as long
                // as KVM may use them (the promise of `Memory::new`).
                unsafe { fd.set_user_memory_region2(region) }
            }
            None => {
                let region = kvm_userspace_memory_region { slot, flags, guest_phys_addr: gpa.get(), memory_size, userspace_addr };
                // SAFETY: as above.
                unsafe { fd.set_user_memory_region(region) }
            }
        };
        result.map_err(|error| KvmError::at(step, error))
    }

    /// Notes that `span` is private to the guest, or shared: in KVM where this VM has the attribute, and in the link's own account always.
    ///
    /// # Errors
    /// `Span` when it is not whole pages, and what the kernel says; nothing has changed then.
    pub fn set_private(&self, span: Span<Gpa>, private: bool) -> Result<Applied, KvmError> {
        slots::aligned("an attribute's span", span.start(), span.len())?;
        let mut attributes = lock(&self.inner.attributes);
        attributes.reserve()?;
        let applied = if self.caps().attributes & ATTRIBUTE_PRIVATE != 0 {
            let wanted = kvm_memory_attributes {
                address: span.start().get(),
                size: span.len(),
                attributes: if private { ATTRIBUTE_PRIVATE } else { 0 },
                flags: 0,
            };
            self.inner.fd.set_memory_attributes(wanted).map_err(|error| KvmError::at("setting memory attributes", error))?;
            Applied::Kernel
        } else {
            Applied::Recorded
        };
        attributes.set(span, private)?;
        Ok(applied)
    }

    /// Whether the page at `gpa` was set private.
    pub fn is_private(&self, gpa: Gpa) -> bool {
        lock(&self.inner.attributes).is_private(gpa)
    }

    /// The runs of `span`, each with whether it is private.
    pub fn private_runs(&self, span: Span<Gpa>) -> Vec<(Span<Gpa>, bool)> {
        lock(&self.inner.attributes).runs(span)
    }

    /// All private spans, by address; everything else is shared.
    pub fn private_spans(&self) -> Vec<Span<Gpa>> {
        lock(&self.inner.attributes).list()
    }

    /// A vCPU with the features this KVM supports.
    ///
    /// # Errors
    /// When the number is taken, or the kernel says so.
    pub fn create_vcpu(&self, id: u32) -> Result<Vcpu, KvmError> {
        let fd = self.inner.fd.create_vcpu(id.into()).map_err(|error| KvmError::at("creating a vCPU", error))?;
        let cpuid = self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(|error| KvmError::at("asking for CPUID", error))?;
        fd.set_cpuid2(&cpuid).map_err(|error| KvmError::at("setting a vCPU's CPUID", error))?;
        // SAFETY: the descriptor is open.
        let run = RunPage::new(unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) });
        let run = run.map_err(|error| KvmError::os("mapping a vCPU's run page", error))?;
        Ok(Vcpu {
            fd,
            shared: Arc::new(Shared::new(run)),
            awaiting: Awaiting::Nothing,
            counts: ExitCounts::default(),
            kicked: false,
            _vm: self.inner.clone(),
        })
    }

    /// The file descriptor, for ioctls that the link does not know.
    pub fn fd(&self) -> &VmFd {
        &self.inner.fd
    }
}

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
    fn settle(&mut self) {
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

/// A shared mapping of a file of our own.
#[derive(Debug)]
struct Mapping {
    base: usize,
    len: usize,
}

impl Mapping {
    fn new(file: BorrowedFd<'_>, offset: u64, len_bytes: u64) -> io::Result<Self> {
        let len = usize::try_from(len_bytes).map_err(|_| io::ErrorKind::OutOfMemory)?;
        // SAFETY: a new mapping where the kernel finds room takes nothing away from anybody.
        let base = unsafe { rustix::mm::mmap(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, file, offset)? };
        Ok(Self { base: base.expose_provenance(), len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length, and unmapped only here. A failure leaves it mapped, which harms nobody.
        let _still_mapped = unsafe { rustix::mm::munmap(ptr::with_exposed_provenance_mut(self.base), self.len) };
    }
}

/// A second mapping of a vCPU's run page. kvm-ioctls holds `&mut` references to the first one while the vCPU runs; through this one
/// another thread can set `immediate_exit` without reaching under them.
struct RunPage(Mapping);

impl RunPage {
    fn new(vcpu: BorrowedFd<'_>) -> io::Result<Self> {
        Mapping::new(vcpu, 0, addr::PAGE_BYTES).map(Self)
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        let run = ptr::with_exposed_provenance_mut::<kvm_bindings::kvm_run>(self.0.base);
        // SAFETY: mapped as long as `self`; a byte that the kernel and other threads read and write, and this process by atomics only.
        unsafe { AtomicU8::from_ptr(&raw mut (*run).immediate_exit) }
    }
}

/// Sends `signal` to a thread of this process; one that is gone is no error.
fn signal_thread(thread: i32, signal: i32) {
    // SAFETY: tgkill reads no memory; the process id keeps the signal inside this process even if the number was given out again.
    let _gone = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal) };
}

/// Gives the highest real-time signal that nobody has a handler on one that does nothing. Answers its number.
///
/// It stays installed, with SA_RESTART, so that a kick that comes late disturbs no other system call.
fn claim_signal() -> Option<i32> {
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
fn unblock_signal(signal: i32) {
    // SAFETY: a signal set is plain data; only the calling thread's mask changes.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, signal);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, ptr::null_mut());
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is complete or has not begun when something can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::sync::atomic::{AtomicBool, Ordering};

    struct Owner(Arc<AtomicBool>, Mapping);

    impl Drop for Owner {
        fn drop(&mut self) {
            assert!(self.1.len > 0);
            self.0.store(true, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_slot_keeps_its_memory_and_gives_it_back() {
        let vm = match Vm::new() {
            Ok(vm) => vm,
            Err(error) => return println!("skipped: {error}"),
        };
        let file = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 0x1000).unwrap();
        let gone = Arc::new(AtomicBool::new(false));
        let mapping = Mapping::new(file.as_fd(), 0, 0x1000).unwrap();
        let hva = Hva::new(mapping.base as u64);
        // SAFETY: the owner holds a mapping of these bytes, and nobody has a reference into it.
        let memory = unsafe { Memory::new(hva, 0x1000, Arc::new(Owner(gone.clone(), mapping))) };
        let span = vm.set_memslot(3, Gpa::new(0x1000_0000), memory.clone(), SlotOptions::default()).unwrap();
        assert!(vm.set_memslot(4, span.start(), memory, SlotOptions::default()).is_err());
        assert!(!gone.load(Ordering::SeqCst));
        assert_eq!(vm.remove_memslot(3).unwrap(), span);
        assert!(gone.load(Ordering::SeqCst));
        // The number and the place are free again.
        let again = Memory::of_file(file.as_fd(), 0, 0x1000).unwrap();
        vm.set_memslot(3, span.start(), again, SlotOptions::default()).unwrap();
    }

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
