//! Refused accesses: what a record says, and the log that keeps the latest of them.
//!
//! The log never holds a device up: its ring is written under a lock that is only tried, and a record that does not get in is counted.

use addr::{Iova, Oa};
use secure::Refusal;
use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use thiserror::Error;

/// What a device wants to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Memory to device.
    Read,
    /// Device to memory.
    Write,
}

impl From<Access> for secure::Access {
    fn from(access: Access) -> Self {
        match access {
            Access::Read => Self::Read,
            Access::Write => Self::Write,
        }
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::Read { "read" } else { "write" })
    }
}

/// Which of the parties said no.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RefusedBy {
    /// The IO page table.
    IoPageTable,
    /// The secure world's table.
    SecureWorld,
    /// The memory behind the output address is not there.
    Backing,
    /// The device itself: where it is attached, whether it runs, what it was asked to do.
    Device,
}

/// Why an access was refused. The numbers are what the engine's fault register shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FaultKind {
    /// The device is attached to no domain.
    NotAttached = 1,
    /// A trusted device that is not in RUN, or has no valid secure device table entry (I-13).
    NotRunning = 2,
    /// The access runs past the end of the address space.
    Wraps = 3,
    /// No leaf answers for the address.
    NotMapped = 4,
    /// The leaf does not allow this.
    NoPermission = 5,
    /// The secure world's table does not allow this for the whole leaf.
    Secure = 6,
    /// No host memory is mapped at the output address.
    NoHostMemory = 7,
    /// The host memory vanished under the copy: truncated or punched by somebody else.
    HostMemoryGone = 8,
    /// The engine was given a length it does not take.
    BadLength = 9,
    /// The engine was given a command it does not know.
    BadCommand = 10,
    /// The device was quarantined because it did not answer an invalidation; a reset ends that.
    Quarantined = 11,
    /// No access: the device did not answer the invalidation of what begins at this address in time.
    NotAnswered = 12,
    /// The secure world's table does not allow this for an address that the device had translated earlier: it kept the translation for too
    /// long, or its owner took a permission away.
    SecureTranslated = 13,
    /// The guest gave the device no right to do this (ir, iw of the secure device table entry).
    NoRight = 14,
}

impl FaultKind {
    /// How many kinds there are, and one more, for tables by number.
    pub const COUNT: usize = 15;

    /// Every kind.
    pub const ALL: [Self; Self::COUNT - 1] = [
        Self::NotAttached,
        Self::NotRunning,
        Self::Wraps,
        Self::NotMapped,
        Self::NoPermission,
        Self::Secure,
        Self::NoHostMemory,
        Self::HostMemoryGone,
        Self::BadLength,
        Self::BadCommand,
        Self::Quarantined,
        Self::NotAnswered,
        Self::SecureTranslated,
        Self::NoRight,
    ];

    /// Who refuses for this reason.
    pub const fn refused_by(self) -> RefusedBy {
        match self {
            Self::NotMapped | Self::NoPermission => RefusedBy::IoPageTable,
            Self::Secure | Self::SecureTranslated => RefusedBy::SecureWorld,
            Self::NoHostMemory | Self::HostMemoryGone => RefusedBy::Backing,
            Self::NotAttached
            | Self::NotRunning
            | Self::Wraps
            | Self::BadLength
            | Self::BadCommand
            | Self::Quarantined
            | Self::NotAnswered
            | Self::NoRight => RefusedBy::Device,
        }
    }

    /// The event that AMD's IOMMU would log (AMD IOMMU specification, 2.5: IO_PAGE_FAULT, IOTLB_INV_TIMEOUT,
    /// RMP_PAGE_FAULT); `None` where hardware has none.
    pub const fn amd_event(self) -> Option<u8> {
        match self {
            Self::NotMapped | Self::NoPermission | Self::NotAttached | Self::Quarantined | Self::NoRight => Some(0x2),
            Self::NotAnswered => Some(0x7),
            Self::Secure | Self::SecureTranslated | Self::NotRunning => Some(0xd),
            _ => None,
        }
    }

    const fn text(self) -> &'static str {
        match self {
            Self::NotAttached => "the device is attached to no domain",
            Self::NotRunning => "the device is trusted, but not in RUN with a valid secure device table entry",
            Self::Wraps => "it runs past the end of the address space",
            Self::NotMapped => "nothing is mapped there",
            Self::NoPermission => "the mapping does not allow it",
            Self::Secure => "the secure world does not allow it",
            Self::NoHostMemory => "no host memory is mapped at the output address",
            Self::HostMemoryGone => "the host memory vanished",
            Self::BadLength => "the engine does not take this length",
            Self::BadCommand => "the engine does not know this command",
            Self::Quarantined => "the device is quarantined until it is reset",
            Self::NotAnswered => "the device did not answer an invalidation in time",
            Self::NoRight => "the guest does not let the device do that",
            Self::SecureTranslated => "the secure world does not allow it, and the device had translated the address earlier",
        }
    }
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

/// A refused access. Bytes before the refused one have been transferred.
#[derive(Clone, Copy, Debug, PartialEq, Error)]
#[error("device {device}: {access} at IOVA {iova} refused by {table:?}: {reason}; {done} bytes done")]
pub struct Fault {
    /// The device's number.
    pub device: u32,
    /// The domain it was attached to.
    pub domain: Option<u32>,
    /// First IOVA that was refused.
    pub iova: Iova,
    /// What was wanted.
    pub access: Access,
    /// Who refused.
    pub table: RefusedBy,
    /// Why.
    pub reason: FaultKind,
    /// Where the IOVA leads, when the page table had an answer.
    pub oa: Option<Oa>,
    /// Bytes of the call that were transferred before.
    pub done: u64,
    /// What the secure world's table said, when it was the one that refused.
    pub refusal: Option<Refusal>,
}

/// Faults of all devices of one unit: the latest, and how many of each kind.
#[derive(Debug)]
pub struct FaultLog {
    ring: Mutex<VecDeque<Fault>>,
    capacity: usize,
    by_kind: KindCounters,
    missed: AtomicU64,
}

/// A counter per [`FaultKind`].
#[derive(Debug, Default)]
pub struct KindCounters([AtomicU64; FaultKind::COUNT]);

impl KindCounters {
    pub(crate) fn count(&self, kind: FaultKind) {
        self.0[kind as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Faults of this kind.
    pub fn of(&self, kind: FaultKind) -> u64 {
        self.0[kind as usize].load(Ordering::Relaxed)
    }

    /// Faults of any kind.
    pub fn total(&self) -> u64 {
        self.0.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }
}

impl FaultLog {
    /// Keeps the latest `capacity` records.
    pub(crate) fn new(capacity: usize) -> Self {
        let capacity = capacity.max(1);
        let ring = Mutex::new(VecDeque::with_capacity(capacity));
        Self { ring, capacity, by_kind: KindCounters::default(), missed: AtomicU64::new(0) }
    }

    pub(crate) fn record(&self, fault: Fault) {
        self.by_kind.count(fault.reason);
        let mut ring = match self.ring.try_lock() {
            Ok(ring) => ring,
            Err(std::sync::TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(std::sync::TryLockError::WouldBlock) => {
                self.missed.fetch_add(1, Ordering::Relaxed);
                return;
            }
        };
        if ring.len() == self.capacity {
            ring.pop_front();
            self.missed.fetch_add(1, Ordering::Relaxed);
        }
        ring.push_back(fault);
    }

    /// Takes the records out, oldest first.
    pub fn drain(&self) -> Vec<Fault> {
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = VecDeque::with_capacity(self.capacity);
        std::mem::replace(&mut *ring, fresh).into()
    }

    /// The latest record that is still in the log.
    pub fn latest(&self) -> Option<Fault> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner).back().copied()
    }

    /// How many faults there were, of each kind.
    pub fn counters(&self) -> &KindCounters {
        &self.by_kind
    }

    /// Records that were pushed out by later ones, or did not get in because somebody was reading.
    pub fn missed(&self) -> u64 {
        self.missed.load(Ordering::Relaxed)
    }
}

const _: () = {
    let mut at = 0;
    while at < FaultKind::ALL.len() {
        assert!(FaultKind::ALL[at] as usize == at + 1);
        at += 1;
    }
};

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(iova: u64) -> Fault {
        let reason = FaultKind::NotMapped;
        Fault {
            device: 1,
            domain: Some(2),
            iova: Iova::new(iova),
            access: Access::Write,
            table: reason.refused_by(),
            reason,
            oa: None,
            done: 3,
            refusal: None,
        }
    }

    #[test]
    fn the_log_keeps_the_latest_and_counts_all() {
        let log = FaultLog::new(2);
        (0..5).for_each(|at| log.record(fault(at)));
        assert_eq!(log.latest().map(|fault| fault.iova), Some(Iova::new(4)));
        assert_eq!(log.drain().iter().map(|fault| fault.iova.get()).collect::<Vec<_>>(), [3, 4]);
        assert_eq!((log.counters().of(FaultKind::NotMapped), log.counters().total(), log.missed()), (5, 5, 3));
        assert_eq!(log.latest(), None);
    }

    #[test]
    fn a_reader_of_the_log_holds_nobody_up() {
        let log = FaultLog::new(2);
        let reading = log.ring.lock().unwrap();
        log.record(fault(0));
        drop(reading);
        assert_eq!((log.missed(), log.counters().total(), log.latest()), (1, 1, None));
    }

    #[test]
    fn messages_say_what_and_where() {
        let text = "device 1: write at IOVA 0x10 refused by IoPageTable: nothing is mapped there; 3 bytes done";
        assert_eq!(fault(16).to_string(), text);
    }
}
