//! What users install into every cluster, unchanged: metrics-server behind the aggregator, which asks kubelets and feeds
//! `kubectl top`, and CoreDNS in the place of cluster-dns. `KETCH_UPSTREAM` is the directory that
//! `hack/upstream/build DIRECTORY addons` has filled.

use std::time::Duration;

use ketch_test::{Cluster, check, condition, poll, setting, text};

const METRICS_SERVER: &str = include_str!("../addons/metrics-server.yaml");
const COREDNS: &str = include_str!("../addons/coredns.yaml");
/// Metrics come after two rounds of questions, which are fifteen seconds apart.
const PATIENCE: Duration = Duration::from_secs(150);

/// Applies a manifest whose programs are on the host.
fn install(cluster: &Cluster, manifest: &str) {
    cluster.kubectl_stdin(&["apply", "-f", "-"], &manifest.replace("PROGRAMS", &setting("KETCH_UPSTREAM")));
}

fn roll_out(cluster: &Cluster, deployment: &str) {
    let arguments = ["-n", "kube-system", "rollout", "status", deployment, "--timeout=150s"];
    cluster.try_kubectl(&arguments).unwrap_or_else(|error| {
        let pods = cluster.try_kubectl(&["-n", "kube-system", "describe", "pods"]).unwrap_or_default();
        panic!("{deployment}: {error}\n{pods}")
    });
}

/// A quantity in the units that `kubectl top` prints: `12m`, `34Mi`.
fn number(cell: &str, unit: &str) -> Result<u64, String> {
    let digits = cell.strip_suffix(unit).ok_or_else(|| format!("{cell:?} is not in {unit}"))?;
    digits.parse().map_err(|error| format!("{cell:?}: {error}"))
}

#[test]
#[ignore = "needs a cluster (hack/test --addons)"]
fn metrics_server_feeds_kubectl_top() {
    let cluster = Cluster::from_env();
    install(&cluster, METRICS_SERVER);
    roll_out(&cluster, "deployment/metrics-server");
    poll("the aggregated API is available", PATIENCE, || {
        let service = cluster.try_get(&["apiservice", "v1beta1.metrics.k8s.io"])?;
        check(condition(&service, "Available") == "True", || service["status"].to_string())
    });
    let ns = cluster.namespace("top");
    ns.create(
        "{apiVersion: v1, kind: Pod, metadata: {name: busy, labels: {app: busy}}, spec: {containers: [{name: main, \
         image: 'ketch.local/demo:1', command: [sh, -c, 'while true; do :; done'], \
         resources: {limits: {cpu: 200m, memory: 64Mi}}}]}}",
    );
    ns.ready_pods("app=busy", 1);
    poll("nodes have figures", PATIENCE, || {
        let top = cluster.try_kubectl(&["top", "nodes", "--no-headers"])?;
        check(top.lines().count() == 3 && !top.contains("unknown"), || top.clone())?;
        for line in top.lines() {
            let cells: Vec<&str> = line.split_whitespace().collect();
            check(number(cells[1], "m")? > 0 && number(cells[3], "Mi")? > 0, || top.clone())?;
        }
        Ok(())
    });
    poll("the pod's CPU is near its limit of 200m, its memory is some", PATIENCE, || {
        let top = ns.try_kubectl(&["top", "pod", "busy", "--containers", "--no-headers"])?;
        let cells: Vec<&str> = top.split_whitespace().collect();
        check(cells.len() == 4 && cells[1] == "main", || top.clone())?;
        let near = (100..=260).contains(&number(cells[2], "m")?);
        check(near && number(cells[3], "Mi")? <= 64, || top.clone())
    });
}

#[test]
#[ignore = "needs a cluster (hack/test --addons)"]
fn coredns_takes_the_place_of_cluster_dns() {
    let cluster = Cluster::from_env();
    install(&cluster, COREDNS);
    roll_out(&cluster, "deployment/coredns");
    cluster.kubectl(&["-n", "kube-system", "scale", "deployment/cluster-dns", "--replicas=0"]);
    poll("only CoreDNS is behind the service", PATIENCE, || {
        let pods = cluster.try_get(&["-n", "kube-system", "pods", "-l", "k8s-app=kube-dns"])?;
        let programs =
            pods["items"].as_array().into_iter().flatten().map(|pod| text(&pod["metadata"]["labels"]["program"]));
        let programs: Vec<String> = programs.collect();
        check(programs == ["coredns", "coredns"], || format!("{programs:?}"))
    });
    let ns = cluster.namespace("coredns");
    ns.create(include_str!("../../hack/manifests/tutorial/web-rc.yaml"));
    ns.kubectl(&["expose", "rc", "web", "--port=80", "--target-port=8080"]);
    let pods = ns.ready_pods("app=web", 2);
    let (pod, names) = (text(&pods[0]["metadata"]["name"]), pods.iter().map(|pod| text(&pod["metadata"]["name"])));
    let names: Vec<String> = names.collect();
    poll("a pod finds a service by its short name and its long one", PATIENCE, || {
        for host in ["web", &format!("web.{}.svc.cluster.local", ns.name)] {
            // Each answer is the name of the pod that gave it.
            let answer = ns.sh(&pod, &format!("timeout 5 wget -q -O - http://{host}/"))?;
            check(names.iter().any(|name| answer.trim() == name), || answer)?;
        }
        Ok(())
    });
    cluster.kubectl(&["-n", "kube-system", "scale", "deployment/cluster-dns", "--replicas=2"]);
    cluster.kubectl(&["-n", "kube-system", "delete", "deployment/coredns"]);
}
