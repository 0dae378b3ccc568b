//! Grants: an owner hands the key of one sealed file to one enclave instance.

use zeroize::Zeroizing;

use crate::cbor::Reader;
use crate::job::index;
use crate::{Encapsulated, Envelope, HpkeKey, Job, Refusal, Slot};

const KIND: &str = "myelin/grant/1";
/// Bytes of the plaintext map: it has a fixed form.
const SECRET: usize = 90;

/// A grant that names an input of the job; its signature is yet to be checked.
pub struct Grant<'b> {
    envelope: Envelope<'b>,
    ct: &'b [u8],
    enc: &'b Encapsulated,
    /// Index of the input in the job's sends.
    pub send: usize,
    party: usize,
}

/// What a grant gives.
pub struct Granted {
    /// Opens the sealed file.
    pub key: Zeroizing<[u8; 32]>,
    /// SHA-256 of the whole sealed file.
    pub commitment: [u8; 32],
}

impl<'b> Grant<'b> {
    /// Reads a grant for `job`; `grant-wrong` if the job has no such input.
    pub fn read(job: &Job, bytes: &'b [u8]) -> Result<Self, Refusal> {
        let envelope = Envelope::read(bytes, KIND)?;
        Reader::document(envelope.body, |reader| {
            reader.map(5)?;
            let ct = reader.key("ct")?.bytes()?;
            let enc = reader.key("enc")?.fixed()?;
            let digest: &[u8; 32] = reader.key("job")?.fixed()?;
            let slot = Slot::read(reader.key("slot")?)?;
            let party = index(reader.key("party")?)?;
            if *digest != job.digest {
                return Err(Refusal::JobWrong);
            }
            job.party(party)?;
            let send = job
                .sends
                .iter()
                .position(|send| (send.slot, send.party) == (slot, party))
                .ok_or(Refusal::GrantWrong)?;
            Ok((ct, enc, send, party))
        })
        .map(|(ct, enc, send, party)| Grant { envelope, ct, enc, send, party })
    }

    /// Checks the owner's signature.
    pub fn verify(&self, job: &Job) -> Result<(), Refusal> {
        self.envelope.verify(&job.party(self.party)?.sign)
    }

    /// Opens the grant by the instance's key.
    pub fn open(&self, job: &Job, key: &HpkeKey) -> Result<Granted, Refusal> {
        let mut secret = Zeroizing::new([0; SECRET]);
        key.open(KIND, &job.digest, self.enc, self.ct, &mut *secret)?;
        Reader::document(&*secret, |reader| {
            reader.map(3)?;
            let key = Zeroizing::new(*reader.key("key")?.fixed()?);
            let uses = reader.key("uses")?.unsigned()?;
            let commitment = *reader.key("commitment")?.fixed()?;
            if uses == 1 { Ok(Granted { key, commitment }) } else { Err(Refusal::GrantWrong) }
        })
    }
}
