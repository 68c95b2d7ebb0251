//! One call: the structure in a few words of its own, so that neither a lock nor a search stands between a handler and its argument, and
//! the descriptors that go away again when the call fails.

use crate::{Answer, Caller, File, Local, Memory, Opened, Process};
use backing::PageName;
use std::any::Any;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Where the structure of a call lies. No program has memory there: it is where the scratch memory ends.
pub(super) const FRAME_AT: u64 = 0x1fff_ffff_f000;
const FRAME_WORDS: usize = crate::table::MAX_STRUCT / 8;

/// Bytes that any thread may read and write at any time, as other programs' memory is.
pub(super) struct Words<T>(pub(super) T);

impl<T: AsRef<[AtomicU64]>> Words<T> {
    pub(super) fn len(&self) -> usize {
        self.0.as_ref().len() * 8
    }

    /// The bytes from the first on.
    pub(super) fn get(&self, into: &mut [u8]) {
        self.get_at(0, into);
    }

    /// Copies out from byte `at` on, which is inside together with what follows.
    pub(super) fn get_at(&self, at: usize, into: &mut [u8]) {
        let words = self.0.as_ref();
        if at.is_multiple_of(8) {
            for (chunk, word) in into.chunks_mut(8).zip(&words[at / 8..]) {
                let bytes = word.load(Ordering::Relaxed).to_ne_bytes();
                chunk.copy_from_slice(&bytes[..chunk.len()]);
            }
            return;
        }
        for (at, byte) in (at..).zip(into) {
            *byte = words[at / 8].load(Ordering::Relaxed).to_ne_bytes()[at % 8];
        }
    }

    /// Copies in from byte `at` on, which is inside together with what follows.
    pub(super) fn set_at(&self, at: usize, from: &[u8]) {
        let words = self.0.as_ref();
        let (mut at, mut rest) = (at, from);
        while !rest.is_empty() {
            let (word, inside) = (&words[at / 8], at % 8);
            let now = rest.len().min(8 - inside);
            let mut bytes = if now == 8 { [0; 8] } else { word.load(Ordering::Relaxed).to_ne_bytes() };
            bytes[inside..inside + now].copy_from_slice(&rest[..now]);
            word.store(u64::from_ne_bytes(bytes), Ordering::Relaxed);
            (at, rest) = (at + now, &rest[now..]);
        }
    }
}

/// A [`Local`] in the middle of a call.
pub(super) struct Frame<'a> {
    local: &'a Local,
    file: &'a dyn File,
    words: Words<[AtomicU64; FRAME_WORDS]>,
    /// Bytes of the structure; behind them is nothing.
    len: usize,
    installed: Mutex<Vec<i32>>,
}

impl<'a> Frame<'a> {
    pub(super) fn new(local: &'a Local, file: &'a dyn File, arg: &[u8]) -> Self {
        let words = Words([const { AtomicU64::new(0) }; FRAME_WORDS]);
        let len = arg.len().min(words.len());
        words.set_at(0, &arg[..len]);
        Self { local, file, words, len, installed: Mutex::default() }
    }

    pub(super) fn words(&self) -> &Words<[AtomicU64; FRAME_WORDS]> {
        &self.words
    }

    pub(super) fn call(&self, command: u32, arg: u64) -> Answer<i64> {
        let answer = self.file.ioctl(self, command, arg);
        if answer.is_err() {
            let installed = std::mem::take(&mut *self.installed.lock().unwrap_or_else(PoisonError::into_inner));
            // Nobody else has seen the numbers.
            installed.into_iter().for_each(|fd| _ = self.local.close(fd));
        }
        answer
    }

    /// The place of these bytes in the structure, if they are all in it.
    fn inside(&self, at: u64, len: usize) -> Option<usize> {
        let offset = usize::try_from(at.checked_sub(FRAME_AT)?).ok()?;
        (offset <= self.len && len <= self.len - offset).then_some(offset)
    }
}

impl Caller for Frame<'_> {
    fn read(&self, at: u64, into: &mut [u8]) -> Answer {
        match self.inside(at, into.len()) {
            Some(offset) => self.words.get_at(offset, into),
            None => self.local.read(at, into)?,
        }
        Ok(())
    }

    fn write(&self, at: u64, from: &[u8]) -> Answer {
        match self.inside(at, from.len()) {
            Some(offset) => self.words.set_at(offset, from),
            None => self.local.write(at, from)?,
        }
        Ok(())
    }

    fn process(&self) -> Answer<Process> {
        self.local.process()
    }

    fn memory(&self, va: u64, len: u64) -> Answer<Memory> {
        self.local.memory(va, len)
    }

    fn file_memory(&self, fd: i32, start: u64, len: u64) -> Answer<Memory> {
        self.local.file_memory(fd, start, len)
    }

    fn file(&self, fd: i32) -> Answer<Opened> {
        self.local.file(fd)
    }

    fn install(&self, file: Arc<dyn File>) -> Answer<i32> {
        let fd = self.local.install(file)?;
        self.installed.lock().unwrap_or_else(PoisonError::into_inner).push(fd);
        Ok(fd)
    }

    fn shared(&self) -> Answer<OwnedFd> {
        self.local.files.shared(self.file)
    }

    fn is_mapped(&self, offset: u64, len: u64) -> bool {
        self.local.files.is_mapped(self.file, offset, len)
    }

    fn page_name(&self, va: u64) -> Answer<PageName> {
        self.local.page_name(va)
    }

    fn as_any(&self) -> &dyn Any {
        self.local
    }
}
