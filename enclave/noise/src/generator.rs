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
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panics")]
    #![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

    extern crate std;

    use std::vec;

    use super::*;

    fn bytes<const N: usize>(hex: &str) -> [u8; N] {
        core::array::from_fn(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap())
    }

    /// NIST SP 800-38A, F.5.5: CTR-AES256.
    #[test]
    fn stream_is_the_one_of_nist() {
        let key = bytes("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4");
        let mut generator = Generator::new(&key);
        generator.counter = u128::from_be_bytes(bytes("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"));
        let plain: [u8; 64] = bytes(
            "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51\
             30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710",
        );
        let cipher: [u8; 64] = bytes(
            "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5\
             2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6",
        );
        let mut stream = [0; 64];
        generator.fill(&mut stream);
        assert_eq!(core::array::from_fn(|i| stream[i] ^ plain[i]), cipher);
    }

    #[test]
    fn no_block_comes_twice() {
        let mut generator = Generator::new(&[1; 32]);
        let mut blocks = vec![[0; BLOCK]; 3000];
        for block in &mut blocks {
            generator.fill(block);
        }
        let mut fork = generator.fork();
        let children = [0, 1, 1 << 32, u64::MAX].map(|index| generator.child(index));
        for mut other in children.into_iter().chain([fork.child(0), fork.fork(), fork]) {
            let mut more = vec![0; 16 * 1000];
            other.fill(&mut more);
            blocks.extend(more.as_chunks().0);
        }
        let count = blocks.len();
        blocks.sort_unstable();
        blocks.dedup();
        assert_eq!(blocks.len(), count);
    }

    #[test]
    fn what_is_left_of_a_block_is_thrown_away() {
        let (mut whole, mut parts) = ([0; 48], [0; 48]);
        Generator::new(&[2; 32]).fill(&mut whole);
        let mut generator = Generator::new(&[2; 32]);
        generator.fill(&mut parts[..5]);
        generator.fill(&mut parts[16..35]);
        assert_eq!(parts[..5], whole[..5]);
        assert_eq!(parts[16..35], whole[16..35]);
    }

    #[test]
    fn same_child_of_the_same_generator() {
        let generator = Generator::new(&[4; 32]);
        let (mut first, mut again) = ([0; 16], [0; 16]);
        generator.child(7).fill(&mut first);
        generator.child(7).fill(&mut again);
        assert_eq!(first, again);
    }
}
