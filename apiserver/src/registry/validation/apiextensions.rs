//! Rules for custom resource definitions and aggregated APIs.

use apimachinery::meta::validation::{is_dns1035_label, is_dns1123_subdomain};
use apimachinery::status::FieldError;
use serde_json::Value;

use super::{Errors, IMMUTABLE, Path, complain, required, required_one_of};
use crate::registry::object::ObjectExt;

pub fn definition(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    let wanted = format!("{}.{}", spec.str_at(&["names", "plural"]), spec.str_at(&["group"]));
    if obj.name() != wanted {
        let detail = "must be spec.names.plural+\".\"+spec.group";
        errors.push(FieldError::invalid("metadata.name", obj.name(), detail));
    }
    group(spec, &mut errors);
    required_one_of(spec, "scope", &["Cluster", "Namespaced"], Path::SPEC, &mut errors);
    versions(spec, &mut errors);
    names(&spec["names"], &mut errors);
    conversion(spec, &mut errors);
    errors
}

fn group(spec: &Value, errors: &mut Errors) {
    let Some(group) = required(spec, "group", Path::SPEC, errors) else { return };
    complain(is_dns1123_subdomain(group), group, Path::SPEC.field("group"), errors);
    if group.split('.').count() < 2 {
        errors.push(FieldError::invalid("spec.group", group, "should be a domain with at least one dot"));
    }
}

fn versions(spec: &Value, errors: &mut Errors) {
    let list = spec.list_at(&["versions"]);
    let path = Path::SPEC.field("versions");
    let mut names = Vec::new();
    for (index, version) in list.iter().enumerate() {
        let path = path.index(index);
        let name = version.str_at(&["name"]);
        complain(is_dns1035_label(name), name, path.field("name"), errors);
        super::unique(&mut names, name, path.field("name"), errors);
        if version["schema"]["openAPIV3Schema"].is_null() {
            let field = path.field("schema");
            errors.push(FieldError::required(field.field("openAPIV3Schema"), ""));
        } else {
            schema_root(&version["schema"]["openAPIV3Schema"], path, errors);
        }
    }
    if list.iter().filter(|version| version["storage"] == true).count() != 1 {
        let detail = "must have exactly one version marked as storage version";
        errors.push(FieldError::invalid(path, spec["versions"].clone(), detail));
        if !list.iter().any(|version| version["storage"] == true) {
            errors.push(FieldError::invalid(
                "status.storedVersions",
                Value::Null,
                "must have at least one stored version",
            ));
        }
    }
}

fn schema_root(schema: &Value, path: Path<'_>, errors: &mut Errors) {
    let field = path.field("schema");
    let field = field.field("openAPIV3Schema");
    match schema.str_at(&["type"]) {
        "object" => {}
        "" => errors.push(FieldError::required(field.field("type"), "must not be empty at the root")),
        other => errors.push(FieldError::invalid(field.field("type"), other, "must be object at the root")),
    }
}

fn names(names: &Value, errors: &mut Errors) {
    let path = Path::SPEC.field("names");
    for (field, lower) in [("plural", false), ("singular", false), ("kind", true), ("listKind", true)] {
        let text = names.str_at(&[field]);
        if text.is_empty() {
            errors.push(FieldError::required(path.field(field), ""));
            continue;
        }
        let checked = if lower { text.to_lowercase() } else { text.to_owned() };
        complain(is_dns1035_label(&checked), text, path.field(field), errors);
    }
    for field in ["shortNames", "categories"] {
        let list = path.field(field);
        for (index, name) in names.list_at(&[field]).iter().enumerate() {
            let text = name.as_str().unwrap_or_default();
            complain(is_dns1035_label(text), text, list.index(index), errors);
        }
    }
    if !names.str_at(&["kind"]).is_empty() && names["kind"] == names["listKind"] {
        let detail = "kind and listKind may not be the same";
        errors.push(FieldError::invalid(path.field("listKind"), names["listKind"].clone(), detail));
    }
}

fn conversion(spec: &Value, errors: &mut Errors) {
    let path = Path::SPEC.field("conversion");
    let conversion = &spec["conversion"];
    required_one_of(conversion, "strategy", &["None", "Webhook"], path, errors);
    if conversion["strategy"] == "Webhook" {
        let path = path.field("webhook");
        if conversion["webhook"]["clientConfig"].is_null() {
            let detail = "required when strategy is set to Webhook";
            errors.push(FieldError::required(path.field("clientConfig"), detail));
        } else {
            super::webhooks::client_config(&conversion["webhook"]["clientConfig"], path.field("clientConfig"), errors);
        }
        if conversion["webhook"].list_at(&["conversionReviewVersions"]).is_empty() {
            errors.push(FieldError::required(path.field("conversionReviewVersions"), ""));
        }
    } else if !conversion["webhook"].is_null() {
        let detail = "should not be set when strategy is not set to Webhook";
        errors.push(FieldError::forbidden(path.field("webhook"), detail));
    }
}

pub fn definition_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = definition(obj);
    let (spec, stored) = (&obj["spec"], &old["spec"]);
    let established = crate::registry::tables::has_condition(old, "Established");
    if established {
        super::immutable(spec, stored, "scope", Path::SPEC, &mut errors);
        if spec["names"]["kind"] != stored["names"]["kind"] {
            errors.push(FieldError::invalid("spec.names.kind", spec["names"]["kind"].clone(), IMMUTABLE));
        }
    }
    super::immutable(spec, stored, "group", Path::SPEC, &mut errors);
    if spec["names"]["plural"] != stored["names"]["plural"] {
        errors.push(FieldError::invalid("spec.names.plural", spec["names"]["plural"].clone(), IMMUTABLE));
    }
    let known: Vec<&Value> = spec.list_at(&["versions"]).iter().map(|version| &version["name"]).collect();
    for (index, version) in old.list_at(&["status", "storedVersions"]).iter().enumerate() {
        if !known.contains(&version) {
            let path = Path::STATUS.field("storedVersions");
            let detail = "must appear in spec.versions";
            errors.push(FieldError::invalid(path.index(index), version.clone(), detail));
        }
    }
    errors
}

pub fn api_service(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    let wanted = format!("{}.{}", spec.str_at(&["version"]), spec.str_at(&["group"]));
    if obj.name() != wanted {
        let detail = format!("must be `spec.version+\".\"+spec.group`: {wanted:?}");
        errors.push(FieldError::invalid("metadata.name", obj.name(), detail));
    }
    let limits = [("groupPriorityMinimum", 20_000), ("versionPriority", 1_000)];
    for (field, most) in limits {
        let number = spec[field].as_i64().unwrap_or(0);
        if number <= 0 || number > most {
            let detail = format!("must be positive and less than {most}");
            errors.push(FieldError::invalid(Path::SPEC.field(field), number, detail));
        }
    }
    if spec["service"].is_null() {
        if !spec.str_at(&["caBundle"]).is_empty() {
            let detail = "local APIServices may not have a caBundle";
            errors.push(FieldError::invalid("spec.caBundle", "<redacted>", detail));
        }
    } else {
        let path = Path::SPEC.field("service");
        required(&spec["service"], "namespace", path, &mut errors);
        required(&spec["service"], "name", path, &mut errors);
    }
    errors
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;
    use crate::registry::defaults;

    #[test]
    fn definitions_are_named_after_what_they_define() {
        let mut obj = json!({"metadata": {"name": "crontabs.example.com"}, "spec": {"group": "example.com", "scope": "Namespaced",
            "names": {"plural": "crontabs", "kind": "CronTab"},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {"type": "object"}}}]}});
        defaults::admission::custom_resource_definition(&mut obj);
        assert_eq!(texts(&definition(&obj)), Vec::<String>::new());
        obj["metadata"]["name"] = "x".into();
        obj["spec"]["versions"][0]["storage"] = false.into();
        let problems = texts(&definition(&obj));
        assert_eq!(problems[0], r#"metadata.name: Invalid value: "x": must be spec.names.plural+"."+spec.group"#);
        assert!(problems[1].ends_with("must have exactly one version marked as storage version"));
    }
}
