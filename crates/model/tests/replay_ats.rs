//! The model's device with a cache of its own, on the real code: it asks for a translation, uses it, is asked to forget, answers, answers falsely, or never
//! answers. A host thread and a device thread are stopped where the model has a state to compare: the device with an answer on its way to its cache and
//! with an access that is allowed, the host while it waits for the device and with its pages detached. After every action the real tables, the device's
//! cache and what either thread does next are the model's.
//!
//! `LOCKSTEP_REPLAYS` asks for more random paths. Threads are stopped at pauses, which only debug builds have.
#![cfg(not(shuttle))]
#![allow(unreachable_pub, reason = "modules of a test binary")]

#[cfg(debug_assertions)]
mod ats;
#[cfg(debug_assertions)]
mod real;

#[cfg(not(debug_assertions))]
#[test]
fn needs_a_debug_build() {
    eprintln!("not replayed: release builds have no pauses to stop a device at");
}
