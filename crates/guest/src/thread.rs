//! The guest program in a thread of the host, for machines without KVM.

use crate::control::{MAGIC, Params};
use crate::registers::List;
use crate::{CONTROL, Memory, Platform, native};
use addr::{Address, Gpa, Span};
use thiserror::Error;
use zerocopy::{FromZeros, IntoBytes};

/// Why the program was not started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RunError {
    /// No parameters in guest memory.
    #[error("no guest program is loaded: the control page begins with {0:#x}")]
    NoMagic(u64),
    /// The parameters name something outside guest memory.
    #[error("the guest's {what} at {start:#x}, {len:#x} bytes long, is not inside its {memory:#x} bytes of memory")]
    Outside {
        /// Which of them.
        what: &'static str,
        /// Where it would lie.
        start: u64,
        /// How long it would be.
        len: u64,
        /// Bytes of memory.
        memory: u64,
    },
}

/// Runs the program that [`Setup::load`](crate::Setup::load) wrote into `memory`, in the calling thread, until it ends.
///
/// The parameters are copied and checked first, and the program uses the copy: whatever happens to guest memory later, it stays
/// inside it. A panic of the platform stops the guest and goes on here afterwards.
///
/// # Errors
/// When the parameters are not there, or name something outside `memory`.
pub fn run(memory: &Memory, platform: &mut dyn Platform) -> Result<(), RunError> {
    let mut params = Params::new_zeroed();
    let outside = |what, start, len| RunError::Outside { what, start, len, memory: memory.len_bytes() };
    memory.read(CONTROL, params.as_mut_bytes()).map_err(|_| outside("control page", CONTROL.get(), size_of::<Params>() as u64))?;
    if params.magic != MAGIC {
        return Err(RunError::NoMagic(params.magic));
    }
    if !Gpa::new(params.work_gpa).is_aligned(addr::PAGE_LG2) {
        return Err(outside("work span (not on a page)", params.work_gpa, 0));
    }
    let list = size_of::<List>() as u64;
    for (what, start, len) in [
        ("report", crate::REPORT.get(), crate::REPORT_BYTES as u64),
        ("work span", params.work_gpa, params.work_pages.saturating_mul(addr::PAGE_BYTES)),
        ("state table", params.states_gpa, params.work_pages),
        ("page state change list", params.psc_gpa, list),
        ("PVALIDATE list", params.pvalidate_gpa, list),
    ] {
        let inside = Span::from_len(Gpa::new(start), len).is_ok_and(|span| span.last().get() < memory.len_bytes());
        if !inside {
            return Err(outside(what, start, len));
        }
    }
    native::run(memory, &params, platform);
    Ok(())
}
