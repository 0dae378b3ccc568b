//! The session inside the enclave: one job from its first document to its receipt.
//!
//! [`Session`] serves the ten operations of docs/protocol.md on a [`Machine`]. It reads the image's
//! description once (docs/image.md), takes inputs from their owners, trains within the job's limits
//! and seals what comes out. No heap: everything lives in the session and in the image's heap
//! segment, cut by the description.
#![no_std]
#![forbid(unsafe_code)]

mod features;
mod input;
mod machine;
mod memory;
mod plan;
mod session;
mod training;

pub use machine::Machine;
pub use session::Session;
