//! IOMMU_OPTION: who is limited, and whether leaves may be large (rules 34, 35).

use crate::ioas_ops::{RESERVED, check_clear, unsupported};
use crate::table::{Call, Reply};
use crate::uapi::{self, OPTION_GET, OPTION_HUGE_PAGES, OPTION_RLIMIT_MODE, OPTION_SET};
use crate::{Answer, Context, Refusal};
use rustix::io::Errno;
use std::sync::atomic::Ordering;
use zerocopy::IntoBytes;

type Arg<'a> = Call<'a, Context>;

pub(crate) fn option(call: &Arg<'_>, arg: &mut uapi::Option) -> Answer<Reply> {
    check_clear(arg.__reserved.into(), RESERVED)?;
    match arg.option_id {
        OPTION_RLIMIT_MODE => rlimit_mode(call, arg)?,
        OPTION_HUGE_PAGES => huge_pages(call, arg)?,
        _ => return Err(unsupported("no option has this number")),
    }
    // Nothing else goes back, so that nothing else need be writable (rule 34).
    call.caller.write(call.at.wrapping_add(std::mem::offset_of!(uapi::Option, val64) as u64), arg.val64.as_bytes())?;
    Ok(Reply::Done)
}

fn rlimit_mode(call: &Arg<'_>, arg: &mut uapi::Option) -> Answer {
    check_clear(arg.object_id.into(), "this option belongs to no object")?;
    let context = call.target;
    match arg.op {
        OPTION_GET => arg.val64 = context.by_space.load(Ordering::Relaxed).into(),
        OPTION_SET => {
            // A container's root seldom has the capability, and the limits are ours alone: test programs get by without it.
            let process = call.caller.process()?;
            let is_test = context.host().config().test_ops && process.uid == 0;
            if !process.sys_resource && !is_test {
                return Err(Refusal::of(Errno::PERM, "who is limited may be chosen with CAP_SYS_RESOURCE only"));
            }
            // Objects cannot appear while this is held.
            let table = context.table();
            if !table.is_empty() {
                return Err(Refusal::of(Errno::BUSY, "who is limited must be chosen before the first object is made"));
            }
            let by_space = boolean(arg.val64)?;
            context.by_space.store(by_space, Ordering::Relaxed);
        }
        _ => return Err(unsupported("an option is set or got")),
    }
    Ok(())
}

fn huge_pages(call: &Arg<'_>, arg: &mut uapi::Option) -> Answer {
    let ioas = call.target.ioas(arg.object_id)?;
    match arg.op {
        OPTION_GET => arg.val64 = ioas.ioas().large_leaves().into(),
        OPTION_SET => ioas.ioas().set_large_leaves(boolean(arg.val64)?)?,
        _ => return Err(unsupported("an option is set or got")),
    }
    Ok(())
}

fn boolean(value: u64) -> Answer<bool> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Refusal::new(Errno::INVAL, format!("{value} is neither 0 nor 1"))),
    }
}
