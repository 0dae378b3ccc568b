//! The image's description, read and checked once, as a plan that can be run.

use myelin_protocol::Refusal;
use myelin_protocol::cbor::Reader;

use crate::Machine;

/// The most kernels of an image.
const KERNELS: usize = 1_024;
/// The most calls of the three programs together.
const CALLS: usize = 1_024;
/// The most arguments of one kernel.
const ARGUMENTS: usize = 14;
/// The most arguments of all calls together.
const ARGUMENTS_IN_ALL: usize = 4_096;
/// Alignment of everything in arena and heap.
pub const ALIGNMENT: usize = 64;

/// What the runtime knows of its image; sizes in bytes.
pub struct Plan {
    pub arena: usize,
    /// Examples of a physical batch.
    pub batch: usize,
    pub loss: Loss,
    /// Bytes of a record's features.
    pub features: usize,
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
    calls: [Call; CALLS],
    arguments: [(u32, u32); ARGUMENTS_IN_ALL],
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

/// The buffers that the runtime reads and writes itself.
pub struct Buffers {
    pub x: Buffer,
    pub y: Buffer,
    pub mask: Buffer,
    pub hyper: Buffer,
    pub output: Buffer,
    pub weights: Buffer,
    pub gradient: Buffer,
}

/// A range of calls.
#[derive(Clone, Copy)]
pub struct Program {
    first: usize,
    last: usize,
}

/// Kernel `kernel` with `count` arguments from `first`.
#[derive(Clone, Copy)]
struct Call {
    kernel: u16,
    first: u16,
    count: u16,
}

impl Plan {
    /// Reads the description and checks everything that docs/image.md asks of it.
    pub fn read(machine: &impl Machine) -> Result<Self, Refusal> {
        let description = machine.description();
        let (mut plan, raw) = Reader::document(description, read)?;
        let kernels = Kernels::read(raw.kernels)?;
        let mut end = Ends { calls: 0, arguments: 0 };
        plan.update = plan.program(raw.update, &kernels, &mut end)?;
        plan.predict = plan.program(raw.predict, &kernels, &mut end)?;
        plan.gradient = plan.program(raw.gradient, &kernels, &mut end)?;
        let fits = plan.buffers_fit()?
            && kernels.count == machine.kernels()
            && plan.threads == machine.slots()
            && plan.batch > 0
            && plan.features > 0;
        if fits { Ok(plan) } else { Err(Refusal::FieldWrong) }
    }

    /// Bytes of a record.
    pub fn record(&self) -> usize {
        self.features.saturating_add(self.label)
    }

    /// Number of weights, padding between parameters included.
    pub fn dimension(&self) -> usize {
        self.buffers.weights.bytes / 4
    }

    /// The calls of `program`: kernel and (offset, bytes) of its arguments.
    pub fn calls(&self, program: Program) -> impl Iterator<Item = (usize, &[(u32, u32)])> {
        let calls = self.calls.get(program.first..program.last).unwrap_or_default();
        calls.iter().map(|call| {
            let first = usize::from(call.first);
            let last = first.saturating_add(usize::from(call.count));
            (usize::from(call.kernel), self.arguments.get(first..last).unwrap_or_default())
        })
    }

    /// Resolves a list of calls against the kernels' argument sizes.
    fn program(
        &mut self,
        calls: &[u8],
        kernels: &Kernels<'_>,
        end: &mut Ends,
    ) -> Result<Program, Refusal> {
        let first = end.calls;
        Reader::document(calls, |reader| {
            for _ in 0..reader.list(CALLS)? {
                let count = reader.list(ARGUMENTS + 1)?.checked_sub(1).ok_or(Refusal::FieldWrong)?;
                let kernel = size(reader)?;
                let mut sizes = kernels.sizes(kernel)?;
                if sizes.list(ARGUMENTS)? != count {
                    return Err(Refusal::FieldWrong);
                }
                let call = self.calls.get_mut(end.calls).ok_or(Refusal::LimitExceeded)?;
                *call = Call {
                    kernel: narrow(kernel)?,
                    first: narrow(end.arguments)?,
                    count: narrow(count)?,
                };
                for _ in 0..count {
                    let buffer = Buffer { offset: size(reader)?, bytes: size(&mut sizes)? };
                    buffer.check(self.arena)?;
                    let place =
                        self.arguments.get_mut(end.arguments).ok_or(Refusal::LimitExceeded)?;
                    *place = (narrow(buffer.offset)?, narrow(buffer.bytes)?);
                    end.arguments = end.arguments.saturating_add(1);
                }
                end.calls = end.calls.saturating_add(1);
            }
            Ok(Program { first, last: end.calls })
        })
    }

    /// Whether the runtime's buffers have the sizes that the rest of the description implies.
    fn buffers_fit(&self) -> Result<bool, Refusal> {
        let Buffers { x, y, mask, hyper, output, weights, gradient } = &self.buffers;
        let rows = |bytes: usize| self.batch.checked_mul(bytes).ok_or(Refusal::FieldWrong);
        let logits = self.outputs.checked_mul(4).ok_or(Refusal::FieldWrong)?;
        let label = if self.loss == Loss::CrossEntropy { 4 } else { logits };
        Ok(self.outputs > 0
            && self.label == label
            && x.bytes == rows(self.features)?
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

/// Parts of the description that are read once the kernels are known.
struct Raw<'b> {
    kernels: &'b [u8],
    update: &'b [u8],
    predict: &'b [u8],
    gradient: &'b [u8],
}

/// How much of the plan's tables is used.
struct Ends {
    calls: usize,
    arguments: usize,
}

/// Where each kernel's argument sizes lie in the description.
struct Kernels<'b> {
    bytes: &'b [u8],
    starts: [u32; KERNELS],
    count: usize,
}

impl<'b> Kernels<'b> {
    fn read(bytes: &'b [u8]) -> Result<Self, Refusal> {
        let mut kernels = Kernels { bytes, starts: [0; KERNELS], count: 0 };
        Reader::document(bytes, |reader| {
            kernels.count = reader.list(KERNELS)?;
            for start in kernels.starts.iter_mut().take(kernels.count) {
                reader.map(2)?;
                *start = narrow(reader.key("args")?.position())?;
                reader.skip()?;
                reader.key("name")?.text()?;
            }
            Ok(())
        })?;
        Ok(kernels)
    }

    /// A reader of the argument sizes of kernel `k`.
    fn sizes(&self, k: usize) -> Result<Reader<'b>, Refusal> {
        let start = self.starts.get(..self.count).and_then(|starts| starts.get(k));
        let start = start.ok_or(Refusal::FieldWrong)?;
        let rest = self.bytes.get(*start as usize..).ok_or(Refusal::FieldWrong)?;
        Ok(Reader::new(rest))
    }
}

/// Reads the description's map; the programs stay unresolved.
fn read<'b>(reader: &mut Reader<'b>) -> Result<(Plan, Raw<'b>), Refusal> {
    reader.map(23)?;
    reader.key("cpu")?.skip()?;
    size(reader.key("heap")?)?;
    let loss = loss(reader.key("loss")?)?;
    reader.key("task")?.kind("train")?;
    reader.key("type")?.kind("myelin/image/1")?;
    let arena = size(reader.key("arena")?)?;
    let batch = size(reader.key("batch")?)?;
    reader.key("model")?.fixed::<32>()?;
    reader.key("record")?.map(2)?;
    let label = size(reader.key("label")?)?;
    let features = size(reader.key("features")?)?;
    let update = reader.key("update")?.skip()?;
    let buffers = buffers(reader.key("buffers")?, arena)?;
    let kernels = reader.key("kernels")?.skip()?;
    let outputs = size(reader.key("outputs")?)?;
    let predict = reader.key("predict")?.skip()?;
    let threads = size(reader.key("threads")?)?;
    reader.key("capacity")?.map(2)?;
    let tests = size(reader.key("test")?)?;
    let records = size(reader.key("records")?)?;
    reader.key("clipping")?.skip()?;
    let gradient = reader.key("gradient")?.skip()?;
    reader.key("versions")?.skip()?;
    let additions = reader.key("additions")?.unsigned()?;
    reader.key("optimizer")?.skip()?;
    let workspace = size(reader.key("workspace")?)?;
    reader.key("parameters")?.skip()?;
    let none = Program { first: 0, last: 0 };
    let plan = Plan {
        arena,
        batch,
        loss,
        features,
        label,
        workspace,
        threads,
        outputs,
        additions,
        records,
        tests,
        buffers,
        gradient: none,
        predict: none,
        update: none,
        calls: [Call { kernel: 0, first: 0, count: 0 }; CALLS],
        arguments: [(0, 0); ARGUMENTS_IN_ALL],
    };
    Ok((plan, Raw { kernels, update, predict, gradient }))
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
    let _state = buffer("state")?;
    let (output, weights, gradient) = (buffer("output")?, buffer("weights")?, buffer("gradient")?);
    Ok(Buffers { x, y, mask, hyper, output, weights, gradient })
}

/// A size in bytes or a number of things: 32 bits, as arenas stay below 4 GiB.
fn size(reader: &mut Reader<'_>) -> Result<usize, Refusal> {
    Ok(reader.unsigned32()? as usize)
}

fn narrow<T: TryFrom<usize>>(value: usize) -> Result<T, Refusal> {
    T::try_from(value).map_err(|_| Refusal::LimitExceeded)
}
