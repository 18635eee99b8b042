//! The single objects of every cluster: system namespaces, priority classes, the `kubernetes` Service, the default
//! ServiceCIDR, and the config map from which extension servers learn how to authenticate.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use apimachinery::status::{Result, Status};
use ipnet::IpNet;
use serde_json::{Map, Value, json};

use super::ensure;
use crate::config::Config;
use crate::registry::object::ObjectExt;
use crate::server::Server;

const NAMESPACES: [&str; 4] = ["kube-system", "kube-public", "kube-node-lease", "default"];

pub async fn namespaces(server: &Arc<Server>) -> Result<()> {
    for name in NAMESPACES {
        let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        ensure::present(server, "namespaces", object).await?;
    }
    Ok(())
}

pub async fn priority_classes(server: &Arc<Server>) -> Result<()> {
    for (name, value, description) in [
        (
            "system-node-critical",
            2_000_001_000,
            "Used for system critical pods that must not be moved from their current node.",
        ),
        (
            "system-cluster-critical",
            2_000_000_000,
            "Used for system critical pods that must run in the cluster, but can be moved to another node if necessary.",
        ),
    ] {
        let object = json!({
            "apiVersion": "scheduling.k8s.io/v1",
            "kind": "PriorityClass",
            "metadata": {"name": name},
            "value": value,
            "description": description,
        });
        ensure::present(server, "priorityclasses", object).await?;
    }
    Ok(())
}

/// The address that clients inside the cluster reach the API at: the first of the service range.
pub fn service_address(config: &Config) -> Option<IpAddr> {
    config.service_cluster_ip_range.first().map(|range| match range {
        IpNet::V4(range) => IpAddr::V4((u32::from(range.network()).wrapping_add(1)).into()),
        IpNet::V6(range) => IpAddr::V6((u128::from(range.network()).wrapping_add(1)).into()),
    })
}

pub async fn kubernetes_service(server: &Arc<Server>) -> Result<()> {
    let config = &server.config;
    let Some(address) = service_address(config) else { return Ok(()) };
    let mut port = json!({"name": "https", "port": 443, "protocol": "TCP", "targetPort": config.secure_port});
    let service_type = match config.kubernetes_service_node_port {
        0 => "ClusterIP",
        node_port => {
            port["nodePort"] = node_port.into();
            "NodePort"
        }
    };
    let object = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": "kubernetes",
            "namespace": "default",
            "labels": {"component": "apiserver", "provider": "kubernetes"},
        },
        "spec": {
            "clusterIP": address.to_string(),
            "ipFamilyPolicy": "SingleStack",
            "internalTrafficPolicy": "Cluster",
            "ports": [port],
            "sessionAffinity": "None",
            "type": service_type,
        },
    });
    let wanted = object["spec"].clone();
    ensure::merged(server, "services", object, |found| {
        let same = found["spec"]["ports"] == wanted["ports"] && found["spec"]["type"] == wanted["type"];
        (!same).then(|| {
            let mut changed = found.clone();
            changed["spec"]["ports"] = wanted["ports"].clone();
            changed["spec"]["type"] = wanted["type"].clone();
            changed
        })
    })
    .await
}

pub async fn service_cidr(server: &Arc<Server>) -> Result<()> {
    let cidrs: Vec<String> =
        server.config.service_cluster_ip_range.iter().map(|range| range.trunc().to_string()).collect();
    let object = json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": cidrs},
    });
    ensure::present(server, "servicecidrs", object).await?;
    let gvr = apimachinery::meta::GroupVersionResource::new("networking.k8s.io", "v1", "servicecidrs");
    let found = server.get(&gvr, "", "kubernetes").await?;
    let ready = found.list_at(&["status", "conditions"]).iter().any(|c| c["type"] == "Ready" && c["status"] == "True");
    if ready {
        return Ok(());
    }
    let condition = json!({
        "type": "Ready",
        "status": "True",
        "message": "Kubernetes default Service CIDR is ready",
        "lastTransitionTime": now(),
    });
    let config = json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": {"name": "kubernetes"},
        "status": {"conditions": [condition]},
    });
    let user = crate::auth::UserInfo::server();
    server.apply_status(&user, &gvr, "", config, "kubernetes-service-cidr-controller").await.map(|_| ())
}

/// Now, in whole seconds, as API objects write it.
pub fn now() -> String {
    let seconds = jiff::Timestamp::now().as_second();
    jiff::Timestamp::from_second(seconds).map(|at| at.to_string()).unwrap_or_default()
}

/// `kube-system/extension-apiserver-authentication`: the authorities and headers that extension servers should trust.
pub async fn authentication(server: &Arc<Server>) -> Result<()> {
    let data = authentication_data(&server.config)?;
    if data.is_empty() {
        return Ok(());
    }
    let object = json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "extension-apiserver-authentication", "namespace": "kube-system"},
        "data": data,
    });
    ensure::merged(server, "configmaps", object, |found| {
        let mut changed = found.clone();
        changed.ensure_object(&["data"]).extend(data.clone());
        (changed != *found).then_some(changed)
    })
    .await
}

fn authentication_data(config: &Config) -> Result<Map<String, Value>> {
    let read = |path: &Path| {
        std::fs::read_to_string(path).map_err(|error| Status::internal(format!("reading {}: {error}", path.display())))
    };
    let list = |names: &[String]| Value::from(json!(names).to_string());
    let mut data = Map::new();
    if let Some(path) = &config.client_ca_file {
        data.insert("client-ca-file".into(), read(path)?.into());
    }
    if let Some(path) = &config.requestheader_client_ca_file {
        data.insert("requestheader-client-ca-file".into(), read(path)?.into());
        for (name, values) in [
            ("allowed-names", &config.requestheader_allowed_names),
            ("extra-headers-prefix", &config.requestheader_extra_headers_prefix),
            ("group-headers", &config.requestheader_group_headers),
            ("username-headers", &config.requestheader_username_headers),
        ] {
            data.insert(format!("requestheader-{name}"), list(values));
        }
        if !config.requestheader_uid_headers.is_empty() {
            data.insert("requestheader-uid-headers".into(), list(&config.requestheader_uid_headers));
        }
    }
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_service_has_the_first_address() {
        let mut config = Config::for_etcd("http://127.0.0.1:1");
        for (range, first) in [("10.0.0.0/24", "10.0.0.1"), ("fd00::/112", "fd00::1")] {
            config.service_cluster_ip_range = vec![range.parse().unwrap()];
            assert_eq!(service_address(&config).map(|address| address.to_string()).as_deref(), Some(first));
        }
    }
}
