//! A machine whose kernels are Rust functions: logistic regression over plain float32 features.

use std::cell::RefCell;
use std::rc::Rc;

use myelin_protocol::Refusal;
use myelin_runtime::{Machine, Session};

use crate::client::{encode, floats};

/// Examples of a physical batch.
pub const BATCH: usize = 4;

/// What a test may steer and see of a machine.
#[derive(Default)]
pub struct Control {
    /// `gradient` writes zero whatever the records are.
    pub zero_gradients: bool,
    /// Kernels do nothing.
    pub idle: bool,
    /// The kernel that fails, by number.
    pub failing: Option<usize>,
    /// Entropy refuses.
    pub without_entropy: bool,
    /// Sum of each mask that `gradient` saw.
    pub masks: Vec<f32>,
    /// Features of the records that `gradient` saw.
    pub rows: Vec<Vec<f32>>,
    /// hyper[0] and hyper[1] that `update` saw.
    pub hyper: Vec<(f32, f32)>,
    /// Whether the session had the workspaces wiped.
    pub wiped: bool,
    pub entropy: u8,
}

pub struct Fake {
    description: &'static [u8],
    heap: Option<&'static mut [u8]>,
    kernels: usize,
    control: Rc<RefCell<Control>>,
}

/// Sizes of an image.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Type of a feature, `unit` and `zero`.
    pub kind: (&'static str, u64, u64),
    pub features: usize,
    pub records: usize,
    pub tests: usize,
    pub additions: u64,
}

impl Shape {
    pub const SMALL: Shape =
        Shape { kind: ("float32", 0, 0), features: 4, records: 24, tests: 8, additions: 4 };

    /// Bytes of a record: features and a float32 label.
    pub fn record(self) -> usize {
        let bytes = match self.kind.0 {
            "float16" => 2,
            "uint8" => 1,
            _ => 4,
        };
        self.features * bytes + 4
    }

    /// Where the bias stands among the weights.
    pub fn bias(self) -> usize {
        self.features.next_multiple_of(16)
    }

    /// Number of weights: the features' weights, padding, the bias.
    pub fn dimension(self) -> usize {
        self.bias() + 1
    }

    pub fn description(self) -> Vec<u8> {
        let (d, x) = (self.dimension() * 4, BATCH * self.features * 4);
        let sizes = [x, BATCH * 4, BATCH * 4, 64, 64, BATCH * 4, d, d];
        let mut offset = 0;
        let buffers = sizes.map(|bytes| {
            let start = offset;
            offset += usize::next_multiple_of(bytes, 64);
            (start as u64, bytes as u64)
        });
        let arena = offset;
        let [bx, by, bmask, bhyper, bstate, boutput, bweights, bgradient] = buffers;
        let names = ["x", "y", "mask", "hyper", "state", "output", "weights", "gradient"];
        let kernels = [
            ("gradient", vec![bx, by, bmask, bhyper, bweights, bgradient]),
            ("predict", vec![bx, bweights, boutput]),
            ("update", vec![bweights, bstate, bgradient, bhyper]),
        ];
        encode(|w| {
            w.map(23)?.str("cpu")?.map(2)?.str("level")?.str("x86-64-v3")?;
            w.str("features")?.array(0)?;
            w.str("heap")?.u64(self.heap() as u64)?.str("loss")?.str("binary-cross-entropy")?;
            w.str("task")?.str("train")?.str("type")?.str("myelin/image/1")?;
            w.str("arena")?.u64(arena as u64)?.str("batch")?.u64(BATCH as u64)?;
            w.str("model")?
                .bytes(&[0; 32])?
                .str("record")?
                .map(5)?
                .str("type")?
                .str(self.kind.0)?;
            w.str("unit")?.u64(self.kind.1)?.str("zero")?.u64(self.kind.2)?;
            w.str("label")?.u64(4)?.str("features")?.u64(self.record() as u64 - 4)?;
            let call = |w: &mut myelin_protocol::cbor::Writer<'_>, k: usize| {
                w.array(1)?.array(kernels[k].1.len() as u64 + 1)?.u64(k as u64)?;
                for (offset, _) in &kernels[k].1 {
                    w.u64(*offset)?;
                }
                Ok::<(), Refusal>(())
            };
            w.str("update")?;
            call(w, 2)?;
            w.str("buffers")?.map(8)?;
            for (name, (offset, bytes)) in names.iter().zip(buffers) {
                w.str(name)?.array(2)?.u64(offset)?.u64(bytes)?;
            }
            w.str("kernels")?.array(3)?;
            for (name, arguments) in &kernels {
                w.map(2)?.str("args")?.array(arguments.len() as u64)?;
                for (_, bytes) in arguments {
                    w.u64(*bytes)?;
                }
                w.str("name")?.str(name)?;
            }
            w.str("outputs")?.u64(1)?.str("predict")?;
            call(w, 1)?;
            w.str("threads")?.u64(1)?.str("capacity")?.map(2)?;
            w.str("test")?.u64(self.tests as u64)?.str("records")?.u64(self.records as u64)?;
            w.str("clipping")?.array(1)?.map(2)?.str("norm")?.str("product")?;
            w.str("layer")?.str("linear")?.str("gradient")?;
            call(w, 0)?;
            w.str("versions")?.map(0)?.str("additions")?.u64(self.additions)?;
            w.str("optimizer")?.map(1)?.str("name")?.str("sgd")?;
            w.str("workspace")?.u64(128)?.str("parameters")?.array(0)?;
            Ok(())
        })
    }

    /// Bytes of heap: generous.
    pub fn heap(self) -> usize {
        let files = (self.records + self.tests) * self.record() + 16 * 128;
        let arena = BATCH * (self.features + 1) * 4 + 3 * 4 * self.dimension() + 8 * 64;
        (files + arena + self.dimension() * 8 + self.records * 4 + 4096).next_multiple_of(64)
    }
}

impl Fake {
    /// A machine, its controls, and where its heap lies.
    pub fn new(shape: Shape) -> (Self, Rc<RefCell<Control>>, (*const u8, usize)) {
        Self::with(shape.description(), shape.heap(), 3)
    }

    pub fn with(
        description: Vec<u8>,
        heap: usize,
        kernels: usize,
    ) -> (Self, Rc<RefCell<Control>>, (*const u8, usize)) {
        Self::on(description, vec![0; heap / 8], kernels)
    }

    /// A machine whose heap has every bit set: floats are NaN, indices wild.
    pub fn dirty(shape: Shape) -> (Self, Rc<RefCell<Control>>, (*const u8, usize)) {
        Self::on(shape.description(), vec![u64::MAX; shape.heap() / 8], 3)
    }

    fn on(
        description: Vec<u8>,
        memory: Vec<u64>,
        kernels: usize,
    ) -> (Self, Rc<RefCell<Control>>, (*const u8, usize)) {
        let heap: &'static mut [u8] = bytemuck::cast_slice_mut(memory.leak());
        let place = (heap.as_ptr(), heap.len());
        let control = Rc::new(RefCell::new(Control::default()));
        let fake = Fake {
            description: description.leak(),
            heap: Some(heap),
            kernels,
            control: control.clone(),
        };
        (fake, control, place)
    }
}

impl Machine for Fake {
    fn description(&self) -> &'static [u8] {
        self.description
    }

    fn slots(&self) -> usize {
        1
    }

    fn kernels(&self) -> usize {
        self.kernels
    }

    fn heap(&mut self) -> &'static mut [u8] {
        self.heap.take().expect("the heap is handed out once")
    }

    fn set_workspaces(&mut self, memory: &'static mut [u8], bytes: usize) {
        assert_eq!(memory.len(), bytes);
        assert_eq!(memory.as_ptr() as usize % 8, 0);
    }

    fn entropy(&mut self, out: &mut [u8]) -> Result<(), Refusal> {
        let control = &mut *self.control.borrow_mut();
        if control.without_entropy {
            return Err(Refusal::RandomnessFailed);
        }
        control.entropy += 1;
        out.fill(control.entropy);
        Ok(())
    }

    fn call(
        &mut self,
        k: usize,
        arena: &mut [u8],
        arguments: &[(u32, u32)],
    ) -> Result<(), Refusal> {
        let control = &mut *self.control.borrow_mut();
        if control.failing == Some(k) {
            return Err(Refusal::KernelFailed);
        }
        for (offset, bytes) in arguments {
            assert!(
                offset % 64 == 0 && u64::from(*offset) + u64::from(*bytes) <= arena.len() as u64
            );
        }
        if control.idle {
            return Ok(());
        }
        let mut values: Vec<Vec<f32>> = arguments
            .iter()
            .map(|(offset, bytes)| floats(&arena[*offset as usize..][..*bytes as usize]))
            .collect();
        match (k, &mut values[..]) {
            (0, [x, y, mask, hyper, weights, out]) => {
                gradient(x, y, mask, hyper[0], weights, out);
                control.masks.push(mask.iter().sum());
                let rows = x.chunks(x.len() / BATCH).zip(mask).filter(|(_, mask)| **mask > 0.0);
                control.rows.extend(rows.map(|(row, _)| row.to_vec()));
                if control.zero_gradients {
                    out.fill(0.0);
                }
            }
            (1, [x, weights, out]) => {
                let features = x.len() / BATCH;
                for (row, logit) in x.chunks(features).zip(out) {
                    *logit = predict(row, weights);
                }
            }
            (2, [weights, state, mean, hyper]) => {
                control.hyper.push((hyper[0], hyper[1]));
                // The state stays the zero that it starts from.
                for (weight, mean) in weights.iter_mut().zip(mean) {
                    *weight -= *mean + state[0];
                }
            }
            _ => panic!("no kernel {k}"),
        }
        for ((offset, bytes), values) in arguments.iter().zip(values) {
            arena[*offset as usize..][..*bytes as usize]
                .copy_from_slice(bytemuck::cast_slice(&values));
        }
        Ok(())
    }

    fn parallel_chunks<T: Send>(
        &mut self,
        out: &mut [T],
        chunk: usize,
        f: &(dyn Fn(usize, &mut [T]) + Sync),
    ) {
        // Backwards: results must not depend on the order.
        for (index, part) in out.chunks_mut(chunk).enumerate().rev() {
            f(index, part);
        }
    }

    fn wipe(&mut self) {
        self.control.borrow_mut().wiped = true;
    }
}

/// Runs a session by `script`: four bytes a request, which one of `log` (frames `u32 length ‖ request`)
/// and what to change of it. Whatever the script, replies are well formed, and no more steps than
/// `steps` run. Gives the number of requests that were not refused.
pub fn drive(log: &[u8], script: &[u8], steps: usize) -> usize {
    let mut requests = Vec::new();
    let mut rest = log;
    while let Some((length, frames)) = rest.split_first_chunk::<4>() {
        let (request, others) = frames.split_at(u32::from_le_bytes(*length) as usize);
        requests.push(request);
        rest = others;
    }
    let (machine, control, (heap, bytes)) = Fake::new(Shape::SMALL);
    let mut session = Session::new(machine);
    let mut reply = vec![0; 1 << 17];
    let mut done = 0;
    for [which, bits, low, high] in script.as_chunks().0 {
        let mut request = requests[usize::from(*which) % requests.len()].to_vec();
        let place = usize::from(u16::from_le_bytes([*low, *high])) % request.len();
        match *bits {
            0 => {}
            1 => request.truncate(place),
            2 => request.insert(place, *which),
            bits => request[place] ^= bits,
        }
        let length = session.handle(&request, &mut reply);
        let (status, result) = reply[..length].split_first_chunk().unwrap();
        match u32::from_le_bytes(*status) {
            0 => done += 1,
            _ => assert!(result.iter().all(|byte| matches!(byte, b'a'..=b'z' | b'-'))),
        }
    }
    assert!(control.borrow().hyper.len() <= steps);
    drop(session);
    // SAFETY: `Fake::on` leaked this vector of words, and the session, its only user, is gone.
    drop(unsafe { Vec::from_raw_parts(heap as *mut u64, bytes / 8, bytes / 8) });
    done
}

/// The logit of a row.
pub fn predict(row: &[f32], weights: &[f32]) -> f32 {
    let sum: f32 = row.iter().zip(weights).map(|(x, w)| x * w).sum();
    sum + weights[weights.len() - 1]
}

/// Clipped sum of the gradients of a physical batch; what lies between parameters stays as it is.
fn gradient(x: &[f32], y: &[f32], mask: &[f32], clip: f32, weights: &[f32], out: &mut [f32]) {
    let features = x.len() / BATCH;
    out[..features].fill(0.0);
    out[weights.len() - 1] = 0.0;
    for (i, row) in x.chunks(features).enumerate() {
        let error = 1.0 / (1.0 + (-predict(row, weights)).exp()) - y[i];
        let norm = error.abs() * (row.iter().map(|x| x * x).sum::<f32>() + 1.0).sqrt();
        let factor = mask[i] * (clip / norm.max(1e-30)).min(1.0) * error;
        for (g, x) in out.iter_mut().zip(row) {
            *g += factor * x;
        }
        out[weights.len() - 1] += factor;
    }
}
