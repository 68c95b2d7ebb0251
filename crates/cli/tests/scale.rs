//! `lockstep bench scale`: each size in a process of its own, one report in the end. Times are not judged here: with one size there is nothing to compare.

use serde_json::Value;
use std::process::{Command, Output};

fn bench(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lockstep")).arg("bench").args(args).output().expect("the command runs")
}

#[test]
fn a_report_has_every_study_that_is_within_the_limits() {
    let output = bench(&["scale", "--json", "--memory", "1M", "--areas", "100"]);
    assert!(output.status.success(), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    let points = report["points"].as_array().expect("points");
    for (name, axis, size, unit) in [
        ("pt_scattered_walk", "mapped bytes", 1 << 20, "ns/call"),
        ("pt_scattered_tables", "mapped bytes", 1 << 20, "bytes/GiB"),
        ("ioas_scattered_attach_second", "mapped bytes", 1 << 20, "ns/page"),
        ("areas_auto_map", "areas", 100, "ns/call"),
        ("private_pages_request_to_private", "private pages", 100, "ns/page"),
    ] {
        let point = points.iter().find(|point| point["name"] == name).unwrap_or_else(|| panic!("no {name}"));
        assert_eq!((&point["axis"], &point["size"], &point["unit"]), (&axis.into(), &size.into(), &unit.into()));
        assert!(point["median"].as_f64().is_some_and(|median| median > 0.0), "{point}");
    }
    // They begin at 4 MiB.
    assert!(!points.iter().any(|point| point["name"].as_str().is_some_and(|name| name.starts_with("guest_"))));
    assert_eq!(report["verdicts"], Value::Array(Vec::new()));
    assert!(report["access"].as_array().is_some_and(|access| access.len() > 3));
}

#[test]
fn what_cannot_be_measured_is_said() {
    for (args, words) in [
        (&["scale", "--only", "nothing"][..], "no study's name contains 'nothing'"),
        (&["scale", "--only", "guest_", "--memory", "1M"], "nothing is that small"),
        (&["pt", "--memory", "1M"], "options of `lockstep bench scale`"),
    ] {
        let output = bench(args);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(words), "{output:?}");
    }
}

/// Sv39 translates 256 GiB: larger sizes are left out, and the report says so.
#[test]
fn sizes_beyond_a_format_are_left_out() {
    let output = bench(&["scale", "--only", "pt_contiguous", "--format", "sv39", "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    let sizes = |list: &str| report[list].as_array().map(|all| all.iter().filter_map(|one| one["size"].as_u64()).max());
    assert_eq!(sizes("points"), Some(Some(2 << 30)), "{report}");
    assert_eq!(sizes("skipped"), Some(Some(1 << 40)));
    assert!(String::from_utf8_lossy(&output.stderr).contains("is left out"), "{output:?}");
}
