//! The protocol's documents, as docs/protocol.md describes them byte by byte.
//!
//! No heap, no input or output: bytes come in slices, documents go into slices. A document is
//! either right in every byte or refused with a named [`Refusal`].
#![no_std]
#![forbid(unsafe_code)]

mod approval;
pub mod cbor;
mod envelope;
mod grant;
mod job;
mod keys;
mod list;
mod output;
mod receipt;
mod refusal;
mod sealed;

pub use approval::approve;
pub use envelope::{Envelope, Sign};
pub use grant::{Grant, Granted};
pub use job::{Image, JOB_BYTES, Job, Party, Privacy, Receive, Send, Slot};
pub use keys::{Encapsulated, Hpke, HpkeKey, SigningKey, report_data, seal_to};
pub use list::{List, MOST};
pub use output::write_output;
pub use receipt::{Receipt, Score};
pub use refusal::Refusal;
pub use sealed::{CHUNK, CHUNK_TAG, HEADER, Sealed};
