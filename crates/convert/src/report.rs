//! What an audit says: where the tables differ, and what each of them says there.

use crate::Evidence;
use addr::{Iova, Span};
use std::fmt;

/// What one table says about a span, and how that is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Says {
    /// How it was looked at.
    pub evidence: Evidence,
    /// In words.
    pub what: String,
}

impl fmt::Display for Says {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.what, self.evidence)
    }
}

/// A span about which the tables differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The invariant that is broken.
    pub invariant: &'static str,
    /// What is wrong.
    pub what: String,
    /// As devices name it.
    pub iova: Span<Iova>,
    /// The IO page table.
    pub io_page_table: Says,
    /// The secure world's table.
    pub secure: Says,
    /// Stage 2.
    pub stage2: Says,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {} at {}", self.invariant, self.what, self.iova)?;
        writeln!(f, "    IO page table: {}", self.io_page_table)?;
        writeln!(f, "    secure world:  {}", self.secure)?;
        write!(f, "    stage 2:       {}", self.stage2)
    }
}

/// What an audit looked at, and what it found.
#[derive(Clone, Debug, Default)]
pub struct AuditReport {
    /// IO page table leaves read back.
    pub leaves: u64,
    /// IO page tables read back.
    pub tables: u64,
    /// RMP entries read back.
    pub entries: u64,
    /// Pages whose state was compared in all three.
    pub pages: u64,
    /// Where the tables differ; at most [`AuditReport::LIMIT`] are kept, all are counted.
    pub differences: Vec<Difference>,
    /// All differences.
    pub count: u64,
}

impl AuditReport {
    /// Differences that are described; a broken table can have millions.
    pub const LIMIT: usize = 64;

    /// Whether the tables are equal.
    pub fn is_clean(&self) -> bool {
        self.count == 0
    }

    pub(crate) fn add(&mut self, difference: Difference) {
        self.count += 1;
        if self.differences.len() < Self::LIMIT {
            self.differences.push(difference);
        }
    }
}
