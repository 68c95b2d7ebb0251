//! The guest in a KVM virtual machine: memory slot, vCPU, its exits, and the vCPU that probes stage 2 when the guest has stopped.

use crate::run::devices::Devices;
use crate::run::machine::Failure;
use addr::Gpa;
use backing::{Backing, Kind};
use guest::{CONTROL, Features, IMAGE, Layout, Platform, STACK_TOP};
use lockstep::kvm::{
    Exit, HypercallInstruction, MemfdFlags, Memory, ProbeAt, Probed, Prober, SlotOptions, Start, Vcpu, Vm, hypercall_instruction,
    identity_tables,
};
use lockstep::{GuestDma, KvmStage2, Stage2};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A VM, before and after its vCPU runs.
pub(crate) struct KvmGuest {
    vm: Arc<Vm>,
    features: Features,
    root: Gpa,
    exits: Arc<AtomicU64>,
}

/// A vCPU at the guest program's first instruction.
pub(crate) struct Running {
    vcpu: Vcpu,
    exits: Arc<AtomicU64>,
}

/// Where the probing vCPU talks to the host: no memory, no device of the run.
const PROBE_REGISTER: Gpa = Gpa::new(0xfe03_0000);
/// Memory and registers lie below this.
const MAPPED_BYTES: u64 = 4 << 30;

impl KvmGuest {
    pub(crate) fn new() -> Result<Self, Failure> {
        let vm = Arc::new(Vm::new()?);
        let features = match hypercall_instruction()? {
            Some(HypercallInstruction::Vmcall) => Features::HYPERCALL.and(Features::VMCALL),
            Some(HypercallInstruction::Vmmcall) => Features::HYPERCALL,
            None => Features::default(),
        };
        Ok(Self { vm, features, root: Gpa::new(0), exits: Arc::default() })
    }

    /// A guest_memfd that the host can map: without that no user program could move its bytes.
    pub(crate) fn guest_memfd(&self, len_bytes: u64) -> Result<OwnedFd, Failure> {
        let (file, flags) = self.vm.best_guest_memfd(len_bytes)?;
        if !flags.has(MemfdFlags::MMAP) || !flags.has(MemfdFlags::INIT_SHARED) {
            return Err("this kernel's guest_memfd cannot be mapped (Linux 6.18 and later can)".into());
        }
        Ok(file)
    }

    pub(crate) fn stage2(&self) -> Arc<dyn Stage2> {
        KvmStage2::new(&self.vm)
    }

    pub(crate) fn features(&self) -> Features {
        self.features
    }

    /// Gives the VM its memory and its vCPU.
    pub(crate) fn start(&mut self, dma: &Arc<GuestDma>, backing: &Arc<Backing>, layout: &Layout) -> Result<Running, Failure> {
        let file = backing.file().ok_or("the memory has no file that a VM could use")?;
        let memory = Memory::of_file(file, 0, backing.len_bytes())?;
        let guest_memfd = (backing.kind() == Kind::GuestMemfd).then_some((file, 0));
        self.vm.set_memslot(0, Gpa::new(0), memory, SlotOptions { guest_memfd, ..SlotOptions::default() })?;
        self.root = identity_tables(layout.tables, MAPPED_BYTES, &mut |gpa, bytes| dma.write(gpa, bytes).map_err(io::Error::other))?;
        let mut vcpu = self.vm.create_vcpu(0)?;
        vcpu.start_in_long_mode(Start { root: self.root, entry: IMAGE, stack: STACK_TOP, args: [0, CONTROL.get()] })?;
        Ok(Running { vcpu, exits: Arc::clone(&self.exits) })
    }

    /// What a vCPU reads at each address; `None` where it reads nothing.
    pub(crate) fn probe(&self, dma: &GuestDma, scratch: Gpa, gpas: &[Gpa]) -> Result<Vec<Option<u64>>, Failure> {
        let at = ProbeAt { scratch, root: self.root, register: PROBE_REGISTER };
        let mut prober = Prober::new(&self.vm, 1, at, &mut |gpa, bytes| dma.write(gpa, bytes).map_err(io::Error::other))?;
        let value = |probed| if let Probed::Value(value) = probed { Some(value) } else { None };
        Ok(prober.probe(gpas)?.into_iter().map(value).collect())
    }

    pub(crate) fn exits(&self) -> u64 {
        self.exits.load(Ordering::Relaxed)
    }
}

impl Running {
    /// Serves the guest's exits until it halts: it looks at its stop flag after each round.
    pub(crate) fn run(mut self, devices: &mut Devices) -> Result<(), Failure> {
        let ended = self.serve(devices);
        self.exits.store(self.vcpu.exits().total(), Ordering::Relaxed);
        ended
    }

    fn serve(&mut self, devices: &mut Devices) -> Result<(), Failure> {
        loop {
            match self.vcpu.run()? {
                Exit::MmioRead { gpa, len_bytes } => {
                    let value = devices.mmio_read(gpa, len_bytes);
                    self.vcpu.answer_mmio(value);
                }
                Exit::MmioWrite { gpa, len_bytes, value } => devices.mmio_write(gpa, len_bytes, value),
                Exit::MapGpaRange(range) => {
                    let args = [range.span.start().get(), range.span.len() / addr::PAGE_BYTES, u64::from(range.private) << 4];
                    let result = devices.hypercall(guest::registers::HC_MAP_GPA_RANGE, args);
                    self.vcpu.answer_hypercall(result);
                }
                Exit::MemoryFault { gpa, len_bytes, private } => {
                    // KVM keeps attributes and the guest wants the other kind: an implicit conversion.
                    let pages = len_bytes.max(addr::PAGE_BYTES) / addr::PAGE_BYTES;
                    devices.implicit(Gpa::new(gpa.get() & !(addr::PAGE_BYTES - 1)), pages, private)?;
                }
                Exit::Halt => return Ok(()),
                Exit::Interrupted => {}
                exit => return Err(format!("the guest left with {exit:?}").into()),
            }
        }
    }
}
