//! The actions of a plan, carried out: one function per action, each a straight line of calls. No decisions beyond
//! "it failed, and this is what users are told".

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_cri::v1 as cri;
use k8s_openapi::api::core::v1::{Container as Spec, Pod};

use super::config::{self, ContainerSetup, SandboxSetup};
use super::context::NodeContext;
use super::observed::RuntimePod;
use super::plan::{Problem, Unprepared, Verdict};
use super::{env, hooks, log_files, runtime_uid, status};
use crate::cri::{ContainerConfig, Mount};
use crate::events::Level;
use crate::images::Wanted;
use crate::volumes::{self, ImageVolumes, MountContext, VolumeContext, Volumes};

const RETRY: Duration = Duration::from_secs(5);
const RETRY_SANDBOX: Duration = Duration::from_secs(2);
/// How often, and how far apart, a pod's cgroup is tried again that is still busy.
const CGROUP_REMOVALS: usize = 20;
const CGROUP_PAUSE: Duration = Duration::from_millis(50);

/// One pod's immutable view for one action.
#[derive(Clone)]
pub struct Job {
    pub node: Arc<NodeContext>,
    pub pod: Arc<Pod>,
    pub observed: Arc<RuntimePod>,
    pub volumes: Option<Arc<Volumes>>,
}

fn problem(reason: &'static str, message: impl Into<String>, after: Duration) -> Problem {
    Problem { reason, message: message.into(), retry_at: Timestamp::now().checked_add(after).unwrap_or(Timestamp::MAX) }
}

/// The spec of a container of any kind by name.
pub fn spec_of(pod: &Pod, name: &str) -> Option<Spec> {
    let spec = pod.spec.as_ref()?;
    let mut plain = spec.init_containers.iter().flatten().chain(&spec.containers);
    if let Some(found) = plain.find(|spec| spec.name == name) {
        return Some(found.clone());
    }
    spec.ephemeral_containers.iter().flatten().find(|spec| spec.name == name).map(status::ephemeral_as_container)
}

impl Job {
    fn uid(&self) -> &str {
        runtime_uid(&self.pod)
    }

    fn root(&self) -> &Path {
        &self.node.state.root_dir
    }

    fn pod_ips(&self) -> Vec<String> {
        if config::host_network(&self.pod) {
            return self.node.host_ips.clone();
        }
        self.observed.sandbox().map(|sandbox| sandbox.ips.clone()).unwrap_or_default()
    }

    pub fn log_dir(&self) -> PathBuf {
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let metadata = &self.pod.metadata;
        let name = format!("{}_{}_{}", text(&metadata.namespace), text(&metadata.name), self.uid());
        Path::new(&self.node.state.config.pod_logs_dir).join(name)
    }

    fn sandbox_config(&self, attempt: u32, cgroup_parent: String) -> cri::PodSandboxConfig {
        let setup = SandboxSetup {
            dns: self.node.dns.of_pod(&self.pod),
            cluster_domain: self.node.dns.cluster_domain.clone(),
            cgroup_parent,
            log_directory: self.log_dir().display().to_string(),
        };
        config::sandbox(&self.pod, attempt, &setup)
    }

    /// Sets up or refreshes the pod's volumes.
    pub async fn mount_volumes(&self) -> Result<Arc<Volumes>, volumes::VolumeError> {
        let pod_ips = self.pod_ips();
        let downward = self.node.downward(&self.pod, &pod_ips);
        let cx = VolumeContext {
            root_dir: self.root(),
            objects: &self.node.objects,
            tokens: &self.node.tokens,
            certificates: &self.node.certificates,
            csi: &self.node.csi,
            downward: &downward,
        };
        volumes::setup(&self.pod, &cx).await.map(Arc::new)
    }

    pub async fn create_sandbox(&self, attempt: u32) -> Result<Arc<Volumes>, Unprepared> {
        self.allocate_devices().await.map_err(Unprepared::Refused)?;
        let warn = |reason, message: String| {
            self.node.recorder.pod(&self.pod, Level::Warning, reason, message.clone());
            problem(reason, message, RETRY_SANDBOX)
        };
        let parent = self.node.cgroups.ensure_pod(&self.pod).map_err(|error| {
            warn("FailedCreatePodContainer", format!("unable to ensure pod container exists: {}", chain(&error)))
        })?;
        volumes::make_pod_dirs(self.root(), self.uid())
            .map_err(|error| warn("Failed", format!("error making pod data directories: {}", chain(&error))))?;
        let volumes = self
            .mount_volumes()
            .await
            .map_err(|error| warn("FailedMount", format!("Unable to attach or mount volumes: {}", chain(&error))))?;
        self.node.claims.prepare(&self.pod).await.map_err(|error| {
            let why = format!("prepare dynamic resources: {}", chain(&error));
            warn("FailedPrepareDynamicResources", format!("Failed to prepare dynamic resources: {why}"))
        })?;
        let directory = self.log_dir();
        fs::create_dir_all(&directory).map_err(|error| {
            warn(
                "FailedCreatePodSandBox",
                format!("Failed to create pod sandbox: cannot create {}: {error}", directory.display()),
            )
        })?;
        if attempt > 0 {
            let message = "Pod sandbox changed, it will be killed and re-created.";
            self.node.recorder.pod(&self.pod, Level::Normal, "SandboxChanged", message);
        }
        let class = self.pod.spec.as_ref().and_then(|spec| spec.runtime_class_name.as_deref()).unwrap_or_default();
        let handler = match class {
            "" => String::new(),
            class => {
                let found = self.node.objects.runtime_class(class).await;
                let error = |error| format!("Failed to create pod sandbox: {error}");
                found.map_err(|e| warn("FailedCreatePodSandBox", error(e)))?.handler
            }
        };
        self.node
            .state
            .runtime
            .run_sandbox(self.sandbox_config(attempt, parent), &handler)
            .await
            .map_err(|error| warn("FailedCreatePodSandBox", format!("Failed to create pod sandbox: {error}")))?;
        Ok(volumes)
    }

    /// A pod that cannot have the devices that it asks for does not run here.
    async fn allocate_devices(&self) -> Result<(), Verdict> {
        let allocated = self.node.devices.allocate(&self.pod).await;
        allocated.map_err(|error| {
            let why = format!("Allocate failed due to {}, which is unexpected", chain(&error));
            let (reason, message) = ("UnexpectedAdmissionError", format!("Pod was rejected: {why}"));
            self.node.recorder.pod(&self.pod, Level::Warning, reason, message.clone());
            Verdict { reason, message, ..Verdict::default() }
        })
    }

    /// Image, environment, mounts, create, start, postStart hook.
    pub async fn start(&self, name: &str, restart_count: i32) -> Result<(), Problem> {
        let Some(spec) = spec_of(&self.pod, name) else {
            return Err(problem("CreateContainerConfigError", format!("container {name} is not in the pod"), RETRY));
        };
        let Some(sandbox) = self.observed.sandbox() else {
            return Err(problem("CreateContainerError", "the pod has no sandbox", RETRY_SANDBOX));
        };
        let parent =
            self.node.cgroups.ensure_pod(&self.pod).map_err(|e| problem("CreateContainerError", chain(&e), RETRY))?;
        let sandbox_config = self.sandbox_config(sandbox.attempt, parent);
        let volumes = self.image_volumes(&spec, &sandbox_config).await?;
        let wanted = Wanted {
            image: spec.image.as_deref().unwrap_or_default(),
            policy: spec.image_pull_policy.as_deref(),
            container: Some(name),
        };
        let image = self.node.images.ensure(&self.pod, &wanted, &sandbox_config).await?;
        let container_config = self
            .container_config(&spec, restart_count, image, &volumes)
            .await
            .map_err(|message| self.start_failed(&spec, "CreateContainerConfigError", message))?;
        let runtime = &self.node.state.runtime;
        let log_path = container_config.log_path.clone();
        let id = runtime
            .create_container(&sandbox.id, container_config, sandbox_config)
            .await
            .map_err(|error| self.start_failed(&spec, "CreateContainerError", error.description()))?;
        self.node.owners.write().insert(id.clone(), self.uid().to_owned());
        self.node.recorder.container(&self.pod, name, Level::Normal, "Created", "Container created");
        runtime
            .start_container(&id)
            .await
            .map_err(|error| self.start_failed(&spec, "RunContainerError", error.description()))?;
        self.node.recorder.container(&self.pod, name, Level::Normal, "Started", "Container started");
        self.link_log(&spec, &id, &log_path);
        self.post_start(&spec, &id).await
    }

    /// Pulls the images that the container mounts as volumes.
    async fn image_volumes(&self, spec: &Spec, sandbox: &cri::PodSandboxConfig) -> Result<ImageVolumes, Problem> {
        let mut pulled = ImageVolumes::new();
        let volumes = self.pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
        for (name, source) in volumes.filter_map(|volume| Some((&volume.name, volume.image.as_ref()?))) {
            if !spec.volume_mounts.iter().flatten().any(|mount| mount.name == *name) {
                continue;
            }
            let reference = source.reference.clone().unwrap_or_default();
            let wanted = Wanted { image: &reference, policy: source.pull_policy.as_deref(), container: None };
            let image = self.node.images.ensure(&self.pod, &wanted, sandbox).await?.id;
            let image = cri::ImageSpec { image, user_specified_image: reference, ..Default::default() };
            pulled.insert(name.clone(), image);
        }
        Ok(pulled)
    }

    async fn post_start(&self, spec: &Spec, id: &str) -> Result<(), Problem> {
        let Some(hook) = spec.lifecycle.as_ref().and_then(|lifecycle| lifecycle.post_start.as_ref()) else {
            return Ok(());
        };
        let Err(error) = hooks::run(&self.node, spec, id, self.pod_ips().first().map(String::as_str), hook).await
        else {
            return Ok(());
        };
        self.node.recorder.container(
            &self.pod,
            &spec.name,
            Level::Warning,
            "FailedPostStartHook",
            "PostStartHook failed",
        );
        tracing::warn!(container = spec.name, %error, "postStart hook failed");
        self.node.recorder.container(&self.pod, &spec.name, Level::Normal, "Killing", "FailedPostStartHook");
        let grace = self.pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds).unwrap_or(30);
        if let Err(error) = self.node.state.runtime.stop_container(id, grace).await {
            tracing::warn!(container = spec.name, %error, "cannot stop a container whose postStart hook failed");
        }
        Err(problem("PostStartHookError", error.to_string(), Duration::ZERO))
    }

    fn start_failed(&self, spec: &Spec, reason: &'static str, message: String) -> Problem {
        self.node.recorder.container(&self.pod, &spec.name, Level::Warning, "Failed", format!("Error: {message}"));
        // After a container that could not be run, the crash back-off rules.
        problem(reason, message, if reason == "RunContainerError" { Duration::ZERO } else { RETRY })
    }

    /// Errors are for users: the message of the container's waiting state.
    async fn container_config(
        &self,
        spec: &Spec,
        restart_count: i32,
        image: cri::Image,
        images: &ImageVolumes,
    ) -> Result<ContainerConfig, String> {
        let pod_ips = self.pod_ips();
        self.node.services.synced().await;
        let downward = self.node.downward(&self.pod, &pod_ips);
        let cx = env::EnvContext { objects: &self.node.objects, services: &self.node.services, downward: &downward };
        let environment = env::environment(&self.pod, spec, &cx).await.map_err(|error| chain(&error))?;
        let volumes = match &self.volumes {
            Some(volumes) => volumes.clone(),
            None => self.mount_volumes().await.map_err(|error| chain(&error))?,
        };
        let cx = MountContext { pod: &self.pod, volumes: &volumes, images, env: &environment, root_dir: self.root() };
        let mut devices = self.node.devices.start(&self.pod, spec).await.map_err(|error| chain(&error))?;
        devices.cdi_devices.extend(self.node.claims.cdi_devices(&self.pod, spec).map_err(|error| chain(&error))?);
        let mut mounts = std::mem::take(&mut devices.mounts);
        mounts.extend(volumes::container_mounts(spec, &cx).map_err(|error| chain(&error))?);
        mounts.extend(self.hosts_mount(spec, &pod_ips)?);
        mounts.push(self.termination_mount(spec, restart_count)?);
        let ephemeral = self.pod.spec.iter().flat_map(|spec| spec.ephemeral_containers.iter().flatten());
        let target = ephemeral
            .filter(|ephemeral| ephemeral.name == spec.name)
            .find_map(|ephemeral| ephemeral.target_container_name.as_ref())
            .and_then(|name| self.observed.current(name))
            .map(|container| container.id.clone());
        let setup = ContainerSetup {
            pod: &self.pod,
            spec,
            restart_count,
            image_id: image.id,
            image_uid: image.uid.map(|uid| uid.value),
            image_user: image.username,
            env: environment,
            mounts,
            devices,
            target,
            node_memory: self.node.memory,
            quota_period: self.quota_period(),
            seccomp_root: &self.root().join("seccomp"),
        };
        config::container(setup).map_err(|error| error.to_string())
    }

    /// `/etc/hosts` with the pod's own names, unless the container brings its own.
    fn hosts_mount(&self, spec: &Spec, pod_ips: &[String]) -> Result<Option<Mount>, String> {
        let own = spec.volume_mounts.iter().flatten().any(|mount| mount.mount_path == "/etc/hosts");
        if own || pod_ips.is_empty() {
            return Ok(None);
        }
        let path = volumes::pod_dir(self.root(), self.uid()).join("etc-hosts");
        let text = hosts_file(&self.pod, pod_ips, &self.node.dns.cluster_domain);
        if fs::read_to_string(&path).ok().as_deref() != Some(&text) {
            fs::write(&path, text).map_err(|error| format!("cannot write {}: {error}", path.display()))?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o644))
                .map_err(|error| format!("cannot set the mode of {}: {error}", path.display()))?;
        }
        let readonly = spec.security_context.as_ref().and_then(|own| own.read_only_root_filesystem).unwrap_or(false);
        Ok(Some(Mount {
            container_path: "/etc/hosts".to_owned(),
            host_path: path.display().to_string(),
            readonly,
            ..Default::default()
        }))
    }

    /// The file for the termination message; a new one for every start.
    fn termination_mount(&self, spec: &Spec, restart_count: i32) -> Result<Mount, String> {
        let directory = volumes::pod_dir(self.root(), self.uid()).join("containers").join(&spec.name);
        fs::create_dir_all(&directory).map_err(|error| format!("cannot create {}: {error}", directory.display()))?;
        let path = directory.join(format!("{restart_count}-{:08x}", rand::random::<u32>()));
        fs::write(&path, "").map_err(|error| format!("cannot write {}: {error}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666))
            .map_err(|error| format!("cannot set the mode of {}: {error}", path.display()))?;
        Ok(Mount {
            container_path: config::termination_path(spec).to_owned(),
            host_path: path.display().to_string(),
            ..Default::default()
        })
    }

    /// `/var/log/containers/<pod>_<namespace>_<container>-<id>.log`, which log collectors read.
    fn link_log(&self, spec: &Spec, id: &str, log_path: &str) {
        let metadata = &self.pod.metadata;
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let name = format!("{}_{}_{}-{id}.log", text(&metadata.name), text(&metadata.namespace), spec.name);
        let directory = Path::new(log_files::LINKS);
        let link = directory.join(name);
        if let Err(error) = fs::create_dir_all(directory).and_then(|()| symlink(self.log_dir().join(log_path), &link)) {
            tracing::debug!(link = %link.display(), %error, "cannot link the container's log");
        }
    }

    /// Runs the preStop hook within the grace period, then stops the container.
    pub async fn kill(&self, id: &str, name: &str, grace: i64, message: &str) {
        self.node.recorder.container(&self.pod, name, Level::Normal, "Killing", message);
        let begun = tokio::time::Instant::now();
        let spec = spec_of(&self.pod, name);
        let hook = spec.as_ref().and_then(|spec| Some((spec, spec.lifecycle.as_ref()?.pre_stop.as_ref()?)));
        if let Some((spec, hook)) = hook {
            let limit = Duration::from_secs(u64::try_from(grace).unwrap_or(0));
            let ips = self.pod_ips();
            let run = hooks::run(&self.node, spec, id, ips.first().map(String::as_str), hook);
            match tokio::time::timeout(limit, run).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::warn!(container = name, %error, "preStop hook failed");
                    self.node.recorder.container(
                        &self.pod,
                        name,
                        Level::Warning,
                        "FailedPreStopHook",
                        "PreStopHook failed",
                    );
                }
                Err(_) => tracing::warn!(container = name, grace, "preStop hook took the whole grace period"),
            }
        }
        let spent = i64::try_from(begun.elapsed().as_secs()).unwrap_or(i64::MAX);
        // After a hook the process still gets a moment to end by itself.
        let left = if hook.is_some() { (grace - spent).max(2) } else { grace };
        match self.node.state.runtime.stop_container(id, left).await {
            Ok(()) => {}
            Err(error) if error.is_not_found() => {}
            Err(error) => {
                tracing::warn!(container = name, %error, "cannot stop container");
                self.node.recorder.pod(
                    &self.pod,
                    Level::Warning,
                    "FailedKillPod",
                    format!("error killing pod: {error}"),
                );
            }
        }
    }

    fn quota_period(&self) -> i64 {
        let config = &self.node.state.config;
        if config.cpu_cfs_quota {
            i64::try_from(config.cpu_cfs_quota_period.0.as_micros()).unwrap_or(100_000)
        } else {
            0
        }
    }

    /// Gives a running container the resources of its spec. A child's limit must never exceed its parent's, so the
    /// pod's cgroup grows before it and shrinks after it.
    pub async fn resize(&self, id: &str, name: &str) -> Result<(), String> {
        let spec = spec_of(&self.pod, name).ok_or_else(|| format!("container {name} is not in the pod"))?;
        if let Err(error) = self.node.cgroups.ensure_pod(&self.pod) {
            tracing::debug!(error = chain(&error), "the pod's cgroup cannot shrink yet");
        }
        let mut resources = config::resources(&self.pod, &spec, self.node.memory, self.quota_period());
        config::lift_absent_limits(&mut resources, self.quota_period());
        self.node.state.runtime.update_container_resources(id, resources).await.map_err(|error| error.description())?;
        self.node.cgroups.ensure_pod(&self.pod).map(drop).map_err(|error| chain(&error))
    }

    pub async fn remove_container(&self, id: &str) {
        let container = self.observed.by_id(id);
        match self.node.state.runtime.remove_container(id).await {
            Ok(()) => {}
            Err(error) if error.is_not_found() => {}
            Err(error) => {
                tracing::warn!(container = id, %error, "cannot remove container");
                return;
            }
        }
        self.node.owners.write().remove(id);
        if let Some(container) = container {
            log_files::remove(&container.log_path);
            if let Some(path) = &container.termination_message_host_path {
                let _gone = fs::remove_file(path);
            }
            let metadata = &self.pod.metadata;
            let text = |text: &Option<String>| text.clone().unwrap_or_default();
            let name = format!("{}_{}_{}-{id}.log", text(&metadata.name), text(&metadata.namespace), container.name);
            let _gone = fs::remove_file(Path::new(log_files::LINKS).join(name));
        }
    }

    pub async fn stop_sandbox(&self, id: &str) {
        if let Err(error) = self.node.state.runtime.stop_sandbox(id).await
            && !error.is_not_found()
        {
            tracing::warn!(sandbox = id, %error, "cannot stop sandbox");
        }
    }

    pub async fn remove_sandbox(&self, id: &str) {
        match self.node.state.runtime.remove_sandbox(id).await {
            Ok(()) => drop(self.node.owners.write().remove(id)),
            Err(error) if error.is_not_found() => drop(self.node.owners.write().remove(id)),
            Err(error) => tracing::warn!(sandbox = id, %error, "cannot remove sandbox"),
        }
    }

    /// Gives claims and devices back, unmounts the volumes and removes the cgroup. True when nothing is left.
    pub async fn release(&self) -> bool {
        let claims = self.node.claims.release(self.uid()).await;
        if let Err(error) = &claims {
            tracing::warn!(pod = self.uid(), error = chain(error), "cannot give resource claims back");
        }
        let volumes = volumes::release(self.root(), self.uid(), &self.node.csi).await;
        // The kernel lets go of the last processes a little after they have ended.
        let mut cgroup = self.node.cgroups.remove_pod(self.uid());
        for _ in 0..CGROUP_REMOVALS {
            if cgroup.is_ok() {
                break;
            }
            tokio::time::sleep(CGROUP_PAUSE).await;
            cgroup = self.node.cgroups.remove_pod(self.uid());
        }
        if let Err(error) = &volumes {
            tracing::warn!(pod = self.uid(), error = chain(error), "cannot release volumes");
        }
        if let Err(error) = &cgroup {
            tracing::warn!(pod = self.uid(), error = chain(error), "cannot remove cgroup");
        }
        let done = claims.is_ok() && volumes.is_ok() && cgroup.is_ok();
        if done {
            self.node.devices.release(self.uid());
        }
        done
    }

    /// Removes what is left on disk.
    pub fn forget(&self) {
        if let Err(error) = volumes::remove_pod_dir(self.root(), self.uid()) {
            tracing::warn!(pod = self.uid(), error = chain(&error), "cannot remove the pod's directory");
        }
        let logs = self.log_dir();
        if let Err(error) = fs::remove_dir_all(&logs)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(path = %logs.display(), %error, "cannot remove the pod's logs");
        }
        let uid = self.pod.metadata.uid.as_deref().unwrap_or_default();
        self.node.tokens.forget(uid);
        self.node.certificates.forget(uid);
    }
}

fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    apimachinery::process::error_chain(error)
}

fn hosts_file(pod: &Pod, pod_ips: &[String], cluster_domain: &str) -> String {
    let spec = pod.spec.as_ref();
    let mut text = if config::host_network(pod) {
        let node = fs::read_to_string("/etc/hosts").unwrap_or_default();
        format!("# Kubernetes-managed hosts file (host network).\n{node}")
    } else {
        let hostname = config::hostname(pod);
        let names = match config::domain(pod, cluster_domain) {
            Some(domain) => format!("{hostname}.{domain}\t{hostname}"),
            None => hostname,
        };
        let own: String = pod_ips.iter().map(|ip| format!("{ip}\t{names}\n")).collect();
        format!(
            "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n\
             fe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n{own}"
        )
    };
    let mut aliases: Vec<(&str, Vec<String>)> = Vec::new();
    for alias in spec.iter().flat_map(|spec| spec.host_aliases.iter().flatten()) {
        aliases.push((alias.ip.as_str(), alias.hostnames.clone().unwrap_or_default()));
    }
    if !aliases.is_empty() {
        text.push_str("\n# Entries added by HostAliases.\n");
        for (ip, names) in aliases {
            text.push_str(&format!("{ip}\t{}\n", names.join("\t")));
        }
    }
    text
}

/// Known labels of a pod that only the runtime still knows, as a pod that has been removed everywhere.
pub fn orphan(labels: &HashMap<String, String>) -> Option<Pod> {
    use super::observed::keys;
    let label = |key: &str| labels.get(key).cloned();
    let mut pod = Pod::default();
    pod.metadata.uid = Some(label(keys::POD_UID)?);
    pod.metadata.name = label(keys::POD_NAME);
    pod.metadata.namespace = label(keys::POD_NAMESPACE);
    pod.spec = Some(k8s_openapi::api::core::v1::PodSpec::default());
    Some(pod)
}
