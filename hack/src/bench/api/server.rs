//! A server under test with an etcd of its own, both on loopback: started, stopped, and watched from outside through
//! procfs. Both sides get the same flags and the same etcd.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::time::clock_getcpuclockid;
use nix::unistd::Pid;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

use super::client::{Connection, Endpoint, Request};
use crate::bench::collect;
use crate::cluster::pki;

pub const TOKEN: &str = "ketch-bench-admin";
const START_LIMIT: Duration = Duration::from_secs(120);
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// How often a server that starts is asked whether it is ready. It bounds how exact the time is.
const POLL: Duration = Duration::from_millis(4);

/// Makes the keys that both sides share.
pub fn create_keys(dir: &Path) -> Result<()> {
    pki::create_for_loopback(dir)?;
    let tokens = dir.join("tokens.csv");
    std::fs::write(&tokens, format!("{TOKEN},bench,bench-uid,\"system:masters\"\n"))
        .with_context(|| format!("cannot write {}", tokens.display()))
}

/// A running process; it is killed when this is dropped.
pub struct Process {
    name: &'static str,
    child: Child,
    pid: Pid,
}

/// Where one side's programs are and where it keeps its data.
pub struct Place {
    pub server: PathBuf,
    pub etcd: PathBuf,
    pub keys: PathBuf,
    pub dir: PathBuf,
}

impl Place {
    /// Starts an etcd with nothing in it and waits until it answers.
    pub async fn start_etcd(&self) -> Result<(Process, u16)> {
        let data = self.dir.join("etcd");
        if data.exists() {
            std::fs::remove_dir_all(&data).with_context(|| format!("cannot empty {}", data.display()))?;
        }
        let (client, peer) = (free_port()?, free_port()?);
        let url = |port| format!("http://127.0.0.1:{port}");
        let args = [
            "--name=bench".into(),
            format!("--data-dir={}", data.display()),
            format!("--listen-client-urls={}", url(client)),
            format!("--advertise-client-urls={}", url(client)),
            format!("--listen-peer-urls={}", url(peer)),
            format!("--initial-advertise-peer-urls={}", url(peer)),
            format!("--initial-cluster=bench={}", url(peer)),
            "--quota-backend-bytes=8589934592".into(),
            "--logger=zap".into(),
            "--log-level=warn".into(),
        ];
        let mut etcd = Process::start("etcd", &self.etcd, &args, &self.dir)?;
        let deadline = Instant::now() + START_LIMIT;
        while !is_healthy(client).await {
            etcd.check_alive(&self.dir)?;
            if Instant::now() > deadline {
                bail!("etcd does not answer after {START_LIMIT:?}: see {}", self.dir.display());
            }
            sleep(Duration::from_millis(50)).await;
        }
        Ok((etcd, client))
    }

    /// Starts the server and waits until it says that it is ready; how long that took.
    pub async fn start_server(&self, etcd: u16) -> Result<(Process, Endpoint, Duration)> {
        let port = free_port()?;
        let key = |name: &str| self.keys.join(name).display().to_string();
        let args = [
            format!("--etcd-servers=http://127.0.0.1:{etcd}"),
            "--bind-address=127.0.0.1".into(),
            format!("--secure-port={port}"),
            "--endpoint-reconciler-type=none".into(),
            "--service-cluster-ip-range=10.96.0.0/16".into(),
            "--allow-privileged=true".into(),
            "--authorization-mode=Node,RBAC".into(),
            "--enable-admission-plugins=NodeRestriction".into(),
            "--enable-bootstrap-token-auth=true".into(),
            format!("--client-ca-file={}", key("ca.crt")),
            format!("--tls-cert-file={}", key("apiserver.crt")),
            format!("--tls-private-key-file={}", key("apiserver.key")),
            format!("--token-auth-file={}", key("tokens.csv")),
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local".into(),
            format!("--service-account-key-file={}", key("sa.pub")),
            format!("--service-account-signing-key-file={}", key("sa.key")),
        ];
        let endpoint = Endpoint::new(SocketAddr::from((Ipv4Addr::LOCALHOST, port)), &self.keys.join("ca.crt"), TOKEN)?;
        let start = Instant::now();
        let mut server = Process::start("kube-apiserver", &self.server, &args, &self.dir)?;
        let mut last;
        loop {
            match is_ready(&endpoint).await {
                Ok(()) => return Ok((server, endpoint, start.elapsed())),
                Err(error) => last = error,
            }
            server.check_alive(&self.dir)?;
            if start.elapsed() > START_LIMIT {
                bail!(
                    "{} is not ready after {START_LIMIT:?}: {last:#}; see {}",
                    self.server.display(),
                    self.dir.display()
                );
            }
            sleep(POLL).await;
        }
    }
}

async fn is_ready(endpoint: &Endpoint) -> Result<()> {
    let connection: Connection = endpoint.connect().await?;
    connection.ask(&Request::get("/readyz")).await?.expect(http::StatusCode::OK)
}

async fn is_healthy(port: u16) -> bool {
    let answer = async {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.ok()?;
        stream.write_all(b"GET /health HTTP/1.0\r\n\r\n").await.ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await.ok()?;
        text.contains("\"health\":\"true\"").then_some(())
    };
    timeout(Duration::from_secs(2), answer).await.is_ok_and(|answer| answer.is_some())
}

/// A port that is free now; whoever starts at once gets it.
fn free_port() -> Result<u16> {
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no port is free")?;
    Ok(listener.local_addr().context("no port is free")?.port())
}

impl Process {
    fn start(name: &'static str, program: &Path, args: &[String], dir: &Path) -> Result<Self> {
        let path = dir.join(format!("{name}.log"));
        let log = || -> Result<File> {
            let mut options = File::options();
            options.create(true).append(true).open(&path).with_context(|| format!("cannot write {}", path.display()))
        };
        let child = Command::new(program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(log()?)
            .stderr(log()?)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let pid = child.id().and_then(|id| i32::try_from(id).ok()).context("the process has no id")?;
        Ok(Self { name, child, pid: Pid::from_raw(pid) })
    }

    fn check_alive(&mut self, dir: &Path) -> Result<()> {
        match self.child.try_wait().context("cannot look at the process")? {
            None => Ok(()),
            Some(status) => bail!("{} ended with {status}: see {}", self.name, dir.display()),
        }
    }

    /// Ends the process as a service manager does: politely first.
    pub async fn stop(mut self) -> Result<()> {
        kill(self.pid, Signal::SIGTERM).with_context(|| format!("cannot stop {}", self.name))?;
        if timeout(STOP_LIMIT, self.child.wait()).await.is_err() {
            eprintln!("{} did not stop in {STOP_LIMIT:?} and is killed", self.name);
            self.child.kill().await.with_context(|| format!("cannot kill {}", self.name))?;
        }
        Ok(())
    }

    /// The CPU time of all its threads so far.
    pub fn cpu(&self) -> Result<Duration> {
        let now = clock_getcpuclockid(self.pid).and_then(nix::time::ClockId::now);
        now.map(Duration::from).with_context(|| format!("{} is gone", self.name))
    }

    /// Proportional set size, in MiB.
    pub fn pss(&self) -> Result<f64> {
        let memory = collect::memory_of(self.pid.as_raw()).with_context(|| format!("{} is gone", self.name))?;
        Ok(memory.pss as f64 / 1024.0)
    }
}
