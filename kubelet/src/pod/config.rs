//! CRI configurations of sandboxes and containers, from the pod's spec and what has been resolved for it before.
//! Pure.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use k8s_cri::v1 as cri;
use k8s_openapi::api::core::v1::{
    Capabilities, Container as Spec, Pod, PodSecurityContext, PodSpec, SeccompProfile, SecurityContext,
};

use super::observed::keys;
use super::{plan, qos};
use crate::cri::{ContainerConfig, Mount, stop_signal};
use crate::devices::DeviceOptions;

/// Kernel files that containers do not see, and those that they see read-only, unless `procMount: Unmasked`.
const MASKED_PATHS: [&str; 12] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
const READONLY_PATHS: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];
const DEFAULT_TERMINATION_PATH: &str = "/dev/termination-log";

/// Why a container cannot be made from its spec; the texts are upstream's, shown as CreateContainerConfigError.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    #[error("container's runAsUser breaks non-root policy (pod: \"{pod}\", container: {container})")]
    RootByUser { pod: String, container: String },
    #[error("container has runAsNonRoot and image will run as root (pod: \"{pod}\", container: {container})")]
    RootByImage { pod: String, container: String },
    #[error(
        "container has runAsNonRoot and image has non-numeric user ({user}), cannot verify user is non-root \
         (pod: \"{pod}\", container: {container})"
    )]
    NamedUser { user: String, pod: String, container: String },
}

fn pod_security(spec: &PodSpec) -> PodSecurityContext {
    spec.security_context.clone().unwrap_or_default()
}

pub fn host_network(pod: &Pod) -> bool {
    pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or(false)
}

/// The short name that the pod's processes see.
pub fn hostname(pod: &Pod) -> String {
    let spec = pod.spec.as_ref();
    if let Some(name) = spec.and_then(|spec| spec.hostname_override.clone()) {
        return name;
    }
    let name = spec
        .and_then(|spec| spec.hostname.clone())
        .filter(|name| !name.is_empty())
        .or_else(|| pod.metadata.name.clone())
        .unwrap_or_default();
    let cut: String = name.chars().take(63).collect();
    cut.trim_end_matches(['-', '.']).to_owned()
}

/// The domain of a pod with a subdomain, without the host name.
pub fn domain(pod: &Pod, cluster_domain: &str) -> Option<String> {
    let subdomain = pod.spec.as_ref()?.subdomain.as_deref().filter(|name| !name.is_empty())?;
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    Some(format!("{subdomain}.{namespace}.svc.{cluster_domain}"))
}

fn identity(pod: &Pod) -> HashMap<String, String> {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    HashMap::from([
        (keys::POD_NAME.to_owned(), text(&pod.metadata.name)),
        (keys::POD_NAMESPACE.to_owned(), text(&pod.metadata.namespace)),
        (keys::POD_UID.to_owned(), super::runtime_uid(pod).to_owned()),
    ])
}

/// What a sandbox needs beside the pod itself.
#[derive(Clone, Debug, Default)]
pub struct SandboxSetup {
    pub dns: cri::DnsConfig,
    pub cluster_domain: String,
    pub cgroup_parent: String,
    pub log_directory: String,
}

pub fn sandbox(pod: &Pod, attempt: u32, setup: &SandboxSetup) -> cri::PodSandboxConfig {
    let spec = pod.spec.clone().unwrap_or_default();
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    let mut labels: HashMap<String, String> = pod.metadata.labels.clone().unwrap_or_default().into_iter().collect();
    labels.extend(identity(pod));
    let mut name = hostname(pod);
    if spec.set_hostname_as_fqdn == Some(true)
        && let Some(domain) = domain(pod, &setup.cluster_domain)
    {
        name = format!("{name}.{domain}");
    }
    let resources = qos::pod_resources(pod);
    cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: text(&pod.metadata.name),
            uid: super::runtime_uid(pod).to_owned(),
            namespace: text(&pod.metadata.namespace),
            attempt,
        }),
        hostname: if host_network(pod) { String::new() } else { name },
        log_directory: setup.log_directory.clone(),
        dns_config: Some(setup.dns.clone()),
        port_mappings: if host_network(pod) { Vec::new() } else { port_mappings(&spec) },
        labels,
        annotations: pod.metadata.annotations.clone().unwrap_or_default().into_iter().collect(),
        linux: Some(cri::LinuxPodSandboxConfig {
            cgroup_parent: setup.cgroup_parent.clone(),
            security_context: Some(sandbox_security(pod, &spec)),
            sysctls: pod_security(&spec).sysctls.into_iter().flatten().map(|s| (s.name, s.value)).collect(),
            resources: Some(cri::LinuxContainerResources {
                cpu_shares: i64::try_from(resources.cpu_shares()).unwrap_or(2),
                memory_limit_in_bytes: resources.memory_limit.unwrap_or(0),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn port_mappings(spec: &PodSpec) -> Vec<cri::PortMapping> {
    let sidecars = spec.init_containers.iter().flatten().filter(|spec| plan::is_sidecar(spec));
    let ports = sidecars.chain(&spec.containers).flat_map(|spec| spec.ports.iter().flatten());
    ports
        .map(|port| cri::PortMapping {
            protocol: match port.protocol.as_deref() {
                Some("UDP") => cri::Protocol::Udp,
                Some("SCTP") => cri::Protocol::Sctp,
                _ => cri::Protocol::Tcp,
            } as i32,
            container_port: port.container_port,
            host_port: port.host_port.unwrap_or(0),
            host_ip: port.host_ip.clone().unwrap_or_default(),
        })
        .collect()
}

fn namespaces(spec: &PodSpec, pid: cri::NamespaceMode) -> cri::NamespaceOption {
    let node_or_pod = |node: Option<bool>| match node {
        Some(true) => cri::NamespaceMode::Node as i32,
        _ => cri::NamespaceMode::Pod as i32,
    };
    cri::NamespaceOption {
        network: node_or_pod(spec.host_network),
        pid: if spec.host_pid == Some(true) { cri::NamespaceMode::Node } else { pid } as i32,
        ipc: node_or_pod(spec.host_ipc),
        ..Default::default()
    }
}

fn pid_mode(spec: &PodSpec) -> cri::NamespaceMode {
    match spec.share_process_namespace {
        Some(true) => cri::NamespaceMode::Pod,
        _ => cri::NamespaceMode::Container,
    }
}

fn sandbox_security(pod: &Pod, spec: &PodSpec) -> cri::LinuxSandboxSecurityContext {
    let security = pod_security(spec);
    let privileged = spec
        .init_containers
        .iter()
        .flatten()
        .chain(&spec.containers)
        .any(|spec| spec.security_context.as_ref().and_then(|s| s.privileged).unwrap_or(false));
    cri::LinuxSandboxSecurityContext {
        namespace_options: Some(namespaces(spec, pid_mode(spec))),
        run_as_user: security.run_as_user.map(|value| cri::Int64Value { value }),
        run_as_group: security.run_as_user.and(security.run_as_group).map(|value| cri::Int64Value { value }),
        supplemental_groups: supplemental_groups(pod),
        privileged,
        seccomp: Some(cri::SecurityProfile::default()),
        ..Default::default()
    }
}

fn supplemental_groups(pod: &Pod) -> Vec<i64> {
    let security = pod.spec.as_ref().map(pod_security).unwrap_or_default();
    security.fs_group.into_iter().chain(security.supplemental_groups.into_iter().flatten()).collect()
}

/// Everything about one start of one container that is not in its spec.
pub struct ContainerSetup<'a> {
    pub pod: &'a Pod,
    pub spec: &'a Spec,
    pub restart_count: i32,
    /// The image's id in the runtime, and its user.
    pub image_id: String,
    pub image_uid: Option<i64>,
    pub image_user: String,
    pub env: Vec<(String, String)>,
    pub mounts: Vec<Mount>,
    /// What plugins give to the container; their mounts are among the others.
    pub devices: DeviceOptions,
    /// The id of the container whose process namespace an ephemeral container joins.
    pub target: Option<String>,
    pub node_memory: i64,
    /// Period of CPU quotas in microseconds; zero switches quotas off.
    pub quota_period: i64,
    pub seccomp_root: &'a Path,
}

pub fn container(setup: ContainerSetup<'_>) -> Result<ContainerConfig, SpecError> {
    let (pod, spec) = (setup.pod, setup.spec);
    let expand = |list: &Option<Vec<String>>| -> Vec<String> {
        let known: BTreeMap<&str, &str> = setup.env.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        list.iter()
            .flatten()
            .map(|text| super::env::expand(text, |name| known.get(name).map(|v| (*v).to_owned())))
            .collect()
    };
    let mut labels = identity(pod);
    labels.insert(keys::CONTAINER_NAME.to_owned(), spec.name.clone());
    let grace = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds).unwrap_or(30);
    let own = [
        (keys::CONTAINER_HASH, plan::container_hash(spec)),
        (keys::RESTART_COUNT, setup.restart_count.to_string()),
        (keys::TERMINATION_PATH, termination_path(spec).to_owned()),
        (keys::TERMINATION_POLICY, spec.termination_message_policy.clone().unwrap_or_default()),
        (keys::POD_GRACE, grace.to_string()),
    ];
    let own = own.map(|(key, value)| (key.to_owned(), value));
    let devices = setup.devices.clone();
    let linux = cri::LinuxContainerConfig {
        resources: Some(resources(pod, spec, setup.node_memory, setup.quota_period)),
        security_context: Some(security(&setup)?),
    };
    let signal = spec.lifecycle.as_ref().and_then(|lifecycle| lifecycle.stop_signal.as_deref());
    Ok(ContainerConfig {
        metadata: Some(cri::ContainerMetadata {
            name: spec.name.clone(),
            attempt: u32::try_from(setup.restart_count).unwrap_or(0),
        }),
        command: expand(&spec.command),
        args: expand(&spec.args),
        image: Some(cri::ImageSpec {
            image: setup.image_id.clone(),
            user_specified_image: spec.image.clone().unwrap_or_default(),
            ..Default::default()
        }),
        working_dir: spec.working_dir.clone().unwrap_or_default(),
        // The pod's own come last: it has the last word.
        envs: devices.env.into_iter().chain(setup.env).map(|(key, value)| cri::KeyValue { key, value }).collect(),
        mounts: setup.mounts,
        labels,
        annotations: devices.annotations.into_iter().chain(own).collect(),
        log_path: format!("{}/{}.log", spec.name, setup.restart_count),
        stdin: spec.stdin.unwrap_or(false),
        stdin_once: spec.stdin_once.unwrap_or(false),
        tty: spec.tty.unwrap_or(false),
        linux: Some(linux),
        devices: devices.devices,
        cdi_devices: devices.cdi_devices.into_iter().map(|name| cri::CdiDevice { name }).collect(),
        stop_signal: signal.map_or(0, stop_signal),
    })
}

pub fn termination_path(spec: &Spec) -> &str {
    spec.termination_message_path.as_deref().filter(|path| !path.is_empty()).unwrap_or(DEFAULT_TERMINATION_PATH)
}

/// The kernel's figures for one container; `quota_period` in microseconds, zero without quotas.
pub fn resources(pod: &Pod, spec: &Spec, node_memory: i64, quota_period: i64) -> cri::LinuxContainerResources {
    let amounts = qos::Resources::of(spec.resources.as_ref());
    let quota = (quota_period > 0).then(|| amounts.cpu_quota(quota_period)).flatten();
    cri::LinuxContainerResources {
        cpu_shares: i64::try_from(amounts.cpu_shares()).unwrap_or(2),
        cpu_period: if quota.is_some() { quota_period } else { 0 },
        cpu_quota: quota.unwrap_or(0),
        memory_limit_in_bytes: amounts.memory_limit.unwrap_or(0),
        oom_score_adj: qos::oom_score_adj(pod, spec, node_memory),
        ..Default::default()
    }
}

/// To the runtime an absent limit of a running container means "as before"; this says "none" instead.
pub fn lift_absent_limits(resources: &mut cri::LinuxContainerResources, quota_period: i64) {
    if resources.cpu_quota == 0 && quota_period > 0 {
        resources.cpu_quota = -1;
        resources.cpu_period = quota_period;
    }
    if resources.memory_limit_in_bytes == 0 {
        resources.memory_limit_in_bytes = -1;
    }
}

fn security(setup: &ContainerSetup<'_>) -> Result<cri::LinuxContainerSecurityContext, SpecError> {
    let pod_spec = setup.pod.spec.clone().unwrap_or_default();
    let of_pod = pod_security(&pod_spec);
    let own = setup.spec.security_context.clone().unwrap_or_default();
    let user = own.run_as_user.or(of_pod.run_as_user);
    let privileged = own.privileged.unwrap_or(false);
    if own.run_as_non_root.or(of_pod.run_as_non_root) == Some(true) {
        check_non_root(setup, user)?;
    }
    let (run_as_user, run_as_username) = match (user, setup.image_uid) {
        (Some(uid), _) => (Some(uid), String::new()),
        (None, Some(uid)) => (Some(uid), String::new()),
        (None, None) => (None, setup.image_user.clone()),
    };
    let unmasked = own.proc_mount.as_deref() == Some("Unmasked");
    let paths = |list: &[&str]| if unmasked { Vec::new() } else { list.iter().map(|p| (*p).to_owned()).collect() };
    let mut options = namespaces(&pod_spec, pid_mode(&pod_spec));
    if let Some(target) = &setup.target {
        options.pid = cri::NamespaceMode::Target as i32;
        options.target_id.clone_from(target);
    }
    let group = own.run_as_group.or(of_pod.run_as_group);
    let seccomp = own.seccomp_profile.as_ref().or(of_pod.seccomp_profile.as_ref());
    let no_new_privs = own.allow_privilege_escalation == Some(false) && !privileged;
    Ok(cri::LinuxContainerSecurityContext {
        capabilities: Some(capabilities(own.capabilities.as_ref())),
        privileged,
        namespace_options: Some(options),
        run_as_user: run_as_user.map(|value| cri::Int64Value { value }),
        run_as_group: group.map(|value| cri::Int64Value { value }),
        run_as_username,
        readonly_rootfs: own.read_only_root_filesystem.unwrap_or(false),
        supplemental_groups: supplemental_groups(setup.pod),
        no_new_privs,
        masked_paths: paths(&MASKED_PATHS),
        readonly_paths: paths(&READONLY_PATHS),
        seccomp: Some(seccomp_profile(seccomp, privileged, setup.seccomp_root)),
        apparmor: apparmor(&own, &of_pod),
        ..Default::default()
    })
}

fn check_non_root(setup: &ContainerSetup<'_>, user: Option<i64>) -> Result<(), SpecError> {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    let metadata = &setup.pod.metadata;
    let pod = format!("{}_{}({})", text(&metadata.name), text(&metadata.namespace), super::runtime_uid(setup.pod));
    let container = setup.spec.name.clone();
    match (user, setup.image_uid, setup.image_user.as_str()) {
        (Some(0), ..) => Err(SpecError::RootByUser { pod, container }),
        (Some(_), ..) => Ok(()),
        (None, Some(0), _) => Err(SpecError::RootByImage { pod, container }),
        (None, Some(_), _) => Ok(()),
        (None, None, "") => Err(SpecError::RootByImage { pod, container }),
        (None, None, user) => Err(SpecError::NamedUser { user: user.to_owned(), pod, container }),
    }
}

fn capabilities(capabilities: Option<&Capabilities>) -> cri::Capability {
    let list = |list: &Option<Vec<String>>| list.clone().unwrap_or_default();
    cri::Capability {
        add_capabilities: capabilities.map(|c| list(&c.add)).unwrap_or_default(),
        drop_capabilities: capabilities.map(|c| list(&c.drop)).unwrap_or_default(),
        ..Default::default()
    }
}

fn seccomp_profile(profile: Option<&SeccompProfile>, privileged: bool, root: &Path) -> cri::SecurityProfile {
    use cri::security_profile::ProfileType;
    let (kind, local) = match profile.map(|profile| (profile.type_.as_str(), &profile.localhost_profile)) {
        Some(("RuntimeDefault", _)) if !privileged => (ProfileType::RuntimeDefault, String::new()),
        Some(("Localhost", Some(file))) if !privileged => {
            (ProfileType::Localhost, root.join(file).display().to_string())
        }
        _ => (ProfileType::Unconfined, String::new()),
    };
    cri::SecurityProfile { profile_type: kind as i32, localhost_ref: local }
}

fn apparmor(own: &SecurityContext, of_pod: &PodSecurityContext) -> Option<cri::SecurityProfile> {
    use cri::security_profile::ProfileType;
    let profile = own.app_armor_profile.as_ref().or(of_pod.app_armor_profile.as_ref())?;
    let kind = match profile.type_.as_str() {
        "Unconfined" => ProfileType::Unconfined,
        "Localhost" => ProfileType::Localhost,
        _ => ProfileType::RuntimeDefault,
    };
    let localhost_ref = profile.localhost_profile.clone().unwrap_or_default();
    Some(cri::SecurityProfile { profile_type: kind as i32, localhost_ref })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(spec: &str) -> Pod {
        let text = format!("metadata: {{name: p, namespace: d, uid: u, labels: {{app: x}}}}\nspec: {spec}\n");
        serde_json::from_value(serde_saphyr::from_str(&text).unwrap()).unwrap()
    }

    fn setup<'a>(pod: &'a Pod, image_uid: Option<i64>, image_user: &str) -> ContainerSetup<'a> {
        ContainerSetup {
            pod,
            spec: &pod.spec.as_ref().unwrap().containers[0],
            restart_count: 2,
            image_id: "sha256:1".into(),
            image_uid,
            image_user: image_user.into(),
            env: vec![("A".into(), "1".into())],
            mounts: vec![],
            devices: DeviceOptions::default(),
            target: None,
            node_memory: 1 << 30,
            quota_period: 100_000,
            seccomp_root: Path::new("/seccomp"),
        }
    }

    #[test]
    fn a_container_from_its_spec() {
        let pod = pod(
            "{securityContext: {runAsUser: 5, fsGroup: 9}, containers: [{name: c, image: i, command: [\"$(A)$$(A)\"], \
            securityContext: {allowPrivilegeEscalation: false, seccompProfile: {type: Localhost, localhostProfile: p.json}}, \
            resources: {limits: {cpu: 500m, memory: 1Mi}}}]}",
        );
        let config = container(setup(&pod, Some(0), "")).unwrap();
        assert_eq!(config.command, ["1$(A)"]);
        assert_eq!(config.log_path, "c/2.log");
        let linux = config.linux.unwrap();
        let resources = linux.resources.unwrap();
        assert_eq!(
            (resources.cpu_shares, resources.cpu_quota, resources.memory_limit_in_bytes),
            (512, 50_000, 1 << 20)
        );
        let security = linux.security_context.unwrap();
        assert_eq!(security.run_as_user.unwrap().value, 5);
        assert_eq!(security.supplemental_groups, [9]);
        assert!(security.no_new_privs);
        assert_eq!(security.seccomp.unwrap().localhost_ref, "/seccomp/p.json");
    }

    #[test]
    fn non_root_is_verified() {
        let text = "{securityContext: {runAsNonRoot: true}, containers: [{name: c}]}";
        let pod = pod(text);
        let error = |uid, user| container(setup(&pod, uid, user)).map(drop).map_err(|error| error.to_string());
        assert!(error(Some(0), "").unwrap_err().contains("image will run as root"));
        assert!(error(None, "web").unwrap_err().contains("non-numeric user (web)"));
        assert_eq!(error(Some(1000), ""), Ok(()));
    }

    #[test]
    fn host_names() {
        let long = format!("{{hostname: {}-., containers: []}}", "x".repeat(62));
        assert_eq!(hostname(&pod(&long)), "x".repeat(62));
        let named = pod("{subdomain: s, containers: []}");
        assert_eq!(hostname(&named), "p");
        assert_eq!(domain(&named, "cluster.local").as_deref(), Some("s.d.svc.cluster.local"));
    }
}
