//! The receipt: what a run took, did and gave, signed by the instance.

use crate::cbor::{Writer, writer};
use crate::{Envelope, Job, Refusal, SigningKey, Slot};

const KIND: &str = "myelin/receipt/1";
/// Room for the body: two lists of sixteen entries below 100 bytes, and below 700 for the rest.
const BODY: usize = 4_096;

/// Number of right predictions among all test records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Score {
    /// Test records.
    pub total: u64,
    /// Of these, predicted right.
    pub correct: u64,
}

/// What a run did; the rest of the receipt comes from the job.
pub struct Receipt<'a> {
    /// The job that ran.
    pub job: &'a Job,
    /// Steps done.
    pub steps: u64,
    /// Score on the test records, where the job asks for one.
    pub score: Option<Score>,
    /// SHA-256 of the sealed file of each input.
    pub inputs: &'a dyn Fn(usize) -> Option<[u8; 32]>,
    /// SHA-256 of the trained weights.
    pub output: [u8; 32],
}

impl Receipt<'_> {
    /// Writes the receipt, signed by the instance's `key`; gives its length.
    pub fn write(&self, out: &mut [u8], key: &SigningKey) -> Result<usize, Refusal> {
        let mut body = [0; BODY];
        let mut writer = writer(&mut body);
        self.write_body(&mut writer)?;
        let length = writer.writer().position();
        Envelope::write(out, KIND, body.get(..length).unwrap_or_default(), key)
    }

    fn write_body(&self, writer: &mut Writer<'_>) -> Result<(), Refusal> {
        let Receipt { job, .. } = self;
        writer.map(7)?.str("job")?.bytes(&job.digest)?.str("image")?;
        job.image.write(writer)?;
        writer.str("score")?;
        match self.score {
            None => writer.null()?,
            Some(score) => {
                writer.map(2)?.str("total")?.u64(score.total)?.str("correct")?.u64(score.correct)?
            }
        };
        writer.str("inputs")?.array(job.sends.len() as u64)?;
        for (i, send) in job.sends.iter().enumerate() {
            let commitment = (self.inputs)(i).ok_or(Refusal::InputMissing)?;
            entry(writer, send.slot, send.party)?.str("commitment")?.bytes(&commitment)?;
        }
        let outputs = || {
            let sealed = |receive: &&crate::Receive| receive.slot == Slot::Weights;
            job.receives.iter().filter(sealed).filter_map(|receive| receive.party)
        };
        writer.str("outputs")?.array(outputs().count() as u64)?;
        for party in outputs() {
            entry(writer, Slot::Weights, party)?.str("digest")?.bytes(&self.output)?;
        }
        writer.str("privacy")?;
        crate::Privacy { steps: self.steps, ..job.privacy }.write(writer)?;
        writer.str("weights")?.bytes(&job.weights)?;
        Ok(())
    }
}

/// Begins a map of three with its slot and party.
fn entry<'w, 'a>(
    writer: &'w mut Writer<'a>,
    slot: Slot,
    party: usize,
) -> Result<&'w mut Writer<'a>, Refusal> {
    Ok(writer.map(3)?.str("slot")?.str(slot.word())?.str("party")?.u64(party as u64)?)
}
