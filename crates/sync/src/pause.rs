//! Stopping a writer between two stores: in debug builds, code that edits shared tables calls [`pause`] before each store, and a test can
//! have readers run there. That is a writer stopped at every step (I-15), without a second thread and without chance. A device with a cache of its own, and
//! whoever waits for it, pause too.
//!
//! In a shuttle run each pause is a place where another thread may go on. In release builds, and without feature `std`, [`pause`] is nothing.

/// Whether somebody watches this thread's stores one by one, so that they must not be made several at a time.
#[inline(always)]
pub fn is_watched() -> bool {
    #[cfg(shuttle)]
    return true;
    #[cfg(not(shuttle))]
    is_hooked()
}

#[cfg(not(shuttle))]
#[inline(always)]
fn is_hooked() -> bool {
    #[cfg(all(debug_assertions, feature = "std", not(loom)))]
    return hooked::is_watched();
    #[cfg(not(all(debug_assertions, feature = "std", not(loom))))]
    return false;
}

/// Called before a store that readers may see, and where a device or a waiter may be stopped.
#[inline(always)]
pub fn pause() {
    // A load that another thread may be run before.
    #[cfg(shuttle)]
    shuttle::sync::atomic::AtomicBool::new(false).load(core::sync::atomic::Ordering::SeqCst);
    #[cfg(all(debug_assertions, feature = "std", not(loom)))]
    hooked::pause();
}

#[cfg(all(debug_assertions, feature = "std", not(loom)))]
pub use hooked::{PauseGuard, at_every_pause};

#[cfg(all(debug_assertions, feature = "std", not(loom)))]
mod hooked {
    use std::cell::{Cell, RefCell};
    use std::marker::PhantomData;

    thread_local! {
        static HOOKED: Cell<bool> = const { Cell::new(false) };
        static HOOK: RefCell<Option<Box<dyn FnMut()>>> = const { RefCell::new(None) };
    }

    #[cfg(not(shuttle))]
    pub(super) fn is_watched() -> bool {
        HOOKED.get()
    }

    pub(super) fn pause() {
        // Not from inside the hook, which may run code with pauses of its own.
        if HOOKED.replace(false) {
            HOOK.with_borrow_mut(|hook| hook.as_mut().map(|hook| hook()));
            HOOKED.set(true);
        }
    }

    /// Runs `hook` at every pause of this thread until the guard is dropped.
    #[must_use]
    pub fn at_every_pause(hook: impl FnMut() + 'static) -> PauseGuard {
        HOOK.set(Some(Box::new(hook)));
        HOOKED.set(true);
        PauseGuard(PhantomData)
    }

    /// Takes the hook away when dropped; belongs to the thread that set it.
    #[derive(Debug)]
    pub struct PauseGuard(PhantomData<*const ()>);

    impl Drop for PauseGuard {
        fn drop(&mut self) {
            HOOKED.set(false);
            HOOK.set(None);
        }
    }
}
