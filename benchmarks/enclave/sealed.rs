//! Bytes a second of what an enclave does with a sealed file, on one core and in warm memory: hash every chunk for the
//! commitment, check and decrypt it. Prints JSON; `python -m benchmarks.load` builds it with build.sh and runs it.

mod median;

use median::median;
use myelin_protocol::{CHUNK, CHUNK_TAG, Sealed};
use sha2::{Digest, Sha256};

/// A file that fits no cache of a core.
const CHUNKS: usize = 256;

fn main() {
    let sealed = Sealed::create(&[1; 32], &[2; 32], (CHUNKS * CHUNK) as u64);
    let mut file = vec![[3; CHUNK + CHUNK_TAG]; CHUNKS];
    for (i, chunk) in (0..).zip(&mut file) {
        let (text, tag) = chunk.split_at_mut(CHUNK);
        let Ok(made) = sealed.encrypt(i, text) else {
            return;
        };
        tag.copy_from_slice(&made);
    }
    let mut plain = vec![0; CHUNKS * CHUNK];
    let mut measure = |hashed: bool, decrypted: bool| {
        let seconds = median(21, || {
            let mut hash = Sha256::new();
            for ((i, chunk), plain) in (0..).zip(&file).zip(plain.chunks_mut(CHUNK)) {
                if hashed {
                    hash.update(chunk);
                }
                assert!(!decrypted || sealed.decrypt(i, chunk, plain).is_ok());
            }
            std::hint::black_box(hash.finalize());
        });
        (CHUNKS * CHUNK) as f64 / seconds / 1e9
    };
    let [hash, decrypt, both] =
        [(true, false), (false, true), (true, true)].map(|(h, d)| measure(h, d));
    println!("{{\"hash\": {hash:.3}, \"decrypt\": {decrypt:.3}, \"both\": {both:.3}}}");
}
