//! The planted fault does harm that a recheck finds. Alone in its binary: a plant meets whoever punches first in the process.

mod common;

use common::*;
use lockstep_backing::{Backing, Frames, PageState};
use sync::fail;

#[test]
fn a_planted_punch_tells_nobody() {
    let backing = Backing::memfd(M2, Frames::Contiguous).unwrap();
    let (ear, at) = (Ear::of(&backing), host(&backing));
    at.write(0, &vec![0x77; M2 as usize]).unwrap();
    backing.populate(backing.pages(), PageState::Shared).unwrap();
    let plant = fail::plant("backing.ignore_punch", 0, 1);
    backing.punch(pages(1, 1)).unwrap();
    assert_eq!((plant.fired(), ear.take(), backing.state(page(1))), (1, vec![], PageState::Shared));
    assert_eq!(backing.holes(backing.pages()).unwrap(), [pages(1, 1)], "the memory itself did go");
    assert_eq!(backing.recheck(backing.pages()).unwrap().lost, [pages(1, 1)]);
    assert_eq!(ear.take(), [Heard::Revoke(pages(1, 1), PageState::Absent, Some(0))]);
    backing.punch(pages(2, 2)).unwrap();
    assert_eq!(ear.take(), [Heard::Revoke(pages(2, 2), PageState::Absent, Some(0x77))], "the plant is used up");
}
