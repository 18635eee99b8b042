use serde_json::{Value, json};

use super::*;

fn texts(errors: &[FieldError]) -> Vec<String> {
    errors.iter().map(ToString::to_string).collect()
}

/// What is complained of, and what is let pass.
fn judge(schema: Value, object: &Value, old: Option<&Value>) -> (Vec<String>, Vec<String>) {
    let (errors, let_pass) = Rules::read(&schema).expect("there are rules").validate(object, old);
    (texts(&errors), texts(&let_pass))
}

/// A schema whose `spec` is this, with one rule about it.
fn spec(mut spec: Value, rule: Value) -> Value {
    spec["x-kubernetes-validations"] = json!([rule]);
    json!({"type": "object", "properties": {"spec": spec}})
}

fn holds(schema: &Value, value: &Value, rule: &str) -> Vec<String> {
    judge(spec(schema.clone(), json!({"rule": rule})), &json!({"spec": value}), None).0
}

#[test]
fn values_have_the_types_of_the_schema() {
    let schema = json!({"type": "object", "properties": {
        "int": {"type": "integer"}, "number": {"type": "number"}, "text": {"type": "string"},
        "when": {"type": "string", "format": "date-time"}, "day": {"type": "string", "format": "date"},
        "long": {"type": "string", "format": "duration"}, "raw": {"type": "string", "format": "byte"},
        "either": {"x-kubernetes-int-or-string": true}, "a-b": {"type": "integer"}, "namespace": {"type": "string"},
        "none": {"type": "string", "nullable": true},
        "set": {"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"}},
        "map": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["k"],
            "items": {"type": "object", "properties": {"k": {"type": "string"}, "v": {"type": "integer"}}}},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "embedded": {"type": "object", "x-kubernetes-embedded-resource": true,
            "x-kubernetes-preserve-unknown-fields": true},
    }});
    let value = json!({
        "int": 3, "number": 3, "text": "x", "when": "2024-01-01T00:00:00Z", "day": "2024-02-03", "long": "90s",
        "raw": "aGVsbG8=", "either": "a", "a-b": 1, "namespace": "n", "none": null, "set": ["a", "b"],
        "map": [{"k": "a", "v": 1}, {"k": "b", "v": 2}], "labels": {"x/y": "z"},
        "embedded": {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}},
    });
    let rules = [
        "self.int + 1 == 4 && self.number / 2.0 == 1.5",
        "self.when.getFullYear() == 2024 && self.day.getDate() == 3",
        "self.when < timestamp('2024-06-01T00:00:00Z') && self.long == duration('1m30s')",
        "self.raw == b'hello'",
        "type(self.either) == string && self.either == 'a'",
        "self.a__dash__b == 1 && self.__namespace__ == 'n'",
        "!has(self.none)",
        "self.set == ['b', 'a'] && 'a' in self.set && (self.set + ['a', 'c']).size() == 3",
        "self.map == [self.map[1], self.map[0]] && self.map.exists(i, i.k == 'b' && i.v == 2)",
        "self.labels['x/y'] == 'z' && self.labels.all(k, k.contains('/'))",
        "self.embedded.metadata.name == 'p' && self.embedded.kind == 'Pod'",
        "self.text.matches('^x$') && quantity('1Gi').isGreaterThan(quantity('1G'))",
        "cidr('10.0.0.0/8').containsIP('10.1.2.3') && !isIP('10.0.0') && ip('::1').isLoopback()",
        "url('https://a.b:80/c?d=e').getHost() == 'a.b:80' && url('https://a/b').getQuery().size() == 0",
        "semver('1.2.3').isLessThan(semver('1.10.0')) && !format.dns1123Label().validate('a-b').hasValue()",
        "sets.contains([1, 2], [2]) && [1, 2, 3].sum() == 6 && [3, 1].max() == 3 && [1, 2].indexOf(2) == 1",
    ];
    for rule in rules {
        assert_eq!(holds(&schema, &value, rule), Vec::<String>::new(), "{rule}");
    }
}

#[test]
fn the_root_sees_its_names() {
    let schema =
        json!({"type": "object", "x-kubernetes-validations": [{"rule": "self.metadata.name.startsWith('a')"}]});
    let named = |name: &str| json!({"apiVersion": "g/v1", "kind": "K", "metadata": {"name": name}});
    assert_eq!(judge(schema.clone(), &named("ab"), None).0, Vec::<String>::new());
    let told = "<nil>: Invalid value: failed rule: self.metadata.name.startsWith('a')";
    assert_eq!(judge(schema, &named("b"), None).0, [told]);
}

#[test]
fn refusals_are_upstreams() {
    let schema = json!({"type": "object", "properties": {
        "a": {"type": "integer"}, "map": {"type": "object", "additionalProperties": {"type": "string"}},
    }});
    let cases = [
        (json!({"rule": "self.a > 5"}), "spec: Invalid value: failed rule: self.a > 5"),
        (json!({"rule": "self.a > 5", "message": "too small "}), "spec: Invalid value: too small"),
        (
            json!({"rule": "self.a > 5", "messageExpression": "'got ' + string(self.a)", "message": "x"}),
            "spec: Invalid value: got 1",
        ),
        (json!({"rule": "self.a > 5", "messageExpression": "' '", "message": "x"}), "spec: Invalid value: x"),
        (
            json!({"rule": "self.a > 5", "fieldPath": ".a", "reason": "FieldValueForbidden"}),
            "spec.a: Forbidden: failed rule: self.a > 5",
        ),
        (json!({"rule": "false", "reason": "FieldValueRequired"}), "spec: Required value: failed rule: false"),
        (json!({"rule": "false", "reason": "FieldValueDuplicate"}), "spec: Duplicate value"),
        (
            json!({"rule": "self.map['x'] == 'y'"}),
            "spec: Invalid value: \"object\": no such key: x evaluating rule: self.map['x'] == 'y'",
        ),
        (
            json!({"rule": "1 / (self.a - 1) == 1"}),
            "spec: Invalid value: \"object\": division by zero evaluating rule: 1 / (self.a - 1) == 1",
        ),
    ];
    for (rule, expected) in cases {
        let (errors, _) = judge(spec(schema.clone(), rule.clone()), &json!({"spec": {"a": 1, "map": {}}}), None);
        assert_eq!(errors, [expected], "{rule}");
    }
    let scalar = spec(json!({"type": "integer"}), json!({"rule": "self > 5"}));
    assert_eq!(judge(scalar, &json!({"spec": 1}), None).0, ["spec: Invalid value: 1: failed rule: self > 5"]);
}

#[test]
fn changes_are_compared_with_what_was_there() {
    let schema = spec(json!({"type": "integer"}), json!({"rule": "self >= oldSelf"}));
    assert_eq!(judge(schema.clone(), &json!({"spec": 1}), None).0, Vec::<String>::new());
    assert_eq!(judge(schema.clone(), &json!({"spec": 2}), Some(&json!({"spec": 1}))).0, Vec::<String>::new());
    assert_eq!(judge(schema.clone(), &json!({"spec": 1}), Some(&json!({"spec": 2}))).0.len(), 1);
    // There was nothing to compare with.
    assert_eq!(judge(schema, &json!({"spec": 1}), Some(&json!({}))).0, Vec::<String>::new());
    let optional = json!({"rule": "oldSelf.hasValue() || self == 1", "optionalOldSelf": true});
    let schema = spec(json!({"type": "integer"}), optional);
    assert_eq!(judge(schema.clone(), &json!({"spec": 2}), None).0.len(), 1);
    assert_eq!(judge(schema, &json!({"spec": 2}), Some(&json!({"spec": 7}))).0, Vec::<String>::new());
}

#[test]
fn items_with_keys_are_compared_with_themselves() {
    let list = |kind: &str| {
        json!({"type": "object", "properties": {"l": {
            "type": "array", "x-kubernetes-list-type": kind, "x-kubernetes-list-map-keys": ["k"],
            "items": {"type": "object", "properties": {"k": {"type": "string"}, "v": {"type": "integer"}},
                "x-kubernetes-validations": [{"rule": "self.v == oldSelf.v"}]},
        }}})
    };
    let old = json!({"l": [{"k": "a", "v": 1}, {"k": "b", "v": 2}]});
    let new = json!({"l": [{"k": "b", "v": 3}, {"k": "a", "v": 1}, {"k": "c", "v": 9}]});
    assert_eq!(judge(list("map"), &new, Some(&old)).0, ["l[0]: Invalid value: failed rule: self.v == oldSelf.v"]);
    assert_eq!(judge(list("atomic"), &new, Some(&old)).0, Vec::<String>::new());
}

#[test]
fn what_did_not_change_may_stay() {
    let schema = json!({"type": "object", "properties": {
        "a": {"type": "integer", "x-kubernetes-validations": [{"rule": "self > 5"}]},
        "b": {"type": "integer"},
    }});
    let old = json!({"a": 1, "b": 1});
    let (errors, let_pass) = judge(schema.clone(), &json!({"a": 1, "b": 2}), Some(&old));
    assert_eq!((errors.len(), let_pass), (0, vec!["a: Invalid value: 1: failed rule: self > 5".to_owned()]));
    assert_eq!(judge(schema, &json!({"a": 2, "b": 1}), Some(&old)).0.len(), 1);
}

#[test]
fn rules_that_cost_too_much_are_stopped() {
    let items: Vec<u64> = (0..2000).collect();
    let schema = spec(
        json!({"type": "array", "items": {"type": "integer"}}),
        json!({"rule": "self.all(x, self.all(y, x + y >= 0))"}),
    );
    let (errors, _) = judge(schema, &json!({"spec": items}), None);
    let told = "spec: Invalid value: \"array\": 'operation cancelled: actual cost limit exceeded': no further validation rules will be run due to call cost exceeds limit for rule: self.all(x, self.all(y, x + y >= 0))";
    assert_eq!(errors, [told]);
    // What only grows costs, too.
    let grows = "self.map(x, 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa').join('').split('').map(x, self.map(y, y)).size() > 0";
    let schema = spec(json!({"type": "array", "items": {"type": "integer"}}), json!({"rule": grows}));
    assert_eq!(judge(schema, &json!({"spec": items}), None).0.len(), 1);
}
