//! No strategic merge patch panics, and no directive is left in the result.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| apimachinery_fuzz::strategic(bytes));
