//! cluster-dns under load: a mix of the questions that pods ask, for services of an API server of its own. First as
//! many as it can answer, which gives questions for each second of its CPU time; then at a steady rate, which gives
//! how long an answer takes while the server has something to do but is not overrun.

use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use futures::{StreamExt, TryStreamExt};
use hickory_proto::op::{Message, Query};
use hickory_proto::rr::{Name, RecordType};
use k8s_openapi::api::core::v1::Service;
use kube::Api;
use kube::api::PostParams;
use serde_json::json;

use super::netlab::{API, API_IP, NetLab, Program, pause};
use super::{collect, report};

const PORT: u16 = 5353;
/// Questions that wait for their answer at one time, for all that the server can do.
const WINDOW: usize = 32;
const PATIENCE: Duration = Duration::from_secs(1);
const START_LIMIT: Duration = Duration::from_secs(60);

#[derive(Args)]
pub struct DnsArgs {
    /// Services in the cluster.
    #[arg(long, default_value_t = 1000)]
    services: usize,
    /// How long each part lasts, in seconds.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Questions in a second for the second part.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    rate: u64,
    /// This project's programs; those beside this one by default.
    #[arg(long)]
    programs: Option<PathBuf>,
    #[arg(long, default_value = "etcd")]
    etcd: PathBuf,
    /// Write the table to this file, too.
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

pub fn run(args: &DnsArgs) -> Result<String> {
    ensure!(nix::unistd::geteuid().is_root(), "namespaces need root: run it with sudo");
    let beside = std::env::current_exe().context("cannot find the running program")?;
    let own = args.programs.clone().unwrap_or_else(|| beside.with_file_name(""));
    let mut lab = NetLab::new()?;
    lab.add_namespace(API)?;
    lab.ip(API, &format!("addr add {API_IP}/32 dev lo"))?;
    lab.start_api(&args.etcd, &own.join("kube-apiserver"))?;
    eprintln!("making {} services", args.services);
    populate(&lab, args.services)?;
    let server = SocketAddr::from((API_IP, PORT));
    let arguments = [
        format!("--kubeconfig={}", lab.kubeconfig().display()),
        format!("--listen={server}"),
        "--forward=127.0.0.1:9".into(),
    ];
    let mut dns = lab.start(API, "cluster-dns", &own.join("cluster-dns"), &arguments)?;
    let questions = questions(args.services)?;
    wait_until_it_knows(&lab, &mut dns, server, &questions)?;
    let seconds = Duration::from_secs(args.seconds);

    eprintln!("as many questions as it can answer, for {} s", args.seconds);
    let cpu = |dns: &Program| collect::of_process(dns.pid()).context("cluster-dns ended");
    let before = cpu(&dns)?;
    let (answers, lost) = lab.inside(API, || flood(server, &questions, seconds))?;
    let after = cpu(&dns)?;
    let busy = (after.1 - before.1).as_secs_f64();

    eprintln!("{} questions in a second, for {} s", args.rate, args.seconds);
    let (latencies, unanswered) = lab.inside(API, || steady(server, &questions, seconds, args.rate))?;
    let milliseconds = |value: Option<f64>| value.map_or("–".to_owned(), |v| format!("{:.2} ms", v * 1e3));
    let rows = vec![
        vec!["answers in a second".to_owned(), format!("{:.0}", answers as f64 / seconds.as_secs_f64())],
        vec!["CPUs used for them".to_owned(), format!("{:.2}", busy / seconds.as_secs_f64())],
        vec!["answers for each second of CPU time".to_owned(), format!("{:.0}", answers as f64 / busy.max(0.01))],
        vec!["lost".to_owned(), format!("{lost}")],
        vec![format!("at {} in a second: median", args.rate), milliseconds(report::median(&latencies))],
        vec![format!("at {} in a second: p99", args.rate), milliseconds(report::percentile(&latencies, 99))],
        vec![
            format!("at {} in a second: unanswered", args.rate),
            format!("{unanswered} of {}", latencies.len() + unanswered),
        ],
        vec!["Pss".to_owned(), format!("{:.1} MiB", cpu(&dns)?.0)],
    ];
    Ok(report::table(&["cluster-dns".to_owned(), "value".to_owned()], &rows))
}

fn populate(lab: &NetLab, count: usize) -> Result<()> {
    lab.with_client(move |client| async move {
        let api: Api<Service> = Api::default_namespaced(client);
        let work = (0..count).map(|index| {
            let api = api.clone();
            let object = json!({"metadata": {"name": format!("svc-{index}")},
                "spec": {"ports": [{"name": "http", "port": 80}]}});
            async move {
                let service = serde_json::from_value(object).context("malformed service")?;
                api.create(&PostParams::default(), &service).await.map(|_| ()).context("cannot make a service")
            }
        });
        futures::stream::iter(work).buffer_unordered(64).try_collect::<Vec<()>>().await.map(|_| ())
    })
}

/// What pods ask: mostly short names, which the search path makes into one right and some wrong ones.
fn questions(services: usize) -> Result<Vec<Vec<u8>>> {
    let mut all = Vec::new();
    for index in 0..services {
        let service = format!("svc-{index}.default.svc.cluster.local.");
        for (name, wanted) in [
            (service.clone(), RecordType::A),
            (service.clone(), RecordType::AAAA),
            (format!("svc-{index}.default.default.svc.cluster.local."), RecordType::A),
            (format!("_http._tcp.{service}"), RecordType::SRV),
        ] {
            let mut message = Message::query();
            message.metadata.recursion_desired = true;
            message.add_query(Query::query(Name::from_ascii(&name).context("malformed name")?, wanted));
            all.push(message.to_vec().context("a question cannot be written")?);
        }
    }
    Ok(all)
}

fn connected(server: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind((API_IP, 0)).context("no port for a client")?;
    socket.connect(server).context("cannot connect a client")?;
    socket.set_read_timeout(Some(PATIENCE)).context("cannot set a time-out")?;
    Ok(socket)
}

fn wait_until_it_knows(lab: &NetLab, dns: &mut Program, server: SocketAddr, questions: &[Vec<u8>]) -> Result<()> {
    let deadline = Instant::now() + START_LIMIT;
    let last = &questions[questions.len() - 4];
    loop {
        let knows = lab.inside(API, || {
            let socket = connected(server)?;
            let mut answer = [0; 1500];
            let received = socket.send(last).and_then(|_| socket.recv(&mut answer));
            // An answer without error and with a record.
            Ok(received.is_ok() && answer[3] & 15 == 0 && answer[7] > 0)
        })?;
        if knows {
            return Ok(());
        }
        if dns.has_ended() || Instant::now() > deadline {
            bail!("cluster-dns does not know the services: {}", dns.last_words());
        }
        pause(Duration::from_millis(20));
    }
}

/// Keeps a number of questions under way. Answers how many were answered and how many got lost.
fn flood(server: SocketAddr, questions: &[Vec<u8>], duration: Duration) -> Result<(usize, usize)> {
    let socket = connected(server)?;
    let mut answer = [0; 1500];
    let mut next = (0..).map(|n: usize| &questions[n % questions.len()]);
    let mut send = |socket: &UdpSocket| -> Result<()> {
        let question = next.next().context("questions do not end")?;
        socket.send(question).map(|_| ()).context("cannot send")
    };
    for _ in 0..WINDOW {
        send(&socket)?;
    }
    let (mut answered, mut lost) = (0, 0);
    let begun = Instant::now();
    while begun.elapsed() < duration {
        if socket.recv(&mut answer).is_ok() {
            answered += 1;
            send(&socket)?;
        } else {
            lost += WINDOW;
            for _ in 0..WINDOW {
                send(&socket)?;
            }
        }
    }
    Ok((answered, lost))
}

/// Sends at a rate, whatever comes back. A question's id tells which it was.
fn steady(server: SocketAddr, questions: &[Vec<u8>], duration: Duration, rate: u64) -> Result<(Vec<Duration>, usize)> {
    let socket = connected(server)?;
    let receiver = socket.try_clone().context("cannot share a socket")?;
    let begun = Instant::now();
    // Nanoseconds since `begun` at which the question with an id was sent; one more, as 0 stands for none.
    let sent: Vec<AtomicUsize> = (0..=usize::from(u16::MAX)).map(|_| AtomicUsize::new(0)).collect();
    let since = |at: Instant| at.duration_since(begun).as_nanos() as usize;
    thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let mut latencies = Vec::new();
            let mut answer = [0; 1500];
            while let Ok(length) = receiver.recv(&mut answer) {
                let now = since(Instant::now());
                let at = sent[usize::from(u16::from_be_bytes([answer[0], answer[1]]))].swap(0, Ordering::Relaxed);
                if length >= 12 && at > 0 {
                    latencies.push(Duration::from_nanos((now + 1).saturating_sub(at) as u64));
                }
            }
            latencies
        });
        let mut count = 0;
        let total = rate * duration.as_secs();
        let mut question = Vec::new();
        while count < total {
            let due = (begun.elapsed().as_secs_f64() * rate as f64) as u64;
            while count < due.min(total) {
                question.clone_from(&questions[count as usize % questions.len()]);
                let id = (count % 65_536) as u16;
                question[..2].copy_from_slice(&id.to_be_bytes());
                sent[usize::from(id)].store(since(Instant::now()) + 1, Ordering::Relaxed);
                socket.send(&question).context("cannot send")?;
                count += 1;
            }
            pause(Duration::from_micros(100));
        }
        let latencies = receiving.join().map_err(|_| anyhow::anyhow!("the receiver panicked"))?;
        let unanswered = (total as usize).saturating_sub(latencies.len());
        Ok((latencies, unanswered))
    })
}
