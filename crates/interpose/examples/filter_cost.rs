//! What the filter adds to calls that are none of ours: each measured with and without it, in turn, in one run.
//!
//! `cargo run --release -p lockstep-interpose --example filter_cost`

use lockstep_interpose::{Namespace, Options, Program, Silent, run};
use rustix::fs::{Mode, OFlags};
use std::hint::black_box;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

/// Short batches, and the best of very many: some of them meet no interrupt.
const BATCH: u32 = 200;
const REPEATS: usize = 1000;

fn main() {
    if let Some(into) = std::env::args().nth(1) {
        let lines: Vec<String> = measure().into_iter().map(|(_, cost)| cost.to_string()).collect();
        std::fs::write(into, lines.join("\n")).expect("a place for the result");
        return;
    }
    let into = std::env::temp_dir().join(format!("filter-cost-{}", std::process::id()));
    let own = std::env::current_exe().expect("our own path");
    let program = Program { name: own.into(), arguments: vec![into.clone().into()] };
    // Alternating, so that a busy machine disturbs both alike; the best of each counts.
    let mut best: Vec<(&str, f64, f64)> = Vec::new();
    for _ in 0..10 {
        let without = measure();
        if let Err(error) = run(&program, Namespace::new(), &Options::default(), Arc::new(Silent)) {
            println!("skipped: {error}");
            return;
        }
        let text = std::fs::read_to_string(&into).expect("the result");
        let with: Vec<f64> = text.lines().map(|line| line.parse().expect("a number")).collect();
        best.resize(without.len(), ("", f64::MAX, f64::MAX));
        for (best, ((name, without), with)) in best.iter_mut().zip(without.into_iter().zip(with)) {
            *best = (name, best.1.min(without), best.2.min(with));
        }
    }
    let _ = std::fs::remove_file(&into);
    println!("{:24}{:>10}{:>10}{:>10}   nanoseconds a call", "", "without", "with", "more");
    for (name, without, with) in best {
        println!("{name:24}{without:10.1}{with:10.1}{:10.1}", with - without);
    }
}

fn measure() -> Vec<(&'static str, f64)> {
    let zero = rustix::fs::open("/dev/zero", OFlags::RDWR, Mode::empty()).expect("/dev/zero");
    let time = |mut call: Box<dyn FnMut() + '_>| {
        let mut best = f64::MAX;
        for _ in 0..REPEATS {
            let start = Instant::now();
            (0..BATCH).for_each(|_| call());
            best = best.min(start.elapsed().as_nanos() as f64 / f64::from(BATCH));
        }
        best
    };
    vec![
        ("getppid (not listed)", time(Box::new(|| _ = black_box(rustix::process::getppid())))),
        ("read", time(Box::new(|| _ = black_box(rustix::io::read(&zero, &mut [0u8; 1]))))),
        ("write", time(Box::new(|| _ = black_box(rustix::io::write(&zero, &[0u8; 1]))))),
        ("ioctl of another type", time(Box::new(|| _ = black_box(rustix::io::ioctl_fionbio(&zero, false))))),
        ("fcntl", time(Box::new(|| _ = black_box(rustix::io::fcntl_getfd(zero.as_fd()))))),
    ]
}
