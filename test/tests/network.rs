//! Pods, services and names across nodes, against a live cluster with any flannel backend and proxy mode.

use std::collections::BTreeSet;

use ketch_test::{Cluster, LIMIT, Namespace, check, poll, text};

const DEMO: &str = "ketch.local/demo:1";
const NODES: [&str; 3] = ["master", "node1", "node2"];

/// Two web servers, one on each worker, behind a service of the given type.
fn web(ns: &Namespace<'_>, service_type: &str) {
    for node in ["node1", "node2"] {
        ns.create(&format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: web-{node}, labels: {{app: web}}}}, spec: {{nodeName: {node}, \
             containers: [{{name: web, image: '{DEMO}', ports: [{{containerPort: 8080}}]}}]}}}}"
        ));
    }
    ns.create(&format!(
        "{{apiVersion: v1, kind: Service, metadata: {{name: web}}, spec: {{type: {service_type}, selector: {{app: web}}, \
         ports: [{{port: 80, targetPort: 8080}}]}}}}"
    ));
    ns.ready_pods("app=web", 2);
}

fn fetch_from_pod(ns: &Namespace<'_>, pod: &str, url: &str) -> Result<String, String> {
    ns.sh(pod, &format!("timeout 5 wget -q -O - {url}"))
}

fn fetch_from_node(cluster: &Cluster, node: &str, url: &str) -> Result<String, String> {
    cluster.in_node(node, &["curl", "-sS", "-m", "5", url])
}

#[test]
#[ignore = "needs a cluster (hack/test)"]
fn pods_reach_each_other_across_nodes() {
    let cluster = Cluster::from_env();
    let ns = cluster.namespace("overlay");
    web(&ns, "ClusterIP");
    for (from, to) in [("web-node1", "web-node2"), ("web-node2", "web-node1")] {
        let ip = text(&ns.get(&["pod", to])["status"]["podIP"]);
        poll(&format!("{from} reaches {to} at {ip}"), LIMIT, || {
            let answer = fetch_from_pod(&ns, from, &format!("http://{ip}:8080/"))?;
            check(answer == to, || answer.clone())
        });
    }
}

#[test]
#[ignore = "needs a cluster (hack/test)"]
fn a_service_is_reachable_from_everywhere_and_spreads() {
    let cluster = Cluster::from_env();
    let ns = cluster.namespace("service");
    web(&ns, "ClusterIP");
    let ip = text(&ns.get(&["service", "web"])["spec"]["clusterIP"]);
    let url = format!("http://{ip}/");
    for pod in ["web-node1", "web-node2"] {
        poll(&format!("{pod} reaches the service"), LIMIT, || fetch_from_pod(&ns, pod, &url));
    }
    for node in NODES {
        poll(&format!("{node} reaches the service"), LIMIT, || fetch_from_node(&cluster, node, &url));
    }
    let mut seen = BTreeSet::new();
    poll("both pods answer", LIMIT, || {
        seen.insert(fetch_from_pod(&ns, "web-node1", &url)?);
        check(seen.len() == 2, || format!("{seen:?}"))
    });
}

#[test]
#[ignore = "needs a cluster (hack/test)"]
fn a_node_port_answers_on_every_node() {
    let cluster = Cluster::from_env();
    let ns = cluster.namespace("nodeport");
    web(&ns, "NodePort");
    let port = ns.get(&["service", "web"])["spec"]["ports"][0]["nodePort"].as_u64().expect("a node port");
    for (index, node) in NODES.iter().enumerate() {
        let url = format!("http://10.99.0.{}:{port}/", 10 + index);
        poll(&format!("{url} answers from the fabric and from {node}"), LIMIT, || {
            fetch_from_node(&cluster, "fabric", &url)?;
            fetch_from_node(&cluster, node, &url)
        });
    }
}

#[test]
#[ignore = "needs a cluster (hack/test)"]
fn names_resolve_in_pods() {
    let cluster = Cluster::from_env();
    let ns = cluster.namespace("dns");
    web(&ns, "ClusterIP");
    for name in ["kubernetes.default.svc.cluster.local", "web", &format!("web.{}.svc.cluster.local", ns.name)] {
        // busybox asks for every name of the search path and fails when one of them does not exist.
        let script = format!("nslookup {name} | grep '^Address: 10\\.96\\.'");
        poll(&format!("{name} resolves"), LIMIT, || ns.sh("web-node1", &script));
    }
    poll("the service answers by its name", LIMIT, || fetch_from_pod(&ns, "web-node2", "http://web/"));
    assert!(ns.sh("web-node1", "nslookup no-such-service.default.svc.cluster.local.").is_err());
}

#[test]
#[ignore = "needs a cluster (hack/test)"]
fn flannel_subnets_are_in_etcd() {
    let cluster = Cluster::from_env();
    let keys = cluster
        .in_node(
            "master",
            &["env", "ETCDCTL_API=3", "etcdctl", "get", "--prefix", "--keys-only", "/coreos.com/network/subnets/"],
        )
        .expect("etcd answers");
    assert_eq!(keys.lines().filter(|line| !line.is_empty()).count(), 3, "{keys}");
}
