//! Streams of calls in process, chosen by the fuzzer. `cargo test -p lockstep-iommufd --features test-ops --test streams` makes the same from seeds.
#![no_main]

extern crate lockstep_backing as backing;

use libfuzzer_sys::fuzz_target;

#[path = "../../crates/iommufd/tests/stream/mod.rs"]
mod stream;

fuzz_target!(|bytes: &[u8]| {
    stream::run(bytes, None);
});
