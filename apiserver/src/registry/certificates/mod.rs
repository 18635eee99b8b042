//! The `certificates.k8s.io` group: `CertificateSigningRequest`, and who may approve and sign it; `ClusterTrustBundle`,
//! whose name says whose anchors it holds; `PodCertificateRequest`, which kubelets make and signers answer.

use apimachinery::status::FieldError;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::common::{ALL_METADATA, StatusOf, keep_metadata};
use super::declared::{Declared, Shape};
use super::object::ObjectExt;
use super::strategy::{Column, Cx, NameRule, Strategy, Subresource, keep};
use super::tables::{NONE, age, human_duration, labels, name, text, text_or};
use super::validation;

pub struct CertificateSigningRequest;

/// Trust anchors: of a signer, or of nobody in particular.
pub static CLUSTER_TRUST_BUNDLE: Declared = Declared::new(Shape::Plain)
    .named(NameRule::Custom(validation::certificates::bundle_name))
    .updated_by_version()
    .create_rules(validation::certificates::bundle_create)
    .update_rules(validation::certificates::bundle_update)
    .selectable(&["spec.signerName"])
    .table(&[Column::name(), Column::new("SignerName", "string")], |obj, _| {
        vec![name(obj), text_or(obj, &["spec", "signerName"], NONE)]
    });

/// In seconds.
const DAY: i64 = 86_400;

static POD_REQUEST_STATUS: StatusOf = StatusOf::new()
    .keeping(ALL_METADATA)
    .resetting(&[&["metadata"], &["spec"]])
    .validated(validation::certificates::pod_request_status);

/// A pod's wish for a certificate; what was asked for never changes.
pub static POD_CERTIFICATE_REQUEST: Declared = Declared::new(Shape::WithStatus)
    .defaults(|obj| obj.set_default(&["spec", "maxExpirationSeconds"], DAY))
    .updated_by_version()
    .create_rules(validation::certificates::pod_request)
    .update_rules(validation::certificates::pod_request_update)
    .status(&POD_REQUEST_STATUS)
    .selectable(&["spec.signerName", "spec.podName", "spec.nodeName"])
    .table(
        &[
            Column::name(),
            Column::new("PodName", "string"),
            Column::new("ServiceAccountName", "string"),
            Column::new("NodeName", "string"),
            Column::new("SignerName", "string"),
            Column::new("State", "string"),
            Column::new("UnverifiedUserAnnotations", "string"),
        ],
        |obj, _| {
            let conditions = obj.list_at(&["status", "conditions"]).iter();
            let mut answers = conditions.filter_map(|condition| condition["type"].as_str());
            let state = answers.rfind(|kind| matches!(*kind, "Issued" | "Denied" | "Failed"));
            vec![
                name(obj),
                text(obj, &["spec", "podName"]),
                text(obj, &["spec", "serviceAccountName"]),
                text(obj, &["spec", "nodeName"]),
                text(obj, &["spec", "signerName"]),
                state.unwrap_or("Pending").into(),
                labels(&obj["spec"]["unverifiedUserAnnotations"]),
            ]
        },
    );

/// What signers write.
struct Status;

/// What approvers write: conditions only.
struct Approval;

const COLUMNS: &[Column] = &[
    Column::name(),
    Column::age(),
    Column::new("SignerName", "string"),
    Column::new("Requestor", "string"),
    Column::new("RequestedDuration", "string"),
    Column::new("Condition", "string"),
];

static STATUS: Status = Status;
static APPROVAL: Approval = Approval;

fn condition(obj: &Value) -> String {
    let has = |kind: &str| obj.list_at(&["status", "conditions"]).iter().any(|c| c["type"] == kind);
    let mut text = match (has("Denied"), has("Approved")) {
        (true, _) => "Denied",
        (false, true) => "Approved",
        (false, false) => "Pending",
    }
    .to_owned();
    if has("Failed") {
        text.push_str(",Failed");
    }
    if !obj.str_at(&["status", "certificate"]).is_empty() {
        text.push_str(",Issued");
    }
    text
}

impl Strategy for CertificateSigningRequest {
    /// Who asks is what authentication says, never what the request says.
    fn prepare_for_create(&self, cx: &Cx<'_>, obj: &mut Value) {
        for field in ["username", "uid", "groups", "extra"] {
            obj.remove_at(&["spec", field]);
        }
        let user = cx.user;
        obj.set(&["spec", "username"], user.name.as_str());
        if !user.uid.is_empty() {
            obj.set(&["spec", "uid"], user.uid.as_str());
        }
        if !user.groups.is_empty() {
            obj.set(&["spec", "groups"], user.groups.clone());
        }
        if !user.extra.is_empty() {
            obj.set(&["spec", "extra"], json!(user.extra));
        }
        obj.set(&["status"], json!({}));
    }

    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        keep(obj, old, "spec");
        keep(obj, old, "status");
    }

    fn validate_create(&self, _cx: &Cx<'_>, obj: &Value) -> Vec<FieldError> {
        validation::certificates::request(obj)
    }

    fn name_rule(&self) -> NameRule {
        NameRule::PathSegment
    }

    fn reset_fields(&self) -> &'static [&'static [&'static str]] {
        &[&["spec"], &["status"]]
    }

    fn selectable_fields(&self) -> &'static [&'static str] {
        &["spec.signerName"]
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn row(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let duration = obj.i64_at(&["spec", "expirationSeconds"]).map_or_else(|| NONE.to_owned(), human_duration);
        vec![
            name(obj),
            age(obj, now),
            text_or(obj, &["spec", "signerName"], NONE),
            text(obj, &["spec", "username"]),
            duration.into(),
            condition(obj).into(),
        ]
    }

    fn subresource(&self, name: &str) -> Option<Subresource> {
        match name {
            "status" => Some(Subresource::Update(&STATUS)),
            "approval" => Some(Subresource::Update(&APPROVAL)),
            _ => None,
        }
    }
}

/// Conditions without times get the time of the write, or keep that of the same condition stored before.
fn stamp_conditions(obj: &mut Value, old: &Value, now: Timestamp) {
    let now = now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let Some(conditions) = obj.list_at_mut(&["status", "conditions"]) else { return };
    for condition in conditions {
        let stored = old
            .list_at(&["status", "conditions"])
            .iter()
            .find(|c| c["type"] == condition["type"] && c["status"] == condition["status"]);
        let since = stored.map_or("", |c| c.str_at(&["lastTransitionTime"]));
        condition.set_default(&["lastUpdateTime"], now.as_str());
        condition.set_default(&["lastTransitionTime"], if since.is_empty() { now.as_str() } else { since });
    }
}

impl Strategy for Status {
    fn prepare_for_update(&self, cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        keep(obj, old, "spec");
        keep_metadata(obj, old, &["deletionTimestamp"]);
        for kind in ["Approved", "Denied"] {
            preserve_conditions(obj, old, kind);
        }
        stamp_conditions(obj, old, cx.now);
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, old: &Value) -> Vec<FieldError> {
        validation::certificates::status_update(obj, old)
    }

    fn reset_fields(&self) -> &'static [&'static [&'static str]] {
        &[&["spec"], &["status", "conditions"]]
    }
}

/// A signer's write does not touch what approvers said.
fn preserve_conditions(obj: &mut Value, old: &Value, kind: &str) {
    let stored: Vec<&Value> = old.list_at(&["status", "conditions"]).iter().filter(|c| c["type"] == kind).collect();
    let Some(conditions) = obj.list_at_mut(&["status", "conditions"]) else { return };
    let of_kind: Vec<&mut Value> = conditions.iter_mut().filter(|c| c["type"] == kind).collect();
    if of_kind.len() == stored.len() {
        of_kind.into_iter().zip(stored).for_each(|(new, old)| *new = old.clone());
    }
}

impl Strategy for Approval {
    fn prepare_for_update(&self, cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        stamp_conditions(obj, old, cx.now);
        let conditions = obj.remove_at(&["status", "conditions"]);
        keep(obj, old, "spec");
        keep(obj, old, "status");
        match conditions {
            Some(conditions) => obj.set(&["status", "conditions"], conditions),
            None => {
                obj.remove_at(&["status", "conditions"]);
            }
        }
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, old: &Value) -> Vec<FieldError> {
        validation::certificates::approval_update(obj, old)
    }

    fn reset_fields(&self) -> &'static [&'static [&'static str]] {
        &[&["spec"], &["status", "certificate"]]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_get_the_time_of_the_write() {
        let old = json!({"status": {"conditions": [{"type": "Failed", "status": "True", "lastTransitionTime": "2020-01-01T00:00:00Z"}]}});
        let mut obj = json!({"status": {"conditions": [{"type": "Failed", "status": "True"}, {"type": "Approved", "status": "True"}]}});
        stamp_conditions(&mut obj, &old, "2026-01-01T00:00:00Z".parse().unwrap());
        let times: Vec<&str> =
            obj.list_at(&["status", "conditions"]).iter().map(|c| c.str_at(&["lastTransitionTime"])).collect();
        assert_eq!(times, ["2020-01-01T00:00:00Z", "2026-01-01T00:00:00Z"]);
    }

    #[test]
    fn the_condition_cell_tells_the_whole_story() {
        let obj = json!({"status": {"conditions": [{"type": "Approved"}, {"type": "Failed"}], "certificate": "x"}});
        assert_eq!(condition(&obj), "Approved,Failed,Issued");
        assert_eq!(condition(&json!({})), "Pending");
    }
}
