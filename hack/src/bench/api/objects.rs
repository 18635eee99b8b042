//! The objects that the servers are measured with, as large as those of real clusters: a pod is about 3 kB as posted
//! and 11 kB as served, with its status and managed fields.

use serde_json::{Value, json};

pub const NAMESPACE: &str = "bench";
pub const LEASES: &str = "kube-node-lease";
/// Pods are spread over this many nodes, which do not exist.
pub const NODES: usize = 1000;
/// An annotation that every pod has once, so that pods can be counted.
pub const SEQUENCE: &str = "bench-seq";

pub fn pod_name(index: usize) -> String {
    format!("web-frontend-7d4b9c6f58-{index:05}")
}

pub fn node_name(index: usize) -> String {
    format!("node-{:04}", index % NODES)
}

/// The label that a hundredth of all pods share.
pub fn percent(index: usize) -> String {
    format!("p{:02}", index % 100)
}

pub fn config_map_name(index: usize) -> String {
    format!("settings-{index:05}")
}

pub fn deployment_name(index: usize) -> String {
    format!("web-{index:04}")
}

pub fn lease_name(index: usize) -> String {
    format!("bench-node-{index:04}")
}

pub fn config_map(index: usize) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": config_map_name(index),
            "namespace": NAMESPACE,
            "labels": {"app": "bench", "shard": (index % 100).to_string()},
        },
        "data": {
            "app.properties": "key.name=some value of a setting\n".repeat(16),
            "seq": index.to_string(),
            "blob": "0123456789abcdef".repeat(30),
        },
    })
}

/// A pod as a replica set makes it, bound to a node already.
pub fn pod(index: usize) -> Value {
    let mut spec = pod_spec();
    spec["nodeName"] = node_name(index).into();
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": pod_name(index),
            "namespace": NAMESPACE,
            "labels": {
                "app.kubernetes.io/name": "web-frontend",
                "app.kubernetes.io/instance": "production",
                "app.kubernetes.io/version": "2.14.1",
                "pod-template-hash": "7d4b9c6f58",
                "pct": percent(index),
            },
            "annotations": {
                SEQUENCE: index.to_string(),
                "prometheus.io/scrape": "true",
                "prometheus.io/port": "9102",
                "checksum/config": "a1b2c3d4".repeat(8),
            },
            "ownerReferences": [{
                "apiVersion": "apps/v1",
                "kind": "ReplicaSet",
                "name": "web-frontend-7d4b9c6f58",
                "uid": "5f1c2f0e-0d5f-4a7e-9a51-1f6d0c3f7b11",
                "controller": true,
                "blockOwnerDeletion": true,
            }],
        },
        "spec": spec,
    })
}

fn pod_spec() -> Value {
    json!({
        "restartPolicy": "Always",
        "terminationGracePeriodSeconds": 30,
        "serviceAccountName": "default",
        "securityContext": {"runAsNonRoot": true, "runAsUser": 10001, "fsGroup": 10001},
        "containers": [web_container(), log_container()],
        "volumes": [
            {"name": "config", "configMap": {"name": "web-config"}},
            {"name": "shipper", "configMap": {"name": "log-shipper"}},
            {"name": "tmp", "emptyDir": {}},
        ],
        "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{
            "weight": 100,
            "podAffinityTerm": {
                "topologyKey": "kubernetes.io/hostname",
                "labelSelector": {"matchLabels": {"app.kubernetes.io/name": "web-frontend"}},
            },
        }]}},
    })
}

fn web_container() -> Value {
    let probe = |path: &str| {
        json!({
            "httpGet": {"path": path, "port": 8080},
            "initialDelaySeconds": 5,
            "periodSeconds": 10,
            "timeoutSeconds": 2,
        })
    };
    json!({
        "name": "web",
        "image": "registry.example.com/team/web-frontend:2.14.1",
        "command": ["/usr/local/bin/web", "--listen=:8080", "--metrics=:9102", "--config=/etc/web/app.properties"],
        "ports": [{"name": "http", "containerPort": 8080}, {"name": "metrics", "containerPort": 9102}],
        "env": environment(&[
            ("LOG_LEVEL", "info"),
            ("REGION", "eu-central-1"),
            ("DB_HOST", "postgres.production.svc.cluster.local"),
            ("CACHE_URL", "redis://cache.production.svc.cluster.local:6379/0"),
            ("FEATURE_FLAGS", "checkout-v2,search-v3"),
        ]),
        "resources": {
            "requests": {"cpu": "250m", "memory": "256Mi"},
            "limits": {"cpu": "1", "memory": "512Mi"},
        },
        "livenessProbe": probe("/healthz"),
        "readinessProbe": probe("/readyz"),
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "config", "mountPath": "/etc/web", "readOnly": true},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    })
}

fn log_container() -> Value {
    json!({
        "name": "log-shipper",
        "image": "registry.example.com/infra/fluent-bit:3.1.4",
        "args": ["-c", "/fluent-bit/etc/fluent-bit.conf"],
        "env": environment(&[("LOG_SINK", "https://logs.example.com/ingest")]),
        "resources": {"requests": {"cpu": "20m", "memory": "32Mi"}, "limits": {"memory": "64Mi"}},
        "volumeMounts": [
            {"name": "tmp", "mountPath": "/var/log/web"},
            {"name": "shipper", "mountPath": "/fluent-bit/etc", "readOnly": true},
        ],
    })
}

/// The given variables, and two that come from elsewhere.
fn environment(fixed: &[(&str, &str)]) -> Vec<Value> {
    let mut all: Vec<Value> = fixed.iter().map(|(name, value)| json!({"name": name, "value": value})).collect();
    all.push(json!({"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}));
    all.push(json!({
        "name": "DB_PASSWORD",
        "valueFrom": {"secretKeyRef": {"name": "db-credentials", "key": "password"}},
    }));
    all
}

/// The patch that a kubelet sends when a pod runs. Each `restarts` makes another one.
pub fn status_patch(uid: &str, index: usize, restarts: usize) -> Value {
    let now = timestamp("%Y-%m-%dT%H:%M:%SZ");
    let types = ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"];
    let order: Vec<Value> = types.iter().map(|kind| json!({"type": kind})).collect();
    let conditions: Vec<Value> = types
        .iter()
        .map(|kind| json!({"type": kind, "status": "True", "lastProbeTime": null, "lastTransitionTime": now}))
        .collect();
    let container = |name: &str, repository: &str, tag: &str| {
        json!({
            "name": name,
            "image": format!("{repository}:{tag}"),
            "imageID": format!("{repository}@sha256:{:064x}", 4711),
            "containerID": format!("containerd://{:064x}", index * 7919 + restarts),
            "ready": true,
            "started": true,
            "restartCount": restarts,
            "state": {"running": {"startedAt": now}},
            "lastState": {},
        })
    };
    let pod_ip = format!("10.{}.{}.{}", 64 + index / 65_536 % 64, index / 256 % 256, index % 256);
    let host_ip = format!("192.0.2.{}", index % 250 + 1);
    json!({
        "metadata": {"uid": uid},
        "status": {
            "$setElementOrder/conditions": order,
            "conditions": conditions,
            "containerStatuses": [
                container("log-shipper", "registry.example.com/infra/fluent-bit", "3.1.4"),
                container("web", "registry.example.com/team/web-frontend", "2.14.1"),
            ],
            "hostIP": host_ip,
            "hostIPs": [{"ip": host_ip}],
            "phase": "Running",
            "podIP": pod_ip,
            "podIPs": [{"ip": pod_ip}],
            "startTime": now,
        },
    })
}

/// What is applied as a deployment; `version` changes its image, its replicas and a variable.
pub fn deployment(index: usize, version: usize) -> Value {
    let labels =
        json!({"app.kubernetes.io/name": "web-frontend", "app.kubernetes.io/instance": deployment_name(index)});
    let mut spec = pod_spec();
    spec["containers"][0]["image"] = image(version).into();
    spec["containers"][0]["env"][0]["value"] = format!("level-{version}").into();
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": deployment_name(index), "namespace": NAMESPACE, "labels": labels},
        "spec": {
            "replicas": replicas(version),
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    })
}

pub fn image(version: usize) -> String {
    format!("registry.example.com/team/web-frontend:2.14.{version}")
}

pub fn replicas(version: usize) -> usize {
    2 + version % 5
}

pub fn lease(index: usize) -> Value {
    let name = lease_name(index);
    json!({
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {
            "name": name,
            "namespace": LEASES,
            "ownerReferences": [{
                "apiVersion": "v1",
                "kind": "Node",
                "name": name,
                "uid": format!("5f1c2f0e-0d5f-4a7e-9a51-{index:012}"),
            }],
        },
        "spec": {"holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": micro_time()},
    })
}

pub fn micro_time() -> String {
    timestamp("%Y-%m-%dT%H:%M:%S%.6fZ")
}

fn timestamp(format: &str) -> String {
    jiff::Timestamp::now().strftime(format).to_string()
}
