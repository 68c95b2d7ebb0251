#![allow(missing_docs)]
use lockstep_addr::*;
use std::time::Instant;
use std::collections::BTreeMap;
fn best(n:u64, mut f: impl FnMut()) -> f64 { let mut b=f64::MAX; let lim=Instant::now(); for i in 0.. { let t=Instant::now(); f(); b=b.min(t.elapsed().as_nanos() as f64/n as f64); if i>3 && lim.elapsed().as_millis()>400 {break} } b }
fn main(){
 for n in [1u64,4,16,1000,1_000_000] {
  let mut m: SpanMap<Iova,u64>=SpanMap::new();
  let mut bm=BTreeMap::new();
  let mut ks:Vec<u64>=(0..n).map(|i|i*8192).collect(); fastrand::Rng::with_seed(1).shuffle(&mut ks);
  for k in &ks { m.insert(Span::from_len(Iova::new(*k),4096).unwrap(),*k).unwrap(); bm.insert(*k,(*k+4095,*k)); }
  fastrand::Rng::with_seed(2).shuffle(&mut ks);
  let ks=&ks[..ks.len().min(20000)]; let reps=(1000/ks.len()).max(1); let c=(ks.len()*reps) as u64;
  let mut x=0;
  let bt=best(c,||for _ in 0..reps { for k in ks { x+=bm.range(..=*k+5).next_back().unwrap().1.1; } });
  let bri=best(c,||for _ in 0..reps { for k in ks { let e=bm.remove(k).unwrap(); bm.insert(*k,e);} });
  let get=best(c,||for _ in 0..reps { for k in ks { x+=m.get(Iova::new(*k+5)).unwrap().1; } });
  let ov=best(c,||for _ in 0..reps { for k in ks { x+=m.overlapping(Span::one(Iova::new(*k+5))).next().unwrap().1; } });
  let ri=best(c,||for _ in 0..reps { for k in ks { let e=m.remove(Iova::new(*k)).unwrap(); m.insert(e.0,e.1).unwrap(); } });
  let st=best(2*c,||for _ in 0..reps { for k in ks { let s=Span::from_len(Iova::new(*k+16),4).unwrap(); m.set(s,7).unwrap(); m.set(s,*k).unwrap(); } });
  println!("{n}: get {get:.1} (btree {bt:.1}) overlap {ov:.1} remove+insert {ri:.1} (btree {bri:.1}) set {st:.1} {}",x&1);
 }
}
