//! `cluster-dns`: flags, and putting the parts together.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use apimachinery::process::{
    self, CancellationToken, ClientError, HealthChecks, KubeconfigArgs, LogArgs, StatusServer, StatusServerError,
};
use clap::Parser;
use cluster_dns::forward::{self, Forwarder, ResolvConfError};
use cluster_dns::server::{self, Dns, Metrics, ServerError};
use cluster_dns::watch;
use cluster_dns::zone::Zone;
use hickory_proto::rr::Name;
use prometheus_client::registry::Registry;

/// DNS for services and pods of a Kubernetes cluster.
#[derive(Parser)]
#[command(name = "cluster-dns", version = process::KUBERNETES_VERSION)]
struct Args {
    /// Addresses to answer on, UDP and TCP.
    #[arg(long, value_name = "IP:PORT", value_delimiter = ',', default_value = "0.0.0.0:53")]
    listen: Vec<SocketAddr>,
    /// The cluster's domain.
    #[arg(long, default_value = "cluster.local")]
    domain: String,
    /// Whom to ask for other names: addresses (with :port) or files in the form of resolv.conf.
    #[arg(long, value_name = "IP|FILE", value_delimiter = ',', default_value = "/etc/resolv.conf")]
    forward: Vec<String>,
    /// Where /healthz answers.
    #[arg(long, value_name = "IP:PORT", default_value = "0.0.0.0:8080")]
    health_address: SocketAddr,
    /// Where /readyz answers.
    #[arg(long, value_name = "IP:PORT", default_value = "0.0.0.0:8181")]
    ready_address: SocketAddr,
    /// Where /metrics answers.
    #[arg(long, value_name = "IP:PORT", default_value = "0.0.0.0:9153")]
    metrics_address: SocketAddr,
    #[command(flatten)]
    api: KubeconfigArgs,
    #[command(flatten)]
    logs: LogArgs,
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("--domain {0:?} is not a domain name")]
    Domain(String),
    #[error(transparent)]
    Forward(#[from] ResolvConfError),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error(transparent)]
    Status(#[from] StatusServerError),
}

fn main() -> ExitCode {
    let args = Args::parse();
    process::run(&args.logs.clone(), |shutdown| run(args, shutdown))
}

async fn run(args: Args, shutdown: CancellationToken) -> Result<(), Error> {
    let mut origin =
        Name::from_ascii(args.domain.to_ascii_lowercase()).map_err(|_| Error::Domain(args.domain.clone()))?;
    origin.set_fqdn(true);
    let servers = forward::servers(&args.forward, &args.listen)?;
    tracing::info!(?servers, "other names are asked of");
    let metrics = Metrics::default();
    let mut registry = Registry::default();
    metrics.register(&mut registry);
    let registry = Arc::new(registry);
    let dns = Arc::new(Dns {
        zone: Zone::new(origin),
        model: Arc::default(),
        forwarder: Forwarder::new(servers),
        metrics,
        turn: AtomicUsize::new(0),
    });
    let client = args.api.client("cluster-dns").await?;
    let synced = watch::start(client, dns.model.clone(), &shutdown);
    let ready = HealthChecks::default();
    ready.register("sync", move || synced.check());
    for (address, checks) in [
        (args.health_address, HealthChecks::default()),
        (args.ready_address, ready),
        (args.metrics_address, HealthChecks::default()),
    ] {
        StatusServer { address, checks, metrics: registry.clone(), tls: None }.start(shutdown.clone()).await?;
    }
    for address in args.listen {
        let bound = server::start(dns.clone(), address, shutdown.clone()).await?;
        tracing::info!(%bound, "answering");
    }
    shutdown.cancelled().await;
    Ok(())
}
