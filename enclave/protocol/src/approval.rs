//! Approvals: a party's signature under a job.

use crate::cbor::Reader;
use crate::{Envelope, Job, Refusal};

const KIND: &str = "myelin/approval/1";

/// Checks an approval of `job`; gives the index of the party that signed it.
pub fn approve(job: &Job, bytes: &[u8]) -> Result<usize, Refusal> {
    let envelope = Envelope::read(bytes, KIND)?;
    let (digest, sign) = Reader::document(envelope.body, |reader| {
        reader.map(2)?;
        Ok((reader.key("job")?.fixed::<32>()?, reader.key("sign")?.fixed()?))
    })?;
    if *digest != job.digest {
        return Err(Refusal::JobWrong);
    }
    let party = job.signer(sign).ok_or(Refusal::PartyUnknown)?;
    envelope.verify(sign)?;
    Ok(party)
}
