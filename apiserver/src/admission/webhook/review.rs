//! The `AdmissionReview`: what a webhook is told about a request, and what its answer means.

use std::sync::Arc;

use apimachinery::codec;
use apimachinery::meta::{GroupVersionKind, GroupVersionResource};
use apimachinery::status::{Result, Status};
use base64::Engine;
use serde_json::{Value, json};

use super::super::{AdmissionRequest, Operation};
use super::hook::{Hook, Matched};
use crate::http::webhook::{CallError, Clients};
use crate::registry::object::ObjectExt;
use crate::registry::{Resource, Served};
use crate::server::Server;

/// What a webhook said.
pub struct Answer {
    pub allowed: bool,
    /// Why not.
    pub status: Option<Status>,
    /// A JSON patch.
    pub patch: Option<Vec<u8>>,
    pub warnings: Vec<String>,
}

/// A dry run must not reach a webhook that would do something.
pub fn check_dry_run(hook: &Hook, request: &AdmissionRequest<'_>) -> Result<()> {
    if request.dry_run && hook.has_side_effects {
        return Err(Status::bad_request(format!("admission webhook {:?} does not support dry run", hook.name)));
    }
    Ok(())
}

pub async fn ask(
    server: &Arc<Server>,
    clients: &Clients,
    hook: &Hook,
    matched: &Matched,
    request: &AdmissionRequest<'_>,
) -> std::result::Result<Answer, CallError> {
    let uid = uuid::Uuid::new_v4().to_string();
    let review = json!({
        "kind": "AdmissionReview",
        "apiVersion": format!("admission.k8s.io/{}", hook.review_version),
        "request": describe(&uid, matched, request).map_err(|status| CallError::Invalid { why: status.message })?,
    });
    let answer = clients.post(&server.caches, &hook.target, hook.timeout, &review).await?;
    read(&answer, &uid, hook)
}

/// The `request` of a review; conditions of webhooks and policies see the same.
pub fn describe(uid: &str, matched: &Matched, request: &AdmissionRequest<'_>) -> Result<Value> {
    let shown = |object: &Value| presented(&matched.resource, &matched.served, object);
    let mut described = describe_without_objects(&matched.served, request);
    described["uid"] = uid.into();
    described["object"] = shown(request.object)?;
    described["oldObject"] = request.old.map(shown).transpose()?.unwrap_or_default();
    Ok(described)
}

/// Everything about a request but its id and its objects.
pub fn describe_without_objects(served: &Served, request: &AdmissionRequest<'_>) -> Value {
    let user = request.user;
    let mut info = json!({"username": user.name, "groups": user.groups});
    if !user.uid.is_empty() {
        info["uid"] = user.uid.as_str().into();
    }
    if !user.extra.is_empty() {
        info["extra"] = json!(user.extra);
    }
    let mut described = json!({
        "kind": kind(kind_of(served, request)),
        "resource": resource(&served.gvr),
        "requestKind": kind(request.gvk),
        "requestResource": resource(request.gvr),
        "operation": request.operation.name(),
        "userInfo": info,
        "dryRun": request.dry_run,
        "options": options(request),
    });
    let name = if request.name.is_empty() { request.object.name() } else { request.name };
    for (field, text) in [
        ("name", name),
        ("namespace", if request.is("", "namespaces") { name } else { request.namespace }),
        ("subResource", request.subresource),
        ("requestSubResource", request.subresource),
    ] {
        if !text.is_empty() {
            described[field] = text.into();
        }
    }
    described
}

/// The options of the request as their API type.
fn options(request: &AdmissionRequest<'_>) -> Value {
    let given = request.options;
    let kind = match request.operation {
        Operation::Create => "CreateOptions",
        Operation::Update if given.is_patch => "PatchOptions",
        Operation::Update => "UpdateOptions",
        Operation::Delete => "DeleteOptions",
        Operation::Connect => return Value::Null,
    };
    let mut options = json!({"kind": kind, "apiVersion": "meta.k8s.io/v1"});
    if given.dry_run {
        options["dryRun"] = json!(["All"]);
    }
    if request.operation != Operation::Delete {
        options["fieldManager"] = given.field_manager.as_str().into();
        options["fieldValidation"] = given.field_validation.name().into();
    }
    options
}

fn kind(gvk: &GroupVersionKind) -> Value {
    json!({"group": gvk.group, "version": gvk.version, "kind": gvk.kind})
}

fn resource(gvr: &GroupVersionResource) -> Value {
    json!({"group": gvr.group, "version": gvr.version, "resource": gvr.resource})
}

/// What the object of the request is: of the resource, or of its subresource (`Binding`, `Scale`, `PodExecOptions`).
fn kind_of<'a>(served: &'a Served, request: &AdmissionRequest<'_>) -> &'a GroupVersionKind {
    let subresource = served.subresources.iter().find(|sub| sub.name == request.subresource);
    subresource.map_or(&served.gvk, |sub| &sub.gvk)
}

/// The object in the given version; what is no object of the resource (`Binding`) as it is.
pub fn presented(resource: &Resource, served: &Served, object: &Value) -> Result<Value> {
    if object.is_null() || object.kind() != &*resource.storage.kind {
        return Ok(object.clone());
    }
    resource.present(served, object.clone())
}

/// The object after the webhook's patch, in the storage version, without fields that its kind does not have.
pub fn patched(matched: &Matched, request: &AdmissionRequest<'_>, patch: &[u8]) -> std::result::Result<Value, String> {
    if request.object.is_null() {
        return Err("a webhook attempted to modify the object, which is not supported for this operation".into());
    }
    let shown = presented(&matched.resource, &matched.served, request.object);
    let mut object = shown.map_err(|status| status.message)?;
    apimachinery::merge::json_patch(&mut object, patch).map_err(|error| error.to_string())?;
    if object.kind() != &*matched.resource.storage.kind {
        return Ok(object);
    }
    restored(matched, object)
}

/// From the version that a webhook or policy saw back to the storage version, checked and defaulted.
pub fn restored(matched: &Matched, object: Value) -> std::result::Result<Value, String> {
    let mut decoded = codec::Decoded { value: object, strict_errors: vec![] };
    if let Some(schema) = &matched.served.schema {
        codec::conform(&mut decoded, schema).map_err(|error| error.to_string())?;
    }
    let mut object = matched.resource.internalize(&matched.served, decoded.value).map_err(|status| status.message)?;
    matched.resource.strategy.default(&mut object);
    Ok(object)
}

fn read(review: &Value, uid: &str, hook: &Hook) -> std::result::Result<Answer, CallError> {
    let invalid = |why: String| Err(CallError::Invalid { why });
    let expected = format!("admission.k8s.io/{}", hook.review_version);
    let response = &review["response"];
    if !response.is_object() {
        return invalid("webhook response was absent".into());
    }
    if hook.review_version == "v1" {
        if review.api_version() != expected || review.kind() != "AdmissionReview" {
            let (version, kind) = (review.api_version(), review.kind());
            return invalid(format!(
                "expected webhook response of {expected}, Kind=AdmissionReview, got {version}, Kind={kind}"
            ));
        }
        if response.str_at(&["uid"]) != uid {
            let given = response.str_at(&["uid"]);
            return invalid(format!("expected response.uid={uid:?}, got {given:?}"));
        }
    }
    let patch = match response.str_at(&["patch"]) {
        "" => None,
        text => match base64::engine::general_purpose::STANDARD.decode(text) {
            Ok(patch) if hook.review_version == "v1beta1" || response["patchType"] == "JSONPatch" => Some(patch),
            Ok(_) => {
                let given = response.str_at(&["patchType"]);
                return invalid(format!(
                    "webhook returned response.patch but not response.patchType=JSONPatch but {given:?}"
                ));
            }
            Err(error) => return invalid(format!("response.patch is not base64: {error}")),
        },
    };
    let status = response.get("status").filter(|status| status.is_object());
    let status = match status.map(|status| serde_json::from_value(status.clone())).transpose() {
        Ok(status) => status,
        Err(error) => return invalid(format!("response.status: {error}")),
    };
    let warnings = response.list_at(&["warnings"]).iter().filter_map(Value::as_str).map(str::to_owned).collect();
    Ok(Answer { allowed: response["allowed"] == true, status, patch, warnings })
}

/// The error of a request that a webhook refused.
pub fn denied(name: &str, status: Option<Status>) -> Status {
    let mut status = status.unwrap_or_else(|| Status::failure(400, "", ""));
    status.status = "Failure".into();
    if status.code < 400 {
        status.code = 400;
    }
    let why = match (status.message.as_str(), status.reason.as_str()) {
        ("", "") => " without explanation".to_owned(),
        ("", reason) => format!(": {reason}"),
        (message, _) => format!(": {message}"),
    };
    status.message = format!("admission webhook {name:?} denied the request{why}");
    status
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_say_who_and_why() {
        let cases = [
            (None, "admission webhook \"a.b.c\" denied the request without explanation", 400),
            (Some(Status::failure(0, "because", "")), "admission webhook \"a.b.c\" denied the request: because", 400),
            (Some(Status::failure(418, "", "no tea")), "admission webhook \"a.b.c\" denied the request: no tea", 418),
        ];
        for (status, message, code) in cases {
            let denied = denied("a.b.c", status);
            assert_eq!((denied.message.as_str(), denied.code), (message, code));
        }
    }
}
