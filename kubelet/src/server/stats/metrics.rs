//! The Prometheus texts: `/metrics/resource` (what metrics-server and autoscalers read), the essentials of
//! `/metrics/cadvisor`, and `/metrics` about the kubelet itself. Names and labels are upstream's.

use std::fmt::Write;

use apimachinery::process::KUBERNETES_VERSION;

use super::kernel::Interface;
use super::{ContainerUsage, PodUsage, Snapshot, kernel};
use crate::state::NodeState;

/// Collects samples under their metric's head.
#[derive(Default)]
struct Text(String);

type Labels<'a> = &'a [(&'a str, &'a str)];

impl Text {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
    }

    /// One sample; `time` in milliseconds as the format wants it.
    fn sample(&mut self, name: &str, labels: Labels<'_>, value: f64, time: Option<i64>) {
        self.line(format_args!("{name}"));
        for (at, (label, text)) in labels.iter().enumerate() {
            let text = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            self.line(format_args!("{}{label}=\"{text}\"", if at == 0 { '{' } else { ',' }));
        }
        self.line(format_args!("{} {value}", if labels.is_empty() { "" } else { "}" }));
        match time {
            Some(time) => self.line(format_args!(" {time}\n")),
            None => self.line(format_args!("\n")),
        }
    }

    fn line(&mut self, text: std::fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        let _ = self.0.write_fmt(text);
    }
}

/// One figure of every container: metric, type, help, and how to get it.
type ContainerMetric = (&'static str, &'static str, &'static str, fn(&ContainerUsage) -> Option<f64>);

fn seconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e9
}

fn started(container: &ContainerUsage) -> Option<f64> {
    container.started.map(|time| time.as_millisecond() as f64 / 1e3)
}

const RESOURCE: [ContainerMetric; 3] = [
    (
        "container_cpu_usage_seconds_total",
        "counter",
        "[STABLE] Cumulative cpu time consumed by the container in core-seconds",
        |c| c.usage.cpu.map(seconds),
    ),
    ("container_memory_working_set_bytes", "gauge", "[STABLE] Current working set of the container in bytes", |c| {
        c.usage.working_set.map(|n| n as f64)
    }),
    (
        "container_start_time_seconds",
        "gauge",
        "[STABLE] Start time of the container since unix epoch in seconds",
        started,
    ),
];

pub fn resource(snapshot: &Snapshot) -> String {
    let time = Some(snapshot.time.as_millisecond());
    let mut text = Text::default();
    for (name, kind, help, figure) in RESOURCE {
        text.head(name, kind, help);
        for (pod, container) in containers(snapshot) {
            let labels =
                [("container", &*container.name), ("namespace", pod.view.namespace()), ("pod", pod.view.name())];
            if let Some(value) = figure(container) {
                text.sample(name, &labels, value, time);
            }
        }
    }
    let cpu = snapshot.usage.cpu.map(seconds);
    let memory = snapshot.usage.working_set.map(|n| n as f64);
    for (name, kind, help, value) in [
        (
            "node_cpu_usage_seconds_total",
            "counter",
            "[STABLE] Cumulative cpu time consumed by the node in core-seconds",
            cpu,
        ),
        ("node_memory_working_set_bytes", "gauge", "[STABLE] Current working set of the node in bytes", memory),
    ] {
        text.head(name, kind, help);
        if let Some(value) = value {
            text.sample(name, &[], value, time);
        }
    }
    let pod_cpu = |pod: &PodUsage| pod.total(|u| u.cpu).map(seconds);
    let pod_memory = |pod: &PodUsage| pod.total(|u| u.working_set).map(|n| n as f64);
    pods(
        &mut text,
        snapshot,
        "pod_cpu_usage_seconds_total",
        "counter",
        "[STABLE] Cumulative cpu time consumed by the pod in core-seconds",
        pod_cpu,
    );
    pods(
        &mut text,
        snapshot,
        "pod_memory_working_set_bytes",
        "gauge",
        "[STABLE] Current working set of the pod in bytes",
        pod_memory,
    );
    let help = "[STABLE] 1 if there was an error while getting container metrics, 0 otherwise";
    text.head("resource_scrape_error", "gauge", help);
    text.sample("resource_scrape_error", &[], 0.0, None);
    text.0
}

fn containers(snapshot: &Snapshot) -> impl Iterator<Item = (&PodUsage, &ContainerUsage)> {
    snapshot.pods.iter().flat_map(|pod| pod.containers.iter().map(move |container| (pod, container)))
}

fn pods(
    text: &mut Text,
    snapshot: &Snapshot,
    name: &str,
    kind: &str,
    help: &str,
    figure: impl Fn(&PodUsage) -> Option<f64>,
) {
    text.head(name, kind, help);
    for pod in &snapshot.pods {
        if let Some(value) = figure(pod) {
            let labels = [("namespace", pod.view.namespace()), ("pod", pod.view.name())];
            text.sample(name, &labels, value, Some(snapshot.time.as_millisecond()));
        }
    }
}

const CADVISOR: [ContainerMetric; 6] = [
    ("container_cpu_usage_seconds_total", "counter", "Cumulative cpu time consumed in seconds.", |c| {
        c.usage.cpu.map(seconds)
    }),
    ("container_memory_usage_bytes", "gauge", "Current memory usage in bytes, including all memory.", |c| {
        c.usage.memory.map(|n| n as f64)
    }),
    ("container_memory_working_set_bytes", "gauge", "Current working set in bytes.", |c| {
        c.usage.working_set.map(|n| n as f64)
    }),
    ("container_memory_rss", "gauge", "Size of RSS in bytes.", |c| c.usage.rss.map(|n| n as f64)),
    ("container_fs_usage_bytes", "gauge", "Number of bytes that are consumed by the container.", |c| {
        c.layer.0.map(|n| n as f64)
    }),
    ("container_start_time_seconds", "gauge", "Start time of the container since unix epoch in seconds.", started),
];

type NetworkMetric = (&'static str, &'static str, fn(&Interface) -> u64);

const NETWORK: [NetworkMetric; 4] = [
    ("container_network_receive_bytes_total", "Cumulative count of bytes received", |i| i.rx_bytes),
    ("container_network_receive_errors_total", "Cumulative count of errors encountered while receiving", |i| {
        i.rx_errors
    }),
    ("container_network_transmit_bytes_total", "Cumulative count of bytes transmitted", |i| i.tx_bytes),
    ("container_network_transmit_errors_total", "Cumulative count of errors encountered while transmitting", |i| {
        i.tx_errors
    }),
];

pub fn cadvisor(snapshot: &Snapshot) -> String {
    let time = Some(snapshot.time.as_millisecond());
    let mut text = Text::default();
    for (name, kind, help, figure) in CADVISOR {
        text.head(name, kind, help);
        for (pod, container) in containers(snapshot) {
            let labels = [
                ("container", &*container.name),
                ("id", &*container.id),
                ("image", &*container.image),
                ("name", &*container.id),
                ("namespace", pod.view.namespace()),
                ("pod", pod.view.name()),
            ];
            if let Some(value) = figure(container) {
                text.sample(name, &labels, value, time);
            }
        }
    }
    for (name, help, figure) in NETWORK {
        text.head(name, "counter", help);
        for pod in &snapshot.pods {
            for interface in &pod.interfaces {
                let labels =
                    [("interface", &*interface.name), ("namespace", pod.view.namespace()), ("pod", pod.view.name())];
                text.sample(name, &labels, figure(interface) as f64, time);
            }
        }
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    text.head("machine_cpu_cores", "gauge", "Number of logical CPU cores.");
    text.sample("machine_cpu_cores", &[], cores as f64, None);
    text.head("machine_memory_bytes", "gauge", "Amount of memory installed on the machine.");
    let memory = snapshot.available_memory + snapshot.usage.working_set.unwrap_or(0);
    text.sample("machine_memory_bytes", &[], memory as f64, None);
    text.0
}

/// About the kubelet itself.
pub fn own(state: &NodeState) -> String {
    let pods = state.pods();
    let mut text = Text::default();
    text.head("kubelet_node_name", "gauge", "[ALPHA] The node's name. The count is always 1.");
    text.sample("kubelet_node_name", &[("node", &state.node_name)], 1.0, None);
    text.head("kubelet_running_pods", "gauge", "[ALPHA] Number of pods that have a running pod sandbox");
    let running = pods.iter().filter(|view| view.observed.sandbox().is_some_and(|sandbox| sandbox.ready));
    text.sample("kubelet_running_pods", &[], running.count() as f64, None);
    text.head("kubelet_running_containers", "gauge", "[ALPHA] Number of containers currently running");
    let all = || pods.iter().flat_map(|view| &view.observed.containers);
    let running = all().filter(|container| container.is_running()).count();
    text.sample("kubelet_running_containers", &[("container_state", "running")], running as f64, None);
    let ended = all().count() - running;
    text.sample("kubelet_running_containers", &[("container_state", "exited")], ended as f64, None);
    text.head("kubernetes_build_info", "gauge", "[ALPHA] The version that is spoken");
    let labels = [("git_version", KUBERNETES_VERSION), ("platform", "linux"), ("compiler", "rustc")];
    text.sample("kubernetes_build_info", &labels, 1.0, None);
    if let Some(process) = kernel::own_process() {
        text.head("process_cpu_seconds_total", "counter", "Total user and system CPU time spent in seconds.");
        text.sample("process_cpu_seconds_total", &[], seconds(process.cpu), None);
        text.head("process_resident_memory_bytes", "gauge", "Resident memory size in bytes.");
        text.sample("process_resident_memory_bytes", &[], process.resident as f64, None);
        text.head("process_open_fds", "gauge", "Number of open file descriptors.");
        text.sample("process_open_fds", &[], process.files as f64, None);
    }
    text.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_in_the_text_format() {
        let mut text = Text::default();
        text.head("a", "gauge", "Help.");
        text.sample("a", &[], 1.0, None);
        text.sample("a", &[("x", "y\"z\n"), ("b", "c")], 0.25, Some(1_700_000_000_000));
        assert_eq!(text.0, "# HELP a Help.\n# TYPE a gauge\na 1\na{x=\"y\\\"z\\n\",b=\"c\"} 0.25 1700000000000\n");
    }
}
