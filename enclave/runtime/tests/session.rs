//! Whole sessions on a fake machine: what must work works, what must be refused is refused by name.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic,
    reason = "a test fails by panic"
)]

#[path = "../../protocol/tests/client/mod.rs"]
mod client;
mod fake;

use std::cell::RefCell;
use std::collections::HashSet;
use std::rc::Rc;

use client::{
    Client, GrantOf, JobOf, chunks, damaged, encode, floats, open_output, records, seal, unseal,
};
use fake::{Control, Fake, Shape};
use myelin_protocol::cbor::Reader;
use myelin_protocol::{HEADER, report_data};
use myelin_runtime::Session;
use sha2::{Digest, Sha256};

const JOB: u32 = 1;
const APPROVE: u32 = 2;
const ATTEST: u32 = 3;
const GRANT: u32 = 4;
const OPEN: u32 = 5;
const CHUNK_IN: u32 = 6;
const WEIGHTS: u32 = 7;
const TRAIN: u32 = 8;
const FINISH: u32 = 9;
const OUTPUT: u32 = 10;

/// Everything: the rate at which every record is in every step.
const ALL: u64 = 1 << 32;

/// Where a recorded session lies.
const VECTORS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../vectors/enclave");

/// The host: a session and what it needs to drive one.
struct Host {
    session: Session<Fake>,
    control: Rc<RefCell<Control>>,
    heap: (*const u8, usize),
    reply: Vec<u8>,
    owners: [Client; 2],
    tester: Client,
    researcher: Client,
    rows: [Vec<Vec<u8>>; 3],
    files: [Vec<u8>; 3],
    shape: Shape,
    job: Vec<u8>,
    digest: [u8; 32],
    instance: [u8; 1216],
    /// Every request so far.
    log: Vec<Vec<u8>>,
}

impl Host {
    /// Two owners of records and one of test records; `change` changes the job.
    fn new(shape: Shape, change: impl Fn(&mut JobOf<'_>)) -> Self {
        Host::on(Fake::new(shape), shape, change)
    }

    /// The same on another machine.
    fn on(
        (machine, control, heap): (Fake, Rc<RefCell<Control>>, (*const u8, usize)),
        shape: Shape,
        change: impl Fn(&mut JobOf<'_>),
    ) -> Self {
        let owners = [Client::new("north", 11), Client::new("south", 12)];
        let (tester, researcher) = (Client::new("tester", 13), Client::new("researcher", 14));
        let rows = [examples(shape, 5, 0), examples(shape, 6, 5), examples(shape, 7, 11)];
        let capacities = [8, 16, 8];
        let files = [0, 1, 2]
            .map(|i| seal(&key(i), &records(capacities[i], shape.record() as u32, &rows[i])));
        let mut job = JobOf {
            parties: vec![&owners[0], &owners[1], &tester, &researcher],
            sends: vec![("records", 0, 8), ("records", 1, 16), ("test", 2, 8)],
            receives: vec![("score", None), ("weights", Some(3))],
            steps: 20,
            epsilon: 2_000_000,
            max_batch: 16,
            sample_rate: ALL,
            max_grad_norm: 1_000_000,
            expected_batch: 11_000_000,
            noise_multiplier: 1,
            weights: Sha256::digest(vec![0; shape.dimension() * 4]).into(),
        };
        change(&mut job);
        let job = job.document();
        let digest = Sha256::digest(&job).into();
        Host {
            session: Session::new(machine),
            control,
            heap,
            reply: vec![0; 1 << 17],
            owners,
            tester,
            researcher,
            rows,
            files,
            shape,
            job,
            digest,
            instance: [0; 1216],
            log: vec![],
        }
    }

    fn small() -> Self {
        Host::new(Shape::SMALL, |_| ())
    }

    fn call(&mut self, operation: u32, parts: &[&[u8]]) -> Result<Vec<u8>, String> {
        let request = [&operation.to_le_bytes(), &parts.concat()[..]].concat();
        let length = self.session.handle(&request, &mut self.reply);
        self.log.push(request);
        let (status, result) = self.reply[..length].split_first_chunk().unwrap();
        match u32::from_le_bytes(*status) {
            0 => Ok(result.to_vec()),
            _ => Err(String::from_utf8(result.to_vec()).unwrap()),
        }
    }

    /// The job, all approvals, evidence.
    fn approved(mut self) -> Self {
        self.call(JOB, &[&self.job.clone()]).unwrap();
        self.approve();
        self
    }

    fn approve(&mut self) {
        for party in 0..4 {
            let approval = self.party(party).approval(&self.digest);
            self.call(APPROVE, &[&approval]).unwrap();
        }
        self.instance = self.call(ATTEST, &[&[0; 32]]).unwrap()[..1216].try_into().unwrap();
    }

    /// All inputs and the weights too.
    fn loaded(self) -> Self {
        let mut host = self.approved();
        for i in 0..3 {
            host.load(i).unwrap();
        }
        host.load_weights().unwrap();
        host
    }

    fn party(&self, index: usize) -> &Client {
        [&self.owners[0], &self.owners[1], &self.tester, &self.researcher][index]
    }

    fn grant(&self, i: usize, change: impl Fn(&mut GrantOf<'_>)) -> Vec<u8> {
        let mut grant = GrantOf {
            instance: &self.instance,
            job: &self.digest,
            sealed_for: &self.digest,
            slot: if i == 2 { "test" } else { "records" },
            party: i as u64,
            key: &key(i),
            uses: 1,
            commitment: Sha256::digest(&self.files[i]).into(),
        };
        change(&mut grant);
        self.party(i).grant(&grant)
    }

    fn open(&mut self, i: usize) -> Result<Vec<u8>, String> {
        let header = self.files[i][..HEADER].to_vec();
        self.call(OPEN, &[&word(i), &header])
    }

    fn chunk(&mut self, i: usize, number: u64, chunk: &[u8]) -> Result<Vec<u8>, String> {
        self.call(CHUNK_IN, &[&word(i), &number.to_le_bytes(), chunk])
    }

    fn load(&mut self, i: usize) -> Result<(), String> {
        let grant = self.grant(i, |_| ());
        self.call(GRANT, &[&grant])?;
        self.open(i)?;
        let file = self.files[i].clone();
        for (number, chunk) in chunks(&file).enumerate() {
            self.chunk(i, number as u64, chunk)?;
        }
        Ok(())
    }

    fn load_weights(&mut self) -> Result<(), String> {
        let weights = vec![0; self.shape.dimension() * 4];
        for (i, part) in weights.chunks(50_000).enumerate() {
            self.call(WEIGHTS, &[&(i as u64 * 50_000).to_le_bytes(), part])?;
        }
        Ok(())
    }

    fn train(&mut self, steps: u32, rate: u64, noise: u64) -> Result<u32, String> {
        let arguments = [&steps.to_le_bytes()[..], &rate.to_le_bytes(), &noise.to_le_bytes()];
        let reply = self.call(TRAIN, &arguments)?;
        Ok(u32::from_le_bytes(reply.try_into().unwrap()))
    }

    /// The sealed file of output 1.
    fn fetch(&mut self) -> Vec<u8> {
        let mut file = Vec::new();
        for part in 1.. {
            let piece = self.call(OUTPUT, &[&word(1), &word(part)]).unwrap();
            if piece.is_empty() {
                break;
            }
            file.extend(piece);
        }
        file
    }

    /// The trained weights as their receiver reads them.
    fn weights(&mut self) -> Vec<f32> {
        let envelope = self.call(OUTPUT, &[&word(1), &word(0)]).unwrap();
        let key = open_output(&self.researcher, &self.digest, &envelope);
        floats(&unseal(&key, &self.fetch()))
    }

    /// Bytes of the heap that are not zero; ends the session.
    fn heap_left(self) -> usize {
        let (start, length) = self.heap;
        drop(self.session);
        // SAFETY: the session, the heap's only user, is gone, and the heap is leaked memory.
        let heap = unsafe { std::slice::from_raw_parts(start, length) };
        heap.iter().filter(|byte| **byte != 0).count()
    }
}

fn key(i: usize) -> [u8; 32] {
    [21 + i as u8; 32]
}

fn word(i: usize) -> [u8; 4] {
    (i as u32).to_le_bytes()
}

/// Examples whose label is whether the first feature is positive.
fn examples(shape: Shape, count: usize, first: usize) -> Vec<Vec<u8>> {
    let row = |i: usize| {
        let x = (0..shape.features).flat_map(move |j| {
            let byte = ((i * 37 + j * 11) % 17) as u8;
            let feature = f32::from(byte) / 8.0 - 1.0;
            match shape.kind.0 {
                "uint8" => vec![byte],
                "float16" => half(feature).to_le_bytes().to_vec(),
                _ => feature.to_le_bytes().to_vec(),
            }
        });
        let y = f32::from(((i * 37) % 17) as f32 / 8.0 > 1.0);
        x.chain(y.to_le_bytes()).collect()
    };
    (first..first + count).map(row).collect()
}

/// The binary16 of a float that is one, zero or not too small.
fn half(x: f32) -> u16 {
    let rest = (x.abs().to_bits() >> 13).saturating_sub(112 << 10);
    (x.is_sign_negative() as u16) << 15 | rest as u16
}

fn refused<T: std::fmt::Debug>(result: Result<T, String>) -> String {
    result.unwrap_err()
}

#[test]
fn a_whole_session() {
    let mut host = Host::small().loaded();
    assert_eq!(host.train(3, ALL, 1), Ok(3));
    assert_eq!(host.train(2, ALL, 1), Ok(5));
    let receipt = host.call(FINISH, &[]).unwrap();
    let weights = host.weights();
    // The same training in float64, written differently: noise of 10⁻⁶ is below the tolerance.
    let rows: Vec<Vec<f32>> = host.rows[..2].iter().flatten().map(|row| floats(row)).collect();
    let mut expected = vec![0.0_f64; 5];
    for _ in 0..5 {
        let mut sum = vec![0.0; 5];
        for row in &rows {
            let x: Vec<f64> = row[..4].iter().map(|x| f64::from(*x)).chain([1.0]).collect();
            let logit: f64 = x.iter().zip(&expected).map(|(x, w)| x * w).sum();
            let g: Vec<f64> =
                x.iter().map(|x| x * (1.0 / (1.0 + (-logit).exp()) - f64::from(row[4]))).collect();
            let norm = g.iter().map(|g| g * g).sum::<f64>().sqrt();
            for (sum, g) in sum.iter_mut().zip(g) {
                *sum += g / norm.max(1.0);
            }
        }
        for (weight, sum) in expected.iter_mut().zip(sum) {
            *weight -= sum / 11.0;
        }
    }
    let found = [&weights[..4], &weights[16..]].concat();
    for (found, expected) in found.iter().zip(&expected) {
        assert!((f64::from(*found) - expected).abs() < 1e-4, "{found} {expected}");
    }
    // The score, counted outside.
    let right = host.rows[2]
        .iter()
        .map(|row| floats(row))
        .filter(|row| (fake::predict(&row[..4], &weights) > 0.0) == (row[4] > 0.5));
    let right = right.count() as u64;
    let body = Reader::document(&receipt, |r| {
        r.map(3)?;
        let body = r.key("body")?.bytes()?;
        r.key("type")?.kind("myelin/receipt/1")?;
        r.key("signature")?.fixed::<64>()?;
        Ok(body)
    });
    Reader::document(body.unwrap(), |r| {
        r.map(7)?;
        assert_eq!(r.key("job")?.fixed::<32>()?, &host.digest);
        r.key("image")?.skip()?;
        r.key("score")?.map(2)?;
        assert_eq!(r.key("total")?.unsigned()?, 7);
        assert_eq!(r.key("correct")?.unsigned()?, right);
        assert_eq!(r.key("inputs")?.list(16)?, 3);
        for (i, slot) in ["records", "records", "test"].into_iter().enumerate() {
            r.map(3)?;
            assert_eq!(r.key("slot")?.text()?, slot);
            assert_eq!(r.key("party")?.unsigned()?, i as u64);
            let commitment = r.key("commitment")?.fixed::<32>()?;
            assert_eq!(commitment[..], Sha256::digest(&host.files[i])[..]);
        }
        assert_eq!(r.key("outputs")?.list(16)?, 1);
        r.map(3)?;
        assert_eq!(r.key("slot")?.text()?, "weights");
        assert_eq!(r.key("party")?.unsigned()?, 3);
        let digest = r.key("digest")?.fixed::<32>()?;
        assert_eq!(digest[..], Sha256::digest(bytemuck::cast_slice::<f32, u8>(&weights))[..]);
        r.key("privacy")?.map(10)?;
        r.key("delta")?.unsigned()?;
        assert_eq!(r.key("steps")?.unsigned()?, 5);
        for key in ["epsilon", "sampler", "max_batch", "sample_rate", "max_grad_norm"] {
            r.key(key)?.skip()?;
        }
        for key in ["expected_batch", "noise_multiplier", "neighboring_relation"] {
            r.key(key)?.skip()?;
        }
        assert_eq!(r.key("weights")?.bytes()?.len(), 32);
        Ok(())
    })
    .unwrap();
    // Evidence can still be asked for; everything else is over, and nothing is left.
    assert_eq!(host.call(ATTEST, &[&[1; 32]]).unwrap()[..1216], host.instance);
    assert_eq!(refused(host.train(1, ALL, 1)), "wrong-state");
    assert_eq!(refused(host.call(FINISH, &[])), "wrong-state");
    assert_eq!(refused(host.call(OUTPUT, &[&word(1), &word(0)])), "wrong-state");
    assert!(host.control.borrow().wiped);
    assert_eq!(host.heap_left(), 0);
}

/// Receipt and weights of three steps of training.
fn trained(machine: (Fake, Rc<RefCell<Control>>, (*const u8, usize)), shape: Shape) -> Vec<u8> {
    let mut host = Host::on(machine, shape, |_| ()).loaded();
    host.train(3, ALL, 1).unwrap();
    let receipt = host.call(FINISH, &[]).unwrap();
    [receipt, bytemuck::cast_slice(&host.weights()).to_vec()].concat()
}

#[test]
fn what_stood_in_the_heap_does_not_matter() {
    let shape = Shape::SMALL;
    assert!(trained(Fake::new(shape), shape) == trained(Fake::dirty(shape), shape));
}

#[test]
fn compact_features_train_as_the_floats_that_they_stand_for() {
    let weights = |kind| {
        let shape = Shape { kind, ..Shape::SMALL };
        let whole = trained(Fake::dirty(shape), shape);
        floats(&whole[whole.len() - 4 * shape.dimension()..])
    };
    let expected = weights(("float32", 0, 0));
    assert!(expected[0] != 0.0 && expected.iter().all(|weight| weight.is_finite()));
    assert_eq!(weights(("float16", 0, 0)), expected);
    assert_eq!(weights(("uint8", 8_000_000, 8_000_000)), expected);
    for kind in [
        ("float64", 0, 0),
        ("float32", 1, 0),
        ("float16", 0, 1),
        ("uint8", 0, 0),
        ("uint8", 1, 1 << 31),
    ] {
        let mut host = Host::new(Shape { kind, ..Shape::SMALL }, |_| ());
        let job = host.job.clone();
        assert_eq!(refused(host.call(JOB, &[&job])), "field-wrong", "{kind:?}");
    }
}

#[test]
fn records_are_wiped_when_training_ends_and_weights_when_they_are_taken() {
    let mut host = Host::small().loaded();
    host.train(2, ALL, 1).unwrap();
    host.call(FINISH, &[]).unwrap();
    assert!(host.control.borrow().wiped);
    let dimension = host.shape.dimension();
    let left = host.heap_left();
    assert!(0 < left && left <= 4 * dimension, "{left} bytes: the weights and nothing else");
}

#[test]
fn a_failing_kernel_ends_everything() {
    for (kernel, operation) in [(0, TRAIN), (2, TRAIN), (1, FINISH)] {
        let mut host = Host::small().loaded();
        host.control.borrow_mut().failing = Some(kernel);
        let reason = match operation {
            TRAIN => refused(host.train(1, ALL, 1)),
            _ => refused(host.call(FINISH, &[])),
        };
        assert_eq!(reason, "kernel-failed");
        assert_eq!(refused(host.train(1, ALL, 1)), "wrong-state");
        assert_eq!(refused(host.call(FINISH, &[])), "wrong-state");
        assert!(host.control.borrow().wiped);
        assert_eq!(host.heap_left(), 0);
    }
}

#[test]
fn noise_is_there() {
    // All gradients are zero, so the weights are −Σ k·g / expected_batch: variance T·(σ/B)².
    let shape = Shape { features: 40_000, ..Shape::SMALL };
    let change = |job: &mut JobOf<'_>| {
        (job.noise_multiplier, job.max_grad_norm) = (1_500_000, 2_000_000);
    };
    let mut host = Host::new(shape, change).loaded();
    host.control.borrow_mut().zero_gradients = true;
    host.train(2, ALL, 1_500_000).unwrap();
    host.call(FINISH, &[]).unwrap();
    let weights = host.weights();
    let n = weights.len() as f64;
    let expected = 2.0 * (1.5 * 2.0 / 11.0_f64).powi(2);
    let mean = weights.iter().map(|w| f64::from(*w)).sum::<f64>() / n;
    let variance = weights.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>() / n;
    // The variance of a sample variance is 2/n: five standard deviations.
    let error = variance / expected - 1.0;
    assert!(error.abs() < 5.0 * (2.0 / n).sqrt(), "variance off by {error}");
    assert!(mean.abs() < 5.0 * (expected / n).sqrt(), "mean {mean}");
    // Chunks have generators of their own, and begin at a line.
    let (lines, _) = weights.as_chunks::<16>();
    let distinct: HashSet<_> = lines.iter().map(|line| line.map(f32::to_bits)).collect();
    assert_eq!(distinct.len(), lines.len(), "no line is like another");
}

#[test]
fn every_record_is_sampled_at_the_rate_and_batches_are_capped() {
    let mut host = Host::new(Shape::SMALL, |job| {
        (job.steps, job.max_batch, job.sample_rate) = (4_000, 16, ALL / 4);
    })
    .loaded();
    host.train(2_000, ALL / 4, 1).unwrap();
    let sampled: f32 = host.control.borrow().masks.iter().sum();
    // 11 real records, 2,000 steps: mean 5,500, standard deviation √(22,000·¼·¾) = 64.
    assert!((sampled - 5_500.0).abs() < 5.0 * 64.2, "{sampled}");
    let mut host = Host::new(Shape::SMALL, |job| job.sample_rate = 0).loaded();
    host.train(5, 0, 1).unwrap();
    assert_eq!(host.control.borrow().masks, [0.0; 5], "an empty batch is still a step");
    let mut host = Host::new(Shape::SMALL, |_| ()).loaded();
    host.train(1, ALL, 1).unwrap();
    assert_eq!(host.control.borrow().masks, [4.0, 4.0, 3.0], "eleven in batches of four");
    let all = host.control.borrow().rows.clone();
    let mut host = Host::new(Shape::SMALL, |job| job.max_batch = 6).loaded();
    host.train(1, ALL, 1).unwrap();
    assert_eq!(host.control.borrow().masks, [4.0, 2.0], "no more than max_batch");
    assert_eq!(host.control.borrow().rows, all[..6], "the first, in order");
}

#[test]
fn kernels_see_the_lowered_threshold_and_the_number_of_the_step() {
    let shape = Shape { additions: 1 << 15, ..Shape::SMALL };
    let mut host = Host::new(shape, |_| ()).loaded();
    host.train(2, ALL, 1).unwrap();
    host.train(1, ALL, 1).unwrap();
    // 1 − 2 · 2¹⁵ · 2⁻²⁴ · 16 = 0.9375, exact in float32.
    let expected = [(0.9375, 1.0), (0.9375, 2.0), (0.9375, 3.0)];
    assert_eq!(host.control.borrow().hyper, expected);
    // A threshold that float32 cannot hold is rounded down.
    let mut host = Host::new(Shape { additions: 0, ..Shape::SMALL }, |job| {
        job.max_grad_norm = 700_000; // 0.7 rounds up to 0.69999999 + 2⁻²⁵ or down
    })
    .loaded();
    host.train(1, ALL, 1).unwrap();
    assert!(f64::from(host.control.borrow().hyper[0].0) <= 0.7);
    // A rounding charge that eats the whole threshold is no job for this image.
    let mut host = Host::new(Shape { additions: 1 << 20, ..Shape::SMALL }, |_| ());
    let job = host.job.clone();
    assert_eq!(refused(host.call(JOB, &[&job])), "job-wrong");
}

#[test]
fn limits_hold() {
    let mut host = Host::new(Shape::SMALL, |job| {
        (job.sample_rate, job.noise_multiplier) = (1 << 30, 1_000_000);
    })
    .loaded();
    assert_eq!(refused(host.train(21, 1 << 30, 1_000_000)), "steps-exceeded");
    assert_eq!(refused(host.train(u32::MAX, 1 << 30, 1_000_000)), "steps-exceeded");
    assert_eq!(refused(host.train(1, (1 << 30) + 1, 1_000_000)), "sample-rate-raised");
    assert_eq!(refused(host.train(1, 1 << 30, 999_999)), "noise-lowered");
    assert_eq!(refused(host.train(1, 1 << 30, 0)), "noise-lowered");
    // The receipt states the job's numbers, so nothing else may have been done.
    assert_eq!(refused(host.train(1, 1 << 29, 1_000_000)), "field-wrong");
    assert_eq!(refused(host.train(1, 1 << 30, 2_000_000)), "field-wrong");
    assert_eq!(host.train(15, 1 << 30, 1_000_000), Ok(15));
    assert_eq!(refused(host.train(6, 1 << 30, 1_000_000)), "steps-exceeded");
    assert_eq!(host.train(5, 1 << 30, 1_000_000), Ok(20));
    assert_eq!(refused(host.train(1, 1 << 30, 1_000_000)), "steps-exceeded");
    assert_eq!(host.train(0, 1 << 30, 1_000_000), Ok(20));
}

#[test]
fn approvals_are_demanded() {
    let mut host = Host::small();
    assert_eq!(refused(host.call(APPROVE, &[&[0]])), "wrong-state");
    assert_eq!(refused(host.call(ATTEST, &[&[0; 32]])), "wrong-state");
    let job = host.job.clone();
    host.call(JOB, &[&job]).unwrap();
    assert_eq!(refused(host.call(JOB, &[&job])), "wrong-state");
    for party in 0..4 {
        assert_eq!(refused(host.call(ATTEST, &[&[0; 32]])), "approval-missing");
        assert_eq!(refused(host.load(0)), "approval-missing");
        let approval = host.party(party).approval(&host.digest);
        host.call(APPROVE, &[&approval]).unwrap();
        assert_eq!(refused(host.call(APPROVE, &[&approval])), "approval-duplicate");
    }
    let reply = host.call(ATTEST, &[&[7; 32]]).unwrap();
    let (hpke, rest) = reply.split_first_chunk().unwrap();
    let (sign, data) = rest.split_first_chunk().unwrap();
    assert_eq!(data, report_data(&[7; 32], hpke, sign, &host.digest));
    assert_eq!(refused(host.call(ATTEST, &[&[7; 31]])), "field-wrong");
}

#[test]
fn grants_are_bound() {
    let mut host = Host::small().approved();
    assert_eq!(refused(host.open(0)), "grant-missing");
    let mut refuse = |change: &dyn Fn(&mut GrantOf<'_>)| {
        let grant = host.grant(0, change);
        refused(host.call(GRANT, &[&grant]))
    };
    assert_eq!(refuse(&|g| g.job = &[0; 32]), "job-wrong");
    assert_eq!(refuse(&|g| g.sealed_for = &[0; 32]), "hpke-failed");
    assert_eq!(refuse(&|g| g.slot = "test"), "grant-wrong");
    assert_eq!(refuse(&|g| g.party = 3), "grant-wrong");
    assert_eq!(refuse(&|g| g.party = 9), "party-unknown");
    assert_eq!(refuse(&|g| g.uses = 0), "grant-wrong");
    assert_eq!(refused(host.call(GRANT, &[&[0; 4_097]])), "message-too-long");
    // Another instance of the same image and job.
    let other = Host::small();
    other.control.borrow_mut().entropy = 100;
    let other = other.approved();
    assert_ne!(other.instance, host.instance);
    let grant = other.grant(0, |_| ());
    assert_eq!(refused(host.call(GRANT, &[&grant])), "hpke-failed");
    // None of these changed anything.
    let grant = host.grant(0, |_| ());
    host.call(GRANT, &[&grant]).unwrap();
    assert_eq!(refused(host.call(GRANT, &[&grant])), "grant-duplicate");
    // The wrong signer ends the input that the grant names.
    let forged = host.party(0).grant(&GrantOf {
        instance: &host.instance,
        job: &host.digest,
        sealed_for: &host.digest,
        slot: "records",
        party: 1,
        key: &key(1),
        uses: 1,
        commitment: [0; 32],
    });
    assert_eq!(refused(host.call(GRANT, &[&forged])), "signature-wrong");
    assert_eq!(refused(host.load(1)), "wrong-state");
    assert_eq!(refused(host.open(1)), "wrong-state");
    host.load_weights().unwrap();
    assert_eq!(refused(host.train(1, ALL, 1)), "input-missing");
}

/// Room for records of several chunks.
fn long() -> Host {
    Host::new(Shape { features: 4_000, ..Shape::SMALL }, |_| ())
}

#[test]
fn chunks_come_in_order_and_once() {
    let ended = |host: &mut Host| {
        assert_eq!(refused(host.open(0)), "wrong-state");
        assert_eq!(refused(host.chunk(0, 0, &[])), "wrong-state");
        assert_eq!(refused(host.load(0)), "wrong-state");
        host.load_weights().unwrap();
        assert_eq!(refused(host.train(1, ALL, 1)), "input-missing");
    };
    let begun = || {
        let mut host = long().approved();
        let grant = host.grant(0, |_| ());
        host.call(GRANT, &[&grant]).unwrap();
        assert_eq!(refused(host.chunk(0, 0, &[0; 32])), "wrong-state");
        host.open(0).unwrap();
        let file = host.files[0].clone();
        assert_eq!(chunks(&file).count(), 2);
        let chunks: Vec<Vec<u8>> = chunks(&file).map(<[u8]>::to_vec).collect();
        (host, chunks)
    };
    let (mut host, chunks) = begun();
    assert_eq!(refused(host.chunk(0, 1, &chunks[1])), "chunk-order"); // reordered or dropped
    ended(&mut host);
    let (mut host, chunks) = begun();
    assert_eq!(refused(host.chunk(0, 0, &chunks[1])), "chunk-tag-wrong"); // under another number
    ended(&mut host);
    let (mut host, chunks) = begun();
    host.chunk(0, 0, &chunks[0]).unwrap();
    assert_eq!(refused(host.chunk(0, 0, &chunks[0])), "chunk-order"); // repeated
    ended(&mut host);
    let (mut host, chunks) = begun();
    host.chunk(0, 0, &chunks[0]).unwrap();
    assert_eq!(refused(host.open(0)), "input-duplicate"); // begun again
    host.chunk(0, 1, &chunks[1]).unwrap();
    assert_eq!(refused(host.chunk(0, 2, &chunks[1])), "input-duplicate"); // one too many
    assert_eq!(refused(host.chunk(1, 0, &chunks[0])), "wrong-state"); // another input
    assert_eq!(refused(host.chunk(3, 0, &chunks[0])), "field-wrong"); // no input
    let (mut host, chunks) = begun();
    host.chunk(0, 0, &chunks.concat()).unwrap(); // several at once
    assert_eq!(refused(host.chunk(0, 0, &chunks[0])), "input-duplicate");
    let (mut host, chunks) = begun();
    let swapped = [&chunks[1][..], &chunks[0]].concat();
    assert_eq!(refused(host.chunk(0, 0, &swapped)), "chunk-tag-wrong");
    ended(&mut host);
    let (mut host, chunks) = begun();
    assert_eq!(refused(host.chunk(0, 1, &chunks.concat())), "chunk-order"); // under another number
    ended(&mut host);
    let (mut host, chunks) = begun();
    let mut more = [&chunks[0][..], &chunks[0]].concat();
    assert_eq!(refused(host.chunk(0, 0, &more)), "chunk-tag-wrong"); // the second one repeated
    ended(&mut host);
    assert_eq!(host.heap_left(), 0, "the first one is gone too");
    let (mut host, chunks) = begun();
    more = chunks.concat();
    more.push(0);
    assert_eq!(refused(host.chunk(0, 0, &more)), "chunk-tag-wrong"); // bytes past the end
    ended(&mut host);
    let (mut host, _) = begun();
    assert_eq!(refused(host.chunk(0, 0, &[])), "chunk-tag-wrong"); // none
    ended(&mut host);
}

#[test]
fn damaged_chunks_end_the_input() {
    let file = Host::small().files[0].clone();
    let chunk = &file[HEADER..];
    let every = |(i, changed): (usize, Vec<u8>)| (i % 7 == 0).then_some(changed);
    for changed in damaged(chunk).enumerate().filter_map(every) {
        let mut host = Host::small().approved();
        let grant = host.grant(0, |_| ());
        host.call(GRANT, &[&grant]).unwrap();
        host.open(0).unwrap();
        assert_eq!(refused(host.chunk(0, 0, &changed)), "chunk-tag-wrong");
        assert_eq!(refused(host.open(0)), "wrong-state");
        assert_eq!(host.heap_left(), 0, "the plaintext is gone");
    }
}

#[test]
fn damaged_headers_are_refused() {
    let mut host = Host::small().approved();
    let grant = host.grant(0, |_| ());
    host.call(GRANT, &[&grant]).unwrap();
    let header = host.files[0][..HEADER].to_vec();
    for changed in damaged(&header) {
        let reason = refused(host.call(OPEN, &[&word(0), &changed]));
        let reasons =
            ["field-wrong", "sealed-header-wrong", "key-commitment-wrong", "capacity-wrong"];
        assert!(reasons.contains(&reason.as_str()), "{reason}");
    }
    host.open(0).unwrap();
}

#[test]
fn another_file_under_the_same_key_is_refused() {
    let mut host = Host::small().approved();
    let grant = host.grant(0, |g| g.commitment = [0; 32]);
    host.call(GRANT, &[&grant]).unwrap();
    host.open(0).unwrap();
    let file = host.files[0].clone();
    assert_eq!(refused(host.chunk(0, 0, &file[HEADER..])), "commitment-wrong");
    assert_eq!(host.heap_left(), 0);
}

#[test]
fn record_headers_are_checked() {
    let good = Host::small();
    let plaintext = records(8, 20, &good.rows[0]);
    let load = |plaintext: &[u8]| {
        let mut host = Host::small().approved();
        host.files[0] = seal(&key(0), plaintext);
        host.load(0)
    };
    assert_eq!(load(&plaintext), Ok(()));
    for (byte, value) in [(0, b'm'), (8, 0), (8, 9), (11, 1), (12, 9), (16, 21), (20, 1), (63, 1)] {
        let mut changed = plaintext.clone();
        changed[byte] = value;
        assert_eq!(refused(load(&changed)), "record-header-wrong", "byte {byte}");
    }
    assert_eq!(refused(load(&plaintext[..plaintext.len() - 1])), "capacity-wrong");
    assert_eq!(refused(load(&records(9, 20, &good.rows[0]))), "capacity-wrong");
}

#[test]
fn weights_come_in_order() {
    let mut host = Host::small().approved();
    let total = host.shape.dimension() * 4;
    let mut send = |offset: u64, part: &[u8]| host.call(WEIGHTS, &[&offset.to_le_bytes(), part]);
    assert_eq!(refused(send(4, &[0; 4])), "weights-order");
    assert_eq!(refused(send(0, &[])), "weights-order");
    assert_eq!(refused(send(0, &vec![0; total + 1])), "weights-order");
    send(0, &[0; 40]).unwrap();
    assert_eq!(refused(send(0, &[0; 40])), "weights-order");
    assert_eq!(refused(send(40, &vec![1; total - 40])), "weights-digest-wrong");
    assert_eq!(refused(send(40, &vec![0; total - 40])), "weights-order");
    send(0, &vec![0; total]).unwrap();
    assert_eq!(refused(send(total as u64, &[0])), "weights-order");
    assert_eq!(refused(send(0, &vec![0; total])), "weights-order");
}

#[test]
fn work_waits_for_every_input() {
    let mut host = Host::small().approved();
    for i in 0..3 {
        assert_eq!(refused(host.train(1, ALL, 1)), "input-missing");
        assert_eq!(refused(host.call(FINISH, &[])), "input-missing");
        host.load(i).unwrap();
    }
    assert_eq!(refused(host.train(1, ALL, 1)), "input-missing");
    host.load_weights().unwrap();
    assert_eq!(refused(host.call(OUTPUT, &[&word(1), &word(0)])), "wrong-state");
    host.train(1, ALL, 1).unwrap();
    assert_eq!(refused(host.load(0)), "grant-duplicate");
    host.call(FINISH, &[]).unwrap();
    assert_eq!(refused(host.call(OUTPUT, &[&word(0), &word(0)])), "output-unknown");
    assert_eq!(refused(host.call(OUTPUT, &[&word(2), &word(0)])), "output-unknown");
}

#[test]
fn jobs_must_fit_the_image() {
    let refuse = |change: &dyn Fn(&mut JobOf<'_>)| {
        let mut host = Host::new(Shape::SMALL, change);
        let job = host.job.clone();
        refused(host.call(JOB, &[&job]))
    };
    assert_eq!(refuse(&|job| job.sends[0].2 = 9), "capacity-wrong");
    assert_eq!(refuse(&|job| job.sends[2].2 = 9), "capacity-wrong");
    let mut host = Host::small();
    host.control.borrow_mut().without_entropy = true;
    let job = host.job.clone();
    assert_eq!(refused(host.call(JOB, &[&job])), "randomness-failed");
    host.control.borrow_mut().without_entropy = false;
    host.call(JOB, &[&job]).unwrap();
}

/// The description is measured, so a damaged one is another image; it must only not leave the arena,
/// which the fake machine checks at every call.
#[test]
fn damaged_descriptions_run_nothing_outside_the_arena() {
    let shape = Shape::SMALL;
    let (mut refusals, mut runs) = (0, 0);
    for (i, changed) in damaged(&shape.description()).step_by(5).enumerate() {
        let mut host = Host::on(Fake::with(changed, shape.heap(), 3), shape, |_| ());
        host.control.borrow_mut().idle = true;
        let job = host.job.clone();
        if host.call(JOB, &[&job]).is_err() {
            refusals += 1;
        } else if i % 4 == 0 {
            host.approve();
            let loaded = (0..3).try_for_each(|i| host.load(i)).and_then(|()| host.load_weights());
            if loaded.is_ok() && host.train(1, ALL, 1).is_ok() && host.call(FINISH, &[]).is_ok() {
                host.fetch();
                runs += 1;
            }
        }
    }
    assert!(refusals > 500 && runs > 30, "{refusals} refused, {runs} ran");
}

#[test]
fn descriptions_that_make_no_sense_are_refused() {
    let refuse = |from: &str, to: &str, kernels: usize| {
        let description = client::hex(&Shape::SMALL.description());
        assert!(description.contains(from), "{from}");
        let changed = client::unhex(&description.replacen(from, to, 1));
        let machine = Fake::with(changed, Shape::SMALL.heap(), kernels);
        let mut host = Host::on(machine, Shape::SMALL, |_| ());
        let job = host.job.clone();
        refused(host.call(JOB, &[&job]))
    };
    let key = |name: &str| client::hex(&encode(|w| Ok(_ = w.str(name)?)));
    assert_eq!(refuse("", "", 4), "field-wrong", "kernels linked");
    assert_eq!(refuse("", "", 2), "field-wrong", "kernels linked");
    let threads = key("threads");
    assert_eq!(refuse(&format!("{threads}01"), &format!("{threads}02"), 3), "field-wrong");
    let batch = key("batch");
    assert_eq!(refuse(&format!("{batch}04"), &format!("{batch}05"), 3), "field-wrong");
    assert_eq!(refuse(&format!("{batch}04"), &format!("{batch}00"), 3), "field-wrong");
    // `x` moves off its alignment, then out of the arena; `predict` names a kernel too many.
    let x = key("x");
    assert_eq!(refuse(&format!("{x}8200"), &format!("{x}8201"), 3), "field-wrong");
    assert_eq!(refuse(&format!("{x}820018"), &format!("{x}821a0001000018"), 3), "field-wrong");
    // `x` at the place of `y`.
    assert_eq!(refuse(&format!("{x}820018"), &format!("{x}82184018"), 3), "field-wrong");
    let predict = key("predict");
    assert_eq!(refuse(&format!("{predict}818401"), &format!("{predict}818403"), 3), "field-wrong");
    assert_eq!(refuse(&format!("{predict}818401"), &format!("{predict}818402"), 3), "field-wrong");
    let tight = Fake::with(Shape::SMALL.description(), 1_024, 3);
    let mut host = Host::on(tight, Shape::SMALL, |_| ());
    let job = host.job.clone();
    assert_eq!(refused(host.call(JOB, &[&job])), "field-wrong", "too small a heap");
}

/// The stack of an enclave's thread is 256 KiB (docs/image.md); three quarters of it must do, without
/// the optimiser's help, for a whole session.
#[test]
fn a_session_fits_its_stack() {
    let mut host = Host::small().loaded();
    host.train(3, ALL, 1).unwrap();
    host.call(FINISH, &[]).unwrap();
    host.weights();
    let log = host.log;
    let replay = move || {
        let mut session = Box::new(Session::new(Fake::new(Shape::SMALL).0));
        let mut reply = vec![0; 1 << 17];
        for request in &log {
            session.handle(request, &mut reply);
            assert_eq!(reply[..4], [0; 4]);
        }
    };
    std::thread::Builder::new().stack_size(192 << 10).spawn(replay).unwrap().join().unwrap();
}

/// A whole session for the Python client to read: vectors/enclave/session.json. Gradients are zero,
/// so that the weights depend on nothing but the generator. `MYELIN_WRITE_VECTORS=1` writes it anew.
#[test]
fn the_vectors_are_current() {
    let mut host = Host::new(Shape::SMALL, |job| {
        (job.steps, job.noise_multiplier, job.max_batch) = (3, 20_000_000, 24);
        job.epsilon = 291_300; // what dp-accounting says, rounded up
    })
    .loaded();
    host.control.borrow_mut().zero_gradients = true;
    host.train(3, ALL, 20_000_000).unwrap();
    let receipt = host.call(FINISH, &[]).unwrap();
    let nonce: [u8; 32] = Sha256::digest(&receipt).into();
    let evidence = host.call(ATTEST, &[&nonce]).unwrap();
    let envelope = host.call(OUTPUT, &[&word(1), &word(0)]).unwrap();
    let sealed = host.fetch();
    let key = open_output(&host.researcher, &host.digest, &envelope);
    let [sign_secret, hpke_seed] = Client::seeds(host.researcher.number);
    let hex = |bytes: &[u8]| serde_json::Value::from(client::hex(bytes));
    let vectors = serde_json::json!({
        "job": hex(&host.job),
        "approvals": (0..4).map(|i| hex(&host.party(i).approval(&host.digest))).collect::<Vec<_>>(),
        "commitments": host.files.each_ref().map(|file| hex(&Sha256::digest(file))),
        "nonce": hex(&nonce),
        "hpke": hex(&evidence[..1216]),
        "sign": hex(&evidence[1216..1281]),
        "report_data": hex(&evidence[1281..]),
        "receipt": hex(&receipt),
        "receiver": {
            "name": host.researcher.name,
            "sign_secret": hex(&sign_secret),
            "hpke_seed": hex(&hpke_seed),
        },
        "envelope": hex(&envelope),
        "key": hex(&key),
        "sealed": hex(&sealed),
        "weights": hex(&unseal(&key, &sealed)),
    });
    let text = serde_json::to_string_pretty(&vectors).unwrap() + "\n";
    let frames = host.log.iter().flat_map(|request| [&word(request.len()), &request[..]].concat());
    for (name, content) in [("session.json", text.into_bytes()), ("requests", frames.collect())] {
        let path = format!("{VECTORS}/{name}");
        if std::env::var_os("MYELIN_WRITE_VECTORS").is_some() {
            std::fs::create_dir_all(VECTORS).unwrap();
            std::fs::write(&path, &content).unwrap();
        }
        assert!(std::fs::read(&path).unwrap() == content, "{path} is of other code");
    }
}

/// What the fuzz target `session` does, by random scripts that mostly follow the recorded order.
#[test]
fn requests_in_any_order_damaged_or_not() {
    let log = std::fs::read(format!("{VECTORS}/requests")).unwrap();
    let whole: Vec<u8> = (0..40).flat_map(|which| [which, 0, 0, 0]).collect();
    let all = fake::drive(&log, &whole, 3);
    let mut stream = myelin_noise::Generator::new(&[9; 32]);
    let mut done = 0;
    for _ in 0..40 {
        let mut script = vec![0; 4 * 60];
        stream.fill(&mut script);
        for (i, step) in script.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            if step[3] & 7 != 0 {
                *step = [(i * 2 / 3) as u8, 0, 0, 0];
            }
        }
        done += fake::drive(&log, &script, 3);
    }
    assert!(all > 20 && done > 200, "{all} of a session, {done} of damaged ones went through");
}

#[test]
fn requests_that_are_none() {
    let mut host = Host::small();
    assert_eq!(refused(host.call(0, &[])), "operation-unknown");
    assert_eq!(refused(host.call(11, &[])), "operation-unknown");
    assert_eq!(refused(host.call(JOB, &[&vec![0; 1 << 20]])), "message-too-long");
    assert_eq!(refused(host.call(JOB, &[])), "cbor-malformed");
    for operation in [OPEN, CHUNK_IN, WEIGHTS, TRAIN, OUTPUT] {
        assert_eq!(refused(host.call(operation, &[&[0; 3]])), "field-wrong");
    }
    assert_eq!(refused(host.call(FINISH, &[&[0]])), "field-wrong");
    for request in [&[][..], &[1, 0, 0]] {
        let length = host.session.handle(request, &mut host.reply);
        assert_eq!(&host.reply[4..length], b"operation-unknown");
    }
    assert_eq!(host.session.handle(&[1, 0, 0, 0], &mut [0; 3]), 0);
}
