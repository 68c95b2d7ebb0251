//! Finding out what happened behind our back: the kernel tells user space nothing about a punch or a truncation made by somebody
//! else (D-8), so somebody has to look.
//!
//! A hole alone says little: memory that was never touched is a hole, too. So a backing remembers, as extents, which pages are known to have had
//! memory (populated, or seen by an earlier look); a hole there is a loss.

use crate::{Backing, Error, Kind, PageState};
use addr::{OutOfMemory, PAGE_LG2, Page, Span};
use std::sync::PoisonError;
use std::time::SystemTime;

/// What [`Backing::recheck`] found.
#[derive(Clone, Debug)]
pub struct Recheck {
    /// When the look began: what is listed happened before it ended, and after the last look that did not list it.
    pub at: SystemTime,
    /// The file's length, when the backing needs more.
    pub truncated_to: Option<u64>,
    /// Pages that were shared or private and had memory, and are gone. They are absent now, and nobody maps them any more.
    pub lost: Vec<Span<Page>>,
    /// Whether holes could be looked for: not in memory that is not mapped here, is adopted, or consists of huge pages.
    pub holes_seen: bool,
}

/// Pages looked at in one system call, and under one lock: 16 MiB.
const CHUNK_LG2: u8 = 12;

impl Backing {
    /// Compares the file's length and its holes with the page states, page by page of `span`. Pages that somebody else took are made absent and revoked
    /// from every listener.
    ///
    /// A page that was swapped out looks like a hole to the kernel's mincore: do not use this on memory that may be swapped. A page that was
    /// punched and touched again since the last look has memory, zeroed, and is not found.
    ///
    /// # Errors
    /// Bad spans; what fstat and mincore answer; no memory. What was found until then is revoked.
    pub fn recheck(&self, span: Span<Page>) -> Result<Recheck, Error> {
        self.check(span)?;
        let at = SystemTime::now();
        let mut found = Recheck { at, truncated_to: None, lost: Vec::new(), holes_seen: self.sees_holes() };
        for chunk in span.blocks(CHUNK_LG2) {
            let held = self.lock(chunk);
            let end = self.end_of_file()?;
            if end <= self.pages().last() {
                found.truncated_to = self.memory.file.as_ref().map(|source| source.size()).transpose()?;
            }
            let mut lost = Vec::new();
            if found.holes_seen {
                self.compare_holes(chunk, end, &mut lost)?;
            }
            let behind = Span::new(end.max(chunk.start()), chunk.last());
            for (run, _) in behind.into_iter().flat_map(|behind| self.states(behind)).filter(present) {
                push(&mut lost, run)?;
            }
            // Room for the states is asked for first; without it the listeners let go all the same.
            let mut done = held.reserve(lost.len());
            for run in lost {
                done = done.and(self.revoke_held(&held, run));
                done = done.and(self.known_forget(run));
                done = done.and(push(&mut found.lost, run));
            }
            done?;
        }
        Ok(found)
    }

    /// The pages of `span` that have no content now, whatever their state: punched, never touched, allocated but never written
    /// (mincore asks for content), or swapped out.
    ///
    /// # Errors
    /// Bad spans; `Unsupported` where the kernel does not tell; what mincore answers.
    pub fn holes(&self, span: Span<Page>) -> Result<Vec<Span<Page>>, Error> {
        self.check(span)?;
        let mut holes = Vec::new();
        for chunk in span.blocks(CHUNK_LG2) {
            self.each_residency(chunk, |run, resident| if resident { Ok(()) } else { push(&mut holes, run) })?;
        }
        Ok(holes)
    }

    /// Adds what of `chunk`, which is held, was known to have memory and has none to `lost`, and remembers what has some.
    fn compare_holes(&self, chunk: Span<Page>, end: Page, lost: &mut Vec<Span<Page>>) -> Result<(), Error> {
        self.each_residency(chunk, |run, resident| {
            // What lies behind the end of the file is on the list.
            let Some(run) = end.get().checked_sub(1).and_then(|last| run.intersect(Span::of(Page::new(0), Page::new(last)))) else {
                return Ok(());
            };
            for (piece, _) in self.states(run).filter(present) {
                if resident {
                    self.known_add(piece)?;
                    continue;
                }
                let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
                for (had, _) in known.0.overlapping(piece) {
                    had.intersect(piece).map_or(Ok(()), |gone| push(lost, gone))?;
                }
            }
            Ok(())
        })
    }

    /// Shows the runs of pages with and without memory, ascending.
    fn each_residency(&self, chunk: Span<Page>, mut show: impl FnMut(Span<Page>, bool) -> Result<(), Error>) -> Result<(), Error> {
        let mapping = self.memory.mapping.as_ref().filter(|_| self.sees_holes());
        let mapping = mapping.ok_or(Error::Unsupported { kind: self.kind(), what: "tell where its holes are" })?;
        let mut pages = [0u8; 1 << CHUNK_LG2];
        let pages = &mut pages[..chunk.len() as usize];
        let offset = chunk.start().bytes();
        sync::fail::step("backing.mincore")?;
        mapping.residency(offset, pages).map_err(Error::os("mincore", offset, chunk.len() << PAGE_LG2))?;
        let mut start = chunk.start().get();
        for run in pages.chunk_by(|a, b| a & 1 == b & 1) {
            let last = start + run.len() as u64 - 1;
            show(Span::of(Page::new(start), Page::new(last)), run[0] & 1 == 1)?;
            start = last + 1;
        }
        Ok(())
    }

    /// mincore answers for the page cache where there is one. Of private memory and of huge pages it only knows what this process has
    /// touched; in a pair a page that has just changed sides is a hole until it is touched.
    fn sees_holes(&self) -> bool {
        !matches!(self.kind(), Kind::HugeMemfd | Kind::Pair) && self.memory.mapping.as_ref().is_some_and(|mapping| !mapping.is_adopted())
    }

    /// The first page that the file, as it is now, does not hold whole.
    fn end_of_file(&self) -> Result<Page, Error> {
        let Some(source) = &self.memory.file else { return Ok(Page::new(u64::MAX)) };
        Ok(Page::new(source.size()?.saturating_sub(source.offset) >> PAGE_LG2))
    }

    /// Remembers which pages of a held span have memory, where that can be seen.
    pub(crate) fn know_residents(&self, span: Span<Page>) -> Result<(), Error> {
        if !self.sees_holes() {
            return Ok(());
        }
        span.blocks(CHUNK_LG2)
            .try_for_each(|chunk| self.each_residency(chunk, |run, resident| if resident { self.known_add(run) } else { Ok(()) }))
    }

    /// Remembers that these pages have memory.
    fn known_add(&self, span: Span<Page>) -> Result<(), Error> {
        Ok(self.known.lock().unwrap_or_else(PoisonError::into_inner).0.set(span, ())?)
    }

    /// Forgets that these pages have memory.
    pub(crate) fn known_forget(&self, span: Span<Page>) -> Result<(), Error> {
        Ok(self.known.lock().unwrap_or_else(PoisonError::into_inner).0.clear(span)?)
    }
}

fn present(run: &(Span<Page>, PageState)) -> bool {
    run.1 != PageState::Absent
}

fn push(list: &mut Vec<Span<Page>>, span: Span<Page>) -> Result<(), Error> {
    list.try_reserve(1).map_err(|_| OutOfMemory)?;
    match list.last_mut() {
        Some(last) if last.touches(span) => *last = Span::of(last.start(), span.last()),
        _ => list.push(span),
    }
    Ok(())
}
