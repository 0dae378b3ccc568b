//! The job: one document that every party approves.

use sha2::{Digest, Sha256};

use crate::cbor::{Reader, Writer};
use crate::envelope::verifying_key;
use crate::keys::public_key;
use crate::list::MOST;
use crate::{Hpke, List, Refusal, Sign};

/// The most bytes of a job document.
pub const JOB_BYTES: usize = 65_536;

const KIND: &str = "myelin/job/1";
const SAMPLER: &str = "poisson";
const NEIGHBORING_RELATION: &str = "add-or-remove-one";

/// A job, checked; by default none.
#[derive(Default)]
pub struct Job {
    /// SHA-256 of the document: the job's name everywhere.
    pub digest: [u8; 32],
    /// The image that runs it.
    pub image: Image,
    /// Inputs, in the order in which operations index them.
    pub sends: List<Send>,
    /// Everyone who must approve.
    pub parties: List<Party>,
    /// Limits of the training.
    pub privacy: Privacy,
    /// SHA-256 of the initial flat weights.
    pub weights: [u8; 32],
    /// Outputs, in the order in which operations index them.
    pub receives: List<Receive>,
}

/// What an image is known by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Image {
    /// SHA-256 of the ELF file.
    pub digest: [u8; 32],
    /// MRENCLAVE.
    pub measurement: [u8; 32],
}

/// A party's public keys.
pub struct Party {
    /// Where outputs for it are sealed to.
    pub hpke: Hpke,
    /// What it signs with.
    pub sign: Sign,
}

/// The four slots of a training job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// Training records, sent.
    Records,
    /// Test records, sent.
    Test,
    /// Trained weights, received.
    Weights,
    /// Number of right predictions on the test records, received by the public.
    Score,
}

/// An input: a slot, its owner and the records that it has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Send {
    /// `Records` or `Test`.
    pub slot: Slot,
    /// Index of its owner in the job's parties.
    pub party: usize,
    /// Records of its file, padding included.
    pub capacity: u64,
}

/// An output: a slot and its receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receive {
    /// `Weights` or `Score`.
    pub slot: Slot,
    /// Index of its receiver in the job's parties; none: public.
    pub party: Option<usize>,
}

/// The integers that limit the training; units as in docs/protocol.md.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is the field of docs/protocol.md of the same name")]
pub struct Privacy {
    pub delta: u64,
    pub steps: u64,
    pub epsilon: u64,
    pub max_batch: u64,
    pub sample_rate: u64,
    pub max_grad_norm: u64,
    pub expected_batch: u64,
    pub noise_multiplier: u64,
}

impl Job {
    /// Reads and checks a job document, in place: a job is large for an enclave's stack. After a
    /// refusal this is no job.
    ///
    /// `message-too-long` above [`JOB_BYTES`]; `party-unknown` for an index outside `parties`;
    /// `job-wrong` for a job that is well formed but makes no sense.
    pub fn read(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        if bytes.len() > JOB_BYTES {
            return Err(Refusal::MessageTooLong);
        }
        self.digest = Sha256::digest(bytes).into();
        Reader::document(bytes, |reader| {
            reader.map(7)?;
            reader.key("type")?.kind(KIND)?;
            self.image = Image::read(reader.key("image")?)?;
            fill(&mut self.sends, reader.key("sends")?, Send::read)?;
            fill(&mut self.parties, reader.key("parties")?, Party::read)?;
            self.privacy = Privacy::read(reader.key("privacy")?)?;
            self.weights = *reader.key("weights")?.fixed()?;
            fill(&mut self.receives, reader.key("receives")?, Receive::read)
        })?;
        self.check()
    }

    /// The party with this signing key.
    pub fn signer(&self, sign: &Sign) -> Option<usize> {
        self.parties.iter().position(|party| party.sign == *sign)
    }

    /// The party at `index`, or `party-unknown`.
    pub fn party(&self, index: usize) -> Result<&Party, Refusal> {
        self.parties.get(index).ok_or(Refusal::PartyUnknown)
    }

    /// Whether someone sends (`Records`, `Test`) or receives (`Weights`, `Score`) this slot.
    pub fn has(&self, slot: Slot) -> bool {
        self.sends.iter().any(|send| send.slot == slot)
            || self.receives.iter().any(|receive| receive.slot == slot)
    }

    /// Records of all inputs of `slot`, padding included; none on overflow.
    pub fn capacity(&self, slot: Slot) -> Option<u64> {
        self.sends
            .iter()
            .filter(|send| send.slot == slot)
            .try_fold(0_u64, |total, send| total.checked_add(send.capacity))
    }

    fn check(&self) -> Result<(), Refusal> {
        for send in self.sends.iter() {
            self.party(send.party)?;
        }
        for party in self.receives.iter().filter_map(|receive| receive.party) {
            self.party(party)?;
        }
        let sensible = self.has(Slot::Records)
            && (self.has(Slot::Test) || !self.has(Slot::Score))
            && self.sends.iter().all(|send| {
                matches!(send.slot, Slot::Records | Slot::Test)
                    && send.capacity > 0
                    && u32::try_from(send.capacity).is_ok()
            })
            && self.receives.iter().all(|receive| {
                // The score stands in the receipt, which anyone may read.
                matches!(
                    (receive.slot, receive.party),
                    (Slot::Weights, Some(_)) | (Slot::Score, None)
                )
            })
            && distinct(&self.sends, |a, b| (a.slot, a.party) == (b.slot, b.party))
            && distinct(&self.receives, |a, b| a == b)
            && distinct(&self.parties, |a, b| a.sign == b.sign)
            && self.parties.iter().all(Party::is_usable)
            && self.privacy.is_sensible();
        if sensible { Ok(()) } else { Err(Refusal::JobWrong) }
    }
}

impl Image {
    fn read(reader: &mut Reader<'_>) -> Result<Self, Refusal> {
        reader.map(2)?;
        Ok(Image {
            digest: *reader.key("digest")?.fixed()?,
            measurement: *reader.key("measurement")?.fixed()?,
        })
    }

    /// Writes the map.
    pub fn write(&self, writer: &mut Writer<'_>) -> Result<(), Refusal> {
        writer.map(2)?.str("digest")?.bytes(&self.digest)?;
        writer.str("measurement")?.bytes(&self.measurement)?;
        Ok(())
    }
}

impl Party {
    fn read(reader: &mut Reader<'_>) -> Result<Self, Refusal> {
        reader.map(3)?;
        let hpke = *reader.key("hpke")?.fixed()?;
        let name = reader.key("name")?.text()?;
        let sign = *reader.key("sign")?.fixed()?;
        if name.is_empty() || name.len() > 64 {
            return Err(Refusal::FieldWrong);
        }
        Ok(Party { hpke, sign })
    }

    /// Whether both keys are keys.
    fn is_usable(&self) -> bool {
        verifying_key(&self.sign).is_some() && public_key(&self.hpke).is_some()
    }
}

impl Slot {
    /// Reads the slot's word.
    pub fn read(reader: &mut Reader<'_>) -> Result<Self, Refusal> {
        let word = reader.text()?;
        [Slot::Records, Slot::Test, Slot::Weights, Slot::Score]
            .into_iter()
            .find(|slot| slot.word() == word)
            .ok_or(Refusal::FieldWrong)
    }

    /// The slot's word.
    pub fn word(self) -> &'static str {
        match self {
            Slot::Records => "records",
            Slot::Test => "test",
            Slot::Weights => "weights",
            Slot::Score => "score",
        }
    }
}

impl Send {
    fn read(reader: &mut Reader<'_>) -> Result<Self, Refusal> {
        reader.map(3)?;
        Ok(Send {
            slot: Slot::read(reader.key("slot")?)?,
            party: index(reader.key("party")?)?,
            capacity: reader.key("capacity")?.unsigned()?,
        })
    }
}

impl Receive {
    fn read(reader: &mut Reader<'_>) -> Result<Self, Refusal> {
        reader.map(2)?;
        Ok(Receive {
            slot: Slot::read(reader.key("slot")?)?,
            party: reader.key("party")?.optional(index)?,
        })
    }
}

impl Privacy {
    fn read(reader: &mut Reader<'_>) -> Result<Self, Refusal> {
        reader.map(10)?;
        let delta = reader.key("delta")?.unsigned()?;
        let steps = reader.key("steps")?.unsigned()?;
        let epsilon = reader.key("epsilon")?.unsigned()?;
        let sampler = reader.key("sampler")?.text()?;
        let privacy = Privacy {
            delta,
            steps,
            epsilon,
            max_batch: reader.key("max_batch")?.unsigned()?,
            sample_rate: reader.key("sample_rate")?.unsigned()?,
            max_grad_norm: reader.key("max_grad_norm")?.unsigned()?,
            expected_batch: reader.key("expected_batch")?.unsigned()?,
            noise_multiplier: reader.key("noise_multiplier")?.unsigned()?,
        };
        let relation = reader.key("neighboring_relation")?.text()?;
        if (sampler, relation) == (SAMPLER, NEIGHBORING_RELATION) {
            Ok(privacy)
        } else {
            Err(Refusal::FieldWrong)
        }
    }

    /// Writes the map.
    pub fn write(&self, writer: &mut Writer<'_>) -> Result<(), Refusal> {
        writer.map(10)?.str("delta")?.u64(self.delta)?;
        writer.str("steps")?.u64(self.steps)?;
        writer.str("epsilon")?.u64(self.epsilon)?;
        writer.str("sampler")?.str(SAMPLER)?;
        writer.str("max_batch")?.u64(self.max_batch)?;
        writer.str("sample_rate")?.u64(self.sample_rate)?;
        writer.str("max_grad_norm")?.u64(self.max_grad_norm)?;
        writer.str("expected_batch")?.u64(self.expected_batch)?;
        writer.str("noise_multiplier")?.u64(self.noise_multiplier)?;
        writer.str("neighboring_relation")?.str(NEIGHBORING_RELATION)?;
        Ok(())
    }

    /// All at least one but the rate, which is at most 2³² (one); steps and batch in 32 bits.
    fn is_sensible(&self) -> bool {
        self.max_grad_norm > 0
            && self.noise_multiplier > 0
            && self.expected_batch > 0
            && (1..=u64::from(u32::MAX)).contains(&self.max_batch)
            && (1..=u64::from(u32::MAX)).contains(&self.steps)
            && self.sample_rate <= 1 << 32
    }
}

/// A party's index.
pub(crate) fn index(reader: &mut Reader<'_>) -> Result<usize, Refusal> {
    usize::try_from(reader.unsigned()?).map_err(|_| Refusal::PartyUnknown)
}

fn fill<'b, T>(
    list: &mut List<T>,
    reader: &mut Reader<'b>,
    read: impl Fn(&mut Reader<'b>) -> Result<T, Refusal>,
) -> Result<(), Refusal> {
    list.clear();
    for _ in 0..reader.list(MOST)? {
        list.push(read(reader)?)?;
    }
    Ok(())
}

/// Whether no two items are the `same`.
fn distinct<T>(list: &List<T>, same: impl Fn(&T, &T) -> bool) -> bool {
    list.iter().enumerate().all(|(i, a)| list.iter().take(i).all(|b| !same(a, b)))
}
