//! `lockstep soak` does what it says, its totals are those of what happened, and it fails when something is found.

use serde_json::Value;
use std::process::Command;

fn soak(arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_lockstep")).arg("soak").args(arguments).output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
}

#[test]
fn a_short_one_is_clean_and_does_all_of_it() {
    let (status, output) = soak(&["--seconds", "5", "--seed", "11", "--json"]);
    assert_eq!(status, Some(0), "{output}");
    let totals: Value = serde_json::from_str(&output).unwrap();
    let fields = "conversions batches cuts merges punches bytes_moved dma_checks untrusted_refused guest_requests audits transitions slots_added \
                  slots_moved full_batches maps unmaps devices injected_failures";
    for field in fields.split_whitespace() {
        assert!(totals[field].as_u64().unwrap() > 0, "{field} did not happen: {output}");
    }
    assert_eq!((totals["differences"].as_u64(), totals["seed"].as_u64()), (Some(0), Some(11)));
}
