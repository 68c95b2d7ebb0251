//! Which guest memory is private, as it was told to KVM or, where KVM keeps no such attribute, as the link alone knows it.
#![forbid(unsafe_code)]

use addr::{Gpa, OutOfMemory, Span, SpanMap};

/// Who keeps an attribute that was set (design D-11: reports say *recorded* for both, for neither can be read back).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// KVM took it (`KVM_SET_MEMORY_ATTRIBUTES`), and acts by it.
    Kernel,
    /// This kernel's KVM has no such attribute for this VM; the link remembers it.
    Recorded,
}

/// The private spans of one VM; what is not in it is shared.
pub(super) struct Attributes(SpanMap<Gpa, ()>);

impl Attributes {
    pub(super) fn new() -> Self {
        Self(SpanMap::new())
    }

    /// Makes sure that the next [`Attributes::set`] cannot fail.
    pub(super) fn reserve(&mut self) -> Result<(), OutOfMemory> {
        self.0.reserve(2)
    }

    pub(super) fn set(&mut self, span: Span<Gpa>, private: bool) -> Result<(), OutOfMemory> {
        if private { self.0.set(span, ()) } else { self.0.clear(span) }
    }

    pub(super) fn is_private(&self, gpa: Gpa) -> bool {
        self.0.get(gpa).is_some()
    }

    /// The runs of `span`, each with whether it is private.
    pub(super) fn runs(&self, span: Span<Gpa>) -> Vec<(Span<Gpa>, bool)> {
        self.0.runs(span).map(|(run, private)| (run, private.is_some())).collect()
    }

    pub(super) fn list(&self) -> Vec<Span<Gpa>> {
        self.0.iter().map(|(span, ())| span).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(start: u64, last: u64) -> Span<Gpa> {
        Span::of(Gpa::new(start), Gpa::new(last))
    }

    #[test]
    fn cut_and_joined() {
        let mut attributes = Attributes::new();
        attributes.set(span(0x1000, 0x8fff), true).unwrap();
        attributes.set(span(0x3000, 0x3fff), false).unwrap();
        assert_eq!(attributes.list(), [span(0x1000, 0x2fff), span(0x4000, 0x8fff)]);
        assert!(attributes.is_private(Gpa::new(0x2fff)) && !attributes.is_private(Gpa::new(0x3000)));
        attributes.set(span(0x3000, 0x3fff), true).unwrap();
        assert_eq!(attributes.list(), [span(0x1000, 0x8fff)]);
        attributes.set(Span::whole(), false).unwrap();
        assert_eq!(attributes.list(), []);
    }
}
