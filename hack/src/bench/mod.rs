//! Measures clusters: what they use when idle, how fast pods come and go, how long a cluster takes to come up. One
//! cluster that runs, or this project's programs and upstream's, one after the other in the same harness. And API
//! servers on their own, request by request, beside upstream's.
//!
//! A cluster is measured from outside, the same way whatever programs it runs; nothing here knows which they are.

mod api;
mod collect;
mod dns;
mod latency;
mod netlab;
mod node;
mod overlay;
mod proxy;
mod report;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Subcommand};

use crate::Selected;
use crate::cluster::plan::{ClusterOptions, Plan, cache_dir};
use crate::cluster::{down, up};
use report::{Conditions, Measurements};

/// What upstream has a program for. The rest of the cluster (etcd, containerd, runc, the CNI plugin, cluster DNS) is
/// the same on both sides.
const UPSTREAM: [&str; 6] =
    ["kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "flanneld"];

#[derive(Subcommand)]
pub enum BenchCommand {
    /// Measure a running cluster and print its figures as Markdown.
    Cluster(ClusterArgs),
    /// Bring up this project's programs and then upstream's, measure both and print them side by side as Markdown.
    Compare(CompareArgs),
    /// Run this project's kubelet and then upstream's on the same node and print them side by side as Markdown.
    Node(node::NodeArgs),
    /// Measure what each flannel backend carries between pods, with this project's flanneld and upstream's in turns.
    Overlay(overlay::OverlayArgs),
    /// Measure kube-proxy with thousands of services, this project's and upstream's in turn, in namespaces of its own.
    Proxy(proxy::ProxyArgs),
    /// Load cluster-dns with questions and print how many it answers, and how fast.
    Dns(dns::DnsArgs),
    /// Run this project's kube-apiserver beside upstream's, alone with etcd, and print what requests cost on each.
    Api(api::ApiArgs),
}

#[derive(Args)]
pub struct ClusterArgs {
    #[command(flatten)]
    cluster: Selected,
    #[command(flatten)]
    effort: Effort,
}

#[derive(Args)]
pub struct CompareArgs {
    #[command(flatten)]
    cluster: ClusterOptions,
    /// The directory with upstream's programs, as hack/upstream/build fills it.
    #[arg(long, default_value_os_t = cache_dir().join("upstream"))]
    upstream: PathBuf,
    #[command(flatten)]
    effort: Effort,
}

#[derive(Args)]
struct Effort {
    /// How long the idle cluster is watched, in seconds.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    idle: u64,
    /// How many pods are created and deleted, one after another.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pods: u16,
    /// Write the tables to this file, too.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

pub fn run(command: BenchCommand) -> Result<()> {
    match command {
        BenchCommand::Cluster(args) => {
            let plan = args.cluster.plan()?;
            ensure!(up::is_up(&plan.data_dir), "cluster {} is not up", plan.name);
            publish(&report::single(&measure(&plan, &args.effort)?), args.effort.output.as_deref())
        }
        BenchCommand::Compare(args) => compare(&args),
        BenchCommand::Node(args) => publish(&node::run(&args)?, args.output.as_deref()),
        BenchCommand::Overlay(args) => overlay::run(&args),
        BenchCommand::Proxy(args) => publish(&proxy::run(&args)?, args.output.as_deref()),
        BenchCommand::Dns(args) => publish(&dns::run(&args)?, args.output.as_deref()),
        BenchCommand::Api(args) => publish(&api::run(&args)?, args.output.as_deref()),
    }
}

fn compare(args: &CompareArgs) -> Result<()> {
    let mut upstream = args.cluster.clone();
    // Later choices win: what the user chose for both sides stays, unless upstream has the program.
    upstream.bins.extend(upstream_programs(&args.upstream)?);
    let ours = measure_fresh(&args.cluster, &args.effort).context("Ketch cannot be measured")?;
    let theirs = measure_fresh(&upstream, &args.effort).context("upstream cannot be measured")?;
    publish(&report::comparison(("Ketch", &ours), ("upstream", &theirs)), args.effort.output.as_deref())
}

fn upstream_programs(dir: &Path) -> Result<Vec<(String, PathBuf)>> {
    let program = |name: &str| {
        let path = std::fs::canonicalize(dir.join(name)).with_context(|| {
            format!("{} lacks {name}: run hack/upstream/build {} components", dir.display(), dir.display())
        })?;
        Ok((name.to_owned(), path))
    };
    UPSTREAM.into_iter().map(program).collect()
}

/// Brings a cluster up, measures it and takes it down again, whether that worked or not.
fn measure_fresh(options: &ClusterOptions, effort: &Effort) -> Result<Measurements> {
    let dir = options.data_dir.join(&options.name);
    if up::is_up(&dir) {
        bail!("cluster {} is up: take it down first, or choose another --name", options.name);
    }
    down::down(&options.data_dir, &options.name, false)?;
    let measured = up::up(options).and_then(|()| measure(&Plan::load(&dir)?, effort));
    // A cluster that failed keeps its logs.
    let removed = down::down(&options.data_dir, &options.name, measured.is_err());
    measured.and_then(|measured| removed.map(|()| measured))
}

fn measure(plan: &Plan, effort: &Effort) -> Result<Measurements> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the runtime")?;
    runtime.block_on(async {
        let interval = Duration::from_secs(effort.idle);
        eprintln!("waiting until cluster {} is idle", plan.name);
        collect::settle(plan).await?;
        eprintln!("watching it for {} s", effort.idle);
        let usage = collect::observe(plan, interval).await?;
        let conditions = Conditions { interval, cpus: cpus(), load: load()? };
        eprintln!("running {} pods, one after another", effort.pods);
        let client = apimachinery::process::client_from_kubeconfig(&plan.kubeconfig(), "ketch-bench").await?;
        let latency = latency::measure(&client, effort.pods.into()).await?;
        Ok(Measurements { usage, latency, up: up::Times::load(plan), conditions })
    })
}

fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn load() -> Result<String> {
    let text = std::fs::read_to_string("/proc/loadavg").context("cannot read the machine's load")?;
    Ok(text.split_whitespace().next().unwrap_or_default().to_owned())
}

fn publish(report: &str, output: Option<&Path>) -> Result<()> {
    println!("\n{report}");
    match output {
        Some(file) => std::fs::write(file, report).with_context(|| format!("cannot write {}", file.display())),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upstream_must_be_complete() {
        let dir = tempfile::tempdir().unwrap();
        for name in UPSTREAM {
            let error = upstream_programs(dir.path()).unwrap_err().to_string();
            assert!(error.contains(&format!("lacks {name}: run hack/upstream/build")), "{error}");
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        assert_eq!(upstream_programs(dir.path()).unwrap().len(), UPSTREAM.len());
    }
}
