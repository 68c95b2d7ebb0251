//! What the kernel does not have: cut a mapping, change pages' owner, audit. Numbers from 0xe0 on, far above the kernel's.
//!
//! They follow the kernel's rules: the first word is the caller's size, unknown bits and reserved fields answer `EOPNOTSUPP`, answers are
//! written back up to the smaller of both sizes.

use super::Show;

/// Number of [`IoasCut`].
pub const NR_CUT: u32 = 0xe0;
/// Number of [`IoasConvert`].
pub const NR_CONVERT: u32 = 0xe1;
/// Number of [`IoasAudit`].
pub const NR_AUDIT: u32 = 0xe2;

/// To the guest alone.
pub const CONVERT_TO_PRIVATE: u32 = 1;
/// Back to the host.
pub const CONVERT_TO_SHARED: u32 = 2;
/// All mapped memory has been written to, so that a hole in it is a loss.
pub const AUDIT_POPULATED: u32 = 1;
const CONVERT: Show = Show::Enum(&[(1, "PRIVATE"), (2, "SHARED")]);

crate::uapi! {
    /// Cuts the area at `iova` into two at that address, so that each part can be unmapped alone. Devices see nothing of it: every
    /// translation is there at every moment. Cutting where two areas meet is fine and does nothing.
    ///
    /// `ENOENT` no such IOAS, nothing mapped there; `EINVAL` the address does not keep to the alignment of the IOAS, or software has the area
    /// pinned; `EBUSY` the area is being built or removed; `EOPNOTSUPP` flags, a reserved field, a dma-buf.
    IoasCut = lockstep_ioas_cut (24) { size: u32 = Dec, flags: u32 = Hex, ioas_id: u32 = Dec, __reserved: u32 = Reserved, iova: u64 = Hex, }
    /// Changes the owner of the pages that `length` bytes from `iova` on stand for, in every table that describes them: the secure world's, this
    /// IOAS's page tables and those of every other IOAS over the same file. No device is on a page while its owner changes.
    ///
    /// The span must lie in mapped files (memfd or guest_memfd). Private pages belong to the guest `asid`, at the guest physical
    /// addresses from `gpa` on. `out_done` is how many bytes are done, also when the call fails: then repeat with the rest.
    ///
    /// `ENOENT` no such IOAS, or a gap; `EINVAL` not whole pages, a file that has no owner to change, a page that is absent; `EEXIST` a page is private to another
    /// guest or under another address; `EBUSY` the pages are being changed; `ENOMEM` no table could be had; `EOPNOTSUPP` flags, a reserved field.
    IoasConvert = lockstep_ioas_convert (56) {
        size: u32 = Dec, flags: u32 = Hex, ioas_id: u32 = Dec, to: u32 = CONVERT, iova: u64 = Hex, length: u64 = Hex, gpa: u64 = Hex, asid: u32 = Dec, __reserved: u32 = Reserved, out_done: u64 = Hex,
    }
    /// Compares what the areas of an IOAS and the secure world's table say with what its page tables hold, by a walker that shares no code with
    /// what wrote them. `out_differences` is 0 when all agree; `out_leaves` and `out_entries` say how much was compared.
    ///
    /// With `data_uptr`, up to `data_len` bytes of text are written there, one difference a line; `data_len` becomes its true length.
    ///
    /// `ENOENT` no such IOAS; `EFAULT` the text could not be written; `EOPNOTSUPP` flags.
    IoasAudit = lockstep_ioas_audit (56) {
        size: u32 = Dec, flags: u32 = Hex, ioas_id: u32 = Dec, data_len: u32 = Dec, data_uptr: u64 = Hex,
        out_areas: u64 = Dec, out_leaves: u64 = Dec, out_entries: u64 = Dec, out_differences: u64 = Dec,
    }
}
