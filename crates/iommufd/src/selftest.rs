//! The kernel's test multiplexer: one ioctl with 23 operations, by which a test program makes devices without hardware, looks behind what it
//! mapped, and plays the software that uses an address space.

mod access;
mod check;
mod mock;
mod ops;

use crate::ioas_ops::unsupported;
use crate::table::{Call, Reply};
use crate::uapi::test::{self, TestCmd};
use crate::{Answer, Context, DmaBuf, Opened, Refusal};
use addr::{Iova, PAGE_BYTES, Span};
use rustix::io::Errno;
use sync::fail;
use zerocopy::IntoBytes;

type Arg<'a> = Call<'a, Context>;

/// The fail point of everything here that would take memory in the kernel.
const SELFTEST: &str = "iommufd.selftest";

pub(crate) fn run(call: &Arg<'_>, cmd: &mut TestCmd) -> Answer<Reply> {
    match cmd.op {
        1 => add_reserved(call, cmd),
        2 | 12 => ops::mock_domain(call, cmd),
        3 => check::map(call, cmd),
        4 => check::refs(call, cmd),
        5 => access::create(call, cmd),
        6 => access::destroy_pages(call, cmd),
        7 => access::pages(call, cmd),
        8 => access::rw(call, cmd),
        9 => memory_limit(cmd),
        10 => ops::replace(call, cmd),
        11 => access::replace_ioas(call, cmd),
        13 => check::dirty(call, cmd),
        14 => ops::check_iotlb(call, cmd),
        15 => ops::trigger_iopf(call, cmd),
        16 => ops::check_cache(call, cmd),
        17 => ops::trigger_vevent(call, cmd),
        18 => ops::pasid_attach(call, cmd),
        19 => ops::pasid_replace(call, cmd),
        20 => ops::pasid_detach(call, cmd),
        21 => ops::pasid_check(call, cmd),
        22 => dmabuf_get(call, cmd),
        23 => dmabuf_revoke(call, cmd),
        _ => Err(unsupported("no test operation has this number")),
    }
}

/// Gives the caller its answer now, for operations that undo themselves when that is impossible. Every caller's structure is as long as this.
fn respond(call: &Arg<'_>, cmd: &TestCmd) -> Answer {
    call.caller.write(call.at, &cmd.as_bytes()[..64])
}

fn add_reserved(call: &Arg<'_>, cmd: &TestCmd) -> Answer<Reply> {
    let args: test::AddReserved = cmd.args();
    let span = Span::from_len(Iova::new(args.start), args.length).map_err(ioas::Error::from)?;
    // Reserved for as long as the address space lives.
    let _kept = call.target.ioas(cmd.id)?.ioas().reserve(span)?;
    Ok(Reply::Done)
}

/// The least that a batch of one page takes in the kernel.
const LEAST_SCRATCH: u32 = 12;

/// Nothing here works in batches, so the limit only has to be a good one.
fn memory_limit(cmd: &TestCmd) -> Answer<Reply> {
    let limit = cmd.args::<test::MemoryLimit>().limit;
    if limit < LEAST_SCRATCH {
        return Err(Refusal::new(Errno::INVAL, format!("{limit} bytes of scratch memory are fewer than {LEAST_SCRATCH}")));
    }
    Ok(Reply::Done)
}

/// The most pages of a dma-buf.
const MOST_DMABUF_PAGES: u64 = 512;

fn dmabuf_get(call: &Arg<'_>, cmd: &TestCmd) -> Answer<Reply> {
    let args: test::DmabufGet = cmd.args();
    let len = u64::from(args.length).next_multiple_of(PAGE_BYTES);
    if !(1..=MOST_DMABUF_PAGES).contains(&(len / PAGE_BYTES)) {
        return Err(Refusal::new(Errno::INVAL, format!("a dma-buf has 1 to {MOST_DMABUF_PAGES} pages")));
    }
    fail::step(SELFTEST)?;
    let fd = call.caller.install(DmaBuf::new(len)?)?;
    Ok(Reply::Value(fd.into()))
}

fn dmabuf_revoke(call: &Arg<'_>, cmd: &TestCmd) -> Answer<Reply> {
    let args: test::DmabufRevoke = cmd.args();
    let Opened::Ours(file) = call.caller.file(args.dmabuf_fd)? else {
        return Err(Refusal::new(Errno::INVAL, format!("descriptor {} is no dma-buf", args.dmabuf_fd)));
    };
    let buffer = file.downcast::<DmaBuf>().ok_or(unsupported("the descriptor is no dma-buf of the test operations"))?;
    buffer.set_revoked(args.revoked != 0)?;
    Ok(Reply::Done)
}
