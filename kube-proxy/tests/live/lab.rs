//! The namespaces: `node` with the proxy, pods `p1` and `p2` behind it, and `out` (where the API is played, too).
//! Sockets are made on threads that have entered the namespace; they stay there wherever they are used.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use serde_json::json;
use tempfile::TempDir;

use crate::fake_api::FakeApi;

const TIMEOUT: Duration = Duration::from_secs(1);

pub struct Lab {
    mode: String,
    prefix: String,
    directory: TempDir,
    pub api: FakeApi,
    proxy: Option<Child>,
}

fn must(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn ip(arguments: &str) {
    must("ip", &arguments.split(' ').collect::<Vec<_>>());
}

impl Lab {
    pub fn new(mode: &str) -> Self {
        static LABS: AtomicUsize = AtomicUsize::new(0);
        let prefix = format!("kkp{}-{}", std::process::id(), LABS.fetch_add(1, Ordering::Relaxed));
        let lab = Self {
            mode: mode.to_owned(),
            prefix,
            directory: TempDir::new().unwrap(),
            api: FakeApi::new(),
            proxy: None,
        };
        for name in ["node", "p1", "p2", "out"] {
            ip(&format!("netns add {}", lab.namespace(name)));
            ip(&format!("-n {} link set lo up", lab.namespace(name)));
        }
        lab.link("out", "10.78.0.1", "10.78.0.2");
        lab.link("p1", "10.244.1.2", "10.244.1.1");
        lab.link("p2", "10.244.1.3", "10.244.1.1");
        let node = lab.namespace("node");
        must("ip", &["netns", "exec", &node, "sysctl", "-qw", "net.ipv4.ip_forward=1"]);
        // The node needs a route for service addresses, or its own connections fail before they are rewritten.
        ip(&format!("-n {node} route add default via 10.78.0.1"));
        lab.serve_pods();
        lab.serve_api();
        lab
    }

    fn namespace(&self, name: &str) -> String {
        format!("{}-{name}", self.prefix)
    }

    /// A link between the namespace and the node, with one address on each side.
    fn link(&self, name: &str, theirs: &str, nodes: &str) {
        let (node, other) = (self.namespace("node"), self.namespace(name));
        ip(&format!("-n {other} link add eth0 type veth peer name {name} netns {node}"));
        ip(&format!("-n {other} addr add {theirs} peer {nodes} dev eth0"));
        ip(&format!("-n {other} link set eth0 up"));
        ip(&format!("-n {node} addr add {nodes} peer {theirs} dev {name}"));
        ip(&format!("-n {node} link set {name} up"));
        if name != "out" {
            ip(&format!("-n {other} route add default via {nodes}"));
        }
    }

    /// Runs the function on a thread inside the namespace.
    fn inside<T: Send>(&self, name: &str, work: impl FnOnce() -> T + Send) -> T {
        let path = format!("/run/netns/{}", self.namespace(name));
        let enter = move || {
            setns(File::open(path).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
            work()
        };
        thread::scope(|scope| scope.spawn(enter).join().unwrap())
    }

    /// Each pod answers on port 8080: one line with its name and whom it sees, for each byte that it gets.
    fn serve_pods(&self) {
        for (name, address) in [("p1", "10.244.1.2:8080"), ("p2", "10.244.1.3:8080")] {
            let (listener, udp) =
                self.inside(name, || (TcpListener::bind(address).unwrap(), UdpSocket::bind(address).unwrap()));
            thread::spawn(move || {
                for stream in listener.incoming() {
                    thread::spawn(move || serve(name, stream.unwrap()));
                }
            });
            thread::spawn(move || {
                let mut buffer = [0; 16];
                while let Ok((_, peer)) = udp.recv_from(&mut buffer) {
                    let _ = udp.send_to(name.as_bytes(), peer);
                }
            });
        }
    }

    fn serve_api(&self) {
        let listener = self.inside("out", || TcpListener::bind("10.78.0.1:8001").unwrap());
        listener.set_nonblocking(true).unwrap();
        tokio::spawn(self.api.clone().serve(tokio::net::TcpListener::from_std(listener).unwrap()));
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": "http://10.78.0.1:8001"}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}], "users": [{"name": "u", "user": {}}],
        });
        let path = self.directory.path().join("kubeconfig");
        std::fs::write(&path, kubeconfig.to_string()).unwrap();
        self.configure();
    }

    /// Another mode for the next start.
    pub fn set_mode(&mut self, mode: &str) {
        self.mode = mode.to_owned();
        self.configure();
    }

    fn configure(&self) {
        let path = self.directory.path().join("kubeconfig");
        let settings = json!({"syncPeriod": "1s", "minSyncPeriod": "0s"});
        let config = json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
            "clientConnection": {"kubeconfig": path}, "clusterCIDR": "10.244.0.0/16", "mode": self.mode,
            "hostnameOverride": "node1", "nftables": settings, "iptables": settings,
            "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        });
        std::fs::write(self.directory.path().join("proxy.yaml"), config.to_string()).unwrap();
    }

    pub fn start_proxy(&mut self) {
        let log = File::options().create(true).append(true).open(self.directory.path().join("proxy.log")).unwrap();
        let config = format!("--config={}", self.directory.path().join("proxy.yaml").display());
        let namespace = self.namespace("node");
        let child = Command::new("ip")
            .args(["netns", "exec", &namespace, env!("CARGO_BIN_EXE_kube-proxy"), &config, "-v", "4"])
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.proxy = Some(child);
    }

    /// The hard way: nothing can be tidied up.
    pub fn kill_proxy(&mut self) {
        if let Some(mut child) = self.proxy.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// What a tool prints inside the node.
    pub fn on_node(&self, command: &[&str]) -> String {
        let output =
            Command::new("ip").args(["netns", "exec", &self.namespace("node")]).args(command).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// What a firewall's reload does.
    pub fn remove_rules(&self) {
        must("ip", &["netns", "exec", &self.namespace("node"), "nft", "flush", "ruleset"]);
    }

    pub fn connect(&self, from: &str, to: &str) -> Result<TcpStream, String> {
        let to: SocketAddr = to.parse().unwrap();
        let stream = self.inside(from, || TcpStream::connect_timeout(&to, TIMEOUT)).map_err(|e| e.to_string())?;
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        Ok(stream)
    }

    /// Which pod answers, and which client address it saw.
    pub fn ask(&self, from: &str, to: &str) -> Result<(String, String), String> {
        let mut stream = self.connect(from, to)?;
        let line = exchange(&mut stream)?;
        let (pod, peer) = line.split_once(' ').ok_or_else(|| line.clone())?;
        Ok((pod.to_owned(), peer.to_owned()))
    }

    /// Once more on an open connection; the name of the pod.
    pub fn echo(&self, stream: &mut TcpStream) -> String {
        exchange(stream).unwrap().split(' ').next().unwrap().to_owned()
    }

    pub fn udp_client(&self, from: &str, to: &str) -> UdpSocket {
        let socket = self.inside(from, || UdpSocket::bind("0.0.0.0:40000").unwrap());
        socket.connect(to).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        socket
    }

    pub fn udp_ask(&self, socket: &UdpSocket) -> String {
        let mut buffer = [0; 16];
        match socket.send(b"?").and_then(|_| socket.recv(&mut buffer)) {
            Ok(length) => String::from_utf8_lossy(&buffer[..length]).into_owned(),
            Err(error) => error.to_string(),
        }
    }

    /// The body that an HTTP server gives.
    pub fn get(&self, from: &str, to: &str, path: &str) -> Result<String, String> {
        let mut stream = self.connect(from, to)?;
        let mut text = String::new();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).map_err(|error| error.to_string())?;
        stream.read_to_string(&mut text).map_err(|error| error.to_string())?;
        text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).ok_or(text)
    }
}

fn serve(name: &str, mut stream: TcpStream) {
    let mut byte = [0];
    while matches!(stream.read(&mut byte), Ok(1)) {
        let peer = stream.peer_addr().unwrap().ip();
        if stream.write_all(format!("{name} {peer}\n").as_bytes()).is_err() {
            return;
        }
    }
}

fn exchange(stream: &mut TcpStream) -> Result<String, String> {
    stream.write_all(b"?").map_err(|error| error.to_string())?;
    let mut buffer = [0; 64];
    let length = stream.read(&mut buffer).map_err(|error| error.to_string())?;
    Ok(String::from_utf8_lossy(&buffer[..length]).trim().to_owned())
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(mut child) = self.proxy.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if thread::panicking() {
            let log = std::fs::read_to_string(self.directory.path().join("proxy.log"));
            eprintln!("--- kube-proxy\n{}", log.unwrap_or_default());
        }
        for name in ["node", "p1", "p2", "out"] {
            let _ = Command::new("ip").args(["netns", "del", &self.namespace(name)]).output();
        }
    }
}
