//! Bad input and faults: a clear error that names what is wrong, what was good stays in place, and work resumes by
//! itself.
//!
//! Needs root, `etcd`, `ip` and `socat`; run with `cargo test -p flanneld -- --ignored`.

use std::path::Path;

use ketch_test::overlay::{Lab, PATIENCE, PREFIX, ip, lease_key, must};
use ketch_test::{check, poll};
use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_flanneld");

fn start(lab: &mut Lab, node: &str, arguments: &[&str]) {
    lab.flanneld(node, Path::new(PROGRAM), arguments);
}

fn network(backend: &Value) -> Value {
    json!({"Network": "10.244.0.0/16", "Backend": backend})
}

fn says(lab: &Lab, node: &str, words: &str) {
    poll(&format!("{node} says {words:?}"), PATIENCE, || {
        let log = lab.log(&format!("flanneld-{node}"));
        check(log.contains(words), || log.clone())
    });
}

fn pair(lab: &mut Lab, arguments: &[&str]) -> [(String, String, Vec<String>); 2] {
    [2, 3].map(|number| {
        let node = lab.node(number);
        start(lab, &node, arguments);
        let (pod, addresses) = lab.pod(&node);
        (node, pod, addresses)
    })
}

#[test]
#[ignore = "needs root, network namespaces and etcd"]
fn a_malformed_configuration_is_waited_out() {
    let mut lab = Lab::new();
    let node = lab.node(2);
    start(&mut lab, &node, &[]);
    says(&lab, &node, "no network configuration at /coreos.com/network/config");
    for (text, words) in [
        ("{", "not the JSON object"),
        (r#"{"Network":"10.244.0.0/16","SubnetMin":"10.9.0.0","Backend":{"Type":"vxlan"}}"#, "SubnetMin 10.9.0.0"),
        (r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlam"}}"#, "vxlam"),
    ] {
        lab.put(&format!("{PREFIX}/config"), text);
        says(&lab, &node, words);
    }
    lab.configure(PREFIX, &network(&json!({"Type": "vxlan"})));
    lab.variable(&node, "FLANNEL_SUBNET");
}

#[test]
#[ignore = "needs root, network namespaces and etcd"]
fn a_new_configuration_is_taken_up_and_a_bad_one_is_not() {
    let mut lab = Lab::new();
    lab.configure(PREFIX, &network(&json!({"Type": "vxlan"})));
    let [(node, pod, _), (peer, _, addresses)] = pair(&mut lab, &[]);
    lab.reaches(&pod, &addresses[0]);
    let subnet = lab.variable(&node, "FLANNEL_SUBNET");

    lab.put(&format!("{PREFIX}/config"), r#"{"Network":"10.244.0.0/16","SubnetLen":31}"#);
    says(&lab, &node, "the present one goes on");
    lab.reaches(&pod, &addresses[0]);

    lab.configure(PREFIX, &network(&json!({"Type": "host-gw"})));
    for name in [&node, &peer] {
        poll("the device of the old backend is gone", PATIENCE, || {
            let links = ip(&format!("-n {name} link"));
            check(!links.contains("flannel.1"), || links.clone())
        });
    }
    lab.reaches(&pod, &addresses[0]);
    assert_eq!(lab.variable(&node, "FLANNEL_SUBNET"), subnet);
}

#[test]
#[ignore = "needs root, network namespaces and etcd"]
fn leases_that_overlap_are_refused_and_the_rest_works() {
    let mut lab = Lab::new();
    lab.configure(PREFIX, &network(&json!({"Type": "host-gw"})));
    let [(node, pod, _), (_, _, addresses)] = pair(&mut lab, &[]);
    let foreign = r#"{"PublicIP":"10.77.0.99","PublicIPv6":null,"BackendType":"host-gw"}"#;
    lab.put(&format!("{PREFIX}/subnets/10.244.0.0-17"), foreign);
    lab.put(&format!("{PREFIX}/subnets/10.244.128.0-17"), foreign);
    lab.put(&format!("{PREFIX}/subnets/10.9.0.0-24"), foreign);
    lab.put(&format!("{PREFIX}/subnets/junk"), foreign);
    lab.put(&format!("{PREFIX}/subnets/10.244.77.0-24"), "{");
    says(&lab, &node, "10.244.0.0/17");
    says(&lab, &node, "10.9.0.0/24 is not a part of the network");
    says(&lab, &node, "ignoring a lease that cannot be read");
    lab.reaches(&pod, &addresses[0]);
    let routes = ip(&format!("-n {node} route"));
    assert!(!routes.contains("10.9.0.0"), "{routes}");
}

#[test]
#[ignore = "needs root, network namespaces and etcd"]
fn a_lost_etcd_is_survived() {
    let mut lab = Lab::new();
    lab.configure(PREFIX, &network(&json!({"Type": "vxlan"})));
    let [(node, pod, _), (peer, _, addresses)] = pair(&mut lab, &[]);
    lab.reaches(&pod, &addresses[0]);
    let subnet = lab.variable(&node, "FLANNEL_SUBNET");
    lab.kill("etcd");
    // Nobody can be asked, and what somebody breaks is still repaired.
    ip(&format!("-n {node} link del flannel.1"));
    lab.reaches(&pod, &addresses[0]);
    // A daemon that starts without etcd waits for it.
    lab.stop_flanneld(&peer);
    std::fs::remove_file(lab.subnet_file(&peer)).unwrap_or_else(|error| panic!("remove: {error}"));
    start(&mut lab, &peer, &[]);
    says(&lab, &peer, "cannot read the network configuration yet");
    lab.start_etcd();
    lab.variable(&peer, "FLANNEL_SUBNET");
    lab.reaches(&pod, &addresses[0]);
    assert!(lab.runs(&format!("flanneld-{node}")));
    // Changes are followed again.
    lab.delete(&lease_key(PREFIX, &subnet));
    poll("the lease is taken again", PATIENCE, || {
        let text = lab.get(&lease_key(PREFIX, &subnet));
        check(text.contains("10.77.0.2"), || text.clone())
    });
}

#[test]
#[ignore = "needs root, network namespaces and etcd"]
fn a_reservation_stays_one_and_the_previous_subnet_is_asked_for() {
    let mut lab = Lab::new();
    lab.configure(PREFIX, &network(&json!({"Type": "host-gw"})));
    let reserved = format!("{PREFIX}/subnets/10.244.200.0-24");
    lab.put(&reserved, r#"{"PublicIP":"10.77.0.2","PublicIPv6":null,"BackendType":"host-gw"}"#);
    let (node, other) = (lab.node(2), lab.node(3));
    start(&mut lab, &node, &[]);
    assert_eq!(lab.variable(&node, "FLANNEL_SUBNET"), "10.244.200.1/24");
    let lease = |key: &str| lab.etcdctl(&["get", "-w", "json", key]).unwrap_or_else(|error| panic!("{error}"));
    assert!(!lease(&reserved).contains("\"lease\""), "{}", lease(&reserved));

    let previous =
        "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.33.1/24\nFLANNEL_MTU=1500\nFLANNEL_IPMASQ=false\n";
    std::fs::write(lab.subnet_file(&other), previous).unwrap_or_else(|error| panic!("{error}"));
    start(&mut lab, &other, &[]);
    let key = format!("{PREFIX}/subnets/10.244.33.0-24");
    poll("the previous subnet is leased", PATIENCE, || {
        let text = lab.get(&key);
        check(text.contains("10.77.0.3"), || format!("{text} {}", lab.log(&format!("flanneld-{other}"))))
    });
}

#[test]
#[ignore = "needs root, network namespaces and etcd"]
fn backends_that_the_kernel_lacks_say_so() {
    for (backend, driver) in [("ipip", "ipip"), ("wireguard", "wireguard")] {
        let probe = format!("ip link add probe0 type {driver}");
        if std::process::Command::new("unshare").args(["-n", "sh", "-c", &probe]).status().is_ok_and(|s| s.success()) {
            println!("this kernel has {driver}: nothing to show");
            continue;
        }
        let mut lab = Lab::new();
        lab.configure(PREFIX, &network(&json!({"Type": backend})));
        let node = lab.node(2);
        start(&mut lab, &node, &[]);
        says(&lab, &node, &format!("no {driver} driver"));
    }
}

#[test]
#[ignore = "needs root, network namespaces and etcd"]
fn the_interface_can_be_chosen_in_every_way() {
    let mut lab = Lab::new();
    lab.configure(PREFIX, &network(&json!({"Type": "vxlan"})));
    let node = lab.node(2);
    for (arguments, expected) in [
        (["--iface=nosuch", "--iface-regex=^10\\.77\\."], r#"interface="eth0""#),
        (["--iface=nosuch", "--iface-regex=^eth"], r#"interface="eth0""#),
        (["--iface=nosuch", "--iface-can-reach=10.77.0.1"], r#"interface="eth0""#),
        (["--iface=10.77.0.2", "--public-ip=192.0.2.7"], "192.0.2.7"),
        (["--iface=nosuch", "--iface-regex=^none"], "no interface matches --iface nosuch, --iface-regex ^none"),
    ] {
        let title = format!("flanneld-{}", arguments[1]);
        let subnet_file = format!("--subnet-file={}", lab.path("chosen.env").display());
        let endpoints = "--etcd-endpoints=http://10.77.0.1:2379";
        let all = [arguments[0], arguments[1], &subnet_file, endpoints];
        lab.spawn(&title, &node, Path::new(PROGRAM), &all);
        poll(&format!("{arguments:?} gives {expected}"), PATIENCE, || {
            let log = lab.log(&title);
            check(log.contains(expected), || log.clone())
        });
        lab.kill(&title);
    }
}

#[test]
#[ignore = "needs root, network namespaces and etcd"]
fn readiness_and_liveness_differ_and_variables_are_flags() {
    let mut lab = Lab::new();
    let node = lab.node(2);
    let program = format!(
        "FLANNELD_HEALTHZ_PORT=8471 FLANNELD_IFACE=eth0 FLANNELD_SUBNET_FILE={} exec {PROGRAM} --etcd-endpoints=http://10.77.0.1:2379",
        lab.subnet_file(&node).display()
    );
    lab.spawn("flanneld", &node, Path::new("sh"), &["-c", &program]);
    let ask = |path: &str| {
        let line =
            format!("exec 3<>/dev/tcp/127.0.0.1/8471; printf 'GET {path} HTTP/1.0\\r\\n\\r\\n' >&3; head -1 <&3");
        let output = std::process::Command::new("ip").args(["netns", "exec", &node, "bash", "-c", &line]).output();
        String::from_utf8_lossy(&output.unwrap_or_else(|error| panic!("{error}")).stdout).into_owned()
    };
    let answers = |path: &str, status: &str| {
        poll(&format!("{path} answers {status}"), PATIENCE, || {
            let line = ask(path);
            check(line.contains(status), || line.clone())
        });
    };
    answers("/healthz", " 200 ");
    answers("/readyz", " 500 ");
    lab.configure(PREFIX, &network(&json!({"Type": "vxlan"})));
    answers("/readyz", " 200 ");
    assert!(must("cat", &[&lab.subnet_file(&node).display().to_string()]).contains("FLANNEL_MTU=1450"));
}

#[test]
#[ignore = "needs root, network namespaces and etcd"]
fn the_extension_backend_runs_its_commands() {
    let mut lab = Lab::new();
    let backend = json!({"Type": "extension", "PreStartupCommand": "echo 02:00:00:00:00:01",
        "PostStartupCommand": "ip link add ext0 type bridge",
        "SubnetAddCommand": "ip route replace $SUBNET via $PUBLIC_IP", "SubnetRemoveCommand": "ip route del $SUBNET"});
    lab.configure(PREFIX, &network(&backend));
    let [(node, pod, _), (peer, _, addresses)] = pair(&mut lab, &[]);
    lab.reaches(&pod, &addresses[0]);
    ip(&format!("-n {node} link show ext0"));
    let subnet = lab.variable(&peer, "FLANNEL_SUBNET");
    assert!(lab.get(&lease_key(PREFIX, &subnet)).contains("02:00:00:00:00:01"));
    lab.stop_flanneld(&peer);
    lab.delete(&lease_key(PREFIX, &subnet));
    let net = subnet.replace(".1/", ".0/");
    poll("the node that left is removed", PATIENCE, || {
        let routes = ip(&format!("-n {node} route"));
        check(!routes.contains(&net), || routes.clone())
    });
}
