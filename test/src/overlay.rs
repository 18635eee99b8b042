//! A laboratory for overlay networks: virtual nodes (network namespaces) around a bridge, etcd on the bridge's side,
//! pods behind the nodes, and any flannel daemons on them. Packets prove what works.
//!
//! Needs root, `ip`, `etcd`, `etcdctl` and `socat`. Everything that it makes ends with the value.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::{check, poll};

/// Long enough for a busy machine; what is waited for takes a fraction.
pub const PATIENCE: Duration = Duration::from_secs(45);
const ETCD: &str = "http://10.77.0.1:2379";
/// The key prefix that flannel uses by default.
pub const PREFIX: &str = "/coreos.com/network";

pub struct Lab {
    name: String,
    directory: TempDir,
    namespaces: Vec<String>,
    processes: Vec<(String, Child)>,
}

fn run(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    output.unwrap_or_else(|error| panic!("cannot run {program}: {error}"))
}

/// Runs a program, which must succeed; answers what it printed.
pub fn must(program: &str, arguments: &[&str]) -> String {
    let output = run(program, arguments);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {}: {errors}", arguments.join(" "));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// `ip` with the words of one line.
pub fn ip(line: &str) -> String {
    must("ip", &line.split(' ').collect::<Vec<_>>())
}

impl Lab {
    /// A bridge with etcd, and no node yet.
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("kfl{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let directory = TempDir::new().expect("a temporary directory");
        let mut lab = Self { name, directory, namespaces: Vec::new(), processes: Vec::new() };
        let fabric = lab.namespace("f");
        ip(&format!("-n {fabric} link add br0 type bridge"));
        ip(&format!("-n {fabric} addr add 10.77.0.1/24 dev br0"));
        ip(&format!("-n {fabric} addr add fd77::1/64 dev br0 nodad"));
        ip(&format!("-n {fabric} link set br0 up"));
        lab.start_etcd();
        lab
    }

    pub fn start_etcd(&mut self) {
        let data = self.path("etcd").display().to_string();
        let fabric = self.fabric();
        let peer = "http://127.0.0.1:2380";
        let arguments = [
            "--data-dir",
            &data,
            "--listen-client-urls",
            ETCD,
            "--advertise-client-urls",
            ETCD,
            "--listen-peer-urls",
            peer,
        ];
        self.spawn("etcd", &fabric, Path::new("etcd"), &arguments);
        poll("etcd answers", PATIENCE, || self.etcdctl(&["endpoint", "health"]));
    }

    /// Writes a network configuration under a prefix.
    pub fn configure(&self, prefix: &str, network: &Value) {
        self.put(&format!("{prefix}/config"), &network.to_string());
    }

    pub fn put(&self, key: &str, value: &str) {
        self.etcdctl(&["put", "--", key, value]).unwrap_or_else(|error| panic!("put {key}: {error}"));
    }

    pub fn get(&self, key: &str) -> String {
        self.etcdctl(&["get", "--print-value-only", key]).unwrap_or_else(|error| panic!("get {key}: {error}"))
    }

    /// The keys of all leases under the default prefix.
    pub fn leases(&self) -> String {
        let listing = self.etcdctl(&["get", "--prefix", "--keys-only", &format!("{PREFIX}/subnets/")]);
        listing.unwrap_or_else(|error| panic!("list the leases: {error}"))
    }

    pub fn delete(&self, key: &str) {
        self.etcdctl(&["del", key]).unwrap_or_else(|error| panic!("del {key}: {error}"));
    }

    pub fn etcdctl(&self, arguments: &[&str]) -> Result<String, String> {
        let endpoint = format!("--endpoints={ETCD}");
        let fabric = self.fabric();
        let command = ["netns", "exec", &fabric, "env", "ETCDCTL_API=3", "etcdctl", &endpoint];
        outcome(&run("ip", &[&command, arguments].concat()))
    }

    pub fn fabric(&self) -> String {
        format!("{}-f", self.name)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn namespace(&mut self, suffix: &str) -> String {
        let name = format!("{}-{suffix}", self.name);
        ip(&format!("netns add {name}"));
        self.namespaces.push(name.clone());
        ip(&format!("-n {name} link set lo up"));
        name
    }

    /// A node with the address 10.77.0.NUMBER and fd77::NUMBER on eth0; answers its namespace.
    pub fn node(&mut self, number: u8) -> String {
        let fabric = self.fabric();
        let node = self.namespace(&format!("n{number}"));
        ip(&format!("-n {node} link add eth0 type veth peer name v{number} netns {fabric}"));
        ip(&format!("-n {fabric} link set v{number} master br0 up"));
        ip(&format!("-n {node} addr add 10.77.0.{number}/24 dev eth0"));
        ip(&format!("-n {node} addr add fd77::{number}/64 dev eth0 nodad"));
        ip(&format!("-n {node} link set eth0 up"));
        ip(&format!("-n {node} route add default via 10.77.0.1"));
        ip(&format!("-n {node} -6 route add default via fd77::1"));
        for setting in ["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"] {
            must("ip", &["netns", "exec", &node, "sysctl", "-qw", setting]);
        }
        node
    }

    pub fn spawn(&mut self, title: &str, namespace: &str, program: &Path, arguments: &[&str]) {
        let log = File::options().create(true).append(true).open(self.log_path(title)).expect("a log file");
        let child = Command::new("ip")
            .args(["netns", "exec", namespace])
            .arg(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot run ip netns exec {namespace} {}: {error}", program.display()));
        self.processes.push((title.to_owned(), child));
    }

    /// Ends a process at once, as a crash does.
    pub fn kill(&mut self, title: &str) {
        let position = self.processes.iter().position(|(name, _)| name == title);
        let (_, mut child) = self.processes.remove(position.unwrap_or_else(|| panic!("{title} does not run")));
        child.kill().unwrap_or_else(|error| panic!("kill {title}: {error}"));
        child.wait().unwrap_or_else(|error| panic!("wait for {title}: {error}"));
    }

    /// Whether a process has not ended by itself.
    pub fn runs(&mut self, title: &str) -> bool {
        let process = self.processes.iter_mut().find(|(name, _)| name == title);
        process.is_some_and(|(_, child)| child.try_wait().is_ok_and(|status| status.is_none()))
    }

    pub fn log(&self, title: &str) -> String {
        std::fs::read_to_string(self.log_path(title)).unwrap_or_default()
    }

    fn log_path(&self, title: &str) -> PathBuf {
        self.path(&format!("{title}.log"))
    }

    /// Starts a flannel daemon on the node with its subnet file and etcd.
    pub fn flanneld(&mut self, node: &str, program: &Path, arguments: &[&str]) {
        let subnet_file = format!("--subnet-file={}", self.subnet_file(node).display());
        let endpoints = format!("--etcd-endpoints={ETCD}");
        let all = [&[endpoints.as_str(), subnet_file.as_str(), "--iface=eth0"], arguments].concat();
        self.spawn(&format!("flanneld-{node}"), node, program, &all);
    }

    pub fn stop_flanneld(&mut self, node: &str) {
        self.kill(&format!("flanneld-{node}"));
    }

    pub fn subnet_file(&self, node: &str) -> PathBuf {
        self.path(&format!("{node}.env"))
    }

    /// Waits for a variable of the node's subnet file, such as `FLANNEL_SUBNET`.
    pub fn variable(&self, node: &str, name: &str) -> String {
        poll(&format!("{node} has {name}"), PATIENCE, || {
            let text = std::fs::read_to_string(self.subnet_file(node)).unwrap_or_default();
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            line.map(str::to_owned).ok_or_else(|| format!("{text}{}", tail(&self.log(&format!("flanneld-{node}")))))
        })
    }

    /// A pod with the tenth address of the node's subnets, behind a bridge as the CNI plugin makes it. Answers its
    /// namespace and its addresses.
    pub fn pod(&mut self, node: &str) -> (String, Vec<String>) {
        let mtu = self.variable(node, "FLANNEL_MTU");
        let text = std::fs::read_to_string(self.subnet_file(node)).expect("the subnet file");
        let gateways: Vec<String> = ["FLANNEL_SUBNET=", "FLANNEL_IPV6_SUBNET="]
            .iter()
            .filter_map(|name| text.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned))
            .collect();
        let suffix = format!("p{}", self.namespaces.len());
        let pod = self.namespace(&suffix);
        if !run("ip", &["-n", node, "link", "show", "cni0"]).status.success() {
            ip(&format!("-n {node} link add cni0 type bridge"));
            ip(&format!("-n {node} link set cni0 mtu {mtu} up"));
        }
        ip(&format!("-n {pod} link add eth0 mtu {mtu} type veth peer name {suffix} mtu {mtu} netns {node}"));
        ip(&format!("-n {node} link set {suffix} master cni0 up"));
        ip(&format!("-n {pod} link set eth0 up"));
        let mut addresses = Vec::new();
        for gateway in &gateways {
            let (first, length) = gateway.split_once('/').expect("a subnet with its length");
            let nodad = if first.contains(':') { " nodad" } else { "" };
            // .1 becomes .10, and ::1 becomes ::10.
            let address = format!("{first}0");
            run("ip", &["-n", node, "addr", "add", gateway, "dev", "cni0"]);
            ip(&format!("-n {pod} addr add {address}/{length} dev eth0{nodad}"));
            ip(&format!("-n {pod} route add default via {first}"));
            addresses.push(address);
        }
        (pod, addresses)
    }

    /// A refused connection is a round trip: the answer came from the other side. Answers how long it took until the
    /// first.
    pub fn reaches(&self, from: &str, to: &str) -> Duration {
        let started = Instant::now();
        let connect = format!("exec 3<>/dev/tcp/{to}/9");
        poll(&format!("{from} reaches {to}"), PATIENCE, || {
            let output = run("ip", &["netns", "exec", from, "timeout", "1", "bash", "-c", &connect]);
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            check(text.contains("Connection refused"), || format!("{}: {text}", output.status))
        });
        started.elapsed()
    }

    /// Sends some megabytes, which arrive as they were.
    pub fn transfers(&self, from: &str, to: (&str, &str)) {
        let (target, address) = to;
        let (source, copy) = (self.path("source"), self.path("copy"));
        let mut bytes = Vec::new();
        let random = File::open("/dev/urandom").expect("random bytes");
        random.take(4 << 20).read_to_end(&mut bytes).expect("random bytes");
        std::fs::write(&source, &bytes).expect("write the source");
        let host = if address.contains(':') { format!("[{address}]") } else { address.to_owned() };
        let family = if address.contains(':') { "TCP6" } else { "TCP4" };
        poll(&format!("{from} sends to {address}"), PATIENCE, || {
            let mut listener = Command::new("ip")
                .args(["netns", "exec", target, "timeout", "30", "socat", "-u"])
                .arg(format!("{family}-LISTEN:7000,reuseaddr"))
                .arg(format!("CREATE:{}", copy.display()))
                .spawn()
                .map_err(|error| error.to_string())?;
            let sent = outcome(&run(
                "ip",
                &[
                    "netns",
                    "exec",
                    from,
                    "timeout",
                    "30",
                    "socat",
                    "-u",
                    &format!("OPEN:{}", source.display()),
                    &format!("{family}:{host}:7000,retry=20,interval=0.1"),
                ],
            ));
            let received = listener.wait().map_err(|error| error.to_string())?;
            sent?;
            check(received.success() && std::fs::read(&copy).is_ok_and(|copy| copy == bytes), || {
                format!("what arrived differs ({received})")
            })
        });
    }
}

impl Default for Lab {
    fn default() -> Self {
        Self::new()
    }
}

/// The node's program gets its subnet, as the last part of its key: 10.244.1.1/24 → 10.244.1.0-24.
pub fn lease_key(prefix: &str, subnet: &str) -> String {
    format!("{prefix}/subnets/{}", subnet.replace(".1/", ".0-"))
}

fn outcome(output: &Output) -> Result<String, String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}

impl Drop for Lab {
    fn drop(&mut self) {
        for (title, child) in &mut self.processes {
            let _ = child.kill();
            let _ = child.wait();
            if std::thread::panicking() {
                let log = std::fs::read_to_string(self.directory.path().join(format!("{title}.log")));
                eprintln!("--- {title}\n{}", tail(&log.unwrap_or_default()));
            }
        }
        for namespace in &self.namespaces {
            run("ip", &["netns", "del", namespace]);
        }
    }
}
