//! `Status`: the one error (and sometimes success) answer of the Kubernetes API, with upstream's codes, reasons and
//! messages. It is both the wire form and a Rust error; components below the HTTP edge use typed errors of their own
//! and become a `Status` only there.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::meta::{GroupKind, GroupResource};

/// The result of every API operation.
pub type Result<T, E = Status> = std::result::Result<T, E>;

/// <https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/status/>
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "camelCase")]
#[error("{message}")]
pub struct Status {
    #[serde(default = "Status::kind_name")]
    pub kind: String,
    #[serde(default = "Status::api_version_name")]
    pub api_version: String,
    #[serde(default)]
    pub metadata: Map<String, Value>,
    /// `Success` or `Failure`.
    #[serde(default)]
    pub status: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// The machine-readable reason, e.g. `NotFound`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub details: Option<Box<Details>>,
    /// The HTTP status code; 0 in a success, which does not carry it.
    #[serde(default, skip_serializing_if = "is_no_code")]
    pub code: u16,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Details {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub group: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub kind: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub uid: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub causes: Vec<Cause>,
    #[serde(skip_serializing_if = "is_zero")]
    pub retry_after_seconds: u32,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cause {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub field: String,
}

fn is_no_code(code: &u16) -> bool {
    *code == 0
}

fn is_zero(n: &u32) -> bool {
    *n == 0
}

/// What is wrong with one field; the kinds, their names and wording are upstream's `field.ErrorType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FieldErrorKind {
    NotFound,
    Required,
    Duplicate,
    Invalid,
    NotSupported,
    Forbidden,
    TooLong,
    TooMany,
    Internal,
    TypeInvalid,
}

impl FieldErrorKind {
    /// The `reason` of the cause in a `Status`.
    pub fn reason(self) -> &'static str {
        match self {
            Self::NotFound => "FieldValueNotFound",
            Self::Required => "FieldValueRequired",
            Self::Duplicate => "FieldValueDuplicate",
            Self::Invalid => "FieldValueInvalid",
            Self::NotSupported => "FieldValueNotSupported",
            Self::Forbidden => "FieldValueForbidden",
            Self::TooLong => "FieldValueTooLong",
            Self::TooMany => "FieldValueTooMany",
            Self::Internal => "InternalError",
            Self::TypeInvalid => "FieldValueTypeInvalid",
        }
    }

    fn text(self) -> &'static str {
        match self {
            Self::NotFound => "Not found",
            Self::Required => "Required value",
            Self::Duplicate => "Duplicate value",
            Self::Invalid | Self::TypeInvalid => "Invalid value",
            Self::NotSupported => "Unsupported value",
            Self::Forbidden => "Forbidden",
            Self::TooLong => "Too long",
            Self::TooMany => "Too many",
            Self::Internal => "Internal error",
        }
    }
}

/// One complaint about one field, by its path (`spec.containers[0].name`).
#[derive(Clone, Debug, PartialEq)]
pub struct FieldError {
    pub kind: FieldErrorKind,
    pub field: String,
    /// The offending value; unused by `Required`, `Forbidden`, `TooLong` and `Internal`, whose messages leave it out.
    pub value: Value,
    /// How the value is printed, where that is not simply its JSON: objects in the order of their schema.
    pub shown: String,
    /// The message does not show the value.
    pub omitted: bool,
    pub detail: String,
}

impl FieldError {
    fn new(kind: FieldErrorKind, field: impl fmt::Display, value: Value, detail: impl Into<String>) -> Self {
        Self { kind, field: field.to_string(), value, shown: String::new(), omitted: false, detail: detail.into() }
    }

    pub fn required(field: impl fmt::Display, detail: impl Into<String>) -> Self {
        Self::new(FieldErrorKind::Required, field, Value::Null, detail)
    }

    pub fn invalid(field: impl fmt::Display, value: impl Into<Value>, detail: impl Into<String>) -> Self {
        Self::new(FieldErrorKind::Invalid, field, value.into(), detail)
    }

    /// `Invalid` without the value, which says nothing or is too long.
    pub fn invalid_omitted(field: impl fmt::Display, detail: impl Into<String>) -> Self {
        Self { omitted: true, ..Self::new(FieldErrorKind::Invalid, field, Value::Null, detail) }
    }

    /// `Invalid` with `null` for a value, whatever the field's type: so say rules that do not look at the value.
    pub fn invalid_null(field: impl fmt::Display, detail: impl Into<String>) -> Self {
        Self::invalid_shown(field, "null", detail)
    }

    /// `Invalid` with this text for a value, without quotes.
    pub fn invalid_shown(field: impl fmt::Display, shown: &str, detail: impl Into<String>) -> Self {
        Self { shown: shown.into(), ..Self::new(FieldErrorKind::Invalid, field, Value::Null, detail) }
    }

    pub fn type_invalid(field: impl fmt::Display, value: impl Into<Value>, detail: impl Into<String>) -> Self {
        Self::new(FieldErrorKind::TypeInvalid, field, value.into(), detail)
    }

    pub fn forbidden(field: impl fmt::Display, detail: impl Into<String>) -> Self {
        Self::new(FieldErrorKind::Forbidden, field, Value::Null, detail)
    }

    pub fn duplicate(field: impl fmt::Display, value: impl Into<Value>) -> Self {
        Self::new(FieldErrorKind::Duplicate, field, value.into(), "")
    }

    pub fn not_found(field: impl fmt::Display, value: impl Into<Value>) -> Self {
        Self::new(FieldErrorKind::NotFound, field, value.into(), "")
    }

    /// `supported` is printed quoted and in its order, as upstream does.
    pub fn not_supported(field: impl fmt::Display, value: impl Into<Value>, supported: &[&str]) -> Self {
        let quoted: Vec<String> = supported.iter().map(|s| format!("{s:?}")).collect();
        let detail = if quoted.is_empty() { String::new() } else { format!("supported values: {}", quoted.join(", ")) };
        Self::new(FieldErrorKind::NotSupported, field, value.into(), detail)
    }

    pub fn too_long(field: impl fmt::Display, max: usize) -> Self {
        Self::new(FieldErrorKind::TooLong, field, Value::Null, format!("may not be more than {max} bytes"))
    }

    /// The same, counted in letters.
    pub fn too_many_characters(field: impl fmt::Display, max: usize) -> Self {
        Self::new(FieldErrorKind::TooLong, field, Value::Null, format!("may not be more than {max} characters"))
    }

    pub fn too_many(field: impl fmt::Display, actual: usize, max: usize) -> Self {
        let detail = format!("must have at most {max} item{}", if max == 1 { "" } else { "s" });
        Self::new(FieldErrorKind::TooMany, field, Value::from(actual), detail)
    }

    pub fn internal(field: impl fmt::Display, detail: impl Into<String>) -> Self {
        Self::new(FieldErrorKind::Internal, field, Value::Null, detail)
    }

    /// The message without the field's path, as a `Status` cause carries it.
    pub fn body(&self) -> String {
        use FieldErrorKind::{Forbidden, Internal, Required, TooLong, TypeInvalid};
        let mut text = match self.kind {
            _ if self.omitted => self.kind.text().to_owned(),
            Required | Forbidden | TooLong | Internal | TypeInvalid if self.value.is_null() => {
                self.kind.text().to_owned()
            }
            _ => match &self.value {
                _ if !self.shown.is_empty() => format!("{}: {}", self.kind.text(), self.shown),
                Value::Null => format!("{}: null", self.kind.text()),
                Value::String(s) => format!("{}: {s:?}", self.kind.text()),
                other => format!("{}: {other}", self.kind.text()),
            },
        };
        if !self.detail.is_empty() {
            text.push_str(": ");
            text.push_str(&self.detail);
        }
        text
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.body())
    }
}

impl Status {
    fn kind_name() -> String {
        "Status".into()
    }

    fn api_version_name() -> String {
        "v1".into()
    }

    /// A failure with any code and reason; the named constructors below are preferred.
    pub fn failure(code: u16, reason: &str, message: impl Into<String>) -> Self {
        Self {
            kind: Self::kind_name(),
            api_version: Self::api_version_name(),
            metadata: Map::new(),
            status: "Failure".into(),
            message: message.into(),
            reason: reason.into(),
            details: None,
            code,
        }
    }

    /// What a successful delete answers.
    pub fn success(resource: &GroupResource, name: &str, uid: &str) -> Self {
        let details = Details {
            name: name.into(),
            group: resource.group.to_string(),
            kind: resource.resource.to_string(),
            uid: uid.into(),
            ..Details::default()
        };
        Self { status: "Success".into(), details: Some(Box::new(details)), ..Self::failure(0, "", "") }
    }

    pub fn is_success(&self) -> bool {
        self.status == "Success"
    }

    fn about(mut self, resource: &GroupResource, name: &str) -> Self {
        self.details = Some(Box::new(Details {
            name: name.into(),
            group: resource.group.to_string(),
            kind: resource.resource.to_string(),
            ..Details::default()
        }));
        self
    }

    fn details_mut(&mut self) -> &mut Details {
        self.details.get_or_insert_default()
    }

    pub fn not_found(resource: &GroupResource, name: &str) -> Self {
        Self::failure(404, "NotFound", format!("{resource} {name:?} not found")).about(resource, name)
    }

    pub fn already_exists(resource: &GroupResource, name: &str) -> Self {
        Self::failure(409, "AlreadyExists", format!("{resource} {name:?} already exists")).about(resource, name)
    }

    pub fn conflict(resource: &GroupResource, name: &str, why: impl fmt::Display) -> Self {
        let message = format!("Operation cannot be fulfilled on {resource} {name:?}: {why}");
        Self::failure(409, "Conflict", message).about(resource, name)
    }

    pub fn forbidden(resource: &GroupResource, name: &str, why: impl fmt::Display) -> Self {
        let message = match (resource.resource.is_empty(), name.is_empty()) {
            (true, _) => format!("forbidden: {why}"),
            (false, true) => format!("{resource} is forbidden: {why}"),
            (false, false) => format!("{resource} {name:?} is forbidden: {why}"),
        };
        Self::failure(403, "Forbidden", message).about(resource, name)
    }

    pub fn invalid(kind: &GroupKind, name: &str, errors: &[FieldError]) -> Self {
        let texts: Vec<String> = errors.iter().map(ToString::to_string).collect();
        let message = match texts.as_slice() {
            [] => format!("{kind} {name:?} is invalid"),
            [one] => format!("{kind} {name:?} is invalid: {one}"),
            many => format!("{kind} {name:?} is invalid: [{}]", many.join(", ")),
        };
        let mut status = Self::failure(422, "Invalid", message);
        status.details = Some(Box::new(Details {
            name: name.into(),
            group: kind.group.to_string(),
            kind: kind.kind.to_string(),
            causes: errors
                .iter()
                .map(|e| Cause { reason: e.kind.reason().into(), message: e.body(), field: e.field.clone() })
                .collect(),
            ..Details::default()
        }));
        status
    }

    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::failure(400, "BadRequest", message)
    }

    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self::failure(401, "Unauthorized", message)
    }

    pub fn method_not_supported(resource: &GroupResource, action: &str) -> Self {
        let message = format!("{action} is not supported on resources of kind {:?}", resource.to_string());
        Self::failure(405, "MethodNotAllowed", message).about(resource, "")
    }

    /// A `resourceVersion` or `continue` token that is too old to be served; clients list anew.
    pub fn expired(message: impl Into<String>) -> Self {
        Self::failure(410, "Expired", message)
    }

    pub fn timeout(resource: &GroupResource, operation: &str, retry_after_seconds: u32) -> Self {
        let message = format!(
            "The {operation} operation against {resource} could not be completed at this time, please try again."
        );
        let mut status = Self::failure(500, "ServerTimeout", message).about(resource, operation);
        status.details_mut().retry_after_seconds = retry_after_seconds;
        status
    }

    /// The request itself took too long.
    pub fn gateway_timeout(message: impl Into<String>) -> Self {
        Self::failure(504, "Timeout", message)
    }

    pub fn too_many_requests(message: impl Into<String>, retry_after_seconds: u32) -> Self {
        let mut status = Self::failure(429, "TooManyRequests", message);
        status.details_mut().retry_after_seconds = retry_after_seconds;
        status
    }

    pub fn entity_too_large(message: impl Into<String>) -> Self {
        Self::failure(413, "RequestEntityTooLarge", message)
    }

    pub fn unsupported_media_type(given: &str, accepted: &[&str]) -> Self {
        let message = format!(
            "the body of the request was in an unknown format - accepted media types include: {}",
            accepted.join(", ")
        );
        tracing::debug!(given, "request body in an unknown format");
        Self::failure(415, "UnsupportedMediaType", message)
    }

    pub fn not_acceptable(accepted: &[&str]) -> Self {
        let message = format!("only the following media types are accepted: {}", accepted.join(", "));
        Self::failure(406, "NotAcceptable", message)
    }

    pub fn internal(error: impl fmt::Display) -> Self {
        let mut status = Self::failure(500, "InternalError", format!("Internal error occurred: {error}"));
        status.details_mut().causes.push(Cause { message: error.to_string(), ..Cause::default() });
        status
    }

    pub fn service_unavailable(message: impl Into<String>) -> Self {
        Self::failure(503, "ServiceUnavailable", message)
    }

    /// The answer to a path that nothing serves.
    pub fn path_not_found() -> Self {
        let mut status = Self::failure(404, "NotFound", "the server could not find the requested resource");
        status.details = Some(Box::default());
        status
    }

    /// The object as JSON.
    pub fn to_json(&self) -> Value {
        serde_json::to_value(self).unwrap_or_else(|e| json!({"kind": "Status", "message": e.to_string()}))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_the_ones_users_search_for() {
        let pods = GroupResource::new("", "pods");
        assert_eq!(Status::not_found(&pods, "a").to_string(), r#"pods "a" not found"#);
        let deployments = GroupResource::new("apps", "deployments");
        assert_eq!(Status::already_exists(&deployments, "a").to_string(), r#"deployments.apps "a" already exists"#);
        let errors = [FieldError::required("spec.containers", ""), FieldError::invalid("metadata.name", "A_b", "bad")];
        let status = Status::invalid(&GroupKind::new("", "Pod"), "a", &errors);
        assert_eq!(
            status.message,
            r#"Pod "a" is invalid: [spec.containers: Required value, metadata.name: Invalid value: "A_b": bad]"#
        );
        assert_eq!(status.details.expect("details").causes[1].reason, "FieldValueInvalid");
    }

    #[test]
    fn unsupported_values_are_quoted() {
        let error = FieldError::not_supported("spec.type", "x", &["b", "a"]);
        assert_eq!(error.to_string(), r#"spec.type: Unsupported value: "x": supported values: "b", "a""#);
    }
}
