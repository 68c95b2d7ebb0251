//! What the host tells the guest, and what the guest tells the host: the two halves of the control page.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// First word of the parameters: `LOCKSTEP` in ASCII, so that a guest started on empty memory says so.
pub const MAGIC: u64 = u64::from_le_bytes(*b"LOCKSTEP");

/// What the guest may use, as bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(pub u64);

impl Features {
    /// KVM_HC_MAP_GPA_RANGE reaches the host.
    pub const HYPERCALL: Self = Self(1);
    /// The hypercall instruction is VMCALL, else it is VMMCALL.
    pub const VMCALL: Self = Self(2);
    /// Devices see shared pages alone, trusted ones too: the trusted engine is asked for nothing else.
    pub const SHARED_ONLY: Self = Self(4);

    /// Both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Who a page belongs to, as the state table and the operations of a page state change number it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PageState {
    /// The guest alone.
    Private = 1,
    /// Guest and host.
    Shared = 2,
}

/// Parameters: written by the host before the start, only read by the guest. Addresses are GPAs.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Params {
    /// [`MAGIC`].
    pub magic: u64,
    /// Seed of all the guest's random choices; not 0.
    pub seed: u64,
    /// Bytes of guest memory.
    pub memory_bytes: u64,
    /// First byte of the work span: the pages whose state changes and that DMA reaches. On 2 MiB.
    pub work_gpa: u64,
    /// Its length in 4 KiB pages.
    pub work_pages: u64,
    /// The state table: a byte for each page of the work span, a [`PageState`].
    pub states_gpa: u64,
    /// The page state change list.
    pub psc_gpa: u64,
    /// The PVALIDATE list.
    pub pvalidate_gpa: u64,
    /// The doorbell's registers.
    pub doorbell_gpa: u64,
    /// The trusted engine's registers.
    pub trusted_gpa: u64,
    /// The untrusted engine's registers.
    pub untrusted_gpa: u64,
    /// [`Features`].
    pub features: u64,
    /// Ends after so many rounds; 0 = runs until stopped.
    pub max_rounds: u64,
    /// How often an engine's status is read before it counts as stuck.
    pub polls: u64,
    /// Entry point of the read service. The three services and their context are filled in by who starts the program.
    pub read: u64,
    /// Entry point of the write service.
    pub write: u64,
    /// Entry point of the hypercall service.
    pub hypercall: u64,
    /// First argument of all three.
    pub context: u64,
}

/// Report: written by the guest as it goes, and the host's stop flag.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Report {
    /// Set by the host: end after this round.
    pub stop: u64,
    /// Rounds completed. A round is one page state change, one trusted and one untrusted transfer.
    pub rounds: u64,
    /// Page state change requests by doorbell.
    pub psc_calls: u64,
    /// Entries in them.
    pub psc_entries: u64,
    /// Of these, 2 MiB entries.
    pub psc_large: u64,
    /// Requests the host stopped half way and that were issued again.
    pub psc_resumed: u64,
    /// Good requests that were refused.
    pub psc_errors: u64,
    /// Bad requests that were refused as they should be.
    pub psc_refused: u64,
    /// Bad requests that were not, or with another code, or that changed the list.
    pub psc_wrong_answers: u64,
    /// KVM_HC_MAP_GPA_RANGE calls.
    pub hypercalls: u64,
    /// PVALIDATE lists sent.
    pub pvalidate_calls: u64,
    /// 2 MiB entries among them that had to be done page by page.
    pub size_mismatches: u64,
    /// Transfers started.
    pub dma_started: u64,
    /// Transfers that had to succeed, and did.
    pub dma_ok: u64,
    /// Transfers of the untrusted engine that had to be refused, and were.
    pub dma_refused_untrusted: u64,
    /// Transfers that ended in another way than they had to.
    pub dma_wrong: u64,
    /// Bytes compared after a transfer.
    pub bytes_verified: u64,
    /// Words that were not as they had to be.
    pub mismatches: u64,
    /// GPA of the first of them.
    pub mismatch_gpa: u64,
    /// What had to be there.
    pub mismatch_expected: u64,
    /// What was there.
    pub mismatch_got: u64,
    /// Things that went wrong, of all kinds but mismatches.
    pub errors: u64,
    /// The last one's code: a result as the host gave it, or an [`error`] code.
    pub last_error: u64,
}

impl Report {
    /// Whether the guest saw nothing wrong.
    pub fn is_clean(&self) -> bool {
        self.errors == 0 && self.mismatches == 0 && self.psc_wrong_answers == 0 && self.dma_wrong == 0 && self.psc_errors == 0
    }
}

/// Codes of what the guest itself found wrong, in [`Report::last_error`] and at the end.
pub mod error {
    /// At the end: the parameters do not begin with the magic word.
    pub const BAD_CONTROL: u64 = 0xbad0;
    /// The host moved a list's `cur_entry` back, or changed its end.
    pub const BACKWARDS: u64 = 0xbad1;
    /// A list was not done after `SUBMIT_TRIES` requests.
    pub const STUCK: u64 = 0xbad2;
    /// A refused list was changed.
    pub const LIST_CHANGED: u64 = 0xbad3;
    /// An untrusted transfer was refused, but at another page than the private one.
    pub const FAULT_ELSEWHERE: u64 = 0xbad4;
    /// A transfer that had to succeed did not; the engine's status is added.
    pub const DMA_FAILED: u64 = 0xbad_0100;
    /// A transfer that had to be refused was not; the engine's status is added.
    pub const NOT_REFUSED: u64 = 0xbad_0200;
}

/// How often the guest issues one list before it gives up.
pub(crate) const SUBMIT_TRIES: u64 = 4096;
