//! PUT, and what every change of an existing object goes through: read, change, check, write on the revision that was
//! read, and again from what the store has now when somebody else was faster.
//!
//! The first try builds on the cache, so that a write costs one round trip. Because the cache may lag, a try that
//! fails is only believed when it was built on the store's own answer.

use std::sync::Arc;

use apimachinery::meta::GroupKind;
use apimachinery::status::{FieldError, Result, Status};
use serde_json::Value;

use super::{Call, Written, create, decode_failed, metadata, store_failed, to_bytes};
use crate::admission::Operation;
use crate::cache::{Stored, stored};
use crate::registry::object::ObjectExt;
use crate::storage::{Entry, Expect, Outcome};

/// More lost races than this in a row are not contention but a mistake.
const TRIES: usize = 32;
const MODIFIED: &str = "the object has been modified; please apply your changes to the latest version and try again";

/// What the new object is made of: the present one in the storage version (`None`: there is none).
pub type Make<'m> = dyn FnMut(Option<&Value>) -> Result<Made> + Send + 'm;

/// The new object in the storage version.
pub struct Made {
    pub object: Value,
    /// Its managed fields are already right (server-side apply).
    pub managed: bool,
}

/// Replaces the object with `object`, which is in the version of the request.
pub async fn update(call: &Call<'_>, object: Value) -> Result<Written> {
    let given = object.name();
    if given.is_empty() {
        // Upstream takes the name of the URL only for a few kinds; demanding it catches mistakes.
        return Err(Status::bad_request("name must be provided"));
    }
    if given != call.name {
        return Err(Status::bad_request(format!(
            "the name of the object ({given}) does not match the name on the URL ({})",
            call.name
        )));
    }
    let mut object = call.resource.internalize(&call.served, object)?;
    metadata::set_namespace(&mut object, &call.namespace, call.resource.namespaced)?;
    call.resource.strategy.default(&mut object);
    change(call, &mut |_| Ok(Made { object: object.clone(), managed: false })).await
}

/// Changes the object `call.name` as `make` says.
pub async fn change(call: &Call<'_>, make: &mut Make<'_>) -> Result<Written> {
    let mut base = call.resource.cache.get(&call.namespace, &call.name);
    let mut certain = false;
    for _ in 0..TRIES {
        match attempt(call, base.as_deref(), make).await {
            Ok(Attempt::Written(written)) => return Ok(written),
            Ok(Attempt::Lost(entry)) => {
                base = entry.map(|entry| decode(call, &entry)).transpose()?;
                certain = true;
            }
            Err(status) if !certain => {
                let entry = call.server.store.get(&call.key(&call.name)).await.map_err(|error| store_failed(&error))?;
                if entry.as_ref().map(|entry| entry.revision) == base.as_ref().map(|base| base.revision) {
                    return Err(status);
                }
                base = entry.map(|entry| decode(call, &entry)).transpose()?;
                certain = true;
            }
            Err(status) => return Err(status),
        }
    }
    Err(call.conflict(&call.name, MODIFIED))
}

fn decode(call: &Call<'_>, entry: &Entry) -> Result<Arc<Stored>> {
    Stored::decode(call.resource.cache.kind(), &entry.key, &entry.value, entry.revision)
        .map(Arc::new)
        .map_err(|error| decode_failed(&error))
}

enum Attempt {
    Written(Written),
    /// Somebody else wrote; this is what is there now.
    Lost(Option<Entry>),
}

async fn attempt(call: &Call<'_>, base: Option<&Stored>, make: &mut Make<'_>) -> Result<Attempt> {
    let Some(base) = base else {
        return attempt_create(call, make).await;
    };
    let old = call.resource.tree(base)?;
    let made = make(Some(&old))?;
    let mut object = made.object;
    check_preconditions(call, &object, &old)?;
    let strategy = call.strategy();
    let cx = call.cx();
    metadata::fill_for_update(&mut object, &old);
    if !made.managed {
        call.manage_fields(&mut object, Some(&old), cx.now)?;
    }
    call.admit(Operation::Update, &call.name, &mut object, Some(&old)).await?;
    call.resource.strategy.default(&mut object);
    metadata::fill_for_update(&mut object, &old);
    strategy.prepare_for_update(&cx, &mut object, &old);
    let undo = strategy.begin_update(&cx, &mut object, &old).await?;
    let outcome = check_and_put(call, base, &mut object, &old).await;
    match &outcome {
        Ok(Attempt::Written(_)) if !call.options.dry_run => drop(undo),
        _ => undo.run().await,
    }
    outcome
}

async fn attempt_create(call: &Call<'_>, make: &mut Make<'_>) -> Result<Attempt> {
    let missing = || call.not_found(&call.name);
    if !call.subresource.is_empty() {
        return Err(missing());
    }
    let made = make(None)?;
    if !made.managed && !call.resource.strategy.allow_create_on_update() {
        return Err(missing());
    }
    let mut object = made.object;
    if !object.resource_version().is_empty() {
        return Err(missing());
    }
    metadata::set_namespace(&mut object, &call.namespace, call.resource.namespaced)?;
    if !made.managed {
        call.manage_fields(&mut object, None, jiff::Timestamp::now())?;
    }
    call.resource.strategy.default(&mut object);
    match create::write(call, object).await {
        Ok(written) => Ok(Attempt::Written(written)),
        Err(status) if status.reason == "AlreadyExists" => {
            let entry = call.server.store.get(&call.key(&call.name)).await.map_err(|error| store_failed(&error))?;
            Ok(Attempt::Lost(entry))
        }
        Err(status) => Err(status),
    }
}

fn check_preconditions(call: &Call<'_>, object: &Value, old: &Value) -> Result<()> {
    let given = object.resource_version();
    if given.is_empty() || given == "0" {
        if !call.strategy().allow_unconditional_update() {
            let error = FieldError::invalid("metadata.resourceVersion", 0, "must be specified for an update");
            // Upstream names the resource where other complaints name the kind.
            let resource = &call.resource.group_resource;
            let kind = GroupKind::new(resource.group.clone(), resource.resource.clone());
            return Err(Status::invalid(&kind, &call.name, &[error]));
        }
    } else if given != old.resource_version() {
        return Err(call.conflict(&call.name, MODIFIED));
    }
    let uid = object.uid();
    if !uid.is_empty() && uid != old.uid() {
        let key = call.key(&call.name);
        let key = key.strip_prefix(&call.server.config.etcd_prefix).unwrap_or(&key);
        let why = format!(
            "StorageError: invalid object, Code: 4, Key: {key}, ResourceVersion: 0, AdditionalErrorMsg: \
             Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
            old.uid()
        );
        return Err(call.conflict(&call.name, why));
    }
    Ok(())
}

async fn check_and_put(call: &Call<'_>, base: &Stored, object: &mut Value, old: &Value) -> Result<Attempt> {
    let strategy = call.strategy();
    let cx = call.cx();
    call.complete(object);
    let mut errors = metadata::validate_update(object, old);
    errors.extend(strategy.validate_update(&cx, object, old));
    if !errors.is_empty() {
        return Err(call.invalid(&call.name, errors));
    }
    call.validate_admission(Operation::Update, &call.name, object, Some(old)).await?;
    call.forget_emptiness(object);
    object.metadata_mut().insert("resourceVersion".into(), old.resource_version().into());
    let warnings = strategy.warnings(&cx, object, Some(old));
    let written =
        |object: &mut Value, text| Attempt::Written(Written { object: object.take(), text, created: false, warnings });
    let key = call.key(&call.name);
    if object == old && !call.server.store.is_stale(&key) || call.options.dry_run {
        return Ok(written(object, None));
    }
    let last_finalizer_gone = may_go(object) && !call.resource.strategy.keeps_on_delete(object);
    let mut bytes = None;
    let outcome = if last_finalizer_gone {
        call.server.store.delete(&key, base.revision).await
    } else {
        let ttl = strategy.ttl(call.server, object);
        let encoded = bytes.insert(to_bytes(object)?).clone();
        call.server.store.put(&key, encoded, Expect::Revision(base.revision), ttl).await
    };
    match outcome.map_err(|error| store_failed(&error))? {
        Outcome::Done(revision) => {
            object.metadata_mut().insert("resourceVersion".into(), revision.to_string().into());
            if last_finalizer_gone {
                call.resource.strategy.after_delete(&cx, object).await;
            } else {
                strategy.after_update(&cx, object, old).await;
            }
            let text = bytes.map(|bytes| stored::whole(&bytes, revision)).transpose();
            Ok(written(object, text.map_err(|error| decode_failed(&error))?))
        }
        Outcome::Mismatch(entry) => Ok(Attempt::Lost(entry)),
    }
}

/// An object that is being deleted goes when nothing holds it any more: no finalizer and no grace period.
pub fn may_go(object: &Value) -> bool {
    object.is_being_deleted()
        && object.finalizers().is_empty()
        && object.i64_at(&["metadata", "deletionGracePeriodSeconds"]).unwrap_or(0) == 0
}
