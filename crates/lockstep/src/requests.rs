//! What a guest asks of its VMM: page state changes through a shared buffer, by hypercall, or by touching memory of the wrong kind.
//! Everything here is untrusted input.

use crate::GuestDma;
use addr::{Address, Gpa, PAGE_LG2, Span};
use convert::psc::{self, Entry, Header, MAX_ENTRIES, PscError};
use convert::{Change, ConvertError, Owner};
use secure::{Code, PvalidateError, RmpSize};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The shared buffer of a page state change.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Buffer {
    header: Header,
    entries: [Entry; MAX_ENTRIES],
}

/// The guest named a buffer that is not in shared memory.
const BAD_BUFFER: u64 = 1 << 32 | 1;
/// What PVALIDATE answers through the doorbell when it faults instead of answering a code.
const PVALIDATE_FAULT: u64 = 0x100 << 32;
/// PVALIDATE: the page was in that state already.
pub const NO_UPDATE: u64 = 255;

impl GuestDma {
    /// Serves the page state change request whose buffer is at `gpa`. Answers SW_EXITINFO2: 0 when every entry is done. Progress is
    /// written back, unless the request made the buffer itself private: that is answered as a bad buffer.
    ///
    /// A bad request changes nothing.
    pub fn page_state_change(&self, gpa: Gpa) -> u64 {
        self.serve(gpa).unwrap_or_else(|code| code)
    }

    fn serve(&self, gpa: Gpa) -> Result<u64, u64> {
        let mut buffer = self.buffer(gpa)?;
        let request = psc::parse(buffer.header, &buffer.entries).map_err(PscError::exit_info2)?;
        let failed = self.convert(&request.changes).err();
        let answer = match failed {
            None => {
                buffer.header.cur_entry = buffer.header.end_entry + 1;
                0
            }
            Some(ConvertError::Twice { .. }) => return self.one_by_one(gpa, buffer),
            Some(_) => {
                self.mark_progress(&mut buffer);
                PscError::Failed { index: buffer.header.cur_entry }.exit_info2()
            }
        };
        self.write_shared(gpa, buffer.header.as_bytes()).map_err(|_| BAD_BUFFER)?;
        Ok(answer)
    }

    /// A request that names a page twice is legal, and its order counts.
    fn one_by_one(&self, gpa: Gpa, mut buffer: Buffer) -> Result<u64, u64> {
        let mut answer = 0;
        for index in buffer.header.cur_entry..=buffer.header.end_entry {
            let one = Header { cur_entry: index, end_entry: index, reserved: 0 };
            let request = psc::parse(one, &buffer.entries).map_err(PscError::exit_info2)?;
            if self.convert(&request.changes).is_err() {
                answer = PscError::Failed { index }.exit_info2();
                break;
            }
            buffer.header.cur_entry = index + 1;
        }
        self.write_shared(gpa, buffer.header.as_bytes()).map_err(|_| BAD_BUFFER)?;
        Ok(answer)
    }

    /// Moves the request on to the first entry that is not what it asked for.
    fn mark_progress(&self, buffer: &mut Buffer) {
        let has = |gpa: Gpa, to: Owner| {
            let told = self.space().stage2().is_private(gpa) == (to == Owner::Private);
            told && self.space().page_at(gpa).is_some_and(|(backing, page)| backing.state(page) == to.into())
        };
        while buffer.header.cur_entry <= buffer.header.end_entry {
            let entry = &buffer.entries[usize::from(buffer.header.cur_entry)];
            let to = match entry.op() {
                psc::OP_PRIVATE => Owner::Private,
                psc::OP_SHARED => Owner::Shared,
                _ => {
                    buffer.header.cur_entry += 1;
                    continue;
                }
            };
            let pages = if entry.huge() { 512 } else { 1 };
            let open = (0..pages).find(|page| !has(entry.gpa().plus(page << PAGE_LG2), to));
            if open.is_some() {
                break;
            }
            buffer.header.cur_entry += 1;
        }
    }

    fn buffer(&self, gpa: Gpa) -> Result<Buffer, u64> {
        if !gpa.is_aligned(3) {
            return Err(BAD_BUFFER);
        }
        let mut buffer = Buffer { header: Header::default(), entries: [Entry(0); MAX_ENTRIES] };
        self.read_shared(gpa, buffer.as_mut_bytes()).map_err(|_| BAD_BUFFER)?;
        Ok(buffer)
    }

    /// The guest executes PVALIDATE on every entry of a list laid out like a page state change: operation 1 validates, 2 rescinds. It stands for
    /// the instruction, which no software guest can execute on a modelled RMP. Answers 0 or the first code that is not success; entries before
    /// it are done, and the list's `cur_entry` says which.
    pub fn pvalidate_list(&self, gpa: Gpa) -> u64 {
        self.pvalidate_all(gpa).unwrap_or_else(|code| code)
    }

    fn pvalidate_all(&self, gpa: Gpa) -> Result<u64, u64> {
        let mut buffer = self.buffer(gpa)?;
        psc::parse(buffer.header, &buffer.entries).map_err(PscError::exit_info2)?;
        let mut answer = 0;
        for index in buffer.header.cur_entry..=buffer.header.end_entry {
            let entry = buffer.entries[usize::from(index)];
            answer = match entry.op() {
                psc::OP_PRIVATE => self.pvalidate_one(entry, true),
                psc::OP_SHARED => self.pvalidate_one(entry, false),
                // As in a page state change.
                _ => 0,
            };
            if answer != 0 {
                break;
            }
            buffer.header.cur_entry = index + 1;
        }
        self.write_shared(gpa, buffer.header.as_bytes()).map_err(|_| BAD_BUFFER)?;
        Ok(answer)
    }

    fn pvalidate_one(&self, entry: Entry, validate: bool) -> u64 {
        let size = if entry.huge() { RmpSize::M2 } else { RmpSize::K4 };
        match self.space().pvalidate(entry.gpa(), size, validate) {
            Ok(done) if done.changed => 0,
            Ok(_) => NO_UPDATE,
            Err(Some(PvalidateError::Fail(code))) => code_number(code),
            Err(_) => PVALIDATE_FAULT,
        }
    }

    /// KVM_HC_MAP_GPA_RANGE, and a KVM_EXIT_MEMORY_FAULT, both come down to this: the guest wants a span to be private or shared.
    ///
    /// # Errors
    /// [`ConvertError`]; the guest gets a failure code, nothing of a bad span has changed.
    pub fn map_gpa_range(&self, gpa: Gpa, pages: u64, private: bool) -> Result<(), ConvertError> {
        let bytes = pages.saturating_mul(addr::PAGE_BYTES);
        let span = Span::aligned(gpa, bytes, PAGE_LG2)?;
        let to = if private { Owner::Private } else { Owner::Shared };
        self.convert(&[Change { span, to }]).map(|_| ())
    }
}

fn code_number(code: Code) -> u64 {
    u64::from(code.eax())
}
