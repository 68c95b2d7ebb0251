//! What a flush costs with 0, 1 and 2 devices that have translation caches of their own: one page is unmapped, flushed and mapped again. Idle devices answer in the
//! thread that flushes; busy ones after the transaction at hand, from a thread of their own.
//!
//! `cargo run --release -p lockstep-iommu-device --example flush_cost`

use addr::{Iova, Lg2, SizeSet, Span};
use backing::{Backing, Frames};
use lockstep_iommu_device::{AtsDma, Config, Domain, Iommu, SystemRmp};
use pt::{Gather, Perm, Stock};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const AT: Iova = Iova::new(0x4000_0000);
const TIMES: u32 = 20_000;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("unmap, flush and map again of one 4 KiB page, median of 9 turns of {TIMES}:");
    for devices in 0..=2 {
        println!("  {devices} devices with a cache, idle:                  {:>7.0} ns", median(devices, false)?);
    }
    println!("  1 device with a cache, writing 4 KiB all the time: {:>7.0} ns", median(1, true)?);
    Ok(())
}

fn median(devices: usize, busy: bool) -> Result<f64, Box<dyn std::error::Error>> {
    let iommu = Iommu::new(&Config { ats_timeout: Duration::from_secs(10), ..Config::default() }, Arc::new(SystemRmp::new()))?;
    let (memory, domain) = (Backing::memfd(2 << 20, Frames::Contiguous)?, iommu.domain()?);
    let mut caches = Vec::new();
    for index in 0..devices {
        let device = iommu.device(&format!("ats {index}"));
        device.attach(&domain)?;
        caches.push(AtsDma::new(&device)?);
    }
    let oa = memory.window().start();
    map(&domain, Span::from_len(AT, 0x2000)?, oa)?;
    let page = Span::block(AT, 12);
    let stop = AtomicBool::new(false);
    let mut took = std::thread::scope(|scope| -> Result<Vec<f64>, Box<dyn std::error::Error>> {
        if let Some(mut cache) = caches.pop_if(|_| busy) {
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let _ = cache.write(Iova::new(AT.get() + 0x1000), &[1; 0x1000]);
                }
            });
        }
        let mut took = Vec::new();
        for _ in 0..9 {
            let began = Instant::now();
            for _ in 0..TIMES {
                let mut gather = Gather::new();
                domain.table().unmap(page, &mut gather);
                domain.flush(gather);
                map(&domain, page, oa)?;
            }
            took.push(began.elapsed().as_nanos() as f64 / f64::from(TIMES));
        }
        stop.store(true, Ordering::Relaxed);
        Ok(took)
    })?;
    took.sort_by(f64::total_cmp);
    Ok(took[took.len() / 2])
}

fn map(domain: &Domain, span: Span<Iova>, oa: addr::Oa) -> Result<(), Box<dyn std::error::Error>> {
    let (mut stock, mut gather) = (Stock::new(domain.table().arena()), Gather::new());
    domain.table().map(span, oa, Perm::RW, SizeSet::only(Lg2::K4), &mut stock, &mut gather)?;
    domain.flush(gather);
    Ok(())
}
