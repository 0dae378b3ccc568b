//! A whole session by any requests; see `drive`. Leaks descriptions: run with `-detect_leaks=0`.
#![no_main]
#![allow(dead_code)]

#[path = "../../protocol/tests/client/mod.rs"]
mod client;
#[path = "../../runtime/tests/fake/mod.rs"]
mod fake;

libfuzzer_sys::fuzz_target!(|script: &[u8]| {
    fake::drive(include_bytes!("../../../vectors/enclave/requests"), script, 3);
});
