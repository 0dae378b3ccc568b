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
