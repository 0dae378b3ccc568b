//! Sealed files: a 96-byte header and AES-256-GCM chunks.

use aes_gcm::aead::inout::InOutBuf;
use aes_gcm::aead::{AeadInOut, KeyInit};
use aes_gcm::{Aes256Gcm, Nonce};
use hkdf::Hkdf;
use sha2::Sha256;
use zeroize::Zeroizing;

use crate::Refusal;

/// Bytes of the header.
pub const HEADER: usize = 96;
/// Plaintext bytes of every chunk but the last.
pub const CHUNK: usize = 65_536;
/// Bytes of a chunk's tag, after its ciphertext.
pub const CHUNK_TAG: usize = 16;

const MAGIC: &[u8; 16] = b"myelin/sealed/1\n";

/// One sealed file: its header and its encryption key; the key is wiped when dropped.
pub struct Sealed {
    header: [u8; HEADER],
    length: u64,
    key: Zeroizing<[u8; 32]>,
}

impl Sealed {
    /// Begins a new file of `length` plaintext bytes. `key` is used for this file only.
    pub fn create(key: &[u8; 32], salt: &[u8; 32], length: u64) -> Self {
        let (key, commitment) = derive(key, salt);
        let mut header = [0; HEADER];
        let fields = [MAGIC.as_slice(), salt, &commitment, &length.to_le_bytes(), &chunk_field()];
        for (place, byte) in header.iter_mut().zip(fields.into_iter().flatten()) {
            *place = *byte;
        }
        Sealed { header, length, key }
    }

    /// Begins to read the file with this header by `key`.
    pub fn open(key: &[u8; 32], header: &[u8; HEADER]) -> Result<Self, Refusal> {
        let (magic, rest) = header.split_first_chunk::<16>().ok_or(Refusal::SealedHeaderWrong)?;
        let (salt, rest) = rest.split_first_chunk::<32>().ok_or(Refusal::SealedHeaderWrong)?;
        let (committed, rest) = rest.split_first_chunk::<32>().ok_or(Refusal::SealedHeaderWrong)?;
        let (length, rest) = rest.split_first_chunk::<8>().ok_or(Refusal::SealedHeaderWrong)?;
        if magic != MAGIC || rest != chunk_field() {
            return Err(Refusal::SealedHeaderWrong);
        }
        let (key, commitment) = derive(key, salt);
        if commitment != *committed {
            return Err(Refusal::KeyCommitmentWrong);
        }
        Ok(Sealed { header: *header, length: u64::from_le_bytes(*length), key })
    }

    /// The header.
    pub fn header(&self) -> &[u8; HEADER] {
        &self.header
    }

    /// Plaintext bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Number of chunks; an empty file has one, empty.
    pub fn chunks(&self) -> u64 {
        self.length.div_ceil(CHUNK as u64).max(1)
    }

    /// Where the plaintext of chunk `index` lies in the file's plaintext: (offset, bytes).
    pub fn chunk(&self, index: u64) -> Option<(usize, usize)> {
        let offset = usize::try_from(index).ok()?.checked_mul(CHUNK)?;
        let rest = usize::try_from(self.length).ok()?.checked_sub(offset)?;
        (index < self.chunks()).then_some((offset, rest.min(CHUNK)))
    }

    /// Encrypts chunk `index` in place; gives its tag.
    pub fn encrypt(&self, index: u64, text: &mut [u8]) -> Result<[u8; CHUNK_TAG], Refusal> {
        self.cipher()
            .encrypt_inout_detached(&self.nonce(index), &self.header, text.into())
            .map(Into::into)
            .map_err(|_| Refusal::ChunkTagWrong)
    }

    /// Decrypts `sealed`, chunk `index` and its tag, to `plain`, which changes only if the tag is right.
    pub fn decrypt(&self, index: u64, sealed: &[u8], plain: &mut [u8]) -> Result<(), Refusal> {
        let wrong = Refusal::ChunkTagWrong;
        let (text, tag) = sealed.split_last_chunk::<CHUNK_TAG>().ok_or(wrong)?;
        let text = InOutBuf::new(text, plain).map_err(|_| wrong)?;
        self.cipher()
            .decrypt_inout_detached(&self.nonce(index), &self.header, text, tag.into())
            .map_err(|_| wrong)
    }

    fn cipher(&self) -> Aes256Gcm {
        Aes256Gcm::new((&*self.key).into())
    }

    fn nonce(&self, index: u64) -> Nonce<aes_gcm::aead::consts::U12> {
        let last = u32::from(index.checked_add(1) == Some(self.chunks()));
        let mut nonce = [0; 12];
        let bytes = index.to_le_bytes().into_iter().chain(last.to_le_bytes());
        for (place, byte) in nonce.iter_mut().zip(bytes) {
            *place = byte;
        }
        nonce.into()
    }
}

/// The last eight header bytes: the chunk size and zero.
fn chunk_field() -> [u8; 8] {
    (CHUNK as u64).to_le_bytes()
}

/// The AES key and the key commitment of a file key.
fn derive(key: &[u8; 32], salt: &[u8; 32]) -> (Zeroizing<[u8; 32]>, [u8; 32]) {
    let kdf = Hkdf::<Sha256>::new(Some(salt), key);
    let mut both = Zeroizing::new([0; 64]);
    // 64 bytes are far below HKDF's limit of 255 blocks, the only error there is.
    let _ = kdf.expand(b"myelin/sealed/1", &mut *both);
    let (mut cipher, mut commitment) = (Zeroizing::new([0; 32]), [0; 32]);
    if let (Some(first), Some(last)) = (both.first_chunk::<32>(), both.last_chunk::<32>()) {
        *cipher = *first;
        commitment = *last;
    }
    (cipher, commitment)
}
