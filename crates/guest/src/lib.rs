//! A small guest program, so that the whole machine can be tried without an operating system in the guest.
//!
//! It turns pages private and shared, drives two DMA engines and checks every word they wrote. The same machine code runs in long
//! mode under KVM, where it knows its host by memory-mapped registers, and in a thread of the host, where it calls a [`Platform`].
//! A VMM's exit loop serves KVM through the same trait, so one implementation serves both.
//!
//! - [`Layout`]: where things lie in guest memory; [`Setup`] writes image, parameters and state table there.
//! - [`Report`]: what the guest counts while it runs, and the flag that stops it.
//! - [`registers`]: doorbell and DMA engines as the guest sees them, and the lists it sends.
//! - [`thread::run`]: the program in this thread.
//! - [`model::Host`]: the simplest host that does everything right; tests run the guest against it.

mod control;
mod layout;
mod memory;
pub mod model;
mod native;
mod platform;
pub mod registers;
mod setup;
pub mod thread;

pub use control::{Features, MAGIC, PageState, Params, Report, error};
pub use layout::{CONTROL, IMAGE, Layout, LayoutError, REPORT, REPORT_BYTES, STACK_TOP, STOP};
pub use memory::{Memory, MemoryError};
pub use platform::Platform;
pub use setup::Setup;

/// The guest program. Its first byte is the entry for a VM: rdi = 0, rsi = [`CONTROL`], rsp = [`STACK_TOP`].
/// Position independent, and small enough for the room between [`IMAGE`] and the stack.
pub fn image() -> &'static [u8] {
    native::image()
}
