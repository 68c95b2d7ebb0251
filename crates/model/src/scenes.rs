//! Who plays. All at once would be more states than a machine has; each scene has the parts that one idea of the design is about, and all of their
//! interleavings.

use crate::device::{Device, Kind};
use crate::host::{Host, Op};
use crate::state::{ALL, IoTable, Is, Kvm, PAGES, Rmp, Set, State, Vcpu};
use serde::Serialize;

/// A cast.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scene {
    /// One thread that does everything, any step of which may fail; a trusted device.
    Device,
    /// One thread that converts and merges; a trusted and an untrusted device.
    Devices,
    /// Two threads on the same pages, and an untrusted device.
    Hosts,
    /// One thread that does everything, with failures; a vCPU.
    Stage2,
    /// One thread that converts and punches; a device with a cache of its own, which may not answer.
    Ats,
    /// A trusted device that leaves RUN and comes back, while a thread converts.
    Trust,
}

const TRUSTED: Kind = Kind { trusted: true, ats: false };
const UNTRUSTED: Kind = Kind { trusted: false, ats: false };
const ATS: Kind = Kind { trusted: false, ats: true };

impl Scene {
    /// Every one.
    pub const ALL: [Self; 6] = [Self::Device, Self::Devices, Self::Hosts, Self::Stage2, Self::Ats, Self::Trust];

    /// For reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Devices => "devices",
            Self::Hosts => "hosts",
            Self::Stage2 => "stage-2",
            Self::Ats => "ats",
            Self::Trust => "trust",
        }
    }

    /// Devices.
    pub fn devices(self) -> &'static [Kind] {
        match self {
            Self::Device | Self::Trust => &[TRUSTED],
            Self::Devices => &[TRUSTED, UNTRUSTED],
            Self::Hosts => &[UNTRUSTED],
            Self::Stage2 => &[],
            Self::Ats => &[ATS],
        }
    }

    /// Host threads.
    pub fn hosts(self) -> usize {
        match self {
            Self::Hosts | Self::Trust => 2,
            Self::Device | Self::Devices | Self::Stage2 | Self::Ats => 1,
        }
    }

    /// Whether a vCPU touches memory.
    pub fn has_vcpu(self) -> bool {
        self == Self::Stage2
    }

    /// Whether steps of the host may fail.
    pub fn has_failures(self) -> bool {
        matches!(self, Self::Device | Self::Stage2)
    }

    /// The pages that a device accesses.
    pub fn pages(self, device: usize) -> Set {
        match (self, device) {
            (Self::Devices, 1) => 0b01,
            _ => ALL,
        }
    }

    /// What the host thread of that number is asked.
    pub fn ops(self, host: usize) -> Vec<Op> {
        let convert = |sets: &'static [Set]| sets.iter().flat_map(|&pages| [true, false].map(|private| Op::Convert { pages, private }));
        let punch = |sets: &'static [Set]| sets.iter().flat_map(|&pages| [Op::Punch(pages), Op::Populate(pages)]);
        match (self, host) {
            (Self::Device | Self::Stage2, _) => {
                convert(&[0b01, 0b10, ALL]).chain(punch(&[0b01, 0b10, ALL])).chain([Op::Merge, Op::Smash]).collect()
            }
            (Self::Devices, _) => convert(&[0b01, ALL]).chain([Op::Merge]).collect(),
            (Self::Hosts, 0) => convert(&[0b01, ALL]).chain(punch(&[0b01, ALL])).collect(),
            (Self::Hosts, _) => convert(&[0b01, 0b10]).chain([Op::Merge, Op::Smash]).collect(),
            (Self::Ats, _) => convert(&[0b01, ALL]).chain(punch(&[0b01, ALL])).chain([Op::Merge]).collect(),
            (Self::Trust, 0) => convert(&[0b01, ALL]).collect(),
            (Self::Trust, _) => vec![Op::Trust(true), Op::Trust(false)],
        }
    }

    /// Everything shared, nothing cached, one large leaf.
    pub fn start(self) -> State {
        State {
            is: [Is::Shared; PAGES],
            released: 0,
            rmp: Rmp::default(),
            io: IoTable::Large,
            kvm: Kvm::default(),
            lock: None,
            hosts: vec![Host::IDLE; self.hosts()],
            devices: self.devices().iter().map(|kind| Device::new(*kind)).collect(),
            vcpu: Vcpu::Idle,
            broken: None,
        }
    }
}
