//! Page state change requests as a guest writes them: the shared buffer of the GHCB protocol. All of it is untrusted input.
//!
//! Source: SEV-ES Guest-Hypervisor Communication Block Standardization, 56421, SNP Page State Change; limits as Linux 7.3 keeps them
//! (arch/x86/kvm/svm/sev.c, snp_begin_psc).

use crate::{Change, Owner};
use addr::{Address, Gpa, Span};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Entries that fit in the 2,032-byte shared buffer of a GHCB.
pub const MAX_ENTRIES: usize = 253;

/// Head of the buffer. The host moves `cur_entry` on as entries are done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// The entry to do next.
    pub cur_entry: u16,
    /// The last entry to do, inclusive.
    pub end_entry: u16,
    /// Must be zero.
    pub reserved: u32,
}

/// One request: bits 11:0 4 KiB pages of it that are done, 51:12 GFN, 55:52 operation, 56 set for a 2 MiB page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct Entry(pub u64);

/// Operation 1: the page becomes the guest's.
pub const OP_PRIVATE: u64 = 1;
/// Operation 2: the page becomes the host's.
pub const OP_SHARED: u64 = 2;

impl Entry {
    /// A request for one page of 4 KiB or 2 MiB.
    pub fn new(gpa: Gpa, to: Owner, huge: bool) -> Self {
        let op = if to == Owner::Private { OP_PRIVATE } else { OP_SHARED };
        Self((gpa.get() & 0x000f_ffff_ffff_f000) | op << 52 | u64::from(huge) << 56)
    }

    /// Start of the page.
    pub fn gpa(self) -> Gpa {
        Gpa::new(self.0 & 0x000f_ffff_ffff_f000)
    }

    /// What is asked for; numbers other than 1 and 2 are completed without doing anything.
    pub fn op(self) -> u64 {
        self.0 >> 52 & 0xf
    }

    /// Whether the page is 2 MiB.
    pub fn huge(self) -> bool {
        self.0 >> 56 & 1 == 1
    }

    /// 4 KiB pages that are done.
    pub fn cur_page(self) -> u64 {
        self.0 & 0xfff
    }

    /// The same request with another progress.
    #[must_use]
    pub fn with_cur_page(self, done: u64) -> Self {
        Self(self.0 & !0xfff | done & 0xfff)
    }
}

/// Why a request was refused, as the guest reads it in SW_EXITINFO2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PscError {
    /// Entry numbers out of range.
    #[error("bad page state change header: entries {cur}..={end}, at most {MAX_ENTRIES} fit")]
    Header {
        /// First entry asked for.
        cur: u16,
        /// Last entry asked for.
        end: u16,
    },
    /// An entry asks for what no page is.
    #[error("bad page state change entry {index}: {raw:#x}")]
    Entry {
        /// Its place in the buffer.
        index: u16,
        /// As the guest wrote it.
        raw: u64,
    },
    /// The host could not do it.
    #[error("page state change failed at entry {index}")]
    Failed {
        /// The first entry that is not done.
        index: u16,
    },
}

impl PscError {
    /// SW_EXITINFO2: the kind in the upper half, the detail in the lower.
    pub fn exit_info2(self) -> u64 {
        match self {
            Self::Header { .. } => 1 << 32 | 1,
            Self::Entry { .. } => 1 << 32 | 2,
            Self::Failed { .. } => 0x100 << 32,
        }
    }
}

/// A request that was found well-formed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// What to convert, in the guest's order, adjacent entries joined.
    pub changes: Vec<Change>,
}

/// Checks a whole buffer before anything is done: a bad entry anywhere means that nothing changes.
///
/// # Errors
/// [`PscError::Header`], [`PscError::Entry`].
pub fn parse(header: Header, entries: &[Entry; MAX_ENTRIES]) -> Result<Request, PscError> {
    let bad_header = PscError::Header { cur: header.cur_entry, end: header.end_entry };
    if usize::from(header.end_entry) >= MAX_ENTRIES || header.cur_entry > header.end_entry {
        return Err(bad_header);
    }
    let mut request = Request::default();
    for index in header.cur_entry..=header.end_entry {
        let entry = entries[usize::from(index)];
        let bad = PscError::Entry { index, raw: entry.0 };
        let pages = if entry.huge() { 512 } else { 1 };
        if entry.0 >> 57 != 0 || entry.cur_page() > pages || (entry.huge() && !entry.gpa().is_aligned(21)) {
            return Err(bad);
        }
        let to = match entry.op() {
            OP_PRIVATE => Owner::Private,
            OP_SHARED => Owner::Shared,
            _ => continue,
        };
        let left = pages - entry.cur_page();
        if left == 0 {
            continue;
        }
        let start = entry.gpa().checked_add(entry.cur_page() << 12).ok_or(bad)?;
        let span = Span::from_len(start, left << 12).map_err(|_| bad)?;
        match request.changes.last_mut() {
            Some(last) if last.to == to && last.span.touches(span) => last.span = Span::of(last.span.start(), span.last()),
            _ => request.changes.push(Change { span, to }),
        }
    }
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buffer(list: &[u64]) -> [Entry; MAX_ENTRIES] {
        let mut entries = [Entry::default(); MAX_ENTRIES];
        for (entry, raw) in entries.iter_mut().zip(list) {
            *entry = Entry(*raw);
        }
        entries
    }

    fn header(cur: u16, end: u16) -> Header {
        Header { cur_entry: cur, end_entry: end, reserved: 0 }
    }

    #[test]
    fn golden_entries() {
        assert_eq!(Entry::new(Gpa::new(0x1234_5000), Owner::Private, false), Entry(0x0010_0000_1234_5000));
        assert_eq!(Entry::new(Gpa::new(0x20_0000), Owner::Shared, true), Entry(0x0120_0000_0020_0000));
    }

    #[test]
    fn neighbours_join_and_unknown_operations_do_nothing() {
        let list = buffer(&[0x0010_0000_0000_1000, 0x0010_0000_0000_2000, 0x0070_0000_0000_9000, 0x0020_0000_0000_3000]);
        let request = parse(header(0, 3), &list).unwrap();
        let span = |start, last| Span::of(Gpa::new(start), Gpa::new(last));
        assert_eq!(
            request.changes,
            [Change { span: span(0x1000, 0x2fff), to: Owner::Private }, Change { span: span(0x3000, 0x3fff), to: Owner::Shared }]
        );
    }

    #[test]
    fn what_a_guest_may_not_ask() {
        assert_eq!(parse(header(0, 253), &buffer(&[])).unwrap_err().exit_info2(), 0x1_0000_0001);
        assert_eq!(parse(header(5, 4), &buffer(&[])).unwrap_err().exit_info2(), 0x1_0000_0001);
        let misaligned = 0x0110_0000_0000_1000;
        assert_eq!(parse(header(0, 0), &buffer(&[misaligned])).unwrap_err().exit_info2(), 0x1_0000_0002);
        let past_its_end = 0x0010_0000_0000_1002;
        assert_eq!(parse(header(0, 0), &buffer(&[past_its_end])).unwrap_err().exit_info2(), 0x1_0000_0002);
        let reserved_bit = 0x8010_0000_0000_1000;
        assert_eq!(parse(header(1, 1), &buffer(&[0, reserved_bit])), Err(PscError::Entry { index: 1, raw: reserved_bit }));
    }

    #[test]
    fn an_interrupted_huge_entry_goes_on_where_it_stopped() {
        let entry = Entry::new(Gpa::new(0x20_0000), Owner::Private, true).with_cur_page(510);
        let request = parse(header(0, 0), &buffer(&[entry.0])).unwrap();
        assert_eq!(request.changes[0].span, Span::of(Gpa::new(0x3f_e000), Gpa::new(0x3f_ffff)));
    }
}
