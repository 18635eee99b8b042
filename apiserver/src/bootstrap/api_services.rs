//! An `APIService` for every group and version that this server answers itself: how discovery orders them, and what
//! `kubectl get apiservices` shows. The order is upstream's; see `priority`.

use std::collections::BTreeSet;
use std::sync::Arc;

use apimachinery::meta::GroupVersionResource;
use apimachinery::status::Result;
use serde_json::json;

use super::cluster::now;
use super::ensure;
use crate::auth::UserInfo;
use crate::http::discovery::priority;
use crate::registry::object::ObjectExt;
use crate::server::Server;

pub async fn register(server: &Arc<Server>) -> Result<()> {
    let resources = server.registry.all();
    let versions = resources.iter().filter(|resource| !resource.custom).flat_map(|resource| &resource.versions);
    let versions: BTreeSet<(String, String)> =
        versions.map(|served| (served.gvr.group.to_string(), served.gvr.version.to_string())).collect();
    for (group, version) in versions {
        let Some((group_priority, version_priority)) = priority(&group, &version) else { continue };
        let name = format!("{version}.{group}");
        let mut object = json!({
            "apiVersion": "apiregistration.k8s.io/v1",
            "kind": "APIService",
            "metadata": {"name": name, "labels": {"kube-aggregator.kubernetes.io/automanaged": "onstart"}},
            "spec": {"version": version, "groupPriorityMinimum": group_priority, "versionPriority": version_priority},
        });
        if !group.is_empty() {
            object["spec"]["group"] = group.into();
        }
        ensure::present(server, "apiservices", object).await?;
        mark_available(server, &name).await?;
    }
    Ok(())
}

async fn mark_available(server: &Arc<Server>, name: &str) -> Result<()> {
    let gvr = GroupVersionResource::new("apiregistration.k8s.io", "v1", "apiservices");
    let mut found = server.get(&gvr, "", name).await?;
    if found.list_at(&["status", "conditions"]).iter().any(|c| c["type"] == "Available" && c["status"] == "True") {
        return Ok(());
    }
    let condition = json!({
        "type": "Available",
        "status": "True",
        "reason": "Local",
        "message": "Local APIServices are always available",
        "lastTransitionTime": now(),
    });
    found.set(&["status", "conditions"], vec![condition]);
    server.update_status(&UserInfo::server(), &gvr, "", found).await.map(|_| ())
}
