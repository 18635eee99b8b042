//! The proxy's life: follow the API, and whenever something changed and the last change of the kernel is long enough
//! ago, plan, compile, and install the difference.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use apimachinery::process::{CancellationToken, ClientError, KubeconfigArgs, error_chain};
use tokio::time::Instant;

use crate::config::{Config, ConfigError, Conntrack, Mode, NodePortAddresses, Options};
use crate::health::{Health, Metrics, ServiceChecks};
use crate::http_server::{ListenError, serve};
use crate::informers::Informers;
use crate::kernel::{self, KernelError};
use crate::model::Model;
use crate::nftables::{Ruleset, Settings, Transaction, adopt, compile, diff, replace};
use crate::plan::{Disposition, Plan, plan};
use crate::{conntrack, iptables};

#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    #[error("the configuration cannot be used")]
    Config(#[from] ConfigError),
    #[error("cannot use the Kubernetes API")]
    Client(#[from] ClientError),
    #[error("cannot remove the rules")]
    Cleanup(#[source] KernelError),
    #[error("cannot serve health checks")]
    Healthz(#[source] ListenError),
    #[error("cannot serve metrics")]
    Metrics(#[source] ListenError),
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
        remove_nftables().await.and(remove_iptables().await).map_err(ProxyError::Cleanup)?;
        return Ok(());
    }
    let config = options.resolve()?;
    let api = KubeconfigArgs { kubeconfig: config.kubeconfig.clone(), master: options.api.master.clone() };
    let client = api.client("kube-proxy").await?;
    let health = Health::default();
    let metrics = Arc::new(Metrics::default());
    let _healthz = match config.healthz {
        Some(address) => Some(serve(address, health.handler()).await.map_err(ProxyError::Healthz)?),
        None => None,
    };
    let _metrics = match config.metrics {
        Some(address) => {
            let handler = metrics.clone().handler(config.mode.as_str());
            Some(serve(address, handler).await.map_err(ProxyError::Metrics)?)
        }
        None => None,
    };
    tune_conntrack(&config.conntrack);
    tracing::info!(node = config.node_name, mode = config.mode.as_str(), "following services and endpoints");
    let informers = Informers::start(&client, &config.node_name);
    drop(client);
    Proxy { backend: Backend::new(config.mode), plan: None, checks: ServiceChecks::default(), config, health, metrics }
        .follow(&informers)
        .await
}

struct Proxy {
    config: Config,
    backend: Backend,
    /// What was installed last.
    plan: Option<Plan>,
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
            let Some(model) = informers.snapshot() else { continue };
            if changed {
                self.health.queued();
            } else if retry.is_none() && self.backend.verify().await {
                continue;
            }
            tokio::time::sleep(SETTLE).await;
            if let Some(last) = last {
                tokio::time::sleep_until(last + self.config.min_sync).await;
            }
            // What arrived while waiting belongs to this round.
            let model = informers.snapshot().unwrap_or(model);
            self.health.set_eligible(model.node.eligible);
            last = Some(Instant::now());
            retry = match self.sync(&model).await {
                Ok(()) => {
                    // Only now, so that services work all the time while a node changes its mode.
                    if std::mem::take(&mut other_mode) {
                        self.backend.remove_other_mode().await;
                    }
                    None
                }
                Err(error) => {
                    self.metrics.sync_failures.inc();
                    let next = retry.map_or(Duration::from_secs(1), |retry| (retry * 2).min(self.config.sync));
                    tracing::error!(error = error_chain(&error), retry = ?next, "cannot install the rules");
                    Some(next)
                }
            };
        }
    }

    /// Brings the kernel to what the model says.
    async fn sync(&mut self, model: &Model) -> Result<(), KernelError> {
        let started = Instant::now();
        let wanted = plan(model);
        let settings = settings(&self.config, model)?;
        self.backend.install(&wanted, &settings).await?;
        self.checks.update(&wanted.health_checks, &self.health).await;
        let old = self.plan.replace(wanted);
        self.health.updated();
        if let Some(new) = &self.plan {
            forget_stale_connections(old.as_ref(), new).await;
            self.measure(new, started);
        }
        Ok(())
    }

    fn measure(&self, plan: &Plan, started: Instant) {
        let count = |select: fn(&crate::plan::PlannedPort) -> Disposition| {
            let dropped = plan.ports.iter().filter(|port| select(port) == Disposition::Drop).count();
            i64::try_from(dropped).unwrap_or(i64::MAX)
        };
        self.metrics.no_local_internal.set(count(|port| port.internal));
        self.metrics.no_local_external.set(count(|port| port.external));
        self.metrics.sync_seconds.observe(started.elapsed().as_secs_f64());
        self.metrics.last_sync.set(jiff::Timestamp::now().as_second());
        tracing::debug!(ports = plan.ports.len(), took = ?started.elapsed(), "the rules are up to date");
    }
}

/// Installs plans, and remembers what is installed.
enum Backend {
    /// `None` until the first installation, or when somebody removed our table.
    Nftables(Option<Box<Ruleset>>),
    Iptables {
        /// The script that was applied last; empty when unknown.
        applied: String,
        jumps: bool,
    },
}

impl Backend {
    fn new(mode: Mode) -> Self {
        match mode {
            Mode::Nftables => Self::Nftables(None),
            Mode::Iptables => Self::Iptables { applied: String::new(), jumps: false },
        }
    }

    /// Whether what was installed is still there; if not, everything is installed again next time.
    async fn verify(&mut self) -> bool {
        let present = match self {
            Self::Nftables(None) => return false,
            Self::Nftables(Some(_)) => kernel::nft_present().await,
            Self::Iptables { .. } => iptables_present().await,
        };
        match present {
            Ok(true) => true,
            Ok(false) => {
                tracing::warn!("somebody removed the rules; installing them again");
                self.forget();
                false
            }
            Err(error) => {
                tracing::warn!(error = error_chain(&error), "cannot look at the rules");
                true
            }
        }
    }

    /// Rules of the other mode would go on redirecting to endpoints of the past.
    async fn remove_other_mode(&self) {
        let removed = match self {
            Self::Nftables(_) => remove_iptables().await,
            Self::Iptables { .. } => remove_nftables().await,
        };
        if let Err(error) = removed {
            tracing::debug!(error = error_chain(&error), "cannot look for rules of the other mode");
        }
    }

    fn forget(&mut self) {
        match self {
            Self::Nftables(installed) => *installed = None,
            Self::Iptables { applied, jumps } => {
                applied.clear();
                *jumps = false;
            }
        }
    }

    async fn install(&mut self, plan: &Plan, settings: &Settings) -> Result<(), KernelError> {
        let result = match self {
            Self::Nftables(installed) => install_nftables(installed, plan, settings).await,
            Self::Iptables { applied, jumps } => install_iptables(applied, jumps, plan, settings).await,
        };
        if result.is_err() {
            // What is in the kernel now is not known for sure.
            self.forget();
        }
        result
    }
}

/// Both our chains and the ways into them: tools that reload a firewall restore neither.
async fn iptables_present() -> Result<bool, KernelError> {
    for (table, chain, target) in iptables::SIGNS {
        if !kernel::iptables_leads(table, chain, target).await? {
            return Ok(false);
        }
    }
    Ok(true)
}

async fn remove_nftables() -> Result<(), KernelError> {
    if kernel::nft_present().await? { kernel::nft_remove().await } else { Ok(()) }
}

async fn remove_iptables() -> Result<(), KernelError> {
    if !kernel::iptables_leads("nat", "KUBE-SERVICES", None).await? {
        return Ok(());
    }
    for jump in iptables::jumps() {
        kernel::iptables_remove(jump.table, jump.chain, &jump.rule).await?;
    }
    let (filter, nat) = (kernel::iptables_chains("filter").await?, kernel::iptables_chains("nat").await?);
    kernel::iptables_restore(&iptables::removal(&filter, &nat)).await
}

async fn install_nftables(
    installed: &mut Option<Box<Ruleset>>,
    plan: &Plan,
    settings: &Settings,
) -> Result<(), KernelError> {
    let wanted = compile(plan, settings);
    let transaction = match installed {
        Some(old) => {
            let transaction = diff(old, &wanted);
            if !transaction.apply.is_empty() {
                kernel::nft(&transaction.apply).await?;
            }
            transaction
        }
        None => adopt_nftables(&wanted).await?,
    };
    *installed = Some(Box::new(wanted));
    if !transaction.clean_up.is_empty() {
        kernel::nft(&transaction.clean_up).await?;
    }
    Ok(())
}

/// Takes over what an earlier process left, or replaces it if that is not possible.
async fn adopt_nftables(wanted: &Ruleset) -> Result<Transaction, KernelError> {
    let Some(installed) = kernel::nft_installed().await? else {
        let fresh = replace(wanted);
        kernel::nft(&fresh.apply).await?;
        return Ok(fresh);
    };
    let transaction = adopt(&installed, wanted);
    match kernel::nft(&transaction.apply).await {
        Ok(()) => Ok(transaction),
        Err(error) => {
            tracing::warn!(error = error_chain(&error), "the table of an earlier process does not fit; replacing it");
            let fresh = replace(wanted);
            kernel::nft(&fresh.apply).await?;
            Ok(fresh)
        }
    }
}

async fn install_iptables(
    applied: &mut String,
    jumps: &mut bool,
    plan: &Plan,
    settings: &Settings,
) -> Result<(), KernelError> {
    let wanted = iptables::script(plan, settings, &BTreeSet::new(), &BTreeSet::new());
    if wanted != *applied {
        let (filter, nat) = (kernel::iptables_chains("filter").await?, kernel::iptables_chains("nat").await?);
        kernel::iptables_restore(&iptables::script(plan, settings, &filter, &nat)).await?;
        *applied = wanted;
    }
    if !*jumps {
        for jump in iptables::jumps() {
            kernel::iptables_ensure(jump.table, jump.chain, &jump.rule).await?;
        }
        *jumps = true;
    }
    Ok(())
}

/// The configuration together with what only the running node knows.
fn settings(config: &Config, model: &Model) -> Result<Settings, KernelError> {
    let node_port_addresses: Option<BTreeSet<Ipv4Addr>> = match &config.node_port_addresses {
        NodePortAddresses::All => None,
        NodePortAddresses::Primary => Some(model.node.internal_ip.into_iter().collect()),
        NodePortAddresses::In(nets) => {
            let all = kernel::node_addresses()?;
            Some(all.into_iter().filter(|address| nets.iter().any(|net| net.contains(address))).collect())
        }
    };
    Ok(Settings {
        mark: config.mark,
        masquerade_all: config.masquerade_all,
        cluster_cidr: config.cluster_cidr,
        node_port_addresses,
    })
}

/// Failing here only means that a few UDP clients wait for their own time-outs.
async fn forget_stale_connections(old: Option<&Plan>, new: &Plan) {
    let stale = match old {
        Some(old) => conntrack::stale(old, new),
        None => match kernel::udp_connections().await {
            Ok(connections) => conntrack::orphans(new, &connections),
            Err(error) => {
                tracing::warn!(error = error_chain(&error), "cannot look for stale UDP connections");
                return;
            }
        },
    };
    for filter in stale {
        if let Err(error) = kernel::forget_connections(&filter).await {
            tracing::warn!(error = error_chain(&error), ?filter, "cannot forget stale UDP connections");
        }
    }
}

/// Best effort, as containers and namespaces may not be allowed to.
fn tune_conntrack(conntrack: &Conntrack) {
    const MAX: &str = "net/netfilter/nf_conntrack_max";
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
    let wanted = (conntrack.max_per_core.saturating_mul(cores)).max(conntrack.min);
    let mut parameters = Vec::new();
    if conntrack.max_per_core > 0 && kernel::sysctl_number(MAX).is_some_and(|current| current < wanted) {
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
    // Replies between pods on one bridge must pass the rules too, or they arrive from the wrong address.
    const BRIDGED: &str = "net/bridge/bridge-nf-call-iptables";
    if kernel::sysctl_number(BRIDGED) == Some(0) {
        parameters.push((BRIDGED, 1));
    }
    for (name, value) in parameters {
        if let Err(error) = kernel::sysctl(name, &value.to_string()) {
            tracing::warn!(error = error_chain(&error), value, "cannot set a kernel parameter");
        }
    }
}
