//! Why the link could not do what it was asked to, in words that name the step, the span, and what to do.
#![forbid(unsafe_code)]

use addr::{Gpa, OutOfMemory, Span, SpanError};
use std::io;
use thiserror::Error;

/// What the KVM link answers when something does not work. Nothing has changed then.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum KvmError {
    /// The kernel refused a step.
    #[error("{step}: {error}{hint}")]
    Kernel {
        /// Which step.
        step: &'static str,
        /// Its errno, in words.
        error: io::Error,
        /// What can be done about it; empty, or begins with a separator.
        hint: &'static str,
    },
    /// This kernel's KVM does not offer it.
    #[error("this host's KVM does not offer {what}: {hint}")]
    Missing {
        /// What was wanted.
        what: &'static str,
        /// What to do.
        hint: &'static str,
    },
    /// A span that is empty, wraps, or does not keep to pages.
    #[error("{what}: {error}")]
    Span {
        /// Whose span it is.
        what: &'static str,
        /// What is wrong with it.
        error: SpanError,
    },
    /// A memory slot's span and its memory are of different lengths.
    #[error("slot {slot} for {span} was given {memory_bytes:#x} bytes of memory: both must be equally long")]
    LengthsDiffer {
        /// The slot.
        slot: u32,
        /// Where it would lie.
        span: Span<Gpa>,
        /// Bytes it was given.
        memory_bytes: u64,
    },
    /// A memory slot would lie over another one.
    #[error("slot {slot} for {span} lies over slot {other_slot} at {other}: remove that one first")]
    Overlap {
        /// The slot.
        slot: u32,
        /// Where it would lie.
        span: Span<Gpa>,
        /// The slot that is there.
        other_slot: u32,
        /// Where that one lies.
        other: Span<Gpa>,
    },
    /// The slot number is in use.
    #[error("slot {slot} is in use for {span}: remove it first, or take another number")]
    SlotInUse {
        /// The slot.
        slot: u32,
        /// Where it lies.
        span: Span<Gpa>,
    },
    /// No such slot.
    #[error("there is no slot {slot}")]
    NoSlot {
        /// The number asked for.
        slot: u32,
    },
    /// A slot number past what KVM has.
    #[error("slot {slot} is past the last one: KVM has {slots} slots here")]
    SlotNumber {
        /// The number asked for.
        slot: u32,
        /// How many there are.
        slots: u32,
    },
    /// A slot's part of its file lies past the file's end.
    #[error("slot {slot} for {span} needs its file's bytes from {offset:#x} on, and the file ends at {file_bytes:#x}")]
    PastFile {
        /// The slot.
        slot: u32,
        /// Where it would lie.
        span: Span<Gpa>,
        /// Where in the file it begins.
        offset: u64,
        /// How long the file is.
        file_bytes: u64,
    },
    /// A part of a guest's page tables or code does not fit where it was to go.
    #[error("{what} needs {needed:#x} bytes and {span} has {have:#x}: give a longer span", have = .span.len())]
    NoRoom {
        /// What.
        what: &'static str,
        /// Bytes it needs.
        needed: u64,
        /// Where it was to go.
        span: Span<Gpa>,
    },
    /// The caller's writer of guest memory failed.
    #[error("writing {what} into guest memory at {at:?}: {error}")]
    Write {
        /// What.
        what: &'static str,
        /// Where.
        at: Gpa,
        /// Why.
        error: io::Error,
    },
    /// No memory for the link's own records.
    #[error(transparent)]
    OutOfMemory(#[from] OutOfMemory),
    /// Every real-time signal has a handler already.
    #[error("no real-time signal is free to kick a vCPU with: this process has handlers on all of them")]
    NoSignal,
    /// The stage-2 probe's vCPU did something else than read and report.
    #[error("the probe of {at:?} ended with {exit}")]
    Probe {
        /// The address under probe.
        at: Gpa,
        /// What its vCPU did.
        exit: String,
    },
}

impl KvmError {
    /// A step of kvm-ioctls that failed.
    pub(super) fn at(step: &'static str, error: kvm_ioctls::Error) -> Self {
        Self::os(step, io::Error::from_raw_os_error(error.errno()))
    }

    /// A step that failed, with the hint that goes with its errno.
    pub(super) fn os(step: &'static str, error: io::Error) -> Self {
        let hint = match (step, error.kind()) {
            (OPEN, io::ErrorKind::NotFound) => "; load kvm_amd or kvm_intel, or, in a VM, ask for nested virtualization",
            (OPEN, io::ErrorKind::PermissionDenied) => "; join the group that owns /dev/kvm (mostly `kvm`), or run with its rights",
            (_, io::ErrorKind::AlreadyExists) => "; this part of the file is bound to another slot, or the id is taken",
            (_, io::ErrorKind::OutOfMemory) => "; free memory, or give the guest less",
            (_, io::ErrorKind::ResourceBusy) => "; another user of hardware virtualization is running",
            _ => "",
        };
        Self::Kernel { step, error, hint }
    }
}

/// The first step, whose failures have hints of their own.
pub(super) const OPEN: &str = "opening /dev/kvm";
