//! Rules for custom resource definitions and aggregated APIs. Like upstream, which knows them from older versions of
//! the definition, they look for what all versions say alike at the top, and complain of it there.

use apimachinery::meta::validation::{is_dns1035_label, is_dns1123_subdomain};
use apimachinery::status::FieldError;
use serde_json::Value;

use super::admission::mixed_case_label;
use super::webhooks::{client_config, port, review_versions};
use super::{Errors, Path, complain, custom_schema, go_versions, immutable, required, required_one_of};
use crate::registry::common::same;
use crate::registry::object::ObjectExt;
use crate::registry::tables::has_condition;

const MOST_SELECTABLE: usize = 8;
const LONGEST_WARNING: usize = 256;

/// How strict the rules are: an update may leave what was wrong before.
#[derive(Clone, Copy, Default)]
struct Leniency {
    schemas: custom_schema::Options,
    no_schema: bool,
    review_versions: bool,
    preserve: bool,
}

/// What the versions say, each for itself unless all say the same.
struct Parts<'a> {
    /// The versions as they were given, if they were.
    given: &'a Value,
    versions: &'a [Value],
    /// Fields of versions that are the same in all of them.
    shared: Vec<&'static str>,
}

impl<'a> Parts<'a> {
    fn read(spec: &'a Value) -> Self {
        let versions = spec.list_at(&["versions"]);
        let fields = ["schema", "subresources", "additionalPrinterColumns", "selectableFields"];
        let is_shared = |field: &str| versions.windows(2).all(|pair| alike(&pair[0][field], &pair[1][field]));
        let shared = fields.into_iter().filter(|field| is_shared(field)).collect();
        Self { given: &spec["versions"], versions, shared }
    }

    /// The field of a version, `Null` when it is looked at at the top.
    fn own(&self, version: &'a Value, field: &'static str) -> &'a Value {
        if self.shared.contains(&field) { &Value::Null } else { &version[field] }
    }

    /// The field that all versions share.
    fn top(&self, field: &'static str) -> &'a Value {
        match self.versions.first() {
            Some(first) if self.shared.contains(&field) => &first[field],
            _ => &Value::Null,
        }
    }
}

/// Whether two fields say the same. Unlike elsewhere, an empty object is not nothing.
fn alike(a: &Value, b: &Value) -> bool {
    a.is_null() == b.is_null() && same(a, b)
}

pub fn definition(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    let wanted = format!("{}.{}", spec.str_at(&["names", "plural"]), spec.str_at(&["group"]));
    if !obj.name().is_empty() && obj.name() != wanted {
        let detail = "must be spec.names.plural+\".\"+spec.group";
        errors.push(FieldError::invalid("metadata.name", obj.name(), detail));
    }
    specification(spec, Leniency::default(), &mut errors);
    rest(obj, Leniency::default(), &mut errors);
    errors
}

pub fn definition_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    let (spec, stored) = (&obj["spec"], &old["spec"]);
    let leniency = leniency(stored);
    specification(spec, leniency, &mut errors);
    let names = Path::SPEC.field("names");
    if has_condition(old, "Established") {
        immutable_text(spec, stored, "scope", Path::SPEC, &mut errors);
        immutable_text(&spec["names"], &stored["names"], "kind", names, &mut errors);
    }
    immutable_text(spec, stored, "group", Path::SPEC, &mut errors);
    immutable_text(&spec["names"], &stored["names"], "plural", names, &mut errors);
    rest(obj, leniency, &mut errors);
    errors
}

/// Upstream prints what is missing as an empty text.
fn immutable_text(obj: &Value, old: &Value, field: &str, path: Path<'_>, errors: &mut Errors) {
    let text = |obj: &Value| serde_json::json!({field: obj.str_at(&[field])});
    immutable(&text(obj), &text(old), field, path, errors);
}

/// What the stored definition already lacked.
fn leniency(stored: &Value) -> Leniency {
    let schemas = || {
        let versions = stored.list_at(&["versions"]).iter();
        versions.map(|version| &version["schema"]["openAPIV3Schema"]).filter(|schema| schema.is_object())
    };
    let any = |is: fn(&Value) -> bool| schemas().any(|schema| custom_schema::has(schema, &is));
    let found = |check: fn(&Value, Path<'_>, &mut Errors), schema: &Value| {
        let mut errors = Errors::new();
        check(schema, Path::Root(""), &mut errors);
        !errors.is_empty()
    };
    Leniency {
        schemas: custom_schema::Options {
            has_status: false,
            any_type: any(custom_schema::has_unknown_type),
            any_structure: schemas().any(|schema| {
                !custom_schema::is_convertible(schema) || !super::structural::check(schema, Path::Root("")).is_empty()
            }),
            any_set: any(|schema| {
                schema["x-kubernetes-list-type"] == "set" && custom_schema::loose_field(&schema["items"]).is_some()
            }),
            any_map_keys: schemas()
                .any(|schema| custom_schema::has(schema, &|schema| found(custom_schema::list_items, schema))),
            any_cost: schemas().any(super::schema_rules::is_too_expensive),
        },
        no_schema: schemas().count() < stored.list_at(&["versions"]).len(),
        review_versions: {
            let versions = stored["conversion"]["webhook"].list_at(&["conversionReviewVersions"]);
            !versions.is_empty() && !versions.iter().any(|version| version == "v1" || version == "v1beta1")
        },
        preserve: stored["preserveUnknownFields"] == true,
    }
}

/// The status, and what has to do with more than the spec.
fn rest(obj: &Value, leniency: Leniency, errors: &mut Errors) {
    names(&obj["status"]["acceptedNames"], Path::STATUS.field("acceptedNames"), errors);
    stored_versions(obj, errors);
    if obj["spec"]["preserveUnknownFields"] == true && !leniency.preserve {
        let detail =
            "cannot set to true, set x-kubernetes-preserve-unknown-fields to true in spec.versions[*].schema instead";
        errors.push(FieldError::invalid("spec.preserveUnknownFields", true, detail));
    }
}

/// The names alone, which the status has, too.
pub fn status_update(obj: &Value, _old: &Value) -> Errors {
    let mut errors = Errors::new();
    names(&obj["status"]["acceptedNames"], Path::STATUS.field("acceptedNames"), &mut errors);
    errors
}

fn stored_versions(obj: &Value, errors: &mut Errors) {
    let stored = obj.list_at(&["status", "storedVersions"]);
    let path = Path::STATUS.field("storedVersions");
    if stored.is_empty() {
        return errors.push(FieldError::invalid(path, Value::Null, "must have at least one stored version"));
    }
    let versions = obj.list_at(&["spec", "versions"]);
    for (index, version) in versions.iter().enumerate() {
        // Only the first of several versions with one name is the stored one.
        let is_known = stored.contains(&version["name"])
            && versions[..index].iter().all(|earlier| earlier["name"] != version["name"]);
        if version["storage"] == true && !is_known {
            let detail = format!("must have the storage version {}", version.str_at(&["name"]));
            errors.push(FieldError::invalid(path, stored.to_vec(), detail));
        }
    }
    for (index, name) in stored.iter().enumerate() {
        if !versions.iter().any(|version| version["name"] == *name) {
            let name = name.as_str().unwrap_or_default();
            let detail = format!(
                "missing from spec.versions; {name} was previously a storage version, and must remain in spec.versions until a storage migration ensures no data remains persisted in {name} and removes {name} from status.storedVersions"
            );
            errors.push(FieldError::invalid(path.index(index), name, detail));
        }
    }
}

fn specification(spec: &Value, leniency: Leniency, errors: &mut Errors) {
    let parts = Parts::read(spec);
    group(spec, errors);
    required_one_of(spec, "scope", &["Cluster", "Namespaced"], Path::SPEC, errors);
    missing_schemas(&parts, leniency, errors);
    let has_default = |version: &Value| {
        custom_schema::has(&version["schema"]["openAPIV3Schema"], &|schema| !schema["default"].is_null())
    };
    if spec["preserveUnknownFields"] == true && parts.versions.iter().any(has_default) {
        let detail = "must be false in order to use defaults in the schema";
        errors.push(FieldError::invalid("spec.preserveUnknownFields", true, detail));
    }
    versions(&parts, leniency, errors);
    let path = Path::SPEC.field("names");
    for field in ["plural", "singular", "kind", "listKind"] {
        required(&spec["names"], field, path, errors);
    }
    names(&spec["names"], path, errors);
    shared_parts(&parts, leniency, errors);
    if spec["preserveUnknownFields"] == true && spec["conversion"]["strategy"] == "Webhook" {
        let detail = "must be None if spec.preserveUnknownFields is true";
        errors.push(FieldError::invalid("spec.conversion.strategy", "Webhook", detail));
    }
    conversion(spec, leniency, errors);
}

fn group(spec: &Value, errors: &mut Errors) {
    let Some(group) = required(spec, "group", Path::SPEC, errors) else { return };
    if !joined(group, is_dns1123_subdomain(group), "spec.group", errors) && group.split('.').count() < 2 {
        errors.push(FieldError::invalid("spec.group", group, "should be a domain with at least one dot"));
    }
}

/// All problems of a text that is not empty as one; answers whether there are any.
fn joined(text: &str, problems: Vec<String>, path: impl std::fmt::Display, errors: &mut Errors) -> bool {
    let is_wrong = !text.is_empty() && !problems.is_empty();
    if is_wrong {
        errors.push(FieldError::invalid(path, text, problems.join(",")));
    }
    is_wrong
}

fn missing_schemas(parts: &Parts<'_>, leniency: Leniency, errors: &mut Errors) {
    let list = Path::SPEC.field("versions");
    for (index, version) in parts.versions.iter().enumerate() {
        let wanted = !leniency.no_schema || version["served"] == true;
        if version["schema"]["openAPIV3Schema"].is_null() && wanted {
            let (version, detail) = match leniency.no_schema {
                true => (list.index(index), "because otherwise all fields are pruned"),
                false => (list.index(index), ""),
            };
            let schema = version.field("schema");
            errors.push(FieldError::required(schema.field("openAPIV3Schema"), detail));
        }
    }
}

fn has_status(subresources: &Value) -> bool {
    !subresources["status"].is_null()
}

fn versions(parts: &Parts<'_>, leniency: Leniency, errors: &mut Errors) {
    let path = Path::SPEC.field("versions");
    for (index, version) in parts.versions.iter().enumerate() {
        let path = path.index(index);
        let name = version.str_at(&["name"]);
        let problems = is_dns1035_label(name);
        if !problems.is_empty() {
            errors.push(FieldError::invalid(path.field("name"), name, problems.join(",")));
        }
        deprecation(version, path, errors);
        let schemas = custom_schema::Options { has_status: has_status(&version["subresources"]), ..leniency.schemas };
        let schema = parts.own(version, "schema");
        custom_schema::schema(schema, path.field("schema"), schemas, errors);
        subresources(parts.own(version, "subresources"), path.field("subresources"), errors);
        columns(parts.own(version, "additionalPrinterColumns"), path, errors);
        let fields = parts.own(version, "selectableFields");
        if is_empty_list(fields) {
            continue;
        }
        if schema["openAPIV3Schema"].is_null() {
            let detail = "may only be set when `version.schema.openAPIV3Schema` is not included";
            errors.push(FieldError::invalid(path.field("selectableFields"), "", detail));
        } else {
            selectable(fields, &schema["openAPIV3Schema"], path.field("selectableFields"), errors);
        }
    }
    let wrong = |detail: &str| go_versions::invalid(path, parts.given, &parts.shared, detail);
    let names: Vec<&str> = parts.versions.iter().map(|version| version.str_at(&["name"])).collect();
    if names.iter().enumerate().any(|(index, name)| names[..index].contains(name)) {
        errors.push(wrong("must contain unique version names"));
    }
    if parts.versions.iter().filter(|version| version["storage"] == true).count() != 1 {
        errors.push(wrong("must have exactly one version marked as storage version"));
    }
    if let Some(first) = names.first() {
        joined(first, is_dns1035_label(first), "spec.version", errors);
    }
}

fn is_empty_list(list: &Value) -> bool {
    list.as_array().is_none_or(Vec::is_empty)
}

fn deprecation(version: &Value, path: Path<'_>, errors: &mut Errors) {
    let Some(text) = version["deprecationWarning"].as_str() else { return };
    let mut wrong = |detail: &str| errors.push(FieldError::invalid(path.field("deprecationWarning"), text, detail));
    if version["deprecated"] != true {
        return wrong("can only be set for deprecated versions");
    }
    if text.len() > LONGEST_WARNING {
        wrong(&format!("must be <= {LONGEST_WARNING} characters long"));
    }
    if text.is_empty() {
        wrong("must not be an empty string");
    }
    if let Some((index, _)) = text.char_indices().find(|(_, letter)| letter.is_control()) {
        wrong(&format!("must only contain printable UTF-8 characters; non-printable character found at index {index}"));
    }
}

/// What all versions share.
fn shared_parts(parts: &Parts<'_>, leniency: Leniency, errors: &mut Errors) {
    let schema = parts.top("schema");
    let any_status = parts.versions.iter().any(|version| has_status(&version["subresources"]));
    let schemas = custom_schema::Options { has_status: any_status, ..leniency.schemas };
    custom_schema::schema(schema, Path::SPEC.field("validation"), schemas, errors);
    subresources(parts.top("subresources"), Path::SPEC.field("subresources"), errors);
    columns(parts.top("additionalPrinterColumns"), Path::SPEC, errors);
    let fields = parts.top("selectableFields");
    if !is_empty_list(fields) {
        let path = Path::SPEC.field("selectableFields");
        if schema.is_null() {
            let detail = "may only be set when validations.schema is included";
            errors.push(FieldError::invalid(path, "", detail));
        } else {
            selectable(fields, &schema["openAPIV3Schema"], path, errors);
        }
    }
}

fn names(names: &Value, path: Path<'_>, errors: &mut Errors) {
    for field in ["plural", "singular"] {
        let text = names.str_at(&[field]);
        joined(text, is_dns1035_label(text), path.field(field), errors);
    }
    for field in ["kind", "listKind"] {
        let text = names.str_at(&[field]);
        if !text.is_empty() {
            mixed_case_label(text, path.field(field), errors);
        }
    }
    for field in ["shortNames", "categories"] {
        let list = path.field(field);
        for (index, name) in names.list_at(&[field]).iter().enumerate() {
            let text = name.as_str().unwrap_or_default();
            let problems = is_dns1035_label(text);
            if !problems.is_empty() {
                errors.push(FieldError::invalid(list.index(index), text, problems.join(",")));
            }
        }
    }
    if !names.str_at(&["kind"]).is_empty() && names["kind"] == names["listKind"] {
        let detail = "kind and listKind may not be the same";
        errors.push(FieldError::invalid(path.field("listKind"), names["listKind"].clone(), detail));
    }
}

fn columns(list: &Value, path: Path<'_>, errors: &mut Errors) {
    const TYPES: [&str; 5] = ["boolean", "date", "integer", "number", "string"];
    const FORMATS: [&str; 8] = ["byte", "date", "date-time", "double", "float", "int32", "int64", "password"];
    let path = path.field("additionalPrinterColumns");
    for (index, column) in list.as_array().into_iter().flatten().enumerate() {
        let path = path.index(index);
        required(column, "name", path, errors);
        let one_of = |allowed: &[&str]| format!("must be one of {}", allowed.join(","));
        match column.str_at(&["type"]) {
            "" => errors.push(FieldError::required(path.field("type"), one_of(&TYPES))),
            kind if TYPES.contains(&kind) => {}
            kind => errors.push(FieldError::invalid(path.field("type"), kind, one_of(&TYPES))),
        }
        let format = column.str_at(&["format"]);
        if !format.is_empty() && !FORMATS.contains(&format) {
            errors.push(FieldError::invalid(path.field("format"), format, one_of(&FORMATS)));
        }
        simple_path(column, "jsonPath", path.field("JSONPath"), errors);
    }
}

/// A path that must be there and begin with a dot; what it is, when it is well formed.
fn simple_path<'v>(owner: &'v Value, field: &str, path: Path<'_>, errors: &mut Errors) -> Option<&'v str> {
    match owner.str_at(&[field]) {
        "" => errors.push(FieldError::required(path, "")),
        text if !text.starts_with('.') => {
            errors.push(FieldError::invalid(path, text, "must be a simple json path starting with ."));
        }
        text => return Some(text),
    }
    None
}

fn subresources(subresources: &Value, path: Path<'_>, errors: &mut Errors) {
    let scale = &subresources["scale"];
    if scale.is_null() {
        return;
    }
    let path = path.field("scale");
    for (field, under) in [("specReplicasPath", ".spec"), ("statusReplicasPath", ".status")] {
        let field_path = path.field(field);
        if let Some(text) = simple_path(scale, field, field_path, errors)
            && !text.starts_with(&format!("{under}."))
        {
            errors.push(FieldError::invalid(field_path, text, format!("should be a json path under {under}")));
        }
    }
    if !scale.str_at(&["labelSelectorPath"]).is_empty() {
        let field_path = path.field("labelSelectorPath");
        if let Some(text) = simple_path(scale, "labelSelectorPath", field_path, errors)
            && !text.starts_with(".spec.")
            && !text.starts_with(".status.")
        {
            let detail = "should be a json path under either .spec or .status";
            errors.push(FieldError::invalid(field_path, text, detail));
        }
    }
}

/// Fields that objects can be selected by, each of which the schema must know as a scalar.
fn selectable(fields: &Value, schema: &Value, path: Path<'_>, errors: &mut Errors) {
    let mut seen: Vec<&str> = Vec::new();
    for (index, field) in fields.as_array().into_iter().flatten().enumerate() {
        let path = path.index(index);
        let Some(text) = required(field, "jsonPath", path, errors) else { continue };
        let path = path.field("jsonPath");
        match field_at(text, schema) {
            Err(why) => errors.push(FieldError::invalid(path, text, format!("is an invalid path: {why}"))),
            Ok(found) => {
                if text == ".metadata" || text.starts_with(".metadata.") {
                    errors.push(FieldError::invalid(path, text, "must not point to fields in metadata"));
                }
                if !matches!(found.str_at(&["type"]), "string" | "boolean" | "integer") {
                    let detail = "must point to a field of type string, boolean or integer. Enum string fields and strings with formats are allowed.";
                    errors.push(FieldError::invalid(path, text, detail));
                }
                super::unique(&mut seen, text, path, errors);
            }
        }
    }
    if seen.len() > MOST_SELECTABLE {
        errors.push(FieldError::too_many(path, seen.len(), MOST_SELECTABLE));
    }
}

/// The schema at a path of fields.
fn field_at<'v>(path: &str, mut schema: &'v Value) -> Result<&'v Value, String> {
    const UNKNOWN: &str = "does not refer to a valid field";
    let first = path.split(['.', '[', ']']).next().unwrap_or_default();
    if !first.is_empty() {
        return Err(format!("expected [ or . but got: {first}"));
    }
    if path.contains('[') {
        return Err("array notation is not allowed".into());
    }
    for name in path.split('.').skip(1) {
        if name.is_empty() {
            return Err("unexpected end of JSON path".into());
        }
        let properties = &schema["properties"];
        schema = match properties.as_object().filter(|map| !map.is_empty()) {
            Some(map) => map.get(name).ok_or(UNKNOWN)?,
            None if schema["additionalProperties"].is_object() => &schema["additionalProperties"],
            None => return Err(UNKNOWN.into()),
        };
    }
    Ok(schema)
}

fn conversion(spec: &Value, leniency: Leniency, errors: &mut Errors) {
    let path = Path::SPEC.field("conversion");
    let conversion = &spec["conversion"];
    if conversion.is_null() {
        return;
    }
    required_one_of(conversion, "strategy", &["None", "Webhook"], path, errors);
    let webhook = &conversion["webhook"];
    let config = path.field("webhookClientConfig");
    if conversion["strategy"] == "Webhook" {
        if webhook["clientConfig"].is_null() {
            errors.push(FieldError::required(config, "required when strategy is set to Webhook"));
        } else {
            client_config(&webhook["clientConfig"], config, errors);
        }
        let accepted = (!leniency.review_versions).then_some(&["v1", "v1beta1"][..]);
        review_versions(webhook, "conversionReviewVersions", "", accepted, path, errors);
        return;
    }
    let detail = "should not be set when strategy is not set to Webhook";
    if !webhook["clientConfig"].is_null() {
        errors.push(FieldError::forbidden(config, detail));
    }
    if !webhook.list_at(&["conversionReviewVersions"]).is_empty() {
        errors.push(FieldError::forbidden(path.field("conversionReviewVersions"), detail));
    }
}

/// Aggregated APIs: who answers a group and version.
pub fn api_service(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    let (group, version) = (spec.str_at(&["group"]), spec.str_at(&["version"]));
    let wanted = format!("{version}.{group}");
    if !obj.name().is_empty() && obj.name() != wanted {
        let detail = format!("must be `spec.version+\".\"+spec.group`: {wanted:?}");
        errors.push(FieldError::invalid("metadata.name", obj.name(), detail));
    }
    if !group.is_empty() {
        complain(is_dns1123_subdomain(group), group, Path::SPEC.field("group"), &mut errors);
    }
    if group.is_empty() && version != "v1" {
        let detail = "only v1 may have an empty group and it better be legacy kube";
        errors.push(FieldError::required("spec.group", detail));
    }
    complain(is_dns1035_label(version), version, Path::SPEC.field("version"), &mut errors);
    let limits = [("groupPriorityMinimum", 20_000), ("versionPriority", 1_000)];
    for (field, most) in limits {
        let number = spec[field].as_i64().unwrap_or(0);
        if number <= 0 || number > most {
            let detail = format!("must be positive and less than {most}");
            errors.push(FieldError::invalid(Path::SPEC.field(field), number, detail));
        }
    }
    if spec["service"].is_null() {
        local_api(spec, &mut errors);
        return errors;
    }
    let path = Path::SPEC.field("service");
    required(&spec["service"], "namespace", path, &mut errors);
    required(&spec["service"], "name", path, &mut errors);
    port(&spec["service"], path, &mut errors);
    if spec["insecureSkipTLSVerify"] == true && !spec.str_at(&["caBundle"]).is_empty() {
        let detail = "may not be true if caBundle is present";
        errors.push(FieldError::invalid("spec.insecureSkipTLSVerify", true, detail));
    }
    errors
}

/// What this server answers itself needs no trust.
fn local_api(spec: &Value, errors: &mut Errors) {
    let bundle = spec.str_at(&["caBundle"]);
    if !bundle.is_empty() {
        let shown = format!("{} bytes", bundle.len());
        errors.push(FieldError::invalid("spec.caBundle", shown, "local APIServices may not have a caBundle"));
    }
    if spec["insecureSkipTLSVerify"] == true {
        let detail = "local APIServices may not have insecureSkipTLSVerify";
        errors.push(FieldError::invalid("spec.insecureSkipTLSVerify", true, detail));
    }
}

/// Conditions are true, false or unknown.
pub fn api_service_status(obj: &Value, _old: &Value) -> Errors {
    let mut errors = Errors::new();
    super::each(&obj["status"], "conditions", Path::STATUS, &mut errors, |condition, path, errors| {
        let (given, allowed) = (condition.str_at(&["status"]), ["True", "False", "Unknown"]);
        if !allowed.contains(&given) {
            errors.push(FieldError::not_supported(path.field("status"), given, &allowed));
        }
    });
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
