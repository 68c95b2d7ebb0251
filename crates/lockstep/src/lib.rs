//! What a VMM links.
//!
//! - [`kvm`]: the link to KVM: guest memory files, memory slots, attributes, vCPUs, and the probe of stage 2.

pub mod kvm;
