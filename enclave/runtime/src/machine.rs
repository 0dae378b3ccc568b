//! What the runtime needs from the machine below it: memory, entropy, kernels and threads.

use myelin_protocol::Refusal;

/// The machine that a session runs on. `gate` implements it inside the enclave, tests by a fake.
pub trait Machine {
    /// The image's description, as measured.
    fn description(&self) -> &'static [u8];

    /// Number of thread slots.
    fn slots(&self) -> usize;

    /// Number of kernels linked into the image.
    fn kernels(&self) -> usize;

    /// The whole heap, 64-byte aligned, with anything in it; handed out once.
    fn heap(&mut self) -> &'static mut [u8];

    /// Tells where the workspaces of the slots lie: `memory` is `slots × bytes` long.
    fn set_workspaces(&mut self, memory: &'static mut [u8], bytes: usize);

    /// Fills `out` from the processor's entropy source, or refuses with `randomness-failed`.
    fn entropy(&mut self, out: &mut [u8]) -> Result<(), Refusal>;

    /// Runs kernel `k` with arguments at (offset, bytes) of the arena; checks every range again.
    fn call(&mut self, k: usize, arena: &mut [u8], arguments: &[(u32, u32)])
    -> Result<(), Refusal>;

    /// Splits `out` into chunks of `chunk` items and runs `f(index, chunk)` on all thread slots.
    fn parallel_chunks<T: Send>(
        &mut self,
        out: &mut [T],
        chunk: usize,
        f: &(dyn Fn(usize, &mut [T]) + Sync),
    );

    /// Zeroes the workspaces: the session, which has handed them over, is done with them.
    fn wipe(&mut self);
}
