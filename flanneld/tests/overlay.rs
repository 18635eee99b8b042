//! Whole daemons on virtual nodes: network namespaces joined by a bridge, etcd on the bridge's side, pods attached by
//! our CNI plugin over the bridge plugin. Packets prove it.
//!
//! Needs root, `etcd`, `ip` and the standard CNI plugins; run with `cargo test -p flanneld -- --ignored`.

// A helper that cannot set up its part of the lab has no better way than to end the test.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use apimachinery::testing::eventually;
use serde_json::{Value, json};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(30);

fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"))
}

fn must(program: &str, arguments: &[&str]) -> String {
    let output = run(program, arguments);
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn ip(arguments: &str) -> String {
    must("ip", &arguments.split(' ').collect::<Vec<_>>())
}

/// A bridge in its own namespace with etcd, and nodes around it; everything ends with the value.
struct Lab {
    name: String,
    directory: TempDir,
    namespaces: Vec<String>,
    processes: Vec<(String, Child)>,
}

impl Lab {
    async fn new(suffix: &str, network: Value) -> Self {
        let name = format!("kfl{}{suffix}", std::process::id());
        let mut lab = Self { name, directory: TempDir::new().unwrap(), namespaces: Vec::new(), processes: Vec::new() };
        let fabric = lab.namespace("f");
        ip(&format!("-n {fabric} link add br0 type bridge"));
        ip(&format!("-n {fabric} addr add 10.77.0.1/24 dev br0"));
        ip(&format!("-n {fabric} link set br0 up"));
        let data = lab.path("etcd");
        lab.spawn(
            "etcd",
            &fabric,
            "etcd",
            &[
                "--data-dir",
                data.to_str().unwrap(),
                "--listen-client-urls",
                "http://10.77.0.1:2379",
                "--advertise-client-urls",
                "http://10.77.0.1:2379",
                "--listen-peer-urls",
                "http://127.0.0.1:2380",
            ],
        );
        let config = network.to_string();
        eventually("etcd takes the configuration", PATIENCE, || async {
            let output = lab.etcdctl(&["put", "/coreos.com/network/config", &config]);
            if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
        })
        .await;
        lab
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn namespace(&mut self, suffix: &str) -> String {
        let name = format!("{}-{suffix}", self.name);
        ip(&format!("netns add {name}"));
        ip(&format!("-n {name} link set lo up"));
        self.namespaces.push(name.clone());
        name
    }

    fn node(&mut self, number: u8) -> String {
        let fabric = format!("{}-f", self.name);
        let node = self.namespace(&format!("n{number}"));
        ip(&format!("-n {node} link add eth0 type veth peer name v{number} netns {fabric}"));
        ip(&format!("-n {fabric} link set v{number} master br0 up"));
        ip(&format!("-n {node} addr add 10.77.0.{number}/24 dev eth0"));
        ip(&format!("-n {node} link set eth0 up"));
        ip(&format!("-n {node} route add default via 10.77.0.1"));
        must("ip", &["netns", "exec", &node, "sysctl", "-qw", "net.ipv4.ip_forward=1"]);
        node
    }

    fn spawn(&mut self, title: &str, namespace: &str, program: &str, arguments: &[&str]) {
        let log = std::fs::File::create(self.path(&format!("{title}.log"))).unwrap();
        let child = Command::new("ip")
            .args(["netns", "exec", namespace, program])
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.processes.push((title.to_owned(), child));
    }

    fn kill(&mut self, title: &str) {
        let position = self.processes.iter().position(|(name, _)| name == title).unwrap();
        let (_, mut child) = self.processes.remove(position);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn flanneld(&mut self, node: &str) {
        let subnet_file = format!("--subnet-file={}", self.path(&format!("{node}.env")).display());
        self.spawn(
            &format!("flanneld-{node}"),
            node,
            env!("CARGO_BIN_EXE_flanneld"),
            &["--etcd-endpoints=http://10.77.0.1:2379", "--iface=eth0", "--ip-masq", &subnet_file],
        );
    }

    fn etcdctl(&self, arguments: &[&str]) -> Output {
        let fabric = format!("{}-f", self.name);
        let command =
            ["netns", "exec", &fabric, "env", "ETCDCTL_API=3", "etcdctl", "--endpoints=http://10.77.0.1:2379"];
        run("ip", &[&command, arguments].concat())
    }

    async fn subnet(&self, node: &str) -> String {
        let path = self.path(&format!("{node}.env"));
        let log = self.path(&format!("flanneld-{node}.log"));
        eventually("the subnet file appears", PATIENCE, || async {
            let text = std::fs::read_to_string(&path).map_err(|_| std::fs::read_to_string(&log))?;
            let line = text.lines().find_map(|line| line.strip_prefix("FLANNEL_SUBNET="));
            line.map(str::to_owned).ok_or(Ok(text.clone()))
        })
        .await
    }

    fn cni(&self, command: &str, node: &str, pod: &str) -> String {
        let config = json!({
            "cniVersion": "1.0.0", "name": "cbr0", "type": "flannel",
            "subnetFile": self.path(&format!("{node}.env")), "dataDir": self.path("cni"),
            "delegate": {"hairpinMode": true, "isDefaultGateway": true},
            "ipam": {"dataDir": self.path(&format!("ipam-{node}"))},
        });
        let input = self.path("cni.json");
        std::fs::write(&input, config.to_string()).unwrap();
        let output = Command::new("ip")
            .args(["netns", "exec", node, env!("CARGO_BIN_EXE_flannel")])
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", pod)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_NETNS", format!("/run/netns/{pod}"))
            .env("CNI_PATH", "/usr/lib/cni:/opt/cni/bin")
            .stdin(std::fs::File::open(&input).unwrap())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{command} {pod}: {text}");
        text
    }

    /// A pod on the node; returns its namespace and address.
    fn pod(&mut self, node: &str, name: &str) -> (String, String) {
        let pod = self.namespace(name);
        let result: Value = serde_json::from_str(&self.cni("ADD", node, &pod)).unwrap();
        let address = result["ips"][0]["address"].as_str().unwrap().split('/').next().unwrap().to_owned();
        (pod, address)
    }

    /// A refused connection is a round trip: the answer came from the other side.
    async fn reaches(&self, from: &str, to: &str) {
        let connect = format!("exec 3<>/dev/tcp/{to}/9");
        eventually(&format!("{from} reaches {to}"), PATIENCE, || async {
            let output = run("ip", &["netns", "exec", from, "timeout", "1", "bash", "-c", &connect]);
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            if text.contains("Connection refused") { Ok(()) } else { Err(format!("{}: {text}", output.status)) }
        })
        .await;
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for (title, child) in &mut self.processes {
            let _ = child.kill();
            let _ = child.wait();
            if std::thread::panicking() {
                let log = std::fs::read_to_string(self.directory.path().join(format!("{title}.log")));
                eprintln!("--- {title}\n{}", log.unwrap_or_default());
            }
        }
        for namespace in &self.namespaces {
            run("ip", &["netns", "del", namespace]);
        }
    }
}

/// Only three subnets, and three nodes that start at the same instant: each must get its own.
async fn three_nodes(suffix: &str, backend: Value) -> (Lab, Vec<String>, Vec<String>) {
    let network = json!({"Network": "10.244.0.0/22", "SubnetLen": 24, "Backend": backend});
    let mut lab = Lab::new(suffix, network).await;
    let nodes: Vec<String> = (2..5).map(|number| lab.node(number)).collect();
    nodes.iter().for_each(|node| lab.flanneld(node));
    let mut subnets = Vec::new();
    for node in &nodes {
        subnets.push(lab.subnet(node).await);
    }
    let mut sorted = subnets.clone();
    sorted.sort();
    assert_eq!(sorted, ["10.244.1.1/24", "10.244.2.1/24", "10.244.3.1/24"]);
    (lab, nodes, subnets)
}

#[tokio::test]
#[ignore = "needs root, network namespaces, etcd and CNI plugins"]
async fn vxlan_carries_pods_and_repairs_itself() {
    let (mut lab, nodes, subnets) = three_nodes("v", json!({"Type": "vxlan"})).await;
    let (pod1, _) = lab.pod(&nodes[0], "p1");
    let (pod2, address2) = lab.pod(&nodes[1], "p2");
    lab.reaches(&pod1, &address2).await;
    lab.reaches(&nodes[2], &address2).await;
    let link = ip(&format!("-n {} -d link show flannel.1", nodes[0]));
    assert!(link.contains("mtu 1450") && link.contains("nolearning") && link.contains("dstport 8472"), "{link}");

    // Whatever happens to the device, the daemon puts it back, with the address that its peers know.
    ip(&format!("-n {} link del flannel.1", nodes[0]));
    lab.reaches(&pod1, &address2).await;

    // The data plane does not need the daemon, and a new one takes up the same subnet.
    lab.kill(&format!("flanneld-{}", nodes[1]));
    lab.reaches(&pod1, &address2).await;
    std::fs::remove_file(lab.path(&format!("{}.env", nodes[1]))).unwrap();
    lab.flanneld(&nodes[1]);
    assert_eq!(lab.subnet(&nodes[1]).await, subnets[1]);
    lab.reaches(&pod2, &subnets[0].replace("/24", "")).await;

    // A lease that somebody deleted is taken again; a node that is gone for good loses its routes everywhere.
    let key = |subnet: &str| format!("/coreos.com/network/subnets/{}-24", subnet.replace(".1/24", ".0"));
    assert!(lab.etcdctl(&["del", &key(&subnets[1])]).status.success());
    eventually("the lease is written again", PATIENCE, || async {
        let output = lab.etcdctl(&["get", "--print-value-only", &key(&subnets[1])]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if text.contains("10.77.0.3") { Ok(()) } else { Err(text) }
    })
    .await;
    lab.reaches(&pod1, &address2).await;
    lab.kill(&format!("flanneld-{}", nodes[2]));
    assert!(lab.etcdctl(&["del", &key(&subnets[2])]).status.success());
    let gone = subnets[2].replace(".1/24", ".0/24");
    eventually("the route of the node that left disappears", PATIENCE, || async {
        let routes = ip(&format!("-n {} route", nodes[0]));
        if routes.contains(&gone) { Err(routes) } else { Ok(()) }
    })
    .await;
    lab.cni("DEL", &nodes[0], &pod1);
    lab.cni("DEL", &nodes[0], &pod1);
}

#[tokio::test]
#[ignore = "needs root, network namespaces, etcd and CNI plugins"]
async fn host_gw_routes_without_a_tunnel() {
    let (mut lab, nodes, _) = three_nodes("h", json!({"Type": "host-gw"})).await;
    let (pod1, _) = lab.pod(&nodes[0], "p1");
    let (_, address2) = lab.pod(&nodes[1], "p2");
    lab.reaches(&pod1, &address2).await;
    let routes = ip(&format!("-n {} route", nodes[0]));
    assert_eq!(routes.matches("via 10.77.0.").count(), 3, "{routes}");
    ip(&format!("-n {} route flush root 10.244.0.0/22 dev eth0", nodes[0]));
    lab.reaches(&pod1, &address2).await;
}

#[tokio::test]
#[ignore = "needs root, network namespaces, etcd and CNI plugins"]
async fn direct_routing_skips_the_tunnel_on_one_link() {
    let (mut lab, nodes, _) = three_nodes("d", json!({"Type": "vxlan", "VNI": 7, "DirectRouting": true})).await;
    let (pod1, _) = lab.pod(&nodes[0], "p1");
    let (_, address2) = lab.pod(&nodes[1], "p2");
    lab.reaches(&pod1, &address2).await;
    let routes = ip(&format!("-n {} route", nodes[0]));
    assert!(!routes.contains("dev flannel.7 onlink") && routes.contains("via 10.77.0.3 dev eth0"), "{routes}");
    assert!(Path::new(&lab.path(&format!("{}.env", nodes[0]))).exists());
}
