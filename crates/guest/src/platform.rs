//! What a host does for the guest, whether it runs in a VM or in a thread.

use addr::Gpa;

/// The host's side of registers and hypercalls. All of it is asked for by the guest: untrusted input.
pub trait Platform {
    /// The guest reads a register of `len_bytes` (8 by this guest; 1 to 8 by any) at `gpa`. Nobody home: all ones.
    fn mmio_read(&mut self, gpa: Gpa, len_bytes: u8) -> u64;
    /// The guest writes a register.
    fn mmio_write(&mut self, gpa: Gpa, len_bytes: u8, value: u64);
    /// The guest makes a hypercall; the answer goes to rax. KVM's own answer to a number it does not know is -1000.
    fn hypercall(&mut self, nr: u64, args: [u64; 3]) -> u64;
}
