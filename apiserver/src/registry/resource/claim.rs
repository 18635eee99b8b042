//! `ResourceClaim` and `ResourceClaimTemplate`: devices that pods ask for, and what they got.

use apimachinery::status::FieldError;
use jiff::Timestamp;
use serde_json::Value;

use super::drop_unused;
use crate::admission::cached;
use crate::auth::{Attributes, Decision};
use crate::registry::common::{self, ALL_METADATA, keep_metadata, same};
use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Column, Cx, Strategy, Subresource, keep};
use crate::registry::tables::{age, name};
use crate::registry::{defaults, validation};

const GROUP: &str = "resource.k8s.io";
const CLAIMS: &str = "resourceclaims";
/// The label of namespaces whose claims may have devices that are in use by others.
const ADMIN_LABEL: &str = "resource.kubernetes.io/admin-access";
/// A field of a feature that is off, within the spec of a claim.
const DERIVED: [&[&str]; 2] = [
    &["devices", "requests", "*", "exactly", "derivedAttributes"],
    &["devices", "requests", "*", "firstAvailable", "*", "derivedAttributes"],
];

pub struct ResourceClaim;
pub struct ResourceClaimTemplate;
struct Status;

static STATUS: Status = Status;

fn state(obj: &Value) -> String {
    let allocated = obj["status"]["allocation"].is_object();
    let mut states = Vec::new();
    if obj.is_being_deleted() {
        states.push("deleted");
    } else if !allocated {
        states.push("pending");
    }
    if allocated {
        states.push("allocated");
        if !obj.list_at(&["status", "reservedFor"]).is_empty() {
            states.push("reserved");
        }
    }
    states.join(",")
}

/// `spec` is where the spec of the claim is.
fn drop_disabled(obj: &mut Value, old: Option<&Value>, spec: &[&str]) {
    DERIVED.iter().for_each(|path| drop_unused(obj, old, &[spec, path].concat()));
}

/// Whether the namespace lets its claims have devices that are in use.
fn admin_access(cx: &Cx<'_>, field: String) -> Option<FieldError> {
    let Some(namespace) = cached(cx.server, "", "namespaces", "", cx.namespace) else {
        let detail =
            format!("could not retrieve namespace to verify admin access: namespaces {:?} not found", cx.namespace);
        return Some(FieldError::internal(field, detail));
    };
    let detail =
        format!("admin access to devices requires the `{ADMIN_LABEL}: true` label on the containing namespace");
    (namespace.label(ADMIN_LABEL) != Some("true")).then(|| FieldError::forbidden(field, detail))
}

fn admin_access_of_spec(cx: &Cx<'_>, spec: &Value) -> Option<FieldError> {
    let wants = |request: &Value| request["exactly"]["adminAccess"] == true;
    let index = spec.list_at(&["devices", "requests"]).iter().position(wants)?;
    admin_access(cx, format!("spec.devices.requests[{index}].adminAccess"))
}

impl Strategy for ResourceClaim {
    fn default(&self, obj: &mut Value) {
        defaults::resource::claim(obj);
    }

    fn prepare_for_create(&self, _cx: &Cx<'_>, obj: &mut Value) {
        common::create_uncounted(obj);
        drop_disabled(obj, None, &["spec"]);
    }

    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        common::update_uncounted(obj, old);
        drop_disabled(obj, Some(old), &["spec"]);
    }

    fn validate_create(&self, cx: &Cx<'_>, obj: &Value) -> Vec<FieldError> {
        let mut errors = Vec::from_iter(admin_access_of_spec(cx, &obj["spec"]));
        errors.extend(validation::resource::claim(obj));
        errors
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, old: &Value) -> Vec<FieldError> {
        validation::resource::claim_update(obj, old)
    }

    fn columns(&self) -> &'static [Column] {
        const COLUMNS: &[Column] = &[Column::name(), Column::new("State", "string"), Column::age()];
        COLUMNS
    }

    fn row(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        vec![name(obj), state(obj).into(), age(obj, now)]
    }

    fn subresource(&self, name: &str) -> Option<Subresource> {
        (name == "status").then_some(Subresource::Update(&STATUS))
    }
}

impl Strategy for Status {
    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        keep(obj, old, "spec");
        keep_metadata(obj, old, ALL_METADATA);
        drop_unused(obj, Some(old), &["status", "allocation", "devices", "results", "*", "skipNodeOperations"]);
        drop_deallocated(obj, old);
    }

    fn validate_update(&self, cx: &Cx<'_>, obj: &Value, old: &Value) -> Vec<FieldError> {
        let mut errors = Vec::from_iter(admin_access_of_status(cx, obj, old));
        errors.extend(may_bind(cx, obj, old));
        if obj["status"]["allocation"].is_object() {
            errors.extend(may_report(cx, obj, old));
        }
        errors.extend(validation::resource::claim_status(obj, old));
        errors
    }

    fn reset_fields(&self) -> &'static [&'static [&'static str]] {
        &[&["metadata"], &["spec"]]
    }
}

/// What drivers say of devices goes with the allocation of the devices.
fn drop_deallocated(obj: &mut Value, old: &Value) {
    let status = obj["status"].clone();
    let Some(devices) = obj.list_at_mut(&["status", "devices"]) else { return };
    devices.retain(|device| !validation::resource::is_deallocated(device, &status, &old["status"]));
    if devices.is_empty() {
        obj.remove_at(&["status", "devices"]);
    }
}

fn admin_access_of_status(cx: &Cx<'_>, obj: &Value, old: &Value) -> Option<FieldError> {
    let granted = |obj: &Value| {
        let results = obj.list_at(&["status", "allocation", "devices", "results"]);
        results.iter().position(|result| result["adminAccess"] == true)
    };
    match (granted(old), granted(obj)) {
        (None, Some(index)) => admin_access(cx, format!("status.allocation.devices.results[{index}].adminAccess")),
        _ => None,
    }
}

/// Asks for a permission on a resource that exists only for this purpose; the refusal, if it is one.
fn refusal(cx: &Cx<'_>, attributes: &Attributes<'_>) -> Option<String> {
    match cx.server.auth.authorize(cx.server, attributes) {
        Decision::Allow(_) => None,
        Decision::Deny(reason) | Decision::NoOpinion(reason) => Some(attributes.forbidden(&reason).message),
    }
}

/// Only who may bind claims changes what a claim got and who uses it.
fn may_bind(cx: &Cx<'_>, obj: &Value, old: &Value) -> Option<FieldError> {
    if ["allocation", "reservedFor"].iter().all(|field| same(&obj["status"][*field], &old["status"][*field])) {
        return None;
    }
    let verb = verb(cx);
    let attributes = Attributes { subresource: "binding", ..Attributes::resource(cx.user, verb, GROUP, CLAIMS) };
    let why = refusal(cx, &attributes)?;
    let detail = format!(
        r#"changing status.allocation or status.reservedFor requires resource="resourceclaims/binding", verb="{verb}" permission: {why}"#
    );
    Some(FieldError::forbidden("status.allocation", detail))
}

fn verb(cx: &Cx<'_>) -> &'static str {
    if cx.is_patch { "patch" } else { "update" }
}

/// Only drivers report on their devices: on those of their own node with one permission, on all with another.
fn may_report(cx: &Cx<'_>, obj: &Value, old: &Value) -> Vec<FieldError> {
    let node = allocated_node(&obj["status"]["allocation"]);
    let mut verbs = vec![format!("arbitrary-node:{}", verb(cx))];
    if node.is_some_and(|node| runs_on(cx, node)) {
        verbs.insert(0, format!("associated-node:{}", verb(cx)));
    }
    let mut errors = Vec::new();
    for driver in changed_drivers(obj, old) {
        let refusals: Vec<Option<String>> = verbs
            .iter()
            .map(|verb| {
                let attributes = Attributes {
                    subresource: "driver",
                    namespace: cx.namespace,
                    name: driver,
                    ..Attributes::resource(cx.user, verb, GROUP, CLAIMS)
                };
                refusal(cx, &attributes)
            })
            .collect();
        if let Some(Some(why)) = refusals.first().filter(|_| refusals.iter().all(Option::is_some)) {
            let detail = format!(
                r#"changing status.devices requires resource="resourceclaims/driver", verb="[{}]" permission: {why}"#,
                verbs.join(" ")
            );
            errors.push(FieldError::forbidden("status.devices", detail));
        }
    }
    errors
}

/// The drivers of the devices whose status is new, changed or gone, in their order.
fn changed_drivers<'v>(obj: &'v Value, old: &'v Value) -> Vec<&'v str> {
    let devices = |obj: &'v Value| obj.list_at(&["status", "devices"]);
    let (new, old) = (devices(obj), devices(old));
    let missing = |device: &Value, list: &[Value]| !list.iter().any(|other| same(other, device));
    let changed =
        new.iter().filter(|device| missing(device, old)).chain(old.iter().filter(|device| missing(device, new)));
    let mut drivers: Vec<&str> = changed.map(|device| device.str_at(&["driver"])).collect();
    drivers.sort_unstable();
    drivers.dedup();
    drivers
}

/// The one node that has the devices.
fn allocated_node(allocation: &Value) -> Option<&str> {
    let [term] = allocation.list_at(&["nodeSelector", "nodeSelectorTerms"]) else { return None };
    let [field] = term.list_at(&["matchFields"]) else { return None };
    let [node] = field.list_at(&["values"]) else { return None };
    let names_it = field["key"] == "metadata.name" && field["operator"] == "In";
    node.as_str().filter(|_| names_it && term.list_at(&["matchExpressions"]).is_empty())
}

/// Whether the user is a service account of a pod on this node.
fn runs_on(cx: &Cx<'_>, node: &str) -> bool {
    const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
    let nodes = cx.user.extra.get(NODE_NAME).map(Vec::as_slice).unwrap_or_default();
    cx.user.name.starts_with("system:serviceaccount:") && nodes == [node]
}

impl Strategy for ResourceClaimTemplate {
    fn default(&self, obj: &mut Value) {
        defaults::resource::claim_template(obj);
    }

    fn prepare_for_create(&self, _cx: &Cx<'_>, obj: &mut Value) {
        drop_disabled(obj, None, &["spec", "spec"]);
    }

    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        drop_disabled(obj, Some(old), &["spec", "spec"]);
    }

    fn validate_create(&self, cx: &Cx<'_>, obj: &Value) -> Vec<FieldError> {
        let mut errors = Vec::from_iter(admin_access_of_spec(cx, &obj["spec"]["spec"]));
        errors.extend(validation::resource::template(obj));
        errors
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, old: &Value) -> Vec<FieldError> {
        let mut errors = validation::resource::template(obj);
        errors.extend(validation::resource::template_update(obj, old));
        errors
    }

    fn columns(&self) -> &'static [Column] {
        const COLUMNS: &[Column] = &[Column::name(), Column::age()];
        COLUMNS
    }

    fn row(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        vec![name(obj), age(obj, now)]
    }

    fn reset_fields(&self) -> &'static [&'static [&'static str]] {
        &[]
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn one_node_is_told_by_its_name() {
        let of = |term: Value| json!({"nodeSelector": {"nodeSelectorTerms": [term]}});
        let named = of(json!({"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n"]}]}));
        let labelled = of(json!({"matchExpressions": [{"key": "a", "operator": "Exists"}]}));
        assert_eq!((allocated_node(&named), allocated_node(&labelled)), (Some("n"), None));
    }

    #[test]
    fn what_drivers_said_goes_with_the_allocation() {
        let device = json!({"driver": "d", "pool": "p", "device": "1"});
        let allocated = json!({"status": {"allocation": {"devices": {"results": [device]}}, "devices": [device]}});
        let mut obj = json!({"status": {"devices": [device]}});
        drop_deallocated(&mut obj, &allocated);
        assert_eq!(obj, json!({"status": {}}));
        assert_eq!(changed_drivers(&obj, &allocated), ["d"]);
    }
}
