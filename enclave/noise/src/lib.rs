//! Randomness of the enclave: an AES-256-CTR generator and the shifted rounded Gaussian that releases sums
//! (DESIGN §6: Gaussian mechanism, then rounding to a grid, so that outputs lie on the grid whatever the sums are).
#![no_std]
#![forbid(unsafe_code)]

#[cfg(not(all(target_feature = "avx2", target_feature = "fma", target_feature = "aes")))]
compile_error!(
    "build inside `enclave/`, whose .cargo/config.toml sets the CPU level, or through build.sh"
);

mod gaussian;
mod generator;
mod lanes;

pub use gaussian::{Noise, Scale};
pub use generator::Generator;
