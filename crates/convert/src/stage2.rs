//! KVM's side of a conversion, as a trait: the link to a real VM implements it, and so does a plain record where there is no KVM.

use addr::{Gpa, OutOfMemory, Span, SpanMap};
use std::sync::PoisonError;
use sync::prim::Mutex;
use thiserror::Error;

/// How a table of an audit was looked at (design D-11). Output never claims more than this.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Evidence {
    /// The table's own bytes were read by a second walker.
    ReadBack,
    /// A vCPU read what the table leads to.
    Probed,
    /// What was told to the table's owner; the table itself cannot be seen.
    Recorded,
}

impl std::fmt::Display for Evidence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::ReadBack => "read back",
            Self::Probed => "probed",
            Self::Recorded => "recorded",
        })
    }
}

/// The owner of stage 2 refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("stage 2 refused to make {span} {}: {reason}", if *private { "private" } else { "shared" })]
pub struct Stage2Error {
    /// The span that was not changed.
    pub span: Span<Gpa>,
    /// What it should have become.
    pub private: bool,
    /// In the words of the owner.
    pub reason: String,
}

/// A page has users that no table knows of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Busy {
    /// The first such page.
    pub at: Gpa,
}

/// The second of the three tables: guest physical address to host page. Its owner keeps, per page, whether the guest holds it private.
///
/// A conversion calls `freeze`, then takes the leaves out and asks `settle`, then changes the RMP, then `commit`, then `thaw`, with the pages held throughout.
pub trait Stage2: Send + Sync {
    /// From here on no vCPU may install a translation of these spans, and none that is installed may be used.
    fn freeze(&self, spans: &[Span<Gpa>]);
    /// Whether the pages may change hands: asked when neither vCPUs nor devices have them any more. An owner of memory that is converted in
    /// place looks here for references that are left, as guest_memfd does when it answers EAGAIN.
    ///
    /// # Errors
    /// [`Busy`]: the conversion puts everything back.
    fn settle(&self, spans: &[Span<Gpa>]) -> Result<(), Busy> {
        let _ = spans;
        Ok(())
    }
    /// Records the new owner.
    ///
    /// # Errors
    /// [`Stage2Error`]; nothing of this span has changed then.
    fn commit(&self, span: Span<Gpa>, private: bool) -> Result<(), Stage2Error>;
    /// vCPUs may fault these spans in again. Called once for each `freeze`, also after an error.
    fn thaw(&self, spans: &[Span<Gpa>]);
    /// Whether the guest holds the page private, as last committed.
    fn is_private(&self, gpa: Gpa) -> bool;
    /// The runs of `span`, each with its owner, as last committed.
    fn runs(&self, span: Span<Gpa>) -> Vec<(Span<Gpa>, bool)>;
    /// What an audit may claim about this table.
    fn evidence(&self) -> Evidence {
        Evidence::Recorded
    }
}

/// A stage 2 that is only remembered: for guests that run as a thread, and for VMs whose KVM keeps no attributes.
#[derive(Debug, Default)]
pub struct RecordedStage2 {
    private: Mutex<SpanMap<Gpa, ()>>,
}

impl RecordedStage2 {
    /// Everything shared.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Stage2 for RecordedStage2 {
    fn freeze(&self, _spans: &[Span<Gpa>]) {}

    /// A fallible step, named `convert.settle`.
    fn settle(&self, spans: &[Span<Gpa>]) -> Result<(), Busy> {
        let at = spans.first().map_or(Gpa::new(0), |span| span.start());
        sync::fail::step("convert.settle").map_err(|_| Busy { at })
    }

    fn commit(&self, span: Span<Gpa>, private: bool) -> Result<(), Stage2Error> {
        let refused = |_| Stage2Error { span, private, reason: "no memory for the record".into() };
        sync::fail::step("convert.stage2").map_err(|_| refused(OutOfMemory))?;
        let mut map = self.private.lock().unwrap_or_else(PoisonError::into_inner);
        let done = if private { map.set(span, ()) } else { map.clear(span) };
        done.map_err(refused)
    }

    fn thaw(&self, _spans: &[Span<Gpa>]) {}

    fn is_private(&self, gpa: Gpa) -> bool {
        self.private.lock().unwrap_or_else(PoisonError::into_inner).get(gpa).is_some()
    }

    fn runs(&self, span: Span<Gpa>) -> Vec<(Span<Gpa>, bool)> {
        let map = self.private.lock().unwrap_or_else(PoisonError::into_inner);
        map.runs(span).map(|(run, private)| (run, private.is_some())).collect()
    }
}
