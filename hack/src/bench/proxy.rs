//! kube-proxy with thousands of services: this project's and upstream's, one after the other, each on a fresh node
//! that has nothing else to do, fed by one API server. A client reaches a pod through the node:
//!
//! ```text
//! client 10.78.1.2 ── node ── pods 10.78.2.2 … 10.78.2.6 (five addresses of one echo server)
//!                      └──── api 10.78.0.1
//! ```
//!
//! Most services have endpoints that nobody answers for; the last one's are the pods. What is measured is seen from
//! outside (answers through the service, procfs), but for the time of a sync, which both programs tell as a metric.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use futures::{StreamExt, TryStreamExt};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::{Value, json};

use super::netlab::{API, NetLab, Program, pause};
use super::{collect, report};

const ENDPOINTS: usize = 5;
/// Requests that are measured through a service.
const REQUESTS: usize = 2000;
/// Changes that are measured one by one.
const CHANGES: usize = 5;
const LIMIT: Duration = Duration::from_secs(600);
const PORT: u16 = 8080;

#[derive(Args)]
pub struct ProxyArgs {
    /// The directory with upstream's kube-proxy.
    #[arg(long)]
    upstream: PathBuf,
    /// The numbers of services, ascending.
    #[arg(long, value_delimiter = ',', default_value = "1000,10000,30000")]
    services: Vec<usize>,
    /// This project's programs; those beside this one by default.
    #[arg(long)]
    programs: Option<PathBuf>,
    #[arg(long, default_value = "etcd")]
    etcd: PathBuf,
    /// Leave upstream's iptables mode out, which takes longest.
    #[arg(long)]
    skip_iptables: bool,
    /// Write the table to this file, too.
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// A program in a mode.
struct Candidate {
    name: &'static str,
    program: PathBuf,
    mode: &'static str,
}

#[derive(Default)]
struct Figures {
    /// From the start of the program to the first answer through the last service.
    first_answer: Duration,
    /// The proxy's own time for it.
    cold_sync: Duration,
    pss: f64,
    /// Until everything was installed and it was quiet.
    cpu: Duration,
    /// The proxy's own time for one change of endpoints.
    change: Vec<Duration>,
    /// From the answer of the API server to a new service to the first answer through that service.
    new_service: Vec<Duration>,
    request: Vec<Duration>,
    /// Requests that failed while the program was ended and started again, and how many there were.
    restart: (usize, usize),
}

pub fn run(args: &ProxyArgs) -> Result<String> {
    ensure!(nix::unistd::geteuid().is_root(), "namespaces need root: run it with sudo");
    let beside = std::env::current_exe().context("cannot find the running program")?;
    let own = args.programs.clone().unwrap_or_else(|| beside.with_file_name(""));
    let mut candidates = vec![
        Candidate { name: "Ketch nftables", program: own.join("kube-proxy"), mode: "nftables" },
        Candidate { name: "upstream nftables", program: args.upstream.join("kube-proxy"), mode: "nftables" },
    ];
    if !args.skip_iptables {
        let program = args.upstream.join("kube-proxy");
        candidates.push(Candidate { name: "upstream iptables", program, mode: "iptables" });
    }
    let mut lab = NetLab::new()?;
    for name in [API, "client", "pods"] {
        lab.add_namespace(name)?;
    }
    // The node's other end of this link comes and goes; the API server's address stays.
    lab.ip(API, "addr add 10.78.0.1/32 dev lo")?;
    lab.start_api(&args.etcd, &own.join("kube-apiserver"))?;
    serve_pods(&lab)?;
    let mut text = String::new();
    let mut existing = 0;
    for &count in &args.services {
        eprintln!("making services {existing} to {count}");
        populate(&lab, existing, count)?;
        existing = count;
        let mut columns = Vec::new();
        for candidate in &candidates {
            eprintln!("{count} services, {}", candidate.name);
            let figures = measure(&mut lab, candidate, count);
            // One that cannot cope with so many has no figures; the others have theirs.
            columns.push(figures.inspect_err(|error| eprintln!("{}: {error:#}", candidate.name)).ok());
        }
        let part = format!("{count} services with {ENDPOINTS} endpoints each:\n\n{}", table(&candidates, &columns));
        eprintln!("{part}");
        text.push_str(&part);
        text.push('\n');
    }
    Ok(text)
}

/// The service's cluster IP: 10.96.1.0 and up.
fn cluster_ip(index: usize) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 96, 1, 0)) + index as u32)
}

fn service(name: &str, cluster_ip: Ipv4Addr) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {"clusterIP": cluster_ip.to_string(), "ports": [{"name": "http", "port": 80, "targetPort": PORT}]},
    })
}

fn slice(service: &str, addresses: &[Ipv4Addr]) -> Value {
    let endpoints: Vec<Value> = addresses
        .iter()
        .map(|address| json!({"addresses": [address], "nodeName": "elsewhere", "conditions": {"ready": true}}))
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": service, "labels": {"kubernetes.io/service-name": service}},
        "ports": [{"name": "http", "protocol": "TCP", "port": PORT}], "endpoints": endpoints,
    })
}

/// Addresses of nobody.
fn fake_addresses(index: usize) -> Vec<Ipv4Addr> {
    let first = u32::from(Ipv4Addr::new(172, 16, 0, 0)) + (index * ENDPOINTS) as u32;
    (first..first + ENDPOINTS as u32).map(Ipv4Addr::from).collect()
}

fn pod_addresses() -> Vec<Ipv4Addr> {
    (2..2 + ENDPOINTS as u8).map(|last| Ipv4Addr::new(10, 78, 2, last)).collect()
}

fn populate(lab: &NetLab, from: usize, to: usize) -> Result<()> {
    lab.with_client(move |client| async move {
        if from == 0 {
            // It sorts behind all others, so that whoever works in order comes to it last.
            create(&client, "zz-last", cluster_ip(60_000), &pod_addresses()).await?;
        }
        let work = (from..to).map(|index| {
            let client = client.clone();
            async move { create(&client, &format!("svc-{index}"), cluster_ip(index), &fake_addresses(index)).await }
        });
        futures::stream::iter(work).buffer_unordered(64).try_collect::<Vec<()>>().await.map(|_| ())
    })
}

async fn create(client: &Client, name: &str, cluster_ip: Ipv4Addr, addresses: &[Ipv4Addr]) -> Result<()> {
    let decode = |value| serde_json::from_value(value).context("malformed object");
    let slices: Api<kube::api::DynamicObject> = dynamic(client, "discovery.k8s.io", "EndpointSlice", "endpointslices");
    let services: Api<kube::api::DynamicObject> = dynamic(client, "", "Service", "services");
    slices.create(&PostParams::default(), &decode(slice(name, addresses))?).await.context("cannot make a slice")?;
    services
        .create(&PostParams::default(), &decode(service(name, cluster_ip))?)
        .await
        .context("cannot make a service")?;
    Ok(())
}

fn dynamic(client: &Client, group: &str, kind: &str, plural: &str) -> Api<kube::api::DynamicObject> {
    let kind = kube::core::GroupVersionKind::gvk(group, "v1", kind);
    Api::default_namespaced_with(client.clone(), &kube::core::ApiResource::from_gvk_with_plural(&kind, plural))
}

/// One echo server for all addresses: a byte for a byte, then it is done.
fn serve_pods(lab: &NetLab) -> Result<()> {
    let listener = lab.inside("pods", || TcpListener::bind(("0.0.0.0", PORT)).context("cannot listen"))?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A client that gave up is none of the server's business.
            let _ = echo(stream);
        }
    });
    Ok(())
}

fn echo(mut stream: TcpStream) -> std::io::Result<()> {
    let mut byte = [0];
    stream.set_read_timeout(Some(Duration::from_millis(500)))?;
    stream.read_exact(&mut byte)?;
    stream.write_all(&byte)
}

/// A node without any rule.
fn fresh_node(lab: &mut NetLab) -> Result<()> {
    lab.add_namespace("node")?;
    lab.link(("node", "10.78.0.2/24"), (API, "10.78.0.3/24"))?;
    lab.link(("node", "10.78.1.1/24"), ("client", "10.78.1.2/24"))?;
    lab.link(("node", "10.78.2.1/24"), ("pods", "10.78.2.2/24"))?;
    for address in &pod_addresses()[1..] {
        lab.ip("pods", &format!("addr add {address}/24 dev to-node"))?;
    }
    lab.ip("node", "route add 10.78.0.1/32 dev to-api")?;
    for namespace in ["client", "pods"] {
        let gateway = if namespace == "client" { "10.78.1.1" } else { "10.78.2.1" };
        lab.ip(namespace, &format!("route add default via {gateway}"))?;
    }
    lab.ip("node", "route add default via 10.78.1.2")?;
    lab.run("node", &["sysctl", "-qw", "net.ipv4.ip_forward=1"]).map(drop)
}

fn start(lab: &NetLab, candidate: &Candidate) -> Result<Program> {
    let config = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": lab.kubeconfig()}, "clusterCIDR": "10.78.0.0/16", "mode": candidate.mode,
        "hostnameOverride": "node",
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    });
    let file = lab.directory().join("proxy.yaml");
    std::fs::write(&file, config.to_string()).context("cannot write the configuration")?;
    lab.start("node", "kube-proxy", &candidate.program, &[format!("--config={}", file.display())])
}

fn measure(lab: &mut NetLab, candidate: &Candidate, count: usize) -> Result<Figures> {
    fresh_node(lab)?;
    let result = measure_on_node(lab, candidate, count);
    lab.remove_namespace("node")?;
    result
}

fn measure_on_node(lab: &NetLab, candidate: &Candidate, count: usize) -> Result<Figures> {
    let mut figures = Figures::default();
    let last = SocketAddr::from((cluster_ip(60_000), 80));
    let begun = Instant::now();
    let mut proxy = start(lab, candidate)?;
    until_answer(lab, &mut proxy, last)?;
    figures.first_answer = begun.elapsed();
    quiet(&mut proxy)?;
    let (sum, _) = syncs(lab)?;
    figures.cold_sync = sum;
    (figures.pss, figures.cpu) = collect::of_process(proxy.pid()).context("the proxy ended")?;
    figures.request = requests(lab, last)?;
    for index in 0..CHANGES {
        let before = syncs(lab)?;
        change(lab, index)?;
        let after = next_sync(lab, before)?;
        figures.change.push(after);
        quiet(&mut proxy)?;
    }
    for index in 0..CHANGES {
        let number = count + index;
        let address = SocketAddr::from((cluster_ip(59_000 + index), 80));
        let name = format!("new-{number}");
        lab.with_client(
            |client| async move { create(&client, &name, cluster_ip(59_000 + index), &pod_addresses()).await },
        )?;
        let asked = Instant::now();
        until_answer(lab, &mut proxy, address)?;
        figures.new_service.push(asked.elapsed());
        let name = format!("new-{number}");
        lab.with_client(|client| async move { remove(&client, &name).await })?;
        quiet(&mut proxy)?;
    }
    figures.restart = restart(lab, candidate, proxy, last)?;
    Ok(figures)
}

/// Gives a service in the middle another last endpoint.
fn change(lab: &NetLab, index: usize) -> Result<()> {
    lab.with_client(|client| async move {
        let slices = dynamic(&client, "discovery.k8s.io", "EndpointSlice", "endpointslices");
        let mut addresses = fake_addresses(500);
        addresses.pop();
        // A moment in the life of the whole machine makes it another each time.
        let nanos = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |t| t.subsec_nanos());
        addresses.push(Ipv4Addr::new(192, 168, index as u8, (nanos % 251) as u8));
        let patch = json!({"endpoints": slice("svc-500", &addresses)["endpoints"]});
        let patched = slices.patch("svc-500", &PatchParams::default(), &Patch::Merge(patch)).await;
        patched.map(|_| ()).context("cannot change a slice")
    })
}

async fn remove(client: &Client, name: &str) -> Result<()> {
    for api in [
        dynamic(client, "", "Service", "services"),
        dynamic(client, "discovery.k8s.io", "EndpointSlice", "endpointslices"),
    ] {
        api.delete(name, &Default::default()).await.context("cannot remove a service")?;
    }
    Ok(())
}

fn exchange(to: SocketAddr, patience: Duration) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, patience)?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_nodelay(true)?;
    stream.write_all(b"?")?;
    stream.read_exact(&mut [0])?;
    Ok(())
}

fn until_answer(lab: &NetLab, proxy: &mut Program, to: SocketAddr) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let answered = lab.inside("client", || Ok(exchange(to, Duration::from_millis(20)).is_ok()))?;
        if answered {
            return Ok(());
        }
        if proxy.has_ended() || Instant::now() > deadline {
            bail!("{to} does not answer: {}", proxy.last_words());
        }
        pause(Duration::from_millis(1));
    }
}

/// Waits until the program uses next to no CPU.
fn quiet(proxy: &mut Program) -> Result<()> {
    const WINDOW: Duration = Duration::from_millis(700);
    let deadline = Instant::now() + LIMIT;
    let cpu = |proxy: &Program| collect::of_process(proxy.pid()).map(|(_, cpu)| cpu).context("the proxy ended");
    let mut calm = 0;
    let mut before = cpu(proxy)?;
    while calm < 3 {
        ensure!(Instant::now() < deadline, "the proxy never comes to rest: {}", proxy.last_words());
        pause(WINDOW);
        let now = cpu(proxy)?;
        calm = if now - before <= Duration::from_millis(20) { calm + 1 } else { 0 };
        before = now;
    }
    Ok(())
}

/// What the program says that its syncs took together, and how many there were.
fn syncs(lab: &NetLab) -> Result<(Duration, u64)> {
    let text = lab.inside("node", || {
        let mut stream = TcpStream::connect(("127.0.0.1", 10249)).context("no metrics")?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text).context("the metrics are cut off")?;
        Ok(text)
    })?;
    let (mut sum, mut count) = (0.0, 0.0);
    for line in text.lines() {
        let Some(rest) = line.strip_prefix("kubeproxy_sync_proxy_rules_duration_seconds_") else { continue };
        let Some(value) = rest.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok()) else { continue };
        if rest.starts_with("sum") {
            sum += value;
        } else if rest.starts_with("count") {
            count += value;
        }
    }
    ensure!(count > 0.0, "no sync yet");
    Ok((Duration::from_secs_f64(sum), count as u64))
}

/// The time of the sync that follows; of both families together.
fn next_sync(lab: &NetLab, before: (Duration, u64)) -> Result<Duration> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let after = syncs(lab)?;
        if after.1 > before.1 {
            // The other family's may follow at once.
            pause(Duration::from_millis(200));
            return Ok(syncs(lab)?.0 - before.0);
        }
        ensure!(Instant::now() < deadline, "no sync follows a change");
        pause(Duration::from_millis(50));
    }
}

fn requests(lab: &NetLab, to: SocketAddr) -> Result<Vec<Duration>> {
    lab.inside("client", || {
        let mut times = Vec::with_capacity(REQUESTS);
        for _ in 0..REQUESTS {
            let begun = Instant::now();
            exchange(to, Duration::from_secs(2)).context("a request failed")?;
            times.push(begun.elapsed());
        }
        Ok(times)
    })
}

/// Ends the program the hard way and starts it again, while a client asks all the time.
fn restart(lab: &NetLab, candidate: &Candidate, proxy: Program, to: SocketAddr) -> Result<(usize, usize)> {
    let stop = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        let client = scope.spawn(|| {
            lab.inside("client", || {
                let (mut failed, mut all) = (0, 0);
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    all += 1;
                    failed += usize::from(exchange(to, Duration::from_millis(500)).is_err());
                    // Faster, and the client runs out of ports.
                    pause(Duration::from_millis(1));
                }
                Ok((failed, all))
            })
        });
        let again = || {
            drop(proxy);
            let mut again = start(lab, candidate)?;
            // Its metrics tell when it has done its first sync.
            let deadline = Instant::now() + LIMIT;
            while syncs(lab).is_err() {
                ensure!(Instant::now() < deadline && !again.has_ended(), "no restart: {}", again.last_words());
                pause(Duration::from_millis(50));
            }
            quiet(&mut again)
        };
        let result = again();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let asked = client.join().map_err(|_| anyhow::anyhow!("the client panicked"))?;
        result.and(asked)
    })
}

fn table(candidates: &[Candidate], columns: &[Option<Figures>]) -> String {
    let milliseconds = |duration: Duration| format!("{:.2} ms", duration.as_secs_f64() * 1e3);
    let seconds = |duration: Duration| format!("{:.2} s", duration.as_secs_f64());
    let typical = |samples: &[Duration]| {
        report::median(samples).map_or("–".to_owned(), |m| milliseconds(Duration::from_secs_f64(m)))
    };
    let p99 = |samples: &[Duration]| {
        report::percentile(samples, 99).map_or("–".to_owned(), |m| milliseconds(Duration::from_secs_f64(m)))
    };
    type Show<'a> = Box<dyn Fn(&Figures) -> String + 'a>;
    let rows: Vec<(&str, Show<'_>)> = vec![
        ("cold sync", Box::new(|f| seconds(f.cold_sync))),
        ("start → last service answers", Box::new(|f| seconds(f.first_answer))),
        ("CPU until quiet", Box::new(|f| seconds(f.cpu))),
        ("Pss", Box::new(|f| format!("{:.1} MiB", f.pss))),
        ("sync of one changed endpoint, median", Box::new(|f| typical(&f.change))),
        ("new service → it answers, median", Box::new(|f| typical(&f.new_service))),
        ("request through a service, median", Box::new(|f| typical(&f.request))),
        ("request through a service, p99", Box::new(|f| p99(&f.request))),
        ("failed requests during a restart", Box::new(|f| format!("{} of {}", f.restart.0, f.restart.1))),
    ];
    let header: Vec<String> =
        std::iter::once("figure").chain(candidates.iter().map(|c| c.name)).map(str::to_owned).collect();
    let rows: Vec<Vec<String>> = rows
        .iter()
        .map(|(name, show)| {
            let cells = columns.iter().map(|figures| figures.as_ref().map_or_else(|| "–".to_owned(), show));
            std::iter::once((*name).to_owned()).chain(cells).collect()
        })
        .collect();
    report::table(&header, &rows)
}
