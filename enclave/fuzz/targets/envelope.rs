#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = myelin_protocol::approve(&myelin_protocol::Job::new(), data);
});
