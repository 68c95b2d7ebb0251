//! What can go wrong in a conversion, and exactly how far it came.

use crate::Stage2Error;
use addr::{Gpa, Oa, Span, SpanError};
use secure::Code;
use thiserror::Error;

/// A step of the transaction, as reports name it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Looking at the request.
    Plan,
    /// Taking memory and tables.
    Reserve,
    /// Splitting a 2 MiB entry and its leaf.
    Smash,
    /// Keeping vCPUs out.
    Freeze,
    /// Taking leaves out, and waiting for devices.
    Detach,
    /// Asking whether anybody else holds the pages.
    Settle,
    /// Changing the RMP.
    Switch,
    /// Telling stage 2.
    Commit,
    /// Giving back the memory of the side that pages have left.
    Discard,
    /// Mapping what may be mapped.
    Attach,
    /// Letting vCPUs in again, and answering.
    Thaw,
}

impl Step {
    /// The steps of a conversion that goes well, in their order.
    pub const ALL: [Self; 10] = [
        Self::Plan,
        Self::Reserve,
        Self::Freeze,
        Self::Detach,
        Self::Settle,
        Self::Switch,
        Self::Commit,
        Self::Discard,
        Self::Attach,
        Self::Thaw,
    ];
}

/// Why a conversion did not finish. Up to and with `Reserve` nothing has changed. A refused `Smash` may have left 2 MiB entries that come
/// before it in 4 KiB, leaves and all: no page has another owner or other rights.
#[derive(Debug, Error)]
pub enum ConvertError {
    /// The span is no span of pages.
    #[error("cannot convert: {0}")]
    Span(#[from] SpanError),
    /// No memslot covers part of the span.
    #[error("cannot convert {span}: no memslot is at {at}")]
    NoMemory {
        /// What was asked for.
        span: Span<Gpa>,
        /// The first address without memory.
        at: Gpa,
    },
    /// Two changes of one batch meet.
    #[error("cannot convert {span} twice in one batch; send the second change in a batch of its own")]
    Twice {
        /// The later of the two.
        span: Span<Gpa>,
    },
    /// A page of the span was leaked: the secure world would not give it back.
    #[error("cannot convert {span}: the page at {oa} was leaked after the secure world kept it; it is never used again")]
    Leaked {
        /// What was asked for.
        span: Span<Gpa>,
        /// The leaked page.
        oa: Oa,
    },
    /// A page of the span is another guest's. Nothing has changed.
    #[error("cannot convert {span}: the page at {oa} is private to the guest with ASID {asid}; that guest gives it up first")]
    NotOurs {
        /// The pages that are not this guest's.
        span: Span<Gpa>,
        /// The first of them.
        oa: Oa,
        /// Whose they are; 0 is the firmware.
        asid: u32,
    },
    /// No memory or no table for what later steps need. Nothing has changed.
    #[error("cannot convert {span}, nothing has changed: {reason}")]
    Reserve {
        /// What was asked for.
        span: Span<Gpa>,
        /// What could not be had.
        reason: String,
    },
    /// The secure world refused. `done_pages` of the batch are converted, the span is as it was.
    #[error(
        "the secure world refused {step:?} of {span} ({oa}) with {code:?}; {done_pages} pages of the batch are converted, the rest is as before"
    )]
    Refused {
        /// Which step.
        step: Step,
        /// The guest's pages.
        span: Span<Gpa>,
        /// Their output address.
        oa: Oa,
        /// The instruction's code.
        code: Code,
        /// Pages converted before it.
        done_pages: u64,
    },
    /// Somebody who is no device holds a page: it is pinned, or under direct I/O. Nothing has changed, but for 2 MiB entries that were split.
    #[error("cannot convert {span}: the page at {at} is held by somebody else; nothing has changed, try again when it is let go")]
    Busy {
        /// The change that has it.
        span: Span<Gpa>,
        /// The first page that is held.
        at: Gpa,
    },
    /// A page could not be taken from the guest: it is unmapped, counted, and never used again.
    #[error(
        "{span} ({oa}) could not be made shared again ({code:?}); it is leaked and {done_pages} other pages of the batch are converted"
    )]
    Leaks {
        /// The guest's pages.
        span: Span<Gpa>,
        /// Their output address.
        oa: Oa,
        /// The instruction's code.
        code: Code,
        /// Pages converted.
        done_pages: u64,
    },
    /// Stage 2 refused a span after its owner had changed. Its pages are converted and unmapped, until converting them again retries. Should
    /// other spans have been refused as well, they are in the same state.
    #[error(
        "{source}; the owner has changed already and is not rolled back, {done_pages} pages of the batch are converted: convert the span again"
    )]
    Stage2 {
        /// What stage 2 said.
        source: Stage2Error,
        /// Pages converted.
        done_pages: u64,
    },
    /// The pages of a pair are converted and in use, and the memory of the side that they left is still there, out of everyone's reach. Restoring
    /// the span retries.
    #[error("{span} is converted, and the memory that it left was not given back: {reason}; call restore on the span")]
    NotDiscarded {
        /// The guest's pages.
        span: Span<Gpa>,
        /// Why not.
        reason: String,
    },
    /// The pages are converted, and devices do not see them. Restoring the span retries.
    #[error("{span} is converted but not mapped for devices: {reason}; call restore on the span")]
    NotMapped {
        /// The guest's pages.
        span: Span<Gpa>,
        /// Why not.
        reason: String,
    },
}

impl ConvertError {
    /// The step that failed.
    pub fn step(&self) -> Step {
        match self {
            Self::Span(_) | Self::NoMemory { .. } | Self::Twice { .. } | Self::Leaked { .. } | Self::NotOurs { .. } => Step::Plan,
            Self::Reserve { .. } => Step::Reserve,
            Self::Busy { .. } => Step::Settle,
            Self::Refused { step, .. } => *step,
            Self::Leaks { .. } => Step::Switch,
            Self::Stage2 { .. } => Step::Commit,
            Self::NotDiscarded { .. } => Step::Discard,
            Self::NotMapped { .. } => Step::Attach,
        }
    }

    /// The span that it is about, where there is one.
    pub fn span(&self) -> Option<Span<Gpa>> {
        match self {
            Self::Span(_) => None,
            Self::NoMemory { span, .. }
            | Self::Twice { span }
            | Self::Leaked { span, .. }
            | Self::NotOurs { span, .. }
            | Self::Reserve { span, .. }
            | Self::Busy { span, .. }
            | Self::Refused { span, .. }
            | Self::Leaks { span, .. }
            | Self::NotDiscarded { span, .. }
            | Self::NotMapped { span, .. } => Some(*span),
            Self::Stage2 { source, .. } => Some(source.span),
        }
    }
}
