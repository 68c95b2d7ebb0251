//! Private memory that no program of the host can see: a KVM_X86_SW_PROTECTED_VM, whose memory slot has a memfd for shared pages and a guest_memfd for
//! private ones, and real memory attributes. `cargo xtask vm --test kvm_private` runs it in an emulated machine; where KVM has no such VMs each
//! test says so and passes, and inside that machine it fails instead.

use addr::{Gpa, Iova, Page, Span};
use backing::{Backing, Frames, PageState};
use convert::{Auditor, Step};
use iommu::{FaultKind, RefusedBy};
use lockstep_iommu::kvm::{
    ATTRIBUTE_PRIVATE, Copier, CopierAt, Exit, HypercallInstruction, MemfdFlags, Memory, SlotOptions, Start, Vcpu, Vm,
    hypercall_instruction, identity_tables,
};
use lockstep_iommu::{Change, Config, Device, Dma, GuestDma, KvmStage2, Owner, Stage2, Tdisp, Trust};
use rustix::fs::{SeekFrom, ftruncate, memfd_create, seek};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const MEMORY: u64 = 16 * MIB;
const ASID: u32 = 3;
/// Code of the guest, in its own shared memory; its page tables are before it.
const STORE: Gpa = Gpa::new(0x8000);
const LOAD: Gpa = Gpa::new(0x8010);
const CALL: Gpa = Gpa::new(0x8020);
const SWEEP: Gpa = Gpa::new(0x8040);
const COPIER: Gpa = Gpa::new(0x1000_0000);
/// A second memory slot, for what begins without a guest_memfd.
const LATER: Gpa = Gpa::new(0x2000_0000);

fn memfd(len: u64) -> OwnedFd {
    let file = memfd_create("shared", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, len).unwrap();
    file
}

fn span(start: u64, len: u64) -> Span<Gpa> {
    Span::from_len(Gpa::new(start), len).unwrap()
}

/// A vCPU that does one thing at a time.
struct Cpu {
    vcpu: Vcpu,
    root: Gpa,
}

impl Cpu {
    /// Until it halts, or comes back for another reason.
    fn run(&mut self, entry: Gpa, args: [u64; 2]) -> Exit {
        self.vcpu.start_in_long_mode(Start { root: self.root, entry, stack: STORE, args }).unwrap();
        self.go_on()
    }

    fn go_on(&mut self) -> Exit {
        loop {
            match self.vcpu.run().unwrap() {
                Exit::Interrupted => {}
                exit => return exit,
            }
        }
    }

    fn store(&mut self, gpa: u64, value: u64) {
        assert_eq!(self.run(STORE, [gpa, value]), Exit::Halt);
    }

    fn load(&mut self, gpa: u64) -> u64 {
        assert_eq!(self.run(LOAD, [gpa, 0]), Exit::Halt);
        self.vcpu.fd().get_regs().unwrap().rax
    }
}

/// What is true of one page at some moment of its conversion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    at: Moment,
    /// Where its IO page table leaf leads.
    leaf: Option<PageState>,
    /// The RMP entry of its private side.
    assigned: bool,
    /// What a vCPU reads there: which side KVM leads it to.
    vcpu: u64,
    /// Whether the memfd has bytes for it.
    shared_bytes: bool,
    /// Whether the guest_memfd has pages.
    private_bytes: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    Freeze,
    After(Step),
    BeforeAttributes,
    AfterAttributes,
    Thaw,
}

type Look = dyn Fn(Moment) + Send + Sync;

/// KVM's side, with somebody looking.
struct Watched {
    kvm: Arc<KvmStage2>,
    look: Mutex<Option<Arc<Look>>>,
}

impl Watched {
    fn look(&self, at: Moment) {
        let look = self.look.lock().unwrap().clone();
        look.iter().for_each(|look| look(at));
    }
}

impl Stage2 for Watched {
    fn freeze(&self, spans: &[Span<Gpa>]) {
        self.look(Moment::Freeze);
        self.kvm.freeze(spans);
    }
    fn commit(&self, span: Span<Gpa>, private: bool) -> Result<(), convert::Stage2Error> {
        self.look(Moment::BeforeAttributes);
        let done = self.kvm.commit(span, private);
        self.look(Moment::AfterAttributes);
        done
    }
    fn thaw(&self, spans: &[Span<Gpa>]) {
        self.kvm.thaw(spans);
        self.look(Moment::Thaw);
    }
    fn is_private(&self, gpa: Gpa) -> bool {
        self.kvm.is_private(gpa)
    }
    fn runs(&self, span: Span<Gpa>) -> Vec<(Span<Gpa>, bool)> {
        self.kvm.runs(span)
    }
}

struct Machine {
    vm: Arc<Vm>,
    dma: Arc<GuestDma>,
    backing: Arc<Backing>,
    trusted: Arc<Device>,
    untrusted: Arc<Device>,
    stage2: Arc<Watched>,
    cpu: Arc<Mutex<Cpu>>,
    /// The machine's page cache is looked at: one test at a time.
    _alone: MutexGuard<'static, ()>,
}

impl Machine {
    fn new() -> Option<Self> {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let vm = protected_vm()?;
        let (shared, private) = (memfd(MEMORY), vm.create_guest_memfd(MEMORY, MemfdFlags::NONE).unwrap());
        let options = SlotOptions { guest_memfd: Some((private.as_fd(), 0)), ..Default::default() };
        vm.set_memslot(0, Gpa::new(0), Memory::of_file(shared.as_fd(), 0, MEMORY).unwrap(), options).unwrap();
        let copier = Copier::new(&vm, CopierAt { vcpu: 9, slot: 9, gpa: COPIER, memory: Gpa::new(0), reach_bytes: 1 << 30 }).unwrap();
        let backing = Backing::pair(shared, private, MEMORY, Some(Arc::new(copier)), Frames::Contiguous).unwrap();

        let stage2 = Arc::new(Watched { kvm: KvmStage2::new(&vm), look: Mutex::default() });
        let config = Config { asid: ASID, ..Config::default() };
        let dma = Arc::new(GuestDma::new(&config, Arc::clone(&stage2) as Arc<dyn Stage2>).unwrap());
        dma.add_memory(Gpa::new(0), MEMORY, &backing, 0).unwrap();
        let run = Trust::Trusted { asid: ASID, vmpl: secure::Vmpl::V0, tdisp: Tdisp::Run, sdte_valid: true, vtom: None };
        let (trusted, untrusted) = (dma.add_device("trusted", run).unwrap(), dma.add_device("untrusted", Trust::Untrusted).unwrap());

        let mut write = |gpa: Gpa, bytes: &[u8]| dma.write(gpa, bytes).map_err(io::Error::other);
        let root = identity_tables(span(0x1000, 0x7000), 4 << 30, &mut write).unwrap();
        write(STORE, &[0x48, 0x89, 0x37, 0xf4]).unwrap(); // mov [rdi], rsi; hlt
        write(LOAD, &[0x48, 0x8b, 0x07, 0xf4]).unwrap(); // mov rax, [rdi]; hlt
        // mov eax, 12; mov rbx, rdi; mov ecx, 1; mov rdx, rsi; vmcall or vmmcall; hlt
        let opcode = if matches!(hypercall_instruction(), Ok(Some(HypercallInstruction::Vmcall))) { 0xc1 } else { 0xd9 };
        let call = [0xb8, 12, 0, 0, 0, 0x48, 0x89, 0xfb, 0xb9, 1, 0, 0, 0, 0x48, 0x89, 0xf2, 0x0f, 0x01, opcode, 0xf4];
        write(CALL, &call).unwrap();
        // again: mov rax, rdi; next: inc qword [rax]; add rax, 4096; cmp rax, rsi; jb next; jmp again
        let sweep = [0x48, 0x89, 0xf8, 0x48, 0xff, 0x00, 0x48, 0x05, 0, 0x10, 0, 0, 0x48, 0x39, 0xf0, 0x72, 0xf2, 0xeb, 0xed];
        write(SWEEP, &sweep).unwrap();
        let cpu = Arc::new(Mutex::new(Cpu { vcpu: vm.create_vcpu(0).unwrap(), root }));
        Some(Self { vm, dma, backing, trusted, untrusted, stage2, cpu, _alone: alone })
    }

    fn cpu(&self) -> MutexGuard<'_, Cpu> {
        self.cpu.lock().unwrap()
    }

    fn load(&self, gpa: u64) -> u64 {
        self.cpu().load(gpa)
    }

    fn store(&self, gpa: u64, value: u64) {
        self.cpu().store(gpa, value);
    }

    fn convert(&self, start: u64, len: u64, to: Owner) -> u64 {
        self.dma.convert(&[Change { span: span(start, len), to }]).unwrap().pages
    }

    fn pvalidate(&self, start: u64, len: u64, validate: bool) {
        for page in span(start, len).blocks(addr::PAGE_LG2) {
            self.dma.space().pvalidate(page.start(), secure::RmpSize::K4, validate).unwrap();
        }
    }

    fn clean(&self) {
        let report = self.dma.audit();
        let all: String = report.differences.iter().map(|difference| format!("{difference}\n")).collect();
        assert!(report.is_clean(), "{} differences:\n{all}", report.count);
        assert!(report.pages > 0 && report.entries > 0 && report.leaves > 0);
    }

    fn shared(&self) -> BorrowedFd<'_> {
        self.backing.file().unwrap()
    }

    fn refused(&self, at: u64) {
        let mut dma = Dma::new(&self.untrusted).unwrap();
        let read = dma.read(Iova::new(at), &mut [0; 8]).unwrap_err();
        let write = dma.write(Iova::new(at), &[0; 8]).unwrap_err();
        for fault in [read, write] {
            assert_eq!((fault.table, fault.reason), (RefusedBy::SecureWorld, FaultKind::Secure));
        }
    }
}

/// `None` where there are no such VMs.
fn protected_vm() -> Option<Arc<Vm>> {
    let vm = Vm::of_type(1).map_err(|error| error.to_string()).and_then(|vm| {
        if vm.caps().attributes & ATTRIBUTE_PRIVATE != 0 { Ok(vm) } else { Err("KVM keeps no memory attributes for it".to_owned()) }
    });
    match vm {
        Ok(vm) => Some(Arc::new(vm)),
        Err(why) => {
            assert!(std::env::var_os("LOCKSTEP_VM").is_none(), "no SW_PROTECTED VM in the emulated machine: {why}");
            println!("skipped: no KVM_X86_SW_PROTECTED_VM on this host ({why}); cargo xtask vm --test kvm_private has one");
            None
        }
    }
}

fn has_data(file: BorrowedFd<'_>, at: u64) -> bool {
    seek(file, SeekFrom::Data(at)).is_ok_and(|found| found < at + 0x1000)
}

fn peek(file: BorrowedFd<'_>, at: u64) -> u64 {
    let mut bytes = [0; 8];
    assert_eq!(rustix::io::pread(file, &mut bytes, at).unwrap(), 8);
    u64::from_le_bytes(bytes)
}

/// Pages of files in memory that are not shmem's: in the machine of this test, those of its guest_memfds.
fn guest_memfd_pages() -> u64 {
    // Counters of single processors are folded into the sums.
    std::fs::write("/proc/sys/vm/stat_refresh", "1").unwrap();
    let text = std::fs::read_to_string("/proc/vmstat").unwrap();
    let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok()).unwrap();
    value("nr_file_pages ").saturating_sub(value("nr_shmem "))
}

#[test]
fn no_program_of_the_host_sees_private_memory() {
    let Some(machine) = Machine::new() else { return };
    let private = machine.backing.private_file().unwrap();
    machine.convert(0x10_0000, 0x1000, Owner::Private);
    machine.store(0x10_0000, 0x5ec2e7);
    // The guest_memfd's own descriptor gives nothing.
    let mapped = Memory::of_file(private, 0, MEMORY);
    println!("mmap: {}", mapped.as_ref().unwrap_err());
    let read = rustix::io::pread(private, &mut [0; 8], 0x10_0000);
    let write = rustix::io::pwrite(private, &[0; 8], 0x10_0000);
    println!("pread: {}, pwrite: {}", read.unwrap_err(), write.unwrap_err());
    println!("read: {}, write: {}", rustix::io::read(private, &mut [0; 8]).unwrap_err(), rustix::io::write(private, &[0; 8]).unwrap_err());
    // One that can be mapped has no shared pages to show: copies meet SIGBUS, and survive.
    if machine.vm.caps().memfd_flags.has(MemfdFlags::MMAP) {
        let file = machine.vm.create_guest_memfd(MIB, MemfdFlags::MMAP).unwrap();
        let mappable = Backing::guest_memfd(file, MIB, Frames::Contiguous).unwrap();
        let at = mappable.host(mappable.oa(Page::new(0)), 8).expect("it is mapped");
        assert!(at.read(0, &mut [0; 8]).is_err() && at.write(0, &[0; 8]).is_err());
    }
    // Nor does the library, but for devices that may.
    assert!(matches!(machine.dma.read(Gpa::new(0x10_0000), &mut [0; 8]), Err(lockstep_iommu::Error::Private(_))));
    assert!(machine.dma.write(Gpa::new(0x10_0000), &[0; 8]).is_err());
    assert!(machine.dma.ioas().read(Iova::new(0x10_0000), &mut [0; 8]).is_err());
    machine.refused(0x10_0000);
    assert_eq!(machine.load(0x10_0000), 0x5ec2e7);
    machine.clean();
}

#[test]
fn private_bytes_lie_in_the_guest_memfd_and_move_by_a_vcpu() {
    let Some(machine) = Machine::new() else { return };
    let at = 0x20_0000;
    let (mut trusted, mut untrusted) = (Dma::new(&machine.trusted).unwrap(), Dma::new(&machine.untrusted).unwrap());
    machine.clean();
    machine.store(at, 0x1111);
    assert_eq!((peek(machine.shared(), at), guest_memfd_pages()), (0x1111, guest_memfd_pages()));
    let mut bytes = [0; 8];
    untrusted.read(Iova::new(at), &mut bytes).unwrap();
    assert_eq!(u64::from_le_bytes(bytes), 0x1111);

    let before = guest_memfd_pages();
    assert_eq!(machine.convert(at, 0x4000, Owner::Private), 4);
    machine.clean();
    assert!(!has_data(machine.shared(), at), "the memfd's page is given back");
    // Whatever the VMM puts there now, the guest does not see it, and does not touch it.
    rustix::io::pwrite(machine.shared(), &0x0badu64.to_le_bytes(), at).unwrap();
    machine.store(at, 0x2222);
    assert_eq!((peek(machine.shared(), at), machine.load(at)), (0x0bad, 0x2222));
    assert_eq!(guest_memfd_pages() - before, 1, "the guest_memfd has the page");

    // Not validated by the guest yet, so not even the trusted device may.
    assert!(trusted.read(Iova::new(at), &mut bytes).is_err());
    machine.pvalidate(at, 0x4000, true);
    machine.clean();
    trusted.read(Iova::new(at), &mut bytes).unwrap();
    assert_eq!(u64::from_le_bytes(bytes), 0x2222, "translated, checked, and copied by a vCPU");
    let long: Vec<u8> = (0..0x3800u32).map(|at| (at * 31 + at / 251) as u8).collect();
    trusted.write(Iova::new(at + 0x123), &long).unwrap();
    let mut back = vec![0; long.len()];
    trusted.read(Iova::new(at + 0x123), &mut back).unwrap();
    assert_eq!(back, long);
    let word = u64::from_le_bytes(long[0x1000 - 0x123..0x1008 - 0x123].try_into().unwrap());
    assert_eq!((machine.load(at + 0x1000), peek(machine.shared(), at)), (word, 0x0bad));
    // From private to shared memory and back, as a device copies.
    trusted.copy(Iova::new(at), Iova::new(0x30_0000), 0x3000).unwrap();
    assert_eq!(machine.load(at + 0x2008), peek(machine.shared(), 0x30_2008));
    trusted.copy(Iova::new(0x30_0000), Iova::new(at + 0x1000), 0x1000).unwrap();
    assert_eq!(machine.load(at + 0x1000), machine.load(at));
    for page in 0..4 {
        machine.refused(at + page * 0x1000);
    }

    machine.pvalidate(at, 0x4000, false);
    assert!(trusted.read(Iova::new(at), &mut bytes).is_err());
    assert_eq!(machine.convert(at, 0x4000, Owner::Shared), 4);
    machine.clean();
    assert_eq!(guest_memfd_pages(), before, "the guest_memfd's pages are given back");
    untrusted.write(Iova::new(at), &0x3333u64.to_le_bytes()).unwrap();
    assert_eq!(machine.load(at), 0x3333);
    // And nothing of them is there when the guest takes the page again.
    machine.convert(at, 0x4000, Owner::Private);
    assert_eq!((0..4).map(|page| machine.load(at + page * 0x1000)).collect::<Vec<_>>(), [0; 4]);
    machine.clean();
}

const PAGES: u64 = 64;
const AT: u64 = 0x40_0000;
const OLD: u64 = 0x0dd_b17e5;

/// Converts `PAGES` pages and looks at the first of them at every moment.
fn moments(machine: &Machine, to: Owner) -> Vec<Seen> {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let look: Arc<Look> = {
        let (seen, cpu, backing) = (Arc::clone(&seen), Arc::clone(&machine.cpu), Arc::clone(&machine.backing));
        let (domain, rmp, page) = (machine.dma.ioas().domains().remove(0), Arc::clone(machine.dma.rmp()), Page::new(AT >> 12));
        let floor = if to == Owner::Private { guest_memfd_pages() } else { guest_memfd_pages() - PAGES };
        Arc::new(move |at| {
            let sides = [PageState::Shared, PageState::Private];
            let leaf = domain.table().walk(Iova::new(AT)).map(|leaf| leaf.oa_of(Iova::new(AT)));
            // All of them: the page that the vCPU has just looked at may be there again.
            let last = AT + (PAGES - 1) * 0x1000;
            seen.lock().unwrap().push(Seen {
                at,
                leaf: leaf.map(|oa| sides.into_iter().find(|side| backing.oa_as(page, *side) == oa).unwrap()),
                assigned: rmp.entry(backing.oa_as(page, PageState::Private)).assigned(),
                vcpu: cpu.lock().unwrap().load(AT),
                shared_bytes: has_data(backing.file().unwrap(), last),
                private_bytes: guest_memfd_pages() > floor + 1,
            });
        })
    };
    *machine.stage2.look.lock().unwrap() = Some(Arc::clone(&look));
    let (space, differences) = (Arc::downgrade(machine.dma.space()), Arc::new(AtomicU64::new(0)));
    let count = Arc::clone(&differences);
    machine.dma.space().on_transition(move |transition| {
        let space = space.upgrade().unwrap();
        count.fetch_add(Auditor::new(&space).check_transition(transition).count, Ordering::Relaxed);
        if (transition.is_detached() || transition.is_done()) && transition.step() != Step::Settle {
            look(Moment::After(transition.step()));
        }
    });
    machine.convert(AT, PAGES * 0x1000, to);
    machine.dma.space().on_transition(|_| {});
    *machine.stage2.look.lock().unwrap() = None;
    assert_eq!(differences.load(Ordering::Relaxed), 0);
    seen.lock().unwrap().clone()
}

/// The law: remove, observe completion, change owner, tell KVM, give back, add.
fn law(to: Owner) -> Vec<Seen> {
    let private = to == Owner::Private;
    let from = PageState::from(to.other());
    let mut now =
        Seen { at: Moment::Freeze, leaf: Some(from), assigned: !private, vcpu: OLD, shared_bytes: private, private_bytes: !private };
    let mut all = vec![now];
    let mut then = |at, change: fn(&mut Seen, bool)| {
        change(&mut now, private);
        now.at = at;
        all.push(now);
    };
    then(Moment::After(Step::Detach), |now, _| now.leaf = None);
    then(Moment::After(Step::Switch), |now, private| now.assigned = private);
    then(Moment::BeforeAttributes, |_, _| {});
    then(Moment::AfterAttributes, |now, _| now.vcpu = 0);
    then(Moment::After(Step::Commit), |_, _| {});
    then(Moment::After(Step::Discard), |now, _| (now.shared_bytes, now.private_bytes) = (false, false));
    then(Moment::After(Step::Attach), |now, private| now.leaf = Some(if private { PageState::Private } else { PageState::Shared }));
    then(Moment::Thaw, |_, _| {});
    all
}

#[test]
fn attributes_punch_leaf_and_owner_change_in_the_order_of_the_law() {
    let Some(machine) = Machine::new() else { return };
    for to in [Owner::Private, Owner::Shared, Owner::Private, Owner::Shared] {
        for page in 0..PAGES {
            machine.store(AT + page * 0x1000, OLD);
        }
        let seen = moments(&machine, to);
        seen.iter().for_each(|seen| println!("{seen:x?}"));
        assert_eq!(seen, law(to), "{to:?}");
        machine.clean();
    }
}

#[test]
fn a_guest_asks_by_hypercall() {
    let Some(machine) = Machine::new() else { return };
    if machine.vm.caps().exit_hypercall >> 12 & 1 == 0 || !matches!(hypercall_instruction(), Ok(Some(_))) {
        return println!("skipped: no hypercall instruction comes to user space here");
    }
    let at = 0x50_0000;
    machine.store(at, 7);
    for private in [true, false, true] {
        let mut cpu = machine.cpu();
        let Exit::MapGpaRange(asked) = cpu.run(CALL, [at, u64::from(private) << 4]) else { panic!("no hypercall came out") };
        assert_eq!((asked.span, asked.private), (span(at, 0x1000), private));
        machine.dma.map_gpa_range(asked.span.start(), asked.span.len() >> 12, asked.private).unwrap();
        cpu.vcpu.answer_hypercall(0);
        assert_eq!((cpu.go_on(), cpu.vcpu.fd().get_regs().unwrap().rax), (Exit::Halt, 0));
        assert_eq!(cpu.load(at), 0, "the page begins empty on its new side");
        cpu.store(at, 9);
        drop(cpu);
        assert_eq!((machine.vm.is_private(Gpa::new(at)), peek(machine.shared(), at)), (private, if private { 0 } else { 9 }));
        machine.clean();
    }
}

/// A slot without a guest_memfd cannot have private pages: the guest's touch comes back as a memory fault, and is an order to convert.
#[test]
fn a_guest_asks_by_touching() {
    let Some(machine) = Machine::new() else { return };
    let len = 4 * MIB;
    let shared = memfd(len);
    let at = LATER.get() + 0x3000;
    machine.vm.set_memslot(1, LATER, Memory::of_file(shared.as_fd(), 0, len).unwrap(), SlotOptions::default()).unwrap();
    machine.vm.set_private(span(at, 0x1000), true).unwrap();
    machine.store(LATER.get(), 5);
    let exit = machine.cpu().run(STORE, [at, 6]);
    let Exit::MemoryFault { gpa, len_bytes, private } = exit else { panic!("{exit:?}") };
    assert_eq!((gpa.get() & !0xfff, len_bytes, private), (at, 0x1000, true));

    // The slot gets what it lacks, and the page becomes what the guest took it for.
    machine.vm.remove_memslot(1).unwrap();
    let guest_memfd = machine.vm.create_guest_memfd(len, MemfdFlags::NONE).unwrap();
    let options = SlotOptions { guest_memfd: Some((guest_memfd.as_fd(), 0)), ..Default::default() };
    machine.vm.set_memslot(1, LATER, Memory::of_file(shared.as_fd(), 0, len).unwrap(), options).unwrap();
    let pair = Backing::pair(shared, guest_memfd, len, None, Frames::Contiguous).unwrap();
    machine.dma.add_memory(LATER, len, &pair, 0).unwrap();
    let report = machine.dma.audit();
    assert!(
        report.differences.iter().all(|difference| difference.invariant == "I-11") && report.count == 1,
        "KVM and the RMP differ there"
    );
    machine.dma.map_gpa_range(Gpa::new(at), 1, private).unwrap();
    machine.clean();
    assert_eq!(machine.cpu().go_on(), Exit::Halt);
    assert_eq!((machine.load(at), machine.load(LATER.get())), (6, 5));
    assert!(!has_data(pair.file().unwrap(), 0x3000), "the store went to the guest_memfd");
    machine.refused(at);
}

/// A vCPU, two devices and conversions at once, and the tables are equal at the end.
#[test]
fn under_load() {
    let Some(machine) = Machine::new() else { return };
    const BASE: u64 = 0x80_0000;
    const COUNT: u64 = 32;
    let (stop, faults, sweeps) = (AtomicBool::new(false), AtomicU64::new(0), OnceLock::new());
    let mut cpu = Cpu { vcpu: machine.vm.create_vcpu(1).unwrap(), root: machine.cpu().root };
    let kick = cpu.vcpu.kick().unwrap();
    let (mut moved, mut conversions, mut blocked) = (0u64, 0u64, 0u64);
    let until = Instant::now() + Duration::from_secs(3);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let start = Start { root: cpu.root, entry: SWEEP, stack: STORE, args: [BASE, BASE + COUNT * 0x1000] };
            cpu.vcpu.start_in_long_mode(start).unwrap();
            while !stop.load(Ordering::SeqCst) {
                match cpu.vcpu.run().unwrap() {
                    Exit::Interrupted => {}
                    // The attribute changed under the access: the guest repeats it, and finds the page on its new side.
                    Exit::MemoryFault { .. } => drop(faults.fetch_add(1, Ordering::Relaxed)),
                    exit => panic!("{exit:?}"),
                }
            }
            sweeps.set(cpu.vcpu.exits()).unwrap();
        });
        let devices = [&machine.trusted, &machine.untrusted].map(|device| {
            let stop = &stop;
            scope.spawn(move || {
                let (mut dma, mut random) = (Dma::new(device).unwrap(), fastrand::Rng::with_seed(device.id().into()));
                let (mut done, mut refused) = (0u64, 0u64);
                while !stop.load(Ordering::SeqCst) {
                    let at = Iova::new(BASE + random.u64(..COUNT) * 0x1000 + 8);
                    match dma.write(at, &[1; 64]).and_then(|()| dma.read(at, &mut [0; 64])) {
                        Ok(()) => done += 1,
                        Err(fault) => {
                            assert!(matches!(fault.reason, FaultKind::Secure | FaultKind::NotMapped), "{fault:?}");
                            refused += 1;
                        }
                    }
                }
                (done, refused)
            })
        });
        let mut random = fastrand::Rng::with_seed(5);
        while Instant::now() < until {
            let page = random.u64(..COUNT);
            let (at, len) = (BASE + page * 0x1000, random.u64(1..=COUNT - page) * 0x1000);
            if random.bool() {
                conversions += machine.convert(at, len, Owner::Private);
                for page in span(at, len).blocks(addr::PAGE_LG2) {
                    let _validated_already = machine.dma.space().pvalidate(page.start(), secure::RmpSize::K4, true);
                }
            } else {
                conversions += machine.convert(at, len, Owner::Shared);
            }
        }
        stop.store(true, Ordering::SeqCst);
        kick.kick();
        for device in devices {
            let (done, refused) = device.join().unwrap();
            moved += done;
            blocked += refused;
        }
    });
    machine.clean();
    println!(
        "{conversions} pages converted, {moved} DMA transfers, {blocked} refused, {} memory faults, {:?}",
        faults.load(Ordering::Relaxed),
        sweeps.get().unwrap()
    );
    assert!(conversions > 100 && moved > 100 && blocked > 10);
    // Every page is where its state says.
    machine.convert(BASE, COUNT * 0x1000, Owner::Private);
    machine.convert(BASE, COUNT * 0x1000, Owner::Shared);
    machine.clean();
}
