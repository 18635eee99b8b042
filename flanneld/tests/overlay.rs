//! Whole daemons on virtual nodes, and packets that prove what they did: each backend, each way of choosing, and what
//! happens when somebody deletes what is ours.
//!
//! Needs root, `etcd`, `ip`, `socat`, `nft`, `iptables` and the standard CNI plugins; run with
//! `cargo test -p flanneld -- --ignored`.

// A helper that cannot set up its part of the lab has no better way than to end the test.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use ketch_test::overlay::{Lab, PATIENCE, PREFIX, ip, lease_key, must};
use ketch_test::{check, poll};
use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_flanneld");

fn start(lab: &mut Lab, node: &str, arguments: &[&str]) {
    lab.flanneld(node, Path::new(PROGRAM), arguments);
}

fn network(backend: &Value) -> Value {
    json!({"Network": "10.244.0.0/22", "SubnetLen": 24, "Backend": backend})
}

/// Nodes that start at the same instant, and a pod behind each.
fn nodes(lab: &mut Lab, count: u8, arguments: &[&str]) -> Vec<(String, String, Vec<String>)> {
    let names: Vec<String> = (2..2 + count).map(|number| lab.node(number)).collect();
    names.iter().for_each(|node| start(lab, node, arguments));
    let pod = |node: String| {
        let (pod, addresses) = lab.pod(&node);
        (node, pod, addresses)
    };
    names.into_iter().map(pod).collect()
}

/// Waits for `ip ARGUMENTS` (or another program) to print what is wanted, and says how long that took.
fn comes_back(what: &str, wanted: &str, print: impl Fn() -> String) {
    let started = Instant::now();
    poll(&format!("{what} comes back"), PATIENCE, || {
        let text = print();
        check(text.contains(wanted), || text.clone())
    });
    println!("{what} was back after {:?}", started.elapsed());
}

#[test]
#[ignore = "needs root, network namespaces and etcd"]
fn three_nodes_at_once_share_three_subnets() {
    let mut lab = Lab::new();
    lab.configure(PREFIX, &network(&json!({"Type": "host-gw"})));
    let nodes = nodes(&mut lab, 3, &[]);
    let mut subnets: Vec<String> = nodes.iter().map(|(node, ..)| lab.variable(node, "FLANNEL_SUBNET")).collect();
    subnets.sort();
    assert_eq!(subnets, ["10.244.1.1/24", "10.244.2.1/24", "10.244.3.1/24"]);
    lab.reaches(&nodes[0].1, &nodes[1].2[0]);
    lab.reaches(&nodes[2].1, &nodes[0].2[0]);
    let routes = ip(&format!("-n {} route", nodes[0].0));
    assert_eq!(routes.matches("via 10.77.0.").count(), 3, "{routes}");

    let (gone, key) = (&nodes[1].0, lease_key(PREFIX, &subnets[1]));
    let started = Instant::now();
    ip(&format!("-n {} route flush root 10.244.0.0/22 dev eth0", nodes[0].0));
    lab.reaches(&nodes[0].1, &nodes[1].2[0]);
    println!("the routes were back after {:?}", started.elapsed());

    // A lease that somebody deleted is taken again; a node that is gone for good loses its routes everywhere.
    lab.delete(&key);
    poll("the lease is written again", PATIENCE, || {
        let text = lab.get(&key);
        check(text.contains("PublicIP"), || text.clone())
    });
    let gone_subnet = lab.variable(gone, "FLANNEL_SUBNET");
    lab.stop_flanneld(gone);
    lab.delete(&lease_key(PREFIX, &gone_subnet));
    let net = gone_subnet.replace(".1/", ".0/");
    poll("the route of the node that left disappears", PATIENCE, || {
        let routes = ip(&format!("-n {} route", nodes[0].0));
        check(!routes.contains(&net), || routes.clone())
    });
}

#[test]
#[ignore = "needs root, network namespaces and etcd"]
fn vxlan_puts_back_what_is_deleted() {
    let mut lab = Lab::new();
    lab.configure(PREFIX, &network(&json!({"Type": "vxlan"})));
    let nodes = nodes(&mut lab, 2, &["--ip-masq"]);
    let [(node, pod, _), (peer, peer_pod, peer_addresses)] = &nodes[..] else { panic!("two nodes") };
    let (subnet, target) = (lab.variable(peer, "FLANNEL_SUBNET"), &peer_addresses[0]);
    lab.reaches(pod, target);
    lab.transfers(pod, (peer_pod, target));
    let link = ip(&format!("-n {node} -d link show flannel.1"));
    assert!(link.contains("mtu 1450") && link.contains("nolearning") && link.contains("dstport 8472"), "{link}");
    let overlay = subnet.replace(".1/24", ".0");
    let neighbour = ip(&format!("-n {node} neigh show dev flannel.1 {overlay}"));
    let mac = neighbour.split_whitespace().find(|word| word.contains(':')).unwrap().to_owned();

    ip(&format!("-n {node} route del {overlay}/24"));
    comes_back("the route", "dev flannel.1", || ip(&format!("-n {node} route show {overlay}/24")));
    ip(&format!("-n {node} neigh del {overlay} dev flannel.1"));
    comes_back("the neighbour", &mac, || ip(&format!("-n {node} neigh show dev flannel.1 {overlay} nud permanent")));
    let fdb = || must("ip", &["netns", "exec", node, "bridge", "fdb", "show", "dev", "flannel.1"]);
    must("ip", &["netns", "exec", node, "bridge", "fdb", "del", &mac, "dev", "flannel.1", "dst", "10.77.0.3"]);
    comes_back("the forwarding entry", &format!("{mac} dst 10.77.0.3"), fdb);
    ip(&format!("-n {node} addr flush dev flannel.1"));
    let own = lab.variable(node, "FLANNEL_SUBNET").replace(".1/24", ".0/32");
    comes_back("the address", &own, || ip(&format!("-n {node} addr show dev flannel.1")));
    ip(&format!("-n {node} link set flannel.1 down"));
    comes_back("the device's state", "UP", || ip(&format!("-n {node} link show flannel.1")));
    let before = lab.get(&lease_key(PREFIX, &lab.variable(node, "FLANNEL_SUBNET")));
    ip(&format!("-n {node} link del flannel.1"));
    comes_back("the device", &format!("via {overlay} dev flannel.1"), || ip(&format!("-n {node} route")));
    lab.reaches(pod, target);
    // With the address that its peers know.
    assert_eq!(lab.get(&lease_key(PREFIX, &lab.variable(node, "FLANNEL_SUBNET"))), before);

    // The data plane does not need the daemon, and a new one takes up the same subnet.
    lab.stop_flanneld(peer);
    lab.reaches(pod, target);
    std::fs::remove_file(lab.subnet_file(peer)).unwrap();
    start(&mut lab, peer, &["--ip-masq"]);
    assert_eq!(lab.variable(peer, "FLANNEL_SUBNET"), subnet);
}

#[test]
#[ignore = "needs root, network namespaces and etcd"]
fn masquerade_rules_are_put_back_in_both_tools() {
    for (nftables, flush, list, rule) in [
        (true, "nft flush ruleset", "nft list ruleset", "masquerade"),
        (false, "iptables -t nat -F", "iptables -t nat -S", "-j FLANNEL-POSTRTG"),
        (false, "iptables -t nat -D FLANNEL-POSTRTG 1", "iptables -t nat -S", "--mark 0x4000"),
        (false, "ip6tables -t nat -F", "ip6tables -t nat -S", "MASQUERADE"),
        (false, "iptables -F FORWARD", "iptables -S", "-j FLANNEL-FWD"),
    ] {
        let mut lab = Lab::new();
        let network = json!({"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00::/48",
            "EnableNFTables": nftables, "Backend": {"Type": "vxlan"}});
        lab.configure(PREFIX, &network);
        let node = lab.node(2);
        start(&mut lab, &node, &["--ip-masq"]);
        lab.variable(&node, "FLANNEL_SUBNET");
        let run =
            |line: &str| must("ip", &[&["netns", "exec", &node][..], &line.split(' ').collect::<Vec<_>>()].concat());
        // The daemon has looked at the rules once before they are touched.
        poll("the rules are watched", PATIENCE, || {
            let log = lab.log(&format!("flanneld-{node}"));
            check(run(list).contains(rule) && log.contains("watching the packet filter rules"), || log.clone())
        });
        run(flush);
        comes_back(&format!("what `{flush}` took"), rule, || run(list));
    }
}

#[test]
#[ignore = "needs root, network namespaces and etcd"]
fn udp_carries_packets_and_comes_back() {
    let mut lab = Lab::new();
    lab.configure(PREFIX, &network(&json!({"Type": "udp"})));
    let nodes = nodes(&mut lab, 2, &[]);
    let [(node, pod, addresses), (_, peer_pod, peer_addresses)] = &nodes[..] else { panic!("two nodes") };
    let target = &peer_addresses[0];
    lab.reaches(pod, target);
    lab.transfers(pod, (peer_pod, target));
    lab.transfers(peer_pod, (pod, &addresses[0]));
    ip(&format!("-n {node} link del flannel0"));
    lab.reaches(pod, target);
    // Nobody has this subnet: the sender is told.
    let send = "echo | socat -t 5 - UDP4:10.244.0.9:9,ip-recverr";
    let output = Command::new("ip").args(["netns", "exec", pod, "timeout", "9", "sh", "-c", send]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("unreachable"), "{}: {text}", output.status);
    // A daemon that died takes its device along; the next one makes it again.
    lab.stop_flanneld(node);
    start(&mut lab, node, &[]);
    lab.reaches(pod, target);
}

#[test]
#[ignore = "needs root, network namespaces and etcd"]
fn dual_stack_and_ipv6_alone() {
    for backend in ["vxlan", "host-gw"] {
        for enable_ipv4 in [true, false] {
            let mut lab = Lab::new();
            let network = json!({"Network": "10.244.0.0/16", "EnableIPv4": enable_ipv4, "EnableIPv6": true,
                "IPv6Network": "fd00::/48", "Backend": {"Type": backend}});
            lab.configure(PREFIX, &network);
            let nodes = nodes(&mut lab, 2, &["--ip-masq"]);
            let [(_, pod, _), (_, peer_pod, addresses)] = &nodes[..] else { panic!("two nodes") };
            assert_eq!(addresses.len(), if enable_ipv4 { 2 } else { 1 });
            for address in addresses {
                lab.reaches(pod, address);
                lab.transfers(pod, (peer_pod, address));
            }
        }
    }
}

#[test]
#[ignore = "needs root, network namespaces and etcd"]
fn direct_routing_skips_the_tunnel_on_one_link() {
    let mut lab = Lab::new();
    lab.configure(PREFIX, &network(&json!({"Type": "vxlan", "VNI": 7, "DirectRouting": true})));
    let nodes = nodes(&mut lab, 2, &[]);
    lab.reaches(&nodes[0].1, &nodes[1].2[0]);
    let routes = ip(&format!("-n {} route", nodes[0].0));
    assert!(!routes.contains("dev flannel.7 onlink") && routes.contains("via 10.77.0.3 dev eth0"), "{routes}");
}

#[test]
#[ignore = "needs root, network namespaces and etcd"]
fn two_networks_share_one_etcd() {
    let mut lab = Lab::new();
    let (red, blue) = (lab.node(2), lab.node(3));
    lab.configure("/red", &json!({"Network": "10.1.0.0/16", "Backend": {"Type": "vxlan", "VNI": 1}}));
    lab.configure("/blue", &json!({"Network": "10.2.0.0/16", "Backend": {"Type": "host-gw"}}));
    start(&mut lab, &red, &["--etcd-prefix=/red"]);
    start(&mut lab, &blue, &["--etcd-prefix=/blue/"]);
    assert!(lab.variable(&red, "FLANNEL_SUBNET").starts_with("10.1."));
    assert!(lab.variable(&blue, "FLANNEL_SUBNET").starts_with("10.2."));
    assert!(ip(&format!("-n {red} route show 10.2.0.0/16 dev eth0")).is_empty());
}

#[test]
#[ignore = "needs root, network namespaces, etcd and CNI plugins"]
fn the_cni_plugin_attaches_pods_in_dual_stack() {
    let mut lab = Lab::new();
    let network = json!({"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00::/48",
        "Backend": {"Type": "vxlan"}});
    lab.configure(PREFIX, &network);
    let nodes: Vec<String> = (2..4).map(|number| lab.node(number)).collect();
    let mut pods = Vec::new();
    for node in &nodes {
        start(&mut lab, node, &["--ip-masq"]);
        lab.variable(node, "FLANNEL_SUBNET");
        let pod = lab.namespace(&format!("c{}", pods.len()));
        let result: Value = serde_json::from_str(&cni(&lab, "ADD", node, &pod)).unwrap();
        let addresses = result["ips"].as_array().unwrap().iter();
        let addresses = addresses.map(|ip| ip["address"].as_str().unwrap().split('/').next().unwrap().to_owned());
        pods.push((pod.clone(), addresses.collect::<Vec<_>>()));
    }
    assert_eq!(pods[1].1.len(), 2);
    for address in &pods[1].1 {
        lab.reaches(&pods[0].0, address);
    }
    cni(&lab, "DEL", &nodes[0], &pods[0].0);
    cni(&lab, "DEL", &nodes[0], &pods[0].0);
}

fn cni(lab: &Lab, command: &str, node: &str, pod: &str) -> String {
    let config = json!({
        "cniVersion": "1.0.0", "name": "cbr0", "type": "flannel",
        "subnetFile": lab.subnet_file(node), "dataDir": lab.path("cni"),
        "delegate": {"hairpinMode": true, "isDefaultGateway": true},
        "ipam": {"dataDir": lab.path(&format!("ipam-{node}"))},
    });
    let input = lab.path("cni.json");
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
