//! IOMMU_GET_HW_INFO: what stands in front of a device (rule 53).

use crate::ioas_ops::{FLAGS, RESERVED, check_clear};
use crate::table::{Call, Reply};
use crate::uapi::{self, HW_INFO_INPUT_TYPE};
use crate::user::write_padded;
use crate::{Answer, Context};

pub(crate) fn get(call: &Call<'_, Context>, arg: &mut uapi::HwInfo) -> Answer<Reply> {
    check_clear(u64::from(arg.flags & !HW_INFO_INPUT_TYPE), FLAGS)?;
    arg.__reserved.iter().try_for_each(|byte| check_clear(u64::from(*byte), RESERVED))?;
    let device = call.target.device(arg.dev_id)?;
    let driver = device.driver();
    let wanted = (arg.flags & HW_INFO_INPUT_TYPE != 0).then_some(arg.out_data_type);
    let info = driver.hw_info(wanted)?;
    write_padded(call.caller, arg.data_uptr, arg.data_len, &info.bytes)?;
    arg.out_data_type = info.kind;
    // The true length, so that the caller can ask again with more room.
    arg.data_len = u32::try_from(info.bytes.len()).unwrap_or(u32::MAX);
    arg.out_capabilities = driver.capabilities();
    arg.out_max_pasid_log2 = driver.pasid_bits();
    Ok(Reply::Back)
}
