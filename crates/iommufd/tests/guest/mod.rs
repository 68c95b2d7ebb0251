//! A program that converts pages of a guest.
#![allow(dead_code, reason = "each test program uses a part of it")]

use crate::common::{FIXED, Program, RW};
use addr::{Oa, Page};
use backing::{Backing, PageState};
use lockstep_iommufd::Answer;
use lockstep_iommufd::uapi::ours::{IoasAudit, IoasConvert, NR_AUDIT, NR_CONVERT};
use rustix::io::Errno;
use std::sync::Arc;

pub(crate) const PRIVATE: u32 = 1;
pub(crate) const SHARED: u32 = 2;
pub(crate) const ASID: u32 = 5;

impl Program {
    /// Converts; answers how many bytes are done in either case.
    pub(crate) fn convert_as(&self, asid: u32, ioas_id: u32, to: u32, iova: u64, length: u64, gpa: u64) -> (Result<(), Errno>, u64) {
        let mut arg = IoasConvert { ioas_id, to, iova, length, gpa, asid, out_done: 0x5555, ..Default::default() };
        let answer = self.call_in(NR_CONVERT, &mut arg);
        (answer.map(|_| ()).map_err(|refusal| refusal.errno), arg.out_done)
    }

    /// The same for the one guest that has its memory where devices have it.
    pub(crate) fn convert(&self, ioas_id: u32, to: u32, iova: u64, length: u64) {
        assert_eq!(self.convert_as(ASID, ioas_id, to, iova, length, iova), (Ok(()), length));
    }

    /// What an audit says, with its text.
    pub(crate) fn audit(&self, ioas_id: u32) -> Answer<(IoasAudit, String)> {
        let data_uptr = self.local.put(&[0u8; 65_536][..]);
        let arg = self.call(NR_AUDIT, IoasAudit { ioas_id, data_uptr, data_len: 65_536, ..Default::default() })?;
        let text: [u8; 65_536] = self.local.get(data_uptr);
        Ok((arg, String::from_utf8(text[..(arg.data_len as usize).min(text.len())].to_vec()).unwrap()))
    }

    /// The tables agree, and something was compared.
    #[track_caller]
    pub(crate) fn clean(&self, ioas_id: u32) {
        let (arg, text) = self.audit(ioas_id).unwrap();
        assert_eq!((arg.out_differences, text.as_str()), (0, ""));
        assert!(arg.out_areas > 0 && arg.out_entries > 0);
    }

    /// A file mapped at `iova`, and its pages.
    pub(crate) fn guest_memory(&self, ioas_id: u32, iova: u64, len: u64) -> (i32, Arc<Backing>) {
        let fd = self.file(len);
        self.map_file(ioas_id, FIXED | RW, fd, 0, len, iova).unwrap();
        (fd, self.backing(ioas_id, iova))
    }

    pub(crate) fn backing(&self, ioas_id: u32, iova: u64) -> Arc<Backing> {
        Arc::clone(self.ioas(ioas_id).ioas().area_at(addr::Iova::new(iova)).unwrap().backing())
    }

    pub(crate) fn assigned(&self, backing: &Backing) -> u64 {
        self.host.iommu().rmp().assigned_in(backing.window())
    }
}

pub(crate) fn oa(backing: &Backing, page: u64) -> Oa {
    backing.oa(Page::new(page))
}

/// How many pages are in a state.
pub(crate) fn count(backing: &Backing, wanted: PageState) -> u64 {
    backing.states(backing.pages()).filter(|(_, state)| *state == wanted).map(|(run, _)| run.len()).sum()
}
