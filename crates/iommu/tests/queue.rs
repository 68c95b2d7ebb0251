//! Descriptors of a queue fare as they would alone, and a writer waits for 64 KiB of them at most.

mod common;

use addr::{Address, Gpa, Iova, SizeSet};
use backing::Frames;
use common::{BASE, Machine, span};
use lockstep_iommu_device::{CHUNK_BYTES, Descriptor, Fault, FaultKind, OnFault, RefusedBy};
use pt::Perm;
use secure::RmpSize;

const K4: u64 = 4 << 10;
const MIB: u64 = 1 << 20;

/// One descriptor, before its buffers exist.
#[derive(Clone, Copy, Debug)]
enum Plan {
    Read(Iova, usize),
    Write(Iova, usize, u8),
    Copy(Iova, Iova, u64),
}

/// Leaves of 2 MiB and of 4 KiB, a hole, a part that may only be read.
fn machine() -> Machine {
    let machine = Machine::new(4 * MIB, Frames::Contiguous);
    machine.map(BASE, 0, 2 * MIB, Perm::RW, SizeSet::ALL);
    machine.map_small(BASE.plus(2 * MIB), 2 * MIB, 256 << 10);
    machine.map(BASE.plus(2 * MIB + (512 << 10)), 3 * MIB, 256 << 10, Perm::READ, SizeSet::ALL);
    machine
}

fn random_plan(random: &mut fastrand::Rng) -> Plan {
    let mut place = || match random.u8(0..20) {
        // Near an edge.
        0 => BASE.plus(2 * MIB - 200 + random.u64(0..300)),
        1 => BASE.plus(2 * MIB + (256 << 10) - random.u64(0..5000)),
        2 => BASE.plus(random.u64(0..4 * MIB)),
        3 => Iova::new(u64::MAX - random.u64(0..10_000)),
        _ => BASE.plus(random.u64(0..2 * MIB + (200 << 10))),
    };
    let (at, to) = (place(), place());
    let len = *random.choice(&[0usize, 1, 64, 100, 4096, 5000, 20_000, 70_000]).unwrap();
    match random.u8(0..3) {
        0 => Plan::Read(at, len),
        1 => Plan::Write(at, len, random.u8(..)),
        // Not onto itself: what arrives then is unspecified.
        _ => Plan::Copy(
            BASE.plus(random.u64(0..MIB)),
            if to < BASE.plus(MIB + (128 << 10)) { to.plus(MIB + (128 << 10)) } else { to },
            len as u64,
        ),
    }
}

type Outcome = (Vec<Option<Result<(), Fault>>>, Vec<Vec<u8>>, Vec<u8>);

/// The plans, with buffers, over a machine of their own: results, what was read, and all memory afterwards.
fn outcome(plans: &[Plan], run: impl FnOnce(&Machine, &mut [Descriptor<'_>])) -> Outcome {
    let machine = machine();
    machine.poke(0, &(0..4 * MIB).map(|at| (at * 7 + at / 251) as u8).collect::<Vec<_>>());
    let mut buffers: Vec<_> = plans
        .iter()
        .map(|plan| match *plan {
            Plan::Read(_, len) => vec![0xee; len],
            Plan::Write(_, len, byte) => vec![byte; len],
            Plan::Copy(..) => Vec::new(),
        })
        .collect();
    let mut queue: Vec<_> = plans
        .iter()
        .zip(&mut buffers)
        .map(|(plan, buffer)| match *plan {
            Plan::Read(at, _) => Descriptor::read(at, buffer),
            Plan::Write(at, ..) => Descriptor::write(at, buffer),
            Plan::Copy(src, dst, len) => Descriptor::copy(src, dst, len),
        })
        .collect();
    run(&machine, &mut queue);
    // Windows lie where there is room: the output addresses of two machines differ.
    let plain = |fault: Fault| Fault { oa: fault.oa.map(|oa| addr::Oa::new(oa.get() - machine.oa(0).get())), ..fault };
    let results = queue.iter().map(|descriptor| descriptor.result().map(|result| result.map_err(plain))).collect();
    drop(queue);
    (results, buffers, machine.peek(0, 4 * MIB as usize))
}

#[test]
fn as_each_would_alone() {
    for seed in 0..if cfg!(debug_assertions) { 30 } else { 100 } {
        let mut random = fastrand::Rng::with_seed(seed);
        let plans: Vec<_> = (0..random.usize(1..60)).map(|_| random_plan(&mut random)).collect();
        let together = outcome(&plans, |machine, queue| assert_eq!(machine.dma().run(queue, OnFault::Continue), queue.len()));
        let alone = outcome(&plans, |machine, queue| {
            let mut dma = machine.dma();
            queue.chunks_mut(1).for_each(|one| _ = dma.run(one, OnFault::Continue));
        });
        let calls = outcome(&plans, |machine, queue| {
            let mut dma = machine.dma();
            for (descriptor, plan) in queue.iter_mut().zip(&plans) {
                // The call in place of the queue; what it says is compared here, as a descriptor's result is the queue's to write.
                let result = match *plan {
                    Plan::Read(at, len) => dma.read(at, &mut vec![0; len]),
                    Plan::Write(at, len, byte) => dma.write(at, &vec![byte; len]),
                    Plan::Copy(src, dst, len) => dma.copy(src, dst, len),
                };
                assert_eq!(machine.dma().run(std::slice::from_mut(descriptor), OnFault::Stop), 1);
                let again = *descriptor.result().unwrap();
                assert_eq!(result, again, "seed {seed}: {plan:?}");
            }
        });
        assert!(together == alone && together == calls, "seed {seed}");
        assert!(together.0.contains(&Some(Ok(()))) || plans.len() < 5);
    }
}

#[test]
fn a_fault_stops_the_queue_or_does_not() {
    let machine = machine();
    let mut dma = machine.dma();
    let hole = BASE.plus(2 * MIB + (300 << 10));
    let queue = || [BASE, hole, BASE.plus(K4)].map(|at| Descriptor::write(at, &[1; 16]));
    let mut stopped = queue();
    assert_eq!(dma.run(&mut stopped, OnFault::Stop), 2);
    assert_eq!(stopped[0].result(), Some(&Ok(())));
    assert_eq!(stopped[1].result().unwrap().unwrap_err().reason, FaultKind::NotMapped);
    assert_eq!(stopped[2].result(), None);
    assert_eq!(machine.peek(K4, 16), [0; 16]);
    let mut whole = queue();
    assert_eq!(dma.run(&mut whole, OnFault::Continue), 3);
    assert_eq!(whole[2].result(), Some(&Ok(())));
    assert_eq!(machine.peek(K4, 16), [1; 16]);
    assert_eq!(dma.run(&mut [], OnFault::Stop), 0);
    // No guard was left open: this would wait for it for ever.
    machine.unmap(span(BASE, 2 * MIB));
    let mut gone = queue();
    assert_eq!(dma.run(&mut gone, OnFault::Stop), 1);
}

/// What a leaf allows is asked again under each guard, and for each kind of access.
#[test]
fn a_leaf_that_was_good_is_asked_again() {
    let machine = machine();
    let mut dma = machine.dma();
    let readable = BASE.plus(2 * MIB + (512 << 10));
    let mut bytes = [0; 16];
    let mut mixed = [Descriptor::read(readable, &mut bytes), Descriptor::write(readable.plus(64), &[1; 16])];
    dma.run(&mut mixed, OnFault::Continue);
    assert_eq!(mixed[0].result(), Some(&Ok(())));
    assert_eq!(mixed[1].result().unwrap().unwrap_err().reason, FaultKind::NoPermission);
    let mut ended = || {
        let mut queue = [BASE, BASE.plus(K4)].map(|at| Descriptor::write(at, &[2; 16]));
        dma.run(&mut queue, OnFault::Continue);
        queue.map(|descriptor| descriptor.result().unwrap().map_err(|fault| fault.table))
    };
    assert_eq!(ended(), [Ok(()); 2]);
    machine.make_private(0x5000, Gpa::new(0x5000), RmpSize::K4);
    assert_eq!(ended(), [Err(RefusedBy::SecureWorld); 2]);
}

/// An unmap in the middle of a long queue gets in between two guards; behind it nothing goes through.
fn interrupted(lens: &[usize], guarded: usize) {
    const LEN: u64 = 16 * MIB;
    let machine = Machine::new(LEN, Frames::Contiguous);
    let bytes = vec![2; CHUNK_BYTES as usize];
    let count = 300_000;
    let interrupted = (0..200).any(|attempt| {
        machine.map(BASE, 0, LEN, Perm::RW, SizeSet::ALL);
        let mut dma = machine.dma();
        dma.write(BASE, &[0]).unwrap();
        let first = std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let each = |place: usize| (BASE.plus((place as u64 * K4) % (LEN - CHUNK_BYTES)), lens[place % lens.len()]);
                let mut queue: Vec<_> = (0..count).map(each).map(|(at, len)| Descriptor::write(at, &bytes[..len])).collect();
                assert_eq!(dma.run(&mut queue, OnFault::Continue), count);
                let ok: Vec<_> = queue.iter().map(|descriptor| descriptor.result().unwrap().is_ok()).collect();
                let first = ok.iter().position(|ok| !ok);
                assert!(ok[first.unwrap_or(count)..].iter().all(|ok| !ok), "something went through after an unmap");
                first
            });
            // How long it takes until the queue is being run nobody knows.
            std::thread::sleep(std::time::Duration::from_millis(1 + attempt % 40));
            machine.unmap(span(BASE, LEN));
            writer.join().unwrap()
        });
        assert!(first.is_none_or(|first| first % guarded == 0), "an unmap got in at {first:?}, inside a guard");
        first.is_some_and(|first| first > 0)
    });
    assert!(interrupted, "every unmap waited for a whole queue");
}

#[test]
fn a_queue_leaves_its_guard_every_64_kib() {
    interrupted(&[K4 as usize], 16);
}

/// Descriptors that copy next to nothing are counted all the same: a writer does not wait for a million of them.
#[test]
fn a_queue_of_small_ones_leaves_its_guard() {
    interrupted(&[1, 8], 16);
}
