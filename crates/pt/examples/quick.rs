//! quick cost look
use addr::*; use lockstep_pt::*; use std::time::Instant; use std::sync::Arc;
fn main() {
    let n = 300_000usize; 
    let v: Vec<u64> = vec![0; n*513]; // zero pages
    let words: Box<[AtomicU64]> = v.into_iter().map(AtomicU64::new).collect();
    let arena = Arena::new(words, Oa::new(1<<30), 9);
    let t: Table<AmdV1, _> = Table::new(Arc::clone(&arena)).unwrap();
    let mut st = Stock::new(&arena);
    let k4 = SizeSet::only(Lg2::K4);
    let sp = |s:u64,l:u64| Span::from_len(Iova::new(s), l).unwrap();
    let mut m = |s:u64,l:u64,o:u64,sz:SizeSet| { let mut g=Gather::new(); t.map(sp(s,l),Oa::new(o),Perm::RW,sz,&mut st,&mut g).unwrap(); g.finish(&arena,|_|{}); };
    let u = |s:u64,l:u64| { let mut g=Gather::new(); t.unmap(sp(s,l),&mut g); g.finish(&arena,|_|{}); };
    m(1<<21,1<<20,1<<40,k4); u(1<<21,1<<20);
    let bench=|name:&str,f:&mut dyn FnMut()->u64| { let mut best=f64::MAX; for _ in 0..7 { let t0=Instant::now(); let n=f(); let e=t0.elapsed().as_nanos() as f64/n as f64; if e<best{best=e} } println!("{name:30} {best:8.2} ns"); };
    m(1<<21,4096,1<<40,k4);
    for (name, len, sz) in [("4k",4096u64,k4),("256x4k",1<<20,k4),("1m contiguous",1<<20,SizeSet::ALL),("2m",1<<21,SizeSet::ALL),("1g",1<<30,SizeSet::ALL)] {
        let base = 1u64<<32;
        m(base+(4<<30),4096,1<<40,k4);
        if len < 1<<21 { m(base+4096*300,4096,1<<40,k4); } else if len < 1<<30 { m(base+(1<<29), 4096, 1<<40, k4); }
        let mut tm=std::time::Duration::ZERO; let mut tu=tm; let n=20000;
        let mut best=(f64::MAX,f64::MAX);
        for _ in 0..7 { tm=std::time::Duration::ZERO; tu=tm;
        let k = if len==4096 {64} else {1};
        for _ in 0..n { let a=Instant::now(); for i in 0..k { m(base+i*4096,len,1<<40,sz);} let b=Instant::now(); for i in 0..k {u(base+i*4096,len);} tu+=b.elapsed(); tm+=b-a; }
        best.0=f64::min(best.0,tm.as_nanos() as f64/(n*k) as f64); best.1=f64::min(best.1,tu.as_nanos() as f64/(n*k) as f64); }
        println!("map_{name:20} {:8.2} ns   unmap {:8.2} ns", best.0, best.1);
        if len < 1<<21 { u(base+4096*300,4096); } else if len < 1<<30 { u(base+(1<<29),4096);} 
        u(base+(4<<30),4096);
    }
    let base=1u64<<36;
    for i in 0..(1<<18) { m(base+i*4096,4096,(1<<40)+((i*7919)%(1<<18))*4096,k4); }
    bench("walk hot 512",&mut ||{ let mut s=0; for r in 0..2000u64 { for i in 0..512 { s^=t.walk(Iova::new(base+i*4096+r)).unwrap().oa.get(); } } std::hint::black_box(s); 2000*512});
    bench("walk random 1g",&mut ||{ let mut s=0; let mut x=1u64; for _ in 0..1_000_000 { x=x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407); s^=t.walk(Iova::new(base+((x>>40)&((1<<18)-1))*4096)).unwrap().oa.get(); } std::hint::black_box(s); 1_000_000});
    u(base,1<<30);
    for round in 0..3 {
    let a=Instant::now(); m(base,1<<30,1<<40,k4); let b=Instant::now(); u(base,1<<30); let c=Instant::now();
    println!("1g as 4k round {round}: map {:.3} ns/page, unmap {:.3} ns/page",(b-a).as_nanos() as f64/262144.0,(c-b).as_nanos() as f64/262144.0); }
    m(base,1<<30,1<<40,SizeSet::ALL);
    bench("walk 1g leaf",&mut ||{ let mut s=0; for r in 0..1_000_000u64 { s^=t.walk(Iova::new(base+r*512)).unwrap().oa.get(); } std::hint::black_box(s); 1_000_000});
    let mut st2=Stock::new(&arena);
    for _ in 0..3 { let a=Instant::now(); t.cut(sp(base+0x12345000,4096),SizeSet::ALL,&mut st2).unwrap(); let b=Instant::now();
    let mut g=Gather::new(); let k=t.merge(sp(base,1<<30),SizeSet::ALL,&mut g); g.finish(&arena,|_|{}); println!("cut {:?} merge {:?} {k}", b-a, b.elapsed()); }
}
