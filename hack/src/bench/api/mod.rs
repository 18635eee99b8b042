//! Compares this project's kube-apiserver with upstream's: both run at the same time, each on an etcd of its own with
//! the same flags, and are asked the same things turn about, so that a busy machine hurts both. Server CPU is the
//! figure to trust; wall times tell as much about the machine.
//!
//! Every answer is checked, and a wrong one ends the measurement.

mod answers;
mod client;
mod load;
mod objects;
mod reads;
mod rows;
mod server;
mod side;
mod streams;
mod table;
mod writes;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::sleep;

use self::rows::{Row, Unit};
use self::server::Place;
use self::side::Side;
use self::table::Results;
use crate::cluster::plan::cache_dir;

/// A server's memory is looked at after it has been left alone for this long.
const SETTLE: Duration = Duration::from_secs(3);

#[derive(Args)]
pub struct ApiArgs {
    /// The directory with upstream's programs, as hack/upstream/build fills it.
    #[arg(long, default_value_os_t = cache_dir().join("upstream"))]
    upstream: PathBuf,
    /// The server to compare with upstream's; the one beside this program when not given.
    #[arg(long, value_name = "FILE")]
    server: Option<PathBuf>,
    /// The etcd that both run on; upstream's directory's when not given, or else the system's.
    #[arg(long, value_name = "FILE")]
    etcd: Option<PathBuf>,
    /// How many pods there are.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(100..=50_000))]
    pods: u32,
    /// How often the sides take turns in each row.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=100))]
    turns: u8,
    /// A part of all requests, to be done sooner; figures of few requests are less exact.
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Measure only rows whose names contain one of these words; what they need is written all the same.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Write the tables to this file, too.
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// Runs the comparison; the tables.
pub fn run(args: &ApiArgs) -> Result<String> {
    ensure!(args.scale > 0.0 && args.scale <= 10.0, "--scale is between 0 and 10");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot watch for signals")?;
        let mut terminate = signal(SignalKind::terminate()).context("cannot watch for signals")?;
        // The servers are killed with what is dropped here.
        tokio::select! {
            report = measure(args) => report,
            _ = interrupt.recv() => bail!("interrupted"),
            _ = terminate.recv() => bail!("terminated"),
        }
    })
}

async fn measure(args: &ApiArgs) -> Result<String> {
    let dir = tempfile::Builder::new().prefix("ketch-bench-").tempdir().context("cannot make a directory")?;
    let mut bench = Bench::new(args, dir.path())?;
    match bench.all().await {
        Ok(()) => Ok(bench.report()),
        // What went wrong may be in the logs.
        Err(error) => Err(error.context(format!("see the logs in {}", dir.keep().display()))),
    }
}

struct Bench<'a> {
    args: &'a ApiArgs,
    etcd: PathBuf,
    sides: [Side; 2],
    results: Results,
}

impl<'a> Bench<'a> {
    fn new(args: &'a ApiArgs, dir: &Path) -> Result<Self> {
        let upstream = args.upstream.join("kube-apiserver");
        let ours = match &args.server {
            Some(path) => path.clone(),
            None => std::env::current_exe().context("cannot find this program")?.with_file_name("kube-apiserver"),
        };
        let etcd = args.etcd.clone().unwrap_or_else(|| {
            let built = args.upstream.join("etcd");
            if built.exists() { built } else { "/usr/bin/etcd".into() }
        });
        for path in [&ours, &upstream, &etcd] {
            ensure!(path.exists(), "{} does not exist: build it, or name another", path.display());
        }
        let keys = dir.join("pki");
        server::create_keys(&keys)?;
        let side = |name: &'static str, server: PathBuf| -> Result<Side> {
            let dir = dir.join(name);
            std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
            Ok(Side::new(name, Place { server, etcd: etcd.clone(), keys: keys.clone(), dir }))
        };
        let sides = [side("ketch", ours)?, side("upstream", upstream)?];
        Ok(Self { args, etcd, sides, results: Results::new() })
    }

    fn wants(&self, row: Row) -> bool {
        self.args.only.is_empty() || self.args.only.iter().any(|word| row.name().contains(word))
    }

    fn turns(&self) -> usize {
        self.args.turns.into()
    }

    async fn all(&mut self) -> Result<()> {
        self.fresh().await?;
        for side in &self.sides {
            side.prepare().await.with_context(|| format!("{} cannot be prepared", side.name))?;
        }
        for row in Row::REQUESTS.into_iter().filter(|row| row.seeds()) {
            self.requests(row).await?;
        }
        self.memory(Row::MemoryWritten).await?;
        for row in Row::REQUESTS.into_iter().filter(|row| !row.seeds()) {
            if self.wants(row) {
                self.requests(row).await?;
            }
        }
        if [Row::StartSeeded, Row::MemoryRestarted, Row::MemoryListed].into_iter().any(|row| self.wants(row)) {
            self.restarted().await?;
        }
        for side in &mut self.sides {
            side.stop().await?;
        }
        Ok(())
    }

    /// Both servers start on an empty store, again and again; the last ones stay.
    async fn fresh(&mut self) -> Result<()> {
        let turns = if self.wants(Row::StartFresh) { self.turns() } else { 1 };
        for turn in 0..turns {
            for index in order(turn) {
                let side = &mut self.sides[index];
                let took = side.start_fresh().await.with_context(|| format!("{} does not start", side.name))?;
                self.add(Row::StartFresh, index, took.as_secs_f64());
            }
        }
        self.memory(Row::MemoryFresh).await
    }

    /// The pods are there; a client lists them once, and then ten at the same time.
    async fn restarted(&mut self) -> Result<()> {
        for turn in 0..self.turns() {
            for index in order(turn) {
                let side = &mut self.sides[index];
                let took = side.restart().await.with_context(|| format!("{} does not start again", side.name))?;
                let name = side.name;
                load::run(side, &reads::ListPods::JSON, 0..1).await.with_context(|| format!("{name}, restarted"))?;
                sleep(SETTLE).await;
                let restarted = side.pss()?;
                let lists = load::run(side, &reads::ParallelLists, 0..10).await;
                lists.with_context(|| format!("{name}, ten lists at once"))?;
                sleep(SETTLE).await;
                let listed = side.pss()?;
                self.add(Row::StartSeeded, index, took.as_secs_f64());
                self.add(Row::MemoryRestarted, index, restarted);
                self.add(Row::MemoryListed, index, listed);
            }
        }
        Ok(())
    }

    async fn memory(&mut self, row: Row) -> Result<()> {
        sleep(SETTLE).await;
        for index in order(0) {
            let pss = self.sides[index].pss()?;
            self.add(row, index, pss);
        }
        Ok(())
    }

    async fn requests(&mut self, row: Row) -> Result<()> {
        let all = row.requests(self.args.pods as usize);
        // Seeds are written whole: what comes after counts on them.
        let all = if row.seeds() { all as f64 } else { (all as f64 * self.args.scale).max(self.turns() as f64) };
        for turn in 0..self.turns() {
            let bound = |turn: usize| (all * turn as f64 / self.turns() as f64).round() as usize;
            let requests = bound(turn + 1) - bound(turn);
            for index in order(turn) {
                let side = &mut self.sides[index];
                let name = side.name;
                let cost = row.turn(side, requests).await.with_context(|| format!("{} on {name}", row.name()))?;
                self.results.entry(row).or_default()[index].add_cost(cost);
            }
        }
        self.tell(row);
        Ok(())
    }

    fn add(&mut self, row: Row, index: usize, value: f64) {
        self.results.entry(row).or_default()[index].add_value(value);
    }

    /// Progress for whoever waits.
    fn tell(&self, row: Row) {
        if let Some(figures) = self.results.get(&row) {
            let one = Results::from([(row, figures.clone())]);
            eprintln!("{}", table::summary(&one).lines().last().unwrap_or_default());
        }
    }

    fn report(&self) -> String {
        let wanted: Results =
            self.results.iter().filter(|(row, _)| self.wants(**row)).map(|(row, f)| (*row, f.clone())).collect();
        let has_requests = wanted.keys().any(|row| row.unit() == Unit::Cpu);
        let details = if has_requests { format!("\n{}", table::details(&wanted)) } else { String::new() };
        format!(
            "{} pods, {} turns, both on {}. Rows of requests: server CPU per request.\n\n{}{details}",
            self.args.pods,
            self.turns(),
            self.etcd.display(),
            table::summary(&wanted),
        )
    }
}

/// Who goes first changes from turn to turn.
fn order(turn: usize) -> [usize; 2] {
    if turn.is_multiple_of(2) { [0, 1] } else { [1, 0] }
}
