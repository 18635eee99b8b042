//! The proxy's life: follow the API, and whenever something changed and the last change of the kernel is long enough
//! ago, plan what changed, and install the difference.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use apimachinery::process::{CancellationToken, ClientError, KubeconfigArgs, error_chain};
use tokio::time::Instant;

use crate::config::{Config, ConfigError, Conntrack, Mode, Options};
use crate::conntrack::{Expectations, forget, may_be_stale};
use crate::health::{Health, HealthChecks, ServiceChecks};
use crate::host::{self, HostError};
use crate::http_server::{ListenError, serve};
use crate::informers::{Dirty, Informers};
use crate::iptables;
use crate::metrics::Metrics;
use crate::model::{Family, Model, ServiceName};
use crate::netlink::{NetlinkError, Socket};
use crate::nftables::{self, BackendError, KernelError, NetlinkKernel, Settings};
use crate::plan::{Changed, Plans, ServicePlan, plan};

#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    #[error("the configuration cannot be used")]
    Config(#[from] ConfigError),
    #[error("cannot use the Kubernetes API")]
    Client(#[from] ClientError),
    #[error("cannot remove the nftables rules")]
    CleanupNftables(#[source] KernelError),
    #[error("cannot remove the iptables rules")]
    CleanupIptables(#[source] HostError),
    #[error("cannot serve health checks")]
    Healthz(#[source] ListenError),
    #[error("cannot serve metrics")]
    Metrics(#[source] ListenError),
    #[error("cannot use nftables")]
    Nftables(#[source] KernelError),
}

#[derive(Debug, thiserror::Error)]
enum SyncError {
    #[error("nftables")]
    Nftables(#[from] BackendError),
    #[error("iptables")]
    Iptables(#[source] HostError),
    #[error("the node")]
    Host(#[source] HostError),
}

/// Changes that come together are installed together.
const SETTLE: Duration = Duration::from_millis(10);

/// Runs until the token is cancelled. The rules stay when it ends.
pub async fn run(options: Options, shutdown: CancellationToken) -> Result<(), ProxyError> {
    tokio::select! {
        () = shutdown.cancelled() => Ok(()),
        result = serve_all(options) => result,
    }
}

async fn serve_all(options: Options) -> Result<(), ProxyError> {
    if options.cleanup {
        remove_nftables().map_err(ProxyError::CleanupNftables)?;
        return remove_iptables().await.map_err(ProxyError::CleanupIptables);
    }
    let config = options.resolve()?;
    tune_kernel(&config);
    if options.init_only {
        return Ok(());
    }
    let api = KubeconfigArgs { kubeconfig: config.kubeconfig.clone(), master: options.api.master.clone() };
    let client = api.client("kube-proxy").await?;
    let families = host::families();
    let health = Health::new(&families);
    let metrics = Arc::new(Metrics::default());
    let _healthz = match config.healthz {
        Some(address) => Some(serve(address, health.handler(metrics.clone())).await.map_err(ProxyError::Healthz)?),
        None => None,
    };
    let _metrics = match config.metrics {
        Some(address) => {
            let handler = metrics.clone().handler(config.mode.as_str());
            Some(serve(address, handler).await.map_err(ProxyError::Metrics)?)
        }
        None => None,
    };
    let backend = Backend::new(&config).map_err(ProxyError::Nftables)?;
    tracing::info!(node = config.node_name, mode = config.mode.as_str(), ?families, "following services and endpoints");
    let informers = Informers::start(&client, &config.node_name);
    drop(client);
    let checks = ServiceChecks::new(&families);
    let proxy = Proxy {
        config,
        families,
        backend,
        plans: Plans::new(),
        complete: false,
        conntrack: None,
        wanted_checks: HealthChecks::new(),
        checks,
        health,
        metrics,
    };
    proxy.follow(&informers).await
}

struct Proxy {
    config: Config,
    families: Vec<Family>,
    backend: Backend,
    /// What is installed, or should be.
    plans: Plans,
    /// Whether the plans were made from everything once.
    complete: bool,
    conntrack: Option<Socket>,
    wanted_checks: HealthChecks,
    checks: ServiceChecks,
    health: Health,
    metrics: Arc<Metrics>,
}

impl Proxy {
    async fn follow(mut self, informers: &Informers) -> Result<(), ProxyError> {
        let mut other_mode = true;
        let mut last = None::<Instant>;
        let mut retry = None::<Duration>;
        loop {
            let changed = tokio::select! {
                () = informers.changed() => true,
                () = tokio::time::sleep(retry.unwrap_or(self.config.sync)) => false,
            };
            if informers.model().is_none() {
                continue;
            }
            if changed {
                self.health.queued();
                self.metrics.queued(&self.families);
            } else if retry.is_none() && self.verify(informers).await {
                continue;
            }
            tokio::time::sleep(SETTLE).await;
            if let Some(last) = last {
                tokio::time::sleep_until(last + self.config.min_sync).await;
            }
            last = Some(Instant::now());
            retry = match self.sync(informers).await {
                Ok(()) => {
                    // Only now, so that services work all the time while a node changes its mode.
                    if std::mem::take(&mut other_mode) {
                        self.backend.remove_other_mode().await;
                    }
                    None
                }
                Err(error) => {
                    let next = retry.map_or(Duration::from_secs(1), |retry| (retry * 2).min(self.config.sync));
                    tracing::error!(error = error_chain(&error), retry = ?next, "cannot install the rules");
                    Some(next)
                }
            };
        }
    }

    /// Brings the kernel to what the model says.
    async fn sync(&mut self, informers: &Informers) -> Result<(), SyncError> {
        let started = Instant::now();
        let dirty = informers.take_dirty();
        let triggers = dirty.triggers.clone();
        let full = !self.complete || dirty.node;
        let (changed, settings) = {
            let Some(model) = informers.model() else { return Ok(()) };
            self.health.set_eligible(model.node.eligible);
            let changed = self.replan(&model, dirty);
            let settings = settings(&self.config, &self.families, &model).map_err(SyncError::Host)?;
            (changed, settings)
        };
        let mut result = Ok(());
        for settings in &settings {
            let (family, begun) = (settings.family, Instant::now());
            match self.backend.install(settings, &mut self.plans, &changed).await {
                Ok(()) => {
                    self.health.updated(family);
                    self.metrics.synced(family, full, begun.elapsed());
                    let now = jiff::Timestamp::now();
                    for trigger in &triggers {
                        self.metrics.programmed(family, now.duration_since(*trigger).unsigned_abs());
                    }
                }
                Err(error) => {
                    self.metrics.failed(self.config.mode, family);
                    result = result.and(Err(error));
                }
            }
        }
        self.after(&changed, informers).await;
        if result.is_ok() {
            let services = self.plans.len();
            tracing::debug!(changed = changed.len(), services, took = ?started.elapsed(), "the rules are up to date");
        }
        result
    }

    /// Plans what is dirty anew, and answers which plans changed.
    fn replan(&mut self, model: &Model, dirty: Dirty) -> Vec<Changed> {
        let names: BTreeSet<ServiceName> = if !self.complete || dirty.node {
            model.services.keys().chain(self.plans.keys()).cloned().collect()
        } else {
            dirty.services
        };
        self.complete = true;
        let mut changed = Vec::new();
        for name in names {
            let old = self.plans.get(&name);
            let entry = model.services.get(&name).filter(|entry| !entry.families.is_empty());
            let mut new = entry.map(|entry| plan(entry, &model.node, &model.node_name));
            if let (Some(old), Some(new)) = (old, &mut new) {
                new.keep_places_of(old);
            }
            if old == new.as_ref() {
                continue;
            }
            let old = match new {
                Some(new) => self.plans.insert(name.clone(), new),
                None => self.plans.remove(&name),
            };
            changed.push(Changed { name, old: old.unwrap_or_default() });
        }
        changed
    }

    /// What follows from a change beside the rules.
    async fn after(&mut self, changed: &[Changed], informers: &Informers) {
        let nothing = ServicePlan::default();
        for Changed { name, old } in changed {
            let new = self.plans.get(name).unwrap_or(&nothing);
            old.ports.iter().for_each(|port| self.metrics.count_local(port, -1));
            new.ports.iter().for_each(|port| self.metrics.count_local(port, 1));
            if let Some(check) = old.health_check
                && self.wanted_checks.get(&check.node_port).is_some_and(|(owner, _)| owner == name)
            {
                self.wanted_checks.remove(&check.node_port);
            }
        }
        for Changed { name, .. } in changed {
            if let Some(check) = self.plans.get(name).and_then(|plan| plan.health_check) {
                self.wanted_checks.insert(check.node_port, (name.clone(), check.local_endpoints));
            }
        }
        self.checks.update(&self.wanted_checks, &self.health).await;
        let counts = informers.counts();
        self.metrics.changes(counts);
        if let Err(error) = tokio::task::block_in_place(|| self.forget_stale_connections(changed)) {
            // It only means that a few UDP clients wait for their own time-outs.
            tracing::warn!(error = error_chain(&error), "cannot forget stale UDP connections");
            self.conntrack = None;
        }
    }

    fn forget_stale_connections(&mut self, changed: &[Changed]) -> Result<(), NetlinkError> {
        let nothing = ServicePlan::default();
        let new = |change: &Changed| self.plans.get(&change.name).unwrap_or(&nothing);
        let concerned: Vec<&Changed> = changed.iter().filter(|change| may_be_stale(&change.old, new(change))).collect();
        let mut expectations = Expectations::of(concerned.iter().map(|change| new(change)));
        concerned.iter().for_each(|change| expectations.gone(&change.old));
        if expectations.is_empty() {
            return Ok(());
        }
        let socket = match &mut self.conntrack {
            Some(socket) => socket,
            none => none.insert(Socket::open()?),
        };
        for family in &self.families {
            let begun = Instant::now();
            let count = forget(socket, *family, |connection| expectations.disagree(connection))?;
            self.metrics.forgot(*family, count, begun.elapsed());
        }
        Ok(())
    }

    /// Whether what was installed is still there, perhaps after it was put right; if not, everything is installed
    /// again.
    async fn verify(&mut self, informers: &Informers) -> bool {
        let settings = match informers.model() {
            Some(model) => settings(&self.config, &self.families, &model),
            None => return true,
        };
        let result = match settings {
            Ok(settings) => self.backend.verify(&settings, &mut self.plans).await,
            Err(error) => Err(SyncError::Host(error)),
        };
        match result {
            Ok(Verdict::Intact) => true,
            Ok(Verdict::Repaired(operations)) => {
                tracing::warn!(operations, "somebody changed the rules; they are right again");
                true
            }
            Ok(Verdict::Missing) => {
                tracing::warn!("somebody removed the rules; installing them again");
                false
            }
            Err(error) => {
                tracing::warn!(error = error_chain(&error), "cannot look at the rules");
                false
            }
        }
    }
}

/// What became of the rules while nothing was to be done.
enum Verdict {
    Intact,
    Repaired(usize),
    Missing,
}

enum Backend {
    Nftables(Box<nftables::Backend<NetlinkKernel>>),
    Iptables(iptables::Backend),
}

impl Backend {
    fn new(config: &Config) -> Result<Self, KernelError> {
        Ok(match config.mode {
            Mode::Nftables => Self::Nftables(Box::new(nftables::Backend::new(NetlinkKernel::open()?))),
            Mode::Iptables => {
                let extras = iptables::Extras { localhost_node_ports: config.localhost_node_ports };
                Self::Iptables(iptables::Backend::new(extras))
            }
        })
    }

    async fn install(&mut self, settings: &Settings, plans: &mut Plans, changed: &[Changed]) -> Result<(), SyncError> {
        match self {
            // The kernel works while we wait.
            Self::Nftables(backend) => Ok(tokio::task::block_in_place(|| backend.sync(settings, plans, changed))?),
            Self::Iptables(backend) => backend.sync(settings, plans).await.map_err(SyncError::Iptables),
        }
    }

    async fn verify(&mut self, settings: &[Settings], plans: &mut Plans) -> Result<Verdict, SyncError> {
        match self {
            Self::Nftables(backend) => {
                let repaired = tokio::task::block_in_place(|| backend.verify(settings, plans))?;
                Ok(if repaired == 0 { Verdict::Intact } else { Verdict::Repaired(repaired) })
            }
            Self::Iptables(backend) => {
                let mut verdict = Verdict::Intact;
                for settings in settings {
                    if !backend.verify(settings.family).await.map_err(SyncError::Iptables)? {
                        verdict = Verdict::Missing;
                    }
                }
                Ok(verdict)
            }
        }
    }

    /// Rules of the other mode would go on redirecting to endpoints of the past.
    async fn remove_other_mode(&self) {
        let (what, error) = match self {
            Self::Nftables(_) => ("iptables", remove_iptables().await.err().map(|error| error_chain(&error))),
            Self::Iptables(_) => ("nftables", remove_nftables().err().map(|error| error_chain(&error))),
        };
        if let Some(error) = error {
            tracing::debug!(error, what, "cannot look for rules of the other mode");
        }
    }
}

fn remove_nftables() -> Result<(), KernelError> {
    nftables::remove(&mut NetlinkKernel::open()?)
}

async fn remove_iptables() -> Result<(), HostError> {
    for family in host::families() {
        iptables::remove(family).await?;
    }
    Ok(())
}

fn settings(config: &Config, families: &[Family], model: &Model) -> Result<Vec<Settings>, HostError> {
    let addresses = host::node_addresses()?;
    Ok(families.iter().map(|family| config.settings(*family, &model.node, || addresses.clone())).collect())
}

/// Best effort, as containers and namespaces may not be allowed to.
fn tune_kernel(config: &Config) {
    let mut parameters = conntrack_parameters(&config.conntrack);
    // Replies between pods on one bridge must pass the rules too, or they arrive from the wrong address.
    const BRIDGED: [&str; 2] = ["net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables"];
    parameters.extend(BRIDGED.iter().filter(|name| host::sysctl_number(name) == Some(0)).map(|name| (*name, 1)));
    if config.mode == Mode::Iptables && config.localhost_node_ports {
        parameters.push(("net/ipv4/conf/all/route_localnet", 1));
    }
    for (name, value) in parameters {
        if let Err(error) = host::sysctl(name, &value.to_string()) {
            tracing::warn!(error = error_chain(&error), value, "cannot set a kernel parameter");
        }
    }
}

fn conntrack_parameters(conntrack: &Conntrack) -> Vec<(&'static str, u64)> {
    const MAX: &str = "net/netfilter/nf_conntrack_max";
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
    let wanted = (conntrack.max_per_core.saturating_mul(cores)).max(conntrack.min);
    let mut parameters = Vec::new();
    if conntrack.max_per_core > 0 && host::sysctl_number(MAX).is_some_and(|current| current < wanted) {
        parameters.push((MAX, wanted));
    }
    for (name, value) in [
        ("net/netfilter/nf_conntrack_tcp_timeout_established", conntrack.tcp_established),
        ("net/netfilter/nf_conntrack_tcp_timeout_close_wait", conntrack.tcp_close_wait),
        ("net/netfilter/nf_conntrack_udp_timeout", conntrack.udp),
        ("net/netfilter/nf_conntrack_udp_timeout_stream", conntrack.udp_stream),
    ] {
        parameters.extend(value.map(|value| (name, value.as_secs())));
    }
    if conntrack.tcp_be_liberal {
        parameters.push(("net/netfilter/nf_conntrack_tcp_be_liberal", 1));
    }
    parameters
}
