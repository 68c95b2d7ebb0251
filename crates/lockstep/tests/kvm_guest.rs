//! The guest program in a real VM: satisfied by the host that satisfies it in a thread, and asking it for the very same things.

use addr::{Gpa, Span};
use guest::model::Host;
use guest::{CONTROL, Features, IMAGE, Layout, PageState, Platform, REPORT, Report, STACK_TOP, STOP, Setup};
use lockstep_iommu::kvm::{
    Exit, ExitCounts, HypercallInstruction, MemfdFlags, Memory, SlotOptions, Start, Vm, hypercall_instruction, identity_tables,
};
use rustix::fs::{ftruncate, memfd_create};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;
use zerocopy::{FromZeros, IntoBytes};

const MEMORY: u64 = 16 << 20;

fn setup(seed: u64, max_rounds: u64, features: Features) -> Setup {
    Setup { layout: Layout::new(MEMORY).unwrap(), seed, features, initial: PageState::Private, max_rounds }
}

fn report(ram: &guest::Memory) -> Report {
    let mut report = Report::new_zeroed();
    ram.read(REPORT, report.as_mut_bytes()).unwrap();
    report
}

/// The program in a VM until it halts; `wrap` stands between it and a right host. `None` where there is no KVM.
fn in_a_vm<P: Platform>(setup: Setup, wrap: impl FnOnce(Host, &guest::Memory) -> P) -> Option<(Report, P, ExitCounts)> {
    let vm = Vm::new().inspect_err(|error| println!("skipped: {error}")).ok()?;
    let (file, guest_memfd) = guest_file(&vm);
    let ram = guest::Memory::of_file(file.as_fd(), 0, MEMORY).unwrap();
    let options = SlotOptions { guest_memfd: guest_memfd.then_some((file.as_fd(), 0)), ..Default::default() };
    vm.set_memslot(0, Gpa::new(0), Memory::of_file(file.as_fd(), 0, MEMORY).unwrap(), options).unwrap();
    let mut write = |gpa: Gpa, bytes: &[u8]| ram.write(gpa, bytes).map_err(io::Error::other);
    setup.load(&mut write).unwrap();
    let root = identity_tables(setup.layout.tables, 4 << 30, &mut write).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.start_in_long_mode(Start { root, entry: IMAGE, stack: STACK_TOP, args: [0, CONTROL.get()] }).unwrap();
    let host = Host::new(ram.clone(), &setup.layout, setup.initial);
    let mut platform = wrap(host, &ram);
    loop {
        match vcpu.run().unwrap() {
            Exit::MmioRead { gpa, len_bytes } => {
                let value = platform.mmio_read(gpa, len_bytes);
                vcpu.answer_mmio(value);
            }
            Exit::MmioWrite { gpa, len_bytes, value } => platform.mmio_write(gpa, len_bytes, value),
            Exit::MapGpaRange(range) => {
                let args = [range.span.start().get(), range.span.len() / 4096, u64::from(range.private) << 4];
                let result = platform.hypercall(guest::registers::HC_MAP_GPA_RANGE, args);
                vcpu.answer_hypercall(result);
            }
            Exit::Interrupted => {}
            Exit::Halt => return Some((report(&ram), platform, vcpu.exits())),
            exit => panic!("{exit:?} at {:x?}", vcpu.fd().get_regs()),
        }
    }
}

fn guest_file(vm: &Vm) -> (OwnedFd, bool) {
    if let Ok((file, flags)) = vm.best_guest_memfd(MEMORY)
        && flags.has(MemfdFlags::MMAP)
    {
        return (file, true);
    }
    let file = memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, MEMORY).unwrap();
    (file, false)
}

fn in_a_thread(setup: Setup) -> (Report, Host) {
    let ram = guest::Memory::anonymous(MEMORY).unwrap();
    setup.load(|gpa, bytes| ram.write(gpa, bytes)).unwrap();
    let mut host = Host::new(ram.clone(), &setup.layout, setup.initial);
    guest::thread::run(&ram, &mut host).unwrap();
    (report(&ram), host)
}

#[test]
fn a_vm_and_a_thread_ask_for_the_same() {
    let setup = setup(21, 150, Features::default());
    let Some((in_vm, host, exits)) = in_a_vm(setup, |host, _| host) else { return };
    assert!(in_vm.is_clean() && host.all_validated() && host.done() == Some(0), "{in_vm:?}");
    assert_eq!((in_vm.rounds, exits.mmio, exits.halt), (150, host.accesses(), 1));
    let (in_thread, thread_host) = in_a_thread(setup);
    assert_eq!(in_vm, in_thread);
    assert_eq!((host.requests(), host.log_hash()), (thread_host.requests(), thread_host.log_hash()));
}

#[test]
fn hypercalls_reach_the_host() {
    let instruction = match hypercall_instruction() {
        Ok(Some(instruction)) => instruction,
        Ok(None) => return println!("skipped: no hypercall instruction comes to user space on this host"),
        Err(error) => return println!("skipped: {error}"),
    };
    let features = match instruction {
        HypercallInstruction::Vmcall => Features::HYPERCALL.and(Features::VMCALL),
        HypercallInstruction::Vmmcall => Features::HYPERCALL,
    };
    let Some((in_vm, host, exits)) = in_a_vm(setup(22, 150, features), |host, _| host) else { return };
    assert!(in_vm.is_clean() && in_vm.hypercalls > 0, "{in_vm:?}");
    assert_eq!(exits.map_gpa_range, in_vm.hypercalls);
    assert_eq!(host.log_hash(), in_a_thread(setup(22, 150, features)).1.log_hash());
}

/// Flips a bit of what the trusted engine wrote, once; and stops the guest after a while.
struct Wrong {
    host: Host,
    ram: guest::Memory,
    transfers: u64,
}

impl Platform for Wrong {
    fn mmio_read(&mut self, gpa: Gpa, len: u8) -> u64 {
        if self.transfers == 60 {
            self.ram.write(STOP, &1u64.to_le_bytes()).unwrap();
        }
        self.host.mmio_read(gpa, len)
    }
    fn mmio_write(&mut self, gpa: Gpa, len: u8, value: u64) {
        use guest::registers::{TRUSTED, dma};
        self.host.mmio_write(gpa, len, value);
        if gpa.get() == TRUSTED.get() + dma::CMD {
            self.transfers += 1;
            if self.transfers == 20 {
                let dst = Gpa::new(self.host.mmio_read(Gpa::new(TRUSTED.get() + dma::DST), 8));
                let mut byte = [0];
                self.ram.read(dst, &mut byte).unwrap();
                self.ram.write(dst, &[byte[0] ^ 1]).unwrap();
            }
        }
    }
    fn hypercall(&mut self, nr: u64, args: [u64; 3]) -> u64 {
        self.host.hypercall(nr, args)
    }
}

#[test]
fn a_wrong_byte_is_seen_from_inside_and_the_stop_flag_works() {
    let began = Instant::now();
    let setup = setup(23, 0, Features::default());
    let wrap = |host, ram: &guest::Memory| Wrong { host, ram: ram.clone(), transfers: 0 };
    let Some((report, wrong, exits)) = in_a_vm(setup, wrap) else { return };
    assert_eq!((report.mismatches, report.errors, wrong.host.done()), (1, 0, Some(0)), "{report:?}");
    assert_eq!((report.mismatch_expected ^ report.mismatch_got), 1, "{report:?}");
    assert!(Span::of(Gpa::new(0), Gpa::new(MEMORY - 1)).contains(Gpa::new(report.mismatch_gpa)));
    println!("{} rounds and {} exits in {:?}", report.rounds, exits.total(), began.elapsed());
}
