//! Descriptors of a queue, which share guards: a device model that finds many of them pays for a guard once in 64 KiB.
//!
//! A queue is taken as a whole, not through a closure, so that no code of a caller runs under a guard that it cannot see: nothing in here
//! waits for anybody, and when the call returns no guard is held. A guard is left, and entered again with the log applied, as soon as 64 KiB were
//! copied under it, so a writer waits no longer than for one long descriptor (D-2).

use crate::dma::{Dma, Open};
use crate::far::{From, Into};
use crate::{Access, Fault};
use addr::Iova;

/// What is to be transferred.
#[derive(Debug)]
enum Transfer<'a> {
    Read(Iova, &'a mut [u8]),
    Write(Iova, &'a [u8]),
    Copy(Iova, Iova, u64),
}

/// One transfer of a queue, and how it ended.
#[derive(Debug)]
pub struct Descriptor<'a> {
    transfer: Transfer<'a>,
    result: Option<Result<(), Fault>>,
}

impl<'a> Descriptor<'a> {
    /// As [`Dma::read`].
    pub fn read(iova: Iova, into: &'a mut [u8]) -> Self {
        Self::of(Transfer::Read(iova, into))
    }

    /// As [`Dma::write`].
    pub fn write(iova: Iova, from: &'a [u8]) -> Self {
        Self::of(Transfer::Write(iova, from))
    }

    /// As [`Dma::copy`].
    pub fn copy(src: Iova, dst: Iova, len: u64) -> Self {
        Self::of(Transfer::Copy(src, dst, len))
    }

    fn of(transfer: Transfer<'a>) -> Self {
        Self { transfer, result: None }
    }

    /// How it ended; `None` before it was run.
    pub fn result(&self) -> Option<&Result<(), Fault>> {
        self.result.as_ref()
    }

    /// Which way it goes; a copy writes.
    pub fn access(&self) -> Access {
        if matches!(self.transfer, Transfer::Read(..)) { Access::Read } else { Access::Write }
    }

    /// Bytes that it transfers when all goes well.
    pub fn len_bytes(&self) -> u64 {
        match &self.transfer {
            Transfer::Read(_, into) => into.len() as u64,
            Transfer::Write(_, from) => from.len() as u64,
            Transfer::Copy(.., len) => *len,
        }
    }
}

/// What a refused descriptor means for those behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnFault {
    /// They are not run.
    Stop,
    /// They are run all the same.
    Continue,
}

impl Dma {
    /// Runs the descriptors of `queue` in order, each as [`Dma::read`], [`Dma::write`] or [`Dma::copy`] would, and notes in each how it ended.
    /// Answers how many were run: all of them, or with [`OnFault::Stop`] those up to the first that was refused, itself included.
    ///
    /// An unmap that returned before this was called is seen by every descriptor. One that returns meanwhile is seen by each descriptor that begins
    /// after it; descriptors that went before it are not undone.
    pub fn run(&mut self, queue: &mut [Descriptor<'_>], on_fault: OnFault) -> usize {
        let mut open = Open::default();
        let mut run = 0;
        for Descriptor { transfer, result } in queue {
            run += 1;
            // Noted here when it is what most are, so that a whole fault is written only when there is one.
            if self.transfer_at_once(transfer, &mut open) {
                *result = Some(Ok(()));
                continue;
            }
            let ended = self.transfer_any(transfer, &mut open);
            *result = Some(ended);
            if ended.is_err() && on_fault == OnFault::Stop {
                break;
            }
        }
        self.close(&mut open);
        run
    }

    #[inline(always)]
    fn transfer_at_once(&mut self, transfer: &mut Transfer<'_>, open: &mut Open) -> bool {
        match transfer {
            Transfer::Read(iova, into) => self.transfer_quickly(*iova, into.len() as u64, Access::Read, &mut Into(into), open),
            Transfer::Write(iova, from) => self.transfer_quickly(*iova, from.len() as u64, Access::Write, &mut From(from), open),
            Transfer::Copy(..) => false,
        }
    }

    #[inline(never)]
    fn transfer_any(&mut self, transfer: &mut Transfer<'_>, open: &mut Open) -> Result<(), Fault> {
        match transfer {
            Transfer::Read(iova, into) => self.transfer_in_full(*iova, into.len() as u64, Access::Read, &mut Into(into), open),
            Transfer::Write(iova, from) => self.transfer_in_full(*iova, from.len() as u64, Access::Write, &mut From(from), open),
            Transfer::Copy(src, dst, len) => self.copy_in(*src, *dst, *len, open),
        }
    }
}
