//! Resource quotas: a namespace's objects together may not ask for more than its quotas allow. The usage is written to
//! the quota's status before the object is, so that two writers cannot both take the last of it; what a failed write
//! took is given back by the quota controller.

mod usage;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use apimachinery::meta::{GroupVersionResource, Quantity};
use apimachinery::status::{Result, Status};
use async_trait::async_trait;
use serde_json::{Map, Value};
use tokio::sync::Mutex;

use super::resources::{self, Resources};
use super::{AdmissionRequest, Operation, Plugin, cached_list};
use crate::auth::UserInfo;
use crate::registry::object::ObjectExt;
use crate::server::Server;

/// Writers of one namespace wait for each other here instead of running into conflicts; a few share a lock.
const LOCKS: usize = 32;
const ATTEMPTS: usize = 10;

#[derive(Default)]
pub struct ResourceQuota {
    locks: [Mutex<()>; LOCKS],
}

#[async_trait]
impl Plugin for ResourceQuota {
    fn name(&self) -> &'static str {
        "ResourceQuota"
    }

    async fn validate(&self, server: &Arc<Server>, request: &AdmissionRequest<'_>) -> Result<()> {
        if request.namespace.is_empty() || !usage::is_counted(request) {
            return Ok(());
        }
        let quotas = cached_list(server, "", "resourcequotas", Some(request.namespace));
        if quotas.is_empty() {
            return Ok(());
        }
        let _turn = self.locks[shard(request.namespace)].lock().await;
        // All quotas are checked before any is charged.
        let mut charged = Vec::new();
        for quota in quotas {
            charged.extend(charge(request, &quota)?.map(|used| (quota, used)));
        }
        if !request.dry_run {
            for (quota, used) in charged {
                write(server, request, quota, used).await?;
            }
        }
        Ok(())
    }
}

fn shard(namespace: &str) -> usize {
    let mut hasher = DefaultHasher::new();
    namespace.hash(&mut hasher);
    (hasher.finish() % LOCKS as u64) as usize
}

/// What `status.used` becomes; `None` when the quota is not concerned.
fn charge(request: &AdmissionRequest<'_>, quota: &Value) -> Result<Option<Resources>> {
    let object = &*request.object;
    let hard = resources::parse(quota.at(&["status", "hard"]));
    let used = resources::parse(quota.at(&["status", "used"]));
    let counted = usage::of(request, object);
    let limited: Vec<&str> = hard.keys().map(String::as_str).filter(|name| usage::is_of_kind(request, name)).collect();
    if limited.is_empty() || !usage::in_scope(quota, request, object) {
        return Ok(None);
    }
    let missing = usage::missing(request, &limited);
    if !missing.is_empty() {
        return Err(request.forbidden(format!("failed quota: {}: must specify {missing}", quota.name())));
    }
    let unknown: Vec<&str> = limited.iter().copied().filter(|name| !used.contains_key(*name)).collect();
    if !unknown.is_empty() {
        let names = unknown.join(",");
        return Err(request.forbidden(format!("status unknown for quota: {}, resources: {names}", quota.name())));
    }
    let delta = delta(request, quota, counted);
    let delta: Resources =
        delta.into_iter().filter(|(name, value)| hard.contains_key(name) && *value != Quantity::ZERO).collect();
    if delta.is_empty() {
        return Ok(None);
    }
    let mut after = used.clone();
    resources::add(&mut after, &delta);
    let exceeded: Vec<&String> = delta.keys().filter(|name| after.get(*name) > hard.get(*name)).collect();
    if exceeded.is_empty() {
        return Ok(Some(after));
    }
    let show = |list: &Resources| {
        let shown = exceeded.iter().filter_map(|name| Some(format!("{name}={}", list.get(*name)?)));
        shown.collect::<Vec<_>>().join(",")
    };
    Err(request.forbidden(format!(
        "exceeded quota: {}, requested: {}, used: {}, limited: {}",
        quota.name(),
        show(&delta),
        show(&used),
        show(&hard)
    )))
}

/// What the write adds; an update that asks for less adds nothing, and the controller gives back.
fn delta(request: &AdmissionRequest<'_>, quota: &Value, counted: Resources) -> Resources {
    let (Operation::Update, Some(old)) = (request.operation, request.old) else { return counted };
    if !usage::in_scope(quota, request, old) {
        return counted;
    }
    let before = usage::of(request, old);
    let more = |(name, value): (String, Quantity)| {
        let known = before.get(&name).copied().unwrap_or(Quantity::ZERO);
        (name, if value > known { value.sub(known) } else { Quantity::ZERO })
    };
    counted.into_iter().map(more).collect()
}

/// Charges the quota on its newest state, checking again when another server was faster.
async fn write(
    server: &Arc<Server>,
    request: &AdmissionRequest<'_>,
    mut quota: Value,
    mut used: Resources,
) -> Result<()> {
    let gvr = GroupVersionResource::new("", "v1", "resourcequotas");
    for _ in 0..ATTEMPTS {
        let map: Map<String, Value> =
            used.iter().map(|(name, value)| (name.clone(), value.to_string().into())).collect();
        quota.set(&["status", "used"], map);
        match server.update_status(&UserInfo::server(), &gvr, request.namespace, quota.clone()).await {
            Ok(_) => return Ok(()),
            Err(error) if error.reason == "NotFound" => return Ok(()),
            Err(error) if error.reason == "Conflict" => {}
            Err(error) => return Err(error),
        }
        quota = match server.get(&gvr, request.namespace, quota.name()).await {
            Ok(newest) => newest,
            Err(error) if error.reason == "NotFound" => return Ok(()),
            Err(error) => return Err(error),
        };
        let Some(again) = charge(request, &quota)? else { return Ok(()) };
        used = again;
    }
    Err(Status::internal(format!("resource quota {:?} changes faster than it can be charged", quota.name())))
}

#[cfg(test)]
mod tests {
    use apimachinery::meta::GroupVersionKind;
    use serde_json::json;

    use super::super::{Reinvocation, Warnings};
    use super::*;
    use crate::verbs::WriteOptions;

    fn charge_pod(quota: &Value, pod: &Value) -> Result<Option<Resources>> {
        let (gvk, user) = (GroupVersionKind::new("", "v1", "Pod"), UserInfo::default());
        let gvr = GroupVersionResource::new("", "v1", "pods");
        let mut pod = pod.clone();
        let request = AdmissionRequest {
            gvk: &gvk,
            gvr: &gvr,
            namespace: "a",
            name: "p",
            operation: Operation::Create,
            subresource: "",
            object: &mut pod,
            old: None,
            user: &user,
            dry_run: false,
            options: &WriteOptions::default(),
            warnings: &Warnings::default(),
            reinvocation: Reinvocation::default(),
        };
        charge(&request, quota)
    }

    fn quota(hard: &Value, used: &Value) -> Value {
        json!({"metadata": {"name": "q"}, "spec": {"hard": hard}, "status": {"hard": hard, "used": used}})
    }

    #[test]
    fn pods_are_charged() {
        let pod = json!({"spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": "500m"}}}]}});
        let full = quota(&json!({"pods": "2", "requests.cpu": "1"}), &json!({"pods": "1", "requests.cpu": "600m"}));
        assert_eq!(
            charge_pod(&full, &pod).unwrap_err().message,
            r#"pods "p" is forbidden: exceeded quota: q, requested: requests.cpu=500m, used: requests.cpu=600m, limited: requests.cpu=1"#
        );
        let roomy = quota(&json!({"pods": "2"}), &json!({"pods": "1"}));
        assert_eq!(charge_pod(&roomy, &pod).unwrap().unwrap()["pods"].to_string(), "2");
        let memory = quota(&json!({"limits.memory": "1Gi"}), &json!({"limits.memory": "0"}));
        assert_eq!(
            charge_pod(&memory, &pod).unwrap_err().message,
            r#"pods "p" is forbidden: failed quota: q: must specify limits.memory for: c"#
        );
        let fresh = quota(&json!({"pods": "2"}), &json!({}));
        assert!(charge_pod(&fresh, &pod).unwrap_err().message.contains("status unknown for quota: q, resources: pods"));
        let services = quota(&json!({"services": "2"}), &json!({"services": "0"}));
        assert!(charge_pod(&services, &pod).unwrap().is_none());
    }
}
