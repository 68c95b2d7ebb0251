//! `lockstep run` as a user calls it: it ends well when all is well, and with status 1 and a report whenever a fault is planted.

use serde_json::Value;
use std::process::{Command, Output};
use std::sync::{Mutex, PoisonError};

/// One run at a time: each has more threads than a small machine has processors.
static ONE: Mutex<()> = Mutex::new(());

fn lockstep(args: &[&str]) -> Output {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    Command::new(env!("CARGO_BIN_EXE_lockstep")).arg("run").args(args).output().expect("the command starts")
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)))
}

fn number(summary: &Value, key: &str) -> u64 {
    summary[key].as_u64().unwrap_or_else(|| panic!("{key} is no number in {summary}"))
}

/// A run that must end well, and what it says of itself.
fn good(args: &[&str]) -> Value {
    let output = lockstep(&[args, &["--json"]].concat());
    let summary = json(&output);
    assert!(output.status.success(), "{summary:#}");
    for key in ["bytes_moved", "bytes_verified", "conversions", "audits", "untrusted_faults", "guest_dma", "page_table_bytes", "rmp_bytes"]
    {
        assert!(number(&summary, key) > 0, "{key} is 0 in {summary:#}");
    }
    assert_eq!(number(&summary, "differences"), 0);
    for key in ["vm", "backing", "memory", "vcpu_exits", "cuts", "merges", "faults"] {
        assert!(!summary[key].is_null(), "{key} is missing in {summary:#}");
    }
    summary
}

#[test]
fn the_best_that_the_host_has() {
    let summary = good(&["--seconds", "2", "--memory", "64M"]);
    assert!(number(&summary, "cuts") > 0 && number(&summary, "merges") > 0);
    println!("ran in: {}, memory: {}", summary["vm"], summary["backing"]);
    if summary["vm"] == "kvm" {
        assert!(number(&summary, "vcpu_exits") > 0 && number(&summary, "stage2_probes") > 0);
    }
}

#[test]
fn as_a_thread() {
    let summary = good(&["--seconds", "1", "--memory", "64M", "--vm", "thread"]);
    assert_eq!((summary["vm"].as_str(), summary["backing"].as_str()), (Some("thread"), Some("memfd")));
    assert!(number(&summary, "cuts") > 0);
}

#[test]
fn scattered_frames_and_the_other_policy() {
    good(&["--seconds", "1", "--memory", "64M", "--frames", "scattered"]);
    good(&["--seconds", "1", "--memory", "64M", "--policy", "shared-only"]);
}

/// The two open questions about the hardware, answered the other way.
#[test]
fn other_readings_of_the_hardware() {
    for more in [&["--borders", "rmp"][..], &["--strict"], &["--borders", "rmp", "--strict", "--ats", "1"]] {
        let summary = good(&[&["--seconds", "1", "--memory", "64M"], more].concat());
        assert_eq!(summary["strict"], more.contains(&"--strict"), "{summary:#}");
        assert_eq!(summary["borders"], if more.contains(&"rmp") { "rmp" } else { "table" }, "{summary:#}");
    }
}

/// Flushes wait for every device's answer, and each answers in time.
#[test]
fn devices_with_caches_of_their_own() {
    let summary = good(&["--seconds", "2", "--memory", "64M", "--ats", "2"]);
    let caches = summary["ats"].as_object().expect("an object");
    assert_eq!(caches.len(), 2, "{summary:#}");
    for (name, cache) in caches {
        println!("{name}: {cache}");
        assert!(number(cache, "sent") > 0 && number(cache, "answers") > 0 && number(cache, "timeouts") == 0, "{name}: {cache:#}");
        assert_eq!(cache["quarantined"], false);
    }
}

/// The run comes to its end, and says which device it was.
#[test]
fn a_device_that_never_answers_is_reported() {
    let output = lockstep(&["--seconds", "10", "--memory", "64M", "--json", "--break", "ats-never-answers", "--ats-timeout", "50"]);
    let summary = json(&output);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(summary["findings"][0]["detector"], "quarantine", "{summary:#}");
    assert!(summary["ats"].as_object().expect("an object").values().any(|cache| cache["quarantined"] == true), "{summary:#}");
    let caches = summary["findings"].as_array().expect("a list");
    assert!(caches.iter().all(|found| found["detector"] == "quarantine"), "everything else is in order: {summary:#}");
}

#[test]
fn every_planted_fault_is_found() {
    let list = lockstep(&["--break", "list"]);
    let names: Vec<&str> = std::str::from_utf8(&list.stdout).expect("names are text").lines().collect();
    assert!(list.status.success() && names.len() >= 12, "{names:?}");
    for name in names {
        for vm in ["auto", "thread"] {
            let output = lockstep(&["--seconds", "10", "--memory", "64M", "--vm", vm, "--json", "--break", name]);
            let summary = json(&output);
            assert_eq!(output.status.code(), Some(1), "{name} was not found: {summary:#}");
            let finding = &summary["findings"][0];
            println!("{name} in {}: found by {}: {}", summary["vm"], finding["detector"], finding["what"]);
            assert!(finding["span"].as_str().is_some_and(|span| span.starts_with("IOVA 0x")), "{name}: no span in {finding:#}");
            for table in ["io_page_table", "secure_world", "stage2"] {
                let said = &finding[table];
                assert!(said["says"].is_string() && said["evidence"].is_string(), "{name}: {table} says nothing in {finding:#}");
            }
        }
    }
}

#[test]
fn what_the_command_line_refuses() {
    for args in [&["--break", "nothing"][..], &["--memory", "1M"], &["--memory", "8G"], &["--policy", "none"], &["--memory", "12X"]] {
        let output = lockstep(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(!output.stderr.is_empty(), "{args:?} was refused without a word");
    }
}
