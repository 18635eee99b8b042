//! The options that queries give to writes and lists, and what is wrong with them. Upstream checks them as objects of
//! their own (`CreateOptions`, `ListOptions`), which its complaints name.

use apimachinery::meta::GroupKind;
use apimachinery::status::{FieldError, Result, Status};
use http::header;
use serde_json::json;

use super::RequestInfo;
use super::resources::Input;
use crate::verbs::{FieldValidation, WriteOptions};

const APPLY: &str = "application/apply-patch+yaml";
const MANAGER_MAX: usize = 128;
const VALIDATIONS: [&str; 4] = ["", "Ignore", "Strict", "Warn"];

/// The options of a create, an update or a patch; those of other verbs are not looked at.
pub fn of_write(input: &Input<'_>) -> Result<WriteOptions> {
    let info = input.info;
    let kind = match info.verb.as_str() {
        "create" => "CreateOptions",
        "update" => "UpdateOptions",
        "patch" => "PatchOptions",
        _ => return Ok(WriteOptions::default()),
    };
    let errors = problems(input);
    if !errors.is_empty() {
        return Err(invalid(kind, &errors));
    }
    let user_agent = input.headers.get(header::USER_AGENT).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let agent = user_agent.split('/').next().unwrap_or_default();
    let manager = info.param("fieldManager").filter(|name| !name.is_empty()).unwrap_or(agent);
    let manager = if manager.is_empty() { "unknown" } else { manager };
    Ok(WriteOptions {
        dry_run: info.param("dryRun").is_some(),
        field_manager: manager.chars().take(MANAGER_MAX).collect(),
        field_validation: match info.param("fieldValidation") {
            Some("Ignore") => FieldValidation::Ignore,
            Some("Strict") => FieldValidation::Strict,
            _ => FieldValidation::Warn,
        },
        force: info.flag("force"),
        is_patch: info.verb == "patch",
    })
}

fn problems(input: &Input<'_>) -> Vec<FieldError> {
    let info = input.info;
    let mut errors = Vec::new();
    let manager = info.param("fieldManager").unwrap_or_default();
    if info.verb == "patch" {
        let content_type = input.headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
        match content_type.split(';').next().unwrap_or_default().trim() == APPLY {
            true if manager.is_empty() => {
                errors.push(FieldError::required("fieldManager", "is required for apply patch"));
            }
            false if info.param("force").is_some() => {
                errors.push(FieldError::forbidden("force", "may not be specified for non-apply patch"));
            }
            _ => {}
        }
    }
    if manager.len() > MANAGER_MAX {
        errors.push(FieldError::too_long("fieldManager", MANAGER_MAX));
    }
    for (at, letter) in manager.char_indices().filter(|(_, letter)| letter.is_control()) {
        let detail = format!("invalid character U+{:04X} (at position {at})", u32::from(letter));
        errors.push(FieldError::invalid("fieldManager", manager, detail));
    }
    let dry_run: Vec<&str> = info.params("dryRun").collect();
    if dry_run.iter().any(|value| *value != "All") {
        errors.push(FieldError::not_supported("dryRun", json!(dry_run), &["All"]));
    }
    let validation = info.param("fieldValidation").unwrap_or_default();
    if !VALIDATIONS.contains(&validation) {
        errors.push(FieldError::not_supported("fieldValidation", validation, &VALIDATIONS));
    }
    errors
}

fn invalid(kind: &'static str, errors: &[FieldError]) -> Status {
    Status::invalid(&GroupKind::new("meta.k8s.io", kind), "", errors)
}

/// The options that lists, watches and deletions of collections share.
pub fn check_list(info: &RequestInfo) -> Result<()> {
    number(info, "timeoutSeconds")?;
    number(info, "limit")?;
    let errors = if info.verb == "watch" { watch_problems(info) } else { list_problems(info) };
    if errors.is_empty() { Ok(()) } else { Err(invalid("ListOptions", &errors)) }
}

const MATCH: &str = "resourceVersionMatch";

fn list_problems(info: &RequestInfo) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let version = info.param("resourceVersion").unwrap_or_default();
    let wanted = info.param(MATCH).unwrap_or_default();
    if !wanted.is_empty() {
        if version.is_empty() {
            let detail = "resourceVersionMatch is forbidden unless resourceVersion is provided";
            errors.push(FieldError::forbidden(MATCH, detail));
        }
        if has_continue(info) {
            errors.push(FieldError::forbidden(MATCH, "resourceVersionMatch is forbidden when continue is provided"));
        }
        if !matches!(wanted, "Exact" | "NotOlderThan") {
            errors.push(FieldError::not_supported(MATCH, wanted, &["Exact", "NotOlderThan", ""]));
        }
        if wanted == "Exact" && version == "0" {
            let detail = "resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"";
            errors.push(FieldError::forbidden(MATCH, detail));
        }
    }
    if info.param("sendInitialEvents").is_some() {
        errors.push(FieldError::forbidden("sendInitialEvents", "sendInitialEvents is forbidden for list"));
    }
    errors
}

fn watch_problems(info: &RequestInfo) -> Vec<FieldError> {
    const NOT_OLDER: &str = "NotOlderThan";
    let mut errors = Vec::new();
    let wanted = info.param(MATCH).unwrap_or_default();
    let wants_initial = info.param("sendInitialEvents").is_some();
    if wants_initial && wanted != NOT_OLDER {
        let detail = "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan";
        errors.push(FieldError::forbidden(MATCH, detail));
    }
    if !wanted.is_empty() {
        if !wants_initial {
            let detail = "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided";
            errors.push(FieldError::forbidden(MATCH, detail));
        }
        if wanted != NOT_OLDER {
            errors.push(FieldError::not_supported(MATCH, wanted, &[NOT_OLDER]));
        }
        if has_continue(info) {
            errors.push(FieldError::forbidden(MATCH, "resourceVersionMatch is forbidden when continue is provided"));
        }
    }
    errors
}

fn has_continue(info: &RequestInfo) -> bool {
    info.param("continue").is_some_and(|token| !token.is_empty())
}

/// A number in the query, complained about as Go does.
pub fn number(info: &RequestInfo, name: &str) -> Result<Option<i64>> {
    use std::num::IntErrorKind::{NegOverflow, PosOverflow};
    let Some(text) = info.param(name).filter(|text| !text.is_empty()) else { return Ok(None) };
    text.parse().map(Some).map_err(|error: std::num::ParseIntError| {
        let why = match error.kind() {
            PosOverflow | NegOverflow => "value out of range",
            _ => "invalid syntax",
        };
        Status::bad_request(format!("strconv.ParseInt: parsing {text:?}: {why}"))
    })
}

#[cfg(test)]
mod tests {
    use http::Method;

    use super::*;

    fn complaint(query: &str) -> String {
        let info = RequestInfo::new(&Method::GET, "/api/v1/pods", Some(query));
        check_list(&info).err().map(|status| format!("{} {}", status.code, status.message)).unwrap_or_default()
    }

    #[test]
    fn lists_say_what_they_want_consistently() {
        let cases = [
            ("limit=5&resourceVersion=7&resourceVersionMatch=Exact", ""),
            ("limit=-1", ""),
            ("limit=x", r#"400 strconv.ParseInt: parsing "x": invalid syntax"#),
            (
                "resourceVersionMatch=Exact",
                "422 ListOptions.meta.k8s.io \"\" is invalid: resourceVersionMatch: Forbidden: resourceVersionMatch is forbidden unless resourceVersion is provided",
            ),
            (
                "sendInitialEvents=true",
                "422 ListOptions.meta.k8s.io \"\" is invalid: sendInitialEvents: Forbidden: sendInitialEvents is forbidden for list",
            ),
            (
                "watch=1&sendInitialEvents=true",
                "422 ListOptions.meta.k8s.io \"\" is invalid: resourceVersionMatch: Forbidden: sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
            ),
        ];
        for (query, expected) in cases {
            assert_eq!(complaint(query), expected, "{query}");
        }
    }
}
