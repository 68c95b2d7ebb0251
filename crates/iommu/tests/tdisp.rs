//! The protocol of a trusted device interface: what each request does in each state, and what follows for DMA.

mod common;

use addr::{Address, Gpa, Iova, SizeSet};
use backing::Frames;
use common::{ASID, Machine};
use lockstep_iommu_device::{AtsDma, Device, Dma, Error, FaultKind, Nonce, Sdte, SdteStatus, Tdisp, Trust};
use pt::Perm;
use secure::{Reason, RmpSize, Vmpl};
use std::sync::atomic::{AtomicBool, Ordering};

fn entry(perm: Perm) -> Sdte {
    Sdte::new(perm, Vmpl::V0, None)
}

/// A page of each owner: private at 0x1000, shared at 0x2000.
fn machine() -> Machine {
    let machine = Machine::new(2 << 20, Frames::Contiguous);
    machine.make_private(0x1000, Gpa::new(0x1000), RmpSize::K4);
    machine.map_small(Iova::new(0), 0, 0x4000);
    machine
}

const PRIVATE: Iova = Iova::new(0x1000);
const SHARED: Iova = Iova::new(0x2000);

/// Why a read is refused.
fn read(dma: &mut Dma, at: Iova) -> Option<FaultKind> {
    dma.read(at, &mut [0; 8]).err().map(|fault| fault.reason)
}

fn write(dma: &mut Dma, at: Iova) -> Option<FaultKind> {
    dma.write(at, &[1; 8]).err().map(|fault| fault.reason)
}

fn accept(device: &Device, entry: Sdte) {
    device.bind(ASID).unwrap();
    let nonce = device.lock_interface().unwrap();
    device.start_interface(nonce).unwrap();
    assert_eq!(device.write_sdte(entry).unwrap(), SdteStatus::Success);
}

/// In the order in which a guest accepts a device, and back.
#[test]
fn from_unlocked_to_run_and_back() {
    let machine = machine();
    let device = &machine.device;
    let mut dma = machine.dma();
    let untrusted = |dma: &mut Dma| (read(dma, PRIVATE), read(dma, SHARED)) == (Some(FaultKind::Secure), None);
    let nothing = |dma: &mut Dma| (read(dma, PRIVATE), read(dma, SHARED)) == (Some(FaultKind::NotRunning), Some(FaultKind::NotRunning));
    let trusted = |dma: &mut Dma| (write(dma, PRIVATE), write(dma, SHARED)) == (None, None);
    assert!(untrusted(&mut dma));
    device.bind(ASID).unwrap();
    assert!(untrusted(&mut dma));
    let nonce = device.lock_interface().unwrap();
    assert_eq!(device.interface_state(), Tdisp::Locked);
    assert!(untrusted(&mut dma));
    device.start_interface(nonce).unwrap();
    assert!(nothing(&mut dma), "T=1 without a valid entry");
    assert_eq!(device.write_sdte(entry(Perm::RW)).unwrap(), SdteStatus::Success);
    assert_eq!((device.sdte().asid(), device.bound()), (ASID, Some(ASID)), "the guest cannot choose");
    assert!(trusted(&mut dma));
    assert_eq!(device.write_sdte(Sdte::default()).unwrap(), SdteStatus::Success);
    assert!(nothing(&mut dma), "the guest took its acceptance back");
    assert_eq!(device.write_sdte(entry(Perm::RW)).unwrap(), SdteStatus::Success);
    assert!(trusted(&mut dma));
    device.unbind().unwrap();
    assert!(nothing(&mut dma));
    device.stop_interface().unwrap();
    assert!(untrusted(&mut dma));
}

/// Whoever locks and starts again has to ask the guest again.
#[test]
fn an_acceptance_does_not_outlive_its_run() {
    let machine = machine();
    let device = &machine.device;
    let mut dma = machine.dma();
    let ends: [fn(&Device); 3] =
        [|device| device.stop_interface().unwrap(), |device| device.disturb().unwrap(), |device| device.reset().unwrap()];
    for (turn, end) in ends.into_iter().enumerate() {
        accept(device, entry(Perm::RW));
        assert_eq!(write(&mut dma, PRIVATE), None);
        end(device);
        assert_eq!(device.interface_state(), if turn == 0 { Tdisp::Unlocked } else { Tdisp::Error });
        assert!(!device.sdte().is_valid());
        assert_eq!(read(&mut dma, SHARED), if turn == 0 { None } else { Some(FaultKind::NotRunning) });
        device.stop_interface().unwrap();
        let nonce = device.lock_interface().unwrap();
        device.start_interface(nonce).unwrap();
        assert_eq!(read(&mut dma, PRIVATE), Some(FaultKind::NotRunning));
        device.stop_interface().unwrap();
        device.unbind().unwrap();
    }
}

/// Every request in every state, typed as a table; what is not listed is an error that changes nothing.
#[test]
fn nothing_but_the_listed_transitions() {
    use Tdisp::{Error as Failed, Locked, Run, Unlocked};
    let machine = machine();
    let bring = |state: Tdisp, bound: bool| {
        let device = machine.iommu.device("tdi");
        device.attach(&machine.domain).unwrap();
        let mut nonce = Nonce([0; 32]);
        if state != Unlocked || bound {
            device.bind(ASID).unwrap();
        }
        if state != Unlocked {
            nonce = device.lock_interface().unwrap();
        }
        if matches!(state, Run) {
            device.start_interface(nonce).unwrap();
        }
        if state == Failed {
            device.disturb().unwrap();
        }
        if !bound && state != Unlocked {
            device.unbind().unwrap();
        }
        (device, nonce)
    };
    let requests = ["bind", "unbind", "lock", "start", "stop", "disturb", "reset", "wrong nonce"];
    let listed = [
        ("bind", Unlocked, false, Unlocked),
        ("unbind", Unlocked, true, Unlocked),
        ("unbind", Locked, true, Locked),
        ("unbind", Run, true, Run),
        ("unbind", Failed, true, Failed),
        ("lock", Unlocked, true, Locked),
        ("start", Locked, true, Run),
    ];
    for state in [Unlocked, Locked, Run, Failed] {
        for bound in [false, true] {
            for request in requests {
                let (device, nonce) = bring(state, bound);
                assert_eq!((device.interface_state(), device.bound().is_some()), (state, bound));
                let before = (device.trust(), device.sdte(), device.bound());
                let done = match request {
                    "bind" => device.bind(ASID),
                    "unbind" => device.unbind(),
                    "lock" => device.lock_interface().map(drop),
                    "start" => device.start_interface(nonce),
                    "stop" => device.stop_interface(),
                    "disturb" => device.disturb(),
                    "reset" => device.reset(),
                    _ => device.start_interface(Nonce([7; 32])),
                };
                let always = match (request, state) {
                    ("stop", _) => Some(Unlocked),
                    ("disturb" | "reset", Locked | Run) => Some(Failed),
                    ("disturb" | "reset", same) => Some(same),
                    _ => None,
                };
                let to = always.or_else(|| listed.iter().find(|&&(r, s, b, _)| (r, s, b) == (request, state, bound)).map(|row| row.3));
                match (to, done) {
                    (Some(to), Ok(())) => assert_eq!(device.interface_state(), to, "{request} in {state}"),
                    (None, Err(error)) => {
                        let kind = matches!(error, Error::Interface { .. }) || request == "wrong nonce" && matches!(error, Error::Nonce);
                        assert!(kind, "{error}");
                        assert_eq!((device.interface_state(), (device.trust(), device.sdte(), device.bound())), (state, before));
                    }
                    (to, done) => panic!("{request} in {state}, bound {bound}: {to:?}, {done:?}"),
                }
            }
        }
    }
    let (device, nonce) = bring(Locked, true);
    device.start_interface(Nonce([7; 32])).unwrap_err();
    device.start_interface(nonce).unwrap();
    device.stop_interface().unwrap();
    let fresh = device.lock_interface().unwrap();
    assert!(fresh != nonce && device.start_interface(nonce).is_err(), "a nonce is for one run");
    assert!(matches!(machine.device.bind(0), Err(Error::Asid { .. })) && matches!(machine.device.bind(0x3ff), Err(Error::Asid { .. })));
}

#[test]
fn what_firmware_has_against_an_entry() {
    let machine = machine();
    let device = &machine.device;
    assert_eq!(device.write_sdte(entry(Perm::RW)).unwrap(), SdteStatus::NotBound);
    device.bind(ASID).unwrap();
    assert_eq!(device.write_sdte(entry(Perm::RW)).unwrap(), SdteStatus::InvalidTdi, "not in RUN");
    let nonce = device.lock_interface().unwrap();
    assert_eq!(device.write_sdte(entry(Perm::RW)).unwrap(), SdteStatus::InvalidTdi, "not in RUN");
    device.start_interface(nonce).unwrap();
    // Every bit alone: those that a guest may set, as the layout has them, and no other.
    let guests = |bit: usize| matches!(bit, 0 | 61 | 62 | 241 | 242 | 320..=351);
    for bit in 0..512 {
        let mut bytes = [0; 64];
        bytes[bit / 8] = 1 << (bit % 8);
        let asked = Sdte::from_bytes(&bytes);
        assert_eq!(asked.to_bytes(), bytes);
        let before = device.sdte();
        let answer = device.write_sdte(asked).unwrap();
        assert_eq!(answer, if guests(bit) { SdteStatus::Success } else { SdteStatus::Reserved }, "bit {bit}");
        assert!(guests(bit) || device.sdte() == before);
    }
    assert_eq!([SdteStatus::Success, SdteStatus::InvalidTdi, SdteStatus::NotBound, SdteStatus::Reserved].map(|s| s as u16), [0, 1, 2, 3]);
}

#[test]
fn ir_and_iw_count_for_each_access() {
    let machine = machine();
    let (mut dma, mut cached) = (machine.dma(), AtsDma::new(&machine.device).unwrap());
    for (perm, reads, writes) in
        [(Perm::RW, true, true), (Perm::READ, true, false), (Perm::WRITE, false, true), (Perm::NONE, false, false), (Perm::RW, true, true)]
    {
        accept(&machine.device, entry(perm));
        for at in [PRIVATE, SHARED] {
            // Twice: a walk, and a hit.
            for _ in 0..2 {
                assert_eq!(read(&mut dma, at), (!reads).then_some(FaultKind::NoRight), "{perm:?}");
                assert_eq!(write(&mut dma, at), (!writes).then_some(FaultKind::NoRight), "{perm:?}");
                assert_eq!(cached.read(at, &mut [0]).is_ok(), reads, "{perm:?}");
                assert_eq!(cached.write(at, &[0]).is_ok(), writes, "{perm:?}");
            }
        }
        machine.device.stop_interface().unwrap();
        machine.device.unbind().unwrap();
    }
}

#[test]
fn the_entry_gives_vmpl_and_vtom() {
    let machine = machine();
    let mut dma = machine.dma();
    accept(&machine.device, Sdte::new(Perm::RW, Vmpl::V1, None));
    let fault = dma.read(PRIVATE, &mut [0]).unwrap_err();
    assert_eq!((fault.reason, fault.refusal.unwrap().reason), (FaultKind::Secure, Reason::Permission));
    assert_eq!(read(&mut dma, SHARED), None);
    let vtom = Gpa::new(0x20_0000);
    assert_eq!(machine.device.write_sdte(Sdte::new(Perm::RW, Vmpl::V0, Some(vtom))).unwrap(), SdteStatus::Success);
    assert!(matches!(machine.device.trust(), Trust::Trusted { vtom: Some(at), .. } if at == vtom));
    machine.map(Iova::new(0x20_2000), 0x2000, 0x1000, Perm::RW, SizeSet::ALL);
    assert_eq!(read(&mut dma, PRIVATE), None);
    assert_eq!(dma.read(SHARED, &mut [0]).unwrap_err().refusal.unwrap().reason, Reason::NotAssigned, "below vTOM nothing is shared");
    assert_eq!(read(&mut dma, SHARED.plus(0x20_0000)), None);
}

/// When a request has returned, nothing under the old identity is on its way.
#[test]
fn a_change_waits_for_what_is_in_flight() {
    let machine = machine();
    let (stop, mut late) = (AtomicBool::new(false), 0);
    let word = |value: u64| machine.memory.host(machine.oa(0x1000), 8).unwrap().store_u64(0, value).unwrap();
    std::thread::scope(|scope| {
        for index in 0..2 {
            let (stop, machine) = (&stop, &machine);
            scope.spawn(move || {
                let (mut plain, mut cached) = (machine.dma(), AtsDma::new(&machine.device).unwrap());
                while !stop.load(Ordering::Relaxed) {
                    let _ = if index == 0 { plain.write(PRIVATE, &[0xaa; 0x1000]) } else { cached.write(PRIVATE, &[0xaa; 0x1000]) };
                }
            });
        }
        for turn in 0..300u64 {
            accept(&machine.device, entry(Perm::RW));
            std::thread::yield_now();
            match turn % 4 {
                0 => machine.device.write_sdte(Sdte::default()).map(drop).unwrap(),
                1 => machine.device.disturb().unwrap(),
                2 => machine.device.reset().unwrap(),
                _ => machine.device.unbind().unwrap(),
            }
            word(turn);
            std::thread::yield_now();
            late += u32::from(machine.peek(0x1000, 8) != turn.to_le_bytes());
            machine.device.stop_interface().unwrap();
            if turn % 4 != 3 {
                machine.device.unbind().unwrap();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(late, 0, "writes after the guest took its acceptance back");
}
