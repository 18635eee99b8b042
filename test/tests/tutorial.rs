//! The README's tutorial and everyday kubectl, against a live cluster.

use std::io::{BufRead, BufReader};
use std::time::Duration;

use ketch_test::{Cluster, LIMIT, check, is_ready, poll, text};

const RC: &str = include_str!("../../hack/manifests/tutorial/web-rc.yaml");
const DEMO: &str = "ketch.local/demo:1";

#[test]
#[ignore = "needs a cluster (hack/test)"]
fn the_cluster_describes_itself() {
    let cluster = Cluster::from_env();
    let nodes = cluster.kubectl(&["get", "nodes", "-o", "wide"]);
    for word in ["master", "node1", "node2", "control-plane", "containerd://", "10.99.0.10"] {
        assert!(nodes.contains(word), "{word} is missing in\n{nodes}");
    }
    let statuses = cluster.kubectl(&["get", "componentstatuses"]);
    for word in ["scheduler", "controller-manager", "etcd-0", "Healthy"] {
        assert!(statuses.contains(word), "{word} is missing in\n{statuses}");
    }
    assert!(cluster.kubectl(&["cluster-info"]).contains("is running at"));
    assert!(cluster.kubectl(&["version"]).contains("Server Version: v1.37"));
    let resources = cluster.kubectl(&["api-resources"]);
    for word in ["pods", "deployments", "replicationcontrollers", "networkpolicies"] {
        assert!(resources.contains(word), "{word} is missing in\n{resources}");
    }
    let explained = cluster.kubectl(&["explain", "pod.spec"]);
    assert!(explained.contains("containers") && explained.contains("-required-"), "{explained}");
    let old = cluster.old_kubectl(&["get", "nodes"]);
    assert!(old.contains("node2"), "{old}");
}

#[test]
#[ignore = "needs a cluster (hack/test)"]
fn a_replication_controller_is_created_exposed_scaled_labelled_and_deleted() {
    let cluster = Cluster::from_env();
    let ns = cluster.namespace("rc");
    ns.create(RC);
    let pods = ns.ready_pods("app=web", 2);
    ns.kubectl(&["expose", "rc", "web", "--port=80", "--target-port=8080"]);
    assert_eq!(text(&ns.get(&["service", "web"])["spec"]["type"]), "ClusterIP");

    ns.kubectl(&["scale", "rc", "web", "--replicas=4"]);
    ns.ready_pods("app=web", 4);
    ns.kubectl(&["scale", "rc", "web", "--replicas=1"]);
    ns.ready_pods("app=web", 1);

    // A pod that loses its label is let go and replaced.
    let name = ns.ready_pod("app=web");
    ns.kubectl(&["label", "pod", &name, "app=released", "--overwrite"]);
    ns.ready_pods("app=web", 1);
    assert_eq!(ns.ready_pod("app=released"), name);
    ns.kubectl(&["delete", "pod", &name, "--grace-period=1"]);

    ns.kubectl(&["delete", "rc", "web"]);
    poll("all pods of the deleted controller are gone", LIMIT, || {
        let left = ns.try_get(&["pods"])?;
        check(left["items"].as_array().is_some_and(Vec::is_empty), || left["items"].to_string())
    });
    assert_eq!(pods.len(), 2);
}

#[test]
#[ignore = "needs a cluster (hack/test)"]
fn a_deployment_rolls_out_and_back() {
    let cluster = Cluster::from_env();
    let ns = cluster.namespace("deploy");
    ns.kubectl(&["create", "deployment", "web", &format!("--image={DEMO}"), "--replicas=3", "--port=8080"]);
    ns.kubectl(&["rollout", "status", "deployment/web", "--timeout=90s"]);
    ns.kubectl(&["set", "env", "deployment/web", "COLOUR=blue"]);
    ns.kubectl(&["rollout", "status", "deployment/web", "--timeout=90s"]);
    let history = ns.kubectl(&["rollout", "history", "deployment/web"]);
    assert!(history.contains('2'), "{history}");
    ns.kubectl(&["rollout", "undo", "deployment/web"]);
    ns.kubectl(&["rollout", "status", "deployment/web", "--timeout=90s"]);
    let env = &ns.get(&["deployment", "web"])["spec"]["template"]["spec"]["containers"][0]["env"];
    assert!(env.is_null(), "undo kept {env}");
}

#[test]
#[ignore = "needs a cluster (hack/test)"]
fn apply_edits_on_both_sides() {
    let cluster = Cluster::from_env();
    let ns = cluster.namespace("apply");
    let config =
        |value: &str| format!("{{apiVersion: v1, kind: ConfigMap, metadata: {{name: c}}, data: {{key: {value}}}}}");
    assert!(ns.apply(&config("one")).contains("created"));
    assert!(ns.apply(&config("one")).contains("unchanged"));
    assert!(ns.apply(&config("two")).contains("configured"));
    // Another manager that wants the same field is refused, until it insists.
    let server_side = ["-n", &ns.name, "apply", "--server-side", "--field-manager=other", "-f", "-"];
    let refused = cluster.try_kubectl_stdin(&server_side, &config("three")).expect_err("a conflict");
    assert!(refused.contains("conflict"), "{refused}");
    cluster.kubectl_stdin(&[server_side.as_slice(), &["--force-conflicts"]].concat(), &config("three"));
    assert_eq!(text(&ns.get(&["configmap", "c"])["data"]["key"]), "three");
    // What `kubectl edit` sends.
    ns.kubectl(&["patch", "configmap", "c", "--type=strategic", "-p", r#"{"data":{"more":"yes"}}"#]);
    ns.kubectl(&["patch", "configmap", "c", "--type=json", "-p", r#"[{"op":"remove","path":"/data/key"}]"#]);
    assert_eq!(ns.get(&["configmap", "c"])["data"], serde_json::json!({"more": "yes"}));
}

#[test]
#[ignore = "needs a cluster (hack/test)"]
fn mistakes_are_answered_with_a_status() {
    let cluster = Cluster::from_env();
    let ns = cluster.namespace("mistakes");
    let create = ["-n", &ns.name, "create", "-f", "-"];
    for (manifest, expected) in [
        ("{apiVersion: v1, kind: Podd, metadata: {name: p}}", "no matches for kind"),
        ("{apiVersion: v1, kind: Pod, metadata: {name: p}, spec: {containers: []}}", "spec.containers: Required value"),
        (
            "{apiVersion: v1, kind: Pod, metadata: {name: P_}, spec: {containers: [{name: c, image: i}]}}",
            "metadata.name: Invalid value",
        ),
        ("{apiVersion: v1, kind: ConfigMap, metadata: {name: c}, dataa: {}}", "unknown field"),
    ] {
        let error = cluster.try_kubectl_stdin(&create, manifest).expect_err(manifest);
        assert!(error.contains(expected), "{manifest}: {error}");
    }
    let missing = ns.try_kubectl(&["get", "pod", "nobody"]).expect_err("no such pod");
    assert!(missing.contains(r#"pods "nobody" not found"#), "{missing}");
}

#[test]
#[ignore = "needs a cluster (hack/test)"]
fn one_can_look_into_containers() {
    let cluster = Cluster::from_env();
    let ns = cluster.namespace("look");
    let script = "i=0; while true; do echo line $i; i=$((i+1)); sleep 0.2; done";
    ns.kubectl(&["run", "talk", &format!("--image={DEMO}"), "--labels=app=talk", "--", "sh", "-c", script]);
    ns.ready_pod("app=talk");
    poll("logs can be read", LIMIT, || {
        let log = ns.try_kubectl(&["logs", "talk", "--tail=100"])?;
        check(log.contains("line 1"), || log.clone())
    });

    let mut follow = cluster.spawn_kubectl(&["-n", &ns.name, "logs", "-f", "--tail=1", "talk"]);
    let lines = BufReader::new(follow.0.stdout.take().expect("output was asked for")).lines();
    assert_eq!(lines.take(3).map_while(Result::ok).count(), 3, "logs -f ended early");

    assert_eq!(ns.sh("talk", "echo hello; hostname").as_deref(), Ok("hello\ntalk"));
    assert!(ns.sh("talk", "exit 3").expect_err("the exit code arrives").contains("exit code 3"));
    let exec = ["-n", &ns.name, "exec", "-i", "talk", "--", "cat"];
    assert_eq!(cluster.kubectl_stdin(&exec, "through and back"), "through and back");

    let local = std::env::temp_dir().join(format!("{}-file", ns.name));
    std::fs::write(&local, "content").expect("a temporary file");
    let path = local.to_str().expect("a printable path");
    ns.kubectl(&["cp", path, "talk:/tmp/file"]);
    assert_eq!(ns.sh("talk", "cat /tmp/file").as_deref(), Ok("content"));
    std::fs::remove_file(&local).expect("the temporary file is there");
}

#[test]
#[ignore = "needs a cluster (hack/test)"]
fn a_port_is_forwarded() {
    let cluster = Cluster::from_env();
    let ns = cluster.namespace("forward");
    ns.kubectl(&["run", "web", &format!("--image={DEMO}"), "--labels=app=web", "--port=8080"]);
    ns.ready_pod("app=web");
    let mut forward = cluster.spawn_kubectl(&["-n", &ns.name, "port-forward", "pod/web", ":8080"]);
    let mut lines = BufReader::new(forward.0.stdout.take().expect("output was asked for")).lines();
    let line = lines.next().expect("port-forward says where it listens").expect("readable output");
    let port: u16 = line
        .strip_prefix("Forwarding from 127.0.0.1:")
        .and_then(|rest| rest.split(' ').next())
        .and_then(|port| port.parse().ok())
        .unwrap_or_else(|| panic!("unexpected: {line}"));
    poll("the forwarded port answers", LIMIT, || {
        let body = http_get(port).map_err(|error| error.to_string())?;
        check(body.ends_with("web\n"), || body.clone())
    });
}

fn http_get(port: u16) -> std::io::Result<String> {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut body = String::new();
    stream.read_to_string(&mut body)?;
    Ok(body)
}

#[test]
#[ignore = "needs a cluster (hack/test)"]
fn a_watch_shows_changes() {
    let cluster = Cluster::from_env();
    let ns = cluster.namespace("watch");
    let mut watch = cluster.spawn_kubectl(&["-n", &ns.name, "get", "configmaps", "--watch", "-o", "name"]);
    let mut lines = BufReader::new(watch.0.stdout.take().expect("output was asked for")).lines();
    ns.kubectl(&["create", "configmap", "seen"]);
    let seen = lines.by_ref().map_while(Result::ok).take(10).any(|line| line.contains("configmap/seen"));
    assert!(seen, "the new object did not arrive");
}

#[test]
#[ignore = "needs a cluster (hack/test)"]
fn deleting_takes_little_longer_than_the_grace_period() {
    let cluster = Cluster::from_env();
    let ns = cluster.namespace("delete");
    ns.kubectl(&["run", "p", &format!("--image={DEMO}"), "--labels=app=p", "--", "sleep", "1000"]);
    let pod = &ns.ready_pods("app=p", 1)[0];
    assert!(is_ready(pod));
    ns.kubectl(&["delete", "pod", "p", "--grace-period=1"]);
    assert!(ns.try_kubectl(&["get", "pod", "p"]).expect_err("gone").contains("not found"));
}
