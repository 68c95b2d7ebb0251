//! The simplest host that does everything right: both tables and both engines as plain vectors, one thread, no speed.
//!
//! Tests run the guest against it to see that a right host satisfies the guest, and around it to see that a wrong one does not.
//! A real host can be compared with it request by request: [`Host::log_hash`] digests everything the guest asked for.

use crate::registers::{self as reg, Entry, List, bell, dma};
use crate::{Layout, Memory, PageState, Platform};
use addr::{Address, Gpa, PAGE_BYTES, PAGE_LG2, Span};
use zerocopy::{FromZeros, IntoBytes};

/// Pages of a 2 MiB block.
const BLOCK_PAGES: usize = 512;

/// One page of the work span as the host sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Page {
    state: PageState,
    /// Validated by the guest; means something for a private page only.
    validated: bool,
}

/// One engine's registers.
#[derive(Clone, Copy, Debug, Default)]
struct Engine {
    src: u64,
    dst: u64,
    len: u64,
    value: u64,
    status: u64,
    fault_iova: u64,
    fault_code: u64,
}

/// A host that does everything right.
pub struct Host {
    memory: Memory,
    work: Span<Gpa>,
    pages: Vec<Page>,
    /// Per 2 MiB block: whether the RMP holds it as one entry.
    large: Vec<bool>,
    engines: [Engine; 2],
    psc_result: u64,
    pvalidate_result: u64,
    /// Pages after which a list is left half way; 0 = never.
    patience_pages: u64,
    done: Option<u64>,
    requests: u64,
    accesses: u64,
    unrescinded: u64,
    log_hash: u64,
}

impl Host {
    /// A host of the work span of `layout`, all of whose pages are `initial`, and validated when private.
    pub fn new(memory: Memory, layout: &Layout, initial: PageState) -> Self {
        let pages = layout.work_pages() as usize;
        Self {
            memory,
            work: layout.work,
            pages: vec![Page { state: initial, validated: true }; pages],
            large: vec![false; pages.div_ceil(BLOCK_PAGES)],
            engines: [Engine::default(); 2],
            psc_result: 0,
            pvalidate_result: 0,
            patience_pages: 0,
            done: None,
            requests: 0,
            accesses: 0,
            unrescinded: 0,
            log_hash: 0xcbf2_9ce4_8422_2325,
        }
    }

    /// Leaves a list half way after so many pages, as a host does that is interrupted; the guest asks again.
    #[must_use]
    pub fn with_patience(mut self, pages: u64) -> Self {
        self.patience_pages = pages;
        self
    }

    /// What the guest wrote when it ended.
    pub fn done(&self) -> Option<u64> {
        self.done
    }

    /// How many requests it made: register accesses, hypercalls, and entries of lists.
    pub fn requests(&self) -> u64 {
        self.requests
    }

    /// Of these, the register accesses: each is an exit of a VM.
    pub fn accesses(&self) -> u64 {
        self.accesses
    }

    /// Pages that the guest gave away while they were still validated: a mistake of the guest, which no real host can see.
    pub fn unrescinded(&self) -> u64 {
        self.unrescinded
    }

    /// FNV-1a over all requests, with the entries of the lists they name.
    pub fn log_hash(&self) -> u64 {
        self.log_hash
    }

    /// The state of the page at `gpa`; `None` outside the work span.
    pub fn state(&self, gpa: Gpa) -> Option<PageState> {
        self.index(gpa).map(|page| self.pages[page].state)
    }

    /// Whether every private page is validated, as it is between a right guest's rounds.
    pub fn all_validated(&self) -> bool {
        self.pages.iter().all(|page| page.state == PageState::Shared || page.validated)
    }

    fn index(&self, gpa: Gpa) -> Option<usize> {
        self.work.contains(gpa).then(|| (gpa.offset_from(self.work.start()) / PAGE_BYTES) as usize)
    }

    /// The pages of an entry that are still to do, when all of them lie in the work span.
    fn rest(&self, entry: Entry) -> Option<std::ops::Range<usize>> {
        let span = Span::from_len(entry.gpa(), entry.pages() * PAGE_BYTES).ok()?;
        let first = self.index(span.start())?;
        self.index(span.last())?;
        Some(first + entry.cur_page() as usize..first + entry.pages() as usize)
    }

    fn log(&mut self, words: &[u64]) {
        self.requests += 1;
        for word in words {
            for byte in word.to_le_bytes() {
                self.log_hash = (self.log_hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
            }
        }
    }

    /// Copies the list at `gpa`, works through its entries, and writes back how far it came.
    fn list(&mut self, gpa: u64, mut each: impl FnMut(&mut Self, Entry) -> Result<(), u64>) -> u64 {
        let mut list = List::new_zeroed();
        if self.memory.read(Gpa::new(gpa), list.as_mut_bytes()).is_err() || u64::from(list.end_entry) >= reg::MAX_ENTRIES {
            return reg::BAD_HEADER;
        }
        let mut patience = if self.patience_pages == 0 { u64::MAX } else { self.patience_pages };
        let mut result = 0;
        while list.cur_entry <= list.end_entry && patience > 0 {
            let entry = list.entries[usize::from(list.cur_entry)];
            self.log(&[entry.0]);
            if entry.cur_page() > entry.pages() || entry.large() && !entry.gpa().is_aligned(21) {
                result = reg::BAD_ENTRY;
                break;
            }
            if let Err(code) = each(self, entry) {
                result = code;
                break;
            }
            patience = patience.saturating_sub(entry.pages());
            list.entries[usize::from(list.cur_entry)] = entry.with_cur_page(entry.pages());
            list.cur_entry += 1;
        }
        let _inside = self.memory.write(Gpa::new(gpa), list.as_bytes());
        result
    }

    fn convert(&mut self, pages: std::ops::Range<usize>, large: bool, state: PageState) {
        self.large[pages.start / BLOCK_PAGES] = large && state == PageState::Private;
        for page in pages {
            if self.pages[page].state != state {
                self.unrescinded += u64::from(state == PageState::Shared && self.pages[page].validated);
                self.pages[page] = Page { state, validated: false };
            }
        }
    }

    fn page_state_change(&mut self, entry: Entry) -> Result<(), u64> {
        let state = match entry.op() {
            reg::OP_PRIVATE => PageState::Private,
            reg::OP_SHARED => PageState::Shared,
            _ => return Ok(()),
        };
        let pages = self.rest(entry).ok_or(reg::GENERIC_ERROR)?;
        self.convert(pages, entry.large(), state);
        Ok(())
    }

    /// A page that the host does not hold for the guest is a nested page fault on real hardware; here it is a code of its own.
    fn pvalidate(&mut self, entry: Entry) -> Result<(), u64> {
        const FAULT: u64 = 0xfa;
        let pages = self.rest(entry).ok_or(FAULT)?;
        if pages.clone().any(|page| self.pages[page].state != PageState::Private) {
            return Err(FAULT);
        }
        let block = &mut self.large[pages.start / BLOCK_PAGES];
        if entry.large() && !*block {
            return Err(reg::SIZE_MISMATCH);
        }
        *block &= entry.large();
        for page in &mut self.pages[pages] {
            page.validated = entry.op() == reg::OP_PRIVATE;
        }
        Ok(())
    }

    fn run(&mut self, which: usize, command: u64) {
        let Engine { src, dst, len, value, .. } = self.engines[which];
        let trusted = which == 0;
        let refused = |host: &Self, iova: u64| -> Option<u64> {
            let span = Span::from_len(Gpa::new(iova), len).ok()?;
            span.blocks(PAGE_LG2).map(|part| part.start()).find_map(|gpa| {
                let page = host.index(gpa).map(|page| host.pages[page]);
                let reaches = page.is_some_and(|page| page.state == PageState::Shared || trusted && page.validated);
                (!reaches).then_some(gpa.get())
            })
        };
        let bad = if command == dma::COPY { refused(self, src) } else { None }.or_else(|| refused(self, dst));
        if let Some(iova) = bad {
            self.engines[which] = Engine { status: dma::FAULTED, fault_iova: iova, fault_code: 1, ..self.engines[which] };
            return;
        }
        let mut bytes = value.to_le_bytes().repeat(len.div_ceil(8) as usize);
        bytes.truncate(len as usize);
        if command == dma::COPY {
            self.memory.read(Gpa::new(src), &mut bytes).expect("the work span is memory");
        }
        self.memory.write(Gpa::new(dst), &bytes).expect("the work span is memory");
        self.engines[which].status = dma::OK;
    }
}

/// An engine and the register in it.
fn engine(gpa: Gpa) -> Option<(usize, u64)> {
    let which = [reg::TRUSTED, reg::UNTRUSTED].iter().position(|bar| gpa.align_down(PAGE_LG2) == *bar)?;
    Some((which, gpa.get() & (PAGE_BYTES - 1)))
}

impl Platform for Host {
    fn mmio_read(&mut self, gpa: Gpa, len_bytes: u8) -> u64 {
        self.accesses += 1;
        self.log(&[1, gpa.get(), len_bytes.into()]);
        if let Some((which, register)) = engine(gpa) {
            let engine = &self.engines[which];
            return match register {
                dma::SRC => engine.src,
                dma::DST => engine.dst,
                dma::LEN => engine.len,
                dma::STATUS => engine.status,
                dma::FAULT_IOVA => engine.fault_iova,
                dma::VALUE => engine.value,
                dma::FAULT_CODE => engine.fault_code,
                _ => u64::MAX,
            };
        }
        match gpa.get().wrapping_sub(reg::DOORBELL.get()) {
            bell::PSC_RESULT => self.psc_result,
            bell::PVALIDATE_RESULT => self.pvalidate_result,
            _ => u64::MAX,
        }
    }

    fn mmio_write(&mut self, gpa: Gpa, len_bytes: u8, value: u64) {
        self.accesses += 1;
        self.log(&[2, gpa.get(), len_bytes.into(), value]);
        if let Some((which, register)) = engine(gpa) {
            let engine = &mut self.engines[which];
            match register {
                dma::SRC => engine.src = value,
                dma::DST => engine.dst = value,
                dma::LEN => engine.len = value.min(PAGE_BYTES),
                dma::VALUE => engine.value = value,
                dma::CMD => self.run(which, value),
                _ => {}
            }
            return;
        }
        match gpa.get().wrapping_sub(reg::DOORBELL.get()) {
            bell::PSC => self.psc_result = self.list(value, Self::page_state_change),
            bell::PVALIDATE => self.pvalidate_result = self.list(value, Self::pvalidate),
            bell::DONE => self.done = Some(value),
            _ => {}
        }
    }

    fn hypercall(&mut self, nr: u64, args: [u64; 3]) -> u64 {
        self.log(&[3, nr, args[0], args[1], args[2]]);
        let first = self.index(Gpa::new(args[0]));
        match (nr, first) {
            (reg::HC_MAP_GPA_RANGE, Some(first)) if args[1] == 1 => {
                let state = if args[2] & 16 == 0 { PageState::Shared } else { PageState::Private };
                self.convert(first..first + 1, false, state);
                0
            }
            // KVM's ENOSYS, as a guest sees it.
            _ => 0u64.wrapping_sub(1000),
        }
    }
}
