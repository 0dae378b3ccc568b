//! The named reasons for which the enclave refuses.

macro_rules! refusals {
    ($($variant:ident $reason:literal,)*) => {
        /// Why an operation was refused. Status on the wire is the position in this list, from 1.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        #[allow(missing_docs, reason = "each variant's text is its meaning")]
        pub enum Refusal { $($variant),* }

        impl Refusal {
            /// Every refusal, in order of status.
            pub const ALL: &[Refusal] = &[$(Refusal::$variant),*];

            /// Its status on the wire.
            pub const fn status(self) -> u32 {
                (self as u32).saturating_add(1)
            }

            /// The ASCII reason that goes to the host.
            pub const fn reason(self) -> &'static str {
                match self { $(Refusal::$variant => $reason),* }
            }
        }
    };
}

refusals! {
    MessageTooLong "message-too-long",
    OperationUnknown "operation-unknown",
    WrongState "wrong-state",
    CborMalformed "cbor-malformed",
    CborNotCanonical "cbor-not-canonical",
    TypeWrong "type-wrong",
    FieldWrong "field-wrong",
    LimitExceeded "limit-exceeded",
    JobWrong "job-wrong",
    PartyUnknown "party-unknown",
    SignatureWrong "signature-wrong",
    ApprovalDuplicate "approval-duplicate",
    ApprovalMissing "approval-missing",
    GrantDuplicate "grant-duplicate",
    GrantMissing "grant-missing",
    GrantWrong "grant-wrong",
    HpkeFailed "hpke-failed",
    SealedHeaderWrong "sealed-header-wrong",
    KeyCommitmentWrong "key-commitment-wrong",
    ChunkOrder "chunk-order",
    ChunkTagWrong "chunk-tag-wrong",
    CommitmentWrong "commitment-wrong",
    RecordHeaderWrong "record-header-wrong",
    CapacityWrong "capacity-wrong",
    WeightsOrder "weights-order",
    WeightsDigestWrong "weights-digest-wrong",
    InputMissing "input-missing",
    InputDuplicate "input-duplicate",
    StepsExceeded "steps-exceeded",
    SampleRateRaised "sample-rate-raised",
    NoiseLowered "noise-lowered",
    OutputUnknown "output-unknown",
    RandomnessFailed "randomness-failed",
    KernelFailed "kernel-failed",
}
