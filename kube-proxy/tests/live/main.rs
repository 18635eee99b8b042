//! The real binary on a virtual node with packets: an API server that is played by the test, two pods and an outside
//! client, each in a network namespace of its own. Every scenario runs in both modes.
//!
//! Needs root, `ip`, `nft`, `iptables` and `conntrack`; run with `cargo test -p kube-proxy -- --ignored`.

// A helper that cannot set up its part of the lab has no better way than to end the test.
#![allow(clippy::unwrap_used)]

mod fake_api;
mod lab;

use std::collections::BTreeSet;
use std::time::Duration;

use apimachinery::testing::eventually;
use serde_json::{Value, json};

use lab::Lab;

const PATIENCE: Duration = Duration::from_secs(20);
const VIP: &str = "10.96.0.1:80";
const NODE_PORT: &str = "10.78.0.2:30080";

fn service(spec: &Value) -> Value {
    let mut service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "ns", "name": "web"},
        "spec": {"type": "NodePort", "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"],
            "ports": [{"name": "http", "protocol": "TCP", "port": 80, "nodePort": 30080},
                {"name": "udp", "protocol": "UDP", "port": 53}]},
    });
    for (key, value) in spec.as_object().unwrap() {
        service["spec"][key] = value.clone();
    }
    service
}

fn slice(endpoints: &[(&str, &str)]) -> Value {
    let endpoints: Vec<Value> =
        endpoints.iter().map(|(address, node)| json!({"addresses": [address], "nodeName": node})).collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"namespace": "ns", "name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "ports": [{"name": "http", "protocol": "TCP", "port": 8080}, {"name": "udp", "protocol": "UDP", "port": 8080}],
        "endpoints": endpoints,
    })
}

const P1: (&str, &str) = ("10.244.1.2", "node1");
const P2: (&str, &str) = ("10.244.1.3", "node1");
const AWAY: (&str, &str) = ("10.244.2.9", "node2");

/// Connects until both pods have answered.
async fn spreads(lab: &Lab, from: &str, to: &str) {
    let mut seen = BTreeSet::new();
    eventually(&format!("{from} reaches both pods at {to}"), PATIENCE, || {
        let answer = lab.ask(from, to);
        seen.extend(answer.iter().map(|(pod, _)| pod.clone()));
        let result = if seen.len() == 2 { Ok(()) } else { Err((seen.clone(), answer.err())) };
        async move { result }
    })
    .await;
}

/// Connects until the answer is the expected one: which pod, and whom it saw.
async fn answers(lab: &Lab, from: &str, to: &str, pod: &str, peer: &str) {
    eventually(&format!("{from} at {to} is answered by {pod}, which sees {peer}"), PATIENCE, || {
        let answer = lab.ask(from, to);
        let right = answer.as_ref().is_ok_and(|(p, s)| p == pod && s == peer);
        async move { if right { Ok(()) } else { Err(answer) } }
    })
    .await;
}

async fn refused(lab: &Lab, from: &str, to: &str) {
    eventually(&format!("{from} is refused at {to}"), PATIENCE, || {
        let answer = lab.ask(from, to);
        let right = answer.as_ref().is_err_and(|error| error.contains("refused"));
        async move { if right { Ok(()) } else { Err(answer) } }
    })
    .await;
}

async fn everything(mode: &str) {
    let mut lab = Lab::new(mode);
    lab.api.put("services", service(&json!({})));
    lab.api.put("endpointslices", slice(&[P1, P2]));
    lab.start_proxy();

    spreads(&lab, "node", VIP).await;
    spreads(&lab, "p1", VIP).await;
    spreads(&lab, "out", NODE_PORT).await;
    assert_eq!(lab.get("node", "127.0.0.1:10249", "/proxyMode").unwrap(), mode);
    assert!(lab.get("node", "127.0.0.1:10256", "/healthz").unwrap().contains("\"nodeEligible\":true"));

    if mode == "nftables" {
        // nft 1.0 aborts without a word when it meets what it cannot list, as it does with rules for affinity.
        assert!(lab.on_node(&["nft", "list", "ruleset"]).contains("chain node-port-cluster-2-masquerade"));
    }

    // One endpoint: a pod that reaches itself does not see its own address; outside clients are masqueraded.
    lab.api.put("endpointslices", slice(&[P1]));
    answers(&lab, "p1", VIP, "p1", "10.244.1.1").await;
    answers(&lab, "p2", VIP, "p1", "10.244.1.3").await;
    answers(&lab, "out", NODE_PORT, "p1", "10.244.1.1").await;

    // Policy Local keeps the client's address, and tells load balancers where the endpoints are.
    lab.api.put(
        "services",
        service(&json!({"externalTrafficPolicy": "Local", "type": "LoadBalancer", "healthCheckNodePort": 32000})),
    );
    answers(&lab, "out", NODE_PORT, "p1", "10.78.0.1").await;
    eventually("the health check node port counts one", PATIENCE, || {
        let body = lab.get("out", "10.78.0.2:32000", "/").unwrap_or_default();
        async move { if body.contains("\"localEndpoints\":1") { Ok(()) } else { Err(body) } }
    })
    .await;
    lab.api.put("endpointslices", slice(&[AWAY]));
    eventually("without local endpoints the packets are dropped", PATIENCE, || {
        let answer = lab.ask("out", NODE_PORT);
        let right = answer.as_ref().is_err_and(|error| error.contains("timed out"));
        async move { if right { Ok(()) } else { Err(answer) } }
    })
    .await;

    // Addresses that a load balancer or an administrator sends here; the former only for some clients.
    let addresses = |ranges: Value| json!({"externalIPs": ["10.96.9.1"], "type": "LoadBalancer", "loadBalancerSourceRanges": ranges});
    let mut balanced = service(&addresses(json!(["10.78.0.0/24"])));
    balanced["status"] = json!({"loadBalancer": {"ingress": [{"ip": "10.96.9.2"}]}});
    lab.api.put("services", balanced.clone());
    lab.api.put("endpointslices", slice(&[P1, P2]));
    spreads(&lab, "p1", "10.96.9.1:80").await;
    spreads(&lab, "node", "10.96.9.2:80").await;
    eventually("a pod is not in the source ranges", PATIENCE, || {
        let answer = lab.ask("p1", "10.96.9.2:80");
        let right = answer.as_ref().is_err_and(|error| error.contains("timed out"));
        async move { if right { Ok(()) } else { Err(answer) } }
    })
    .await;

    // Nobody serves.
    lab.api.put("services", service(&json!({})));
    lab.api.put("endpointslices", slice(&[]));
    refused(&lab, "p1", VIP).await;
    refused(&lab, "node", VIP).await;
    refused(&lab, "out", NODE_PORT).await;

    // A client stays with its endpoint.
    lab.api.put(
        "services",
        service(&json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}}})),
    );
    lab.api.put("endpointslices", slice(&[P1, P2]));
    let first = eventually("the service answers again", PATIENCE, || {
        let answer = lab.ask("out", NODE_PORT);
        async move { answer }
    })
    .await;
    for _ in 0..12 {
        assert_eq!(lab.ask("out", NODE_PORT).unwrap().0, first.0);
    }

    restart_and_repair(&mut lab, &first.0).await;
    stale_udp(&lab).await;
}

/// A new process takes over what the old one installed: no connection breaks and no attempt fails meanwhile.
async fn restart_and_repair(lab: &mut Lab, sticky: &str) {
    let mut connection = lab.connect("out", NODE_PORT).unwrap();
    assert_eq!(lab.echo(&mut connection), sticky);
    lab.kill_proxy();
    assert_eq!(lab.ask("out", NODE_PORT).unwrap().0, sticky);
    lab.start_proxy();
    eventually("the new proxy is healthy", PATIENCE, || {
        // Clients keep their endpoints through all of it, so every attempt can be checked.
        assert_eq!(lab.ask("out", NODE_PORT).unwrap().0, sticky);
        let body = lab.get("node", "127.0.0.1:10256", "/healthz").unwrap_or_default();
        async move { if body.contains("\"healthy\":true") { Ok(()) } else { Err(body) } }
    })
    .await;
    assert_eq!(lab.ask("out", NODE_PORT).unwrap().0, sticky);
    assert_eq!(lab.echo(&mut connection), sticky);

    lab.api.put("services", service(&json!({})));
    lab.remove_rules();
    spreads(lab, "out", NODE_PORT).await;
    spreads(lab, "p2", VIP).await;
}

/// A UDP client that keeps its port reaches the new endpoint after the old one left.
async fn stale_udp(lab: &Lab) {
    lab.api.put("endpointslices", slice(&[P1]));
    let client = lab.udp_client("p2", "10.96.0.1:53");
    eventually("UDP is answered by the first endpoint", PATIENCE, || {
        let answer = lab.udp_ask(&client);
        async move { if answer == "p1" { Ok(()) } else { Err(answer) } }
    })
    .await;
    lab.api.put("endpointslices", slice(&[P2]));
    // p2 asks itself now, through the service.
    eventually("UDP is answered by the second endpoint", PATIENCE, || {
        let answer = lab.udp_ask(&client);
        async move { if answer == "p2" { Ok(()) } else { Err(answer) } }
    })
    .await;
}

/// A node changes its mode: services answer all the time, and nothing of the other mode stays.
#[tokio::test]
#[ignore = "needs root, network namespaces, nft, iptables and conntrack"]
async fn modes_replace_each_other() {
    let mut lab = Lab::new("iptables");
    lab.api.put("services", service(&json!({})));
    lab.api.put("endpointslices", slice(&[P1]));
    lab.start_proxy();
    answers(&lab, "out", NODE_PORT, "p1", "10.244.1.1").await;
    for (mode, leftover) in [("nftables", "KUBE-"), ("iptables", "table ip kube-proxy")] {
        lab.kill_proxy();
        lab.set_mode(mode);
        lab.start_proxy();
        eventually(&format!("{mode} replaces the other mode"), PATIENCE, || {
            assert!(lab.ask("out", NODE_PORT).is_ok(), "an attempt failed while the mode changed");
            let rules = lab.on_node(&["nft", "list", "ruleset"]);
            let current = lab.get("node", "127.0.0.1:10249", "/proxyMode").is_ok_and(|answer| answer == mode);
            async move { if current && !rules.contains(leftover) { Ok(()) } else { Err(rules) } }
        })
        .await;
    }
}

#[tokio::test]
#[ignore = "needs root, network namespaces, nft and conntrack"]
async fn nftables_mode() {
    everything("nftables").await;
}

#[tokio::test]
#[ignore = "needs root, network namespaces, iptables and conntrack"]
async fn iptables_mode() {
    everything("iptables").await;
}
