//! Cryptographic random generator: the key stream of AES-256-CTR (NIST SP 800-38A) under a key used for nothing else.

use core::convert::Infallible;

use aes::Aes256Enc;
use aes::cipher::{Array, BlockCipherEncrypt, KeyInit};
use rand_core::utils::next_word_via_fill;
use rand_core::{TryCryptoRng, TryRng};
use zeroize::Zeroize;

/// Bytes of one AES block.
const BLOCK: usize = 16;
/// Where the counters of children's keys start: output counters start at 0 and cannot come so far.
const CHILDREN: u128 = 1 << 127;

/// A generator that nobody without its key can predict. Every block has its own 128-bit counter, which never
/// repeats; there is no copy and no saved state. The key is wiped on drop.
pub struct Generator {
    cipher: Aes256Enc,
    counter: u128,
}

impl Generator {
    /// A generator of the key `seed`, which must be uniform and used once.
    pub fn new(seed: &[u8; 32]) -> Self {
        Self { cipher: Aes256Enc::new(Array::cast_from_core(seed)), counter: 0 }
    }

    /// Fills `out` with the next random bytes; what is left of the last block is thrown away.
    pub fn fill(&mut self, out: &mut [u8]) {
        let (blocks, rest) = out.as_chunks_mut::<BLOCK>();
        self.blocks(blocks);
        if !rest.is_empty() {
            let mut last = [[0; BLOCK]];
            self.blocks(&mut last);
            for (byte, random) in rest.iter_mut().zip(last.as_flattened()) {
                *byte = *random;
            }
            last.zeroize();
        }
    }

    /// A new generator whose key is the next 32 bytes of this one.
    pub fn fork(&mut self) -> Generator {
        let mut key = [0; 32];
        self.fill(&mut key);
        let child = Generator::new(&key);
        key.zeroize();
        child
    }

    /// Child number `index`, independent of this generator's output and of every other child; this generator stays
    /// as it is. The same index gives the same child: ask for each once, from a generator forked for the purpose.
    /// It makes one generator a chunk of a parallel loop without storing them.
    pub fn child(&self, index: u64) -> Generator {
        let first = CHILDREN | u128::from(index) << 1;
        let mut key = [first.to_be_bytes(), (first | 1).to_be_bytes()];
        self.cipher.encrypt_blocks(Array::cast_slice_from_core_mut(&mut key));
        let (halves, _) = key.as_flattened().as_chunks::<32>();
        let child = Generator::new(halves.first().unwrap_or(&[0; 32]));
        key.zeroize();
        child
    }

    /// Overwrites `blocks` with the next blocks of the key stream.
    pub(crate) fn blocks(&mut self, blocks: &mut [[u8; BLOCK]]) {
        // Only the lower half counts on: 2⁶⁴ blocks are more than anyone can draw.
        let (high, low) = ((self.counter >> 64) as u64, self.counter as u64);
        for (block, i) in blocks.iter_mut().zip(0..) {
            *block = bytemuck::cast([high.to_be(), low.wrapping_add(i).to_be()]);
        }
        self.counter = self.counter.wrapping_add(blocks.len() as u128);
        self.cipher.encrypt_blocks(Array::cast_slice_from_core_mut(blocks));
    }
}

impl TryRng for Generator {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        next_word_via_fill(self)
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        next_word_via_fill(self)
    }

    fn try_fill_bytes(&mut self, out: &mut [u8]) -> Result<(), Infallible> {
        self.fill(out);
        Ok(())
    }
}

impl TryCryptoRng for Generator {}

#[cfg(test)]
#[path = "../tests/unit/generator.rs"]
mod tests;
