//! The work itself: steps of private training, and the score.

use myelin_noise::{Generator, Scale, release};
use myelin_protocol::{List, Privacy, Refusal, Score};

use crate::Machine;
use crate::input::Shard;
use crate::memory::Memory;
use crate::plan::{Buffer, Loss, Plan, Program};

/// Weights that one generator makes noise for.
const NOISE_CHUNK: usize = 16_384;
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
        self.memory.sums.fill(0.0);
        self.set_hyper(limits.threshold, number);
        for first in (0..sampled.max(1)).step_by(self.plan.batch) {
            self.gather(shards, first, sampled);
            self.run(machine, self.plan.gradient)?;
            let (sums, gradient) = self.memory.sums_and(self.plan.buffers.gradient);
            for (sum, part) in sums.iter_mut().zip(gradient) {
                // Kernels give finite sums; a coordinate that is not counts as nothing.
                *sum += if part.is_finite() { f64::from(*part) } else { 0.0 };
            }
        }
        let generator = generator.fork();
        let (sums, mean) = self.memory.sums_and(self.plan.buffers.gradient);
        let sums = &*sums;
        machine.parallel_chunks(mean, NOISE_CHUNK, &|index, mean| {
            let first = index.saturating_mul(NOISE_CHUNK);
            let sums = sums.get(first..first.saturating_add(mean.len())).unwrap_or_default();
            release(sums, mean, limits.scale, &mut generator.child(index as u64));
        });
        self.run(machine, self.plan.update)
    }

    /// Number of right predictions on the real records of `shards`. Padding is predicted too, so
    /// time does not tell how many are real.
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
                for (row, index) in rows.clone().enumerate() {
                    let from = (index < shard.capacity).then(|| shard.record(&self.plan, index));
                    self.load(row, from.flatten());
                }
                self.run(machine, self.plan.predict)?;
                let (features, outputs) = (self.plan.features, self.plan.outputs);
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
        let mut sampled = 0_u32;
        let mut number = 0_u32;
        let mut bytes = [0; DRAWS * 4];
        for shard in shards.iter() {
            for block in (0..shard.capacity).step_by(DRAWS) {
                generator.fill(&mut bytes);
                let (draws, _) = bytes.as_chunks::<4>();
                for (slot, draw) in (block..shard.capacity).zip(draws) {
                    // The number is always written and only kept by the count: no branch on data.
                    let place = self.memory.indices.get_mut(sampled as usize);
                    *place.ok_or(Refusal::LimitExceeded)? = number;
                    let taken = (u64::from(u32::from_le_bytes(*draw)) < limits.sample_rate)
                        & (slot < shard.count)
                        & (sampled < limits.max_batch);
                    sampled = sampled.saturating_add(u32::from(taken));
                    number = number.saturating_add(1);
                }
            }
        }
        zeroize::Zeroize::zeroize(&mut bytes);
        Ok(sampled as usize)
    }

    /// Fills a physical batch with the sampled records from `first` on.
    fn gather(&mut self, shards: &List<Shard>, first: usize, sampled: usize) {
        for row in 0..self.plan.batch {
            let position = first.saturating_add(row);
            let number = self.memory.indices.get(..sampled).and_then(|all| all.get(position));
            let record = number.and_then(|number| find(&self.plan, shards, *number));
            let real = record.is_some();
            self.load(row, record);
            if let Some(mask) = self.memory.floats_mut(self.plan.buffers.mask).get_mut(row) {
                *mask = f32::from(u8::from(real));
            }
        }
    }

    /// Copies a record's features and label to `row`, or zeroes the row.
    fn load(&mut self, row: usize, record: Option<core::ops::Range<usize>>) {
        let Plan { features, label, buffers, .. } = &self.plan;
        let split = |range: core::ops::Range<usize>| {
            let middle = range.start.saturating_add(*features);
            (range.start..middle, middle..range.end)
        };
        let (x, y) = record.map(split).unzip();
        self.memory.copy(x, part(buffers.x, row, *features));
        self.memory.copy(y, part(buffers.y, row, *label));
    }

    fn set_hyper(&mut self, threshold: f32, number: u32) {
        let hyper = self.memory.floats_mut(self.plan.buffers.hyper);
        hyper.fill(0.0);
        for (place, value) in hyper.iter_mut().zip([threshold, number as f32]) {
            *place = value;
        }
    }

    fn run(&mut self, machine: &mut impl Machine, program: Program) -> Result<(), Refusal> {
        let arena = self.memory.arena();
        self.plan.run(program, |kernel, arguments| machine.call(kernel, arena, arguments))
    }
}

impl Shard {
    /// Where record `index` lies in the heap's inputs.
    fn record(&self, plan: &Plan, index: u32) -> Option<core::ops::Range<usize>> {
        let start = (index as usize).checked_mul(plan.record())?.checked_add(self.start)?;
        Some(start..start.checked_add(plan.record())?)
    }
}

/// Where record `number`, counted over all shards, lies.
fn find(plan: &Plan, shards: &List<Shard>, number: u32) -> Option<core::ops::Range<usize>> {
    let mut index = number;
    for shard in shards.iter() {
        match index.checked_sub(shard.capacity) {
            None => return shard.record(plan, index),
            Some(rest) => index = rest,
        }
    }
    None
}

/// The bytes of `row` in a buffer of rows of `bytes`.
fn part(buffer: Buffer, row: usize, bytes: usize) -> core::ops::Range<usize> {
    let start = row.saturating_mul(bytes).saturating_add(buffer.offset);
    start..start.saturating_add(bytes)
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
