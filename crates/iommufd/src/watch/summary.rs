//! What a program did, counted: calls with their errors and times, pages, faults, revocations.

use super::errno_name;
use crate::{Host, Seen};
use addr::PAGE_LG2;
use iommu::FaultKind;
use rustix::io::Errno;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

#[derive(Default)]
pub(super) struct Counts(Mutex<Books>);

#[derive(Default)]
struct Books {
    calls: BTreeMap<&'static str, Row>,
    mapped_bytes: u64,
    unmapped_bytes: u64,
    most_pinned: u64,
    revocations: u64,
    revoked_bytes: u64,
}

#[derive(Default)]
struct Row {
    calls: u64,
    took: Duration,
    longest: Duration,
    errors: BTreeMap<i32, u64>,
}

/// What calls that map say about it, and which of their fields says how much.
const MAPS: [(&str, &str); 4] =
    [("IOMMU_IOAS_MAP", "length"), ("IOMMU_IOAS_MAP_FILE", "length"), ("IOMMU_IOAS_COPY", "length"), ("VFIO_IOMMU_MAP_DMA", "size")];
const UNMAPS: [(&str, &str); 2] = [("IOMMU_IOAS_UNMAP", "length"), ("VFIO_IOMMU_UNMAP_DMA", "size")];

impl Counts {
    pub(super) fn add(&self, call: &Seen<'_>, answer: Result<i64, Errno>, took: Duration, host: Option<&Host>) {
        let pinned = host.filter(|_| answer.is_ok()).map_or(0, |host| host.accounts().pinned());
        let bytes = |list: &[(&str, &str)]| {
            let field = list.iter().find(|(name, _)| *name == call.name).map(|(_, field)| *field).filter(|_| answer.is_ok())?;
            call.fields.iter().find(|known| known.name == field).map(|known| known.value(call.bytes))
        };
        let mut books = self.lock();
        let row = books.calls.entry(if call.name.is_empty() { "(unknown)" } else { call.name }).or_default();
        row.calls += 1;
        row.took += took;
        row.longest = row.longest.max(took);
        if let Err(errno) = answer {
            *row.errors.entry(errno.raw_os_error()).or_default() += 1;
        }
        books.mapped_bytes += bytes(&MAPS).unwrap_or(0);
        books.unmapped_bytes += bytes(&UNMAPS).unwrap_or(0);
        books.most_pinned = books.most_pinned.max(pinned);
    }

    pub(super) fn revoked(&self, len: u64) {
        let mut books = self.lock();
        books.revocations += 1;
        books.revoked_bytes += len;
    }

    fn lock(&self) -> MutexGuard<'_, Books> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A table by time, most first, and what it did to memory.
    pub(super) fn text(&self, host: Option<&Host>) -> String {
        let books = self.lock();
        let mut rows: Vec<_> = books.calls.iter().collect();
        rows.sort_by_key(|(name, row)| (std::cmp::Reverse(row.took), **name));
        let mut text = "    calls   errors     seconds  us/call  ioctl\n".to_owned();
        let mut line = |calls: u64, errors: u64, took: Duration, name: &str| {
            let each = took.as_secs_f64() * 1e6 / calls.max(1) as f64;
            let _ = writeln!(text, "{calls:>9} {errors:>8} {:>11.6} {each:>8.1}  {name}", took.as_secs_f64());
        };
        for (name, row) in &rows {
            let list: Vec<_> =
                row.errors.iter().map(|(errno, times)| format!("{} {times}", errno_name(Errno::from_raw_os_error(*errno)))).collect();
            let name = if list.is_empty() { (**name).to_owned() } else { format!("{name}: {}", list.join(", ")) };
            line(row.calls, row.errors.values().sum(), row.took, &name);
        }
        let sum = |of: fn(&Row) -> u64| rows.iter().map(|(_, row)| of(row)).sum();
        line(sum(|row| row.calls), sum(|row| row.errors.values().sum()), rows.iter().map(|(_, row)| row.took).sum(), "all");
        let pages = |bytes: u64| bytes >> PAGE_LG2;
        let _ = writeln!(text, "pages: {} mapped, {} unmapped by calls", pages(books.mapped_bytes), pages(books.unmapped_bytes));
        if let Some(host) = host {
            let _ = writeln!(text, "pinned: at most {} pages after a call, {} now", books.most_pinned, host.accounts().pinned());
            let faults: Vec<_> = faults(host).iter().map(|(what, times)| format!("{times} {what}")).collect();
            let _ = writeln!(text, "DMA faults: {}", if faults.is_empty() { "none".to_owned() } else { faults.join(", ") });
        }
        let _ = writeln!(text, "revocations: {} ({} pages)", books.revocations, pages(books.revoked_bytes));
        text
    }

    pub(super) fn json(&self, host: Option<&Host>) -> Value {
        let books = self.lock();
        let nanoseconds = |took: Duration| u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let calls: serde_json::Map<_, _> = books
            .calls
            .iter()
            .map(|(name, row)| {
                let errors: serde_json::Map<_, _> =
                    row.errors.iter().map(|(errno, times)| (errno_name(Errno::from_raw_os_error(*errno)), (*times).into())).collect();
                let row = json!({
                    "calls": row.calls, "errors": errors, "nanoseconds": nanoseconds(row.took), "longest_nanoseconds": nanoseconds(row.longest),
                });
                ((*name).to_owned(), row)
            })
            .collect();
        let mut all = json!({
            "event": "summary",
            "calls": calls,
            "pages_mapped": books.mapped_bytes >> PAGE_LG2,
            "pages_unmapped": books.unmapped_bytes >> PAGE_LG2,
            "revocations": books.revocations,
            "pages_revoked": books.revoked_bytes >> PAGE_LG2,
        });
        if let Some(host) = host {
            let faults: serde_json::Map<_, _> = faults(host).into_iter().map(|(what, times)| (what, times.into())).collect();
            (all["most_pages_pinned"], all["pages_pinned"]) = (books.most_pinned.into(), host.accounts().pinned().into());
            all["dma_faults"] = faults.into();
        }
        all
    }
}

/// Faults of devices by kind, those that happened.
fn faults(host: &Host) -> Vec<(String, u64)> {
    let counters = host.iommu().faults().counters();
    let all = FaultKind::ALL.iter().map(|kind| (format!("{kind:?}"), counters.of(*kind)));
    all.filter(|(_, times)| *times > 0).collect()
}
