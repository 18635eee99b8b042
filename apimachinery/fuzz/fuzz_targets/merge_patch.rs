//! No merge patch panics; applying it twice is applying it once.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| apimachinery_fuzz::merge_patch(bytes));
