//! Finding out what happened behind our back: the kernel tells user space nothing about a punch or a truncation made by somebody
//! else (D-8), so somebody has to look.
//!
//! A hole alone says little: memory that was never touched is a hole, too. So a backing remembers, as extents, which pages are known to have had
//! memory (populated, or seen by an earlier look); a hole there is a loss.

use crate::backing::Known;
use crate::file::Source;
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
    /// punched and touched again since the last look has memory, zeroed, and is not found. Of a pair's private pages only a file that became shorter is
    /// found: this process does not map them.
    ///
    /// # Errors
    /// Bad spans; what fstat and mincore answer; no memory. What was found until then is revoked.
    pub fn recheck(&self, span: Span<Page>) -> Result<Recheck, Error> {
        self.check(span)?;
        let at = SystemTime::now();
        let mut found = Recheck { at, truncated_to: None, lost: Vec::new(), holes_seen: self.sees_holes() };
        for chunk in span.blocks(CHUNK_LG2) {
            let held = self.lock(chunk);
            let ends = self.ends()?;
            if let Some(source) = ends.iter().filter(|(_, end)| *end <= self.pages().last()).find_map(|(source, _)| *source) {
                found.truncated_to = Some(source.size()?);
            }
            let mut lost = Vec::new();
            if found.holes_seen {
                self.compare_holes(chunk, ends[0].1, &mut lost)?;
            }
            for (run, state) in self.states(chunk).filter(present) {
                let end = if self.in_mapping(state) { ends[0].1 } else { ends[1].1 };
                Span::new(end.max(run.start()), run.last()).map_or(Ok(()), |behind| push(&mut lost, behind))?;
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
        if self.kind() == Kind::Pair {
            // A page that has just changed sides is a hole until it is touched.
            return Err(self.no_holes_seen());
        }
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
            for (piece, _) in self.states(run).filter(|(_, state)| self.in_mapping(*state)) {
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
        let mapping = mapping.ok_or_else(|| self.no_holes_seen())?;
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

    fn no_holes_seen(&self) -> Error {
        Error::Unsupported { kind: self.kind(), what: "tell where its holes are" }
    }

    /// mincore answers for the page cache where there is one. Of private memory and of huge pages it only knows what this process has
    /// touched.
    fn sees_holes(&self) -> bool {
        self.kind() != Kind::HugeMemfd && self.memory.mapping.as_ref().is_some_and(|mapping| !mapping.is_adopted())
    }

    /// Whether a page in this state lies in the file that this process maps. Every page does, unless the backing is a pair.
    fn in_mapping(&self, state: PageState) -> bool {
        match self.memory.hidden {
            Some(_) => state == PageState::Shared,
            None => state != PageState::Absent,
        }
    }

    /// The first page that each file, as it is now, does not hold whole: the file that is mapped, and a pair's other one.
    fn ends(&self) -> Result<[(Option<&Source>, Page); 2], Error> {
        let end = |source: Option<&'_ Source>| match source {
            Some(source) => Ok::<_, Error>(Page::new(source.size()?.saturating_sub(source.offset) >> PAGE_LG2)),
            None => Ok(Page::new(u64::MAX)),
        };
        let [mapped, hidden] = [self.memory.file.as_ref(), self.memory.hidden.as_ref().map(|hidden| &hidden.file)];
        Ok([(mapped, end(mapped)?), (hidden, end(hidden)?)])
    }

    /// Remembers which pages of a held span have memory, where that can be seen; those that are absent are about to be in `state`.
    pub(crate) fn know_residents(&self, span: Span<Page>, state: PageState) -> Result<(), Error> {
        if !self.sees_holes() {
            return Ok(());
        }
        let mapped = |now| self.in_mapping(if now == PageState::Absent { state } else { now });
        let add = |run| self.states(run).filter(|(_, now)| mapped(*now)).try_for_each(|(piece, _)| self.known_add(piece));
        span.blocks(CHUNK_LG2).try_for_each(|chunk| self.each_residency(chunk, |run, resident| if resident { add(run) } else { Ok(()) }))
    }

    /// Remembers that these pages have memory.
    fn known_add(&self, span: Span<Page>) -> Result<(), Error> {
        Ok(self.known.lock().unwrap_or_else(PoisonError::into_inner).0.set(span, ())?)
    }

    /// The pages are in this state now; where a pair's have left the mapped file, what was known of them is over. Cannot fail: without memory all is
    /// forgotten, and learnt anew by the next look.
    pub(crate) fn known_moved(&self, span: Span<Page>, state: PageState) {
        if self.memory.hidden.is_some() && !self.in_mapping(state) {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            if known.0.clear(span).is_err() {
                *known = Known::default();
            }
        }
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
