//! Whether this node takes a pod that was bound to it: the last check before anything is made for it. Pure. The
//! scheduler has looked already; this catches pods that came another way or at the same moment.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::Pod;

use super::plan::{self, Verdict};
use super::qos;
use crate::eviction;
use crate::node::status::Pressure;

/// Kernel settings that live in the pod's own namespaces and harm no one else.
const SAFE_SYSCTLS: [&str; 14] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_notsent_lowat",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_slow_start_after_idle",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_wmem",
];

/// What the node offers to pods.
pub struct Offer<'a> {
    pub cpu_milli: i64,
    pub memory: i64,
    pub pods: usize,
    /// What the node is short of.
    pub pressure: Pressure,
    /// The machine is about to go down.
    pub is_going_down: bool,
    /// Names or prefixes ending in `*`, allowed beside the safe ones.
    pub allowed_sysctls: &'a [String],
}

/// The reason to refuse `pod` beside those that are here already.
pub fn refuse(pod: &Pod, present: &[&Pod], offer: &Offer<'_>) -> Option<Verdict> {
    let verdict = |reason: &'static str, message: String| Verdict {
        reason,
        message: format!("Pod was rejected: {message}"),
        ..Verdict::default()
    };
    if offer.is_going_down {
        return Some(verdict("NodeShutdown", "Pod was rejected as the node is shutting down.".to_owned()));
    }
    if let Some(why) = eviction::keeps_out(pod, offer.pressure) {
        return Some(verdict("Evicted", why));
    }
    if let Some(why) = forbidden_sysctl(pod, offer.allowed_sysctls) {
        return Some(verdict("SysctlForbidden", format!("forbidden sysctl: {why}")));
    }
    let short = |reason: &'static str, requested: i64, used: i64, capacity: i64| {
        let resource = reason.trim_start_matches("OutOf");
        let message = format!(
            "Node didn't have enough resource: {resource}, requested: {requested}, used: {used}, capacity: {capacity}"
        );
        verdict(reason, message)
    };
    let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
    if present.len() >= offer.pods {
        return Some(short("OutOfpods", 1, count(present.len()), count(offer.pods)));
    }
    let of = |pod: &Pod| {
        let resources = qos::pod_resources(pod);
        (resources.cpu_request.unwrap_or(0), resources.memory_request.unwrap_or(0))
    };
    let (cpu, memory) = of(pod);
    let (used_cpu, used_memory) = present.iter().map(|pod| of(pod)).fold((0, 0), |(a, b), (c, d)| (a + c, b + d));
    if cpu > 0 && cpu + used_cpu > offer.cpu_milli {
        return Some(short("OutOfcpu", cpu, used_cpu, offer.cpu_milli));
    }
    if memory > 0 && memory + used_memory > offer.memory {
        return Some(short("OutOfmemory", memory, used_memory, offer.memory));
    }
    let wanted = host_ports(pod);
    if present.iter().any(|other| host_ports(other).iter().any(|port| wanted.iter().any(|own| conflict(own, port)))) {
        let message = "Predicate NodePorts failed: node(s) didn't have free ports for the requested pod ports";
        return Some(verdict("NodePorts", message.to_owned()));
    }
    None
}

type HostPort = (String, String, i32);

fn host_ports(pod: &Pod) -> BTreeSet<HostPort> {
    let spec = pod.spec.iter();
    let running = spec.flat_map(|spec| {
        spec.init_containers.iter().flatten().filter(|spec| plan::is_sidecar(spec)).chain(&spec.containers)
    });
    let ports = running.flat_map(|spec| spec.ports.iter().flatten());
    ports
        .filter_map(|port| {
            let number = port.host_port.filter(|port| *port > 0)?;
            let ip = port.host_ip.clone().filter(|ip| ip != "0.0.0.0").unwrap_or_default();
            Some((ip, port.protocol.clone().unwrap_or_else(|| "TCP".to_owned()), number))
        })
        .collect()
}

/// No address means all of them.
fn conflict(a: &HostPort, b: &HostPort) -> bool {
    a.1 == b.1 && a.2 == b.2 && (a.0.is_empty() || b.0.is_empty() || a.0 == b.0)
}

fn forbidden_sysctl(pod: &Pod, allowed: &[String]) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let sysctls = spec.security_context.as_ref()?.sysctls.as_ref()?;
    sysctls.iter().find_map(|sysctl| {
        let name = sysctl.name.replace('/', ".");
        let listed = allowed.iter().any(|allowed| match allowed.strip_suffix('*') {
            Some(prefix) => name.starts_with(prefix),
            None => name == *allowed,
        });
        if !listed && !SAFE_SYSCTLS.contains(&name.as_str()) {
            return Some(format!("{name:?} not allowlisted"));
        }
        if spec.host_network == Some(true) && name.starts_with("net.") {
            return Some(format!("{name:?} not allowed with host net enabled"));
        }
        let ipc = ["kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue."].iter().any(|ipc| name.starts_with(ipc));
        (spec.host_ipc == Some(true) && ipc).then(|| format!("{name:?} not allowed with host ipc enabled"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(spec: &str) -> Pod {
        let text = format!("spec: {spec}");
        serde_json::from_value(serde_saphyr::from_str(&text).unwrap()).unwrap()
    }

    fn offer(cpu_milli: i64) -> Offer<'static> {
        let pressure = Pressure::default();
        Offer { cpu_milli, memory: 1 << 30, pods: 3, pressure, is_going_down: false, allowed_sysctls: &[] }
    }

    #[test]
    fn a_machine_that_goes_down_takes_no_pods() {
        let offer = Offer { is_going_down: true, ..offer(1000) };
        let verdict = refuse(&pod("{containers: [{name: a}]}"), &[], &offer).unwrap();
        let message = "Pod was rejected: Pod was rejected as the node is shutting down.";
        assert_eq!((verdict.reason, verdict.message.as_str()), ("NodeShutdown", message));
    }

    #[test]
    fn refusals() {
        let big = "{containers: [{name: a, resources: {requests: {cpu: 1500m}}}]}";
        let port = "{containers: [{name: a, ports: [{containerPort: 1, hostPort: 80}]}]}";
        let other_ip = "{containers: [{name: a, ports: [{containerPort: 1, hostPort: 80, hostIP: 127.0.0.1}]}]}";
        let unsafe_sysctl =
            "{securityContext: {sysctls: [{name: kernel.msgmax, value: '1'}]}, containers: [{name: a}]}";
        let host_net = "{hostNetwork: true, securityContext: {sysctls: [{name: net.ipv4.tcp_rmem, value: '1'}]}, containers: [{name: a}]}";
        for (spec, present, want) in [
            (big, vec![], None),
            (big, vec![big], Some("OutOfcpu")),
            (port, vec![port], Some("NodePorts")),
            (other_ip, vec![port], Some("NodePorts")),
            (port, vec![big], None),
            (port, vec![big, big, big], Some("OutOfpods")),
            (unsafe_sysctl, vec![], Some("SysctlForbidden")),
            (host_net, vec![], Some("SysctlForbidden")),
        ] {
            let present: Vec<Pod> = present.into_iter().map(pod).collect();
            let pressure = Pressure::default();
            let offer = Offer { pressure, ..offer(2000) };
            let verdict = refuse(&pod(spec), &present.iter().collect::<Vec<_>>(), &offer);
            assert_eq!(verdict.map(|verdict| verdict.reason), want, "{spec}");
        }
    }

    #[test]
    fn the_message_has_the_figures() {
        let verdict =
            refuse(&pod("{containers: [{name: a, resources: {requests: {cpu: 2}}}]}"), &[], &offer(1000)).unwrap();
        assert_eq!(
            verdict.message,
            "Pod was rejected: Node didn't have enough resource: cpu, requested: 2000, used: 0, capacity: 1000"
        );
    }
}
