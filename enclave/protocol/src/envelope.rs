//! The signed envelope, the form of every signed document.

use p256::ecdsa::signature::hazmat::PrehashVerifier;
use p256::ecdsa::{Signature, VerifyingKey};
use sha2::{Digest, Sha256};

use crate::cbor::{Reader, writer};
use crate::{Refusal, SigningKey};

/// A public signing key: SEC 1 uncompressed point.
pub type Sign = [u8; 65];

/// A signed envelope whose type is known to be right and whose signature is yet to be checked.
pub struct Envelope<'b> {
    kind: &'static str,
    /// The signed document, not to be trusted before [`Envelope::verify`].
    pub body: &'b [u8],
    signature: &'b [u8; 64],
}

impl<'b> Envelope<'b> {
    /// Reads an envelope of type `kind`.
    pub fn read(bytes: &'b [u8], kind: &'static str) -> Result<Self, Refusal> {
        Reader::document(bytes, |reader| {
            reader.map(3)?;
            let body = reader.key("body")?.bytes()?;
            reader.key("type")?.kind(kind)?;
            let signature = reader.key("signature")?.fixed()?;
            Ok(Envelope { kind, body, signature })
        })
    }

    /// Checks the signature by `sign`; the upper half of s is refused, so a document has one form.
    pub fn verify(&self, sign: &Sign) -> Result<(), Refusal> {
        let key = verifying_key(sign).ok_or(Refusal::SignatureWrong)?;
        let signature =
            Signature::from_slice(self.signature).map_err(|_| Refusal::SignatureWrong)?;
        if signature.normalize_s() != signature {
            return Err(Refusal::SignatureWrong);
        }
        key.verify_prehash(&prehash(self.kind, self.body), &signature)
            .map_err(|_| Refusal::SignatureWrong)
    }

    /// Signs `body` as a document of type `kind` into `out`; gives the envelope's length.
    pub fn write(
        out: &mut [u8],
        kind: &str,
        body: &[u8],
        key: &SigningKey,
    ) -> Result<usize, Refusal> {
        let signature = key.sign(&prehash(kind, body))?;
        let mut writer = writer(out);
        writer.map(3)?.str("body")?.bytes(body)?;
        writer.str("type")?.str(kind)?;
        writer.str("signature")?.bytes(&signature)?;
        Ok(writer.writer().position())
    }
}

/// The key whose uncompressed point is `sign`, if it is on the curve.
pub(crate) fn verifying_key(sign: &Sign) -> Option<VerifyingKey> {
    VerifyingKey::from_sec1_bytes(sign).ok()
}

/// SHA-256 of what is signed: `kind ‖ 0x00 ‖ body`.
fn prehash(kind: &str, body: &[u8]) -> [u8; 32] {
    Sha256::new().chain_update(kind).chain_update([0]).chain_update(body).finalize().into()
}
