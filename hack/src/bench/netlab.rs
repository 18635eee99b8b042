//! A small network for measurements of single programs: namespaces with names of this process, links between them, an
//! API server on an etcd of its own, and programs that run inside. Dropping it ends and removes all of that.

use std::fs::File;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};
use serde_json::json;

/// Where the API server is; the others reach it over a link.
pub const API: &str = "api";
pub const API_IP: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 1);
const START_LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);

pub struct NetLab {
    prefix: String,
    /// On a file system in memory, so that no disk is measured.
    directory: tempfile::TempDir,
    namespaces: Vec<String>,
    services: Vec<Program>,
}

/// A running program, which ends when this is dropped.
pub struct Program {
    child: Child,
    pub log: PathBuf,
}

impl Program {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// The end of its log, for error messages.
    pub fn last_words(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(5)..].join("\n")
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl NetLab {
    pub fn new() -> Result<Self> {
        let shared_memory = Path::new("/dev/shm");
        let mut builder = tempfile::Builder::new();
        builder.prefix("ketch-bench-");
        let directory = if shared_memory.is_dir() { builder.tempdir_in(shared_memory) } else { builder.tempdir() };
        Ok(Self {
            prefix: format!("kb{}", std::process::id()),
            directory: directory.context("cannot make a directory for the measurement")?,
            namespaces: Vec::new(),
            services: Vec::new(),
        })
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    fn netns(&self, name: &str) -> String {
        format!("{}-{name}", self.prefix)
    }

    pub fn add_namespace(&mut self, name: &str) -> Result<()> {
        ip(&format!("netns add {}", self.netns(name)))?;
        self.namespaces.push(name.to_owned());
        ip(&format!("-n {} link set lo up", self.netns(name)))
    }

    /// With everything in it. Its links go first and by name: the kernel takes its time over a namespace with many rules,
    /// and until then the far ends would be in the way of new ones.
    pub fn remove_namespace(&mut self, name: &str) -> Result<()> {
        for device in self.devices_to_others(name)? {
            self.ip(name, &format!("link del {device}"))?;
        }
        self.namespaces.retain(|known| known != name);
        ip(&format!("netns del {}", self.netns(name)))
    }

    fn devices_to_others(&self, namespace: &str) -> Result<Vec<String>> {
        let listed = self.run(namespace, &["ip", "-oneline", "link", "show", "type", "veth"])?;
        // `2: to-api@if3: <BROADCAST,…`
        let names = listed.lines().filter_map(|line| line.split(": ").nth(1)?.split('@').next());
        Ok(names.map(str::to_owned).collect())
    }

    /// A link between two namespaces, with an address and prefix length for each end.
    pub fn link(&self, left: (&str, &str), right: (&str, &str)) -> Result<()> {
        let (left_ns, right_ns) = (self.netns(left.0), self.netns(right.0));
        let (left_name, right_name) = (format!("to-{}", right.0), format!("to-{}", left.0));
        ip(&format!("-n {left_ns} link add {left_name} type veth peer name {right_name} netns {right_ns}"))?;
        for (namespace, name, address) in [(left_ns, left_name, left.1), (right_ns, right_name, right.1)] {
            ip(&format!("-n {namespace} addr add {address} dev {name}"))?;
            ip(&format!("-n {namespace} link set {name} up"))?;
        }
        Ok(())
    }

    pub fn ip(&self, namespace: &str, arguments: &str) -> Result<()> {
        ip(&format!("-n {} {arguments}", self.netns(namespace)))
    }

    /// Runs a command to its end; what it printed.
    pub fn run(&self, namespace: &str, argv: &[&str]) -> Result<String> {
        let output = Command::new("ip").args(["netns", "exec", &self.netns(namespace)]).args(argv).output();
        let output = output.with_context(|| format!("cannot run {}", argv.join(" ")))?;
        if !output.status.success() {
            bail!("{}: {}", argv.join(" "), String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs the function on a thread inside the namespace. Sockets that it makes stay there.
    pub fn inside<T: Send>(&self, namespace: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let path = PathBuf::from("/run/netns").join(self.netns(namespace));
        let enter = move || {
            let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
            setns(file, CloneFlags::CLONE_NEWNET).context("cannot enter a network namespace")?;
            work()
        };
        match thread::scope(|scope| scope.spawn(enter).join()) {
            Ok(result) => result,
            Err(_) => bail!("a thread in the namespace {namespace} panicked"),
        }
    }

    /// Starts a program inside the namespace.
    pub fn start(&self, namespace: &str, name: &str, program: &Path, arguments: &[String]) -> Result<Program> {
        let log = self.directory().join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log);
        let file = file.with_context(|| format!("cannot write {}", log.display()))?;
        let child = Command::new("ip")
            .args(["netns", "exec", &self.netns(namespace)])
            .arg(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(file.try_clone().context("cannot share a log")?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot run {}", program.display()))?;
        Ok(Program { child, log })
    }

    /// Starts etcd and the API server in their namespace, which must exist, and waits until it is ready.
    pub fn start_api(&mut self, etcd: &Path, apiserver: &Path) -> Result<()> {
        let data = self.directory().join("etcd");
        let client = format!("http://{API_IP}:2379");
        let peer = format!("http://{API_IP}:2380");
        let arguments = [
            format!("--data-dir={}", data.display()),
            format!("--listen-client-urls={client}"),
            format!("--advertise-client-urls={client}"),
            format!("--listen-peer-urls={peer}"),
            format!("--initial-advertise-peer-urls={peer}"),
            format!("--initial-cluster=default={peer}"),
            "--quota-backend-bytes=4294967296".into(),
            "--log-level=error".into(),
        ];
        let etcd = self.start(API, "etcd", etcd, &arguments)?;
        self.services.push(etcd);
        self.wait(2379, "etcd")?;
        let arguments = [
            format!("--etcd-servers={client}"),
            format!("--cert-dir={}", self.directory().display()),
            format!("--advertise-address={API_IP}"),
            "--service-cluster-ip-range=10.96.0.0/16".into(),
            "--authorization-mode=AlwaysAllow".into(),
        ];
        let server = self.start(API, "kube-apiserver", apiserver, &arguments)?;
        self.services.push(server);
        self.wait(6443, "kube-apiserver")?;
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "bench",
            "clusters": [{"name": "bench", "cluster": {
                "server": format!("https://{API_IP}:6443"), "insecure-skip-tls-verify": true}}],
            "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "bench"}}],
            "users": [{"name": "bench", "user": {}}],
        });
        std::fs::write(self.kubeconfig(), kubeconfig.to_string()).context("cannot write a kubeconfig")?;
        self.with_client(|client| async move {
            let namespaces: kube::Api<k8s_openapi::api::core::v1::Namespace> = kube::Api::all(client);
            let deadline = Instant::now() + START_LIMIT;
            // The server makes it after it has begun to listen.
            while let Err(error) = namespaces.get("default").await {
                if Instant::now() > deadline {
                    return Err(error).context("there is no namespace default");
                }
                tokio::time::sleep(POLL).await;
            }
            Ok(())
        })
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.directory().join("kubeconfig")
    }

    /// Until somebody listens on the port.
    fn wait(&mut self, port: u16, what: &str) -> Result<()> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let connect = || Ok(std::net::TcpStream::connect((API_IP, port)).is_ok());
            if self.inside(API, connect)? {
                return Ok(());
            }
            let last = self.services.last_mut();
            if last.is_some_and(|program| program.has_ended()) || Instant::now() > deadline {
                let words = self.services.last().map(Program::last_words).unwrap_or_default();
                bail!("{what} does not listen on port {port}: {words}");
            }
            pause(POLL);
        }
    }

    /// Runs the future inside the namespace of the API server, with a client of it.
    pub fn with_client<T: Send, F>(&self, work: impl FnOnce(kube::Client) -> F + Send) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let kubeconfig = self.kubeconfig();
        self.inside(API, move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.context("cannot start the runtime")?.block_on(async {
                let client = apimachinery::process::client_from_kubeconfig(&kubeconfig, "ketch-bench").await?;
                work(client).await
            })
        })
    }
}

impl Drop for NetLab {
    fn drop(&mut self) {
        self.services.clear();
        for name in std::mem::take(&mut self.namespaces) {
            if let Err(error) = ip(&format!("netns del {}", self.netns(&name))) {
                eprintln!("cannot remove a namespace: {error:#}");
            }
        }
    }
}

/// Measurements run on threads of their own, where waiting holds nobody up.
#[allow(clippy::disallowed_methods)]
pub fn pause(time: Duration) {
    thread::sleep(time);
}

fn ip(arguments: &str) -> Result<()> {
    let output = Command::new("ip").args(arguments.split(' ')).output().context("cannot run ip")?;
    if !output.status.success() {
        bail!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
