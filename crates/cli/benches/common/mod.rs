//! Runs the rows of a group under criterion: the same work as `lockstep bench`, with criterion's statistics and comparisons.

use criterion::{BenchmarkId, Criterion, Throughput};
use pt::FormatKind;
use std::time::Duration;
use workload::Group;

/// Measures every row of `group` over AMDv1 that the command line selects, and over `others` those that the kernel has figures for.
pub(crate) fn main(group: Group, others: &[FormatKind]) {
    // Rows are many and steady: short measurements keep each target under three minutes.
    let mut criterion = Criterion::default()
        .sample_size(15)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args();
    let mut benches = criterion.benchmark_group(group.name());
    let beside = others.iter().flat_map(|format| group.rows(*format)).filter(|row| row.kernel().is_some());
    for row in group.rows(FormatKind::AmdV1).into_iter().chain(beside) {
        // Made when the row is selected, and only then.
        let mut work = None;
        benches.throughput(Throughput::Elements(row.unit.per_operation()));
        benches.bench_function(BenchmarkId::new(row.name, row.format), |bencher| {
            let work = work.get_or_insert_with(|| row.make().unwrap_or_else(|error| panic!("{}: {error}", row.name)));
            bencher.iter_custom(|times| work.run(times));
        });
    }
    benches.finish();
    criterion.final_summary();
}
