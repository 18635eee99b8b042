//! No configuration makes server-side apply panic; applying it again changes nothing.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| apimachinery_fuzz::apply(bytes));
