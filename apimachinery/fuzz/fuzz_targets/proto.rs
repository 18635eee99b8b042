//! No bytes make protobuf decoding panic, and what was decoded survives a round trip.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| apimachinery_fuzz::decode_proto(bytes));
