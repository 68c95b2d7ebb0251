//! One table of ioctls, one dispatcher (D-10). The rules that hold for every call are here and nowhere else: how a structure is read, which sizes are
//! accepted, when it is written back, what an observer sees and may forbid.

use crate::uapi::{self, Field, Struct};
use crate::{Answer, Caller, Refusal};
use rustix::io::Errno;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The longest structure of all.
pub const MAX_STRUCT: usize = 128;

/// A structure's bytes, aligned for any of them.
#[repr(align(8))]
#[derive(Clone, Copy)]
struct Buffer([u8; MAX_STRUCT]);

/// What a handler answers besides an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// 0, and the structure stays as the caller wrote it.
    Done,
    /// 0, and the structure goes back.
    Back,
    /// This value, and the structure stays.
    Value(i64),
    /// This value, and the structure goes back.
    BackValue(i64),
    /// 0, and the structure goes back; if it cannot, the new object is destroyed.
    New(u32),
    /// 0, and the structure goes back; if it cannot, the mapping is taken out.
    Mapped {
        /// Id of the IOAS.
        ioas: u32,
        /// Where it begins.
        iova: u64,
        /// Bytes.
        len: u64,
    },
}

/// What ioctls are made on.
pub trait Target: Send + Sync + 'static {
    /// The answer could not be given to the caller: what it reports is undone.
    fn undo(&self, reply: Reply) {
        let _ = reply;
    }
}

/// How a structure says its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// iommufd: the first word is the caller's size; too small is `EINVAL`, unknown bytes that are not zero are `E2BIG`, missing ones read as zero.
    Size,
    /// VFIO: the first word is `argsz`, which must reach the minimum (`EINVAL`); what lies behind the known structure is the handler's business.
    Argsz,
    /// No structure: `arg` is a number.
    None,
}

/// One ioctl: everything that dispatcher, traces and the coverage table know about it.
pub struct Ioctl<T: 'static> {
    /// Its number.
    pub nr: u32,
    /// Its name as C programs spell it.
    pub name: &'static str,
    /// The structure's name in C, empty without one.
    pub structure: &'static str,
    /// Bytes of the structure.
    pub size: usize,
    /// The fewest bytes that are accepted.
    pub min: usize,
    /// The structure's fields.
    pub fields: &'static [Field],
    /// How its size is said.
    pub rule: Rule,
    /// What does it: the structure's bytes, and the bare argument.
    pub run: Run<T>,
}

/// An entry without what does it, so that tables of different files can stand in one list.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Its number.
    pub nr: u32,
    /// Its name as C programs spell it.
    pub name: &'static str,
    /// The structure's name in C, empty without one.
    pub structure: &'static str,
    /// Bytes of the structure.
    pub size: usize,
    /// The fewest bytes that are accepted.
    pub min: usize,
    /// The structure's fields.
    pub fields: &'static [Field],
    /// How its size is said.
    pub rule: Rule,
}

impl Entry {
    /// What an entry says about itself.
    pub fn of<T>(ioctl: &Ioctl<T>) -> Self {
        let Ioctl { nr, name, structure, size, min, fields, rule, .. } = *ioctl;
        Self { nr, name, structure, size, min, fields, rule }
    }
}

/// Does an ioctl.
pub type Run<T> = fn(&Arc<T>, &dyn Caller, &mut [u8], u64) -> Answer<Reply>;

/// Makes an entry of the table from a typed handler: `fn(&Arc<T>, &dyn Caller, &mut S) -> Answer<Reply>`.
#[macro_export]
macro_rules! ioctl {
    ($nr:expr, $name:literal, $S:ty, min $min:literal, $rule:ident, $handler:expr) => {
        $crate::table::Ioctl {
            nr: $nr,
            name: $name,
            structure: <$S as $crate::uapi::Struct>::C_NAME,
            size: core::mem::size_of::<$S>(),
            min: $min,
            fields: <$S as $crate::uapi::Struct>::FIELDS,
            rule: $crate::table::Rule::$rule,
            run: |target, caller, bytes, arg| $crate::table::typed::<_, $S>(target, caller, bytes, arg, $handler),
        }
    };
    ($nr:expr, $name:literal, $handler:expr) => {
        $crate::table::Ioctl {
            nr: $nr,
            name: $name,
            structure: "",
            size: 0,
            min: 0,
            fields: &[],
            rule: $crate::table::Rule::None,
            run: |target, caller, _, arg| $handler(target, caller, arg),
        }
    };
}

/// What a typed handler gets besides its structure.
pub struct Call<'a, T> {
    /// What the ioctl is made on.
    pub target: &'a Arc<T>,
    /// Who makes it.
    pub caller: &'a dyn Caller,
    /// Where the structure lies in the caller's memory.
    pub at: u64,
}

#[doc(hidden)]
pub fn typed<T, S: Struct>(
    target: &Arc<T>,
    caller: &dyn Caller,
    bytes: &mut [u8],
    at: u64,
    handler: impl FnOnce(&Call<'_, T>, &mut S) -> Answer<Reply>,
) -> Answer<Reply> {
    let own = bytes.get_mut(..S::SIZE).ok_or(Refusal::of(Errno::INVAL, "the structure is longer than any that is known"))?;
    let mut value = S::read_from_bytes(own).unwrap_or_default();
    let answer = handler(&Call { target, caller, at }, &mut value);
    own.copy_from_slice(value.as_bytes());
    answer
}

/// A call, for whoever watches.
pub struct Seen<'a> {
    /// What the descriptor is.
    pub file: &'static str,
    /// The number as the caller gave it.
    pub command: u32,
    /// Name of the ioctl; empty for a number that nothing is served under.
    pub name: &'static str,
    /// Its structure's name in C.
    pub structure: &'static str,
    /// Its fields.
    pub fields: &'static [Field],
    /// The structure as the caller gave it, as much of it as is known; empty when it could not be read or its size was wrong.
    pub given: &'a [u8],
    /// The structure as the caller finds it now.
    pub bytes: &'a [u8],
    /// The bare argument.
    pub arg: u64,
    /// Who made it.
    pub caller: &'a dyn Caller,
}

/// Whoever watches calls: traces, explanations, counters, injected errors.
pub trait Observer: Send + Sync {
    /// A call is about to be made; an errno makes it fail without an effect.
    fn before(&self, call: &Seen<'_>) -> Option<Errno> {
        let _ = call;
        None
    }

    /// A call has been answered.
    fn after(&self, call: &Seen<'_>, answer: Result<i64, &Refusal>, took: Duration) {
        let _ = (call, answer, took);
    }
}

/// Runs one entry for a caller.
///
/// # Errors
/// Those of the rule, then the handler's.
pub fn run<T: Target>(
    entry: &Ioctl<T>,
    file: &'static str,
    target: &Arc<T>,
    caller: &dyn Caller,
    arg: u64,
    observer: Option<&dyn Observer>,
) -> Answer<i64> {
    let mut buffer = Buffer([0; MAX_STRUCT]);
    let Some(observer) = observer else {
        return read_struct(entry, caller, arg, &mut buffer).and_then(|size| call(entry, target, caller, arg, &mut buffer, size));
    };
    let started = Instant::now();
    let read = read_struct(entry, caller, arg, &mut buffer);
    let len = read.as_ref().map_or(0, |size| entry.size.min(*size));
    let given = buffer;
    let given = &given.0[..len];
    let mut seen = Seen {
        file,
        command: uapi::io(entry.nr),
        name: entry.name,
        structure: entry.structure,
        fields: entry.fields,
        given,
        bytes: given,
        arg,
        caller,
    };
    let answer = match observer.before(&seen) {
        Some(errno) => Err(Refusal::of(errno, "this failure was asked for")),
        None => read.and_then(|size| call(entry, target, caller, arg, &mut buffer, size)),
    };
    if answer.as_ref().map_or_else(|refusal| refusal.writes_back, |_| true) {
        seen.bytes = &buffer.0[..len];
    }
    observer.after(&seen, answer.as_ref().copied(), started.elapsed());
    answer
}

/// Shows a call to the observer that nothing is served for.
pub fn unknown(
    file: &'static str,
    caller: &dyn Caller,
    command: u32,
    arg: u64,
    refusal: Refusal,
    observer: Option<&dyn Observer>,
) -> Refusal {
    if let Some(observer) = observer {
        let seen = Seen { file, command, name: "", structure: "", fields: &[], given: &[], bytes: &[], arg, caller };
        // An injected error would change nothing that a caller sees: this is one already.
        let _ = observer.before(&seen);
        observer.after(&seen, Err(&refusal), Duration::ZERO);
    }
    refusal
}

/// Fills the buffer by the entry's rule; answers the caller's size.
fn read_struct<T>(entry: &Ioctl<T>, caller: &dyn Caller, arg: u64, buffer: &mut Buffer) -> Answer<usize> {
    if entry.rule == Rule::None {
        return Ok(0);
    }
    let known = &mut buffer.0[..entry.size];
    // The whole structure at once, which nearly always works; what the caller did not mean to give is cleared below.
    let whole = caller.read(arg, known).is_ok();
    if !whole {
        known.fill(0);
        let first = if entry.rule == Rule::Argsz { entry.min } else { 4 };
        caller.read(arg, &mut known[..first])?;
    }
    let size = u32::from_le_bytes([known[0], known[1], known[2], known[3]]) as usize;
    if size < entry.min {
        let text = format!("{} takes at least {} bytes, and the structure says {size}", entry.name, entry.min);
        return Err(Refusal::new(Errno::INVAL, text));
    }
    let given = size.min(entry.size);
    if entry.rule == Rule::Size && size > entry.size {
        check_zero(entry.name, caller, arg.wrapping_add(entry.size as u64), size - entry.size)?;
    }
    if !whole {
        caller.read(arg, &mut known[..given])?;
    }
    known[given..].fill(0);
    Ok(size)
}

/// # Errors
/// `E2BIG` when a byte is not zero, `EFAULT`.
fn check_zero(name: &str, caller: &dyn Caller, mut at: u64, mut len: usize) -> Answer {
    let mut chunk = [0; 4096];
    while len > 0 {
        // Never across a page, so that a byte that is set counts before memory that is not there.
        let now = len.min(chunk.len() - (at % chunk.len() as u64) as usize);
        caller.read(at, &mut chunk[..now])?;
        if chunk[..now].iter().any(|byte| *byte != 0) {
            return Err(Refusal::new(Errno::TOOBIG, format!("the structure of {name} has bytes set that this version does not know")));
        }
        (at, len) = (at.wrapping_add(now as u64), len - now);
    }
    Ok(())
}

fn call<T: Target>(entry: &Ioctl<T>, target: &Arc<T>, caller: &dyn Caller, arg: u64, buffer: &mut Buffer, size: usize) -> Answer<i64> {
    let bytes = &mut buffer.0[..entry.size];
    let answer = (entry.run)(target, caller, bytes, arg);
    let (back, value) = match &answer {
        Ok(Reply::Done) => (false, 0),
        Ok(Reply::Value(value)) => (false, *value),
        Ok(Reply::Back) => (true, 0),
        Ok(Reply::BackValue(value)) => (true, *value),
        Ok(Reply::New(_) | Reply::Mapped { .. }) => (true, 0),
        Err(refusal) => (refusal.writes_back, 0),
    };
    if back {
        caller.write(arg, &bytes[..size.min(entry.size)]).inspect_err(|_| answer.iter().for_each(|reply| target.undo(*reply)))?;
    }
    answer.map(|_| value)
}
