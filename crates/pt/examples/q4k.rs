use addr::*; use lockstep_pt::*; use std::sync::Arc;
fn main() {
    let words: Box<[AtomicU64]> = (0..20000*513).map(|_|AtomicU64::new(0)).collect();
    let arena = Arena::new(words, Oa::new(1<<30), 9);
    let t: Table<AmdV1, _> = Table::new(Arc::clone(&arena)).unwrap();
    let mut st = Stock::new(&arena);
    let k4 = SizeSet::only(Lg2::K4);
    let t0=std::time::Instant::now();
    let n=2_000_000;
    { let mut g=Gather::new(); t.map(Span::from_len(Iova::new(511<<12),4096).unwrap(),Oa::new(1<<40),Perm::RW,k4,&mut st,&mut g).unwrap(); g.finish(&arena,|_|{}); }
    let mut tm=std::time::Duration::ZERO;
    for _ in 0..n/256 { let a=std::time::Instant::now(); for i in 0..256u64 { let s=Span::from_len(Iova::new(i<<12),4096).unwrap(); let mut g=Gather::new(); t.map(s,Oa::new((1<<40)+(i<<12)),Perm::RW,k4,&mut st,&mut g).unwrap(); g.finish(&arena,|_|{}); } tm+=a.elapsed();
       for i in 0..256u64 { let s=Span::from_len(Iova::new(i<<12),4096).unwrap(); let mut g=Gather::new(); t.unmap(s,&mut g); g.finish(&arena,|_|{}); } }
    let all=t0.elapsed();
    println!("map {:.2} unmap {:.2}", tm.as_nanos() as f64/n as f64, (all-tm).as_nanos() as f64/n as f64);
}
