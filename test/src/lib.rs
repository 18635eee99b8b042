//! Drives a live cluster as its users do: with stock kubectl from the host, and with shell commands inside nodes and
//! pods. `hack/test` brings the cluster up and says through the environment where it is.
//!
//! Nothing here sleeps for a fixed time: every wait is a bounded poll that reports what it last saw.

pub mod differential;
pub mod overlay;

use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

const POLL: Duration = Duration::from_millis(100);
/// Long enough for a busy machine with two cores; a healthy cluster needs a fraction.
pub const LIMIT: Duration = Duration::from_secs(90);

/// The cluster under test.
pub struct Cluster {
    name: String,
    ketch: PathBuf,
    kubectl: PathBuf,
    old_kubectl: PathBuf,
    kubeconfig: PathBuf,
}

/// What hack/test has told through the environment.
pub fn setting(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: live tests are run by hack/test"))
}

impl Cluster {
    /// The cluster that hack/test has brought up.
    pub fn from_env() -> Self {
        Self {
            name: setting("KETCH_CLUSTER"),
            ketch: setting("KETCH_BIN").into(),
            kubectl: setting("KETCH_KUBECTL").into(),
            old_kubectl: setting("KETCH_OLD_KUBECTL").into(),
            kubeconfig: setting("KUBECONFIG").into(),
        }
    }

    fn kubectl_command(&self, program: &PathBuf, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.arg("--kubeconfig").arg(&self.kubeconfig).args(args);
        command
    }

    /// Runs kubectl; the error is what it printed.
    pub fn try_kubectl(&self, args: &[&str]) -> Result<String, String> {
        run(&mut self.kubectl_command(&self.kubectl, args))
    }

    /// Runs kubectl, which must succeed.
    pub fn kubectl(&self, args: &[&str]) -> String {
        self.try_kubectl(args).unwrap_or_else(|error| panic!("kubectl {}: {error}", args.join(" ")))
    }

    /// Runs the oldest kubectl that is tested, which must succeed.
    pub fn old_kubectl(&self, args: &[&str]) -> String {
        run(&mut self.kubectl_command(&self.old_kubectl, args))
            .unwrap_or_else(|error| panic!("old kubectl {}: {error}", args.join(" ")))
    }

    /// Runs kubectl with a manifest on its standard input; the error is what it printed.
    pub fn try_kubectl_stdin(&self, args: &[&str], manifest: &str) -> Result<String, String> {
        run_with_input(&mut self.kubectl_command(&self.kubectl, args), manifest)
    }

    pub fn kubectl_stdin(&self, args: &[&str], manifest: &str) -> String {
        self.try_kubectl_stdin(args, manifest).unwrap_or_else(|error| panic!("kubectl {}: {error}", args.join(" ")))
    }

    /// An object, or a list of them, as JSON; the error is what kubectl printed.
    pub fn try_get(&self, args: &[&str]) -> Result<Value, String> {
        let text = self.try_kubectl(&[&["get", "-o", "json"], args].concat())?;
        serde_json::from_str(&text).map_err(|error| format!("{error}: {text}"))
    }

    /// An object, or a list of them, which must be there.
    pub fn get(&self, args: &[&str]) -> Value {
        self.try_get(args).unwrap_or_else(|error| panic!("kubectl get {}: {error}", args.join(" ")))
    }

    /// kubectl in the background, such as a port-forward; ended when dropped.
    pub fn spawn_kubectl(&self, args: &[&str]) -> Running {
        let mut command = self.kubectl_command(&self.kubectl, args);
        Running(
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("kubectl starts"),
        )
    }

    /// Runs a program inside a node.
    pub fn in_node(&self, node: &str, argv: &[&str]) -> Result<String, String> {
        run(Command::new(&self.ketch).args(["exec", "--name", &self.name, node, "--"]).args(argv))
    }

    /// Controls a unit of a node: list, start, stop, restart, kill.
    pub fn unit(&self, node: &str, action: &str, unit: &str) -> String {
        let mut command = Command::new(&self.ketch);
        command.args(["unit", "--name", &self.name, node, action]).args((!unit.is_empty()).then_some(unit));
        run(&mut command).unwrap_or_else(|error| panic!("unit {action} {unit} on {node}: {error}"))
    }

    /// A fresh namespace, deleted when dropped.
    pub fn namespace(&self, purpose: &str) -> Namespace<'_> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("{purpose}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        self.kubectl(&["create", "namespace", &name]);
        poll("the default service account exists", LIMIT, || {
            self.try_kubectl(&["-n", &name, "get", "serviceaccount", "default"])
        });
        Namespace { cluster: self, name }
    }
}

/// A namespace of one test.
pub struct Namespace<'a> {
    cluster: &'a Cluster,
    pub name: String,
}

impl Namespace<'_> {
    pub fn kubectl(&self, args: &[&str]) -> String {
        self.cluster.kubectl(&[&["-n", &self.name], args].concat())
    }

    pub fn try_kubectl(&self, args: &[&str]) -> Result<String, String> {
        self.cluster.try_kubectl(&[&["-n", &self.name], args].concat())
    }

    pub fn create(&self, manifest: &str) {
        self.cluster.kubectl_stdin(&["-n", &self.name, "create", "-f", "-"], manifest);
    }

    pub fn apply(&self, manifest: &str) -> String {
        self.cluster.kubectl_stdin(&["-n", &self.name, "apply", "-f", "-"], manifest)
    }

    pub fn try_get(&self, args: &[&str]) -> Result<Value, String> {
        self.cluster.try_get(&[&["-n", &self.name], args].concat())
    }

    pub fn get(&self, args: &[&str]) -> Value {
        self.cluster.get(&[&["-n", &self.name], args].concat())
    }

    /// Waits until `count` pods with the label are Ready; answers them.
    pub fn ready_pods(&self, selector: &str, count: usize) -> Vec<Value> {
        poll(&format!("{count} pods with {selector} are Ready"), LIMIT, || {
            let list = self.try_get(&["pods", "-l", selector])?;
            let pods = list["items"].as_array().cloned().unwrap_or_default();
            let living: Vec<Value> =
                pods.into_iter().filter(|pod| pod["metadata"]["deletionTimestamp"].is_null()).collect();
            let ready = living.iter().filter(|pod| is_ready(pod)).count();
            if ready == count && living.len() == count { Ok(living) } else { Err(summary(&living)) }
        })
    }

    /// The name of the only Ready pod with the label.
    pub fn ready_pod(&self, selector: &str) -> String {
        text(&self.ready_pods(selector, 1)[0]["metadata"]["name"])
    }

    /// Runs a shell command in a pod's first container.
    pub fn sh(&self, pod: &str, script: &str) -> Result<String, String> {
        self.try_kubectl(&["exec", pod, "--", "sh", "-c", script])
    }
}

impl Drop for Namespace<'_> {
    fn drop(&mut self) {
        // The cluster goes away anyway; a failed test must keep its own message.
        let _ = self.cluster.try_kubectl(&["delete", "namespace", &self.name, "--wait=false"]);
    }
}

/// A background process, ended with its owner.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

pub fn condition<'a>(object: &'a Value, type_: &str) -> &'a str {
    let conditions = object["status"]["conditions"].as_array();
    let found = conditions.and_then(|all| all.iter().find(|c| c["type"] == type_));
    found.and_then(|c| c["status"].as_str()).unwrap_or("absent")
}

pub fn is_ready(object: &Value) -> bool {
    condition(object, "Ready") == "True"
}

/// One line per pod, for messages.
fn summary(pods: &[Value]) -> String {
    let line = |pod: &Value| {
        let statuses = &pod["status"]["containerStatuses"];
        format!(
            "{} on {} {} ready={} {}",
            text(&pod["metadata"]["name"]),
            text(&pod["spec"]["nodeName"]),
            text(&pod["status"]["phase"]),
            condition(pod, "Ready"),
            statuses[0]["state"]
        )
    };
    pods.iter().map(line).collect::<Vec<_>>().join("; ")
}

/// Asks until the answer is `Ok`, at most for `limit`; then panics with the last error.
pub fn poll<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        match probe() {
            Ok(value) => return value,
            Err(last) if Instant::now() >= deadline => panic!("{what}: not within {limit:?}; last seen: {last}"),
            Err(_) => std::thread::park_timeout(POLL),
        }
    }
}

/// Turns a condition into what `poll` wants.
pub fn check(holds: bool, seen: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(seen()) }
}

/// Runs a command without input; the error is what it printed.
pub fn run(command: &mut Command) -> Result<String, String> {
    outcome(&command.stdin(Stdio::null()).output().map_err(|error| error.to_string())?)
}

fn run_with_input(command: &mut Command, input: &str) -> Result<String, String> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| error.to_string())?;
    let mut stdin = child.stdin.take().expect("standard input was asked for");
    stdin.write_all(input.as_bytes()).map_err(|error| error.to_string())?;
    drop(stdin);
    outcome(&child.wait_with_output().map_err(|error| error.to_string())?)
}

fn outcome(output: &Output) -> Result<String, String> {
    let printed = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
    if output.status.success() {
        Ok(printed(&output.stdout))
    } else {
        Err(format!("{} {}", printed(&output.stdout), printed(&output.stderr)).trim().to_owned())
    }
}
