//! Writes the program into guest memory: image, parameters, empty report, state table.

use crate::control::{Features, MAGIC, PageState, Params, Report};
use crate::layout::{self, Layout};
use crate::registers;
use addr::Gpa;
use zerocopy::{FromZeros, IntoBytes};

/// How a guest is to run.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Where things lie.
    pub layout: Layout,
    /// Seed of its random choices; 0 counts as 1.
    pub seed: u64,
    /// What it may use.
    pub features: Features,
    /// The state that every page of the work span is in at the start.
    pub initial: PageState,
    /// Ends after so many rounds; 0 = runs until stopped.
    pub max_rounds: u64,
}

impl Setup {
    /// The parameters as they are written.
    pub fn params(&self) -> Params {
        Params {
            magic: MAGIC,
            seed: self.seed.max(1),
            memory_bytes: self.layout.memory.len(),
            work_gpa: self.layout.work.start().get(),
            work_pages: self.layout.work_pages(),
            states_gpa: layout::STATES.get(),
            psc_gpa: layout::PSC_LIST.get(),
            pvalidate_gpa: layout::PVALIDATE_LIST.get(),
            doorbell_gpa: registers::DOORBELL.get(),
            trusted_gpa: registers::TRUSTED.get(),
            untrusted_gpa: registers::UNTRUSTED.get(),
            features: self.features.0,
            max_rounds: self.max_rounds,
            polls: 1 << 20,
            ..Params::new_zeroed()
        }
    }

    /// Writes everything by `write(gpa, bytes)`; all of it lies in [`Layout::low`].
    ///
    /// # Errors
    /// Those of `write`.
    pub fn load<E>(&self, mut write: impl FnMut(Gpa, &[u8]) -> Result<(), E>) -> Result<(), E> {
        write(layout::IMAGE, crate::image())?;
        write(layout::CONTROL, self.params().as_bytes())?;
        write(layout::REPORT, Report::default().as_bytes())?;
        let states = [self.initial as u8; 4096];
        let pages = self.layout.work_pages();
        for first in (0..pages).step_by(states.len()) {
            let count = (pages - first).min(states.len() as u64) as usize;
            write(Gpa::new(layout::STATES.get() + first), &states[..count])?;
        }
        Ok(())
    }
}
