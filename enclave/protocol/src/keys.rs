//! The instance's keys, HPKE to a key, and the report data that binds them to evidence.

use hpke::aead::{AeadTag, AesGcm256};
use hpke::kdf::HkdfSha256;
use hpke::kem::{Kem, XWing};
use hpke::{Deserializable, OpModeR, OpModeS, Serializable, setup_receiver, setup_sender_with_rng};
use p256::ecdsa::Signature;
use p256::ecdsa::signature::hazmat::PrehashSigner;
use rand_core::CryptoRng;
use sha2::{Digest, Sha512};
use zeroize::Zeroizing;

use crate::{Refusal, Sign};

/// A public sealing key: ML-KEM-768 key ‖ X25519 key.
pub type Hpke = [u8; 1216];
/// A key encapsulated by X-Wing.
pub type Encapsulated = [u8; 1120];
/// Bytes that HPKE adds to a plaintext.
pub const TAG: usize = 16;

/// A secret P-256 signing key; wiped when dropped.
pub struct SigningKey(p256::ecdsa::SigningKey);

impl SigningKey {
    /// A fresh key. A draw outside the group order (probability 2⁻³²) is drawn again.
    pub fn generate(random: &mut impl CryptoRng) -> Result<Self, Refusal> {
        let mut secret = Zeroizing::new([0; 32]);
        for _ in 0..8 {
            random.fill_bytes(&mut *secret);
            if let Ok(key) = p256::ecdsa::SigningKey::from_slice(&*secret) {
                return Ok(SigningKey(key));
            }
        }
        Err(Refusal::RandomnessFailed)
    }

    /// The public key.
    pub fn public(&self) -> Result<Sign, Refusal> {
        let point = self.0.verifying_key().to_sec1_point(false);
        point.as_bytes().try_into().map_err(|_| Refusal::SignatureWrong)
    }

    /// Signs a digest, deterministically (RFC 6979), s in the lower half.
    pub(crate) fn sign(&self, prehash: &[u8; 32]) -> Result<[u8; 64], Refusal> {
        let signature: Signature =
            self.0.sign_prehash(prehash).map_err(|_| Refusal::SignatureWrong)?;
        Ok(signature.normalize_s().to_bytes().into())
    }
}

/// A secret X-Wing key: its 32-byte seed; wiped when dropped.
pub struct HpkeKey(Zeroizing<[u8; 32]>);

impl HpkeKey {
    /// The key of a seed.
    pub fn from_seed(seed: [u8; 32]) -> Self {
        HpkeKey(Zeroizing::new(seed))
    }

    /// A fresh key.
    pub fn generate(random: &mut impl CryptoRng) -> Self {
        let mut seed = Zeroizing::new([0; 32]);
        random.fill_bytes(&mut *seed);
        HpkeKey(seed)
    }

    /// The public key.
    pub fn public(&self) -> Result<Hpke, Refusal> {
        let mut out = [0; 1216];
        XWing::sk_to_pk(&self.secret()?).write_exact(&mut out);
        Ok(out)
    }

    /// Opens `ct`, sealed to this key with `enc`, into `plaintext`, whose length must fit.
    pub fn open(
        &self,
        label: &str,
        job: &[u8; 32],
        enc: &Encapsulated,
        ct: &[u8],
        plaintext: &mut [u8],
    ) -> Result<(), Refusal> {
        let (body, tag) = ct.split_last_chunk::<TAG>().ok_or(Refusal::HpkeFailed)?;
        if body.len() != plaintext.len() {
            return Err(Refusal::HpkeFailed);
        }
        plaintext.copy_from_slice(body);
        let opened = (|| {
            let enc = <XWing as Kem>::EncappedKey::from_bytes(enc)?;
            let tag = AeadTag::<AesGcm256>::from_bytes(tag)?;
            let info = Info::new(label, job);
            setup_receiver::<AesGcm256, HkdfSha256, XWing>(
                &OpModeR::Base,
                &<XWing as Kem>::PrivateKey::from_bytes(&*self.0)?,
                &enc,
                info.bytes(),
            )?
            .open_inout_detached((&mut *plaintext).into(), &[], &tag)
        })();
        opened.map_err(|_| Refusal::HpkeFailed)
    }

    fn secret(&self) -> Result<<XWing as Kem>::PrivateKey, Refusal> {
        <XWing as Kem>::PrivateKey::from_bytes(&*self.0).map_err(|_| Refusal::HpkeFailed)
    }
}

/// Seals `plaintext` in place to `receiver`; gives the encapsulated key and the tag.
pub fn seal_to(
    receiver: &Hpke,
    label: &str,
    job: &[u8; 32],
    plaintext: &mut [u8],
    random: &mut impl CryptoRng,
) -> Result<(Encapsulated, [u8; TAG]), Refusal> {
    let receiver = public_key(receiver).ok_or(Refusal::HpkeFailed)?;
    let info = Info::new(label, job);
    let (mut enc, mut tag) = ([0; 1120], [0; TAG]);
    setup_sender_with_rng::<AesGcm256, HkdfSha256, XWing>(
        &OpModeS::Base,
        &receiver,
        info.bytes(),
        random,
    )
    .and_then(|(encapsulated, mut context)| {
        encapsulated.write_exact(&mut enc);
        context.seal_inout_detached(plaintext.into(), &[])
    })
    .map_err(|_| Refusal::HpkeFailed)?
    .write_exact(&mut tag);
    Ok((enc, tag))
}

/// The X-Wing key of `bytes`, if its ML-KEM part is well formed.
pub(crate) fn public_key(bytes: &Hpke) -> Option<<XWing as Kem>::PublicKey> {
    <XWing as Kem>::PublicKey::from_bytes(bytes).ok()
}

/// The 64 bytes that evidence carries: SHA-512 over `nonce`, the instance's keys and the job.
pub fn report_data(nonce: &[u8; 32], hpke: &Hpke, sign: &Sign, job: &[u8; 32]) -> [u8; 64] {
    let mut hash = Sha512::new_with_prefix(b"myelin/report-data/1\0");
    for part in [nonce.as_slice(), hpke, sign, job] {
        hash.update((part.len() as u32).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

/// HPKE info: `label ‖ 0x00 ‖ job digest`.
struct Info {
    buffer: [u8; 64],
    length: usize,
}

impl Info {
    fn new(label: &str, job: &[u8; 32]) -> Self {
        let mut info = Info { buffer: [0; 64], length: 0 };
        for byte in label.bytes().chain([0]).chain(*job) {
            if let Some(place) = info.buffer.get_mut(info.length) {
                *place = byte;
            }
            info.length = info.length.saturating_add(1);
        }
        info
    }

    fn bytes(&self) -> &[u8] {
        self.buffer.get(..self.length).unwrap_or_default()
    }
}
