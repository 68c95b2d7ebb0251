//! A program that uses the test operations, in this process.
#![allow(dead_code, reason = "each test program uses a part of it")]

use backing::{Backing, Frames};
use lockstep_iommufd::uapi::test::{self, TestCmd};
use lockstep_iommufd::uapi::{self, io};
use lockstep_iommufd::{Answer, Context, Host, HostConfig, Local, Refusal};
use rustix::io::Errno;
use std::sync::Arc;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub(crate) const PAGE: u64 = 4096;
/// The first IOVA that default mock page tables translate.
pub(crate) const APERTURE: u64 = 16 << 20;
/// FIXED_IOVA, WRITEABLE, READABLE.
pub(crate) const FIXED_RW: u32 = 7;

pub(crate) struct Client {
    pub(crate) host: Arc<Host>,
    pub(crate) local: Local,
    pub(crate) context: Arc<Context>,
}

/// A mock device: its ids.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mock {
    pub(crate) own: u32,
    pub(crate) device: u32,
    pub(crate) hwpt: u32,
}

impl Client {
    pub(crate) fn new() -> Self {
        let host = Host::new(HostConfig { test_ops: true, ..HostConfig::default() }).unwrap();
        let context = host.open();
        Self { host, local: Local::new(), context }
    }

    /// Another open of the same /dev/iommu.
    pub(crate) fn again(&self) -> Self {
        Self { host: Arc::clone(&self.host), local: self.local.fork(), context: self.host.open() }
    }

    pub(crate) fn call<S: uapi::Struct>(&self, nr: u32, mut arg: S) -> Answer<S> {
        // Each begins with its size.
        arg.as_mut_bytes()[..4].copy_from_slice(&(S::SIZE as u32).to_le_bytes());
        self.local.ioctl(&*self.context, io(nr), &mut arg)?;
        Ok(arg)
    }

    /// One operation; answers value and words.
    pub(crate) fn op_value<T>(&self, op: u32, id: u32, args: T) -> Answer<(i64, T)>
    where
        T: FromBytes + IntoBytes + KnownLayout + Immutable + Copy + Default,
    {
        let mut cmd = TestCmd { size: 72, op, id, ..TestCmd::default() };
        cmd.set_args(&args);
        let value = self.local.ioctl(&*self.context, io(0xa0), &mut cmd)?;
        Ok((value, cmd.args()))
    }

    pub(crate) fn op<T>(&self, op: u32, id: u32, args: T) -> Answer<T>
    where
        T: FromBytes + IntoBytes + KnownLayout + Immutable + Copy + Default,
    {
        self.op_value(op, id, args).map(|(_, args)| args)
    }

    pub(crate) fn ioas(&self) -> u32 {
        self.call(0x81, uapi::IoasAlloc::default()).unwrap().out_ioas_id
    }

    pub(crate) fn destroy(&self, id: u32) -> Answer {
        self.call(0x80, uapi::Destroy { id, ..uapi::Destroy::default() }).map(|_| ())
    }

    pub(crate) fn mock(&self, pt_id: u32) -> Answer<Mock> {
        self.mock_with(2, pt_id, 0)
    }

    pub(crate) fn mock_with(&self, op: u32, pt_id: u32, dev_flags: u32) -> Answer<Mock> {
        let args = self.op(op, pt_id, test::MockDomain { dev_flags, ..test::MockDomain::default() })?;
        Ok(Mock { own: args.out_stdev_id, device: args.out_idev_id, hwpt: args.out_hwpt_id })
    }

    /// Memory of the client. Answers its address; it stays until the client ends.
    pub(crate) fn memory(&self, pages: u64) -> u64 {
        self.local.add(&Backing::memfd(pages * PAGE, Frames::Contiguous).unwrap()).unwrap()
    }

    pub(crate) fn map_with(&self, flags: u32, ioas_id: u32, user_va: u64, length: u64, iova: u64) -> Answer<u64> {
        self.call(0x85, uapi::IoasMap { flags, ioas_id, user_va, length, iova, ..uapi::IoasMap::default() }).map(|arg| arg.iova)
    }

    pub(crate) fn map(&self, ioas: u32, va: u64, length: u64, iova: u64) -> Answer<u64> {
        self.map_with(FIXED_RW, ioas, va, length, iova)
    }

    pub(crate) fn map_file(&self, ioas_id: u32, fd: i32, start: u64, length: u64, iova: u64) -> Answer<u64> {
        let arg = uapi::IoasMapFile { flags: FIXED_RW, ioas_id, fd, start, length, iova, ..uapi::IoasMapFile::default() };
        self.call(0x8f, arg).map(|arg| arg.iova)
    }

    pub(crate) fn unmap(&self, ioas_id: u32, iova: u64, length: u64) -> Answer<u64> {
        self.call(0x86, uapi::IoasUnmap { ioas_id, iova, length, ..uapi::IoasUnmap::default() }).map(|arg| arg.length)
    }

    pub(crate) fn check_map(&self, hwpt: u32, iova: u64, length: u64, uptr: u64) -> Answer {
        self.op(3, hwpt, test::CheckMap { iova, length, uptr }).map(|_| ())
    }

    pub(crate) fn check_refs(&self, uptr: u64, length: u64, refs: u32) -> Answer {
        self.op(4, 0, test::CheckRefs { length, uptr, refs, pad: 0 }).map(|_| ())
    }

    pub(crate) fn access(&self, ioas: u32, flags: u32) -> Answer<u32> {
        self.op(5, ioas, test::CreateAccess { flags, ..test::CreateAccess::default() }).map(|args| args.out_access_fd)
    }

    pub(crate) fn access_pages(&self, access: u32, iova: u64, length: u64, uptr: u64, flags: u32) -> Answer<u32> {
        let args = test::AccessPages { flags, iova, length, uptr, ..test::AccessPages::default() };
        self.op(7, access, args).map(|args| args.out_access_pages_id)
    }

    pub(crate) fn drop_pages(&self, access: u32, access_pages_id: u32) -> Answer {
        self.op(6, access, test::DestroyAccessPages { access_pages_id }).map(|_| ())
    }

    pub(crate) fn rw(&self, access: u32, iova: u64, length: u64, uptr: u64, flags: u32) -> Answer {
        self.op(8, access, test::AccessRw { iova, length, uptr, flags, pad: 0 }).map(|_| ())
    }

    pub(crate) fn hwpt_alloc(&self, device: u32, pt_id: u32, flags: u32, data: Option<test::HwptData>) -> Answer<u32> {
        let (data_type, data_len) = if data.is_some() { (test::HWPT_DATA, 8) } else { (0, 0) };
        let data_uptr = data.map_or(0, |data| self.local.put(&data));
        let arg = uapi::HwptAlloc { flags, dev_id: device, pt_id, data_type, data_len, data_uptr, ..uapi::HwptAlloc::default() };
        self.call(0x89, arg).map(|arg| arg.out_hwpt_id)
    }
}

/// The errno of a refused call.
#[track_caller]
pub(crate) fn errno<T: std::fmt::Debug>(answer: Answer<T>) -> Errno {
    let refusal: Refusal = answer.expect_err("this should have been refused");
    refusal.errno
}
