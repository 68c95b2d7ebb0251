//! The files by which a test program asks for failures: fail-nth of a thread, and the directories in debugfs that say that the kernel was
//! built for it. A front shows them at their paths; what is written here makes the n-th fallible step of that thread's ioctls fail.

use crate::{Answer, Refusal};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use sync::fail;

/// Failures that clients asked for, and the knobs they turned.
///
/// ```
/// use lockstep_iommufd::Knobs;
/// let knobs = Knobs::default();
/// knobs.set_fail_nth(17, b"3\n")?;
/// assert_eq!(knobs.fail_nth(17), "3\n");
/// knobs.write("failslab/verbose", b"0")?;
/// assert_eq!(knobs.read("failslab/verbose").as_deref(), Some("0\n"));
/// # Ok::<_, lockstep_iommufd::Refusal>(())
/// ```
#[derive(Debug, Default)]
pub struct Knobs {
    /// How many threads are armed: what a call without any of this reads.
    armed: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// By thread, how many steps there are to go, the failing one among them. Absent when it has failed.
    left: BTreeMap<i32, u64>,
    turned: BTreeMap<&'static str, u32>,
}

/// What a knob takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Bool,
    Number,
}

/// Path below [`Knobs::DIRECTORY`], what it takes, what it is at first.
const FILES: &[(&str, Kind, u32)] = &[
    ("fail_page_alloc/ignore-gfp-highmem", Kind::Bool, 1),
    ("fail_page_alloc/ignore-gfp-wait", Kind::Bool, 1),
    ("fail_page_alloc/verbose", Kind::Number, 2),
    ("failslab/ignore-gfp-wait", Kind::Bool, 1),
    ("failslab/verbose", Kind::Number, 2),
];

/// Threads that can be armed at once. The lowest number gives way to another one.
const MOST_THREADS: usize = 4096;

impl Knobs {
    /// Where the kernel has them.
    pub const DIRECTORY: &'static str = "/sys/kernel/debug";
    /// Where a thread's fail-nth is; `*` stands for a number.
    pub const FAIL_NTH: &'static [&'static str] = &["/proc/*/task/*/fail-nth", "/proc/*/fail-nth"];

    /// The files below [`Knobs::DIRECTORY`].
    pub fn paths() -> impl Iterator<Item = &'static str> {
        FILES.iter().map(|(path, ..)| *path)
    }

    /// What is read from one of them; `None` when there is no such file.
    pub fn read(&self, path: &str) -> Option<String> {
        let (name, kind, initial) = FILES.iter().find(|(own, ..)| *own == path)?;
        let value = self.lock().turned.get(name).copied().unwrap_or(*initial);
        Some(match kind {
            Kind::Bool if value == 0 => "N\n".into(),
            Kind::Bool => "Y\n".into(),
            Kind::Number => format!("{value}\n"),
        })
    }

    /// What is written to one of them. It is remembered and changes nothing: every step of ours can fail, whatever memory it would take.
    ///
    /// # Errors
    /// `ENOENT`; `EINVAL` for what is neither a number nor yes or no.
    pub fn write(&self, path: &str, text: &[u8]) -> Answer {
        let Some((name, kind, _)) = FILES.iter().find(|(own, ..)| *own == path) else {
            return Err(Refusal::new(Errno::NOENT, format!("there is no knob {path}")));
        };
        let value = match kind {
            Kind::Bool => match text.first() {
                Some(b'y' | b'Y' | b't' | b'T' | b'1') => 1,
                Some(b'n' | b'N' | b'f' | b'F' | b'0') => 0,
                _ => return Err(Refusal::of(Errno::INVAL, "the knob takes Y or N")),
            },
            Kind::Number => number(text)?,
        };
        self.lock().turned.insert(name, value);
        Ok(())
    }

    /// What a thread reads from its fail-nth: how many steps there are to go until one fails; 0 when it has failed, or none will.
    pub fn fail_nth(&self, thread: i32) -> String {
        format!("{}\n", self.lock().left.get(&thread).copied().unwrap_or(0))
    }

    /// What is written to it: the n-th step from now fails, none with 0.
    ///
    /// # Errors
    /// `EINVAL` for what is no number.
    pub fn set_fail_nth(&self, thread: i32, text: &[u8]) -> Answer {
        let nth = number(text)?;
        let mut state = self.lock();
        state.left.remove(&thread);
        if nth > 0 {
            if state.left.len() >= MOST_THREADS {
                state.left.pop_first();
            }
            state.left.insert(thread, nth.into());
        }
        self.armed.store(state.left.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Makes a call of a thread, with the failure that it asked for.
    pub(crate) fn run<R>(&self, thread: Option<i32>, call: impl FnOnce() -> R) -> R {
        if self.armed.load(Ordering::Relaxed) == 0 {
            return call();
        }
        let Some((thread, left)) = thread.and_then(|own| Some((own, self.lock().left.get(&own).copied()?))) else { return call() };
        let plan = fail::nth(left);
        let answer = call();
        let (fired, passed) = (plan.fired().is_some(), plan.steps());
        drop(plan);
        let mut state = self.lock();
        if fired || passed >= left {
            state.left.remove(&thread);
        } else {
            state.left.insert(thread, left - passed);
        }
        self.armed.store(state.left.len() as u64, Ordering::Relaxed);
        answer
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A number as the kernel reads one: decimal, octal after 0, hexadecimal after 0x, perhaps with a newline behind it.
fn number(text: &[u8]) -> Answer<u32> {
    let text = std::str::from_utf8(text).unwrap_or_default();
    let digits = text.strip_suffix('\n').unwrap_or(text);
    let parsed = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(hex) => u32::from_str_radix(hex, 16),
        None if digits.len() > 1 && digits.starts_with('0') => u32::from_str_radix(digits, 8),
        None => digits.parse(),
    };
    parsed.map_err(|_| Refusal::new(Errno::INVAL, format!("'{}' is no number from 0 to {}", digits.escape_debug(), u32::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nth_step_of_the_armed_thread_fails_once() {
        let knobs = Knobs::default();
        let steps = |thread| knobs.run(thread, || [(); 3].map(|()| fail::step("iommufd.test").is_ok()));
        knobs.set_fail_nth(7, b"5").unwrap();
        assert_eq!(steps(Some(8)), [true; 3]);
        assert_eq!(steps(None), [true; 3]);
        assert_eq!((steps(Some(7)), knobs.fail_nth(7)), ([true; 3], "2\n".into()));
        assert_eq!((steps(Some(7)), knobs.fail_nth(7)), ([true, false, true], "0\n".into()));
        assert_eq!(steps(Some(7)), [true; 3]);
        knobs.set_fail_nth(7, b"1\n").unwrap();
        knobs.set_fail_nth(7, b"0").unwrap();
        assert_eq!(steps(Some(7)), [true; 3]);
    }

    #[test]
    fn numbers_as_the_kernel_reads_them() {
        for (text, value) in [("0", 0), ("12\n", 12), ("0x1f", 31), ("010", 8), ("4294967295", u32::MAX)] {
            assert_eq!(number(text.as_bytes()).unwrap(), value);
        }
        for text in ["", "\n", "-1", "1 ", "08", "4294967296", "x"] {
            assert_eq!(number(text.as_bytes()).unwrap_err().errno, Errno::INVAL, "{text}");
        }
    }

    #[test]
    fn knobs_are_remembered() {
        let knobs = Knobs::default();
        assert_eq!(knobs.read("failslab/ignore-gfp-wait").as_deref(), Some("Y\n"));
        knobs.write("failslab/ignore-gfp-wait", b"0").unwrap();
        assert_eq!(knobs.read("failslab/ignore-gfp-wait").as_deref(), Some("N\n"));
        assert_eq!(knobs.write("failslab/ignore-gfp-wait", b"?").unwrap_err().errno, Errno::INVAL);
        assert_eq!(knobs.write("failslab/other", b"0").unwrap_err().errno, Errno::NOENT);
        assert!(Knobs::paths().all(|path| knobs.read(path).is_some()));
    }
}
