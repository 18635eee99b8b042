//! PATCH: JSON patch, merge patch, strategic merge patch and server-side apply, all on the object in the version of
//! the request, and tried again when somebody else was faster.

use apimachinery::codec;
use apimachinery::merge::{self, apply};
use apimachinery::status::{Result, Status};
use bytes::Bytes;
use serde_json::Value;

use super::update::{self, Made};
use super::{Call, FieldValidation, Written, metadata};
use crate::registry::object::ObjectExt;

/// A patch, read from the body of the request.
pub enum Patch {
    Json(Bytes),
    Merge(Value),
    Strategic(Value),
    Apply(Value),
}

/// Applies `patch` to the object `call.name`.
pub async fn patch(call: &Call<'_>, patch: &Patch) -> Result<Written> {
    let mut warnings = Vec::new();
    let mut written = match patch {
        Patch::Apply(config) => apply_config(call, config).await,
        patch => {
            update::change(call, &mut |old| {
                let old = old.ok_or_else(|| call.not_found(&call.name))?;
                patched(call, old, patch, &mut warnings)
            })
            .await
        }
    }?;
    written.warnings.extend(warnings);
    Ok(written)
}

fn patched(call: &Call<'_>, old: &Value, patch: &Patch, warnings: &mut Vec<String>) -> Result<Made> {
    let mut object = call.resource.present(&call.served, old.clone())?;
    match patch {
        Patch::Json(operations) => merge::json_patch(&mut object, operations).map_err(|error| unprocessable(&error))?,
        Patch::Merge(change) => merge::merge_patch(&mut object, change),
        Patch::Strategic(change) => match &call.served.schema {
            Some(schema) if !call.resource.custom => {
                merge::strategic(schema, &mut object, change)
                    .map_err(|error| Status::bad_request(error.to_string()))?;
            }
            _ => return Err(unsupported_strategic()),
        },
        Patch::Apply(_) => unreachable!("an apply is not a change of the present object"),
    }
    let object = recheck(call, object, warnings)?;
    check_identity(call, &object)?;
    let mut object = call.resource.internalize(&call.served, object)?;
    metadata::set_namespace(&mut object, &call.namespace, call.resource.namespaced)?;
    call.resource.strategy.default(&mut object);
    Ok(Made { object, managed: false })
}

/// What a patch made must still be an object of its kind.
fn recheck(call: &Call<'_>, object: Value, warnings: &mut Vec<String>) -> Result<Value> {
    let mut decoded = codec::Decoded { value: object, strict_errors: vec![] };
    if let Some(schema) = &call.served.schema {
        let patched = decoded.value.clone();
        codec::conform(&mut decoded, schema).map_err(|error| unreadable(&patched, error.to_string()))?;
        check_strict(call.options.field_validation, &decoded.strict_errors, warnings)
            .map_err(|status| unreadable(&patched, status.message))?;
    }
    Ok(decoded.value)
}

/// Unknown and duplicate fields are an error, a warning or nothing.
pub fn check_strict(validation: FieldValidation, errors: &[String], warnings: &mut Vec<String>) -> Result<()> {
    if errors.is_empty() {
        return Ok(());
    }
    match validation {
        FieldValidation::Ignore => Ok(()),
        FieldValidation::Warn => {
            warnings.extend(errors.iter().filter(|error| !warnings.contains(error)).cloned().collect::<Vec<_>>());
            Ok(())
        }
        FieldValidation::Strict => Err(Status::bad_request(format!("strict decoding error: {}", errors.join(", ")))),
    }
}

/// A patch that makes no object of the kind.
fn unreadable(patched: &Value, why: String) -> Status {
    let error = apimachinery::status::FieldError::invalid("patch", patched.to_string(), why);
    Status::invalid(&apimachinery::meta::GroupKind::new("", ""), "", &[error])
}

fn check_identity(call: &Call<'_>, object: &Value) -> Result<()> {
    if object.name() != call.name {
        let error = apimachinery::status::FieldError::invalid("metadata.name", object.name(), "field is immutable");
        return Err(Status::invalid(&call.resource.group_kind(), &call.name, &[error]));
    }
    if object.kind() != call.served.gvk.kind || object.api_version() != call.served.gvk.api_version() {
        return Err(Status::bad_request("a patch may not change kind or apiVersion"));
    }
    Ok(())
}

async fn apply_config(call: &Call<'_>, config: &Value) -> Result<Written> {
    let Some(schema) = &call.served.schema else {
        return Err(Status::failure(
            415,
            "UnsupportedMediaType",
            "server-side apply is not supported on this resource",
        ));
    };
    check_config(call, config)?;
    let api_version = call.served.gvk.api_version();
    let manager = apply::Manager {
        name: &call.options.field_manager,
        api_version: &api_version,
        subresource: &call.subresource,
        time: jiff::Timestamp::now(),
    };
    let reset = call.strategy().reset_fields();
    update::change(call, &mut |old| {
        let live = old.map(|old| call.resource.present(&call.served, old.clone())).transpose()?;
        let merged = apply::apply(schema, live.as_ref(), config, &manager, call.options.force, reset)?;
        // A name may be left out only where there is an object that has one.
        if merged.name().is_empty() {
            return Err(Status::bad_request(format!(
                "the name of the object ({} based on URL) was undeterminable: name must be provided",
                call.name
            )));
        }
        let mut object = call.resource.internalize(&call.served, merged)?;
        call.resource.strategy.default(&mut object);
        Ok(Made { object, managed: true })
    })
    .await
}

/// Whether an applied configuration is about the object of the URL, as far as it says.
fn check_config(call: &Call<'_>, config: &Value) -> Result<()> {
    let (api_version, kind) = (config.api_version(), config.kind());
    if kind != call.served.gvk.kind && api_version == call.served.gvk.api_version() {
        let core = if api_version.contains('/') { "" } else { "/" };
        return Err(Status::bad_request(format!("invalid object type: {core}{api_version}, Kind={kind}")));
    }
    if config.at(&["metadata", "managedFields"]).is_some_and(|v| !v.is_null()) {
        return Err(Status::bad_request("metadata.managedFields must be nil"));
    }
    let name = config.name();
    if !name.is_empty() && name != call.name {
        return Err(Status::bad_request(format!(
            "the name of the object ({name}) does not match the name on the URL ({})",
            call.name
        )));
    }
    metadata::set_namespace(&mut config.clone(), &call.namespace, call.resource.namespaced)
}

fn unprocessable(error: &merge::PatchError) -> Status {
    tracing::debug!(%error, "a JSON patch does not fit its object");
    let mut status = Status::failure(422, "Invalid", "the server rejected our request due to an error in our request");
    status.details = Some(Box::default());
    status
}

/// Custom resources have no merge keys.
pub fn unsupported_strategic() -> Status {
    Status::failure(
        415,
        "UnsupportedMediaType",
        "the body of the request was in an unknown format - accepted media types include: application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml",
    )
}
