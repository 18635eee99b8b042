//! What users must not notice, or only briefly: killed components, a lost etcd member, a lost node. Run one at a time.

use std::time::Duration;

use ketch_test::{Cluster, LIMIT, Namespace, check, condition, is_ready, poll, text};

const DEMO: &str = "ketch.local/demo:1";

fn web(ns: &Namespace<'_>, node: &str) {
    ns.create(&format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: web, labels: {{app: web}}}}, spec: {{nodeName: {node}, \
         containers: [{{name: web, image: '{DEMO}', ports: [{{containerPort: 8080}}]}}]}}}}"
    ));
    ns.create(
        "{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}}",
    );
    ns.ready_pods("app=web", 1);
}

/// The number of times a unit was started.
fn starts(cluster: &Cluster, node: &str, unit: &str) -> u32 {
    let listing = cluster.unit(node, "list", "");
    let line = listing.lines().find(|line| line.split_whitespace().next() == Some(unit)).unwrap_or_default().to_owned();
    line.split_whitespace().last().and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("no {unit} in\n{listing}"))
}

fn kill_and_wait(cluster: &Cluster, node: &str, unit: &str) {
    let before = starts(cluster, node, unit);
    cluster.unit(node, "kill", unit);
    poll(&format!("{unit} on {node} is started again"), LIMIT, || {
        let now = starts(cluster, node, unit);
        check(now > before, || format!("{now} starts"))
    });
}

#[test]
#[ignore = "needs a cluster (hack/test)"]
fn killed_components_are_not_missed() {
    let cluster = Cluster::from_env();
    let ns = cluster.namespace("kill");
    web(&ns, "node1");
    let container =
        |ns: &Namespace<'_>| ns.get(&["pod", "web"])["status"]["containerStatuses"][0]["containerID"].clone();
    let before = container(&ns);
    for (node, unit) in [
        ("node1", "kubelet"),
        ("node1", "kube-proxy"),
        ("node1", "flanneld"),
        ("master", "kube-controller-manager"),
        ("master", "kube-scheduler"),
        ("master", "kube-apiserver"),
    ] {
        kill_and_wait(&cluster, node, unit);
    }
    poll("the API server answers again", LIMIT, || cluster.try_kubectl(&["get", "--raw", "/readyz"]));
    // Work goes on: a new controller is created, its pods scheduled, started and served.
    ns.kubectl(&["create", "deployment", "after", &format!("--image={DEMO}"), "--replicas=2"]);
    ns.ready_pods("app=after", 2);
    let ip = text(&ns.get(&["service", "web"])["spec"]["clusterIP"]);
    poll("the service is still reachable", LIMIT, || {
        cluster.in_node("node1", &["curl", "-sS", "-m", "5", &format!("http://{ip}/")])
    });
    let pod = ns.get(&["pod", "web"]);
    assert_eq!(container(&ns), before, "the container was replaced");
    assert_eq!(pod["status"]["containerStatuses"][0]["restartCount"], 0);
    assert!(is_ready(&pod));
}

#[test]
#[ignore = "needs a cluster (hack/test)"]
fn a_lost_etcd_member_changes_nothing() {
    let cluster = Cluster::from_env();
    let ns = cluster.namespace("etcd");
    cluster.unit("node2", "stop", "etcd");
    for round in 0..5 {
        let name = format!("c{round}");
        poll("writes succeed without one member", Duration::from_secs(20), || {
            ns.try_kubectl(&["create", "configmap", &name])
        });
    }
    assert_eq!(
        ns.get(&["configmaps"])["items"]
            .as_array()
            .map(|all| all.iter().filter(|c| text(&c["metadata"]["name"]).starts_with('c')).count()),
        Some(5)
    );
    cluster.unit("node2", "start", "etcd");
    poll("the member is back", LIMIT, || {
        cluster.in_node("node2", &["env", "ETCDCTL_API=3", "etcdctl", "endpoint", "health"])
    });
}

#[test]
#[ignore = "needs a cluster (hack/test)"]
fn pods_of_a_lost_node_are_replaced() {
    let cluster = Cluster::from_env();
    let ns = cluster.namespace("node");
    // Tolerations as users set them who cannot wait the default five minutes.
    ns.create(&format!(
        "{{apiVersion: apps/v1, kind: Deployment, metadata: {{name: web}}, spec: {{replicas: 2, selector: {{matchLabels: {{app: web}}}}, \
         template: {{metadata: {{labels: {{app: web}}}}, spec: {{tolerations: [\
         {{key: node.kubernetes.io/unreachable, operator: Exists, effect: NoExecute, tolerationSeconds: 5}},\
         {{key: node.kubernetes.io/not-ready, operator: Exists, effect: NoExecute, tolerationSeconds: 5}}],\
         topologySpreadConstraints: [{{maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: ScheduleAnyway, \
         labelSelector: {{matchLabels: {{app: web}}}}}}], containers: [{{name: web, image: '{DEMO}'}}]}}}}}}}}"
    ));
    ns.ready_pods("app=web", 2);
    cluster.in_node("node2", &["ip", "link", "set", "eth0", "down"]).expect("the link goes down");
    let limit = Duration::from_secs(120);
    poll("node2 is not ready", limit, || {
        let node = cluster.try_get(&["node", "node2"])?;
        check(!is_ready(&node), || format!("Ready={}", condition(&node, "Ready")))
    });
    poll("both pods run on node1", limit, || {
        let list = ns.try_get(&["pods", "-l", "app=web"])?;
        let running = list["items"].as_array().into_iter().flatten().filter(|pod| {
            is_ready(pod) && text(&pod["spec"]["nodeName"]) == "node1" && pod["metadata"]["deletionTimestamp"].is_null()
        });
        let count = running.count();
        check(count == 2, || format!("{count} run on node1"))
    });
    // A link that goes down loses its routes.
    for argv in [vec!["ip", "link", "set", "eth0", "up"], vec!["ip", "route", "replace", "default", "via", "10.99.0.1"]]
    {
        cluster.in_node("node2", &argv).expect("the link comes back");
    }
    poll("node2 rejoins", limit, || {
        let node = cluster.try_get(&["node", "node2"])?;
        check(is_ready(&node), || format!("Ready={}", condition(&node, "Ready")))
    });
}
