//! What the run's threads find wrong, and what they have done: the one place where all of them report.

use addr::Gpa;
use convert::Auditor;
use lockstep::{AuditReport, Difference, GuestDma};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Who found something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Detector {
    /// The tables differ.
    Audit,
    /// A device got what it must not get, or did not get what it must.
    DmaCheck,
    /// The guest read something else than was written.
    Guest,
    /// A conversion could not be finished.
    Conversion,
    /// A device did not answer, and lost its access.
    Quarantine,
    /// A vCPU read something else than the bytes at the output address.
    Probe,
}

/// Something wrong, with what each of the three tables says there.
#[derive(Clone, Debug)]
pub(crate) struct Finding {
    pub(crate) detector: Detector,
    pub(crate) difference: Difference,
}

/// Shared by all threads of a run.
#[derive(Debug, Default)]
pub(crate) struct Checks {
    stop: AtomicBool,
    findings: Mutex<Vec<Finding>>,
    differences: AtomicU64,
    pub(crate) bytes_moved: AtomicU64,
    pub(crate) dma_checks: AtomicU64,
    pub(crate) audits: AtomicU64,
    pub(crate) audited_pages: AtomicU64,
    pub(crate) transitions: AtomicU64,
    pub(crate) punches: AtomicU64,
    pub(crate) probes: AtomicU64,
}

/// Findings that are described; one fault can have thousands.
const KEPT: usize = 16;

impl Checks {
    /// Whether the threads should end.
    pub(crate) fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Ends the run.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Reports something wrong, and ends the run: the first finding is the one that counts.
    pub(crate) fn find(&self, detector: Detector, difference: Difference) {
        self.differences.fetch_add(1, Ordering::Relaxed);
        let mut findings = self.findings.lock().unwrap_or_else(PoisonError::into_inner);
        if findings.len() < KEPT {
            findings.push(Finding { detector, difference });
        }
        drop(findings);
        self.stop();
    }

    /// Reports something wrong with a page of the guest; the tables are asked now.
    pub(crate) fn find_at(&self, dma: &GuestDma, detector: Detector, gpa: Gpa, invariant: &'static str, what: &str) {
        self.find(detector, Auditor::new(dma.space()).describe(dma.ioas(), gpa, invariant, what));
    }

    /// Takes over what an audit found.
    pub(crate) fn take(&self, report: AuditReport) {
        self.audited_pages.fetch_add(report.pages, Ordering::Relaxed);
        for difference in report.differences {
            self.find(Detector::Audit, difference);
        }
    }

    /// Everything found, and how often.
    pub(crate) fn findings(&self) -> (Vec<Finding>, u64) {
        let findings = self.findings.lock().unwrap_or_else(PoisonError::into_inner).clone();
        (findings, self.differences.load(Ordering::Relaxed))
    }
}

/// Adds to a counter.
pub(crate) fn add(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

/// Reads a counter.
pub(crate) fn read(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}
