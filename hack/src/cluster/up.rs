//! Brings a cluster up, step by step, and waits until people can use it.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::Node as ApiNode;
use kube::api::{DynamicObject, ListParams, Patch, PatchParams};
use kube::{Api, Client, Discovery, ResourceExt};
use serde::{Deserialize, Serialize};

use super::plan::{CLUSTER_DOMAIN, ClusterOptions, DNS_SERVICE_IP, MASTER, Plan};
use super::supervisor::{self, Action};
use super::{FABRIC, cgroups, down, fabric, in_node, init_pid, node_init, pki, units};
use crate::images;
use crate::progress::Progress;

const NODE_LIMIT: Duration = Duration::from_secs(20);
const API_LIMIT: Duration = Duration::from_secs(60);
const READY_LIMIT: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(50);
const LOG_LINES: usize = 15;

const TIMES_FILE: &str = "up-times.json";

const DNS_MANIFEST: &str = include_str!("../../manifests/dns.yaml");

/// How long a cluster took to come up, from the start of `up`, with all programs built.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Times {
    pub nodes_ready: Duration,
    pub dns_answers: Duration,
}

impl Times {
    /// What the cluster's last `up` has recorded, if it came to its end.
    pub fn load(plan: &Plan) -> Option<Self> {
        serde_json::from_slice(&fs::read(plan.data_dir.join(TIMES_FILE)).ok()?).ok()
    }

    fn save(self, plan: &Plan) -> Result<()> {
        let text = serde_json::to_vec(&self).context("cannot encode the times")?;
        fs::write(plan.data_dir.join(TIMES_FILE), text).context("cannot record how long it took")
    }
}

pub fn up(options: &ClusterOptions) -> Result<()> {
    anyhow::ensure!(nix::unistd::geteuid().is_root(), "namespaces and mounts need root: run it with sudo");
    let dir = options.data_dir.join(&options.name);
    if is_up(&dir) {
        let plan = Plan::load(&dir)?;
        println!("cluster {} is up already", plan.name);
        print_hints(&plan);
        return Ok(());
    }
    let progress = Progress::new();
    if down::leftovers(&options.name) {
        progress.step("removing what a dead run of this cluster left");
        down::down(&options.data_dir, &options.name, true)?;
        progress.done("leftovers of a dead run removed");
    }
    let plan = Plan::new(options)?;
    let result = bring_up(&plan, &progress);
    progress.finish();
    if let Err(error) = result {
        return Err(explain(&plan, error));
    }
    print_hints(&plan);
    Ok(())
}

fn bring_up(plan: &Plan, progress: &Progress) -> Result<()> {
    fs::create_dir_all(&plan.data_dir).with_context(|| format!("cannot create {}", plan.data_dir.display()))?;
    plan.save()?;
    progress.step("making keys and certificates");
    pki::create(plan)?;
    progress.step("building images");
    images::build(plan)?;
    progress.done("keys, certificates and images ready");

    progress.step("starting the nodes");
    host_settings(plan)?;
    fabric::create(plan)?;
    for node in plan.nodes() {
        units::prepare(plan, &node)?;
        start_node(plan, &node.name)?;
    }
    start_forwarder(plan)?;
    for node in plan.node_names() {
        wait_for_init(plan, &node)?;
    }
    progress.done(&format!("{} nodes have namespaces, etcd and containerd are starting", plan.nodes().len()));

    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the runtime")?;
    runtime.block_on(wait_until_usable(plan, progress))?.save(plan)
}

async fn wait_until_usable(plan: &Plan, progress: &Progress) -> Result<Times> {
    progress.step("waiting for the API server");
    let client = apimachinery::process::client_from_kubeconfig(&plan.kubeconfig(), "ketch").await?;
    let text = poll(API_LIMIT, "kube-apiserver is not ready", async || {
        let request = http::Request::get("/readyz").body(Vec::new()).map_err(anyhow::Error::from)?;
        Ok(client.request_text(request).await?)
    })
    .await?;
    debug_assert!(!text.is_empty());
    progress.done("API server ready");

    progress.step("installing cluster DNS");
    poll(API_LIMIT, "cluster DNS cannot be installed", async || apply(&client, DNS_MANIFEST).await).await?;

    progress.step("waiting for the nodes");
    let nodes: Api<ApiNode> = Api::all(client.clone());
    poll(READY_LIMIT, "not all nodes become Ready", async || all_ready(&nodes, plan.nodes().len()).await).await?;
    let nodes_ready = progress.elapsed();
    let role = serde_json::json!({"metadata": {"labels": {"node-role.kubernetes.io/control-plane": ""}}});
    nodes.patch(MASTER, &PatchParams::default(), &Patch::Merge(role)).await.context("cannot label the master")?;
    progress.done("all nodes Ready");

    progress.step("waiting for DNS");
    poll(READY_LIMIT, "DNS does not answer", async || ask_dns(plan)).await?;
    progress.done("DNS answers");
    Ok(Times { nodes_ready, dns_answers: progress.elapsed() })
}

/// Repeats `probe` until it succeeds; the last error is kept for the report.
async fn poll<T>(limit: Duration, what: &str, probe: impl AsyncFn() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        match probe().await {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() >= deadline => {
                return Err(error).with_context(|| format!("{what} within {} s", limit.as_secs()));
            }
            Err(_) => tokio::time::sleep(POLL).await,
        }
    }
}

async fn all_ready(nodes: &Api<ApiNode>, expected: usize) -> Result<()> {
    let list = nodes.list(&ListParams::default()).await?;
    let ready = |node: &&ApiNode| {
        let conditions = node.status.as_ref().and_then(|s| s.conditions.as_ref());
        conditions.is_some_and(|all| all.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
    };
    let names: Vec<String> = list.items.iter().filter(ready).map(ResourceExt::name_any).collect();
    if names.len() < expected {
        bail!("{} of {expected} nodes registered, Ready: [{}]", list.items.len(), names.join(", "));
    }
    Ok(())
}

async fn apply(client: &Client, manifest: &str) -> Result<()> {
    let discovery = Discovery::new(client.clone()).run_aggregated().await?;
    for document in serde_saphyr::from_multiple::<serde_json::Value>(manifest).context("the manifest is no YAML")? {
        let object = DynamicObject::deserialize(&document).context("the manifest holds no object")?;
        let types = object.types.clone().context("the manifest's object has no kind")?;
        let gvk = kube::core::GroupVersionKind::try_from(&types).context("the manifest's apiVersion is malformed")?;
        let (resource, _) = discovery.resolve_gvk(&gvk).with_context(|| format!("the server does not know {gvk:?}"))?;
        let api: Api<DynamicObject> = match object.namespace() {
            Some(namespace) => Api::namespaced_with(client.clone(), &namespace, &resource),
            None => Api::all_with(client.clone(), &resource),
        };
        let name = object.name_any();
        api.patch(&name, &PatchParams::apply("ketch").force(), &Patch::Apply(&object))
            .await
            .with_context(|| format!("cannot apply {} {name}", resource.kind))?;
    }
    Ok(())
}

fn ask_dns(plan: &Plan) -> Result<()> {
    let own = std::env::current_exe().context("cannot find the running program")?;
    let argv = [
        own.display().to_string(),
        "dns-query".into(),
        format!("{DNS_SERVICE_IP}:53"),
        format!("kubernetes.default.svc.{CLUSTER_DOMAIN}."),
    ];
    let node = plan.node_names().pop().unwrap_or_else(|| MASTER.into());
    let output = in_node(plan, &node, &argv)?.output().context("cannot ask inside a node")?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// Machine-wide limits that three nodes on one machine need, and the directories that nodes mount over.
fn host_settings(plan: &Plan) -> Result<()> {
    for (name, least) in [("max_user_instances", 8192_u64), ("max_user_watches", 1_048_576)] {
        let file = Path::new("/proc/sys/fs/inotify").join(name);
        let now = fs::read_to_string(&file).ok().and_then(|text| text.trim().parse::<u64>().ok());
        if now.is_some_and(|now| now < least) {
            fs::write(&file, least.to_string()).with_context(|| format!("cannot raise {}", file.display()))?;
        }
    }
    let root = plan.data_dir.parent().context("the data directory has no parent")?;
    let file = host_dirs_file(root);
    let mut made = fs::read_to_string(&file).unwrap_or_default();
    for dir in node_init::PRIVATE_DIRS {
        for ancestor in Path::new(dir).ancestors().collect::<Vec<_>>().into_iter().rev() {
            if !ancestor.exists() {
                fs::create_dir(ancestor).with_context(|| format!("cannot create {}", ancestor.display()))?;
                made.push_str(&format!("{}\n", ancestor.display()));
            }
        }
    }
    fs::write(&file, made).with_context(|| format!("cannot write {}", file.display()))
}

fn host_dirs_file(root: &Path) -> PathBuf {
    root.join("host-directories")
}

/// Removes the empty mount points that `up` made on the host, when the last cluster is gone.
pub fn remove_host_dirs(root: &Path) -> Result<()> {
    let clusters =
        fs::read_dir(root).map(|entries| entries.flatten().filter(|e| e.path().is_dir()).count()).unwrap_or(0);
    let file = host_dirs_file(root);
    let Ok(made) = fs::read_to_string(&file) else { return Ok(()) };
    if clusters > 0 {
        return Ok(());
    }
    for dir in made.lines().rev() {
        // One that something else uses by now stays: rmdir only removes empty directories.
        let _ = fs::remove_dir(dir);
    }
    fs::remove_file(&file).with_context(|| format!("cannot remove {}", file.display()))
}

fn start_node(plan: &Plan, node: &str) -> Result<()> {
    cgroups::create(&plan.name, node)?;
    let dir = plan.node_dir(node);
    let _ = fs::remove_file(dir.join(node_init::READY_FILE));
    let log = fs::File::create(dir.join("log").join("init.log")).context("cannot create a log file")?;
    let own = std::env::current_exe().context("cannot find the running program")?;
    let script = format!(
        "{} exec setsid ip netns exec {} unshare -m -u -i -p -C --fork --kill-child --mount-proc --propagation private {} node-init {} {node}",
        cgroups::join_script(&plan.name, node),
        plan.netns(node),
        quote(&own)?,
        quote(&plan.data_dir)?,
    );
    Command::new("sh")
        .args(["-c", &script])
        .stdin(Stdio::null())
        .stdout(log.try_clone().context("cannot share a log file")?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot start node {node}"))?;
    Ok(())
}

fn quote(path: &Path) -> Result<String> {
    let text = path.to_str().with_context(|| format!("{} is not valid UTF-8", path.display()))?;
    anyhow::ensure!(!text.contains('\''), "{text} contains a quote");
    Ok(format!("'{text}'"))
}

/// Waits until the node's PID 1 has set the node up, and records its pid as the host sees it.
fn wait_for_init(plan: &Plan, node: &str) -> Result<()> {
    let dir = plan.node_dir(node);
    let deadline = Instant::now() + NODE_LIMIT;
    while !dir.join(node_init::READY_FILE).exists() {
        if Instant::now() >= deadline {
            let log = fs::read_to_string(dir.join("log").join("init.log")).unwrap_or_default();
            bail!("node {node} does not start: {}", log.trim());
        }
        std::thread::park_timeout(POLL);
    }
    let pid = cgroups::processes(&plan.name)
        .into_iter()
        .find(|pid| super::is_node_init(*pid, &plan.data_dir, node))
        .with_context(|| format!("node {node} started and ended again"))?;
    fs::write(dir.join("init.pid"), pid.to_string()).context("cannot record the node's pid")
}

fn start_forwarder(plan: &Plan) -> Result<()> {
    cgroups::create(&plan.name, FABRIC)?;
    let log = fs::File::create(plan.data_dir.join("forward.log")).context("cannot create a log file")?;
    let own = std::env::current_exe().context("cannot find the running program")?;
    let listen = SocketAddr::from(([127, 0, 0, 1], plan.api_port));
    let script = format!(
        "{} exec setsid {} forward {} {listen} {}:6443",
        cgroups::join_script(&plan.name, FABRIC),
        quote(&own)?,
        plan.netns(FABRIC),
        plan.master_ip(),
    );
    Command::new("sh")
        .args(["-c", &script])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .context("cannot start the forwarder")?;
    Ok(())
}

/// Whether every node of the cluster in `dir` lives.
pub fn is_up(dir: &Path) -> bool {
    Plan::load(dir).is_ok_and(|plan| plan.node_names().iter().all(|node| matches!(init_pid(&plan, node), Ok(Some(_)))))
}

/// Adds to an error what a person needs next: the unit that is in trouble and the end of its log.
fn explain(plan: &Plan, error: anyhow::Error) -> anyhow::Error {
    let mut report = String::new();
    for node in plan.node_names() {
        let dir = plan.node_dir(&node);
        let Ok(listing) = supervisor::request(&dir, Action::List, None) else { continue };
        for line in listing.lines() {
            let mut words = line.split_whitespace();
            let (Some(unit), Some(state)) = (words.next(), words.next()) else { continue };
            let starts: u32 = line.rsplit(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0);
            if state == "done" || (state == "running" && starts <= 1) {
                continue;
            }
            let log = supervisor::log_file(&dir, unit);
            let text = fs::read_to_string(&log).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            let tail = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n    ");
            report.push_str(&format!(
                "\n  {unit} on {node}: {state}, started {starts} times; {}:\n    {tail}",
                log.display()
            ));
        }
    }
    let advice = format!(
        "\nLook at the logs in {}/nodes/*/log, then run hack/down --name {} and try again.",
        plan.data_dir.display(),
        plan.name
    );
    error.context(format!("cluster {} does not come up{report}{advice}\nCause", plan.name))
}

fn print_hints(plan: &Plan) {
    println!(
        "\nUse the cluster:\n  export KUBECONFIG={}\n  kubectl get nodes -o wide\n  kubectl create deployment web --image={} --port=8080 --replicas=3\n  kubectl get pods -o wide --watch",
        plan.kubeconfig().display(),
        images::DEMO
    );
}
