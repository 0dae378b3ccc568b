//! The heap, cut into the parts that docs/image.md names.

use core::mem::take;
use core::ops::Range;

use bytemuck::{pod_align_to_mut, try_cast_slice_mut};
use myelin_protocol::{Job, List, Refusal, Slot};
use zeroize::Zeroize;

use crate::Machine;
use crate::plan::{ALIGNMENT, Buffer, Plan};

/// Bytes of the header of an input's plaintext.
pub const RECORD_HEADER: usize = 64;

/// The parts of the heap that the session works in. Anything may stand in them at first: all is
/// written before it is read (a test fills the heap with ones), and a launch touches none of it.
pub struct Memory {
    /// Where kernels work.
    pub arena: &'static mut [u8],
    /// Clipped sums of the physical batches of a step but the last, one a weight.
    pub sums: &'static mut [f64],
    /// Numbers of the records of a step.
    pub indices: &'static mut [u32],
    /// Plaintext of the inputs.
    pub inputs: &'static mut [u8],
}

impl Memory {
    /// Takes the machine's heap, cuts it, and hands the workspaces back.
    pub fn new(machine: &mut impl Machine, plan: &Plan) -> Result<Self, Refusal> {
        let mut rest = machine.heap();
        let arena = cut(&mut rest, Some(plan.arena))?;
        let sums = cut(&mut rest, plan.dimension().checked_mul(8))?;
        let workspaces = cut(&mut rest, plan.workspace.checked_mul(plan.threads))?;
        let indices = cut(&mut rest, plan.records.checked_mul(4))?;
        machine.set_workspaces(workspaces, plan.workspace);
        Ok(Memory {
            arena,
            sums: try_cast_slice_mut(sums).map_err(|_| Refusal::FieldWrong)?,
            indices: try_cast_slice_mut(indices).map_err(|_| Refusal::FieldWrong)?,
            inputs: rest,
        })
    }

    /// Where each input of `job` lies; `capacity-wrong` if the image has no room for them.
    pub fn place(&self, job: &Job, plan: &Plan) -> Result<List<Range<usize>>, Refusal> {
        let enough = |slot, most| {
            job.capacity(slot).and_then(|n| usize::try_from(n).ok()).is_some_and(|n| n <= most)
        };
        if !enough(Slot::Records, plan.records) || !enough(Slot::Test, plan.tests) {
            return Err(Refusal::CapacityWrong);
        }
        let mut places = List::default();
        let mut start = 0_usize;
        for send in job.sends.iter() {
            let end = usize::try_from(send.capacity)
                .ok()
                .and_then(|capacity| capacity.checked_mul(plan.record()))
                .and_then(|bytes| bytes.checked_add(RECORD_HEADER))
                .and_then(|bytes| bytes.checked_add(start))
                .filter(|end| *end <= self.inputs.len())
                .ok_or(Refusal::CapacityWrong)?;
            places.push(start..end)?;
            start = end.next_multiple_of(ALIGNMENT);
        }
        Ok(places)
    }

    /// Part of an input's plaintext.
    pub fn input(&self, range: Range<usize>) -> &[u8] {
        self.inputs.get(range).unwrap_or_default()
    }

    /// Part of an input's plaintext, to change.
    pub fn input_mut(&mut self, range: Range<usize>) -> &mut [u8] {
        self.inputs.get_mut(range).unwrap_or_default()
    }

    /// The bytes of a buffer.
    pub fn bytes(&self, buffer: Buffer) -> &[u8] {
        self.arena.get(buffer.range()).unwrap_or_default()
    }

    /// The bytes of a buffer, to change.
    pub fn bytes_mut(&mut self, buffer: Buffer) -> &mut [u8] {
        self.arena.get_mut(buffer.range()).unwrap_or_default()
    }

    /// A buffer as floats.
    pub fn floats(&self, buffer: Buffer) -> &[f32] {
        bytemuck::try_cast_slice(self.bytes(buffer)).unwrap_or_default()
    }

    /// Zeroes everything but the buffer `kept`.
    pub fn wipe(&mut self, kept: Option<Buffer>) {
        let kept = kept.map_or(0..0, Buffer::range);
        let (before, rest) = self.arena.split_at_mut(kept.start.min(self.arena.len()));
        zero(before);
        zero(rest.get_mut(kept.len()..).unwrap_or_default());
        self.sums.zeroize();
        self.indices.zeroize();
        zero(self.inputs);
    }
}

/// A buffer of the arena as floats, to change.
pub fn floats_mut(arena: &mut [u8], buffer: Buffer) -> &mut [f32] {
    let bytes = arena.get_mut(buffer.range()).unwrap_or_default();
    try_cast_slice_mut(bytes).unwrap_or_default()
}

/// Zeroes bytes by writes that the compiler must keep.
pub fn zero(bytes: &mut [u8]) {
    let (first, words, last) = pod_align_to_mut::<u8, u64>(bytes);
    first.zeroize();
    words.zeroize();
    last.zeroize();
}

/// Cuts `bytes` off the front of `rest`, and what is left to the next multiple of the alignment.
fn cut(rest: &mut &'static mut [u8], bytes: Option<usize>) -> Result<&'static mut [u8], Refusal> {
    let bytes = bytes.ok_or(Refusal::FieldWrong)?;
    let whole = bytes.checked_next_multiple_of(ALIGNMENT).ok_or(Refusal::FieldWrong)?;
    let (part, others) = take(rest).split_at_mut_checked(whole).ok_or(Refusal::FieldWrong)?;
    *rest = others;
    part.get_mut(..bytes).ok_or(Refusal::FieldWrong)
}
