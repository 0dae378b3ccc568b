//! Output envelopes: the key of a sealed output, sealed to its receiver.

use rand_core::CryptoRng;
use zeroize::Zeroizing;

use crate::cbor::writer;
use crate::keys::{TAG, seal_to};
use crate::{Job, Refusal, Slot};

const KIND: &str = "myelin/output/1";
/// Bytes of the plaintext map `{ "key": bytes(32) }`.
const SECRET: usize = 39;

/// Writes the envelope that gives `key` to `party` for its `slot`; gives its length.
pub fn write_output(
    out: &mut [u8],
    job: &Job,
    slot: Slot,
    party: usize,
    key: &[u8; 32],
    random: &mut impl CryptoRng,
) -> Result<usize, Refusal> {
    let mut ct = Zeroizing::new([0; SECRET + TAG]);
    writer(&mut *ct).map(1)?.str("key")?.bytes(key)?;
    let (secret, place) = ct.split_at_mut(SECRET);
    let (enc, tag) = seal_to(&job.party(party)?.hpke, KIND, &job.digest, secret, random)?;
    place.copy_from_slice(&tag);
    let mut writer = writer(out);
    writer.map(6)?.str("ct")?.bytes(&*ct)?.str("enc")?.bytes(&enc)?;
    writer.str("job")?.bytes(&job.digest)?.str("slot")?.str(slot.word())?;
    writer.str("type")?.str(KIND)?.str("party")?.u64(party as u64)?;
    Ok(writer.writer().position())
}
