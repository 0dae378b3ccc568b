//! The session: ten operations, one job, then the end.

use myelin_noise::Generator;
use myelin_protocol::{
    CHUNK_TAG, Grant, HEADER, Hpke, HpkeKey, Job, List, Receipt, Refusal, Sealed, Sign, SigningKey,
    Slot, approve, report_data, write_output,
};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::Machine;
use crate::input::{Input, Shard};
use crate::memory::Memory;
use crate::plan::{Loss, Plan};
use crate::training::{Engine, Limits};

/// The most bytes of a request: operation and arguments.
const REQUEST: usize = 1 << 20;
/// The most bytes of a signed envelope that comes in.
const ENVELOPE: usize = 4_096;

/// One enclave instance. It serves one job.
pub struct Session<M> {
    machine: M,
    /// None of it where the image's description is not in order; every job is refused then.
    engine: Result<Engine, Refusal>,
    job: Job,
    instance: Option<Instance>,
    phase: Phase,
}

/// A job under way.
struct Instance {
    hpke: Hpke,
    sign: Sign,
    approved: List<usize>,
    inputs: List<Input>,
    initial: Initial,
    steps: u32,
}

/// What may be done.
enum Phase {
    /// The job comes in.
    Waiting,
    /// Documents, inputs and steps come in.
    Running(Secrets),
    /// The sealed weights go out: the generator for envelopes, one output an entry of `receives`.
    Finished(Generator, List<Option<Output>>),
    /// All secrets are wiped.
    Ended,
}

/// Made inside, never exported, wiped when dropped.
struct Secrets {
    generator: Generator,
    hpke: HpkeKey,
    sign: SigningKey,
}

/// The initial weights as they come in.
#[derive(Default)]
struct Initial {
    received: usize,
    hash: Sha256,
}

/// The trained weights for one receiver.
struct Output {
    slot: Slot,
    party: usize,
    key: Zeroizing<[u8; 32]>,
    sealed: Sealed,
    taken: bool,
}

impl<M: Machine> Session<M> {
    /// A session that waits for its job.
    pub fn new(mut machine: M) -> Self {
        let engine = Plan::read(&machine).and_then(|plan| {
            let memory = Memory::new(&mut machine, &plan)?;
            Ok(Engine { plan, memory })
        });
        Session { machine, engine, job: Job::default(), instance: None, phase: Phase::Waiting }
    }

    /// Serves one request, a private copy of what the host sent; gives the reply's length.
    ///
    /// The reply is a status and a result, or a status and the reason of the refusal.
    pub fn handle(&mut self, request: &[u8], reply: &mut [u8]) -> usize {
        let Some((status, result)) = reply.split_first_chunk_mut::<4>() else { return 0 };
        let (code, length) = match self.operate(request, result) {
            Ok(length) => (0, length),
            Err(refusal) => {
                let reason = refusal.reason().as_bytes();
                for (place, byte) in result.iter_mut().zip(reason) {
                    *place = *byte;
                }
                (refusal.status(), reason.len().min(result.len()))
            }
        };
        *status = code.to_le_bytes();
        length.saturating_add(status.len())
    }

    fn operate(&mut self, request: &[u8], result: &mut [u8]) -> Result<usize, Refusal> {
        if request.len() > REQUEST {
            return Err(Refusal::MessageTooLong);
        }
        let (operation, mut arguments) =
            request.split_first_chunk::<4>().ok_or(Refusal::OperationUnknown)?;
        let arguments = &mut arguments;
        match u32::from_le_bytes(*operation) {
            1 => self.job(arguments),
            2 => self.approve(arguments),
            3 => self.attest(only(arguments)?, result),
            4 => self.grant(arguments),
            5 => self.open(word(arguments)?, only(arguments)?),
            6 => self.chunks(word(arguments)?, long(arguments)?, arguments),
            7 => self.weights(long(arguments)?, arguments),
            8 => {
                let (steps, rate, noise) = (word(arguments)?, long(arguments)?, long(arguments)?);
                only::<0>(arguments)?;
                self.train(steps, rate, noise, result)
            }
            9 => {
                only::<0>(arguments)?;
                self.finish(result)
            }
            10 => {
                let (index, part) = (word(arguments)?, word(arguments)?);
                only::<0>(arguments)?;
                self.output(index, part, result)
            }
            _ => Err(Refusal::OperationUnknown),
        }
    }

    fn job(&mut self, document: &[u8]) -> Result<usize, Refusal> {
        if !matches!(self.phase, Phase::Waiting) {
            return Err(Refusal::WrongState);
        }
        let Engine { plan, memory } = self.engine.as_ref().map_err(|refusal| *refusal)?;
        let job = &mut self.job;
        job.read(document)?;
        Limits::new(&job.privacy, plan).ok_or(Refusal::JobWrong)?;
        if job.has(Slot::Score) && plan.loss == Loss::MeanSquaredError {
            return Err(Refusal::JobWrong);
        }
        let mut inputs = List::default();
        let places = memory.place(job, plan)?;
        for (send, place) in job.sends.iter().zip(places.iter()) {
            inputs.push(Input::new(*send, place.clone(), plan.record()))?;
        }
        let mut seed = Zeroizing::new([0; 32]);
        self.machine.entropy(&mut *seed)?;
        let mut generator = Generator::new(&seed);
        let hpke = HpkeKey::generate(&mut generator);
        let sign = SigningKey::generate(&mut generator)?;
        self.instance = Some(Instance {
            hpke: hpke.public()?,
            sign: sign.public()?,
            approved: List::default(),
            inputs,
            initial: Initial::default(),
            steps: 0,
        });
        self.phase = Phase::Running(Secrets { generator, hpke, sign });
        Ok(0)
    }

    fn approve(&mut self, approval: &[u8]) -> Result<usize, Refusal> {
        let Instance { approved, .. } = running(&mut self.instance, &mut self.phase)?.0;
        let party = approve(&self.job, bounded(approval)?)?;
        if approved.iter().any(|other| *other == party) {
            return Err(Refusal::ApprovalDuplicate);
        }
        approved.push(party)?;
        Ok(0)
    }

    fn attest(&mut self, nonce: &[u8; 32], result: &mut [u8]) -> Result<usize, Refusal> {
        let instance = self.instance.as_ref().ok_or(Refusal::WrongState)?;
        instance.check_approvals(&self.job)?;
        let (job, Instance { hpke, sign, .. }) = (&self.job, instance);
        put(result, &[hpke, sign, &report_data(nonce, hpke, sign, &job.digest)])
    }

    fn grant(&mut self, grant: &[u8]) -> Result<usize, Refusal> {
        let (instance, secrets) = running(&mut self.instance, &mut self.phase)?;
        instance.check_approvals(&self.job)?;
        let (job, Instance { inputs, .. }) = (&self.job, instance);
        let grant = Grant::read(job, bounded(grant)?)?;
        let input = inputs.get_mut(grant.send).ok_or(Refusal::GrantWrong)?;
        input.expects_grant()?;
        grant.verify(job).inspect_err(|_| input.kill())?;
        let granted = grant.open(job, &secrets.hpke)?;
        // Every owner's key renews the generator, so nobody need trust the processor's entropy alone.
        let (mut old, mut fresh) = (Zeroizing::new([0; 32]), Zeroizing::new([0; 32]));
        self.machine.entropy(&mut *fresh)?;
        secrets.generator.fill(&mut *old);
        let mut seed = Zeroizing::new([0; 32]);
        let mut hash = Sha256::new_with_prefix(b"myelin/reseed/1\0");
        for part in [&old, &fresh, &granted.key] {
            hash.update(part.as_slice());
        }
        hash.finalize_into((&mut *seed).into());
        secrets.generator = Generator::new(&seed);
        input.grant(granted);
        Ok(0)
    }

    fn open(&mut self, index: u32, header: &[u8; HEADER]) -> Result<usize, Refusal> {
        let inputs = &mut running(&mut self.instance, &mut self.phase)?.0.inputs;
        inputs.get_mut(index as usize).ok_or(Refusal::FieldWrong)?.open(header)?;
        Ok(0)
    }

    fn chunks(&mut self, index: u32, first: u64, chunks: &[u8]) -> Result<usize, Refusal> {
        let inputs = &mut running(&mut self.instance, &mut self.phase)?.0.inputs;
        let input = inputs.get_mut(index as usize).ok_or(Refusal::FieldWrong)?;
        let engine = self.engine.as_mut().map_err(|refusal| *refusal)?;
        input.chunks(&mut engine.memory, first, chunks)?;
        Ok(0)
    }

    fn weights(&mut self, offset: u64, part: &[u8]) -> Result<usize, Refusal> {
        let Instance { initial, .. } = running(&mut self.instance, &mut self.phase)?.0;
        let Engine { plan, memory } = self.engine.as_mut().map_err(|refusal| *refusal)?;
        let weights = memory.bytes_mut(plan.buffers.weights);
        let end = initial.received.saturating_add(part.len());
        let place = weights.get_mut(initial.received..end).ok_or(Refusal::WeightsOrder)?;
        if offset != initial.received as u64 || part.is_empty() {
            return Err(Refusal::WeightsOrder);
        }
        place.copy_from_slice(part);
        initial.hash.update(part);
        initial.received = end;
        if end == weights.len() && initial.hash.clone().finalize() != self.job.weights {
            *initial = Initial::default();
            return Err(Refusal::WeightsDigestWrong);
        }
        Ok(0)
    }

    fn train(
        &mut self,
        steps: u32,
        sample_rate: u64,
        noise_multiplier: u64,
        result: &mut [u8],
    ) -> Result<usize, Refusal> {
        let (instance, secrets) = running(&mut self.instance, &mut self.phase)?;
        let engine = self.engine.as_mut().map_err(|refusal| *refusal)?;
        instance.check_inputs(engine)?;
        let privacy = self.job.privacy;
        let total = instance.steps.checked_add(steps).ok_or(Refusal::StepsExceeded)?;
        if u64::from(total) > privacy.steps {
            return Err(Refusal::StepsExceeded);
        }
        if sample_rate > privacy.sample_rate {
            return Err(Refusal::SampleRateRaised);
        }
        if noise_multiplier < privacy.noise_multiplier {
            return Err(Refusal::NoiseLowered);
        }
        // Less use of the data would be as private, but not what the receipt says was done.
        if (sample_rate, noise_multiplier) != (privacy.sample_rate, privacy.noise_multiplier) {
            return Err(Refusal::FieldWrong);
        }
        let limits = Limits::new(&privacy, &engine.plan).ok_or(Refusal::LimitExceeded)?;
        let shards = instance.shards(Slot::Records)?;
        let (machine, generator) = (&mut self.machine, &mut secrets.generator);
        for number in instance.steps..total {
            let number = number.saturating_add(1);
            // Counted before it runs: a step that fails half-way has spent its budget.
            instance.steps = number;
            if let Err(refusal) = engine.step(machine, &shards, &limits, number, generator) {
                self.end();
                return Err(refusal);
            }
        }
        put(result, &[&total.to_le_bytes()])
    }

    fn finish(&mut self, result: &mut [u8]) -> Result<usize, Refusal> {
        let (instance, secrets) = running(&mut self.instance, &mut self.phase)?;
        let engine = self.engine.as_mut().map_err(|refusal| *refusal)?;
        instance.check_inputs(engine)?;
        let mut score = None;
        if self.job.has(Slot::Score) {
            match engine.score(&mut self.machine, &instance.shards(Slot::Test)?) {
                Ok(found) => score = Some(found),
                Err(refusal) => {
                    self.end();
                    return Err(refusal);
                }
            }
        }
        let weights = engine.plan.buffers.weights;
        let receipt = Receipt {
            job: &self.job,
            steps: u64::from(instance.steps),
            score,
            inputs: &|i| instance.inputs.get(i)?.loaded().ok().map(|(_, commitment)| *commitment),
            output: Sha256::digest(engine.memory.bytes(weights)).into(),
        };
        let length = receipt.write(result, &secrets.sign)?;
        let mut outputs = List::default();
        for receive in self.job.receives.iter() {
            outputs.push(receive.party.map(|party| {
                let (mut key, mut salt) = (Zeroizing::new([0; 32]), [0; 32]);
                secrets.generator.fill(&mut *key);
                secrets.generator.fill(&mut salt);
                let sealed = Sealed::create(&key, &salt, weights.bytes as u64);
                Output { slot: receive.slot, party, key, sealed, taken: false }
            }))?;
        }
        self.phase = Phase::Finished(secrets.generator.fork(), outputs);
        engine.memory.wipe(Some(weights));
        self.machine.wipe();
        self.end_if_all_taken();
        Ok(length)
    }

    fn output(&mut self, index: u32, part: u32, result: &mut [u8]) -> Result<usize, Refusal> {
        let Phase::Finished(generator, outputs) = &mut self.phase else {
            return Err(Refusal::WrongState);
        };
        let output = outputs.get_mut(index as usize).and_then(Option::as_mut);
        let output = output.ok_or(Refusal::OutputUnknown)?;
        let number = match part {
            0 => {
                let Output { slot, party, key, .. } = output;
                return write_output(result, &self.job, *slot, *party, key, generator);
            }
            1 => return put(result, &[output.sealed.header()]),
            part => u64::from(part.saturating_sub(2)),
        };
        let Some((offset, bytes)) = output.sealed.chunk(number) else {
            output.taken = true;
            self.end_if_all_taken();
            return Ok(0);
        };
        let Engine { plan, memory } = self.engine.as_mut().map_err(|refusal| *refusal)?;
        let weights = memory.bytes(plan.buffers.weights).get(offset..);
        let plaintext = weights.and_then(|rest| rest.get(..bytes)).ok_or(Refusal::OutputUnknown)?;
        let length = put(result, &[plaintext, &[0; CHUNK_TAG]])?;
        let (text, rest) = result.split_at_mut(bytes);
        let tag = output.sealed.encrypt(number, text)?;
        put(rest, &[&tag])?;
        Ok(length)
    }

    /// Ends the job once every receiver's weights went out to the last byte.
    fn end_if_all_taken(&mut self) {
        if let Phase::Finished(_, outputs) = &self.phase
            && outputs.iter().flatten().all(|output| output.taken)
        {
            self.end();
        }
    }

    /// Wipes every secret; what is left can only attest.
    fn end(&mut self) {
        if let Ok(engine) = &mut self.engine {
            engine.memory.wipe(None);
        }
        self.machine.wipe();
        self.phase = Phase::Ended;
    }
}

impl Instance {
    fn check_approvals(&self, job: &Job) -> Result<(), Refusal> {
        if self.approved.len() == job.parties.len() {
            Ok(())
        } else {
            Err(Refusal::ApprovalMissing)
        }
    }

    /// Every input and all of the initial weights must be there before any work.
    fn check_inputs(&self, engine: &Engine) -> Result<(), Refusal> {
        self.inputs.iter().try_for_each(|input| input.loaded().map(|_| ()))?;
        if self.initial.received == engine.plan.buffers.weights.bytes {
            Ok(())
        } else {
            Err(Refusal::InputMissing)
        }
    }

    /// The loaded inputs of `slot`, in order.
    fn shards(&self, slot: Slot) -> Result<List<Shard>, Refusal> {
        let mut shards = List::default();
        for input in self.inputs.iter().filter(|input| input.send().slot == slot) {
            shards.push(input.loaded()?.0.clone())?;
        }
        Ok(shards)
    }
}

/// The instance and its secrets while the job runs.
fn running<'a>(
    instance: &'a mut Option<Instance>,
    phase: &'a mut Phase,
) -> Result<(&'a mut Instance, &'a mut Secrets), Refusal> {
    match (instance, phase) {
        (Some(instance), Phase::Running(secrets)) => Ok((instance, secrets)),
        _ => Err(Refusal::WrongState),
    }
}

/// Takes a u32 off the arguments.
fn word(arguments: &mut &[u8]) -> Result<u32, Refusal> {
    first(arguments).map(u32::from_le_bytes)
}

/// Takes a u64 off the arguments.
fn long(arguments: &mut &[u8]) -> Result<u64, Refusal> {
    first(arguments).map(u64::from_le_bytes)
}

fn first<const N: usize>(arguments: &mut &[u8]) -> Result<[u8; N], Refusal> {
    let (value, rest) = arguments.split_first_chunk().ok_or(Refusal::FieldWrong)?;
    *arguments = rest;
    Ok(*value)
}

/// What is left of the arguments, which must be `N` bytes.
fn only<'a, const N: usize>(arguments: &mut &'a [u8]) -> Result<&'a [u8; N], Refusal> {
    (*arguments).try_into().map_err(|_| Refusal::FieldWrong)
}

/// An envelope that came in, if it is not too long to be one.
fn bounded(envelope: &[u8]) -> Result<&[u8], Refusal> {
    if envelope.len() > ENVELOPE { Err(Refusal::MessageTooLong) } else { Ok(envelope) }
}

/// Writes `parts` one after the other; gives their length.
fn put(result: &mut [u8], parts: &[&[u8]]) -> Result<usize, Refusal> {
    let mut rest = &mut *result;
    let mut length = 0_usize;
    for part in parts {
        let (place, others) =
            rest.split_at_mut_checked(part.len()).ok_or(Refusal::MessageTooLong)?;
        place.copy_from_slice(part);
        rest = others;
        length = length.saturating_add(part.len());
    }
    Ok(length)
}
