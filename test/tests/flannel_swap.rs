//! Two programs, one network: upstream's flanneld on one node and ours on the other, with one etcd. They exchange
//! packets on every backend that this kernel has, and a node changes from one program to the other and back without
//! losing its subnet.
//!
//! `KETCH_FLANNELD` is our program and `KETCH_UPSTREAM` the directory that `hack/upstream/build DIRECTORY overlay` has
//! filled. Needs root, etcd and socat.

use std::path::{Path, PathBuf};

use ketch_test::overlay::{Lab, PREFIX};
use serde_json::{Value, json};

struct Programs {
    ours: PathBuf,
    upstream: PathBuf,
}

/// The udp backend is in upstream's program only when it was built with cgo.
fn programs(backend: &str) -> Programs {
    let setting = |name| PathBuf::from(std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set")));
    let upstream = if backend == "udp" { "flanneld-udp" } else { "flanneld" };
    Programs { ours: setting("KETCH_FLANNELD"), upstream: setting("KETCH_UPSTREAM").join(upstream) }
}

/// A node with a pod.
struct Node {
    name: String,
    pod: String,
    addresses: Vec<String>,
}

impl Node {
    fn new(lab: &mut Lab, number: u8, program: &Path) -> Self {
        let name = lab.node(number);
        lab.flanneld(&name, program, &["--ip-masq"]);
        let (pod, addresses) = lab.pod(&name);
        Self { name, pod, addresses }
    }

    fn subnet(&self, lab: &Lab) -> String {
        lab.variable(&self.name, "FLANNEL_SUBNET")
    }

    /// The subnet file without the MTU: in IPv6's tunnel, whose headers are longer, upstream's is larger than what fits.
    fn assignment(&self, lab: &Lab) -> String {
        let text = std::fs::read_to_string(lab.subnet_file(&self.name)).unwrap_or_default();
        text.lines().filter(|line| !line.starts_with("FLANNEL_MTU=")).collect::<Vec<_>>().join("\n")
    }

    /// Ends one program and starts the other, which must come up with the same subnets.
    fn change(&self, lab: &mut Lab, program: &Path) {
        let (before, leased) = (self.assignment(lab), lab.leases());
        lab.stop_flanneld(&self.name);
        std::fs::remove_file(lab.subnet_file(&self.name)).unwrap_or_else(|error| panic!("remove: {error}"));
        lab.flanneld(&self.name, program, &["--ip-masq"]);
        self.subnet(lab);
        assert_eq!(self.assignment(lab), before);
        assert_eq!(lab.leases(), leased);
    }
}

fn both_ways(lab: &Lab, one: &Node, other: &Node) {
    for (address, back) in other.addresses.iter().zip(&one.addresses) {
        lab.reaches(&one.pod, address);
        lab.reaches(&other.pod, back);
        lab.reaches(&one.name, address);
        lab.reaches(&other.name, back);
        lab.transfers(&one.pod, (&other.pod, address));
        lab.transfers(&other.pod, (&one.pod, back));
    }
}

fn swap(backend: &str, network: &Value) {
    let programs = programs(backend);
    let mut lab = Lab::new();
    lab.configure(PREFIX, network);
    let one = Node::new(&mut lab, 2, &programs.upstream);
    let other = Node::new(&mut lab, 3, &programs.ours);
    assert_ne!(one.subnet(&lab), other.subnet(&lab));
    both_ways(&lab, &one, &other);
    // Both nodes change to the other program, and one of them back.
    one.change(&mut lab, &programs.ours);
    both_ways(&lab, &one, &other);
    other.change(&mut lab, &programs.upstream);
    both_ways(&lab, &one, &other);
    one.change(&mut lab, &programs.upstream);
    both_ways(&lab, &one, &other);
}

#[test]
#[ignore = "needs root, etcd and upstream's flanneld"]
fn vxlan() {
    swap("vxlan", &json!({"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}));
}

#[test]
#[ignore = "needs root, etcd and upstream's flanneld"]
fn host_gw() {
    swap("host-gw", &json!({"Network": "10.244.0.0/16", "Backend": {"Type": "host-gw"}}));
}

#[test]
#[ignore = "needs root, etcd and upstream's flanneld, built with cgo"]
fn udp() {
    swap("udp", &json!({"Network": "10.244.0.0/16", "Backend": {"Type": "udp"}}));
}

#[test]
#[ignore = "needs root, etcd and upstream's flanneld"]
fn vxlan_in_dual_stack() {
    let network = json!({"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00::/48",
        "EnableNFTables": true, "Backend": {"Type": "vxlan", "VNI": 7}});
    swap("vxlan", &network);
}

#[test]
#[ignore = "needs root, etcd and upstream's flanneld"]
fn host_gw_in_dual_stack() {
    let network = json!({"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00::/48",
        "Backend": {"Type": "host-gw"}});
    swap("host-gw", &network);
}
