//! No JSON patch panics, and a failed one changes nothing.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| apimachinery_fuzz::json_patch(bytes));
