//! What translation and DMA cost. `cargo run --release -p lockstep-iommu-device --example dma_cost`

use addr::{Address, Iova, Lg2, SizeSet, Span};
use backing::{Backing, Frames, Words};
use lockstep_iommu_device::{Access, Config, Device, Dma, Iommu, Iotlb, SystemRmp};
use pt::{Gather, Perm, Stock};
use std::error::Error;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

type Outcome = Result<(), Box<dyn Error>>;

/// In ns per call, the best of many short rounds: one that nobody interrupted.
fn ns_per(calls: u32, mut run: impl FnMut(usize)) -> f64 {
    let rounds = (1 << 23) / calls.max(1 << 13);
    let rounds = (0..rounds.clamp(9, 400)).map(|_| {
        let start = Instant::now();
        (0..calls as usize).for_each(&mut run);
        start.elapsed().as_secs_f64() * 1e9 / f64::from(calls)
    });
    rounds.fold(f64::INFINITY, f64::min)
}

/// Random numbers that no branch predictor can learn, for a bit more than half a nanosecond each.
struct Random(u64);

impl Random {
    fn below(&mut self, count: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 32) * count) >> 32
    }
}

fn iotlb() {
    type Value = [u64; 3];
    for (what, count, stride) in [
        ("64 hot pages", 64, 1u64),
        ("10,000 pages, a run", 10_000, 1),
        ("10,000 pages, one per 2 MiB", 10_000, 512),
        ("10,000 random pages", 10_000, 0),
    ] {
        let mut random = fastrand::Rng::with_seed(count);
        let pages: Vec<Iova> =
            (0..count).map(|page| Iova::new(if stride == 0 { random.u64(0..1 << 36) << 12 } else { (page * stride) << 12 })).collect();
        let mut iotlb: Iotlb<Value> = Iotlb::new(16_384);
        pages.iter().for_each(|&page| _ = iotlb.fill(page, Lg2::K4, Perm::RW, [page.get(); 3]));
        let mut order = Random(1);
        let before = iotlb.stats();
        let ns = ns_per(1 << 15, |_| {
            let iova = pages[order.below(count) as usize];
            black_box(iotlb.lookup(iova).map(|hit| hit.value[0] + iova.offset_from(hit.start)));
        });
        let bare = ns_per(1 << 15, |_| _ = black_box(pages[order.below(count) as usize]));
        let (hits, misses) = (iotlb.stats().hits - before.hits, iotlb.stats().misses - before.misses);
        let rate = 100.0 * hits as f64 / (hits + misses) as f64;
        println!("IOTLB lookup, {what:<28} {:7.2} ns, {rate:6.2} % hits (loop of {bare:.2} ns taken off)", ns - bare);
    }
}

fn context(device: &Arc<Device>, pages: u64, base: Iova, what: &str) -> Outcome {
    let mut dma = Dma::new(device)?;
    let mut order = Random(2);
    for page in 0..pages {
        dma.translate(base.plus(page << 12), Access::Read)?;
    }
    let before = dma.stats();
    let ns = ns_per(1 << 15, |_| _ = black_box(dma.translate(base.plus(order.below(pages) << 12), Access::Read)));
    let after = dma.stats();
    let (hits, misses) = (after.iotlb.hits - before.iotlb.hits, after.iotlb.misses - before.iotlb.misses);
    println!("guard, IOTLB, secure check, {what:<14} {ns:7.2} ns, {:6.2} % hits", 100.0 * hits as f64 / (hits + misses) as f64);
    Ok(())
}

fn copies(dma: &mut Dma, base: Iova, what: &str, ring: u64) -> Outcome {
    let source = vec![5u8; 64 << 10];
    let mut plain = vec![0u8; ring as usize];
    for len in [64u64, 4096, 65_536] {
        let calls = if len == 65_536 { 1 << 9 } else { 1 << 13 };
        let at = |call: usize| (call as u64 * len) % ring;
        let ns = ns_per(calls, |call| dma.write(base.plus(at(call)), &source[..len as usize]).unwrap_or_else(|fault| panic!("{fault}")));
        let memcpy = ns_per(calls, |call| {
            let start = at(call) as usize;
            black_box(&mut plain[start..start + len as usize]).copy_from_slice(black_box(&source[..len as usize]));
        });
        println!("DMA write of {len:>6} B, {what:<12} {ns:9.1} ns, memcpy {memcpy:9.1} ns, {:5.1} % of its speed", 100.0 * memcpy / ns);
    }
    Ok(())
}

fn main() -> Outcome {
    iotlb();
    let memory = Backing::memfd(256 << 20, Frames::Contiguous)?;
    let rmp = SystemRmp::new();
    rmp.add_segment(memory.window(), Words::new(SystemRmp::words_for(memory.window()))?)?;
    let iommu = Iommu::new(&Config { iotlb_entries: 16_384, ..Config::default() }, Arc::new(rmp))?;
    let (domain, device) = (iommu.domain()?, iommu.device("bench"));
    device.attach(&domain)?;
    let (small, large) = (Iova::new(1 << 30), Iova::new(2 << 30));
    let (mut stock, mut gather) = (Stock::new(iommu.arena()), Gather::new());
    for (base, sizes) in [(small, SizeSet::only(Lg2::K4)), (large, SizeSet::ALL)] {
        let span = Span::from_len(base, 256 << 20)?;
        domain.table().map(span, memory.window().start(), Perm::RW, sizes, &mut stock, &mut gather)?;
    }
    domain.flush(gather);

    context(&device, 64, small, "64 pages")?;
    context(&device, 10_000, small, "10,000 pages")?;
    let mut dma = Dma::new(&device)?;
    let ns = ns_per(65_536, |at| _ = black_box(dma.translate(small.plus((at as u64 % 65_536) << 12), Access::Read)));
    println!("miss, walk, fill, check, 65,536 pages in turn {ns:7.2} ns");
    copies(&mut dma, large, "2 MiB ring", 2 << 20)?;
    copies(&mut dma, small, "4 KiB leaves", 2 << 20)?;
    copies(&mut dma, large, "64 KiB ring", 64 << 10)?;
    copies(&mut dma, large, "128 MiB ring", 128 << 20)?;

    let page = Span::from_len(small, 4096)?;
    let ns = ns_per(1 << 13, |_| {
        let mut gather = Gather::new();
        domain.table().unmap(page, &mut gather);
        domain.flush(gather);
        let mut gather = Gather::new();
        let _ = domain.table().map(page, memory.window().start(), Perm::RW, SizeSet::ALL, &mut stock, &mut gather);
        domain.flush(gather);
    });
    println!("unmap, flush, map of 4 KiB, nobody inside {ns:11.2} ns");
    Ok(())
}
