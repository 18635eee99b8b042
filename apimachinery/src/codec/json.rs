//! JSON in: strict about types, honest about unknown and duplicate fields.

use super::tree::Builder;
use super::{DecodeError, Decoded, MAX_BYTES, conform};
use crate::schema::Schema;

/// Decodes one object. With a schema the value is pruned and brought into the form upstream would print: no unknown
/// fields, no nulls, no empty optional fields, canonical quantities and times. Nesting is bounded at 128.
pub fn decode(bytes: &[u8], schema: Option<&Schema>) -> Result<Decoded, DecodeError> {
    let mut decoded = read(bytes, schema)?;
    if let Some(schema) = schema {
        conform(&mut decoded, schema)?;
    }
    Ok(decoded)
}

/// Decodes without a schema: exactly what was written, with duplicate fields reported. Patches and applied
/// configurations are read like this.
pub fn parse(bytes: &[u8]) -> Result<Decoded, DecodeError> {
    read(bytes, None)
}

pub(super) fn read(bytes: &[u8], schema: Option<&Schema>) -> Result<Decoded, DecodeError> {
    if bytes.len() > MAX_BYTES {
        return Err(DecodeError::TooLarge);
    }
    let mut builder = Builder::default();
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = builder.build(&mut deserializer, schema).map_err(DecodeError::Json)?;
    deserializer.end().map_err(DecodeError::Json)?;
    Ok(Decoded { value, strict_errors: builder.complaints })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::schema::builtin;

    fn pod(body: &Value) -> Result<Decoded, DecodeError> {
        decode(body.to_string().as_bytes(), builtin().kind_of("", "v1", "Pod"))
    }

    #[test]
    fn prunes_and_reports() {
        let body = br#"{"kind":"Pod","apiVersion":"v1","metadata":{"name":"a","labels":null},
            "spec":{"foo":1,"hostNetwork":false,"containers":[{"name":"c","image":"i","image":"j","bar":{},
            "resources":{"limits":{"cpu":"1000m","memory":1073741824}}}]}}"#;
        let decoded = decode(body, builtin().kind_of("", "v1", "Pod")).expect("decodes");
        assert_eq!(
            decoded.strict_errors,
            [
                r#"unknown field "spec.foo""#,
                r#"duplicate field "spec.containers[0].image""#,
                r#"unknown field "spec.containers[0].bar""#,
            ]
        );
        assert_eq!(
            decoded.value,
            json!({"kind": "Pod", "apiVersion": "v1", "metadata": {"name": "a"}, "spec": {"containers":
                [{"name": "c", "image": "j", "resources": {"limits": {"cpu": "1", "memory": "1073741824"}}}]}})
        );
    }

    #[test]
    fn wrong_types_read_as_upstream_says_it() {
        let cases = [
            (
                json!({"spec": {"hostNetwork": "yes"}}),
                "json: cannot unmarshal string into Go struct field PodSpec.spec.hostNetwork of type bool",
            ),
            (
                json!({"spec": {"containers": {}}}),
                "json: cannot unmarshal object into Go struct field PodSpec.spec.containers of type []v1.Container",
            ),
            (
                json!({"spec": {"containers": [{"ports": [{"containerPort": "80"}]}]}}),
                "json: cannot unmarshal string into Go struct field ContainerPort.spec.containers.ports.containerPort of type int32",
            ),
            (
                json!({"spec": {"priority": 1.5}}),
                "json: cannot unmarshal number 1.5 into Go struct field PodSpec.spec.priority of type int32",
            ),
            (
                json!({"metadata": {"labels": {"a": 1}}}),
                "json: cannot unmarshal number into Go struct field ObjectMeta.metadata.labels of type string",
            ),
            (json!({"spec": []}), "json: cannot unmarshal array into Go struct field Pod.spec of type v1.PodSpec"),
            (
                json!({"spec": {"containers": [{"lifecycle": {"preStop": {"httpGet": {"port": {}}}}}]}}),
                "json: cannot unmarshal object into Go struct field HTTPGetAction.spec.containers.lifecycle.preStop.httpGet.port of type int32",
            ),
            (
                json!({"metadata": {"creationTimestamp": 5}}),
                "json: cannot unmarshal number into Go struct field ObjectMeta.metadata.creationTimestamp of type string",
            ),
            (json!([]), "json: cannot unmarshal array into Go value of type v1.Pod"),
            (
                json!({"spec": {"containers": [{"resources": {"limits": {"cpu": "x"}}}]}}),
                "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'",
            ),
        ];
        for (body, message) in cases {
            let error = pod(&body).expect_err("a type error").to_string();
            assert_eq!(error, message, "{body}");
        }
    }

    #[test]
    fn times_are_canonical() {
        let decoded = pod(&json!({"metadata": {"creationTimestamp": "2024-01-02T03:04:05.678+01:00"}})).expect("valid");
        assert_eq!(decoded.value["metadata"]["creationTimestamp"], "2024-01-02T02:04:05Z");
        assert!(pod(&json!({"metadata": {"creationTimestamp": "x"}})).is_err());
    }

    #[test]
    fn nesting_is_bounded() {
        assert!(parse("[".repeat(100_000).as_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_handled(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&bytes, builtin().kind_of("", "v1", "Pod"));
        }

        #[test]
        fn decoding_is_idempotent(cpu in "[0-9]{1,4}(m|Ki|)", host in any::<bool>(), grace in any::<i64>()) {
            let body = json!({"spec": {"hostNetwork": host, "terminationGracePeriodSeconds": grace,
                "containers": [{"name": "", "resources": {"limits": {"cpu": cpu}}}]}});
            let once = pod(&body).expect("valid");
            let twice = pod(&once.value).expect("valid");
            prop_assert_eq!(once, twice);
        }
    }
}
