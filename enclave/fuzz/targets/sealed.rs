#![no_main]

libfuzzer_sys::fuzz_target!(|data: [u8; 96]| {
    let _ = myelin_protocol::Sealed::open(&[0; 32], &data);
});
