//! No configuration makes server-side apply panic; applying it again changes nothing.
#![no_main]

use apimachinery::merge::apply::{Manager, apply};
use apimachinery::schema::builtin;
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};

fuzz_target!(|config: &[u8]| {
    let Ok(mut config) = serde_json::from_slice::<Value>(config) else { return };
    let Value::Object(fields) = &mut config else { return };
    fields.insert("apiVersion".into(), json!("v1"));
    let schema = builtin().kind_of("", "v1", "Pod").expect("a built-in kind");
    let manager = Manager { name: "fuzz", api_version: "v1", subresource: "", time: jiff::Timestamp::UNIX_EPOCH };
    let live = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"},
        "spec": {"containers": [{"name": "a", "image": "b", "ports": [{"containerPort": 80}]}]}});
    if let Ok(once) = apply(schema, Some(&live), &config, &manager, true, &[]) {
        let twice = apply(schema, Some(&once), &config, &manager, true, &[]).expect("applies again");
        assert_eq!(once, twice);
    }
});
