//! `ketch`: the developers' and operators' tool behind the scripts in `hack/`. It brings a whole cluster up on one
//! machine — every node a set of namespaces — and takes it down again; the components themselves know nothing of it.

mod bench;
mod cluster;
mod conformance_report;
mod images;
mod kubectl;
mod progress;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

use cluster::plan::{ClusterOptions, Plan, clusters_root};

#[derive(Parser)]
#[command(name = "ketch", about = "Runs a Kubernetes cluster on this machine, each node in namespaces of its own")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Bring a cluster up and wait until its nodes are Ready and its DNS answers; a second run changes nothing.
    Up(ClusterOptions),
    /// Take a cluster down and remove all that it left: processes, namespaces, mounts, cgroups and data.
    Down(DownArgs),
    /// Run a program inside a node: its namespaces, its files, its cgroup.
    Exec(ExecArgs),
    /// Control the programs of a node, as systemctl does on a real machine.
    Unit(UnitArgs),
    /// Fetch the stock kubectl of a version and print its path.
    Kubectl { version: String },
    /// Measure memory, CPU and latency of a cluster, or of this project beside upstream.
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Make the images that upstream's conformance suite uses; hack/conformance calls this.
    ConformanceImages {
        /// The directory that hack/upstream/build has filled.
        #[arg(long)]
        programs: PathBuf,
        #[arg(long)]
        output: PathBuf,
    },
    /// Sum up the reports of a conformance run; hack/conformance calls this.
    ConformanceReport { directory: PathBuf },
    #[command(hide = true)]
    NodeInit { data_dir: PathBuf, node: String },
    #[command(hide = true)]
    Forward { netns: String, listen: SocketAddr, target: SocketAddr },
    /// Serve the images of archives to the nodes.
    #[command(hide = true)]
    Registry { listen: SocketAddr, archives: Vec<PathBuf> },
    #[command(hide = true)]
    DnsQuery { server: SocketAddr, name: String },
}

#[derive(Args)]
struct Selected {
    /// The cluster's name.
    #[arg(long, default_value = "ketch")]
    name: String,
    /// Where clusters keep their data.
    #[arg(long, default_value_os_t = clusters_root())]
    data_dir: PathBuf,
}

impl Selected {
    fn plan(&self) -> Result<Plan> {
        Plan::load(&self.data_dir.join(&self.name))
    }
}

#[derive(Args)]
struct DownArgs {
    #[command(flatten)]
    cluster: Selected,
    /// Keep the data directory (logs, etcd, keys).
    #[arg(long)]
    keep_data: bool,
}

#[derive(Args)]
struct ExecArgs {
    #[command(flatten)]
    cluster: Selected,
    /// master, node1, node2, …, or fabric for the network between them.
    node: String,
    #[arg(trailing_var_arg = true, required = true)]
    argv: Vec<String>,
}

#[derive(Args)]
struct UnitArgs {
    #[command(flatten)]
    cluster: Selected,
    node: String,
    #[arg(value_enum)]
    action: cluster::supervisor::Action,
    /// A unit's name, e.g. kubelet; not needed for list.
    unit: Option<String>,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    apimachinery::process::install_crypto_provider();
    match cli.command {
        Command::Up(options) => cluster::up::up(&options)?,
        Command::Down(args) => {
            cluster::down::down(&args.cluster.data_dir, &args.cluster.name, args.keep_data)?;
        }
        Command::Exec(args) => return cluster::exec(&args.cluster.plan()?, &args.node, &args.argv),
        Command::Unit(args) => {
            let answer =
                cluster::supervisor::request(&args.cluster.plan()?.node_dir(&args.node), args.action, args.unit)?;
            print!("{answer}");
        }
        Command::Kubectl { version } => println!("{}", kubectl::fetch(&version)?.display()),
        Command::Bench(command) => bench::run(command)?,
        Command::ConformanceImages { programs, output } => images::conformance::build(&programs, &output)?,
        Command::ConformanceReport { directory } => {
            return Ok(if conformance_report::report(&directory)? { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Command::NodeInit { data_dir, node } => cluster::node_init::main(&Plan::load(&data_dir)?, &node)?,
        Command::Forward { netns, listen, target } => cluster::forward::main(&netns, listen, target)?,
        Command::Registry { listen, archives } => images::registry::main(listen, &archives)?,
        Command::DnsQuery { server, name } => cluster::dns_query::main(server, &name)?,
    }
    Ok(ExitCode::SUCCESS)
}
