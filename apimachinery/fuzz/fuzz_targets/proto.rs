//! No bytes make protobuf decoding panic, and what was decoded survives a round trip.
#![no_main]

use apimachinery::codec::proto;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut enveloped = proto::MAGIC.to_vec();
    enveloped.extend_from_slice(bytes);
    if let Ok(value) = proto::decode_object(&enveloped)
        && let Ok(again) = proto::encode_object(&value)
    {
        assert!(proto::decode_object(&again).is_ok());
    }
});
