//! Address space of closed windows is used again once it has all been used. Alone in its binary: other tests expect that their stale addresses
//! meet nothing, which holds only until then.

mod common;

use common::*;
use lockstep_backing::{Backing, Frames, OA_BASE};

#[test]
fn host_addresses_come_back_and_output_addresses_do_not() {
    // 40 windows of 1 TiB do not fit the reservation of at most 16 TiB at once.
    let (mut starts, mut next) = (Vec::new(), OA_BASE);
    for _ in 0..40 {
        let backing = Backing::memfd(1 << 40, Frames::Contiguous).unwrap();
        assert!(backing.window().start() >= next);
        next = backing.window().last();
        starts.push(backing.linear_hva().unwrap());
        host(&backing).write(0, &[1]).unwrap();
    }
    let again = starts.iter().filter(|start| starts.iter().filter(|other| other == start).count() > 1).count();
    assert!(again > 0, "no address was used twice");
}
