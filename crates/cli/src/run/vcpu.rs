//! The guest in a KVM virtual machine.
use crate::run::devices::Devices;
use crate::run::machine::Failure;
use addr::Gpa;
use backing::Backing;
use guest::{Features, Layout};
use lockstep::{GuestDma, Stage2};
use std::os::fd::OwnedFd;
use std::sync::Arc;

pub(crate) struct KvmGuest;
pub(crate) struct Running;

impl KvmGuest {
    pub(crate) fn new() -> Result<Self, Failure> { Err("not built".into()) }
    pub(crate) fn guest_memfd(&self, _: u64) -> Result<OwnedFd, Failure> { Err("x".into()) }
    pub(crate) fn stage2(&self) -> Arc<dyn Stage2> { unreachable!() }
    pub(crate) fn features(&self) -> Features { Features::HYPERCALL }
    pub(crate) fn start(&mut self, _: &Arc<GuestDma>, _: &Arc<Backing>, _: &Layout) -> Result<Running, Failure> { Err("x".into()) }
    pub(crate) fn probe(&mut self, _: &GuestDma, _: Gpa, _: &[Gpa]) -> Result<Vec<Option<u64>>, Failure> { Err("x".into()) }
    pub(crate) fn exits(&self) -> u64 { 0 }
}
impl Running { pub(crate) fn run(self, _: &mut Devices) -> Result<(), Failure> { Err("x".into()) } }
