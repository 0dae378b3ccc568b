//! The image's description, checked once, as a plan that can be run.
//!
//! Programs stay in their encoding and are decoded again call by call as they run: that takes a
//! fraction of a microsecond a call and no tables.

use myelin_protocol::Refusal;
use myelin_protocol::cbor::Reader;

use crate::Machine;
use crate::features::Features;

/// The most kernels of an image.
const KERNELS: usize = 1_024;
/// The most calls of a program.
const CALLS: usize = 65_536;
/// The most arguments of a kernel.
const ARGUMENTS: usize = 14;
/// Alignment of everything in arena and heap.
pub const ALIGNMENT: usize = 64;

/// What the runtime knows of its image; sizes in bytes.
pub struct Plan {
    pub arena: usize,
    /// Examples of a physical batch.
    pub batch: usize,
    pub loss: Loss,
    /// How a record keeps its features, and how many they are.
    pub features: Features,
    pub width: usize,
    /// Bytes of a record's label.
    pub label: usize,
    /// Kernel workspace of each thread slot.
    pub workspace: usize,
    pub threads: usize,
    /// Numbers of a prediction.
    pub outputs: usize,
    /// Longest chain of float32 additions over the examples of one physical batch.
    pub additions: u64,
    /// Records of all `records` inputs.
    pub records: usize,
    /// Records of all `test` inputs.
    pub tests: usize,
    pub buffers: Buffers,
    pub gradient: Program,
    pub predict: Program,
    pub update: Program,
    kernels: Kernels,
}

/// What an example's prediction is compared by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    CrossEntropy,
    BinaryCrossEntropy,
    MeanSquaredError,
}

/// Bytes of the arena.
#[derive(Clone, Copy)]
pub struct Buffer {
    pub offset: usize,
    pub bytes: usize,
}

/// The buffers that the runtime reads or writes itself.
pub struct Buffers {
    pub x: Buffer,
    pub y: Buffer,
    pub mask: Buffer,
    pub hyper: Buffer,
    pub state: Buffer,
    pub output: Buffer,
    pub weights: Buffer,
    pub gradient: Buffer,
}

/// A list of calls, encoded.
#[derive(Clone, Copy)]
pub struct Program(&'static [u8]);

impl Plan {
    /// Reads the description and checks everything that docs/image.md asks of it.
    pub fn read(machine: &impl Machine) -> Result<Self, Refusal> {
        let plan = Reader::document(machine.description(), read)?;
        for program in [plan.update, plan.predict, plan.gradient] {
            plan.run(program, |_, _| Ok(()))?;
        }
        let fits = plan.buffers_fit()?
            && plan.kernels.count == machine.kernels()
            && plan.threads == machine.slots()
            && plan.batch > 0
            && plan.width > 0;
        if fits { Ok(plan) } else { Err(Refusal::FieldWrong) }
    }

    /// Bytes of a record.
    pub fn record(&self) -> usize {
        self.feature_bytes().saturating_add(self.label)
    }

    /// Bytes of a record's features, which come before its label.
    pub fn feature_bytes(&self) -> usize {
        self.width.saturating_mul(self.features.bytes())
    }

    /// Number of weights, padding between parameters included.
    pub fn dimension(&self) -> usize {
        self.buffers.weights.bytes / 4
    }

    /// Gives every call of `program` to `call`: the kernel, and (offset, bytes) of its arguments,
    /// which lie in the arena. Stops at the first refusal.
    pub fn run(
        &self,
        program: Program,
        mut call: impl FnMut(usize, &[(u32, u32)]) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        Reader::document(program.0, |reader| {
            for _ in 0..reader.list(CALLS)? {
                let count = reader.list(ARGUMENTS.saturating_add(1))?;
                let kernel = size(reader)?;
                let mut sizes = self.kernels.sizes(kernel)?;
                let mut arguments = [(0, 0); ARGUMENTS];
                let arguments = arguments
                    .get_mut(..sizes.list(ARGUMENTS)?)
                    .filter(|arguments| arguments.len().checked_add(1) == Some(count))
                    .ok_or(Refusal::FieldWrong)?;
                for place in arguments.iter_mut() {
                    *place = (reader.unsigned32()?, sizes.unsigned32()?);
                    let (offset, bytes) = (place.0 as usize, place.1 as usize);
                    Buffer { offset, bytes }.check(self.arena)?;
                }
                call(kernel, arguments)?;
            }
            Ok(())
        })
    }

    /// Whether the buffers lie apart and have the sizes that the rest of the description implies.
    fn buffers_fit(&self) -> Result<bool, Refusal> {
        let Buffers { x, y, mask, hyper, state, output, weights, gradient } = &self.buffers;
        let all = [x, y, mask, hyper, state, output, weights, gradient];
        let apart = |a: &Buffer, b: &Buffer| a.range().end <= b.offset || b.range().end <= a.offset;
        let disjoint = (0..).zip(all).all(|(i, a)| all.iter().take(i).all(|b| apart(a, b)));
        let rows = |bytes: usize| self.batch.checked_mul(bytes).ok_or(Refusal::FieldWrong);
        let logits = self.outputs.checked_mul(4).ok_or(Refusal::FieldWrong)?;
        let label = if self.loss == Loss::CrossEntropy { 4 } else { logits };
        Ok(disjoint
            && self.outputs > 0
            && self.label == label
            && x.bytes == rows(self.width.checked_mul(4).ok_or(Refusal::FieldWrong)?)?
            && y.bytes == rows(self.label)?
            && mask.bytes == rows(4)?
            && hyper.bytes == 64
            && output.bytes == rows(logits)?
            && weights.bytes > 0
            && weights.bytes.is_multiple_of(4)
            && weights.bytes == gradient.bytes)
    }
}

impl Buffer {
    /// Its bytes in the arena.
    pub fn range(self) -> core::ops::Range<usize> {
        self.offset..self.offset.saturating_add(self.bytes)
    }

    fn read(reader: &mut Reader<'_>, arena: usize) -> Result<Self, Refusal> {
        if reader.list(2)? != 2 {
            return Err(Refusal::FieldWrong);
        }
        let buffer = Buffer { offset: size(reader)?, bytes: size(reader)? };
        buffer.check(arena)?;
        Ok(buffer)
    }

    fn check(self, arena: usize) -> Result<(), Refusal> {
        let inside = self.offset.checked_add(self.bytes).is_some_and(|end| end <= arena);
        if inside && self.offset.is_multiple_of(ALIGNMENT) {
            Ok(())
        } else {
            Err(Refusal::FieldWrong)
        }
    }
}

/// Where each kernel's argument sizes lie in the description.
struct Kernels {
    bytes: &'static [u8],
    starts: [u32; KERNELS],
    count: usize,
}

impl Kernels {
    fn read(bytes: &'static [u8]) -> Result<Self, Refusal> {
        let mut kernels = Kernels { bytes, starts: [0; KERNELS], count: 0 };
        Reader::document(bytes, |reader| {
            kernels.count = reader.list(KERNELS)?;
            for start in kernels.starts.iter_mut().take(kernels.count) {
                reader.map(2)?;
                let position = reader.key("args")?.position();
                *start = u32::try_from(position).map_err(|_| Refusal::LimitExceeded)?;
                reader.skip()?;
                reader.key("name")?.text()?;
            }
            Ok(())
        })?;
        Ok(kernels)
    }

    /// A reader of the argument sizes of kernel `k`.
    fn sizes(&self, k: usize) -> Result<Reader<'static>, Refusal> {
        let start = self.starts.get(..self.count).and_then(|starts| starts.get(k));
        let start = start.ok_or(Refusal::FieldWrong)?;
        let rest = self.bytes.get(*start as usize..).ok_or(Refusal::FieldWrong)?;
        Ok(Reader::new(rest))
    }
}

/// Reads the description's map.
fn read(reader: &mut Reader<'static>) -> Result<Plan, Refusal> {
    reader.map(23)?;
    reader.key("cpu")?.skip()?;
    size(reader.key("heap")?)?;
    let loss = loss(reader.key("loss")?)?;
    reader.key("task")?.kind("train")?;
    reader.key("type")?.kind("myelin/image/1")?;
    let arena = size(reader.key("arena")?)?;
    let batch = size(reader.key("batch")?)?;
    reader.key("model")?.fixed::<32>()?;
    reader.key("record")?.map(5)?;
    let features = Features::read(reader)?;
    let label = size(reader.key("label")?)?;
    let bytes = size(reader.key("features")?)?;
    let width = bytes.checked_div(features.bytes()).ok_or(Refusal::FieldWrong)?;
    if !bytes.is_multiple_of(features.bytes()) {
        return Err(Refusal::FieldWrong);
    }
    let update = Program(reader.key("update")?.skip()?);
    let buffers = buffers(reader.key("buffers")?, arena)?;
    let kernels = Kernels::read(reader.key("kernels")?.skip()?)?;
    let outputs = size(reader.key("outputs")?)?;
    let predict = Program(reader.key("predict")?.skip()?);
    let threads = size(reader.key("threads")?)?;
    reader.key("capacity")?.map(2)?;
    let tests = size(reader.key("test")?)?;
    let records = size(reader.key("records")?)?;
    reader.key("clipping")?.skip()?;
    let gradient = Program(reader.key("gradient")?.skip()?);
    reader.key("versions")?.skip()?;
    let additions = reader.key("additions")?.unsigned()?;
    reader.key("optimizer")?.skip()?;
    let workspace = size(reader.key("workspace")?)?;
    reader.key("parameters")?.skip()?;
    Ok(Plan {
        arena,
        batch,
        loss,
        features,
        width,
        label,
        workspace,
        threads,
        outputs,
        additions,
        records,
        tests,
        buffers,
        gradient,
        predict,
        update,
        kernels,
    })
}

fn loss(reader: &mut Reader<'_>) -> Result<Loss, Refusal> {
    match reader.text()? {
        "cross-entropy" => Ok(Loss::CrossEntropy),
        "binary-cross-entropy" => Ok(Loss::BinaryCrossEntropy),
        "mean-squared-error" => Ok(Loss::MeanSquaredError),
        _ => Err(Refusal::FieldWrong),
    }
}

fn buffers(reader: &mut Reader<'_>, arena: usize) -> Result<Buffers, Refusal> {
    reader.map(8)?;
    let mut buffer = |name| Buffer::read(reader.key(name)?, arena);
    let (x, y, mask, hyper) = (buffer("x")?, buffer("y")?, buffer("mask")?, buffer("hyper")?);
    let (state, output) = (buffer("state")?, buffer("output")?);
    let (weights, gradient) = (buffer("weights")?, buffer("gradient")?);
    Ok(Buffers { x, y, mask, hyper, state, output, weights, gradient })
}

/// A size in bytes or a number of things: 32 bits, as arenas stay below 4 GiB.
fn size(reader: &mut Reader<'_>) -> Result<usize, Refusal> {
    Ok(reader.unsigned32()? as usize)
}
