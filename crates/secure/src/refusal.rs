//! What a refused access says: the reason, the page, its entry, and how hardware would deliver it.

use crate::code::npf;
use crate::entry::RawEntry;
use addr::Oa;
use core::fmt;
use thiserror::Error;

/// Why an access was refused, in the order in which the checks come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The leaf is above 2 MiB and the table is strict.
    TooLarge,
    /// The leaf lies on both sides of the guest's vTOM.
    StraddlesVtom,
    /// A shared access met a page that is assigned.
    Assigned,
    /// A private access to an address that the table does not cover.
    NotCovered,
    /// The entry is locked or changes all the time; the access may be tried again.
    InUse,
    /// A private access to a hypervisor page.
    NotAssigned,
    /// The page is another guest's, or firmware's.
    WrongAsid,
    /// The owner has the page at another address.
    WrongGpa,
    /// The page is in firmware's hands.
    Immutable,
    /// The leaf's size is not the entry's.
    Size,
    /// The guest has not accepted the page.
    NotValidated,
    /// The VMPL lacks the permission.
    Permission,
}

/// How hardware tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// A device's transaction is aborted and the IOMMU logs an event.
    Aborted,
    /// #PF in the host with these bits of the error code.
    PageFault(u64),
    /// #VMEXIT(NPF) with these bits of EXITINFO1.
    Npf(u64),
    /// #VC in the guest with this code.
    Vc(u64),
}

/// A refused access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub struct Refusal {
    /// Why.
    pub reason: Reason,
    /// The page that made it so.
    pub at: Oa,
    /// The entry that speaks for it.
    pub entry: RawEntry,
    /// Everything up to the size was right. For a device that is a fault only under an even, unchanged smash sequence.
    pub size_mismatch: bool,
    /// How hardware tells.
    pub delivery: Delivery,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let why = match self.reason {
            Reason::TooLarge => "leaf is larger than 2 MiB",
            Reason::StraddlesVtom => "leaf straddles vTOM",
            Reason::Assigned => "shared access to an assigned page",
            Reason::NotCovered => "private access outside the RMP",
            Reason::InUse => "entry is in use",
            Reason::NotAssigned => "private access to a hypervisor page",
            Reason::WrongAsid => "page has another owner",
            Reason::WrongGpa => "owner has the page at another address",
            Reason::Immutable => "page is immutable",
            Reason::Size => "leaf and entry differ in size",
            Reason::NotValidated => "page is not validated",
            Reason::Permission => "VMPL lacks the permission",
        };
        let [q1, q2] = self.entry.words();
        write!(f, "{why} at {} (entry {q1:#018x} {q2:#018x})", self.at)
    }
}

/// On whose behalf a check runs, as far as the delivery depends on it.
#[derive(Clone, Copy)]
pub(crate) enum Asker {
    Device,
    Host,
    /// EXITINFO1 bits that are set whatever the reason.
    Guest(u64),
}

impl Refusal {
    #[cold]
    pub(crate) fn new(reason: Reason, at: Oa, entry: RawEntry, asker: Asker) -> Self {
        let delivery = match (asker, reason) {
            (Asker::Device, _) => Delivery::Aborted,
            (Asker::Host, _) => Delivery::PageFault(npf::RMP),
            (Asker::Guest(_), Reason::NotValidated) => Delivery::Vc(0x404),
            (Asker::Guest(bits), Reason::Size) => Delivery::Npf(bits | npf::SIZEM),
            (Asker::Guest(bits), Reason::Permission) => Delivery::Npf(bits | npf::VMPL),
            (Asker::Guest(bits), _) => Delivery::Npf(bits),
        };
        Self { reason, at, entry, size_mismatch: reason == Reason::Size, delivery }
    }
}
