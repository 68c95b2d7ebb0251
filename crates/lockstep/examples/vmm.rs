//! The whole use of the library, as the author of a VMM sees it: memory, two devices, conversions, an audit.

use addr::{Gpa, Iova, Span};
use backing::{Backing, Frames};
use lockstep_iommu::kvm::{MemfdFlags, Memory, SlotOptions, Vm};
use lockstep_iommu::{Change, Config, Dma, GuestDma, KvmStage2, Owner, RecordedStage2, SDTE_WRITE_BYTES, Sdte, Stage2, Trust};
use std::sync::Arc;

const MEMORY: u64 = 64 << 20;
const ASID: u32 = 1;
/// As the guest calls it.
const NIC: u16 = 0x100;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Memory: a guest_memfd that the host can map, behind a KVM memory slot; without KVM a memfd.
    let vm = Vm::new().map(Arc::new).inspect_err(|error| println!("no KVM: {error}")).ok();
    let file = vm.as_ref().map(|vm| vm.best_guest_memfd(MEMORY)).transpose()?.filter(|(_, flags)| flags.has(MemfdFlags::MMAP));
    let backing = match file {
        Some((file, _)) => Backing::guest_memfd(file, MEMORY, Frames::Contiguous)?,
        None => Backing::memfd(MEMORY, Frames::Contiguous)?,
    };
    if let (Some(vm), Some(file)) = (&vm, backing.file()) {
        let guest_memfd = (backing.kind() == backing::Kind::GuestMemfd).then_some((file, 0));
        vm.set_memslot(0, Gpa::new(0), Memory::of_file(file, 0, MEMORY)?, SlotOptions { guest_memfd, ..Default::default() })?;
    }

    // The guest's devices see {file, offset} at IOVA = GPA; stage 2 hears of every conversion.
    let stage2: Arc<dyn Stage2> = match &vm {
        Some(vm) => KvmStage2::new(vm),
        None => Arc::new(RecordedStage2::new()),
    };
    let guest = GuestDma::new(&Config { asid: ASID, ..Config::default() }, stage2)?;
    guest.add_memory(Gpa::new(0), MEMORY, &backing, 0)?;
    let nic = guest.add_device("nic", Trust::Untrusted)?;
    // The guest comes to trust it: bound and locked, looked at, started, and accepted by the guest's own message to firmware.
    let nonce = guest.bind_device(&nic, NIC)?;
    guest.start_device(NIC, nonce)?;
    let mut message = [0; SDTE_WRITE_BYTES];
    message[..2].copy_from_slice(&NIC.to_le_bytes());
    message[16..].copy_from_slice(&Sdte::new(pt::Perm::RW, secure::Vmpl::V0, None).to_bytes());
    guest.sdte_write(&message)?;
    let mut trusted = Dma::new(&nic)?;
    let mut untrusted = Dma::new(&guest.add_device("disk", Trust::Untrusted)?)?;

    // A page state change: what KVM_HC_MAP_GPA_RANGE, KVM_EXIT_MEMORY_FAULT or a GHCB request ask for.
    let page = Span::from_len(Gpa::new(0x12_3000), 0x1000)?;
    guest.convert(&[Change { span: page, to: Owner::Private }])?;
    guest.space().pvalidate(page.start(), secure::RmpSize::K4, true).map_err(|error| format!("{error:?}"))?;

    let iova = Iova::new(page.start().get());
    trusted.write(iova, b"for the guest's eyes only")?;
    let refused = untrusted.read(iova, &mut [0; 8]).expect_err("private memory");
    println!("the untrusted device: {refused}");
    untrusted.write(Iova::new(0x12_4000), b"the neighbour page is still there")?;

    let report = guest.audit();
    println!("audit: {} leaves, {} RMP entries, {} differences", report.leaves, report.entries, report.count);
    assert!(report.is_clean());
    Ok(())
}
