//! A virtual machine: its slots and attributes, and what it makes.

use super::attributes::{Applied, Attributes};
use super::memory::{Memory, SlotOptions};
use super::slots::{self, Slots, Wanted};
use super::vcpu::{RunPage, Vcpu};
use super::{ATTRIBUTE_PRIVATE, Caps, HC_MAP_GPA_RANGE, KvmError, MemfdFlags, error, lock};
use addr::{Gpa, Span};
use kvm_bindings::{
    KVM_CAP_EXIT_HYPERCALL, KVM_MAX_CPUID_ENTRIES, KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_create_guest_memfd,
    kvm_enable_cap, kvm_memory_attributes, kvm_userspace_memory_region, kvm_userspace_memory_region2,
};
use kvm_ioctls::{Kvm, VmFd};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex};
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
pub(super) struct Inner {
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
        let wanted = Wanted { number: slot, gpa, len_bytes: memory.len_bytes(), memory: &memory, file };
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
        let (memory_size, userspace_addr) = memory.map_or((0, 0), |memory| (memory.len_bytes(), memory.hva().get()));
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
        Ok(Vcpu::new(fd, run, Arc::clone(&self.inner)))
    }

    /// The file descriptor, for ioctls that the link does not know.
    pub fn fd(&self) -> &VmFd {
        &self.inner.fd
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::Mapping;
    use super::*;
    use addr::Hva;
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
}
