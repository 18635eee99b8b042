//! `GET /stats/summary`: a snapshot in the form of upstream's `stats/v1alpha1` API, which `kubectl get --raw`, the
//! dashboards and autoscalers read.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Map, Value, json};

use super::kernel::{Filesystem, Interface};
use super::{ContainerUsage, PodUsage, Snapshot, Usage};
use crate::volumes::claim_name;
use crate::volumes::csi::VolumeStats;

/// With `brief` only processor time and memory, which is all that autoscaling needs.
pub fn summary(snapshot: &Snapshot, brief: bool) -> Value {
    let mut node = Map::new();
    node.insert("nodeName".into(), json!(snapshot.node_name));
    node.insert("startTime".into(), time(snapshot.booted));
    node.insert("cpu".into(), cpu(&snapshot.usage, snapshot.time));
    node.insert("memory".into(), memory(&snapshot.usage, Some(snapshot.available_memory), snapshot.time));
    if !brief {
        node.insert("network".into(), network(&snapshot.interfaces, snapshot.time));
        node.insert("fs".into(), filesystem(snapshot.disk, snapshot.time));
        node.insert("runtime".into(), json!({"imageFs": filesystem(snapshot.image_disk, snapshot.time)}));
        let (running, limit) = snapshot.processes;
        node.insert("rlimit".into(), json!({"time": time(Some(snapshot.time)), "maxpid": limit, "curproc": running}));
    }
    let pods: Vec<Value> = snapshot.pods.iter().map(|usage| pod(usage, snapshot, brief)).collect();
    json!({"node": node, "pods": pods})
}

fn pod(usage: &PodUsage, snapshot: &Snapshot, brief: bool) -> Value {
    let now = snapshot.time;
    let view = &usage.view;
    let total = Usage {
        cpu: usage.total(|u| u.cpu),
        cpu_rate: usage.total(|u| u.cpu_rate),
        memory: usage.total(|u| u.memory),
        working_set: usage.total(|u| u.working_set),
        rss: usage.total(|u| u.rss),
        page_faults: usage.total(|u| u.page_faults),
        major_page_faults: usage.total(|u| u.major_page_faults),
    };
    let started = view.observed.sandbox().map(|sandbox| sandbox.created_at);
    let uid = view.pod.metadata.uid.as_deref().unwrap_or_else(|| view.uid());
    let mut pod = Map::new();
    pod.insert("podRef".into(), json!({"name": view.name(), "namespace": view.namespace(), "uid": uid}));
    pod.insert("startTime".into(), time(started));
    let containers: Vec<Value> = usage.containers.iter().map(|c| container(c, snapshot, brief)).collect();
    pod.insert("containers".into(), containers.into());
    pod.insert("cpu".into(), cpu(&total, now));
    pod.insert("memory".into(), memory(&total, None, now));
    if !brief {
        if !usage.interfaces.is_empty() {
            pod.insert("network".into(), network(&usage.interfaces, now));
        }
        if !usage.volumes.is_empty() {
            let volumes = usage.volumes.iter().map(|stats| volume(stats, &view.pod, now));
            pod.insert("volume".into(), volumes.collect());
        }
        let used = usage.containers.iter().map(|c| c.logs + c.layer.0.unwrap_or(0)).sum();
        let disk = snapshot.disk.map(|disk| Filesystem { used, ..disk });
        pod.insert("ephemeral-storage".into(), filesystem(disk, now));
    }
    pod.into()
}

fn container(usage: &ContainerUsage, snapshot: &Snapshot, brief: bool) -> Value {
    let now = snapshot.time;
    let mut container = Map::new();
    container.insert("name".into(), json!(usage.name));
    container.insert("startTime".into(), time(usage.started));
    container.insert("cpu".into(), cpu(&usage.usage, now));
    container.insert("memory".into(), memory(&usage.usage, None, now));
    if !brief {
        let (bytes, inodes) = usage.layer;
        let mut rootfs =
            filesystem(snapshot.image_disk.map(|disk| Filesystem { used: bytes.unwrap_or(0), ..disk }), now);
        if let (Some(rootfs), Some(inodes)) = (rootfs.as_object_mut(), inodes) {
            rootfs.insert("inodesUsed".into(), json!(inodes));
        }
        container.insert("rootfs".into(), rootfs);
        let logs = snapshot.disk.map(|disk| Filesystem { used: usage.logs, ..disk });
        container.insert("logs".into(), filesystem(logs, now));
    }
    container.into()
}

fn volume(stats: &VolumeStats, pod: &Pod, now: Timestamp) -> Value {
    let (bytes, inodes) = (stats.bytes, stats.inodes);
    let mut volume = figures(
        now,
        &[
            ("availableBytes", bytes.map(|figures| figures.available)),
            ("capacityBytes", bytes.map(|figures| figures.total)),
            ("usedBytes", bytes.map(|figures| figures.used)),
            ("inodesFree", inodes.map(|figures| figures.available)),
            ("inodes", inodes.map(|figures| figures.total)),
            ("inodesUsed", inodes.map(|figures| figures.used)),
        ],
    );
    volume["name"] = json!(stats.name);
    let mut volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    if let Some(claim) = volumes.find(|found| found.name == stats.name).and_then(|found| claim_name(pod, found)) {
        volume["pvcRef"] = json!({"name": claim, "namespace": pod.metadata.namespace});
    }
    volume
}

fn time(time: Option<Timestamp>) -> Value {
    time.map_or(Value::Null, |time| json!(format!("{time:.0}")))
}

/// Only the figures that are known.
fn figures(now: Timestamp, figures: &[(&str, Option<u64>)]) -> Value {
    let mut object = Map::from_iter([("time".to_owned(), json!(format!("{now:.0}")))]);
    object.extend(figures.iter().filter_map(|(name, value)| Some(((*name).to_owned(), json!((*value)?)))));
    object.into()
}

fn cpu(usage: &Usage, now: Timestamp) -> Value {
    figures(now, &[("usageNanoCores", usage.cpu_rate), ("usageCoreNanoSeconds", usage.cpu)])
}

fn memory(usage: &Usage, available: Option<u64>, now: Timestamp) -> Value {
    figures(
        now,
        &[
            ("availableBytes", available),
            ("usageBytes", usage.memory),
            ("workingSetBytes", usage.working_set),
            ("rssBytes", usage.rss),
            ("pageFaults", usage.page_faults),
            ("majorPageFaults", usage.major_page_faults),
        ],
    )
}

fn filesystem(disk: Option<Filesystem>, now: Timestamp) -> Value {
    figures(
        now,
        &[
            ("availableBytes", disk.map(|d| d.available)),
            ("capacityBytes", disk.map(|d| d.capacity)),
            ("usedBytes", disk.map(|d| d.used)),
            ("inodesFree", disk.map(|d| d.inodes_free)),
            ("inodes", disk.map(|d| d.inodes)),
            ("inodesUsed", disk.map(|d| d.inodes.saturating_sub(d.inodes_free))),
        ],
    )
}

/// The first interface stands for the whole, as `eth0` does everywhere.
fn network(interfaces: &[Interface], now: Timestamp) -> Value {
    let show = |interface: &Interface| {
        json!({
            "name": interface.name, "rxBytes": interface.rx_bytes, "rxErrors": interface.rx_errors,
            "txBytes": interface.tx_bytes, "txErrors": interface.tx_errors,
        })
    };
    let main = interfaces.iter().find(|interface| interface.name == "eth0").or(interfaces.first());
    let mut network = main.map_or_else(|| json!({}), show);
    network["time"] = json!(format!("{now:.0}"));
    network["interfaces"] = interfaces.iter().map(show).collect();
    network
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volumes::csi::Figures;

    #[test]
    fn volumes_name_their_claim() {
        let now: Timestamp = "2026-01-02T03:04:05Z".parse().expect("a time");
        let volumes = json!([{"name": "v", "persistentVolumeClaim": {"claimName": "c"}}, {"name": "i"}]);
        let pod = json!({"metadata": {"namespace": "n"}, "spec": {"containers": [], "volumes": volumes}});
        let pod: Pod = serde_json::from_value(pod).expect("a pod");
        let bytes = Some(Figures { available: 1, total: 3, used: 2 });
        let stats = |name: &str| VolumeStats { name: name.to_owned(), bytes, inodes: None };
        let want = json!({"time": "2026-01-02T03:04:05Z", "name": "v", "availableBytes": 1, "capacityBytes": 3,
            "usedBytes": 2, "pvcRef": {"name": "c", "namespace": "n"}});
        assert_eq!(volume(&stats("v"), &pod, now), want);
        assert_eq!(volume(&stats("i"), &pod, now).get("pvcRef"), None);
    }

    #[test]
    fn unknown_figures_are_left_out() {
        let now: Timestamp = "2026-01-02T03:04:05.678Z".parse().expect("a time");
        let usage = Usage { cpu: Some(5), ..Usage::default() };
        assert_eq!(cpu(&usage, now), json!({"time": "2026-01-02T03:04:05Z", "usageCoreNanoSeconds": 5}));
        assert_eq!(filesystem(None, now), json!({"time": "2026-01-02T03:04:05Z"}));
    }
}
