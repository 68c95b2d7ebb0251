//! Fail points: a test can make the n-th fallible step of an operation fail and compare what is left with what was there, and can plant
//! a fault in a layer and see whether a detector above notices.
//!
//! The seams stay in release builds, because that is what is tested: while nothing is armed each costs one relaxed load. Names
//! are `crate.what`, for example `pt.table`.

use thiserror::Error;

/// A step failed because a test wanted it to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("step '{name}' failed on purpose")]
pub struct Injected {
    /// The step.
    pub name: &'static str,
}

/// A fallible step: call it where an allocation, a lock or a system call could fail, and treat the error alike.
///
/// # Errors
/// [`Injected`], when this thread's plan says that this step is the one.
#[inline]
pub fn step(name: &'static str) -> Result<(), Injected> {
    #[cfg(feature = "std")]
    if armed::PLANS.load(core::sync::atomic::Ordering::Relaxed) != 0 {
        return armed::step(name);
    }
    let _ = name;
    Ok(())
}

/// Whether this layer should misbehave here, because a test planted the fault `name`.
#[inline]
pub fn planted(name: &'static str) -> bool {
    #[cfg(feature = "std")]
    if armed::PLANTS.load(core::sync::atomic::Ordering::Relaxed) != 0 {
        return armed::planted(name);
    }
    let _ = name;
    false
}

/// Whether the fault `name` is planted and has fires left. Nothing is counted: for code that only makes room for the fault to be seen.
#[inline]
pub fn is_planted(name: &'static str) -> bool {
    #[cfg(feature = "std")]
    if armed::PLANTS.load(core::sync::atomic::Ordering::Relaxed) != 0 {
        return armed::is_planted(name);
    }
    let _ = name;
    false
}

#[cfg(feature = "std")]
pub use armed::{NthGuard, PlantGuard, nth, plant};

#[cfg(feature = "std")]
mod armed {
    use super::Injected;
    use std::cell::Cell;
    use std::marker::PhantomData;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::{Mutex, MutexGuard, PoisonError};

    /// Threads that have a plan.
    pub(super) static PLANS: AtomicU32 = AtomicU32::new(0);
    /// Faults planted in the process.
    pub(super) static PLANTS: AtomicU32 = AtomicU32::new(0);
    static FAULTS: Mutex<Faults> = Mutex::new(Faults { next_id: 0, list: Vec::new() });

    struct Faults {
        next_id: u64,
        list: Vec<Fault>,
    }

    struct Fault {
        id: u64,
        name: &'static str,
        /// Hits still to let pass.
        after: u64,
        /// Hits still to answer with `true`.
        times: u64,
        fired: u64,
    }

    #[derive(Clone, Copy)]
    struct Plan {
        /// The step to fail, counted from 1; 0 fails none.
        nth: u64,
        passed: u64,
        fired: Option<&'static str>,
    }

    thread_local!(static PLAN: Cell<Option<Plan>> = const { Cell::new(None) });

    #[cold]
    pub(super) fn step(name: &'static str) -> Result<(), Injected> {
        let Some(mut plan) = PLAN.get() else { return Ok(()) };
        plan.passed += 1;
        let fails = plan.passed == plan.nth;
        if fails {
            plan.fired = Some(name);
        }
        PLAN.set(Some(plan));
        if fails { Err(Injected { name }) } else { Ok(()) }
    }

    /// This thread's n-th step from now fails, counted from 1; with 0 none does, and the steps are only counted.
    ///
    /// ```
    /// use lockstep_sync::fail;
    /// let plan = fail::nth(2);
    /// assert!(fail::step("a").is_ok());
    /// assert_eq!(fail::step("b").unwrap_err().name, "b");
    /// assert_eq!((plan.fired(), plan.steps()), (Some("b"), 2));
    /// ```
    ///
    /// # Panics
    /// When the thread has a plan already.
    pub fn nth(n: u64) -> NthGuard {
        assert!(PLAN.get().is_none(), "this thread has a fail plan already");
        PLAN.set(Some(Plan { nth: n, passed: 0, fired: None }));
        PLANS.fetch_add(1, Ordering::Relaxed);
        NthGuard { not_send: PhantomData }
    }

    /// A thread's plan, over when this is dropped.
    #[must_use]
    #[derive(Debug)]
    pub struct NthGuard {
        not_send: PhantomData<*const ()>,
    }

    impl NthGuard {
        /// The step that failed, if the plan got that far.
        pub fn fired(&self) -> Option<&'static str> {
            PLAN.get().and_then(|plan| plan.fired)
        }

        /// How many steps this thread has passed since, the failed one among them.
        pub fn steps(&self) -> u64 {
            PLAN.get().map_or(0, |plan| plan.passed)
        }
    }

    impl Drop for NthGuard {
        fn drop(&mut self) {
            PLAN.set(None);
            PLANS.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn faults() -> MutexGuard<'static, Faults> {
        FAULTS.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cold]
    pub(super) fn planted(name: &'static str) -> bool {
        let mut faults = faults();
        let mut fires = false;
        for fault in faults.list.iter_mut().filter(|fault| fault.name == name) {
            if fault.after > 0 {
                fault.after -= 1;
            } else if fault.times > 0 {
                fault.times -= 1;
                fault.fired += 1;
                fires = true;
            }
        }
        fires
    }

    #[cold]
    pub(super) fn is_planted(name: &'static str) -> bool {
        faults().list.iter().any(|fault| fault.name == name && fault.times > 0)
    }

    /// Plants the fault `name` in this process: after `after` hits it fires `times` times, in whatever thread.
    ///
    /// ```
    /// use lockstep_sync::fail;
    /// let plant = fail::plant("example.fault", 1, 1);
    /// let fired: Vec<_> = (0..3).map(|_| fail::planted("example.fault")).collect();
    /// assert_eq!(fired, [false, true, false]);
    /// assert_eq!(plant.fired(), 1);
    /// ```
    pub fn plant(name: &'static str, after: u64, times: u64) -> PlantGuard {
        let mut faults = faults();
        faults.next_id += 1;
        let id = faults.next_id;
        faults.list.push(Fault { id, name, after, times, fired: 0 });
        PLANTS.fetch_add(1, Ordering::Relaxed);
        PlantGuard { id }
    }

    /// A planted fault, gone when this is dropped.
    #[must_use]
    #[derive(Debug)]
    pub struct PlantGuard {
        id: u64,
    }

    impl PlantGuard {
        /// How often it has fired: a detector that saw nothing proves nothing when this is 0.
        pub fn fired(&self) -> u64 {
            faults().list.iter().find(|fault| fault.id == self.id).map_or(0, |fault| fault.fired)
        }
    }

    impl Drop for PlantGuard {
        fn drop(&mut self) {
            faults().list.retain(|fault| fault.id != self.id);
            PLANTS.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(all(test, feature = "std"))]
mod tests {
    use super::*;

    #[test]
    fn a_plan_is_one_threads_own() {
        let plan = nth(1);
        std::thread::scope(|scope| scope.spawn(|| assert!(step("elsewhere").is_ok())).join().unwrap());
        assert_eq!((plan.fired(), plan.steps()), (None, 0));
        assert_eq!(step("here"), Err(Injected { name: "here" }));
        assert!(step("after").is_ok());
        drop(plan);
        assert!(step("here").is_ok());
    }

    #[test]
    fn two_plants_of_one_name_count_apart() {
        let first = plant("sync.test", 0, 1);
        let second = plant("sync.test", 1, 1);
        assert!(is_planted("sync.test") && !is_planted("sync.other"));
        assert!(planted("sync.test"));
        assert!(!planted("sync.other"));
        assert!(planted("sync.test"));
        assert!(!planted("sync.test") && !is_planted("sync.test"));
        assert_eq!((first.fired(), second.fired()), (1, 1));
    }
}
