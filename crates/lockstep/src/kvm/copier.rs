//! A vCPU that copies for devices. No program of the host sees a guest's private memory: where a guest_memfd cannot be mapped, only the
//! guest reaches its bytes. So a vCPU of the same VM, which runs nothing of the guest's, moves them, between private pages and a page of its
//! own that the host sees. Which DMA may have them is decided before it is asked: by the IO page table and the secure world's check.
#![forbid(unsafe_code)]

use super::{Exit, KvmError, Memory, SlotOptions, Start, Vcpu, Vm, identity_tables, identity_tables_bytes, slots};
use addr::{Address, Gpa, PAGE_BYTES, Page, Span};
use backing::{CopyFault, HostAddr, Owner, PageName, PinError};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Asks what to copy, copies, says how much is left, for ever:
///
/// ```text
/// 48 89 fa              mov rdx, rdi          rdi: registers that are nobody's; the host answers
/// 48 8b 32      again:  mov rsi, [rdx]        from where
/// 48 8b 7a 08           mov rdi, [rdx + 8]    to where
/// 48 8b 4a 10           mov rcx, [rdx + 16]   how many bytes
/// f3 a4                 rep movsb
/// 48 89 4a 18           mov [rdx + 24], rcx
/// eb ed                 jmp again
/// ```
const CODE: [u8; 22] =
    [0x48, 0x89, 0xfa, 0x48, 0x8b, 0x32, 0x48, 0x8b, 0x7a, 0x08, 0x48, 0x8b, 0x4a, 0x10, 0xf3, 0xa4, 0x48, 0x89, 0x4a, 0x18, 0xeb, 0xed];
const SOURCE: u64 = 0;
const TARGET: u64 = 8;
const BYTES: u64 = 16;
const LEFT: u64 = 24;

/// Where a copier lives in the guest's physical space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopierAt {
    /// The number of its vCPU.
    pub vcpu: u32,
    /// The number of its memory slot.
    pub slot: u32,
    /// [`Copier::pages`] pages from here on, where the guest has no memory and no device.
    pub gpa: Gpa,
    /// Where byte 0 of the backing is that it copies for.
    pub memory: Gpa,
    /// What it must reach, itself included, is below this.
    pub reach_bytes: u64,
}

/// A vCPU that copies bytes of private memory. The owner in [`backing::Backing::pair`].
pub struct Copier {
    at: CopierAt,
    bounce: Gpa,
    register: Gpa,
    root: Gpa,
    /// Its slot's memory: code, the page that bytes go through, page tables.
    file: OwnedFd,
    /// Whoever has it has the bounce page, too.
    vcpu: Mutex<State>,
}

struct State {
    vcpu: Vcpu,
    /// It stands at its request for a source.
    ready: bool,
}

impl Copier {
    /// How many pages it takes from [`CopierAt::gpa`] on: the last is no memory, but where its vCPU talks to the host.
    pub fn pages(reach_bytes: u64) -> u64 {
        3 + (identity_tables_bytes(reach_bytes) / PAGE_BYTES)
    }

    /// Makes the slot and the vCPU.
    ///
    /// # Errors
    /// `NoRoom` when it lies outside of its own reach; as [`Vm::set_memslot`] and [`Vm::create_vcpu`].
    pub fn new(vm: &Vm, at: CopierAt) -> Result<Self, KvmError> {
        let what = "a copier's page";
        let len = (Self::pages(at.reach_bytes) - 1) * PAGE_BYTES;
        let span = slots::aligned(what, at.gpa, len + PAGE_BYTES)?;
        let os = |step: &'static str| move |error: rustix::io::Errno| KvmError::os(step, error.into());
        let file = memfd_create("copier", MemfdFlags::CLOEXEC).map_err(os("creating a memfd"))?;
        ftruncate(&file, len).map_err(os("sizing a memfd"))?;
        let (bounce, tables) = (at.gpa.plus(PAGE_BYTES), at.gpa.plus(2 * PAGE_BYTES));
        let register = Gpa::new(span.last().get() + 1 - PAGE_BYTES);
        let mut write = |gpa: Gpa, bytes: &[u8]| pwrite(&file, gpa.offset_from(at.gpa), bytes);
        write(at.gpa, &CODE).map_err(|error| KvmError::Write { what, at: at.gpa, error })?;
        let tables = Span::of(tables, Gpa::new(register.get() - 1));
        if span.last().get() >= at.reach_bytes {
            return Err(KvmError::NoRoom { what, needed: span.last().get() + 1, span });
        }
        let root = identity_tables(tables, at.reach_bytes, &mut write)?;
        vm.set_memslot(at.slot, at.gpa, Memory::of_file(file.as_fd(), 0, len)?, SlotOptions::default())?;
        let vcpu = Mutex::new(State { vcpu: vm.create_vcpu(at.vcpu)?, ready: false });
        Ok(Self { at, bounce, register, root, file, vcpu })
    }

    /// Moves at most a page of bytes; otherwise how many it has moved.
    fn run(&self, state: &mut State, source: Gpa, target: Gpa, len: u64) -> Result<(), CopyFault> {
        let left = self.drive(state, [source.get(), target.get(), len]);
        if left == Some(0) { Ok(()) } else { Err(CopyFault { done: (len - left.unwrap_or(len).min(len)) as usize }) }
    }

    /// Bytes that are left; `None` when nothing is known, and then nothing counts as moved.
    fn drive(&self, state: &mut State, answers: [u64; 3]) -> Option<u64> {
        let start = Start { root: self.root, entry: self.at.gpa, stack: self.bounce, args: [self.register.get(), 0] };
        if !std::mem::take(&mut state.ready) {
            state.vcpu.start_in_long_mode(start).ok()?;
            self.expect(state, SOURCE)?;
        }
        state.vcpu.answer_mmio(answers[0]);
        for (register, answer) in [(TARGET, answers[1]), (BYTES, answers[2])] {
            self.expect(state, register)?;
            state.vcpu.answer_mmio(answer);
        }
        match next(state)? {
            Exit::MmioWrite { gpa, len_bytes: 8, value } if gpa == self.register.plus(LEFT) => {
                state.ready = self.expect(state, SOURCE).is_some();
                Some(value)
            }
            // Memory that it may not touch. What was moved before is moved.
            Exit::MemoryFault { .. } => Some(state.vcpu.fd().get_regs().ok()?.rcx),
            _ => None,
        }
    }

    fn expect(&self, state: &mut State, register: u64) -> Option<()> {
        (next(state)? == Exit::MmioRead { gpa: self.register.plus(register), len_bytes: 8 }).then_some(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.vcpu.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bounce page's offset in the file.
    fn bounce_offset(&self) -> u64 {
        self.bounce.offset_from(self.at.gpa)
    }
}

fn next(state: &mut State) -> Option<Exit> {
    loop {
        match state.vcpu.run() {
            Ok(Exit::Interrupted) => {}
            exit => return exit.ok(),
        }
    }
}

fn pwrite(file: &OwnedFd, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
    let written = rustix::io::pwrite(file, bytes, offset)?;
    if written == bytes.len() { Ok(()) } else { Err(std::io::ErrorKind::WriteZero.into()) }
}

impl Owner for Copier {
    fn pin(&self, _: Span<Page>, _: bool) -> Result<(), PinError> {
        Ok(())
    }

    fn unpin(&self, _: Span<Page>) {}

    fn host(&self, _: u64, _: u64) -> Option<HostAddr> {
        None
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), CopyFault> {
        let mut done = 0;
        for piece in into.chunks_mut(PAGE_BYTES as usize) {
            let state = &mut *self.state();
            let moved = self.run(state, self.at.memory.plus(offset + done as u64), self.bounce, piece.len() as u64);
            let ready = moved.as_ref().map_or_else(|fault| fault.done, |()| piece.len());
            let read = rustix::io::pread(&self.file, &mut piece[..ready], self.bounce_offset()).unwrap_or(0);
            done += read;
            if moved.is_err() || read < ready {
                return Err(CopyFault { done });
            }
        }
        Ok(())
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<(), CopyFault> {
        let mut done = 0;
        for piece in from.chunks(PAGE_BYTES as usize) {
            let state = &mut *self.state();
            pwrite(&self.file, self.bounce_offset(), piece).map_err(|_| CopyFault { done })?;
            let moved = self.run(state, self.bounce, self.at.memory.plus(offset + done as u64), piece.len() as u64);
            done += moved.as_ref().map_or_else(|fault| fault.done, |()| piece.len());
            moved.map_err(|_| CopyFault { done })?;
        }
        Ok(())
    }

    fn name(&self, page: Page) -> PageName {
        PageName::Memory { space: self.at.memory.get(), page: page.get() }
    }
}

impl fmt::Debug for Copier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Copier").field("at", &self.at).finish_non_exhaustive()
    }
}
