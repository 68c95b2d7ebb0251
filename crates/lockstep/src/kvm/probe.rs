//! What stage 2 really holds, as far as a guest can see it: a vCPU reads at sampled addresses and says what it found.
//!
//! KVM's stage 2 cannot be read from outside (design D-11). A table in an audit that was compared in this way is labelled *probed*.
#![forbid(unsafe_code)]

use super::{Exit, Kick, KvmError, Start, Vcpu, Vm, Writer};
use addr::{Gpa, PAGE_BYTES, Span};

/// Asks for an address, reads there, tells what it found, for ever:
///
/// ```text
/// 48 8b 37   again: mov rsi, [rdi]      rdi: a register that is nobody's; the host answers with the address
/// 48 8b 06          mov rax, [rsi]
/// 48 89 07          mov [rdi], rax
/// eb f5             jmp again
/// ```
const CODE: [u8; 11] = [0x48, 0x8b, 0x37, 0x48, 0x8b, 0x06, 0x48, 0x89, 0x07, 0xeb, 0xf5];

/// Where a prober lives in the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbeAt {
    /// A page of shared guest memory for its code. The guest must leave it alone.
    pub scratch: Gpa,
    /// Root of page tables that map what is to be probed, the scratch page and `register` onto themselves; the guest's own will do.
    pub root: Gpa,
    /// An address with no memory and no device, 8 bytes long: the vCPU talks to the host there.
    pub register: Gpa,
}

/// What a vCPU found at one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probed {
    /// The 8 bytes there, little endian.
    Value(u64),
    /// No memory slot has the address.
    NoMemory,
    /// KVM has memory there that it would not let the vCPU read.
    Refused {
        /// Whether the access was taken as one to private memory.
        private: bool,
    },
}

/// A vCPU that does nothing but probe. Between probes it stands still.
pub struct Prober {
    vcpu: Vcpu,
    at: ProbeAt,
    /// It stands at its request for an address.
    ready: bool,
}

impl Prober {
    /// Makes a vCPU of number `id`, which no other vCPU of the VM has, and writes its code.
    ///
    /// # Errors
    /// When KVM makes no such vCPU, or the code cannot be written.
    pub fn new(vm: &Vm, id: u32, at: ProbeAt, write: &mut Writer<'_>) -> Result<Self, KvmError> {
        super::slots::aligned("the probe's scratch page", at.scratch, PAGE_BYTES)?;
        write(at.scratch, &CODE).map_err(|error| KvmError::Write { what: "the probe's code", at: at.scratch, error })?;
        Ok(Self { vcpu: vm.create_vcpu(id)?, at, ready: false })
    }

    /// Reads 8 bytes at each address, in order.
    ///
    /// A signal does not end it; a [`Prober::kick`] makes it answer with an error.
    ///
    /// # Errors
    /// `Probe` when the vCPU does something that its code does not say: when code or page tables were written over, or the address
    /// is not mapped by them.
    pub fn probe(&mut self, gpas: &[Gpa]) -> Result<Vec<Probed>, KvmError> {
        gpas.iter().map(|gpa| self.one(*gpa)).collect()
    }

    /// A handle that ends a probe from another thread.
    ///
    /// # Errors
    /// As [`Vcpu::kick`].
    pub fn kick(&self) -> Result<Kick, KvmError> {
        self.vcpu.kick()
    }

    fn one(&mut self, gpa: Gpa) -> Result<Probed, KvmError> {
        if !self.ready {
            let ProbeAt { scratch, root, register } = self.at;
            self.vcpu.start_in_long_mode(Start { root, entry: scratch, stack: scratch, args: [register.get(), 0] })?;
            self.expect(gpa, Exit::MmioRead { gpa: register, len_bytes: 8 })?;
        }
        self.ready = false;
        self.vcpu.answer_mmio(gpa.get());
        // Eight bytes may be read in parts where they cross a page; a part with no memory behind it says all there is to say.
        let whole = Span::from_len(gpa, 8).map_err(|error| KvmError::Span { what: "a probed address", error })?;
        let mut memory = true;
        let value = loop {
            match self.next()? {
                Exit::MmioWrite { gpa: at, len_bytes: 8, value } if at == self.at.register => break value,
                Exit::MmioRead { gpa: at, .. } if whole.contains(at) => memory = false,
                Exit::MemoryFault { private, .. } => return Ok(Probed::Refused { private }),
                exit => return Err(KvmError::Probe { at: gpa, exit: format!("{exit:?}") }),
            }
        };
        self.expect(gpa, Exit::MmioRead { gpa: self.at.register, len_bytes: 8 })?;
        self.ready = true;
        Ok(if memory { Probed::Value(value) } else { Probed::NoMemory })
    }

    fn expect(&mut self, at: Gpa, wanted: Exit) -> Result<(), KvmError> {
        match self.next()? {
            exit if exit == wanted => Ok(()),
            exit => Err(KvmError::Probe { at, exit: format!("{exit:?}") }),
        }
    }

    fn next(&mut self) -> Result<Exit, KvmError> {
        loop {
            match self.vcpu.run()? {
                Exit::Interrupted if !self.vcpu.was_kicked() => {}
                exit => return Ok(exit),
            }
        }
    }
}
