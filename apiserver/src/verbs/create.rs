//! POST: a new object.

use apimachinery::status::{Result, Status};
use bytes::Bytes;
use serde_json::Value;

use super::{Call, Written, decode_failed, metadata, store_failed, to_bytes};
use crate::admission::Operation;
use crate::cache::stored;
use crate::registry::object::ObjectExt;
use crate::storage::{Expect, Outcome};

/// How often a generated name that is taken is replaced by another.
const GENERATE_ATTEMPTS: usize = 8;

/// Creates `object`, which is in the version of the request.
pub async fn create(call: &Call<'_>, object: Value) -> Result<Written> {
    let mut object = call.resource.internalize(&call.served, object)?;
    if !object.resource_version().is_empty() && !call.options.dry_run {
        return Err(Status::bad_request("resourceVersion should not be set on objects to be created"));
    }
    metadata::set_namespace(&mut object, &call.namespace, call.resource.namespaced)?;
    for name in ["deletionTimestamp", "deletionGracePeriodSeconds"] {
        object.metadata_mut().remove(name);
    }
    if let Some(handler) = call.resource.strategy.answers_create() {
        call.resource.strategy.default(&mut object);
        call.manage_fields(&mut object, None, jiff::Timestamp::now())?;
        let answer = handler.handle(&call.cx(), "", "create", object).await?;
        return Ok(Written { object: answer, text: None, created: true, warnings: vec![] });
    }
    call.resource.strategy.default(&mut object);
    call.manage_fields(&mut object, None, jiff::Timestamp::now())?;
    write(call, object).await
}

/// Admits, completes, checks and writes a new object in the storage version, which may come from an apply, too.
pub async fn write(call: &Call<'_>, object: Value) -> Result<Written> {
    if !object.name().is_empty() {
        return write_once(call, object).await;
    }
    for _ in 1..GENERATE_ATTEMPTS {
        match write_once(call, object.clone()).await {
            Err(status) if status.reason == "AlreadyExists" => {}
            result => return result,
        }
    }
    write_once(call, object).await
}

async fn write_once(call: &Call<'_>, mut object: Value) -> Result<Written> {
    let strategy = &*call.resource.strategy;
    let cx = call.cx();
    let requested_name = object.name().to_owned();
    call.admit(Operation::Create, &requested_name, &mut object, None).await?;
    strategy.default(&mut object);
    metadata::fill_for_create(&mut object, cx.now);
    // Some kinds write their own name elsewhere in the object: jobs, namespaces.
    metadata::generate_name(&mut object);
    strategy.prepare_for_create(&cx, &mut object);
    let name = object.name().to_owned();
    let undo = strategy.begin_create(&cx, &mut object).await?;
    let result = check_and_put(call, &name, &mut object).await;
    let text = match result {
        Ok(None) => {
            undo.run().await; // A dry run.
            None
        }
        Ok(text) => {
            drop(undo);
            text
        }
        Err(status) => {
            undo.run().await;
            return Err(status);
        }
    };
    let warnings = strategy.warnings(&cx, &object, None);
    Ok(Written { object, text, created: true, warnings })
}

/// Checks the object and writes it; as what it is written, `None` when it is not, in a dry run.
async fn check_and_put(call: &Call<'_>, name: &str, object: &mut Value) -> Result<Option<Bytes>> {
    let strategy = &*call.resource.strategy;
    let cx = call.cx();
    call.complete(object);
    let mut errors = metadata::validate(object, call.resource.namespaced, strategy.name_rule());
    errors.extend(strategy.validate_create(&cx, object));
    if !errors.is_empty() {
        return Err(call.invalid(name, errors));
    }
    call.validate_admission(Operation::Create, name, object, None).await?;
    call.forget_emptiness(object);
    let exists = || Status::already_exists(&call.resource.group_resource, name);
    if call.options.dry_run {
        return if call.current(name).await?.is_some() { Err(exists()) } else { Ok(None) };
    }
    let ttl = strategy.ttl(call.server, object);
    let bytes = to_bytes(object)?;
    let outcome = call.server.store.put(&call.key(name), bytes.clone(), Expect::Absent, ttl).await;
    match outcome.map_err(|error| store_failed(&error))? {
        Outcome::Done(revision) => {
            object.metadata_mut().insert("resourceVersion".into(), revision.to_string().into());
            stored::whole(&bytes, revision).map(Some).map_err(|error| decode_failed(&error))
        }
        Outcome::Mismatch(Some(present)) if is_being_deleted(&present.value) => {
            let mut status = exists();
            status.message = format!("object is being deleted: {}", status.message);
            Err(status)
        }
        Outcome::Mismatch(_) => Err(exists()),
    }
}

fn is_being_deleted(value: &[u8]) -> bool {
    apimachinery::codec::scan::find(value, ["metadata", "deletionTimestamp"]).is_some_and(|v| v != b"null")
}
