//! The kubelet of this project and upstream's on the same node, one after the other: in one cluster, on one containerd,
//! with everything else as it is. Pods are bound to the node when they are created, so that no scheduler is measured.
//!
//! The program under test is a copy of its own: processes of other nodes share none of its pages, which would otherwise
//! count half.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{DeleteParams, ListParams, PostParams, WatchEvent, WatchParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::time::Instant;

use super::report::{Conditions, Unit, percentile, ratio, show, table};
use super::{collect, cpus, latency, load};
use crate::cluster::plan::{ClusterOptions, Plan, cache_dir};
use crate::cluster::supervisor::{self, Action};
use crate::cluster::{down, up};
use crate::images;

const NODE: &str = "node1";
const KUBELET: &str = "kubelet";
/// Requests that are under way at the same time while a batch of pods is created or deleted.
const AT_ONCE: usize = 8;
/// No batch may take longer to come or to go; a watch lasts a little longer.
const LIMIT: Duration = Duration::from_secs(280);
const READY_LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(200);

#[derive(Args)]
pub struct NodeArgs {
    #[command(flatten)]
    cluster: ClusterOptions,
    /// The directory with upstream's kubelet, as hack/upstream/build fills it.
    #[arg(long, default_value_os_t = cache_dir().join("upstream"))]
    upstream: PathBuf,
    /// How many pods come and go together: one batch for each number.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 10, 100])]
    pods: Vec<u16>,
    /// How often the smaller batches are repeated: until so many pods have been seen.
    #[arg(long, default_value_t = 30)]
    samples: u16,
    /// How long the idle kubelet is watched, in seconds.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    idle: u64,
    /// Write the table to this file, too.
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// What one kubelet needs while nothing happens.
struct Idle {
    pods: u16,
    pss: f64,
    millicores: f64,
}

/// How long the pods of equal batches took.
struct Batch {
    pods: u16,
    ready: Vec<Duration>,
    gone: Vec<Duration>,
}

struct Figures {
    idle: Vec<Idle>,
    batches: Vec<Batch>,
}

pub fn run(args: &NodeArgs) -> Result<String> {
    let upstream = args.upstream.join(KUBELET);
    ensure!(
        upstream.is_file(),
        "{} is missing: run hack/upstream/build {} components",
        upstream.display(),
        args.upstream.display()
    );
    let programs = tempfile::tempdir().context("cannot make a directory for the programs under test")?;
    let under_test = programs.path().join(KUBELET);
    let mut options = args.cluster.clone();
    (options.nodes, options.etcd) = (1, 1);
    let ours = Plan::new(&options)?.bin(KUBELET).to_owned();
    place(&ours, &under_test)?;
    options.bins.push((KUBELET.to_owned(), under_test.clone()));

    let dir = options.data_dir.join(&options.name);
    ensure!(!up::is_up(&dir), "cluster {} is up: take it down first, or choose another --name", options.name);
    down::down(&options.data_dir, &options.name, false)?;
    let measured = up::up(&options).and_then(|()| {
        let bed = Bed { plan: Plan::load(&dir)?, under_test };
        measure(&bed, [&ours, &upstream], args)
    });
    let removed = down::down(&options.data_dir, &options.name, measured.is_err());
    measured.and_then(|report| removed.map(|()| report))
}

/// A fresh file with the program's content, even if the old one still runs.
fn place(program: &Path, target: &Path) -> Result<()> {
    if target.exists() {
        std::fs::remove_file(target).with_context(|| format!("cannot remove {}", target.display()))?;
    }
    std::fs::copy(program, target).with_context(|| format!("cannot copy {}", program.display()))?;
    Ok(())
}

/// The cluster in which the kubelets of one node are exchanged.
struct Bed {
    plan: Plan,
    under_test: PathBuf,
}

fn measure(bed: &Bed, programs: [&Path; 2], args: &NodeArgs) -> Result<String> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the runtime")?;
    runtime.block_on(async {
        let client = apimachinery::process::client_from_kubeconfig(&bed.plan.kubeconfig(), "ketch-bench").await?;
        let mut sides = Vec::new();
        for program in programs {
            eprintln!("{} on {NODE}", program.display());
            bed.switch(program, &client).await?;
            sides.push(bed.figures(&client, args).await.with_context(|| program.display().to_string())?);
        }
        let conditions = Conditions { interval: Duration::from_secs(args.idle), cpus: cpus(), load: load()? };
        let [ours, theirs] = sides.as_slice() else { bail!("two kubelets are compared, not {}", sides.len()) };
        Ok(report(ours, theirs, &conditions))
    })
}

impl Bed {
    /// Ends the node's kubelet and starts this one in its place.
    async fn switch(&self, program: &Path, client: &Client) -> Result<()> {
        let unit = |action| supervisor::request(&self.plan.node_dir(NODE), action, Some(KUBELET.to_owned()));
        unit(Action::Stop)?;
        place(program, &self.under_test)?;
        let since = jiff::Timestamp::now().as_second();
        unit(Action::Start)?;
        let nodes = Api::<Node>::all(client.clone());
        let begun = Instant::now();
        loop {
            let node = nodes.get(NODE).await.context("cannot read the node")?;
            let conditions = node.status.and_then(|status| status.conditions).unwrap_or_default();
            let ready = conditions.iter().find(|condition| condition.type_ == "Ready");
            let heard = ready.and_then(|ready| ready.last_heartbeat_time.as_ref()).map(|time| time.0.as_second());
            if ready.is_some_and(|ready| ready.status == "True") && heard.is_some_and(|heard| heard >= since) {
                return Ok(());
            }
            ensure!(begun.elapsed() < READY_LIMIT, "{NODE} is not ready with it: {ready:?}");
            tokio::time::sleep(POLL).await;
        }
    }

    async fn figures(&self, client: &Client, args: &NodeArgs) -> Result<Figures> {
        let mut figures = Figures { idle: vec![self.idle(0, args).await?], batches: Vec::new() };
        for count in args.pods.iter().copied() {
            let mut batch = Batch { pods: count, ready: Vec::new(), gone: Vec::new() };
            let rounds = args.samples.div_ceil(count.max(1));
            for round in 0..rounds.max(1) {
                eprintln!("{count} pods, round {} of {}", round + 1, rounds.max(1));
                let pods = Pods::new(client, count, round);
                let outcome = async {
                    batch.ready.extend(pods.create().await?);
                    if round == 0 && count >= 10 {
                        figures.idle.push(self.idle(count, args).await?);
                    }
                    batch.gone.extend(pods.delete().await?);
                    anyhow::Ok(())
                };
                if let Err(error) = outcome.await {
                    // What is left must not disturb the next kubelet; the first error is the one to tell.
                    let _ = pods.sweep().await;
                    return Err(error).with_context(|| format!("{count} pods"));
                }
            }
            figures.batches.push(batch);
        }
        Ok(figures)
    }

    async fn idle(&self, pods: u16, args: &NodeArgs) -> Result<Idle> {
        eprintln!("watching the kubelet with {pods} pods for {} s", args.idle);
        collect::settle(&self.plan).await?;
        let usage = collect::observe(&self.plan, Duration::from_secs(args.idle)).await?;
        let kubelet = usage.iter().find(|usage| usage.node == NODE && usage.program == KUBELET);
        let kubelet = kubelet.with_context(|| format!("no kubelet runs on {NODE}"))?;
        Ok(Idle { pods, pss: kubelet.pss, millicores: kubelet.millicores })
    }
}

/// Pods that come and go together.
struct Pods {
    api: Api<Pod>,
    label: String,
    names: Vec<String>,
}

impl Pods {
    fn new(client: &Client, count: u16, round: u16) -> Self {
        let label = format!("{}-{count}-{round}", std::process::id());
        let names = (0..count).map(|index| format!("bench-{label}-{index}")).collect();
        Self { api: Api::default_namespaced(client.clone()), label, names }
    }

    fn selector(&self) -> String {
        format!("bench={}", self.label)
    }

    fn pod(&self, name: &str) -> Result<Pod> {
        serde_json::from_value(json!({
            "metadata": {"name": name, "labels": {"bench": self.label}},
            "spec": {
                "nodeName": NODE,
                "terminationGracePeriodSeconds": 1,
                "containers": [{"name": "main", "image": images::DEMO, "command": ["sleep", "10000"]}],
            },
        }))
        .context("the pod is malformed")
    }

    /// From each pod's creation to the event that shows it Ready.
    async fn create(&self) -> Result<Vec<Duration>> {
        let act = |name: String| async move {
            self.api.create(&PostParams::default(), &self.pod(&name)?).await.context("cannot create it").map(drop)
        };
        self.timed("Ready", act, latency::is_ready).await
    }

    /// From each pod's deletion, with one second of grace that is used up, to the event that says it is gone.
    async fn delete(&self) -> Result<Vec<Duration>> {
        let act = |name: String| async move {
            self.api.delete(&name, &DeleteParams::default()).await.context("cannot delete it").map(drop)
        };
        self.timed("gone", act, |event| matches!(event, WatchEvent::Deleted(_))).await
    }

    async fn sweep(&self) -> kube::Result<()> {
        let all = ListParams::default().labels(&self.selector());
        self.api.delete_collection(&DeleteParams::default().grace_period(0), &all).await.map(drop)
    }

    /// Does `act` for every pod, a few at a time, and takes the time from there to the first event of each that is as
    /// wanted.
    async fn timed<F, A>(&self, what: &str, act: F, wanted: fn(&WatchEvent<Pod>) -> bool) -> Result<Vec<Duration>>
    where
        F: Fn(String) -> A,
        A: Future<Output = Result<()>>,
    {
        let list = self.api.list(&ListParams::default().labels(&self.selector())).await.context("cannot list")?;
        let version = list.metadata.resource_version.context("the list has no version")?;
        let watch = WatchParams::default().labels(&self.selector());
        let mut events = std::pin::pin!(self.api.watch(&watch, &version).await.context("cannot watch")?);
        let starts: Mutex<HashMap<String, Instant>> = Mutex::default();
        let act = &act;
        let acts = stream::iter(self.names.iter().cloned()).map(|name| {
            locked(&starts).insert(name.clone(), Instant::now());
            async move { act(name.clone()).await.with_context(|| format!("pod {name}")) }
        });
        let acts = acts.buffer_unordered(AT_ONCE).try_collect::<()>();
        let mut took: HashMap<String, Duration> = HashMap::new();
        let seen = async {
            while took.len() < self.names.len() {
                let event = events.next().await.context("the server ended the watch")?.context("the watch failed")?;
                let (true, Some(name)) = (wanted(&event), name_of(&event)) else { continue };
                if let Some(start) = locked(&starts).get(&name) {
                    took.entry(name).or_insert(start.elapsed());
                }
            }
            anyhow::Ok(())
        };
        let both = async { tokio::try_join!(acts, seen) };
        let outcome = tokio::time::timeout(LIMIT, both).await;
        let (seen, all) = (took.len(), self.names.len());
        outcome.with_context(|| format!("after {} s {seen} of {all} pods are {what}", LIMIT.as_secs()))??;
        Ok(took.into_values().collect())
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn name_of(event: &WatchEvent<Pod>) -> Option<String> {
    match event {
        WatchEvent::Added(pod) | WatchEvent::Modified(pod) | WatchEvent::Deleted(pod) => pod.metadata.name.clone(),
        WatchEvent::Bookmark(_) | WatchEvent::Error(_) => None,
    }
}

/// What this project has promised itself.
enum Target {
    /// Ours may be at most this part of upstream's.
    Share(f64),
    /// In the figure's own unit.
    AtMost(f64),
    None,
}

struct Row {
    name: String,
    ours: Option<f64>,
    theirs: Option<f64>,
    unit: Unit,
    target: Target,
}

impl Row {
    fn cells(self) -> Vec<String> {
        let (promise, met) = match (&self.target, self.ours, self.theirs) {
            (Target::Share(share), Some(ours), Some(theirs)) => (format!("≤ {share} ×"), Some(ours <= share * theirs)),
            (Target::AtMost(most), Some(ours), _) => {
                (format!("≤ {}", show(Some(*most), self.unit)), Some(ours <= *most))
            }
            _ => ("".to_owned(), None),
        };
        let verdict = match met {
            Some(true) => format!("{promise}: met"),
            Some(false) => format!("{promise}: missed"),
            None => "".to_owned(),
        };
        vec![
            self.name,
            show(self.ours, self.unit),
            show(self.theirs, self.unit),
            ratio(self.ours, self.theirs),
            verdict,
        ]
    }
}

fn report(ours: &Figures, theirs: &Figures, conditions: &Conditions) -> String {
    let mut rows = Vec::new();
    for (a, b) in ours.batches.iter().zip(&theirs.batches) {
        let count = if a.pods == 1 { "1 pod".to_owned() } else { format!("{} pods at once", a.pods) };
        let mut add = |what: &str, percent, pick: fn(&Batch) -> &Vec<Duration>, target| {
            let name = format!("{count}: {what}, {}", if percent == 50 { "median" } else { "p99" });
            let (ours, theirs) = (percentile(pick(a), percent), percentile(pick(b), percent));
            rows.push(Row { name, ours, theirs, unit: Unit::Seconds, target });
        };
        let (start, end) = match a.pods {
            1 => (Target::Share(0.7), Target::AtMost(1.5)),
            _ => (Target::None, Target::None),
        };
        add("create → Ready", 50, |batch| &batch.ready, start);
        add("create → Ready", 99, |batch| &batch.ready, Target::None);
        add("delete (grace 1 s) → gone", 50, |batch| &batch.gone, end);
        add("delete (grace 1 s) → gone", 99, |batch| &batch.gone, Target::None);
    }
    for (a, b) in ours.idle.iter().zip(&theirs.idle) {
        let mut add = |what: &str, ours, theirs, unit, share| {
            let name = format!("idle {what} with {} pods", a.pods);
            rows.push(Row { name, ours: Some(ours), theirs: Some(theirs), unit, target: Target::Share(share) });
        };
        add("CPU", a.millicores, b.millicores, Unit::Millicores, 0.2);
        add("Pss", a.pss, b.pss, Unit::Mebibytes, 0.25);
    }
    let header = ["figure", "Ketch", "upstream", "upstream ÷ Ketch", "target"].map(str::to_owned);
    let rows: Vec<_> = rows.into_iter().map(Row::cells).collect();
    format!(
        "{}\nCPU over {} s on a machine with {} CPUs; load of the whole machine {}.\n",
        table(&header, &rows),
        conditions.interval.as_secs(),
        conditions.cpus,
        conditions.load
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(ready: u64, gone: u64, millicores: f64) -> Figures {
        let batch =
            Batch { pods: 1, ready: vec![Duration::from_millis(ready)], gone: vec![Duration::from_millis(gone)] };
        Figures { idle: vec![Idle { pods: 0, pss: 10.0, millicores }], batches: vec![batch] }
    }

    #[test]
    fn promises_are_judged() {
        let conditions = Conditions { interval: Duration::from_secs(30), cpus: 2, load: "0.1".into() };
        let text = report(&figures(139, 1600, 1.0), &figures(200, 4000, 6.0), &conditions);
        let row = |start: &str| text.lines().find(|line| line.contains(start)).unwrap_or_else(|| panic!("{text}"));
        assert!(row("create → Ready, median").contains("≤ 0.7 ×: met"), "{text}");
        assert!(row("→ gone, median").contains("≤ 1.50 s: missed"), "{text}");
        assert!(row("idle CPU").contains("6.0× | ≤ 0.2 ×: met"), "{text}");
        assert!(row("idle Pss").contains("≤ 0.25 ×: missed"), "{text}");
        assert!(!row("create → Ready, p99").contains("met"), "{text}");
    }
}
