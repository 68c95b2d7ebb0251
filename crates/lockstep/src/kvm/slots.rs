//! Which memory slots a VM has, and what must be true of a new one before the kernel is asked.
#![forbid(unsafe_code)]

use super::{KvmError, Memory};
use addr::{Address, Gpa, OverlapError, PAGE_LG2, Span, SpanError, SpanMap};

/// One memory slot as it was given to KVM.
#[derive(Clone, Debug)]
struct Slot {
    number: u32,
    /// Keeps the memory mapped for as long as KVM may reach it.
    _memory: Memory,
}

/// The slots of one VM.
pub(super) struct Slots {
    by_gpa: SpanMap<Gpa, Slot>,
}

/// A slot as its caller asks for it.
pub(super) struct Wanted<'a> {
    pub(super) number: u32,
    pub(super) gpa: Gpa,
    pub(super) len_bytes: u64,
    pub(super) memory: &'a Memory,
    /// Offset in the guest_memfd and that file's length.
    pub(super) file: Option<(u64, u64)>,
}

impl Slots {
    pub(super) fn new() -> Self {
        Self { by_gpa: SpanMap::new() }
    }

    /// Everything that can be wrong with a slot; and room is made, so that [`Slots::add`] cannot fail afterwards.
    pub(super) fn check(&mut self, wanted: &Wanted<'_>, slots: u32) -> Result<Span<Gpa>, KvmError> {
        let slot = wanted.number;
        if slot >= slots {
            return Err(KvmError::SlotNumber { slot, slots });
        }
        let span = aligned("a slot's guest addresses", wanted.gpa, wanted.len_bytes)?;
        if wanted.memory.len_bytes() != span.len() {
            return Err(KvmError::LengthsDiffer { slot, span, memory_bytes: wanted.memory.len_bytes() });
        }
        let _host = aligned("a slot's host addresses", wanted.memory.hva(), span.len())?;
        if let Some((offset, file_bytes)) = wanted.file {
            let part = aligned("a slot's part of its file", addr::Page::new(offset), span.len())?;
            if part.last().get() >= file_bytes {
                return Err(KvmError::PastFile { slot, span, offset, file_bytes });
            }
        }
        if let Some((span, _)) = self.by_gpa.iter().find(|(_, other)| other.number == slot) {
            return Err(KvmError::SlotInUse { slot, span });
        }
        if let Some((other, there)) = self.by_gpa.overlapping(span).next() {
            return Err(KvmError::Overlap { slot, span, other_slot: there.number, other });
        }
        self.by_gpa.reserve(1)?;
        Ok(span)
    }

    /// Notes a slot that the kernel has accepted, after [`Slots::check`].
    pub(super) fn add(&mut self, number: u32, span: Span<Gpa>, memory: Memory) -> Result<(), KvmError> {
        self.by_gpa.insert(span, Slot { number, _memory: memory }).map_err(|error| match error {
            OverlapError::OutOfMemory(none) => none.into(),
            _ => KvmError::SlotInUse { slot: number, span },
        })
    }

    pub(super) fn find(&self, slot: u32) -> Result<Span<Gpa>, KvmError> {
        self.by_gpa.iter().find(|(_, there)| there.number == slot).map(|(span, _)| span).ok_or(KvmError::NoSlot { slot })
    }

    /// Forgets a slot that the kernel has removed, and lets go of its memory.
    pub(super) fn remove(&mut self, span: Span<Gpa>) {
        self.by_gpa.remove(span.start());
    }

    pub(super) fn list(&self) -> Vec<(u32, Span<Gpa>)> {
        self.by_gpa.iter().map(|(span, slot)| (slot.number, span)).collect()
    }
}

/// A span of whole pages, or an error that says whose span it is.
pub(super) fn aligned<A: Address>(what: &'static str, start: A, len: u64) -> Result<Span<A>, KvmError> {
    Span::aligned(start, len, PAGE_LG2).map_err(|error: SpanError| KvmError::Span { what, error })
}
