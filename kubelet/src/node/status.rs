//! The node's status, computed from the machine, the configuration and the runtime's own report. Pure.

use std::collections::BTreeMap;

use apimachinery::meta::{Quantity, QuantityFormat};
use jiff::Timestamp;
use k8s_cri::v1 as cri;
use k8s_openapi::api::core::v1::{
    ContainerImage, DaemonEndpoint, NodeAddress, NodeCondition, NodeDaemonEndpoints, NodeRuntimeHandler,
    NodeRuntimeHandlerFeatures, NodeStatus, NodeSwapStatus, NodeSystemInfo,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::machine::{self, Machine};
use crate::config::KubeletConfiguration;

const MAX_IMAGES: usize = 50;
const MAX_NAMES_PER_IMAGE: usize = 5;

/// Resources that run short, by condition type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pressure {
    pub memory: bool,
    pub disk: bool,
    pub pids: bool,
}

pub struct Inputs<'a> {
    pub machine: &'a Machine,
    pub config: &'a KubeletConfiguration,
    pub hostname: &'a str,
    pub host_ips: &'a [String],
    pub runtime_version: &'a str,
    pub runtime: Result<&'a cri::StatusResponse, String>,
    pub images: &'a [ContainerImage],
    pub pressure: Pressure,
    /// What beside the runtime keeps the node from being ready.
    pub obstacles: &'a [String],
    /// Names of the attachable volumes that are on the node, or on their way to it.
    pub volumes_in_use: &'a [String],
    /// What plugins offer beside the machine's own resources.
    pub devices: &'a Offered,
    pub now: Timestamp,
}

/// Amounts of resources that plugins offer, by the resources' names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Offered {
    pub capacity: BTreeMap<String, i64>,
    pub allocatable: BTreeMap<String, i64>,
}

fn bytes(value: i64) -> ApiQuantity {
    ApiQuantity(Quantity::from_value(value, QuantityFormat::BinarySi).to_string())
}

fn decimal(value: i64) -> ApiQuantity {
    ApiQuantity(value.to_string())
}

/// A threshold or reservation: a quantity, or a percentage of `whole`.
pub fn threshold(text: &str, whole: i64) -> i64 {
    match text.strip_suffix('%') {
        Some(percent) => {
            let share = percent.parse::<f64>().unwrap_or(0.0) / 100.0;
            // Shares of a disk or memory; the last byte does not matter.
            (whole as f64 * share) as i64
        }
        None => text.parse::<Quantity>().map_or(0, |quantity| quantity.value()),
    }
}

/// What the node has, and what pods may use of it.
pub fn capacity(machine: &Machine, config: &KubeletConfiguration) -> [BTreeMap<String, ApiQuantity>; 2] {
    let reserved = |name: &str| -> i64 {
        let maps = [&config.system_reserved, &config.kube_reserved];
        maps.into_iter().filter_map(|map| map.get(name)).map(|text| threshold(text, 0)).sum()
    };
    let reserved_milli: i64 = [&config.system_reserved, &config.kube_reserved]
        .into_iter()
        .filter_map(|map| map.get("cpu")?.parse::<Quantity>().ok())
        .map(|quantity| quantity.milli_value())
        .sum();
    let eviction = |signal: &str, whole| config.eviction_hard.get(signal).map_or(0, |text| threshold(text, whole));
    let memory = machine.memory - reserved("memory") - eviction("memory.available", machine.memory);
    let disk = machine.disk - reserved("ephemeral-storage") - eviction("nodefs.available", machine.disk);
    let pods = decimal(i64::from(config.max_pods));
    let named = |cpu, memory, disk, pods| {
        BTreeMap::from([
            ("cpu".to_owned(), cpu),
            ("memory".to_owned(), memory),
            ("ephemeral-storage".to_owned(), disk),
            ("pods".to_owned(), pods),
            ("hugepages-1Gi".to_owned(), decimal(0)),
            ("hugepages-2Mi".to_owned(), decimal(0)),
        ])
    };
    let milli = ApiQuantity(Quantity::from_milli(machine.cpus * 1000 - reserved_milli).to_string());
    [
        named(decimal(machine.cpus), bytes(machine.memory), bytes(machine.disk), pods.clone()),
        named(milli, bytes(memory.max(0)), decimal(disk.max(0)), pods),
    ]
}

/// CPU in thousandths and memory in bytes that pods may use together.
pub fn allocatable(machine: &Machine, config: &KubeletConfiguration) -> (i64, i64) {
    let [_, allocatable] = capacity(machine, config);
    let of = |name: &str| allocatable.get(name).and_then(|quantity| quantity.0.parse::<Quantity>().ok());
    (of("cpu").map_or(0, |q| q.milli_value()), of("memory").map_or(0, |q| q.value()))
}

/// The new status; conditions keep their transition times from `previous`.
pub fn status(inputs: &Inputs<'_>, previous: &NodeStatus) -> NodeStatus {
    let [mut capacity, mut allocatable] = capacity(inputs.machine, inputs.config);
    for (all, offered, previous) in [
        (&mut capacity, &inputs.devices.capacity, &previous.capacity),
        (&mut allocatable, &inputs.devices.allocatable, &previous.allocatable),
    ] {
        all.extend(offered.iter().map(|(name, amount)| (name.clone(), decimal(*amount))));
        // Resources that others have added to the node's status stay.
        for (name, amount) in previous.iter().flatten().filter(|(name, _)| name.contains('/')) {
            all.entry(name.clone()).or_insert_with(|| amount.clone());
        }
    }
    let addresses = inputs.host_ips.iter().map(|ip| ("InternalIP", ip.as_str())).chain([("Hostname", inputs.hostname)]);
    let handlers = inputs.runtime.as_ref().map(|status| runtime_handlers(status)).unwrap_or_default();
    NodeStatus {
        capacity: Some(capacity),
        allocatable: Some(allocatable),
        addresses: Some(
            addresses
                .map(|(type_, address)| NodeAddress { type_: type_.to_owned(), address: address.to_owned() })
                .collect(),
        ),
        conditions: Some(conditions(inputs, previous)),
        daemon_endpoints: Some(NodeDaemonEndpoints {
            kubelet_endpoint: Some(DaemonEndpoint { port: i32::from(inputs.config.port) }),
        }),
        node_info: Some(system_info(inputs)),
        images: Some(inputs.images.to_vec()),
        runtime_handlers: Some(handlers).filter(|list| !list.is_empty()).or_else(|| previous.runtime_handlers.clone()),
        volumes_in_use: Some(inputs.volumes_in_use.to_vec()).filter(|list| !list.is_empty()),
        // The attach/detach controller's.
        volumes_attached: previous.volumes_attached.clone(),
        ..NodeStatus::default()
    }
}

fn runtime_handlers(status: &cri::StatusResponse) -> Vec<NodeRuntimeHandler> {
    let handler = |handler: &cri::RuntimeHandler| NodeRuntimeHandler {
        name: Some(handler.name.clone()),
        features: handler.features.as_ref().map(|features| NodeRuntimeHandlerFeatures {
            recursive_read_only_mounts: Some(features.recursive_read_only_mounts),
            user_namespaces: Some(features.user_namespaces),
        }),
    };
    let mut handlers: Vec<_> = status.runtime_handlers.iter().map(handler).collect();
    handlers.sort_by(|a, b| a.name.cmp(&b.name));
    handlers
}

fn system_info(inputs: &Inputs<'_>) -> NodeSystemInfo {
    let machine = inputs.machine;
    let version = apimachinery::process::KUBERNETES_VERSION.to_owned();
    NodeSystemInfo {
        architecture: machine::architecture().to_owned(),
        boot_id: machine.boot_id.clone(),
        container_runtime_version: inputs.runtime_version.to_owned(),
        kernel_version: machine.kernel_version.clone(),
        kube_proxy_version: String::new(),
        kubelet_version: version,
        machine_id: machine.machine_id.clone(),
        operating_system: "linux".to_owned(),
        os_image: machine.os_image.clone(),
        swap: (machine.swap > 0).then_some(NodeSwapStatus { capacity: Some(machine.swap) }),
        system_uuid: machine.system_uuid.clone(),
        ..NodeSystemInfo::default()
    }
}

/// Why the node is not ready; empty when it is.
fn not_ready(runtime: &Result<&cri::StatusResponse, String>, obstacles: &[String]) -> Vec<String> {
    let others = obstacles.iter().cloned();
    let status = match runtime {
        Err(error) => return [format!("container runtime is down: {error}")].into_iter().chain(others).collect(),
        Ok(status) => status,
    };
    let conditions = status.status.iter().flat_map(|status| &status.conditions);
    let unmet = conditions.filter(|condition| !condition.status).filter_map(|condition| {
        let what = match condition.r#type.as_str() {
            "RuntimeReady" => "container runtime not ready",
            "NetworkReady" => "container runtime network not ready",
            _ => return None,
        };
        let (name, reason, message) = (&condition.r#type, &condition.reason, &condition.message);
        Some(format!("{what}: {name}=false reason:{reason} message:{message}"))
    });
    unmet.chain(others).collect()
}

fn conditions(inputs: &Inputs<'_>, previous: &NodeStatus) -> Vec<NodeCondition> {
    let pressure = inputs.pressure;
    let missing = not_ready(&inputs.runtime, inputs.obstacles);
    let pick = |under: bool, yes: (&'static str, &str), no: (&'static str, &str)| {
        let (reason, message) = if under { yes } else { no };
        (under, reason, message.to_owned())
    };
    let ready = match missing.as_slice() {
        [] => (true, "KubeletReady", "kubelet is posting ready status".to_owned()),
        [one] => (false, "KubeletNotReady", one.clone()),
        many => (false, "KubeletNotReady", format!("[{}]", many.join(", "))),
    };
    let wanted = [
        (
            "MemoryPressure",
            pick(
                pressure.memory,
                ("KubeletHasInsufficientMemory", "kubelet has insufficient memory available"),
                ("KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
            ),
        ),
        (
            "DiskPressure",
            pick(
                pressure.disk,
                ("KubeletHasDiskPressure", "kubelet has disk pressure"),
                ("KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
            ),
        ),
        (
            "PIDPressure",
            pick(
                pressure.pids,
                ("KubeletHasInsufficientPID", "kubelet has insufficient PID available"),
                ("KubeletHasSufficientPID", "kubelet has sufficient PID available"),
            ),
        ),
        ("Ready", ready),
    ];
    let now = Time(crate::pod::status::whole_seconds(inputs.now));
    let old = |type_: &str| previous.conditions.iter().flatten().find(|condition| condition.type_ == type_);
    wanted
        .into_iter()
        .map(|(type_, (value, reason, message))| {
            let status = if value { "True" } else { "False" };
            let unchanged = old(type_).filter(|old| old.status == status);
            NodeCondition {
                type_: type_.to_owned(),
                status: status.to_owned(),
                reason: Some(reason.to_owned()),
                message: Some(message),
                last_heartbeat_time: Some(now.clone()),
                last_transition_time: unchanged.and_then(|old| old.last_transition_time.clone()).or(Some(now.clone())),
            }
        })
        .collect()
}

/// Images for the status: the largest, with some of their names.
pub fn images(images: Vec<cri::Image>) -> Vec<ContainerImage> {
    let mut images = images;
    images.sort_by(|a, b| b.size.cmp(&a.size).then_with(|| a.id.cmp(&b.id)));
    images.truncate(MAX_IMAGES);
    images
        .into_iter()
        .map(|image| ContainerImage {
            names: Some(image.repo_digests.into_iter().chain(image.repo_tags).take(MAX_NAMES_PER_IMAGE).collect()),
            size_bytes: i64::try_from(image.size).ok(),
        })
        .collect()
}

/// The same, but for the heartbeat.
pub fn same(a: &NodeStatus, b: &NodeStatus) -> bool {
    let plain = |status: &NodeStatus| {
        let mut status = status.clone();
        for condition in status.conditions.iter_mut().flatten() {
            condition.last_heartbeat_time = None;
        }
        status
    };
    plain(a) == plain(b)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::AttachedVolume;

    use super::*;

    fn machine() -> Machine {
        Machine { cpus: 2, memory: 8 << 30, disk: 100 << 30, ..Machine::default() }
    }

    fn report(network: bool) -> cri::StatusResponse {
        let condition = |name: &str, status, message: &str| cri::RuntimeCondition {
            r#type: name.into(),
            status,
            reason: if status { String::new() } else { "NetworkPluginNotReady".into() },
            message: message.into(),
        };
        let conditions = vec![condition("RuntimeReady", true, ""), condition("NetworkReady", network, "no cni")];
        cri::StatusResponse { status: Some(cri::RuntimeStatus { conditions }), ..Default::default() }
    }

    fn compute(runtime: Result<&cri::StatusResponse, String>, previous: &NodeStatus, second: i64) -> NodeStatus {
        let config = KubeletConfiguration::default();
        let inputs = Inputs {
            machine: &machine(),
            config: &config,
            hostname: "n",
            host_ips: &["192.0.2.1".into()],
            runtime_version: "containerd://1",
            runtime,
            images: &[],
            pressure: Pressure::default(),
            obstacles: &[],
            volumes_in_use: &[],
            devices: &Offered::default(),
            now: Timestamp::from_second(second).unwrap(),
        };
        status(&inputs, previous)
    }

    #[test]
    fn ready_follows_the_runtime() {
        let down = compute(Ok(&report(false)), &NodeStatus::default(), 10);
        let condition = down.conditions.as_ref().unwrap().last().unwrap();
        assert_eq!(condition.status, "False");
        assert_eq!(
            condition.message.as_deref(),
            Some("container runtime network not ready: NetworkReady=false reason:NetworkPluginNotReady message:no cni")
        );
        let up = compute(Ok(&report(true)), &down, 20);
        let conditions = up.conditions.as_ref().unwrap();
        let changed = |type_: &str| {
            let condition = conditions.iter().find(|condition| condition.type_ == type_).unwrap();
            condition.last_transition_time.as_ref().unwrap().0.as_second()
        };
        assert_eq!((changed("Ready"), changed("MemoryPressure")), (20, 10));
        assert!(!same(&down, &up));
        assert!(same(&up, &compute(Ok(&report(true)), &up, 30)));
    }

    #[test]
    fn obstacles_and_resources_of_others() {
        let config = KubeletConfiguration::default();
        let devices = Offered {
            capacity: BTreeMap::from([("example.com/gpu".to_owned(), 2)]),
            allocatable: BTreeMap::from([("example.com/gpu".to_owned(), 1)]),
        };
        let report = report(true);
        let inputs = Inputs {
            machine: &machine(),
            config: &config,
            hostname: "n",
            host_ips: &[],
            runtime_version: "",
            runtime: Ok(&report),
            images: &[],
            pressure: Pressure::default(),
            obstacles: &["not yet".to_owned(), "going".to_owned()],
            volumes_in_use: &["v".to_owned()],
            devices: &devices,
            now: Timestamp::UNIX_EPOCH,
        };
        let others = BTreeMap::from([("example.com/fpga".to_owned(), decimal(3)), ("old".to_owned(), decimal(4))]);
        let attached = vec![AttachedVolume { name: "v".to_owned(), device_path: String::new() }];
        let previous =
            NodeStatus { capacity: Some(others), volumes_attached: Some(attached.clone()), ..NodeStatus::default() };
        let status = status(&inputs, &previous);
        let ready = status.conditions.as_ref().unwrap().last().unwrap();
        assert_eq!((ready.status.as_str(), ready.message.as_deref()), ("False", Some("[not yet, going]")));
        let capacity = status.capacity.unwrap();
        assert_eq!((capacity["example.com/gpu"].0.as_str(), capacity["example.com/fpga"].0.as_str()), ("2", "3"));
        assert!(!capacity.contains_key("old"));
        assert_eq!(status.allocatable.unwrap()["example.com/gpu"].0, "1");
        assert_eq!((status.volumes_in_use, status.volumes_attached), (Some(vec!["v".to_owned()]), Some(attached)));
    }

    #[test]
    fn pods_get_what_is_left() {
        let mut config = KubeletConfiguration::default();
        config.system_reserved.insert("cpu".into(), "500m".into());
        let [capacity, allocatable] = capacity(&machine(), &config);
        assert_eq!((capacity["cpu"].0.as_str(), allocatable["cpu"].0.as_str()), ("2", "1500m"));
        assert_eq!(capacity["memory"].0, "8Gi");
        assert_eq!(allocatable["memory"].0, "8092Mi");
        assert_eq!(allocatable["pods"].0, "110");
    }
}
