//! Memslots by either side, against one entry per page.

use addr::{Gpa, PAGE_LG2, Page, Span};
use backing::{Backing, Frames};
use lockstep_convert::{RecordedStage2, Space, SpaceError};
use std::collections::BTreeMap;
use std::sync::Arc;

const PAGES: u64 = 48;
const FRAMES: u64 = 96;

fn gpas(first: u64, len: u64) -> Span<Gpa> {
    Span::from_len(Gpa::new(first << PAGE_LG2), len << PAGE_LG2).unwrap()
}

fn pages(first: u64, len: u64) -> Span<Page> {
    Span::from_len(Page::new(first), len).unwrap()
}

/// Guest frame to backing and page.
type Model = BTreeMap<u64, (usize, u64)>;

/// Whether `len` pages may be there, by every single one of them.
fn fits(model: &Model, which: usize, page: u64, frame: u64, len: u64, again: bool) -> bool {
    (0..len).all(|index| {
        let wanted = (which, page + index);
        let there = model.get(&(frame + index));
        let shown = model.iter().find(|(_, have)| **have == wanted).map(|(frame, _)| *frame);
        match (there, shown) {
            (None, None) => true,
            (Some(have), Some(at)) => again && *have == wanted && at == frame + index,
            _ => false,
        }
    })
}

#[test]
fn any_history_is_as_page_by_page() {
    let mut random = fastrand::Rng::with_seed(11);
    let memory: [Arc<Backing>; 2] = [(); 2].map(|()| Backing::simulated(PAGES << PAGE_LG2, Frames::Contiguous).unwrap());
    let space = Space::new(&Arc::default(), Arc::new(RecordedStage2::new()), 1);
    let mut model = Model::new();
    let mut refused = [0; 2];
    for _ in 0..6000 {
        let len = random.u64(1..=8);
        let (which, page, frame) = (random.usize(..2), random.u64(..=PAGES - len), random.u64(..=FRAMES - len));
        // Half of the time at a place that goes on from something.
        let frame = if random.bool() { (page + 13 * which as u64).min(FRAMES - len) } else { frame };
        match random.u8(..10) {
            0..4 => {
                let fits = fits(&model, which, page, frame, len, true);
                let done = space.enroll(gpas(frame, len), &memory[which], pages(page, len));
                assert_eq!(done.is_ok(), fits, "{done:?}");
                refused[0] += u32::from(!fits);
                if fits {
                    (0..len).for_each(|index| _ = model.insert(frame + index, (which, page + index)));
                }
            }
            4..6 => {
                let fits = fits(&model, which, page, frame, len, false);
                let done = space.add_slot(gpas(frame, len).start(), len << PAGE_LG2, &memory[which], page << PAGE_LG2);
                assert_eq!(done.is_ok(), fits, "{done:?}");
                refused[1] += u32::from(!fits);
                if fits {
                    (0..len).for_each(|index| _ = model.insert(frame + index, (which, page + index)));
                }
            }
            6..9 => {
                space.dismiss(gpas(frame, len)).unwrap();
                (0..len).for_each(|index| _ = model.remove(&(frame + index)));
            }
            _ => match space.remove_slot(gpas(frame, 1).start()) {
                Ok(span) => {
                    assert_eq!(span.start(), gpas(frame, 1).start());
                    (0..=span.last_offset() >> PAGE_LG2).for_each(|index| assert!(model.remove(&(frame + index)).is_some()));
                }
                Err(error) => {
                    assert!(matches!(error, SpaceError::NoSlot(_)));
                    let slot = model.get(&frame);
                    assert!(slot.is_none_or(|(which, page)| {
                        page.checked_sub(1).is_some_and(|before| model.get(&(frame - 1)) == Some(&(*which, before)))
                    }));
                }
            },
        }
        check(&space, &memory, &model);
    }
    assert!(refused.iter().all(|count| *count > 100), "{refused:?}");
}

fn check(space: &Space, memory: &[Arc<Backing>; 2], model: &Model) {
    let mut seen = Model::new();
    for (span, backing, first) in space.slots() {
        let which = memory.iter().position(|own| Arc::ptr_eq(own, &backing)).unwrap();
        let frame = span.start().get() >> PAGE_LG2;
        (0..=span.last_offset() >> PAGE_LG2).for_each(|index| _ = seen.insert(frame + index, (which, first.get() + index)));
    }
    assert_eq!(seen, *model);
    for (which, backing) in memory.iter().enumerate() {
        let mut seen = Model::new();
        for (run, gpas) in space.gpas_of(backing, pages(3, PAGES - 6)) {
            assert_eq!(run.last_offset(), gpas.last_offset() >> PAGE_LG2);
            let frame = gpas.start().get() >> PAGE_LG2;
            (0..run.len()).for_each(|index| _ = seen.insert(frame + index, (which, run.start().get() + index)));
        }
        let own = model.iter().filter(|(_, have)| have.0 == which && (3..PAGES - 3).contains(&have.1)).map(|(frame, have)| (*frame, *have));
        assert_eq!(seen, own.collect());
        for page in 0..PAGES {
            let at = model.iter().find(|(_, have)| **have == (which, page)).map(|(frame, _)| Gpa::new(*frame << PAGE_LG2));
            assert_eq!(space.gpa_of(backing, Page::new(page)), at);
        }
    }
}
