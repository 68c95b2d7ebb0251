//! IOMMU_HWPT_INVALIDATE: what an IOMMU has cached of a user's page table, or of a guest (rule 54).

use crate::hwpt::Hwpt;
use crate::ioas_ops::{RESERVED, check_clear};
use crate::table::{Call, Reply};
use crate::uapi;
use crate::user::Entries;
use crate::viommu::ViommuObject;
use crate::{Answer, Context, Refusal};
use addr::PAGE_BYTES;
use rustix::io::Errno;
use std::any::Any;
use std::sync::Arc;

/// The most entries of one call.
const MOST_ENTRIES: u32 = 1 << 19;

pub(crate) fn invalidate(call: &Call<'_, Context>, arg: &mut uapi::HwptInvalidate) -> Answer<Reply> {
    let mut done = 0;
    let answer = carry_out(call, arg, &mut done);
    // How many were carried out is said in any case.
    arg.entry_num = done;
    answer.map(|()| Reply::Back).map_err(Refusal::and_write_back)
}

fn carry_out(call: &Call<'_, Context>, arg: &uapi::HwptInvalidate, done: &mut u32) -> Answer {
    check_clear(arg.__reserved.into(), RESERVED)?;
    let bad_len = arg.entry_len == 0 || u64::from(arg.entry_len) > PAGE_BYTES;
    if arg.entry_num != 0 && (arg.data_uptr == 0 || bad_len || arg.entry_num > MOST_ENTRIES) {
        let text = format!("an array is not at 0, its entries have 1 to {PAGE_BYTES} bytes, and there are at most {MOST_ENTRIES}");
        return Err(Refusal::new(Errno::INVAL, text));
    }
    let object: Arc<dyn Any + Send + Sync> = call.target.any(arg.hwpt_id)?;
    let entries = Entries::new(call.caller, arg.data_type, arg.entry_len, arg.entry_num, arg.data_uptr);
    if let Some(viommu) = object.downcast_ref::<ViommuObject>() {
        return viommu.own().invalidate(viommu, &entries, done);
    }
    match object.downcast_ref::<Hwpt>().and_then(Hwpt::nested) {
        Some(nested) => nested.invalidate(&entries, done),
        None => Err(Refusal::new(Errno::INVAL, format!("object {} is neither a user's page table nor a virtual IOMMU", arg.hwpt_id))),
    }
}
