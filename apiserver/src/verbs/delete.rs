//! DELETE: an object goes at once, or is marked and goes when its grace period is over and its finalizers are gone.

use std::sync::Arc;

use apimachinery::status::{FieldError, Result, Status};
use serde_json::{Value, json};

use super::{Call, decode_failed, store_failed, timestamp, to_bytes};
use crate::admission::Operation;
use crate::cache::Stored;
use crate::registry::object::ObjectExt;
use crate::registry::strategy::{DeleteOptions, Propagation};
use crate::storage::{Entry, Expect, Outcome};

const ORPHAN: &str = "orphan";
const FOREGROUND: &str = "foregroundDeletion";
const TRIES: usize = 32;

/// Kinds whose deletion answers with the object instead of a bare success.
const ANSWER_WITH_OBJECT: &[(&str, &str)] = &[
    ("", "namespaces"),
    ("", "persistentvolumeclaims"),
    ("", "persistentvolumes"),
    ("", "pods"),
    ("", "podtemplates"),
    ("", "resourcequotas"),
    ("", "serviceaccounts"),
    ("", "services"),
    ("resource.k8s.io", "deviceclasses"),
    ("resource.k8s.io", "resourceclaims"),
    ("resource.k8s.io", "resourceclaimtemplates"),
    ("resource.k8s.io", "resourceslices"),
    ("storage.k8s.io", "csidrivers"),
    ("storage.k8s.io", "csinodes"),
    ("storage.k8s.io", "storageclasses"),
    ("storage.k8s.io", "volumeattachments"),
    ("storage.k8s.io", "volumeattributesclasses"),
];

/// What came of a deletion.
pub struct Deleted {
    /// The last or the marked state, in the storage version.
    pub object: Value,
    /// It is gone; else it is only marked.
    pub gone: bool,
}

/// Reads `DeleteOptions` from a body (`Null`: none) and the query's parameters over it.
pub fn options(body: &Value, param: impl Fn(&str) -> Option<String>) -> Result<DeleteOptions> {
    let invalid = |field: &str, value: &str, detail: &str| {
        let error = FieldError::invalid(field, value, detail);
        Status::invalid(&apimachinery::meta::GroupKind::new("meta.k8s.io", "DeleteOptions"), "", &[error])
    };
    let mut options = DeleteOptions {
        grace_period: body.i64_at(&["gracePeriodSeconds"]),
        uid: body.at(&["preconditions", "uid"]).and_then(Value::as_str).map(str::to_owned),
        resource_version: body.at(&["preconditions", "resourceVersion"]).and_then(Value::as_str).map(str::to_owned),
        ..DeleteOptions::default()
    };
    if let Some(text) = param("gracePeriodSeconds") {
        options.grace_period = Some(
            text.parse()
                .map_err(|_| Status::bad_request(format!("strconv.ParseInt: parsing {text:?}: invalid syntax")))?,
        );
    }
    let policy = param("propagationPolicy").unwrap_or_else(|| body.str_at(&["propagationPolicy"]).to_owned());
    let orphan = param("orphanDependents").map(|text| text == "true").or_else(|| body.bool_at(&["orphanDependents"]));
    options.propagation = match (policy.as_str(), orphan) {
        ("", None) => None,
        ("", Some(true)) => Some(Propagation::Orphan),
        ("", Some(false)) => Some(Propagation::Background),
        (_, Some(_)) => {
            let detail = "orphanDependents and deletionPropagation cannot be both set";
            return Err(invalid("propagationPolicy", &policy, detail));
        }
        ("Orphan", None) => Some(Propagation::Orphan),
        ("Background", None) => Some(Propagation::Background),
        ("Foreground", None) => Some(Propagation::Foreground),
        _ => {
            let error =
                FieldError::not_supported("propagationPolicy", policy, &["Foreground", "Background", "Orphan", "nil"]);
            return Err(Status::invalid(
                &apimachinery::meta::GroupKind::new("meta.k8s.io", "DeleteOptions"),
                "",
                &[error],
            ));
        }
    };
    let dry_run = body.list_at(&["dryRun"]).iter().filter_map(Value::as_str).map(str::to_owned).chain(param("dryRun"));
    for value in dry_run {
        if value != "All" {
            let error = FieldError::not_supported("dryRun", value, &["All"]);
            return Err(Status::invalid(
                &apimachinery::meta::GroupKind::new("meta.k8s.io", "DeleteOptions"),
                "",
                &[error],
            ));
        }
        options.dry_run = true;
    }
    options.grace_period = options.grace_period.map(|seconds| if seconds < 0 { 1 } else { seconds });
    Ok(options)
}

/// Deletes the object `call.name`.
pub async fn delete(call: &Call<'_>, options: &DeleteOptions) -> Result<Deleted> {
    call.resource.strategy.delete_warnings(options).iter().for_each(|text| call.warnings.add(text));
    let mut base = call.resource.cache.get(&call.namespace, &call.name);
    let mut certain = false;
    for _ in 0..TRIES {
        match attempt(call, base.as_ref(), options).await {
            Ok(Attempt::Done(deleted)) => return Ok(deleted),
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
    Err(call.conflict(&call.name, "the object kept changing while it was being deleted; please try again"))
}

/// Deletes what the selection matches, one by one; the objects as they were when they were listed, as upstream.
pub async fn delete_collection(
    call: &Call<'_>,
    objects: &[Arc<Stored>],
    options: &DeleteOptions,
) -> Result<Vec<Value>> {
    call.resource.strategy.delete_warnings(options).iter().for_each(|text| call.warnings.add(text));
    let mut deleted = Vec::new();
    for object in objects {
        let one = Call {
            namespace: object.namespace().to_owned(),
            name: object.name().to_owned(),
            options: call.options.clone(),
            subresource: String::new(),
            warnings: call.warnings.clone(),
            ..Call::new(call.server, call.user, call.resource.clone(), call.served.clone())
        };
        match delete(&one, options).await {
            Ok(_) => deleted.push(object.value()),
            Err(status) if status.code == 404 => deleted.push(object.value()),
            Err(status) => return Err(status),
        }
    }
    Ok(deleted)
}

/// The answer to a deletion: the object, or a success that names it.
pub fn answer(call: &Call<'_>, deleted: &Deleted) -> Result<Value> {
    let group_resource = &call.resource.group_resource;
    let with_object = ANSWER_WITH_OBJECT
        .iter()
        .any(|(group, resource)| *group == group_resource.group && *resource == group_resource.resource);
    if !deleted.gone || with_object {
        return call.resource.present(&call.served, deleted.object.clone());
    }
    Ok(Status::success(group_resource, &call.name, deleted.object.uid()).to_json())
}

fn decode(call: &Call<'_>, entry: &Entry) -> Result<Arc<Stored>> {
    Stored::decode(call.resource.cache.kind(), &entry.key, &entry.value, entry.revision)
        .map(Arc::new)
        .map_err(|error| decode_failed(&error))
}

enum Attempt {
    Done(Deleted),
    Lost(Option<Entry>),
}

async fn attempt(call: &Call<'_>, base: Option<&Arc<Stored>>, options: &DeleteOptions) -> Result<Attempt> {
    let Some(base) = base else { return Err(call.not_found(&call.name)) };
    let mut old = call.resource.tree(base)?;
    check_preconditions(call, &old, options)?;
    call.admit(Operation::Delete, &call.name, &mut Value::Null, Some(&old)).await?;
    call.validate_admission(Operation::Delete, &call.name, &mut Value::Null, Some(&old)).await?;
    let key = call.key(&call.name);
    if let Some(marked) = mark(call, &old, options) {
        if marked == old || options.dry_run {
            return Ok(Attempt::Done(Deleted { object: marked, gone: false }));
        }
        return put_marked(call, &key, base.revision, marked).await;
    }
    if options.dry_run {
        return Ok(Attempt::Done(Deleted { object: old, gone: true }));
    }
    match call.server.store.delete(&key, base.revision).await.map_err(|error| store_failed(&error))? {
        Outcome::Mismatch(entry) => Ok(Attempt::Lost(entry)),
        Outcome::Done(revision) => {
            call.resource.strategy.after_delete(&call.cx(), &old).await;
            old.metadata_mut().insert("resourceVersion".into(), revision.to_string().into());
            Ok(Attempt::Done(Deleted { object: old, gone: true }))
        }
    }
}

async fn put_marked(call: &Call<'_>, key: &str, revision: u64, mut marked: Value) -> Result<Attempt> {
    let ttl = call.resource.strategy.ttl(call.server, &marked);
    let outcome = call.server.store.put(key, to_bytes(&mut marked)?, Expect::Revision(revision), ttl).await;
    match outcome.map_err(|error| store_failed(&error))? {
        Outcome::Mismatch(entry) => Ok(Attempt::Lost(entry)),
        Outcome::Done(revision) => {
            marked.metadata_mut().insert("resourceVersion".into(), revision.to_string().into());
            Ok(Attempt::Done(Deleted { object: marked, gone: false }))
        }
    }
}

fn check_preconditions(call: &Call<'_>, old: &Value, options: &DeleteOptions) -> Result<()> {
    if call.resource.strategy.marked_by_time_alone(old) {
        return check_preconditions_by_hand(call, old, options);
    }
    // Upstream names the kind here, where other conflicts name the resource.
    let kind = call.resource.group_kind();
    let kind = apimachinery::meta::GroupResource::new(kind.group, kind.kind);
    let conflict = |why: String| Status::conflict(&kind, &call.name, why);
    if let Some(uid) = options.uid.as_deref().filter(|uid| *uid != old.uid()) {
        let record = old.uid();
        return Err(conflict(format!(
            "the UID in the precondition ({uid}) does not match the UID in record ({record}). The object might have been deleted and then recreated"
        )));
    }
    if let Some(version) = options.resource_version.as_deref().filter(|version| *version != old.resource_version()) {
        let record = old.resource_version();
        return Err(conflict(format!(
            "the ResourceVersion in the precondition ({version}) does not match the ResourceVersion in record ({record}). The object might have been modified"
        )));
    }
    Ok(())
}

/// The same in the words of the kinds that upstream deletes by hand.
fn check_preconditions_by_hand(call: &Call<'_>, old: &Value, options: &DeleteOptions) -> Result<()> {
    let given =
        [("UID", &options.uid, old.uid()), ("ResourceVersion", &options.resource_version, old.resource_version())];
    for (what, wanted, is) in given {
        if let Some(wanted) = wanted.as_deref().filter(|wanted| *wanted != is) {
            let why = format!("precondition failed: {what} in precondition: {wanted}, {what} in object meta: {is}");
            return Err(call.conflict(&call.name, why));
        }
    }
    Ok(())
}

/// The object marked as being deleted, when something still holds it; `None`: it may go now.
fn mark(call: &Call<'_>, old: &Value, options: &DeleteOptions) -> Option<Value> {
    let now = jiff::Timestamp::now();
    let strategy = &*call.resource.strategy;
    let mut object = old.clone();
    let graceful = mark_graceful(call, &mut object, options, now);
    let finalizers = garbage_collection_finalizers(old, options.propagation, strategy.default_propagation());
    if graceful != Grace::Pending {
        match finalizers.is_empty() {
            true => object.metadata_mut().remove("finalizers"),
            false => object.metadata_mut().insert("finalizers".into(), json!(finalizers)),
        };
    }
    let held = !object.finalizers().is_empty() || strategy.keeps_on_delete(old);
    match graceful {
        Grace::Pending => Some(object),
        Grace::Started => Some(object),
        Grace::None if held => {
            mark_now(&mut object, now);
            if strategy.marked_by_time_alone(old) {
                object.metadata_mut().remove("deletionGracePeriodSeconds");
                if let Some(generation) = old.at(&["metadata", "generation"]) {
                    object.metadata_mut().insert("generation".into(), generation.clone());
                }
            }
            strategy.on_marked_deleted(&mut object);
            Some(object)
        }
        Grace::None => None,
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Grace {
    /// Nothing to wait for.
    None,
    /// A grace period has begun, or become shorter.
    Started,
    /// It already runs, and the request does not shorten it.
    Pending,
}

fn mark_graceful(call: &Call<'_>, object: &mut Value, options: &DeleteOptions, now: jiff::Timestamp) -> Grace {
    let running = object.i64_at(&["metadata", "deletionGracePeriodSeconds"]).unwrap_or(0);
    if object.is_being_deleted() {
        if call.resource.strategy.graceful_deletion(object, options).is_none() || running == 0 {
            return Grace::None;
        }
        let Some(mut wanted) = options.grace_period.filter(|wanted| *wanted < running) else { return Grace::Pending };
        let until: jiff::Timestamp = object.str_at(&["metadata", "deletionTimestamp"]).parse().unwrap_or(now);
        let mut until = until - jiff::SignedDuration::from_secs(running - wanted);
        if until < now {
            until = now;
            wanted = wanted.min(1);
        }
        set_deletion(object, until, wanted);
        return if wanted == 0 { Grace::None } else { Grace::Started };
    }
    match call.resource.strategy.graceful_deletion(object, options) {
        None | Some(0) => Grace::None,
        Some(seconds) => {
            bump_generation(object);
            set_deletion(object, now + jiff::SignedDuration::from_secs(seconds.max(1)), seconds.max(1));
            Grace::Started
        }
    }
}

fn mark_now(object: &mut Value, now: jiff::Timestamp) {
    let until = object.str_at(&["metadata", "deletionTimestamp"]).parse::<jiff::Timestamp>().ok();
    if until.is_none() {
        bump_generation(object);
    }
    let until = until.filter(|until| *until <= now).unwrap_or(now);
    set_deletion(object, until, 0);
}

fn set_deletion(object: &mut Value, at: jiff::Timestamp, grace: i64) {
    let metadata = object.metadata_mut();
    metadata.insert("deletionTimestamp".into(), timestamp(at).into());
    metadata.insert("deletionGracePeriodSeconds".into(), grace.into());
}

fn bump_generation(object: &mut Value) {
    if let Some(generation) = object.i64_at(&["metadata", "generation"]).filter(|generation| *generation > 0) {
        object.metadata_mut().insert("generation".into(), (generation + 1).into());
    }
}

/// The finalizers with those of the garbage collector as the request, the object and the kind want them, in that order.
fn garbage_collection_finalizers(old: &Value, asked: Option<Propagation>, default: Propagation) -> Vec<String> {
    let present = old.finalizers();
    let propagation = asked.unwrap_or_else(|| {
        if present.contains(&ORPHAN) {
            Propagation::Orphan
        } else if present.contains(&FOREGROUND) {
            Propagation::Foreground
        } else {
            default
        }
    });
    let mut finalizers: Vec<String> =
        present.into_iter().filter(|name| *name != ORPHAN && *name != FOREGROUND).map(str::to_owned).collect();
    match propagation {
        Propagation::Orphan => finalizers.push(ORPHAN.into()),
        Propagation::Foreground => finalizers.push(FOREGROUND.into()),
        Propagation::Background => {}
    }
    finalizers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn propagation_becomes_a_finalizer() {
        let plain = json!({"metadata": {"finalizers": ["a/b"]}});
        let orphan = json!({"metadata": {"finalizers": ["orphan"]}});
        let cases = [
            (&plain, None, vec!["a/b"]),
            (&plain, Some(Propagation::Foreground), vec!["a/b", "foregroundDeletion"]),
            (&orphan, None, vec!["orphan"]),
            (&orphan, Some(Propagation::Background), vec![]),
        ];
        for (object, asked, expected) in cases {
            assert_eq!(garbage_collection_finalizers(object, asked, Propagation::Background), expected);
        }
    }

    #[test]
    fn options_come_from_body_and_query() {
        let body = json!({"gracePeriodSeconds": 5, "propagationPolicy": "Foreground", "preconditions": {"uid": "u"}});
        let options_of = |param: &str, value: &str| options(&body, |name| (name == param).then(|| value.to_owned()));
        let read = options_of("gracePeriodSeconds", "-3").expect("valid");
        assert_eq!((read.grace_period, read.propagation), (Some(1), Some(Propagation::Foreground)));
        assert!(options_of("dryRun", "None").is_err());
        assert!(options_of("orphanDependents", "true").is_err());
    }
}
