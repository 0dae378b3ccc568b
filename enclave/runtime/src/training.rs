//! The work itself: steps of private training, and the score.

use core::ops::Range;

use myelin_noise::{Generator, Noise, Scale};
use myelin_protocol::{List, Privacy, Refusal, Score};
use zeroize::{Zeroize, Zeroizing};

use crate::Machine;
use crate::input::Shard;
use crate::memory::{Memory, floats_mut};
use crate::plan::{Loss, Plan, Program};

/// Weights that a task sums, or makes noise for by one generator.
const CHUNK: usize = 16_384;
/// Weights whose sums a task holds at once: a multiple of what `Noise::release` draws for at once.
const BLOCK: usize = 1_024;
/// Rows of a physical batch that a task fills.
const ROWS: usize = 8;
/// Draws made at once.
const DRAWS: usize = 256;

/// What every step of a run keeps to.
pub struct Limits {
    /// A record is in a step when its draw of 32 bits is below this.
    sample_rate: u64,
    max_batch: u32,
    /// What kernels clip to.
    threshold: f32,
    scale: Scale,
}

impl Limits {
    /// The limits of `privacy`; none where they make no sense for this image.
    pub fn new(privacy: &Privacy, plan: &Plan) -> Option<Self> {
        Some(Limits {
            sample_rate: privacy.sample_rate,
            max_batch: u32::try_from(privacy.max_batch).ok()?,
            threshold: threshold(privacy, plan.additions)?,
            scale: Scale::new(
                real(privacy.noise_multiplier),
                real(privacy.max_grad_norm),
                real(privacy.expected_batch),
            )?,
        })
    }
}

/// Memory and plan together: what runs kernels.
pub struct Engine {
    /// What runs.
    pub plan: Plan,
    /// Where it runs.
    pub memory: Memory,
}

impl Engine {
    /// One step: sample, clip and sum, add noise, update. `number` counts from 1.
    pub fn step(
        &mut self,
        machine: &mut impl Machine,
        shards: &List<Shard>,
        limits: &Limits,
        number: u32,
        generator: &mut Generator,
    ) -> Result<(), Refusal> {
        let sampled = self.sample(shards, limits, generator)?;
        self.set_hyper(limits.threshold, number);
        if number == 1 {
            // What lies between the parameters is released with them.
            self.memory.bytes_mut(self.plan.buffers.gradient).fill(0);
            self.memory.bytes_mut(self.plan.buffers.state).fill(0);
        }
        let mut firsts = (0..sampled.max(1)).step_by(self.plan.batch).peekable();
        let mut summed = false;
        while let Some(first) = firsts.next() {
            self.gather(machine, shards, first, sampled);
            self.run(machine, self.plan.gradient)?;
            if firsts.peek().is_some() {
                self.sum(machine, summed);
                summed = true;
            }
        }
        self.release(machine, summed, limits.scale, &generator.fork());
        self.run(machine, self.plan.update)
    }

    /// Number of right predictions on the real records of `shards`, which the receipt tells with it.
    pub fn score(
        &mut self,
        machine: &mut impl Machine,
        shards: &List<Shard>,
    ) -> Result<Score, Refusal> {
        let mut score = Score { total: 0, correct: 0 };
        for shard in shards.iter() {
            score.total = score.total.saturating_add(u64::from(shard.count));
            for first in (0..shard.capacity).step_by(self.plan.batch) {
                let rows = first..first.saturating_add(self.plan.batch as u32);
                let Memory { arena, inputs, .. } = &mut self.memory;
                load(machine, &self.plan, arena, inputs, &|row| {
                    let index = first.checked_add(u32::try_from(row).ok()?)?;
                    shard.record(&self.plan, index).filter(|_| index < shard.capacity)
                });
                self.run(machine, self.plan.predict)?;
                let (features, outputs) = (self.plan.feature_bytes(), self.plan.outputs);
                let logits = self.memory.floats(self.plan.buffers.output).chunks_exact(outputs);
                for (index, logits) in rows.zip(logits).filter(|(index, _)| *index < shard.count) {
                    let record = shard.record(&self.plan, index).unwrap_or_default();
                    let label = self.memory.input(record).get(features..).unwrap_or_default();
                    let right = is_right(self.plan.loss, logits, label);
                    score.correct = score.correct.saturating_add(u64::from(right));
                }
            }
        }
        Ok(score)
    }

    /// Draws for every record slot; gives how many are in the step, their numbers in `indices`.
    fn sample(
        &mut self,
        shards: &List<Shard>,
        limits: &Limits,
        generator: &mut Generator,
    ) -> Result<usize, Refusal> {
        let mut sampled = 0_usize;
        let mut number = 0_u32;
        let mut bytes = [0; DRAWS * 4];
        for shard in shards.iter() {
            for block in (0..shard.capacity).step_by(DRAWS) {
                generator.fill(&mut bytes);
                let (draws, _) = bytes.as_chunks::<4>();
                for (slot, draw) in (block..shard.capacity).zip(draws) {
                    // The number is always written and only kept by the count: no branch on data.
                    let place = self.memory.indices.get_mut(sampled);
                    *place.ok_or(Refusal::LimitExceeded)? = number;
                    let drawn = u64::from(u32::from_le_bytes(*draw)) < limits.sample_rate;
                    sampled = sampled.wrapping_add(usize::from(drawn & (slot < shard.count)));
                    number = number.wrapping_add(1);
                }
            }
        }
        bytes.zeroize();
        // Here, so that a draw waits for one addition of the last and no more.
        Ok(sampled.min(limits.max_batch as usize))
    }

    /// Fills a physical batch with the sampled records from `first` on.
    fn gather(
        &mut self,
        machine: &mut impl Machine,
        shards: &List<Shard>,
        first: usize,
        sampled: usize,
    ) {
        let Memory { arena, indices, inputs, .. } = &mut self.memory;
        let numbers = indices.get(first..sampled).unwrap_or_default();
        load(machine, &self.plan, arena, inputs, &|row| {
            find(&self.plan, shards, *numbers.get(row)?)
        });
    }

    /// Writes the gradient of a physical batch to the sums, or adds it if they hold any (`summed`).
    fn sum(&mut self, machine: &mut impl Machine, summed: bool) {
        let Memory { arena, sums, .. } = &mut self.memory;
        let gradient = &*floats_mut(arena, self.plan.buffers.gradient);
        machine.parallel_chunks(sums, CHUNK, &|index, sums| {
            let parts = gradient.get(index.saturating_mul(CHUNK)..).unwrap_or_default();
            for (sum, part) in sums.iter_mut().zip(parts) {
                *sum = counted(*part) + if summed { *sum } else { 0.0 };
            }
        });
    }

    /// Turns the gradient of the last physical batch into the noisy mean of the step.
    fn release(
        &mut self,
        machine: &mut impl Machine,
        summed: bool,
        scale: Scale,
        generator: &Generator,
    ) {
        let Memory { arena, sums, .. } = &mut self.memory;
        let sums = if summed { &**sums } else { &[] };
        let gradient = floats_mut(arena, self.plan.buffers.gradient);
        machine.parallel_chunks(gradient, CHUNK, &|index, gradient| {
            let mut noise = Noise::new(generator.child(index as u64));
            let mut totals = Zeroizing::new([0.0; BLOCK]);
            let firsts = (index.saturating_mul(CHUNK)..).step_by(BLOCK);
            for (first, part) in firsts.zip(gradient.chunks_mut(BLOCK)) {
                let (totals, _) = totals.split_at_mut(part.len());
                for (total, last) in totals.iter_mut().zip(&*part) {
                    *total = counted(*last);
                }
                let earlier = sums.get(first..).unwrap_or_default();
                for (total, earlier) in totals.iter_mut().zip(earlier) {
                    *total += *earlier;
                }
                noise.release(totals, part, scale);
            }
        });
    }

    fn set_hyper(&mut self, threshold: f32, number: u32) {
        let hyper = floats_mut(self.memory.arena, self.plan.buffers.hyper);
        hyper.fill(0.0);
        for (place, value) in hyper.iter_mut().zip([threshold, number as f32]) {
            *place = value;
        }
    }

    fn run(&mut self, machine: &mut impl Machine, program: Program) -> Result<(), Refusal> {
        let arena = &mut *self.memory.arena;
        self.plan.run(program, |kernel, arguments| machine.call(kernel, arena, arguments))
    }
}

impl Shard {
    /// Where record `index` lies in the heap's inputs.
    fn record(&self, plan: &Plan, index: u32) -> Option<Range<usize>> {
        let start = (index as usize).checked_mul(plan.record())?.checked_add(self.start)?;
        Some(start..start.checked_add(plan.record())?)
    }
}

/// Where record `number`, counted over all shards, lies.
fn find(plan: &Plan, shards: &List<Shard>, number: u32) -> Option<Range<usize>> {
    let mut index = number;
    for shard in shards.iter() {
        match index.checked_sub(shard.capacity) {
            None => return shard.record(plan, index),
            Some(rest) => index = rest,
        }
    }
    None
}

/// Fills the rows of a physical batch: `record` says where a row's record lies in the inputs. Rows
/// without one are zero.
fn load(
    machine: &mut impl Machine,
    plan: &Plan,
    arena: &mut [u8],
    inputs: &[u8],
    record: &(dyn Fn(usize) -> Option<Range<usize>> + Sync),
) {
    let found = |row| inputs.get(record(row)?)?.split_at_checked(plan.feature_bytes());
    let x = floats_mut(arena, plan.buffers.x);
    machine.parallel_chunks(x, plan.width.saturating_mul(ROWS), &|index, rows| {
        let first = index.saturating_mul(ROWS);
        for (row, x) in (first..).zip(rows.chunks_exact_mut(plan.width)) {
            match found(row) {
                Some((features, _)) => plan.features.convert(features, x),
                None => x.fill(0.0),
            }
        }
    });
    let y = arena.get_mut(plan.buffers.y.range()).unwrap_or_default();
    for (row, y) in y.chunks_exact_mut(plan.label).enumerate() {
        match found(row) {
            Some((_, label)) if label.len() == y.len() => y.copy_from_slice(label),
            _ => y.fill(0),
        }
    }
    for (row, mask) in floats_mut(arena, plan.buffers.mask).iter_mut().enumerate() {
        *mask = f32::from(u8::from(record(row).is_some()));
    }
}

/// What a coordinate of a clipped sum counts: kernels give finite ones, any other counts as nothing.
fn counted(part: f32) -> f64 {
    if part.is_finite() { f64::from(part) } else { 0.0 }
}

/// Whether a prediction is the label.
fn is_right(loss: Loss, logits: &[f32], label: &[u8]) -> bool {
    let (words, _) = label.as_chunks::<4>();
    match loss {
        Loss::CrossEntropy => {
            let start = (0, f32::NEG_INFINITY);
            let best = logits.iter().zip(0_u32..).fold(start, |best, (logit, class)| {
                if *logit > best.1 { (class, *logit) } else { best }
            });
            words.first().is_some_and(|word| u32::from_le_bytes(*word) == best.0)
        }
        Loss::BinaryCrossEntropy => logits
            .iter()
            .zip(words)
            .all(|(logit, word)| (*logit > 0.0) == (f32::from_le_bytes(*word) > 0.5)),
        Loss::MeanSquaredError => false,
    }
}

/// hyper[0] = max_grad_norm · (1 − 2 · additions · 2⁻²⁴ · max_batch), rounded down to float32; none
/// unless positive.
fn threshold(privacy: &Privacy, additions: u64) -> Option<f32> {
    let rounding = 2.0 * additions as f64 * privacy.max_batch as f64 / f64::from(1 << 24);
    let exact = real(privacy.max_grad_norm) * (1.0 - rounding);
    let nearest = exact as f32;
    let below = if f64::from(nearest) > exact { nearest.next_down() } else { nearest };
    (below >= f32::MIN_POSITIVE).then_some(below)
}

/// The real number of a fixed-point integer in millionths.
fn real(micro: u64) -> f64 {
    micro as f64 / 1e6
}
