//! Why a vCPU came back, decoded and checked: what a guest put into its registers is untrusted input.
#![forbid(unsafe_code)]

use addr::{Gpa, PAGE_BYTES, PAGE_LG2, Span};
use kvm_ioctls::VcpuExit;

/// KVM_HC_MAP_GPA_RANGE of Linux `include/uapi/linux/kvm_para.h`.
pub const HC_MAP_GPA_RANGE: u64 = 12;
/// What a hypercall nobody answers gives the guest: -KVM_ENOSYS.
const NO_SUCH_CALL: u64 = (-1000_i64).cast_unsigned();
/// What a malformed KVM_HC_MAP_GPA_RANGE gives the guest: -EINVAL.
const INVALID: u64 = (-22_i64).cast_unsigned();
/// `KVM_MEMORY_EXIT_FLAG_PRIVATE`.
const FAULT_PRIVATE: u64 = 1 << 3;

/// Why a vCPU came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Exit {
    /// It reads a device register: [`Vcpu::answer_mmio`](super::Vcpu::answer_mmio), or it gets all ones.
    MmioRead {
        /// Where.
        gpa: Gpa,
        /// How wide: 1 to 8.
        len_bytes: u8,
    },
    /// It writes a device register.
    MmioWrite {
        /// Where.
        gpa: Gpa,
        /// How wide: 1 to 8.
        len_bytes: u8,
        /// What, zero-extended.
        value: u64,
    },
    /// It asks for a page state change by KVM_HC_MAP_GPA_RANGE. The arguments hold together, but may name memory that is not there.
    /// [`Vcpu::answer_hypercall`](super::Vcpu::answer_hypercall), or it gets "no such call".
    MapGpaRange(MapGpaRange),
    /// Any other hypercall, or a KVM_HC_MAP_GPA_RANGE that makes no sense (that gets EINVAL unless it is answered).
    Hypercall {
        /// Its number.
        nr: u64,
        /// Its arguments.
        args: [u64; 6],
    },
    /// It touched memory in a way that its attribute does not allow, or that is not there. The access is repeated on the next run.
    MemoryFault {
        /// The memory.
        gpa: Gpa,
        /// How much of it.
        len_bytes: u64,
        /// Whether it wanted private memory.
        private: bool,
    },
    /// It reads or writes an IO port; nobody answers.
    Port {
        /// Which.
        port: u16,
    },
    /// HLT.
    Halt,
    /// A triple fault.
    Shutdown,
    /// A [`Kick`](super::Kick) or a signal.
    Interrupted,
    /// Anything else, by its `KVM_EXIT_*` number; 17 (an internal error) means an instruction that KVM cannot emulate.
    Other {
        /// `KVM_EXIT_*`.
        reason: u32,
    },
}

/// A page state change asked for by hypercall (Linux `Documentation/virt/kvm/x86/hypercalls.rst`, 8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapGpaRange {
    /// The memory; never empty, never wraps, whole 4 KiB pages.
    pub span: Span<Gpa>,
    /// The page size that the guest has in mind: 12, 21 or 30. A hint, and no promise of alignment.
    pub page_lg2: u8,
    /// Whether it is to be private.
    pub private: bool,
}

impl MapGpaRange {
    /// From the hypercall's arguments: GPA, 4 KiB pages, flags (bits 3:0 page size, bit 4 private). `None` when they make no sense.
    pub fn decode(args: [u64; 3]) -> Option<Self> {
        let [gpa, pages, flags] = args;
        let len = pages.checked_mul(PAGE_BYTES)?;
        let span = Span::aligned(Gpa::new(gpa), len, PAGE_LG2).ok()?;
        let page_lg2 = match flags & 0xf {
            0 => 12,
            1 => 21,
            2 => 30,
            _ => return None,
        };
        (flags >> 5 == 0).then_some(Self { span, page_lg2, private: flags & 1 << 4 != 0 })
    }
}

/// An answer the guest is waiting for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Awaiting {
    Nothing,
    Mmio { len_bytes: u8 },
    Hypercall,
}

/// Decodes what kvm-ioctls returned, and leaves in it the answer that stands when nobody gives another. The caller fills in the reason of
/// [`Exit::Other`].
pub(super) fn decode(exit: VcpuExit<'_>) -> (Exit, Awaiting) {
    let exit = match exit {
        VcpuExit::MmioRead(gpa, data) => {
            data.fill(0xff);
            let len_bytes = data.len() as u8;
            return (Exit::MmioRead { gpa: Gpa::new(gpa), len_bytes }, Awaiting::Mmio { len_bytes });
        }
        VcpuExit::MmioWrite(gpa, data) => {
            let mut value = [0; 8];
            let len = data.len().min(8);
            value[..len].copy_from_slice(&data[..len]);
            Exit::MmioWrite { gpa: Gpa::new(gpa), len_bytes: len as u8, value: u64::from_le_bytes(value) }
        }
        VcpuExit::Hypercall(call) => {
            let asked = (call.nr == HC_MAP_GPA_RANGE).then(|| MapGpaRange::decode([call.args[0], call.args[1], call.args[2]]));
            *call.ret = if asked == Some(None) { INVALID } else { NO_SUCH_CALL };
            let exit = match asked.flatten() {
                Some(asked) => Exit::MapGpaRange(asked),
                None => Exit::Hypercall { nr: call.nr, args: call.args },
            };
            return (exit, Awaiting::Hypercall);
        }
        VcpuExit::MemoryFault { flags, gpa, size } => {
            Exit::MemoryFault { gpa: Gpa::new(gpa), len_bytes: size, private: flags & FAULT_PRIVATE != 0 }
        }
        VcpuExit::IoIn(port, data) => {
            data.fill(0xff);
            Exit::Port { port }
        }
        VcpuExit::IoOut(port, _) => Exit::Port { port },
        VcpuExit::Hlt => Exit::Halt,
        VcpuExit::Shutdown => Exit::Shutdown,
        VcpuExit::Intr => Exit::Interrupted,
        _ => Exit::Other { reason: 0 },
    };
    (exit, Awaiting::Nothing)
}

/// How often a vCPU came back, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExitCounts {
    /// Register reads and writes.
    pub mmio: u64,
    /// KVM_HC_MAP_GPA_RANGE.
    pub map_gpa_range: u64,
    /// Other hypercalls.
    pub hypercall: u64,
    /// Memory faults.
    pub memory_fault: u64,
    /// IO ports.
    pub port: u64,
    /// HLT.
    pub halt: u64,
    /// Triple faults.
    pub shutdown: u64,
    /// Kicks and signals.
    pub interrupted: u64,
    /// All others.
    pub other: u64,
}

impl ExitCounts {
    pub(super) fn count(&mut self, exit: &Exit) {
        let counter = match exit {
            Exit::MmioRead { .. } | Exit::MmioWrite { .. } => &mut self.mmio,
            Exit::MapGpaRange(_) => &mut self.map_gpa_range,
            Exit::Hypercall { .. } => &mut self.hypercall,
            Exit::MemoryFault { .. } => &mut self.memory_fault,
            Exit::Port { .. } => &mut self.port,
            Exit::Halt => &mut self.halt,
            Exit::Shutdown => &mut self.shutdown,
            Exit::Interrupted => &mut self.interrupted,
            Exit::Other { .. } => &mut self.other,
        };
        *counter += 1;
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        let Self { mmio, map_gpa_range, hypercall, memory_fault, port, halt, shutdown, interrupted, other } = self;
        mmio + map_gpa_range + hypercall + memory_fault + port + halt + shutdown + interrupted + other
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_ioctls::HypercallExit;

    fn hypercall(nr: u64, args: [u64; 6]) -> (Exit, Awaiting, u64) {
        let mut ret = 0;
        let (exit, awaiting) = decode(VcpuExit::Hypercall(HypercallExit { nr, args, ret: &mut ret, longmode: 1 }));
        (exit, awaiting, ret)
    }

    #[test]
    fn map_gpa_range() {
        // Typed from hypercalls.rst: GPA 0x20_0000, 512 pages, flags = 2 MiB and encrypted.
        let (exit, awaiting, ret) = hypercall(12, [0x20_0000, 512, 0x11, 0, 0, 0]);
        let span = Span::of(Gpa::new(0x20_0000), Gpa::new(0x3f_ffff));
        assert_eq!(exit, Exit::MapGpaRange(MapGpaRange { span, page_lg2: 21, private: true }));
        assert_eq!((awaiting, ret), (Awaiting::Hypercall, 0u64.wrapping_sub(1000)));
        let (exit, ..) = hypercall(12, [0x1000, 1, 0, 9, 9, 9]);
        let span = Span::of(Gpa::new(0x1000), Gpa::new(0x1fff));
        assert_eq!(exit, Exit::MapGpaRange(MapGpaRange { span, page_lg2: 12, private: false }));
    }

    #[test]
    fn map_gpa_range_that_makes_no_sense() {
        let no_pages = [0x1000, 0, 0, 0, 0, 0];
        let misaligned = [0x1001, 1, 0, 0, 0, 0];
        let wraps = [u64::MAX - 0xfff, 2, 0, 0, 0, 0];
        let too_many = [0, 1 << 52, 0, 0, 0, 0];
        let size = [0x1000, 1, 3, 0, 0, 0];
        let flags = [0x1000, 1, 0x20, 0, 0, 0];
        for args in [no_pages, misaligned, wraps, too_many, size, flags] {
            assert_eq!(hypercall(12, args), (Exit::Hypercall { nr: 12, args }, Awaiting::Hypercall, 0u64.wrapping_sub(22)));
        }
        assert_eq!(hypercall(5, no_pages).2, 0u64.wrapping_sub(1000));
    }

    #[test]
    fn registers_and_faults() {
        let mut data = [0; 4];
        let read = decode(VcpuExit::MmioRead(0xfe00_0008, &mut data));
        assert_eq!(read, (Exit::MmioRead { gpa: Gpa::new(0xfe00_0008), len_bytes: 4 }, Awaiting::Mmio { len_bytes: 4 }));
        assert_eq!(data, [0xff; 4]);
        let write = decode(VcpuExit::MmioWrite(0xfe00_0000, &[0x34, 0x12]));
        assert_eq!(write.0, Exit::MmioWrite { gpa: Gpa::new(0xfe00_0000), len_bytes: 2, value: 0x1234 });
        let fault = decode(VcpuExit::MemoryFault { flags: 8, gpa: 0x5000, size: 0x1000 });
        assert_eq!(fault.0, Exit::MemoryFault { gpa: Gpa::new(0x5000), len_bytes: 0x1000, private: true });
        assert_eq!(decode(VcpuExit::InternalError).0, Exit::Other { reason: 0 });
        let mut counts = ExitCounts::default();
        for exit in [read.0, write.0, fault.0, Exit::Halt] {
            counts.count(&exit);
        }
        assert_eq!((counts.mmio, counts.memory_fault, counts.halt, counts.total()), (2, 1, 1, 4));
    }
}
