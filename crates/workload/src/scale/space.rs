//! One area over all of a backing: mapped, shown in a second domain, and taken out again.

use super::meter::Meter;
use super::{Axis, G1, K4, LARGE_LEAVES, SMALL_LEAVES, Study, Unit, small_leaf_tables};
use crate::{Error, in_format, timed};
use addr::{Iova, Span};
use backing::{Backing, Frames};
use ioas::{Ioas, MapAll, Place};
use iommu::{Config, Iommu, SystemRmp};
use pt::{FormatKind, Perm};
use std::sync::Arc;
use std::time::Duration;

pub(super) fn studies() -> Vec<Study> {
    let scattered = |format, size, meter: &mut Meter| whole(format, size, Frames::Scattered { seed: 1 }, meter);
    let contiguous = |format, size, meter: &mut Meter| whole(format, size, Frames::Contiguous, meter);
    vec![
        Study {
            name: "ioas_scattered",
            axis: Axis::Mapped,
            sizes: SMALL_LEAVES,
            needs: |size| 2 * small_leaf_tables(size),
            run: scattered,
        },
        Study { name: "ioas_contiguous", axis: Axis::Mapped, sizes: LARGE_LEAVES, needs: |_| 1 << 20, run: contiguous },
    ]
}

/// An address space that one domain shows, in memory for tables that nobody has touched.
pub(super) fn space(format: FormatKind) -> Result<(Arc<Iommu>, Arc<Ioas>), Error> {
    let iommu = Iommu::new(&Config { domain: in_format(format), ..Config::default() }, SystemRmp::new().into())?;
    let ioas = Ioas::new(&iommu, Arc::new(MapAll));
    ioas.attach(&iommu.domain()?)?;
    Ok((iommu, ioas))
}

fn whole(format: FormatKind, size: u64, frames: Frames, meter: &mut Meter) -> Result<(), Error> {
    let memory = Backing::simulated(size, frames)?;
    let (pages, at) = (size / K4, Iova::new(0));
    let (mut failed, mut tables, mut leaves) = (None, 0, pages);
    let (there, back) = if frames == Frames::Contiguous { (Unit::NsPerLeaf, Unit::NsPerLeaf) } else { (Unit::NsPerPage, Unit::NsPerGib) };
    let names = [("map", there), ("attach_second", there), ("detach", back), ("unmap", back)];
    // A fresh address space each time: what small sizes do twice, large ones would do once.
    meter.sample(names, || {
        let mut sample = || -> Result<_, Error> {
            let (iommu, ioas) = space(format)?;
            let (first, second) = (ioas.domains(), iommu.domain()?);
            let before = iommu.arena().tables_in_use();
            let mut done = Vec::new();
            let map = timed(|| done.push(ioas.map_file(&memory, 0, size, Place::Fixed(at), Perm::RW).map(drop)));
            tables = u64::from(iommu.arena().tables_in_use() - before) * (iommu.arena().table_bytes() + 8);
            if frames == Frames::Contiguous {
                leaves = 0;
                first.iter().for_each(|domain| domain.table().leaves(Span::whole(), |_| leaves += 1));
            }
            let attach = timed(|| done.push(ioas.attach(&second)));
            let detach = timed(|| done.push(ioas.detach(&second)));
            let unmap = timed(|| done.push(ioas.unmap(Span::from_len(at, size).unwrap_or(Span::whole())).map(drop)));
            done.into_iter().collect::<Result<(), _>>()?;
            let per_gib = |took: Duration| if back == Unit::NsPerGib { took.mul_f64(G1 as f64 / K4 as f64) } else { took };
            Ok([map, attach, per_gib(detach), per_gib(unmap)])
        };
        let took = sample().unwrap_or_else(|error| {
            failed.get_or_insert(error);
            Default::default()
        });
        (leaves, took)
    });
    meter.fact("tables", Unit::BytesPerGib, tables as f64 * G1 as f64 / size as f64);
    failed.map_or(Ok(()), Err)
}
