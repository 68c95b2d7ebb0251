//! What histories have been through: one in which nothing happens proves nothing.

/// What has happened so far.
#[derive(Clone, Copy, Default, Debug)]
pub struct Seen {
    pub audits: u64,
    pub converted: u64,
    pub batches: u64,
    pub failed: u64,
    pub leaked: u64,
    pub allowed: u64,
    /// Of those, to private memory.
    pub private: u64,
    pub refused: u64,
    pub punched: u64,
    pub adjusted: u64,
    pub merged: u64,
    pub moved: u64,
    pub aliases: u64,
    pub quarantines: u64,
}

impl Seen {
    pub fn add(&mut self, other: &Self) {
        let mut other = *other;
        self.all().into_iter().zip(other.all()).for_each(|((_, sum), (_, more))| *sum += *more);
    }

    /// What never happened.
    pub fn lacks(&self) -> Vec<&'static str> {
        let mut seen = *self;
        seen.all().into_iter().filter(|(_, count)| **count == 0).map(|(name, _)| name).collect()
    }

    fn all(&mut self) -> [(&'static str, &mut u64); 14] {
        macro_rules! named {
            ($($field:ident)*) => { [$((stringify!($field), &mut self.$field)),*] };
        }
        named!(audits converted batches failed leaked allowed private refused punched adjusted merged moved aliases quarantines)
    }
}
