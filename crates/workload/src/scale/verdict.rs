//! Whether a series grows faster than a logarithm.
//!
//! An operation on N things may take log2(N) steps. Two things make its time grow besides: each step may be an access to memory, and accesses
//! cost more where more memory is in use, because less of it is in the processor's caches; and times are noisy. So a size n < N *allows* at N
//!
//! `1.5 * cost(n) * log2(N) / log2(n) + 4 * log2(N) * (access(N) - access(n))`
//!
//! where `access` is what one random access costs on this machine into as much memory as the structures take at that size, measured in the same run, and
//! costs are those of the best samples. Bytes have no second summand. Every size must cost no more than one of the smaller sizes allows, and the largest no
//! more than the smallest allows. A cost that grows with
//! N, or with its root, breaks this as soon as the part that grows is most of the cost.

use super::{Access, Axis, Point, Unit};
use serde::Serialize;

/// What noise may add.
pub const NOISE: f64 = 1.5;
/// Random accesses for each doubling: four, because an operation on an area goes through two trees whose nodes have two cache lines each.
pub const PLACES: f64 = 4.0;

/// About one series.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Verdict {
    /// Study and operation.
    pub name: String,
    /// What grows.
    pub axis: Axis,
    /// What the figures are.
    pub unit: Unit,
    /// Smallest and largest size.
    pub sizes: (u64, u64),
    /// What the operation costs at these.
    pub costs: (f64, f64),
    /// How often the cost at the smallest goes into that at the largest.
    pub growth: f64,
    /// The same of the sizes' logarithms.
    pub log_growth: f64,
    /// The largest share that a size takes of what it is allowed; more than 1 breaks the rule.
    pub used: f64,
    /// Whether all keep to it.
    pub is_within: bool,
}

/// Judges every series that has at least two sizes, in the order in which they begin.
pub fn verdicts(points: &[Point], access: &Access) -> Vec<Verdict> {
    let mut names: Vec<&str> = Vec::new();
    for point in points {
        if !names.contains(&point.name.as_str()) {
            names.push(&point.name);
        }
    }
    names.iter().filter_map(|name| judge(&points.iter().filter(|point| point.name == *name).collect::<Vec<_>>(), access)).collect()
}

/// `series` is ascending in size.
fn judge(series: &[&Point], access: &Access) -> Option<Verdict> {
    // Memory that came out of what the process had already.
    let seen = series.iter().position(|point| point.best > 0.0)?;
    let series = &series[seen..];
    let (first, last) = (series.first()?, series.last().filter(|_| series.len() > 1)?);
    let most =
        |large: &Point, smaller: &[&Point]| smaller.iter().map(|small| allowed(small, large, access)).fold(f64::MIN_POSITIVE, f64::max);
    let shares = series.iter().enumerate().skip(1).map(|(at, large)| large.best / most(large, &series[..at]));
    let used = shares.fold(last.best / most(last, &series[..1]), f64::max);
    Some(Verdict {
        name: first.name.clone(),
        axis: first.axis,
        unit: first.unit,
        sizes: (first.size, last.size),
        costs: (first.best, last.best),
        growth: last.best / first.best,
        log_growth: lg2(last) / lg2(first),
        used,
        is_within: used <= 1.0,
    })
}

/// What the operation may cost at the larger size, by what it costs at the smaller.
fn allowed(small: &Point, large: &Point, access: &Access) -> f64 {
    let more = if small.unit.is_time() { (access.ns(large.resident) - access.ns(small.resident)).max(0.0) } else { 0.0 };
    NOISE * small.best * lg2(large) / lg2(small) + PLACES * lg2(large) * more
}

fn lg2(point: &Point) -> f64 {
    point.axis.things(point.size).max(2.0).log2()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Costs of a kind that the accesses of a real machine are part of.
    fn series(cost: impl Fn(f64) -> f64) -> Verdict {
        let access = Access::of(vec![(16 << 10, 1.0), (1 << 20, 4.0), (16 << 20, 25.0), (256 << 20, 100.0)]);
        let point = |size: u64| {
            let (things, resident) = (Axis::Areas.things(size), size * 400);
            let best = cost(things) + 20.0 * access.ns(resident);
            Point { name: "op".into(), axis: Axis::Areas, size, unit: Unit::NsPerCall, best, median: best, samples: 1, resident }
        };
        let points: Vec<Point> = [100, 1000, 10_000, 100_000, 1_000_000].map(point).into();
        let all = verdicts(&points, &access);
        assert_eq!(all.len(), 1);
        all[0].clone()
    }

    #[test]
    fn constants_and_logarithms_are_within() {
        assert!(series(|_| 300.0).is_within);
        let logarithm = series(|n| 50.0 * n.log2());
        assert!(logarithm.is_within && logarithm.used < 0.8, "{logarithm:?}");
        assert!((logarithm.log_growth - 3.0).abs() < 1e-9);
    }

    #[test]
    fn what_grows_faster_is_not() {
        for (name, verdict) in [
            ("linear", series(|n| 300.0 + n)),
            // A scan that takes a thousandth of a nanosecond for each.
            ("slightly linear", series(|n| 300.0 + n / 20.0)),
            ("a root", series(|n| 30.0 * n.sqrt())),
            ("late", series(|n| if n > 500_000.0 { 40_000.0 } else { 300.0 })),
        ] {
            assert!(!verdict.is_within && verdict.used > 1.0, "{name}: {verdict:?}");
        }
    }

    #[test]
    fn bytes_have_no_excuse() {
        let point = |size: u64, best: f64| Point {
            name: "bytes".into(),
            axis: Axis::Mapped,
            size,
            unit: Unit::BytesPerGib,
            best,
            median: best,
            samples: 1,
            resident: size,
        };
        let slow = Access::of(vec![(16 << 10, 1.0), (1 << 30, 1000.0)]);
        assert!(verdicts(&[point(1 << 20, 100.0), point(1 << 40, 100.0)], &slow)[0].is_within);
        assert!(!verdicts(&[point(1 << 20, 100.0), point(1 << 40, 1000.0)], &slow)[0].is_within);
        assert_eq!(verdicts(&[point(1 << 20, 100.0)], &slow), []);
        assert_eq!(verdicts(&[point(1 << 20, 0.0), point(1 << 40, 9.0)], &slow), []);
    }
}
