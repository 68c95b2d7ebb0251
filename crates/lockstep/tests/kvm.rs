//! The KVM link on this host's /dev/kvm. Where there is none, each test says so and passes.

use addr::{Gpa, Span};
use lockstep_iommu::kvm::{
    Applied, Exit, HypercallInstruction, Kick, KvmError, MapGpaRange, MemfdFlags, Memory, ProbeAt, Probed, Prober, SlotOptions, Start,
    Vcpu, Vm, hypercall_instruction, identity_tables,
};
use rustix::fs::{FallocateFlags, fallocate, ftruncate, memfd_create};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

const CODE: Gpa = Gpa::new(0x8000);
const MEMORY: u64 = 8 << 20;
const REGISTER: Gpa = Gpa::new(0xfe00_0000);

fn span(start: u64, last: u64) -> Span<Gpa> {
    Span::of(Gpa::new(start), Gpa::new(last))
}

fn vm() -> Option<Vm> {
    Vm::new().inspect_err(|error| println!("skipped: {error}")).ok()
}

/// A VM with `MEMORY` bytes at 0, of guest_memfd where it can be mapped, else of a memfd.
struct Machine {
    vm: Vm,
    file: OwnedFd,
    root: Gpa,
}

impl Machine {
    fn new() -> Option<Self> {
        let vm = vm()?;
        let best = vm.best_guest_memfd(MEMORY).ok().filter(|(_, flags)| flags.has(MemfdFlags::MMAP));
        let (file, guest_memfd) = match best {
            Some((file, _)) => (file, true),
            None => (memfd(MEMORY), false),
        };
        println!("memory is a {}", if guest_memfd { "guest_memfd" } else { "memfd" });
        let memory = Memory::of_file(file.as_fd(), 0, MEMORY).unwrap();
        let options = SlotOptions { guest_memfd: guest_memfd.then_some((file.as_fd(), 0)), ..Default::default() };
        vm.set_memslot(0, Gpa::new(0), memory, options).unwrap();
        let ram = ram(&file);
        let root =
            identity_tables(span(0x1000, 0x7fff), 4 << 30, &mut |gpa, bytes| ram.write(gpa, bytes).map_err(std::io::Error::other)).unwrap();
        Some(Self { vm, file, root })
    }

    fn ram(&self) -> guest::Memory {
        ram(&self.file)
    }

    fn vcpu(&self, id: u32, code: &[u8]) -> Vcpu {
        self.ram().write(CODE, code).unwrap();
        let mut vcpu = self.vm.create_vcpu(id).unwrap();
        vcpu.start_in_long_mode(self.start()).unwrap();
        vcpu
    }

    fn start(&self) -> Start {
        Start { root: self.root, entry: CODE, stack: CODE, args: [REGISTER.get(), 0x1234] }
    }
}

fn ram(file: &OwnedFd) -> guest::Memory {
    guest::Memory::of_file(file.as_fd(), 0, MEMORY).unwrap()
}

fn memfd(len: u64) -> OwnedFd {
    let file = memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, len).unwrap();
    file
}

#[test]
fn what_this_host_can_do() {
    let Some(vm) = vm() else { return };
    println!("{:?}, hypercalls by {:?}", vm.caps(), hypercall_instruction().unwrap());
    assert!(vm.caps().slots > 1);
}

#[test]
fn registers_are_read_and_written() {
    let Some(machine) = Machine::new() else { return };
    // mov [rdi], rsi; mov rax, [rdi + 8]; mov [rdi + 16], eax; mov al, [rdi + 1]; mov [rdi + 24], rax; hlt
    let code = [0x48, 0x89, 0x37, 0x48, 0x8b, 0x47, 8, 0x89, 0x47, 16, 0x8a, 0x47, 1, 0x48, 0x89, 0x47, 24, 0xf4];
    let mut vcpu = machine.vcpu(0, &code);
    let at = |offset| Gpa::new(REGISTER.get() + offset);
    assert_eq!(vcpu.run().unwrap(), Exit::MmioWrite { gpa: at(0), len_bytes: 8, value: 0x1234 });
    vcpu.answer_mmio(77); // nobody asked
    vcpu.answer_hypercall(77);
    assert_eq!(vcpu.run().unwrap(), Exit::MmioRead { gpa: at(8), len_bytes: 8 });
    vcpu.answer_mmio(0x1122_3344_5566_7788);
    assert_eq!(vcpu.run().unwrap(), Exit::MmioWrite { gpa: at(16), len_bytes: 4, value: 0x5566_7788 });
    assert_eq!(vcpu.run().unwrap(), Exit::MmioRead { gpa: at(1), len_bytes: 1 });
    // Not answered: all ones.
    assert_eq!(vcpu.run().unwrap(), Exit::MmioWrite { gpa: at(24), len_bytes: 8, value: 0x1122_3344_5566_77ff });
    assert_eq!(vcpu.run().unwrap(), Exit::Halt);
    let exits = vcpu.exits();
    assert_eq!((exits.mmio, exits.halt, exits.total()), (5, 1, 6));
}

#[test]
fn a_start_forgets_what_the_guest_was_waiting_for() {
    let Some(machine) = Machine::new() else { return };
    // mov rsi, [rdi]; hlt, and at 4: mov [rdi], rsi
    let mut vcpu = machine.vcpu(0, &[0x48, 0x8b, 0x37, 0xf4, 0x48, 0x89, 0x37]);
    assert!(matches!(vcpu.run().unwrap(), Exit::MmioRead { .. }));
    vcpu.start_in_long_mode(Start { entry: Gpa::new(CODE.get() + 4), ..machine.start() }).unwrap();
    assert_eq!(vcpu.run().unwrap(), Exit::MmioWrite { gpa: REGISTER, len_bytes: 8, value: 0x1234 });
    vcpu.answer_mmio(1); // nobody asked
}

#[test]
fn a_hypercall_comes_out_and_is_answered() {
    let Some(machine) = Machine::new() else { return };
    let Some(instruction) = hypercall_instruction().unwrap() else {
        println!("skipped: no hypercall instruction comes to user space on this host; decoding is tested without it");
        return;
    };
    let opcode = match instruction {
        HypercallInstruction::Vmcall => 0xc1,
        HypercallInstruction::Vmmcall => 0xd9,
    };
    // mov eax, 12; mov ebx, 0x200000; mov ecx, 512; mov edx, 0x11; hypercall; mov [rdi], rax; hlt
    let code = [0xb8, 12, 0, 0, 0, 0xbb, 0, 0, 0x20, 0, 0xb9, 0, 2, 0, 0, 0xba, 0x11, 0, 0, 0, 0x0f, 0x01, opcode, 0x48, 0x89, 0x07, 0xf4];
    let mut vcpu = machine.vcpu(0, &code);
    assert_eq!(vcpu.run().unwrap(), Exit::MapGpaRange(MapGpaRange { span: span(0x20_0000, 0x3f_ffff), page_lg2: 21, private: true }));
    vcpu.answer_hypercall(42);
    assert_eq!(vcpu.run().unwrap(), Exit::MmioWrite { gpa: REGISTER, len_bytes: 8, value: 42 });
}

#[test]
fn spans_are_refused_before_the_kernel_is_asked() {
    let Some(machine) = Machine::new() else { return };
    let vm = &machine.vm;
    let small = memfd(0x4000);
    let map = |len| Memory::of_file(small.as_fd(), 0, len).unwrap();
    let set = |slot, gpa: u64, len| vm.set_memslot(slot, Gpa::new(gpa), map(len), SlotOptions::default());
    assert!(matches!(Memory::of_file(small.as_fd(), 0, 0), Err(KvmError::Span { .. })));
    assert!(matches!(Memory::of_file(small.as_fd(), 12, 0x1000), Err(KvmError::Span { .. })));
    assert!(matches!(Memory::of_file(small.as_fd(), u64::MAX - 0xfff, 0x2000), Err(KvmError::Span { .. })));
    assert!(matches!(set(1, 0x1000_0800, 0x1000), Err(KvmError::Span { .. })));
    assert!(matches!(set(1, u64::MAX - 0xfff, 0x2000), Err(KvmError::Span { .. })));
    assert!(matches!(set(0, 0x1000_0000, 0x1000), Err(KvmError::SlotInUse { slot: 0, .. })));
    assert!(matches!(set(u32::MAX, 0x1000_0000, 0x1000), Err(KvmError::SlotNumber { .. })));
    let error = set(1, MEMORY - 0x1000, 0x2000).unwrap_err();
    assert_eq!(error.to_string(), "slot 1 for GPA 0x7ff000..=0x800fff lies over slot 0 at GPA 0x0..=0x7fffff: remove that one first");
    let past = SlotOptions { guest_memfd: Some((small.as_fd(), 0x3000)), ..Default::default() };
    let error = vm.set_memslot(1, Gpa::new(0x1000_0000), map(0x2000), past).unwrap_err();
    assert!(matches!(error, KvmError::PastFile { offset: 0x3000, file_bytes: 0x4000, .. }), "{error}");
    assert!(matches!(vm.remove_memslot(1), Err(KvmError::NoSlot { slot: 1 })));
    assert!(matches!(vm.create_guest_memfd(0x800, MemfdFlags::NONE), Err(KvmError::Span { .. })));
    assert!(vm.create_guest_memfd(0x1000, MemfdFlags::from_bits(1 << 40)).is_err());
    for empty_or_odd in [span(0x1000, 0x17ff), span(0x1001, 0x2000)] {
        assert!(matches!(vm.set_private(empty_or_odd, true), Err(KvmError::Span { .. })));
    }
    assert_eq!(vm.memslots(), [(0, span(0, MEMORY - 1))]);
    assert_eq!(vm.private_spans(), []);
}

#[test]
fn vcpus_keep_memory_when_the_vm_is_dropped() {
    let Some(machine) = Machine::new() else { return };
    let mut vcpu = machine.vcpu(0, &[0xf4]);
    drop(machine);
    assert_eq!(vcpu.run().unwrap(), Exit::Halt);
}

#[test]
fn attributes_are_kept() {
    let Some(machine) = Machine::new() else { return };
    let vm = &machine.vm;
    let expected = if vm.caps().attributes & 8 != 0 { Applied::Kernel } else { Applied::Recorded };
    assert_eq!(vm.set_private(span(0x20_0000, 0x3f_ffff), true).unwrap(), expected);
    assert_eq!(vm.set_private(span(0x30_0000, 0x30_0fff), false).unwrap(), expected);
    assert_eq!(vm.private_spans(), [span(0x20_0000, 0x2f_ffff), span(0x30_1000, 0x3f_ffff)]);
    assert!(vm.is_private(Gpa::new(0x2f_ffff)) && !vm.is_private(Gpa::new(0x30_0000)));
}

/// A VM type that keeps private memory apart (KVM_X86_SW_PROTECTED_VM): the attribute goes to KVM, and a guest that touches memory of
/// the wrong kind comes back with a memory fault.
#[test]
fn a_protected_vm_faults_on_memory_of_the_wrong_kind() {
    let Ok(vm) = Vm::of_type(1) else {
        println!("skipped: no KVM_X86_SW_PROTECTED_VM on this host");
        return;
    };
    let shared = memfd(MEMORY);
    let private = vm.create_guest_memfd(MEMORY, MemfdFlags::NONE).unwrap();
    let memory = Memory::of_file(shared.as_fd(), 0, MEMORY).unwrap();
    let options = SlotOptions { guest_memfd: Some((private.as_fd(), 0)), ..Default::default() };
    vm.set_memslot(0, Gpa::new(0), memory, options).unwrap();
    let again = vm.set_memslot(1, Gpa::new(0x1000_0000), Memory::of_file(shared.as_fd(), 0, MEMORY).unwrap(), options);
    assert!(again.is_err(), "one part of a guest_memfd cannot be in two slots");
    let ram = ram(&shared);
    let root =
        identity_tables(span(0x1000, 0x7fff), 4 << 30, &mut |gpa, bytes| ram.write(gpa, bytes).map_err(std::io::Error::other)).unwrap();
    ram.write(CODE, &[0x48, 0x89, 0x36, 0xf4]).unwrap(); // mov [rsi], rsi; hlt
    ram.write(Gpa::new(0x20_0000), &7u64.to_le_bytes()).unwrap();
    assert_eq!(vm.set_private(span(0x20_0000, 0x20_0fff), true).unwrap(), Applied::Kernel);
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.start_in_long_mode(Start { root, entry: CODE, stack: CODE, args: [0, 0x20_0000] }).unwrap();
    assert_eq!(vcpu.run().unwrap(), Exit::Halt);
    let mut bytes = [0; 8];
    ram.read(Gpa::new(0x20_0000), &mut bytes).unwrap();
    assert_eq!(u64::from_le_bytes(bytes), 7, "the write went to the guest_memfd alone");
}

#[test]
fn a_kick_ends_a_run_and_is_never_lost() {
    let Some(machine) = Machine::new() else { return };
    let mut vcpu = machine.vcpu(0, &[0xeb, 0xfe]); // jmp to itself
    let kick = vcpu.kick().unwrap();
    let (_done, pending) = std::sync::mpsc::channel::<()>();
    std::thread::spawn(move || {
        // A lost kick leaves nobody to fail the test.
        if pending.recv_timeout(Duration::from_secs(60)) == Err(RecvTimeoutError::Timeout) {
            eprintln!("a kick was lost: the vCPU runs on");
            std::process::exit(1);
        }
    });
    // Before the run: it does not begin.
    kick.kick();
    kick.kick();
    assert_eq!(vcpu.run().unwrap(), Exit::Interrupted);
    assert!(vcpu.was_kicked());
    // During runs, from another thread, at random moments.
    let (stop, kicks) = (AtomicBool::new(false), 300);
    let mut came_back = 0;
    std::thread::scope(|scope| {
        let kicker = scope.spawn(|| {
            for i in 0..kicks {
                std::thread::sleep(Duration::from_micros(i % 7 * 40));
                kick.kick();
            }
            stop.store(true, Ordering::SeqCst);
            kick.kick();
        });
        while !stop.load(Ordering::SeqCst) {
            assert_eq!(vcpu.run().unwrap(), Exit::Interrupted);
            came_back += 1;
        }
        kicker.join().unwrap();
    });
    println!("{kicks} kicks, {came_back} returns, signal {}", kick.signal());
    assert!(came_back > 0);
    drop(vcpu);
    kick.kick(); // of a vCPU that is gone
}

#[test]
fn the_probe_reads_what_is_there() {
    let Some(machine) = Machine::new() else { return };
    let ram = machine.ram();
    let at = ProbeAt { scratch: Gpa::new(0xf000), root: machine.root, register: Gpa::new(0xfe00_0ff8) };
    let mut prober = Prober::new(&machine.vm, 9, at, &mut |gpa, bytes| ram.write(gpa, bytes).map_err(std::io::Error::other)).unwrap();
    let sampled: Vec<Gpa> = (0..40u64).map(|i| Gpa::new(0x10_0000 + i * 0x2_1008)).collect();
    for (i, gpa) in sampled.iter().enumerate() {
        ram.write(*gpa, &(0xabcd_0000 + i as u64).to_le_bytes()).unwrap();
    }
    let wanted: Vec<Probed> = (0..40).map(|i| Probed::Value(0xabcd_0000 + i)).collect();
    assert_eq!(prober.probe(&sampled).unwrap(), wanted);
    // No memory in between, and its neighbour after it.
    let mixed = [sampled[3], Gpa::new(0xc000_0000), sampled[4], Gpa::new(MEMORY - 4), sampled[5]];
    let wanted = [wanted[3], Probed::NoMemory, wanted[4], Probed::NoMemory, wanted[5]];
    assert_eq!(prober.probe(&mixed).unwrap(), wanted);
    // A page that was punched reads as zero, and new bytes are seen.
    fallocate(&machine.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, sampled[0].get() & !0xfff, 0x1000).unwrap();
    ram.write(sampled[1], &5u64.to_le_bytes()).unwrap();
    assert_eq!(prober.probe(&sampled[..2]).unwrap(), [Probed::Value(0), Probed::Value(5)]);
    // Its code is gone: it says so, and works again when the code is back.
    let mut code = [0; 16];
    ram.read(at.scratch, &mut code).unwrap();
    ram.write(at.scratch, &[0xf4; 16]).unwrap();
    let error = prober.probe(&sampled[..1]).unwrap_err();
    assert!(matches!(error, KvmError::Probe { .. }), "{error}");
    ram.write(at.scratch, &code).unwrap();
    assert_eq!(prober.probe(&sampled[1..2]).unwrap(), [Probed::Value(5)]);
    // Outside the page tables the guest cannot look.
    assert!(prober.probe(&[Gpa::new(5 << 30)]).is_err());
    // A kick ends a probe that would go on.
    prober.kick().unwrap().kick();
    assert!(prober.probe(&sampled[..1]).is_err());
    assert_eq!(prober.probe(&sampled[1..2]).unwrap(), [Probed::Value(5)]);
}

#[test]
fn handles_cross_threads() {
    fn send<T: Send>() {}
    fn sync<T: Sync>() {}
    send::<Vm>();
    sync::<Vm>();
    send::<Vcpu>();
    send::<Prober>();
    sync::<Kick>();
    send::<Memory>();
}
