//! A node's life beside its pods': what does not fit is evicted, pressure is told and passes, and a kubelet gets its
//! certificates from the cluster and renews them. Each test has the node for itself: run them one after another.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use ketch_test::{Cluster, LIMIT, Namespace, Running, check, condition, poll, setting, text};
use rcgen::{CertificateParams, DistinguishedName, DnType, Issuer, KeyPair};
use serde_json::{Value, json};

const NODE: &str = "node2";
const CONFIG: &str = "/etc/kubernetes/kubelet.yaml";
/// The kubelet looks for pressure and at volumes every ten seconds, and pods have their grace.
const PATIENCE: Duration = Duration::from_secs(120);

fn pod(name: &str, container: &Value, volumes: &Value) -> String {
    let mut main = json!({"name": "main", "image": "ketch.local/demo:1"});
    if let (Some(main), Some(more)) = (main.as_object_mut(), container.as_object()) {
        main.extend(more.clone());
    }
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}},
        "spec": {"nodeName": NODE, "terminationGracePeriodSeconds": 1, "containers": [main], "volumes": volumes},
    })
    .to_string()
}

/// Waits for a pod's end; answers the reason and the message.
fn end_of(ns: &Namespace<'_>, name: &str) -> (String, String) {
    poll(&format!("pod {name} has failed"), PATIENCE, || {
        let pod = ns.try_get(&["pod", name])?;
        check(pod["status"]["phase"] == "Failed", || pod["status"].to_string())?;
        Ok((text(&pod["status"]["reason"]), text(&pod["status"]["message"])))
    })
}

#[test]
#[ignore = "needs a cluster (hack/test)"]
fn pods_that_fill_the_disk_are_evicted() {
    let cluster = Cluster::from_env();
    let ns = cluster.namespace("disk");
    let write = |to: &str| json!(["sh", "-c", format!("dd if=/dev/zero of={to} bs=1M count=16 && sleep 10000")]);
    let mounted = json!({"command": write("/disk/x"), "volumeMounts": [{"name": "disk", "mountPath": "/disk"}]});
    ns.create(&pod("volume", &mounted, &json!([{"name": "disk", "emptyDir": {"sizeLimit": "4Mi"}}])));
    let limited = json!({"command": write("/x"), "resources": {"limits": {"ephemeral-storage": "4Mi"}}});
    ns.create(&pod("layer", &limited, &json!([])));
    for (name, expected) in [
        ("volume", "Usage of EmptyDir volume \"disk\" exceeds the limit \"4Mi\". "),
        ("layer", "Pod ephemeral local storage usage exceeds the total limit of containers 4Mi. "),
    ] {
        assert_eq!(end_of(&ns, name), ("Evicted".to_owned(), expected.to_owned()), "{name}");
    }
}

/// The node's kubelet with other settings, until this is dropped.
struct Reconfigured<'a>(&'a Cluster);

impl<'a> Reconfigured<'a> {
    fn new(cluster: &'a Cluster, change: impl FnOnce(&mut Value)) -> Self {
        let file = |argv: &[&str]| cluster.in_node(NODE, argv).unwrap_or_else(|error| panic!("{argv:?}: {error}"));
        file(&["cp", CONFIG, &format!("{CONFIG}.before")]);
        let guard = Self(cluster);
        let mut config: Value = serde_json::from_str(&file(&["cat", CONFIG])).expect("the kubelet's file is JSON");
        change(&mut config);
        file(&["sh", "-c", &format!("echo '{config}' > {CONFIG}")]);
        cluster.unit(NODE, "restart", "kubelet");
        guard
    }
}

impl Drop for Reconfigured<'_> {
    fn drop(&mut self) {
        // When it fails, the next test says so; this one must keep its own message.
        let _ = self.0.in_node(NODE, &["mv", &format!("{CONFIG}.before"), CONFIG]);
        self.0.unit(NODE, "restart", "kubelet");
    }
}

fn node_condition(cluster: &Cluster, type_: &str, wanted: &str) {
    poll(&format!("{type_} of {NODE} is {wanted}"), PATIENCE, || {
        let node = cluster.try_get(&["node", NODE])?;
        check(condition(&node, type_) == wanted, || node["status"]["conditions"].to_string())
    });
}

/// All memory is asked to be free, which no node has.
#[test]
#[ignore = "needs a cluster (hack/test)"]
fn memory_pressure_is_told_evicts_refuses_and_passes() {
    let cluster = Cluster::from_env();
    let ns = cluster.namespace("pressure");
    let sleep = json!({"command": ["sleep", "10000"]});
    ns.create(&pod("early", &sleep, &json!([])));
    ns.ready_pods("app=early", 1);
    {
        let _pressed = Reconfigured::new(&cluster, |config| config["evictionHard"]["memory.available"] = json!("100%"));
        node_condition(&cluster, "MemoryPressure", "True");
        let (reason, message) = end_of(&ns, "early");
        assert_eq!(reason, "Evicted");
        assert!(message.starts_with("The node was low on resource: memory. Threshold quantity: "), "{message}");
        ns.create(&pod("late", &sleep, &json!([])));
        let (reason, message) = end_of(&ns, "late");
        assert_eq!(reason, "Evicted", "{message}");
        assert!(message.contains("The node had condition: [MemoryPressure]."), "{message}");
        poll("the node has the taint", PATIENCE, || {
            let node = cluster.try_get(&["node", NODE])?;
            let taints = node["spec"]["taints"].to_string();
            check(taints.contains("node.kubernetes.io/memory-pressure"), || taints)
        });
    }
    node_condition(&cluster, "MemoryPressure", "False");
    node_condition(&cluster, "Ready", "True");
    ns.create(&pod("after", &sleep, &json!([])));
    ns.ready_pods("app=after", 1);
}

const BOOTSTRAP: &str = "\
{apiVersion: v1, kind: Secret, type: bootstrap.kubernetes.io/token, \
 metadata: {name: bootstrap-token-ketch1, namespace: kube-system}, \
 stringData: {token-id: ketch1, token-secret: 0123456789abcdef, usage-bootstrap-authentication: 'true', \
 auth-extra-groups: 'system:bootstrappers:ketch'}}
---
{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRoleBinding, metadata: {name: test-bootstrap}, \
 roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: 'system:node-bootstrapper'}, \
 subjects: [{apiGroup: rbac.authorization.k8s.io, kind: Group, name: 'system:bootstrappers:ketch'}]}
---
{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRoleBinding, metadata: {name: test-approve-first}, \
 roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, \
 name: 'system:certificates.k8s.io:certificatesigningrequests:nodeclient'}, \
 subjects: [{apiGroup: rbac.authorization.k8s.io, kind: Group, name: 'system:bootstrappers:ketch'}]}
---
{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRoleBinding, metadata: {name: test-approve-next}, \
 roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, \
 name: 'system:certificates.k8s.io:certificatesigningrequests:selfnodeclient'}, \
 subjects: [{apiGroup: rbac.authorization.k8s.io, kind: Group, name: 'system:nodes'}]}
";

/// A kubelet that has nothing but a bootstrap kubeconfig, in the place of the node's own.
struct Joining<'a> {
    cluster: &'a Cluster,
    /// What it is given and what it makes; the same directory on the host and in the node.
    directory: tempfile::TempDir,
}

impl<'a> Joining<'a> {
    fn new(cluster: &'a Cluster) -> Self {
        let joining = Self { cluster, directory: tempfile::tempdir().expect("a temporary directory") };
        let kubeconfig = std::fs::read_to_string(setting("KUBECONFIG")).expect("the kubeconfig can be read");
        joining.write("admin", &kubeconfig);
        let file = joining.path("bootstrap");
        joining.write("bootstrap", &kubeconfig);
        let config = |args: &[&str]| cluster.kubectl(&[&["config", "--kubeconfig", &file], args].concat());
        // The node reaches the server where its own kubelet does.
        let own =
            cluster.in_node(NODE, &["cat", &joining.argument("--kubeconfig=")]).expect("the kubelet's kubeconfig");
        joining.write("own", &own);
        let own = joining.path("own");
        let own: Value =
            serde_json::from_str(&cluster.kubectl(&["config", "view", "--raw", "-o", "json", "--kubeconfig", &own]))
                .expect("a kubeconfig");
        let server = text(&own["clusters"][0]["cluster"]["server"]);
        let name = config(&["view", "-o", "jsonpath={.clusters[0].name}"]);
        config(&["set-cluster", &name, "--server", &server]);
        config(&["set-credentials", "bootstrap", "--token=ketch1.0123456789abcdef"]);
        config(&["set-context", "--current", "--user=bootstrap"]);
        let mut kubelet: Value =
            serde_json::from_str(&cluster.in_node(NODE, &["cat", CONFIG]).expect("the kubelet's file")).expect("JSON");
        for key in ["tlsCertFile", "tlsPrivateKeyFile"] {
            kubelet.as_object_mut().expect("an object").remove(key);
        }
        kubelet["rotateCertificates"] = json!(true);
        kubelet["serverTLSBootstrap"] = json!(true);
        joining.write("kubelet.yaml", &kubelet.to_string());
        joining
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }

    fn write(&self, name: &str, content: &str) {
        std::fs::write(self.path(name), content).unwrap_or_else(|error| panic!("cannot write {name}: {error}"));
    }

    /// An argument of the node's own kubelet.
    fn argument(&self, flag: &str) -> String {
        self.command_line().into_iter().find_map(|arg| arg.strip_prefix(flag).map(str::to_owned)).unwrap_or_default()
    }

    fn command_line(&self) -> Vec<String> {
        let file = Path::new(&setting("KUBECONFIG")).with_file_name("nodes").join(NODE).join("units.json");
        let units = std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let units: Vec<Value> = serde_json::from_str(&units).expect("a list of units");
        let unit = units.iter().find(|unit| unit["name"] == "kubelet").expect("the node has a kubelet");
        unit["argv"].as_array().into_iter().flatten().map(text).collect()
    }

    fn start(&self) -> Kubelet<'_> {
        let own = self.command_line();
        let pid_file = self.path("pid");
        let mut command = Command::new(setting("KETCH_BIN"));
        command.args(["exec", "--name", &setting("KETCH_CLUSTER"), NODE, "--", "sh", "-c"]);
        // Its pid in the node: what runs on the host is only the way into it.
        command.arg(format!("echo $$ > {pid_file}; exec \"$@\"")).arg("sh").arg(&own[0]);
        command.args(own[1..].iter().filter(|arg| !arg.starts_with("--config=") && !arg.starts_with("--kubeconfig=")));
        for (flag, file) in [
            ("config", "kubelet.yaml"),
            ("bootstrap-kubeconfig", "bootstrap"),
            ("kubeconfig", "kubeconfig"),
            ("cert-dir", "pki"),
        ] {
            command.arg(format!("--{flag}={}", self.path(file)));
        }
        let log = std::fs::File::create(self.path("log")).expect("a log");
        let errors = log.try_clone().expect("a log");
        let way = command.stdin(Stdio::null()).stdout(log).stderr(errors).spawn().expect("the kubelet starts");
        Kubelet { cluster: self.cluster, pid_file, _way: Running(way) }
    }

    fn certificate(&self, name: &str) -> PathBuf {
        self.directory.path().join("pki").join(format!("{name}-current.pem"))
    }

    fn log(&self) -> String {
        let log = std::fs::read_to_string(self.path("log")).unwrap_or_default();
        log.lines().rev().take(5).collect::<Vec<_>>().join("\n")
    }

    /// A client certificate of the cluster's CA that is nearly over, in the place of the present one.
    fn age_client_certificate(&self) -> String {
        let pki = Path::new(&setting("KUBECONFIG")).with_file_name("pki");
        let read =
            |name: &str| std::fs::read_to_string(pki.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        let ca = KeyPair::from_pem(&read("ca.key")).expect("the CA's key");
        let issuer = Issuer::from_ca_cert_pem(&read("ca.crt"), ca).expect("the CA's certificate");
        let mut params = CertificateParams::default();
        let mut name = DistinguishedName::new();
        name.push(DnType::OrganizationName, "system:nodes");
        name.push(DnType::CommonName, format!("system:node:{NODE}"));
        params.distinguished_name = name;
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        let now = SystemTime::now();
        params.not_before = (now - Duration::from_secs(3600)).into();
        params.not_after = (now + Duration::from_secs(300)).into();
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &issuer).expect("a certificate");
        let aged = certificate.pem() + &key.serialize_pem();
        std::fs::write(self.certificate("kubelet-client"), &aged).expect("the certificate can be replaced");
        aged
    }
}

/// A kubelet that runs beside the node's units, until this is dropped.
struct Kubelet<'a> {
    cluster: &'a Cluster,
    pid_file: String,
    _way: Running,
}

impl Drop for Kubelet<'_> {
    fn drop(&mut self) {
        // The next one needs its ports. It may have ended by itself, which the test has noticed.
        let script = format!(
            "pid=$(cat {}); kill -9 $pid; for i in $(seq 100); do [ -e /proc/$pid ] || break; sleep 0.05; done",
            self.pid_file
        );
        let _ = self.cluster.in_node(NODE, &["sh", "-c", &script]);
    }
}

impl Drop for Joining<'_> {
    fn drop(&mut self) {
        self.cluster.unit(NODE, "start", "kubelet");
    }
}

#[test]
#[ignore = "needs a cluster (hack/test)"]
fn a_kubelet_joins_with_a_bootstrap_token_and_renews_its_certificates() {
    let cluster = Cluster::from_env();
    cluster.kubectl_stdin(&["apply", "-f", "-"], BOOTSTRAP);
    let ns = cluster.namespace("join");
    cluster.unit(NODE, "stop", "kubelet");
    let joining = Joining::new(&cluster);
    let kubelet = joining.start();
    poll("the kubelet has a client certificate", LIMIT, || {
        check(joining.certificate("kubelet-client").exists(), || joining.log())
    });
    poll("its request for a serving certificate is approved", LIMIT, || {
        let requests = cluster.try_get(&["csr"])?;
        let pending = requests["items"].as_array().into_iter().flatten().find(|request| {
            request["spec"]["signerName"] == "kubernetes.io/kubelet-serving"
                && request["status"]["certificate"].is_null()
        });
        let name = pending.map(|request| text(&request["metadata"]["name"])).ok_or_else(|| joining.log())?;
        cluster.try_kubectl(&["certificate", "approve", &name])
    });
    poll("it has the serving certificate", LIMIT, || {
        check(joining.certificate("kubelet-server").exists(), || joining.log())
    });
    node_condition(&cluster, "Ready", "True");
    ns.create(&pod("joined", &json!({"command": ["sh", "-c", "echo hello; sleep 10000"]}), &json!([])));
    ns.ready_pods("app=joined", 1);
    // The API server believes the kubelet's new certificate.
    assert_eq!(ns.kubectl(&["logs", "joined"]).trim(), "hello");

    drop(kubelet);
    let aged = joining.age_client_certificate();
    let _kubelet = joining.start();
    poll("the client certificate is renewed before it ends", LIMIT, || {
        let now = std::fs::read_to_string(joining.certificate("kubelet-client")).map_err(|error| error.to_string())?;
        check(now != aged, || joining.log())
    });
    ns.create(&pod("renewed", &json!({"command": ["sleep", "10000"]}), &json!([])));
    ns.ready_pods("app=renewed", 1);
}
