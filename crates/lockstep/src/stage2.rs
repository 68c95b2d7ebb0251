//! Stage 2 of a KVM guest, as a conversion sees it.
//!
//! KVM zaps what it has installed and blocks faults inside `KVM_SET_MEMORY_ATTRIBUTES`, so freeze and thaw are nothing by themselves. Where
//! the VM has no such attributes, its stage 2 maps one and the same page before and after, and the link's record is all there is.

use crate::kvm::Vm;
use addr::{Gpa, Span};
use convert::{Stage2, Stage2Error};
use std::sync::Arc;

/// See the module.
pub struct KvmStage2(Arc<Vm>);

impl KvmStage2 {
    /// The stage 2 of `vm`.
    pub fn new(vm: &Arc<Vm>) -> Arc<Self> {
        Arc::new(Self(Arc::clone(vm)))
    }
}

impl Stage2 for KvmStage2 {
    fn freeze(&self, _spans: &[Span<Gpa>]) {}

    fn commit(&self, span: Span<Gpa>, private: bool) -> Result<(), Stage2Error> {
        let done = self.0.set_private(span, private);
        done.map(|_| ()).map_err(|error| Stage2Error { span, private, reason: error.to_string() })
    }

    fn thaw(&self, _spans: &[Span<Gpa>]) {}

    fn is_private(&self, gpa: Gpa) -> bool {
        self.0.is_private(gpa)
    }

    fn runs(&self, span: Span<Gpa>) -> Vec<(Span<Gpa>, bool)> {
        self.0.private_runs(span)
    }
}
