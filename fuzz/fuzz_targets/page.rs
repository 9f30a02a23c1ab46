//! libFuzzer's way to the target of this name in `crates/kvar-fuzz`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvar_fuzz::run("page", bytes));
