//! The part of every object that the server itself owns: names, uid, times, and the rules of `metadata` that hold for
//! all kinds. What a kind demands beyond that is in its strategy.

use apimachinery::meta::validation;
use apimachinery::status::{FieldError, Result, Status};
use rand::Rng;
use serde_json::{Value, json};

use super::timestamp;
use crate::registry::object::ObjectExt;
use crate::registry::strategy::NameRule;

/// Letters that make no words and are not mistaken for one another.
const RANDOM_LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
const RANDOM_LENGTH: usize = 5;
/// Longest base of a generated name.
const GENERATED_BASE_MAX: usize = 63 - RANDOM_LENGTH;
const ANNOTATIONS_MAX: usize = 256 * 1024;
/// Finalizers that need no prefix.
pub const STANDARD_FINALIZERS: [&str; 3] = ["kubernetes", "orphan", "foregroundDeletion"];

/// Puts the object into the namespace of the request; it may not name another one.
pub fn set_namespace(obj: &mut Value, namespace: &str, namespaced: bool) -> Result<()> {
    let given = obj.namespace().to_owned();
    if !namespaced {
        obj.metadata_mut().remove("namespace");
        return Ok(());
    }
    if !given.is_empty() && given != namespace {
        return Err(Status::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    obj.metadata_mut().insert("namespace".into(), namespace.into());
    Ok(())
}

/// What the server decides about a new object.
pub fn fill_for_create(obj: &mut Value, now: jiff::Timestamp) {
    let metadata = obj.metadata_mut();
    for name in ["selfLink", "deletionTimestamp", "deletionGracePeriodSeconds"] {
        metadata.remove(name);
    }
    metadata.insert("creationTimestamp".into(), timestamp(now).into());
    metadata.insert("uid".into(), uuid::Uuid::new_v4().to_string().into());
}

/// A name from `metadata.generateName`, when there is one and no name; whether it was made.
pub fn generate_name(obj: &mut Value) -> bool {
    let base = obj.str_at(&["metadata", "generateName"]);
    if !obj.name().is_empty() || base.is_empty() {
        return false;
    }
    let mut end = base.len().min(GENERATED_BASE_MAX);
    while !base.is_char_boundary(end) {
        end -= 1;
    }
    let mut name = base[..end].to_owned();
    let mut random = rand::rng();
    name.extend((0..RANDOM_LENGTH).map(|_| char::from(RANDOM_LETTERS[random.random_range(0..RANDOM_LETTERS.len())])));
    obj.metadata_mut().insert("name".into(), name.into());
    true
}

/// What an update leaves as it is when the client leaves it out.
pub fn fill_for_update(obj: &mut Value, old: &Value) {
    let metadata = obj.metadata_mut();
    metadata.remove("selfLink");
    for name in ["uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds"] {
        if metadata.get(name).is_none_or(|v| v.is_null() || v == "")
            && let Some(value) = old.at(&["metadata", name])
        {
            metadata.insert(name.into(), value.clone());
        }
    }
    match old.at(&["metadata", "generation"]) {
        Some(generation) => metadata.insert("generation".into(), generation.clone()),
        None => metadata.remove("generation"),
    };
}

/// Rules for a new object.
pub fn validate(obj: &Value, namespaced: bool, rule: NameRule) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let prefix = obj.str_at(&["metadata", "generateName"]);
    if !prefix.is_empty() {
        errors.extend(
            rule.check(prefix, true).into_iter().map(|m| FieldError::invalid("metadata.generateName", prefix, m)),
        );
    }
    match obj.name() {
        "" => errors.push(FieldError::required("metadata.name", "name or generateName is required")),
        name => {
            errors.extend(rule.check(name, false).into_iter().map(|m| FieldError::invalid("metadata.name", name, m)))
        }
    }
    match (namespaced, obj.namespace()) {
        (true, "") => errors.push(FieldError::required("metadata.namespace", "")),
        (true, namespace) => errors.extend(
            validation::is_dns1123_label(namespace)
                .into_iter()
                .map(|m| FieldError::invalid("metadata.namespace", namespace, m)),
        ),
        (false, "") => {}
        (false, _) => errors.push(FieldError::forbidden("metadata.namespace", "not allowed on this type")),
    }
    errors.extend(validate_common(obj));
    errors
}

/// Rules for an update.
pub fn validate_update(obj: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let kept = ["name", "namespace", "uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds"];
    for name in kept {
        let path = ["metadata", name];
        if obj.at(&path).unwrap_or(&Value::Null) != old.at(&path).unwrap_or(&Value::Null) {
            let value = obj.at(&path).cloned().unwrap_or(Value::Null);
            errors.push(FieldError::invalid(format!("metadata.{name}"), value, "field is immutable"));
        }
    }
    if old.is_being_deleted() {
        let known = old.finalizers();
        let mut added: Vec<&str> = obj.finalizers().into_iter().filter(|f| !known.contains(f)).collect();
        added.sort_unstable();
        if !added.is_empty() {
            let list = added.iter().map(|f| format!("{f:?}")).collect::<Vec<_>>().join(", ");
            let detail = format!(
                "no new finalizers can be added if the object is being deleted, found new finalizers []string{{{list}}}"
            );
            errors.push(FieldError::forbidden("metadata.finalizers", detail));
        }
    }
    let generation = |v: &Value| v.i64_at(&["metadata", "generation"]).unwrap_or(0);
    if generation(obj) < generation(old) {
        errors.push(FieldError::invalid("metadata.generation", generation(obj), "must not be decremented"));
    }
    errors.extend(validate_common(obj));
    errors
}

fn validate_common(obj: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    if let Some(generation) = obj.i64_at(&["metadata", "generation"]).filter(|generation| *generation < 0) {
        let detail = "must be greater than or equal to 0";
        errors.push(FieldError::invalid("metadata.generation", generation, detail));
    }
    for (key, value) in obj.labels().into_iter().flatten() {
        let field = "metadata.labels";
        errors.extend(
            validation::is_qualified_name(key).into_iter().map(|m| FieldError::invalid(field, key.as_str(), m)),
        );
        let value = value.as_str().unwrap_or_default();
        errors
            .extend(validation::is_valid_label_value(value).into_iter().map(|m| FieldError::invalid(field, value, m)));
    }
    let mut size = 0;
    for (key, value) in obj.annotations().into_iter().flatten() {
        size += key.len() + value.as_str().map_or(0, str::len);
        let problems = validation::is_qualified_name(&key.to_lowercase());
        errors.extend(problems.into_iter().map(|m| FieldError::invalid("metadata.annotations", key.as_str(), m)));
    }
    if size > ANNOTATIONS_MAX {
        errors.push(FieldError::too_long("metadata.annotations", ANNOTATIONS_MAX));
    }
    errors.extend(validate_owners(obj));
    errors.extend(validate_finalizers(obj));
    errors
}

fn validate_owners(obj: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let mut controller: Option<String> = None;
    for (index, owner) in obj.list_at(&["metadata", "ownerReferences"]).iter().enumerate() {
        let field = |name: &str| format!("metadata.ownerReferences[{index}].{name}");
        let version = owner.api_version();
        if version.matches('/').count() > 1 {
            let detail = "must be <group>/<version> or <version>";
            errors.push(FieldError::invalid(field("apiVersion"), version, detail));
        }
        let texts = [
            ("apiVersion", version),
            ("kind", owner.kind()),
            ("name", owner.str_at(&["name"])),
            ("uid", owner.str_at(&["uid"])),
        ];
        for (name, _) in texts.into_iter().filter(|(_, text)| text.is_empty()) {
            errors.push(FieldError::required(field(name), "must not be empty"));
        }
        if (version, owner.kind()) == ("v1", "Event") {
            errors.push(FieldError::invalid(
                format!("metadata.ownerReferences[{index}]"),
                owner.clone(),
                "/v1, Kind=Event is disallowed from being an owner",
            ));
        }
        if owner.bool_at(&["controller"]) == Some(true) {
            let this = format!("{}/{}", owner.kind(), owner.str_at(&["name"]));
            match &controller {
                Some(first) => errors.push(FieldError::invalid(
                    "metadata.ownerReferences",
                    json!(obj.list_at(&["metadata", "ownerReferences"])),
                    format!(
                        "Only one reference can have Controller set to true. Found \"true\" in references for {first} and {this}"
                    ),
                )),
                None => controller = Some(this),
            }
        }
    }
    errors
}

/// Kinds of Kubernetes itself want a domain in the name of a finalizer; kinds that extend it never did.
fn names_finalizers_strictly(obj: &Value) -> bool {
    let group = obj.api_version().split_once('/').map_or("", |(group, _)| group);
    let extends = matches!(group, "admissionregistration.k8s.io" | "apiextensions.k8s.io" | "apiregistration.k8s.io");
    !extends && apimachinery::schema::builtin().groups().iter().any(|known| known.name == group)
}

fn validate_finalizers(obj: &Value) -> Vec<FieldError> {
    let finalizers = obj.finalizers();
    let field = "metadata.finalizers";
    let mut errors: Vec<FieldError> = finalizers
        .iter()
        .flat_map(|name| validation::is_qualified_name(name).into_iter().map(|m| FieldError::invalid(field, *name, m)))
        .collect();
    for (index, name) in finalizers.iter().enumerate().filter(|_| names_finalizers_strictly(obj)) {
        if !name.contains('/') && !STANDARD_FINALIZERS.contains(name) {
            let detail = "name is neither a standard finalizer name nor is it fully qualified";
            errors.push(FieldError::invalid(format!("{field}[{index}]"), *name, detail));
        }
    }
    if finalizers.contains(&"orphan") && finalizers.contains(&"foregroundDeletion") {
        let detail = "finalizer orphan and foregroundDeletion cannot be both set";
        errors.push(FieldError::invalid(field, json!(finalizers), detail));
    }
    errors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finalizers_of_built_in_kinds_need_a_domain() {
        let complaints = |api_version: &str| {
            let obj = json!({"apiVersion": api_version, "metadata": {"finalizers": ["cleanup.example.com"]}});
            validate_finalizers(&obj).len()
        };
        let found = ["v1", "apps/v1", "apiextensions.k8s.io/v1", "example.com/v1"].map(complaints);
        assert_eq!(found, [1, 1, 0, 0]);
    }

    #[test]
    fn names_are_generated_within_the_limit() {
        let mut obj = json!({"metadata": {"generateName": "a".repeat(80)}});
        assert!(generate_name(&mut obj));
        assert_eq!(obj.name().len(), 63);
        assert!(!generate_name(&mut obj), "a name that is there stays");
    }

    #[test]
    fn metadata_rules() {
        let texts = |errors: Vec<FieldError>| errors.iter().map(ToString::to_string).collect::<Vec<_>>();
        let good = json!({"metadata": {"name": "a", "namespace": "b", "labels": {"x": "y"}}});
        assert_eq!(texts(validate(&good, true, NameRule::Dns1123Subdomain)), Vec::<String>::new());
        let nameless = json!({"metadata": {"namespace": "b"}});
        assert_eq!(
            texts(validate(&nameless, true, NameRule::Dns1123Subdomain)),
            ["metadata.name: Required value: name or generateName is required"]
        );
        let old = json!({"metadata": {"name": "a", "uid": "1", "deletionTimestamp": "t", "finalizers": ["a/b"]}});
        let new =
            json!({"metadata": {"name": "a", "uid": "2", "deletionTimestamp": "t", "finalizers": ["a/b", "c/d"]}});
        assert_eq!(
            texts(validate_update(&new, &old)),
            [
                "metadata.uid: Invalid value: \"2\": field is immutable",
                "metadata.finalizers: Forbidden: no new finalizers can be added if the object is being deleted, found new finalizers []string{\"c/d\"}"
            ]
        );
    }
}
