//! Runs the rows of a group under criterion: the same work as `lockstep bench`, with criterion's statistics and comparisons.

use criterion::{Criterion, Throughput};
use pt::FormatKind;
use std::time::Duration;
use workload::Group;

/// Measures every row of `group` that the command line selects.
pub(crate) fn main(group: Group) {
    // Rows are many and steady: short measurements keep all four targets under three minutes.
    let mut criterion = Criterion::default()
        .sample_size(15)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args();
    let mut benches = criterion.benchmark_group(group.name());
    for row in group.rows(FormatKind::AmdV1) {
        // Made when the row is selected, and only then.
        let mut work = None;
        benches.throughput(Throughput::Elements(row.unit.per_operation()));
        benches.bench_function(row.name, |bencher| {
            let work = work.get_or_insert_with(|| row.make().unwrap_or_else(|error| panic!("{}: {error}", row.name)));
            bencher.iter_custom(|times| work.run(times));
        });
    }
    benches.finish();
    criterion.final_summary();
}
