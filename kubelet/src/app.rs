//! Puts the kubelet together: flags, configuration, connections, then the tasks that run until the process ends.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use apimachinery::process::{
    CancellationToken, ClientError, HealthChecks, KubeconfigArgs, LogArgs, StatusServer, StatusServerError,
};
use clap::Parser;
use parking_lot::RwLock;
use prometheus_client::registry::Registry;
use tokio::sync::mpsc;

use crate::certificates::{self, CertificateError, Live, Store};
use crate::cgroups::{CgroupError, Cgroups};
use crate::config::{ConfigError, KubeletConfiguration};
use crate::cri::{self, Runtime};
use crate::devices::{self, Devices};
use crate::dns::NodeDns;
use crate::dra::{self, Claims};
use crate::events::Recorder;
use crate::eviction::{self, Evictions, ThresholdError};
use crate::grpc::ServeError;
use crate::housekeeping;
use crate::images::Images;
use crate::node::machine::Machine;
use crate::node::readiness::{Obstacle, Readiness};
use crate::node::{Identity, NodeAgent, Sources, status};
use crate::objects::Objects;
use crate::plugins::{self, Registrar};
use crate::pod::context::NodeContext;
use crate::pod::manager::Manager;
use crate::pod::services::ServiceEnv;
use crate::pod_resources;
use crate::server::{self, ServerError};
use crate::shutdown::{Shutdown, SystemBus};
use crate::state::NodeState;
use crate::volumes::csi::{Csi, NodeInfo, Registration};
use crate::volumes::{PodCertificates, Tokens};
use crate::watches::Watches;

/// The node agent: runs the pods that are bound to this machine and reports on them.
#[derive(Parser, Clone, Debug)]
#[command(name = "kubelet", version = apimachinery::process::KUBERNETES_VERSION)]
pub struct Options {
    /// The KubeletConfiguration file; without it everything has upstream's default.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    pub kubeconfig: KubeconfigArgs,
    /// A kubeconfig that is used once, to get the client certificate for the kubeconfig given by --kubeconfig, which is
    /// then written.
    #[arg(long, value_name = "FILE", requires = "kubeconfig")]
    pub bootstrap_kubeconfig: Option<PathBuf>,
    /// The node's name, instead of the machine's host name.
    #[arg(long, value_name = "NAME", default_value = "")]
    pub hostname_override: String,
    /// The node's address, or two of different families, comma-separated.
    #[arg(long, value_name = "IP", value_delimiter = ',')]
    pub node_ip: Vec<IpAddr>,
    /// Where volumes and other data of pods are kept.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/kubelet")]
    pub root_dir: PathBuf,
    /// Where a self-signed serving certificate is kept when the configuration names none.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/kubelet/pki")]
    pub cert_dir: PathBuf,
    /// Labels for a new node, `key=value,…`.
    #[arg(long, value_name = "LABELS", value_delimiter = ',')]
    pub node_labels: Vec<String>,
    /// Whether pods may be scheduled to a new node.
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    pub register_schedulable: bool,
    /// The container runtime's socket, over what the configuration says.
    #[arg(long, value_name = "ADDRESS")]
    pub container_runtime_endpoint: Option<String>,
    #[command(flatten)]
    pub logs: LogArgs,
}

#[derive(Debug, thiserror::Error)]
pub enum AppError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("the eviction thresholds of the configuration cannot be used")]
    Thresholds(#[from] ThresholdError),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Certificates(#[from] CertificateError),
    #[error("the stored client certificate cannot be used")]
    ClientCertificate(#[source] rustls::Error),
    #[error("cannot use the cgroups of this machine")]
    Cgroups(#[from] CgroupError),
    #[error(transparent)]
    Health(#[from] StatusServerError),
    #[error(transparent)]
    Plugins(#[from] ServeError),
    #[error("cannot start the server for the API server's requests")]
    Server(#[from] ServerError),
    #[error("healthzBindAddress {0:?} is not an IP address")]
    HealthzAddress(String),
    #[error("cannot learn the host name")]
    Hostname(#[source] std::io::Error),
    #[error("cannot find this machine's own address; give --node-ip")]
    NodeAddress(#[source] std::io::Error),
    #[error("cannot create {path}")]
    RootDir { path: PathBuf, source: std::io::Error },
    #[error("--node-labels {0:?} is not key=value")]
    Label(String),
}

pub async fn run(options: Options, shutdown: CancellationToken) -> Result<(), AppError> {
    let config = Arc::new(load_config(&options)?);
    let thresholds = eviction::configured(&config)?;
    std::fs::create_dir_all(options.root_dir.join("pods"))
        .map_err(|source| AppError::RootDir { path: options.root_dir.clone(), source })?;
    let machine = Machine::read(&options.root_dir);
    let cgroups = prepare_cgroups(&config, &machine)?;
    let runtime = Runtime::new(config.runtime_socket());
    let runtime_version = wait_for_runtime(&runtime, &shutdown).await;
    let identity = identity(&options, runtime_version)?;
    let client = api_client(&options, &config, &identity).await?;

    let state = Arc::new(NodeState::new(
        identity.name.clone(),
        config.clone(),
        client.clone(),
        runtime.clone(),
        options.root_dir.clone(),
    ));
    let recorder = Recorder::start(client.clone(), &identity.name);
    let context = Arc::new(node_context(&state, &identity, &machine, cgroups, &recorder));
    serve_health(&config, shutdown.clone()).await?;
    if config.enable_server {
        let certificate = serving_certificate(&options, &config, &identity, &client);
        server::start(state.clone(), context.csi.clone(), &options.cert_dir, certificate, shutdown.clone()).await?;
    }

    let services = context.services.clone();
    let (events, runtime_events) = mpsc::channel(256);
    tokio::spawn({
        let client = client.clone();
        async move { services.follow(client).await }
    });
    tokio::spawn(cri::follow_events(runtime.channel(), events));
    let (queue, evictions) = mpsc::channel(16);
    let shutdowns = Shutdown {
        state: state.clone(),
        readiness: context.readiness.clone(),
        recorder: recorder.clone(),
        evictions: queue.clone(),
    };
    tokio::spawn(shutdowns.run(SystemBus));
    tokio::spawn(Evictions::new(context.clone(), thresholds, queue).run());
    let readiness = context.readiness.clone();
    readiness.set(Obstacle::Storage, "CSINode is not yet initialized");
    let sources = Sources {
        obstacles: readiness.changes(),
        volumes_in_use: context.csi.in_use.clone(),
        devices: context.devices.offered(),
    };
    tokio::spawn(NodeAgent::new(state.clone(), sources, identity, machine, recorder).run(context.node_uid.clone()));
    devices::serve(&context.devices, shutdown.clone())?;
    pod_resources::serve(&state, &context, shutdown.clone())?;
    start_plugins(&state, &context, &readiness);
    tokio::spawn(housekeeping::run(context.clone()));
    tokio::select! {
        () = Manager::new(context).run(client, runtime_events, evictions) => {}
        () = shutdown.cancelled() => {}
    }
    Ok(())
}

/// The client of the API server; its certificate is got from the cluster and renewed if that is configured.
async fn api_client(
    options: &Options,
    config: &KubeletConfiguration,
    identity: &Identity,
) -> Result<kube::Client, AppError> {
    let store = Store::new(&options.cert_dir, "kubelet-client");
    let wanted = certificates::client_wanted(&identity.name);
    if let (Some(bootstrap), Some(kubeconfig)) = (&options.bootstrap_kubeconfig, &options.kubeconfig.kubeconfig) {
        certificates::bootstrap(bootstrap, kubeconfig, &store, &wanted, &user_agent()).await?;
    }
    let current = store.current().map_err(CertificateError::from)?.filter(|_| config.rotate_certificates);
    let (Some(current), Some(kubeconfig)) = (current, &options.kubeconfig.kubeconfig) else {
        return Ok(options.kubeconfig.client(&user_agent()).await?);
    };
    let live = Arc::new(Live::default());
    live.show(&current).map_err(AppError::ClientCertificate)?;
    let client = certificates::client(kubeconfig, &user_agent(), live.clone()).await?;
    let name = identity.name.clone();
    tokio::spawn(certificates::rotate(client.clone(), store, live, move || Some(certificates::client_wanted(&name))));
    Ok(client)
}

/// The server's certificate, if the cluster is to issue it.
fn serving_certificate(
    options: &Options,
    config: &KubeletConfiguration,
    identity: &Identity,
    client: &kube::Client,
) -> Option<Arc<Live>> {
    if !config.server_tls_bootstrap || !config.tls_cert_file.is_empty() {
        return None;
    }
    let live = Arc::new(Live::default());
    let store = Store::new(&options.cert_dir, "kubelet-server");
    let (name, hostname, ips) = (identity.name.clone(), identity.hostname.clone(), identity.host_ips.clone());
    let wanted = move || {
        let names = std::iter::once(hostname.clone()).chain(ips.iter().cloned()).collect();
        Some(certificates::server_wanted(&name, names))
    };
    tokio::spawn(certificates::rotate(client.clone(), store, live.clone(), wanted));
    Some(live)
}

fn load_config(options: &Options) -> Result<KubeletConfiguration, ConfigError> {
    let mut config = match &options.config {
        Some(path) => KubeletConfiguration::load(path)?,
        None => KubeletConfiguration::default(),
    };
    if let Some(endpoint) = &options.container_runtime_endpoint {
        config.container_runtime_endpoint.clone_from(endpoint);
    }
    config.validate()?;
    Ok(config)
}

fn prepare_cgroups(config: &KubeletConfiguration, machine: &Machine) -> Result<Cgroups, CgroupError> {
    let period = if config.cpu_cfs_quota {
        i64::try_from(config.cpu_cfs_quota_period.0.as_micros()).unwrap_or(100_000)
    } else {
        0
    };
    let mount = Path::new("/sys/fs/cgroup");
    let cgroups = Cgroups::detect(mount, &config.cgroup_root, config.fail_cgroup_v1, period)?;
    cgroups.ensure_tree(status::allocatable(machine, config).0)?;
    Ok(cgroups)
}

/// The runtime may come up after the kubelet; its version is the sign that it has.
async fn wait_for_runtime(runtime: &Runtime, shutdown: &CancellationToken) -> String {
    let mut told = false;
    loop {
        match runtime.version().await {
            Ok(version) => return format!("{}://{}", version.runtime_name, version.runtime_version),
            Err(error) if !told => {
                told = true;
                tracing::warn!(%error, "waiting for the container runtime");
            }
            Err(_) => {}
        }
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(200)) => {}
            () = shutdown.cancelled() => return String::new(),
        }
    }
}

fn user_agent() -> String {
    format!("kubelet/{} (linux/{})", apimachinery::process::KUBERNETES_VERSION, crate::node::machine::architecture())
}

fn identity(options: &Options, runtime_version: String) -> Result<Identity, AppError> {
    let machine_name = nix::unistd::gethostname().map_err(|errno| AppError::Hostname(errno.into()))?;
    let hostname = match options.hostname_override.trim() {
        "" => machine_name.to_string_lossy().trim().to_lowercase(),
        name => name.to_lowercase(),
    };
    let given: Vec<String> =
        options.node_ip.iter().filter(|ip| !ip.is_unspecified()).map(ToString::to_string).collect();
    let host_ips = if given.is_empty() { vec![own_address().map_err(AppError::NodeAddress)?] } else { given.clone() };
    let mut labels = BTreeMap::new();
    for label in options.node_labels.iter().filter(|label| !label.is_empty()) {
        let (key, value) = label.split_once('=').ok_or_else(|| AppError::Label(label.clone()))?;
        labels.insert(key.to_owned(), value.to_owned());
    }
    Ok(Identity {
        name: hostname.clone(),
        hostname,
        host_ips,
        provided_ip: (!given.is_empty()).then(|| given.join(",")),
        labels,
        schedulable: options.register_schedulable,
        runtime_version,
    })
}

/// The address from which packets to elsewhere would leave; nothing is sent.
fn own_address() -> std::io::Result<String> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    // TEST-NET-1: a destination that only the default route covers.
    socket.connect("192.0.2.1:9")?;
    Ok(socket.local_addr()?.ip().to_string())
}

fn node_context(
    state: &Arc<NodeState>,
    identity: &Identity,
    machine: &Machine,
    cgroups: Cgroups,
    recorder: &Recorder,
) -> NodeContext {
    let config = &state.config;
    let objects = Objects::new(state.client.clone());
    let parallel = match (config.serialize_image_pulls, config.max_parallel_image_pulls) {
        (true, _) => 1,
        (false, limit) => limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX),
    };
    let (cpu_milli, memory) = status::allocatable(machine, config);
    let node_uid = tokio::sync::watch::Sender::new(None);
    let (client, name) = (state.client.clone(), state.node_name.clone());
    NodeContext {
        state: state.clone(),
        images: Images::new(state.runtime.clone(), objects.clone(), recorder.clone(), parallel),
        services: Arc::new(ServiceEnv::default()),
        tokens: Tokens::new(client.clone()),
        certificates: PodCertificates::new(client.clone(), recorder.clone(), name, node_uid.subscribe()),
        claims: Arc::new(Claims::open(client.clone(), state.root_dir.join("dra_manager_state"), Arc::default())),
        readiness: Arc::default(),
        devices: Devices::open(state.root_dir.join("device-plugins")),
        csi: Arc::new(Csi::new(state.root_dir.clone(), &state.node_name, objects.clone(), Arc::default())),
        watches: Watches::new(client),
        objects,
        recorder: recorder.clone(),
        cgroups,
        dns: NodeDns {
            cluster_servers: config.cluster_dns.clone(),
            cluster_domain: config.cluster_domain.clone(),
            resolv_conf: config.resolv_conf.clone(),
        },
        host_ips: identity.host_ips.clone(),
        cpu_milli,
        memory,
        machine_memory: machine.memory,
        node_uid,
        owners: RwLock::default(),
    }
}

/// Plugins may register as soon as there is a node whose objects can show them.
fn start_plugins(state: &Arc<NodeState>, context: &Arc<NodeContext>, readiness: &Arc<Readiness>) {
    let node_info = NodeInfo::new(state.client.clone(), &state.node_name);
    let csi = Registration { drivers: context.csi.drivers.clone(), node_info };
    let devices = devices::Registration::new(context.devices.clone());
    let dra = dra::Registration {
        drivers: context.claims.drivers.clone(),
        client: state.client.clone(),
        node: state.node_name.clone(),
    };
    let (state, readiness, mut node_uid) = (state.clone(), readiness.clone(), context.node_uid.subscribe());
    tokio::spawn(async move {
        if node_uid.wait_for(Option::is_some).await.is_err() {
            return;
        }
        initialize_storage(&csi.node_info, &readiness).await;
        tokio::spawn(dra::wipe_all(state.client.clone(), state.node_name.clone()));
        let handlers = plugins::Handlers::from([
            ("CSIPlugin", Arc::new(csi) as Arc<dyn plugins::Handler>),
            ("DevicePlugin", Arc::new(devices)),
            ("DRAPlugin", Arc::new(dra)),
        ]);
        Registrar::new(plugins::registry(&state.root_dir), handlers).run().await;
    });
}

/// The node is not ready before the cluster can see its drivers of volumes.
async fn initialize_storage(node_info: &NodeInfo, readiness: &Readiness) {
    let mut delay = Duration::from_millis(100);
    while let Err(error) = node_info.initialize().await {
        let error = apimachinery::process::error_chain(&error);
        tracing::warn!(error, "cannot initialize the node's CSINode");
        readiness.set(Obstacle::Storage, &format!("failed to initialize CSINode: {error}"));
        tokio::time::sleep(delay).await;
        delay = (delay * 2).min(Duration::from_secs(7));
    }
    readiness.clear(Obstacle::Storage);
}

async fn serve_health(config: &KubeletConfiguration, shutdown: CancellationToken) -> Result<(), AppError> {
    if config.healthz_port == 0 {
        return Ok(());
    }
    let ip: IpAddr = config
        .healthz_bind_address
        .parse()
        .map_err(|_| AppError::HealthzAddress(config.healthz_bind_address.clone()))?;
    let server = StatusServer {
        address: SocketAddr::new(ip, config.healthz_port),
        checks: HealthChecks::default(),
        metrics: Arc::new(Registry::default()),
        tls: None,
    };
    Ok(server.start(shutdown).await?)
}
