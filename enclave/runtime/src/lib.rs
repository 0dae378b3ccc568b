//! The session inside the enclave.
#![no_std]
#![forbid(unsafe_code)]

mod machine;

pub use machine::Machine;
